"""Does the user's function know its own derivative? Checked before any gradient is promised.

A flow that calls `autograd.grad(f(x), x)` without `create_graph=True` still requires grad through
its parameters, while its derivative with respect to x is missing, and no error is raised by anyone.
So one vector-Jacobian product is compared with a central difference along a random direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .evaluation import sum_of_products
from .leaves import LeafSet
from .status import MissingGradientError, NotReproducibleError

__all__ = ["check_derivatives", "check_reproducible"]


@dataclass(frozen=True)
class _Thresholds:
    """Relative size of the perturbation, and of a mismatch that counts."""

    perturbation: float
    mismatch: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> _Thresholds:
        eps = torch.finfo(dtype).eps
        return cls(perturbation=eps ** (1 / 3), mismatch=max(1e-4, 20 * eps ** (2 / 3)))


def check_reproducible(first: Tensor, second: Tensor, *, name: str) -> None:
    """Two evaluations at one point must agree.

    Raises:
        NotReproducibleError: Naming the function.
    """
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
) -> None:
    """Compare the vector-Jacobian product of `traced` with central differences of `evaluate` at x.

    Args:
        evaluate: x, shape (n,), to a value without graph.
        traced: x that requires grad to a value with graph.
        x: The point.
        leaves: Parameters, which are perturbed in place for a moment (exactly restored).
        name: "flow", "criterion" or "update", for the message.

    Raises:
        MissingGradientError: A derivative is missing or partly missing.
    """
    limits = _Thresholds.of(x.dtype)
    generator = torch.Generator().manual_seed(0)

    def random_like(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        return noise.to(dtype=tensor.dtype, device=tensor.device)

    point = x.detach().clone().requires_grad_(True)
    value = traced(point)
    cotangent = random_like(value)
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

    def along_x(size: float) -> Tensor:
        return evaluate(x + size * x_direction)

    _compare(along_x, cotangent, exact, limits, f"the state in the {name}", value)
    if parameters:
        directions = [
            random_like(p) * (p.detach().abs() + _rms(p.detach()) + _tiny_scale(p))
            for p in parameters
        ]
        filled = [
            torch.zeros_like(p) if g is None else g
            for g, p in zip(grads[1:], parameters, strict=True)
        ]
        exact = float(sum_of_products(filled, directions))

        def along_parameters(size: float) -> Tensor:
            return _perturbed(parameters, directions, size, lambda: evaluate(x))

        _compare(along_parameters, cotangent, exact, limits, f"the parameters of the {name}", value)


def _perturbed(
    parameters: list[Tensor], directions: list[Tensor], size: float, evaluate: Callable[[], Tensor]
) -> Tensor:
    """Evaluate with shifted parameters; values and version counters survive the swap of storage."""
    originals = [p.data for p in parameters]
    try:
        for p, original, direction in zip(parameters, originals, directions, strict=True):
            p.data = original + size * direction
        return evaluate()
    finally:
        for p, original in zip(parameters, originals, strict=True):
            p.data = original


def _compare(
    path: Callable[[float], Tensor],
    cotangent: Tensor,
    exact: float,
    limits: _Thresholds,
    what: str,
    value: Tensor,
) -> None:
    size = limits.perturbation

    def difference(h: float) -> float:
        return float((cotangent * (path(h) - path(-h))).sum()) / (2 * h)

    def one_sided() -> tuple[float, float]:
        ahead, here, behind = (float((cotangent * path(h)).sum()) for h in (size, 0.0, -size))
        return (here - behind) / size, (ahead - here) / size

    coarse, fine = difference(size), difference(0.5 * size)
    noise = torch.finfo(value.dtype).eps * float((cotangent * value.detach()).abs().sum()) / size
    gap = abs(fine - exact)
    allowed = limits.mismatch * max(abs(fine), abs(exact)) + 100 * noise
    # A difference that has not settled (a kink nearby) is no witness.
    if gap > allowed and abs(fine - coarse) < 0.1 * gap:
        slopes = one_sided()
        if max(slopes) - min(slopes) > gap and min(slopes) <= exact <= max(slopes):
            return  # exactly on a kink: autograd takes one side of it, a central difference both
        raise MissingGradientError(
            f"the derivative with respect to {what} is wrong or missing: autograd gives "
            f"{exact:.6g} along a "
            f"random direction, a central difference {fine:.6g}. The usual cause is a call of "
            "torch.autograd.grad without create_graph=True inside; others are .detach(), .item(), "
            "torch.no_grad() and NumPy."
        )


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt() if tensor.numel() else torch.zeros((), dtype=tensor.dtype)


def _tiny_scale(tensor: Tensor) -> float:
    """A scale for all-zero tensors, where a relative perturbation would be none."""
    return 1e-3 if not bool(tensor.detach().any()) else 0.0
