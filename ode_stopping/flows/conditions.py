"""Conditions under which the inertial flow with Hessian-driven damping converges and is stable.

Both are from Xie, Yin, Wen, "ODE-based Learning to Optimize" (arXiv 2406.02006). They come as
margins, which are >= 0 where a condition holds and tell by how much it is violated elsewhere: their
negative parts, integrated along a trajectory, are the penalties of StoPM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..problems.base import Objective, objective_gradient
from ..problems.differentiation import value_and_gradient
from .hessian_damping import Coefficients, InertialHessianFlow
from .roots import root_without_derivative_at_zero

Curvature = Callable[[Tensor], Tensor | float]


@dataclass(frozen=True)
class Margins:
    """Margins at one time or, stacked, along a trajectory; >= 0 where the condition holds.

    Attributes:
        names: What each margin is, as a formula.
        values: Shape (len(names),), or (len(names), times).
    """

    names: tuple[str, ...]
    values: Tensor

    def violation(self) -> Tensor:
        """Sum of the positive parts of the violations, shape () or (times,)."""
        return violation(self.values)

    @property
    def hold(self) -> bool:
        """Whether every margin is >= 0 at every time."""
        return bool((self.values >= 0).all())


def violation(values: Tensor) -> Tensor:
    """Sum over the margins of what is missing to 0."""
    return torch.relu(-values).sum(0)


def convergence_margins(flow: InertialHessianFlow, t: Tensor | float) -> Margins:
    """w and (alpha - 3) w - t w', with w = gamma - beta' - beta/t and alpha = t a(t).

    Where the first is positive and the second not negative from t0 on, f(x(t)) - f* = O(1/(t^2 w))
    for convex f (damping alpha/t; kappa = 1, lambda = alpha - 1).

    Args:
        flow: The flow.
        t: Flow time, > 0: 0-d, or shape (times,).

    Raises:
        ValueError: t <= 0.
    """

    def at(time: Tensor) -> Tensor:
        weight, rate = value_and_gradient(lambda s: flow.weight(s, time), time)
        slope = torch.zeros_like(weight) if rate is None else rate
        return convergence_values(time, flow.coefficients(time, time).damping, weight, slope)

    return Margins(("w", "(alpha - 3) w - t w'"), _over_times(at, t))


def stability_margins(
    flow: InertialHessianFlow, t: Tensor | float, x: Tensor, *, step: float, curvature: Curvature
) -> Margins:
    """Margins of the conditions under which Euler with a fixed step follows the flow (EIGAC).

        a beta <= gamma - beta' <= beta/h,   a = alpha/t
        sqrt(Lambda) <= (sqrt(gamma - beta') + sqrt(gamma - beta' - a beta))/beta

    Then f(x_k) - f* = O(1/k). Roots of negative numbers count as 0: the first margin tells of them.

    Args:
        flow: The flow.
        t: Flow time, 0-d, or shape (times,).
        x: Positions, shape (d,), or (times, d).
        step: h, in flow time.
        curvature: x -> Lambda(x) >= |hess f(x)|, 0-d: a constant function, or
            `hessian_norm(objective)`.

    Raises:
        ValueError: `step` not positive; shapes of t and x that do not go together; beta = 0 at a
            time, where the second condition cannot hold and the third has no bound.
    """
    if not step > 0:
        raise ValueError(f"step must be positive; got {step:g}")

    def at(time: Tensor, point: Tensor) -> Tensor:
        now = flow.coefficients(time, point)
        if not bool(now.beta > 0):
            raise ValueError(
                "the conditions of stability need beta > 0: they divide by it; got beta = "
                f"{float(now.beta.detach()):g} at t = {float(time.detach()):g}"
            )
        largest = torch.as_tensor(curvature(point), dtype=point.dtype, device=point.device)
        return stability_values(now, step, largest)

    names = ("gamma - beta' - a beta", "beta/h - (gamma - beta')", "step bound - sqrt(Lambda)")
    return Margins(names, _over_times(at, t, x))


def convergence_values(t: Tensor, damping: Tensor, weight: Tensor, rate: Tensor) -> Tensor:
    """The margins of `convergence_margins` from a(t), w and w', shape (2,)."""
    return torch.stack([weight, (t * damping - 3) * weight - t * rate])


def stability_values(now: Coefficients, step: float, largest: Tensor) -> Tensor:
    """The margins of `stability_margins` from the coefficients and Lambda, shape (3,)."""
    root = root_without_derivative_at_zero
    drive = now.gamma - now.beta_rate
    spare = drive - now.damping * now.beta
    bound = (root(drive) + root(spare)) / now.beta - root(largest)
    return torch.stack([spare, now.beta / step - drive, bound])


def hessian_norm(
    objective: Objective, *, iterations: int = 20, seed: int = 0
) -> Callable[[Tensor], Tensor]:
    """x -> |hess f(x)| in the 2-norm by power iteration, for `stability_margins`.

    |hess f(x) v| with the unit vector v of the iteration: a lower estimate that tends to the norm,
    whatever the signs of the eigenvalues. v is a constant of the derivative.

    Args:
        objective: f.
        iterations: Products with the Hessian.
        seed: Of the first vector.
    """

    def norm(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        vector = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        with torch.no_grad():
            for _ in range(iterations):
                product = _hessian_product(objective, x, vector / vector.norm())
                if not bool((product != 0).any()):
                    break  # a Hessian of zeros, or a vector that it takes to zero
                vector = product
            vector = vector / vector.norm()
        return torch.linalg.vector_norm(_hessian_product(objective, x, vector))

    return norm


def _hessian_product(objective: Objective, x: Tensor, vector: Tensor) -> Tensor:
    """Hess f(x) v, in every autograd mode."""

    def slope(point: Tensor) -> Tensor:
        return (objective_gradient(objective, point) * vector).sum()

    product = value_and_gradient(slope, x)[1]
    return torch.zeros_like(x) if product is None else product


def _over_times(at: Callable[..., Tensor], t: Tensor | float, *others: Any) -> Tensor:
    """`at` at one time, or at each of many, stacked in the last axis."""
    like = others[0] if others else torch.zeros((), dtype=torch.float64)
    given = t if isinstance(t, Tensor) else torch.tensor(t, dtype=like.dtype, device=like.device)
    times = given if given.is_floating_point() else given.to(like.dtype)
    if times.ndim == 0:
        return at(times, *others)
    if times.ndim > 1 or times.shape[0] == 0:
        raise ValueError(f"t must be 0-d or of shape (times,), got {tuple(times.shape)}")
    for other in others:
        if other.ndim < 2 or other.shape[0] != times.shape[0]:
            raise ValueError(
                f"x must have shape ({times.shape[0]}, d), one row a time, got {tuple(other.shape)}"
            )
    rows = [at(times[i], *(other[i] for other in others)) for i in range(times.shape[0])]
    return torch.stack(rows, dim=-1)
