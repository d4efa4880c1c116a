"""What the checks of both sides do alike: the route's gradients, and differences of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..core.status import Status
from .ladder import Slope, measure_slope
from .subjects import Call, Subject, moved

__all__ = [
    "difference_slopes",
    "gradients_of",
    "require_directions",
    "require_reached",
    "require_subjects",
]


class _Ended(Protocol):
    """A result of either side."""

    @property
    def status(self) -> Status: ...
    @property
    def note(self) -> str: ...


def require_directions(directions: object) -> None:
    """Raise unless `directions` is a positive integer."""
    if isinstance(directions, bool) or not isinstance(directions, int):
        raise TypeError(f"directions must be an int; got {type(directions).__name__}")
    if directions < 1:
        raise ValueError(f"directions must be at least 1; got {directions}")


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


def difference_slopes(
    call: Call,
    subject: Subject,
    moves: Sequence[Tensor],
    solve: Callable[[Call], tuple[Status, float]],
    *,
    at: float,
    noise: float,
    goal: float,
) -> tuple[list[Slope | None], str]:
    """A slope of the result for every direction, and why there is none where there is none.

    Args:
        call: The arguments.
        subject: What is moved.
        moves: The directions.
        solve: Arguments without grad to the status and T or N*.
        at: T or N* where nothing is moved.
        noise: Absolute error of one such value.
        goal: Relative uncertainty at which the ladder may stop.
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
            return value
        reason = f"{status.name} at a step of {step:g}"
        return None

    def slope(move: Tensor) -> Slope | None:
        # The fewer digits, the longer the steps: the extrapolated difference errs by h^4.
        largest = torch.finfo(move.dtype).eps ** (1 / 8)
        return measure_slope(
            lambda step: value_at(move, step), at, noise=noise, goal=goal, largest=largest
        )

    return [slope(move) for move in moves], reason
