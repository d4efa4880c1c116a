"""Does the user's function know its own derivative? Checked before any gradient is promised.

A flow that calls `autograd.grad(f(x), x)` without `create_graph=True` still requires grad through
its parameters, while its derivative with respect to x is missing, and no error is raised by anyone.
So one vector-Jacobian product is compared with a central difference along a random direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from typing import Any

import torch
from torch import Tensor

from .functions import sum_of_products
from .leaves import LeafSet, walk
from .states import StateLayout
from .status import MissingGradientError, NotReproducibleError
from .substitution import Substitution

__all__ = [
    "Thresholds",
    "check_derivatives",
    "check_reproducible",
    "check_same_value",
    "check_time",
    "disagreement",
    "if_allowed",
    "natural_size",
    "noise_like",
    "wider_direction",
]

_SHARE_OF_STEP = 1e-2
# The scale of a tensor of zeros, in the units of its problem: one has to be taken.
_ZEROS = 1e-3
# What a leaf does has to be so many roundings to be seen.
_SEEN = 1e3

# Leaves beyond these are compared together.
_SINGLE_LEAVES = 12

_USUAL = (
    "The usual cause is a call of torch.autograd.grad without create_graph=True inside; others are "
    ".detach(), .item(), torch.no_grad() and NumPy."
)
_HOOKS = (
    "A hook on a tensor or a module (register_hook, register_full_backward_hook) changes gradients "
    "on the way: what it makes of them is not the derivative. Remove it."
)


@dataclass(frozen=True)
class Thresholds:
    """Sizes of a comparison with differences, all relative.

    Attributes:
        perturbation: By how much is moved.
        mismatch: The difference that counts.
        eps: One rounding.
    """

    perturbation: float
    mismatch: float
    eps: float

    @classmethod
    def of(cls, *tensors: Tensor) -> Thresholds:
        """For a function of these: it may compute in the coarsest of their types."""
        eps = max(torch.finfo(p.dtype).eps for p in tensors if p.is_floating_point())
        return cls(eps ** (1 / 3), max(1e-4, 20 * eps ** (2 / 3)), eps)


def noise_like(*, seed: int) -> Callable[[Tensor], Tensor]:
    """Normal numbers of the shape, dtype and device of a tensor, the same ones on every device."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return drawn.to(dtype=tensor.dtype, device=tensor.device)

    return noise


def natural_size(tensor: Tensor) -> Tensor:
    """By how much each element is moved where it is moved by its own size, > 0."""
    tensor = tensor.detach()
    return tensor.abs() + _rms(tensor) + _tiny_scale(tensor)


def wider_direction(
    leaf: Tensor, gradient: Tensor, size: float, limits: Thresholds
) -> Tensor | None:
    """By how much a leaf is moved that is so small that a share of itself does not show.

    A parameter of 1e-10 among values of 1 acts as one of 0: moved by itself, it changes a value by
    less than its rounding, whatever its derivative. Where that is so, the move is one that shows
    by the derivative that is claimed, and no larger than that of a leaf of zeros.

    Args:
        leaf: The leaf.
        gradient: Of a value, to it.
        size: Of the numbers that the value is made of.
        limits: Of the comparison.

    Returns:
        The size of the direction; None where the leaf is seen as it is, or is no small one.
    """
    if not leaf.numel():
        return None
    own, slope = natural_size(leaf), gradient.detach().abs().to(leaf.dtype).reshape(leaf.shape)
    if float((slope * own).max()) >= _SEEN * limits.eps * size / limits.perturbation:
        return None
    steepest = float(slope.max())
    length = _ZEROS * min(1.0, size / steepest) if steepest > 0.0 else _ZEROS
    return None if float(own.max()) >= length else torch.full_like(own, length)


def if_allowed(evaluate: Callable[[], Any]) -> Any:
    """A value, or NaN where a function refuses numbers that it was not made for."""
    try:
        return evaluate()
    except (ArithmeticError, AssertionError, RuntimeError, ValueError):
        return nan


def check_reproducible(first: Tensor, second: Tensor, *, name: str) -> None:
    """Two evaluations at one point must agree.

    Raises:
        NotReproducibleError: Naming the function.
    """
    if torch.equal(first, second):
        return
    eps = torch.finfo(first.dtype).eps
    finite = first[torch.isfinite(first)]
    allowed = 1e3 * eps * float(finite.abs().max()) if finite.numel() else 0.0
    # NaN at the same places is reproducible: that the run diverged is for its status to say.
    if not torch.allclose(first, second, rtol=0.0, atol=allowed, equal_nan=True):
        raise NotReproducibleError(
            f"the {name} gave two different values at the same point (a minibatch drawn inside, "
            "dropout, hidden "
            "state?). Its derivative along a stored path would belong to another path. Fix the "
            "sample, seed "
            "it by the step or the time, or put the module into eval mode."
        )


def check_derivatives(
    evaluate: Callable[[Tensor], Tensor],
    traced: Callable[[Tensor], Tensor],
    x: Tensor,
    leaves: LeafSet,
    *,
    name: str,
    layout: StateLayout | None = None,
    beside: Tensor | None = None,
) -> None:
    """Compare the vector-Jacobian product of `traced` with central differences of `evaluate` at x.

    Args:
        evaluate: x, shape (n,), to a value without graph.
        traced: x that requires grad to a value with graph.
        x: The point.
        leaves: Parameters; other values are seen in their place, they themselves are left alone.
        name: "flow", "criterion" or "update", for the message.
        layout: Pieces of the value, none of which is to hide behind a larger one.
        beside: Numbers of the shape of the value that it was a difference to: a piece that is small
            beside them is their rounding.

    Raises:
        MissingGradientError: A derivative is missing or partly missing.
    """
    limits = Thresholds.of(x, *leaves.tensors)
    random_like = noise_like(seed=0)
    point = x.detach().clone().requires_grad_(True)
    value = traced(point)
    sized = value.detach() if beside is None else torch.maximum(value.detach().abs(), beside.abs())
    cotangent = random_like(value) / _piece_sizes(sized, layout)
    parameters = leaves.detached_from_history()
    grads: list[Tensor | None] = [None] * (1 + len(parameters))
    if value.requires_grad:
        grads = list(
            torch.autograd.grad(
                value,
                [point, *parameters],
                cotangent,
                allow_unused=True,
                retain_graph=leaves.has_history,
            )
        )
    x_direction = random_like(x) * (x.abs() + 1e-2 * _rms(x) + _tiny_scale(x))
    exact = float((grads[0] * x_direction).sum()) if grads[0] is not None else 0.0

    def along_x(size: float) -> float:
        return float((cotangent * evaluate(x + size * x_direction)).sum())

    hooked = partial(_has_hooks, value, leaves)
    size = float((cotangent * value.detach()).abs().sum())
    _compare(along_x, exact, limits, size, f"the state in the {name}", hooked)
    if not parameters:
        return
    # Each leaf by itself: a small one must not hide behind a large one.
    groups = [[k] for k in range(len(parameters))[:_SINGLE_LEAVES]]
    rest: list[int] = []
    if len(parameters) > _SINGLE_LEAVES:
        with Substitution(parameters, parameters) as looked:
            evaluate(x)
        rest = [k for k, seen in enumerate(looked.met) if seen and k >= _SINGLE_LEAVES]
    for group in [*groups, rest] if rest else groups:
        moved = [parameters[k] for k in group]
        directions = [random_like(p) * natural_size(p) for p in moved]
        filled = [
            torch.zeros_like(p) if g is None else g
            for g, p in zip((grads[1 + k] for k in group), moved, strict=True)
        ]
        compared = (filled, cotangent, limits, size, name, hooked)
        slope = _compare_leaves(lambda: evaluate(x), moved, directions, *compared)
        if len(group) == 1 and (
            slope is None or abs(slope) * limits.perturbation > _SEEN * limits.eps * size
        ):
            continue
        wider = [wider_direction(p, g, size, limits) for p, g in zip(moved, filled, strict=True)]
        if any(one is not None for one in wider):
            noise = [
                torch.zeros_like(p) if one is None else random_like(p) * one
                for p, one in zip(moved, wider, strict=True)
            ]
            _compare_leaves(lambda: if_allowed(partial(evaluate, x)), moved, noise, *compared)


def _compare_leaves(
    evaluate: Callable[[], Tensor],
    leaves: list[Tensor],
    directions: list[Tensor],
    gradients: list[Tensor],
    cotangent: Tensor,
    limits: Thresholds,
    size: float,
    name: str,
    hooked: Callable[[], bool],
) -> float | None:
    """Compare, and return the derivative along the directions as the gradients have it.

    None where there was nothing to compare with: the function does not read all of the leaves, or
    not from where they can be moved.
    """
    moved = True

    def along(length: float) -> float:
        nonlocal moved
        values = [
            (p.detach() + length * d).to(p.dtype) for p, d in zip(leaves, directions, strict=True)
        ]
        with Substitution(leaves, values) as looked:
            found = float((cotangent * evaluate()).sum())
        if not all(looked.met):
            # What a compiled function holds inside of itself cannot be moved, or is not used here.
            moved = False
            return nan
        # A leaf of low precision moves by what it can hold: to first order, what is missing.
        for p, d, g, there in zip(leaves, directions, gradients, values, strict=True):
            if p.dtype != torch.float64:
                wanted = p.detach().double() + length * d.double()
                found += float((g.double() * (wanted - there.double())).sum())
        return found

    exact = float(
        sum_of_products([g.double() for g in gradients], [d.double() for d in directions])
    )
    _compare(along, exact, limits, size, f"the parameters of the {name}", hooked)
    return exact if moved else None


def check_time(
    evaluate: Callable[[float], Tensor],
    traced: Callable[[Tensor], Tensor],
    t: float,
    *,
    bounds: tuple[float, float],
    like: Tensor,
    name: str,
    layout: StateLayout | None = None,
) -> None:
    """Compare the derivative to t with a central difference.

    Args:
        evaluate: t to a value without graph.
        traced: t, a tensor that requires grad, to a value with graph.
        t: The time.
        bounds: Times between which the function may be evaluated; the difference takes a small
            fraction of their distance.
        like: A state, for the dtype in which the function sees t.
        name: "flow", "criterion" or "update", for the message.
        layout: Pieces of the value.

    Raises:
        MissingGradientError: The derivative is missing or partly missing.
    """
    # The scale of t is known, that of a step: larger differences see through a clock that is
    # rounded to single precision on the way.
    limits = replace(Thresholds.of(like), perturbation=_SHARE_OF_STEP)
    low, high = bounds
    span = high - low
    reach = limits.perturbation * span
    # Where the clock cannot tell the two sides apart there is no difference to compare with.
    if not reach > 1e4 * torch.finfo(like.dtype).eps * max(abs(low), abs(high)):
        return
    middle = min(max(t, low + reach), high - reach)
    time = torch.tensor(middle, dtype=like.dtype, device=like.device, requires_grad=True)
    value = traced(time)
    cotangent = noise_like(seed=1)(value) / _piece_sizes(value.detach(), layout)
    exact = 0.0
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(
            value, time, cotangent, allow_unused=True, retain_graph=True
        )
        exact = 0.0 if gradient is None else float(gradient) * span
    _compare(
        lambda h: float((cotangent * evaluate(middle + h * span)).sum()),
        exact,
        limits,
        float((cotangent * value.detach()).abs().sum()),
        f"t in the {name}",
    )


def check_same_value(again: float, before: float, scale: float, *, name: str) -> None:
    """A value of the forward run, computed again in the backward pass, must be the same.

    Args:
        again: The value now.
        before: The value in the forward run.
        scale: Size of what it was computed from, for rounding.
        name: Of the function.

    Raises:
        NotReproducibleError: It is another one.
    """
    allowed = 1e3 * torch.finfo(torch.float64).eps * (abs(before) + scale)
    if not abs(again - before) <= allowed:
        raise NotReproducibleError(
            f"the {name} gave {before:.9g} in the forward run and {again:.9g} now, at the same "
            "point: something that it uses has changed since (a loop variable in a closure, a "
            "buffer of a module), so its derivative would belong to another problem. Take the "
            "gradient before the change, or bind the value when the function is made."
        )


def _piece_sizes(value: Tensor, layout: StateLayout | None) -> Tensor:
    """Root mean square of the piece of each element; 1 where it is zero, or there is one piece."""
    if layout is None or len(layout.shapes) == 1 or value.ndim == 0:
        return torch.ones_like(value)
    sizes = layout.piecewise_rms(value)
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes))


def _has_hooks(value: Tensor, leaves: LeafSet) -> bool:
    """Whether a hook of the user's, on a tensor or a module, changes gradients on the way."""
    if any(getattr(p, "_backward_hooks", None) for p in leaves.tensors):
        return True
    _, nodes = walk([value])
    return any("BackwardHook" in node.name() for node in nodes)


def _compare(
    path: Callable[[float], float],
    exact: float,
    limits: Thresholds,
    size: float,
    what: str,
    hooked: Callable[[], bool] = lambda: False,
) -> None:
    found = disagreement(path, exact, limits, size)
    if found is not None:
        raise MissingGradientError(
            f"the derivative with respect to {what} is wrong or missing: autograd gives "
            f"{exact:.6g} along a "
            f"random direction, a central difference {found:.6g}. "
            + (_HOOKS if hooked() else _USUAL)
        )


def disagreement(
    path: Callable[[float], float],
    exact: float,
    limits: Thresholds,
    size: float,
    *,
    least: float = 0.0,
) -> float | None:
    """The central difference of `path` at 0 where it contradicts a derivative; None where not.

    Args:
        path: A function of a small number.
        exact: Its derivative at 0, as somebody claims.
        limits: How far to go, and what counts.
        size: Of the numbers that the values of `path` are made of, for rounding.
        least: A difference that does not count, relative to which `limits.mismatch` is taken.
    """
    length = limits.perturbation

    def difference(h: float) -> float:
        ahead = path(h)
        # (One side of NaN is enough.)
        return (ahead - path(-h)) / (2 * h) if ahead == ahead else nan

    fine = difference(0.5 * length)
    gap = abs(fine - exact)
    allowed = limits.mismatch * max(abs(fine), abs(exact), least)
    allowed += 100 * limits.eps * size / length
    # A difference that has not settled (a kink nearby) is no witness.
    if not gap > allowed or not abs(fine - difference(length)) < 0.1 * gap:
        return None
    ahead, here, behind = (path(h) for h in (length, 0.0, -length))
    slopes = (here - behind) / length, (ahead - here) / length
    # With room for the curvature of the sides: on a kink, autograd's value is one of the ends, and
    # a central difference takes both.
    inside = min(slopes) - allowed <= exact <= max(slopes) + allowed
    return None if max(slopes) - min(slopes) > gap and inside else fine


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt() if tensor.numel() else torch.zeros((), dtype=tensor.dtype)


def _tiny_scale(tensor: Tensor) -> float:
    """A scale for all-zero tensors, where a relative perturbation would be none."""
    return _ZEROS if not bool(tensor.detach().any()) else 0.0
