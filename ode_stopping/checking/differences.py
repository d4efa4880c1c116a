"""What all checks do alike: the route's gradients, differences of the result, and who is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite, sqrt
from typing import Protocol

import torch
from torch import Tensor

from ..core.status import Status
from .ladder import Slope, measure_slope
from .report import FINITE_DIFFERENCES, Finding, judge
from .subjects import Call, Directions, Subject, lacking, moved

__all__ = [
    "along",
    "compared",
    "difference_slopes",
    "gradients_of",
    "largest_step",
    "require_reached",
    "require_subjects",
    "rounding_of",
    "widened",
]

# A ladder of differences may stop where it is this much more certain than the promise.
_ENOUGH = 0.1
_ROUNDINGS = 100.0
# A change of so many times the noise over the promise can be seen; of so many it is seen clearly.
_SEEN, _CLEAR = 10.0, 1e3


class _Ended(Protocol):
    """A result of either side."""

    @property
    def status(self) -> Status: ...
    @property
    def note(self) -> str: ...


def require_reached(result: _Ended) -> None:
    """Raise a ValueError that names the status, unless the one target was reached."""
    if isinstance(result.status, list):
        raise ValueError(
            f"target must be one number, for one gradient; got {len(result.status)}: check each "
            "by itself"
        )
    if result.status is not Status.REACHED:
        raise ValueError(
            f"there is no gradient to check: {result.status.name}. {result.status.value}"
            + (f" [{result.note}]" if result.note else "")
        )


def require_subjects(subjects: Sequence[Subject], quantity: str) -> None:
    """Raise a ValueError if there is nothing to differentiate to."""
    if not subjects:
        raise ValueError(
            f"there is no gradient to check: nothing that {quantity} depends on requires grad (x0, "
            "target, t0, or a tensor that the functions use)"
        )


def gradients_of(value: Tensor, subjects: Sequence[Subject]) -> list[Tensor]:
    """The gradient to every subject; no `.grad` is touched."""
    tensors = [subject.tensor for subject in subjects]
    found = torch.autograd.grad(value, tensors, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, tensors, strict=True)]


def rounding_of(value: float, dtype: torch.dtype) -> float:
    """What a result is rounded by on its way."""
    return _ROUNDINGS * torch.finfo(dtype).eps * abs(value)


def largest_step(error: float) -> float:
    """First step of a ladder on values with this relative error, in units of the direction.

    The fewer digits, the longer the steps: the extrapolated difference errs by h^4.
    """
    return error ** (1 / 8)


def difference_slopes(
    call: Call,
    subject: Subject,
    moves: Sequence[Tensor],
    gradient: Tensor,
    solve: Callable[[Call], tuple[Status, float]],
    *,
    at: float,
    noise: float,
    promise: float,
    largest: float | None = None,
) -> tuple[list[Slope | None], str]:
    """A slope of the result for every direction, and why there is none where there is none.

    A subject of low precision moves by what it can hold, p + h d rounded: where the result is
    computed with more digits than that, the difference would have an error of order 1 or less in
    h. What is lacking of the move is made up for to first order, by the gradient that is checked;
    what a wrong one puts in is a rounding of its own error.

    Args:
        call: The arguments.
        subject: What is moved.
        moves: The directions.
        gradient: The route's.
        solve: Arguments without grad to the status and T, N* or f.
        at: T, N* or f where nothing is moved.
        noise: Absolute error of one such value.
        promise: Relative error that is allowed of the route.
        largest: Largest step; by default one that suits values of the move's dtype.
    """
    if not subject.movable:
        return [None] * len(moves), "used through what was computed from it beforehand: not moved"
    plain = call.detached()
    reason = ""

    def value_at(move: Tensor, step: float) -> float | None:
        nonlocal reason
        try:
            with moved(plain, subject, move, step) as shifted:
                status, value = solve(shifted)
        except (RuntimeError, ValueError, ArithmeticError) as error:
            reason = f"no value at a step of {step:g}: {error}"
            return None
        if status is Status.REACHED:
            made_up = along(gradient, lacking(subject, move, step))
            return value + made_up if isfinite(made_up) else value
        reason = f"{status.name} at a step of {step:g}"
        return None

    def slope(move: Tensor, figure: float) -> Slope | None:
        found = None
        for factor in _factors(subject, move):
            found = measure_slope(
                lambda step, factor=factor: value_at(factor * move, step),  # type: ignore[misc]
                at,
                noise=noise,
                goal=_ENOUGH * promise,
                largest=largest or largest_step(torch.finfo(move.dtype).eps),
                gradient=factor * figure,
            )
            if found is not None:
                return found.of_direction(factor)
        return found

    return [slope(move, along(gradient, move)) for move in moves], reason


def along(gradient: Tensor, move: Tensor | None) -> float:
    """The derivative along a move, with no digit of either lost; 0 for None."""
    return 0.0 if move is None else float((_wide(gradient) * _wide(move)).sum())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _rounding(gradient: Tensor, move: Tensor, parts: int) -> float:
    """What the type of a gradient cannot hold of its figure along a move.

    One that is added up from parts in the type of its leaf is rounded with each of them.
    """
    if not gradient.is_floating_point():
        return 0.0
    size = along(gradient.abs(), move.abs())
    return sqrt(parts) * torch.finfo(gradient.dtype).eps * size if isfinite(size) else 0.0


def _factors(subject: Subject, move: Tensor) -> list[float]:
    """1, and for a leaf that is moved by more than its own size that size: it may not be zero."""
    own, size = float(subject.tensor.detach().norm()), float(move.norm())
    return [1.0, own / size] if subject.kind == "leaf" and 0.0 < own < 0.5 * size else [1.0]


def widened(
    chosen: Directions, gradients: Sequence[Tensor], noise: float, promise: float
) -> Directions:
    """The directions, those of small leaves so long that what they do is seen above the noise.

    A parameter of 1e-8 among numbers of 1 is as good as 0: moved by a share of itself, it does less
    than the noise. None is moved farther than one of zeros is.

    Args:
        chosen: The directions.
        gradients: Of the result, one a subject.
        noise: Absolute error of one value of the result.
        promise: Relative error that is allowed of the route.
    """
    return [
        (subject, [_widened(subject, move, gradient, noise / promise) for move in moves])
        for (subject, moves), gradient in zip(chosen, gradients, strict=True)
    ]


def _widened(subject: Subject, move: Tensor, gradient: Tensor, seen: float) -> Tensor:
    size = float(move.norm()) / max(move.numel(), 1) ** 0.5
    if subject.kind != "leaf" or not 0.0 < size < subject.size:
        return move
    step = largest_step(torch.finfo(move.dtype).eps)
    change = abs(along(gradient, move)) * step
    if change >= _SEEN * seen:
        return move
    farthest = subject.size / size
    return min(farthest, _CLEAR * seen / change if change > 0.0 else farthest) * move


def compared(
    chosen: Directions,
    gradients: Sequence[Tensor],
    differences: Callable[[Subject, list[Tensor], Tensor], tuple[list[Slope | None], str]],
    *,
    promise: float,
    least: float,
    road: str = "",
    others: Sequence[list[Slope | None]] | None = None,
    why_not: str = "",
    parts: int = 1,
) -> list[Finding]:
    """The gradients against differences and, if named, another road, subject by subject.

    Args:
        chosen: The subjects with their directions.
        gradients: The route's gradients.
        differences: Subject, moves and the route's gradient to slopes, and why there are none.
        promise: Relative error that is allowed of the route.
        least: What a rounding of the result is (`rounding_of`).
        road: The name of the other road; empty for none.
        others: Its slopes, a list a subject; None where it has none.
        why_not: Why it has none.
        parts: Number of parts that a gradient is added up from.
    """
    findings = []
    for index, ((subject, moves), gradient) in enumerate(zip(chosen, gradients, strict=True)):
        figures = [along(gradient, move) for move in moves]
        roundings = [_rounding(gradient, move, parts) for move in moves]
        slopes, note = differences(subject, moves, gradient)
        pairs = list(zip(figures, slopes, strict=True))
        findings += judge(
            subject.name,
            FINITE_DIFFERENCES,
            pairs,
            promise=promise,
            why_not=note,
            least=least,
            roundings=roundings,
        )
        if road:
            other = others[index] if others is not None else [None] * len(moves)
            # What takes one side of a kink is no judge there.
            kinked = [slope is not None and slope.sides is not None for slope in slopes]
            pairs = list(zip(figures, other, strict=True))
            findings += judge(
                subject.name,
                road,
                pairs,
                promise=promise,
                why_not=why_not,
                kinked=kinked,
                least=least,
                roundings=roundings,
            )
    return findings
