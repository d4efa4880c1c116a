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

from ode_stopping.flows.hessian_damping import InertialHessianFlow
from ode_stopping.problems.base import Objective, objective_gradient
from ode_stopping.problems.differentiation import value_and_gradient

Curvature = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Margins:
    """Margins at one time or, stacked, along a trajectory; >= 0 where the condition holds.

    Attributes:
        names: what each margin is, as a formula.
        values: shape (len(names),), or (len(names), times).
    """

    names: tuple[str, ...]
    values: Tensor

    def violation(self) -> Tensor:
        """Sum of the positive parts of the violations, shape () or (times,)."""
        return torch.relu(-self.values).sum(0)

    @property
    def hold(self) -> bool:
        """Whether every margin is >= 0 at every time."""
        return bool((self.values >= 0).all())


def convergence_margins(flow: InertialHessianFlow, t: Tensor | float) -> Margins:
    """w and (alpha - 3) w - t w', with w = gamma - beta' - beta/t and alpha = t a(t).

    Where the first is positive and the second not negative from t0 on, f(x(t)) - f* = O(1/(t^2 w))
    for convex f (damping alpha/t; kappa = 1, lambda = alpha - 1).

    Args:
        flow: the flow.
        t: flow time, > 0: 0-d, or shape (times,).
    """

    def at(time: Tensor) -> Tensor:
        weight, rate = value_and_gradient(lambda s: flow.weight(s, time), time)
        slope = torch.zeros_like(weight) if rate is None else rate
        alpha = time * flow.coefficients(time, time).damping
        return torch.stack([weight, (alpha - 3) * weight - time * slope])

    return Margins(("w", "(alpha - 3) w - t w'"), _over_times(at, t))


def stability_margins(
    flow: InertialHessianFlow, t: Tensor | float, x: Tensor, *, step: float, curvature: Curvature
) -> Margins:
    """Margins of the conditions under which Euler with a fixed step follows the flow (EIGAC).

        a beta <= gamma - beta' <= beta/h,   a = alpha/t
        sqrt(Lambda) <= (sqrt(gamma - beta') + sqrt(gamma - beta' - a beta))/beta

    Then f(x_k) - f* = O(1/k). Roots of negative numbers count as 0: the first margin tells of them.

    Args:
        flow: the flow.
        t: flow time, 0-d, or shape (times,).
        x: positions, shape (d,), or (times, d).
        step: h, in flow time.
        curvature: x -> Lambda(x) >= |hess f(x)|, 0-d: a constant function, or
            `hessian_norm(objective)`.
    """

    def at(time: Tensor, point: Tensor) -> Tensor:
        now = flow.coefficients(time, point)
        drive = now.gamma - now.beta_rate
        spare = drive - now.damping * now.beta
        roots = _root(drive) + _root(spare)
        bound = roots / now.beta - _root(curvature(point))
        return torch.stack([spare, now.beta / step - drive, bound])

    names = ("gamma - beta' - a beta", "beta/h - (gamma - beta')", "step bound - sqrt(Lambda)")
    return Margins(names, _over_times(at, t, x))


def hessian_norm(objective: Objective, *, iterations: int = 20, seed: int = 0) -> Curvature:
    """x -> |hess f(x)| in the 2-norm by power iteration, for `stability_margins`.

    A lower estimate that tends to the norm; the vector is a constant of the derivative, which is
    that of the Rayleigh quotient.

    Args:
        objective: f.
        iterations: products with the Hessian.
        seed: of the first vector.
    """

    def norm(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        vector = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)

        def product(v: Tensor, *, keep: bool) -> Tensor:
            with torch.enable_grad():
                point = x if x.requires_grad else x.detach().requires_grad_()
                slope = (objective_gradient(objective, point) * v).sum()
                (row,) = torch.autograd.grad(slope, point, create_graph=keep)
            if point is not x:
                point.requires_grad_(False)
            return row if keep else row.detach()

        for _ in range(iterations):
            vector = vector / vector.norm().clamp_min(torch.finfo(x.dtype).tiny)
            vector = product(vector, keep=False)
        vector = vector / vector.norm().clamp_min(torch.finfo(x.dtype).tiny)
        quotient = (vector * product(vector, keep=torch.is_grad_enabled())).sum()
        return quotient.abs()

    return norm


def _root(value: Tensor) -> Tensor:
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), torch.zeros_like(value))


def _over_times(at: Callable[..., Tensor], t: Tensor | float, *others: Any) -> Tensor:
    """`at` at one time, or at each of many, stacked in the last axis."""
    like = others[0] if others else torch.zeros((), dtype=torch.float64)
    times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=like.dtype)
    if times.ndim == 0:
        return at(times, *others)
    rows = [at(times[i], *(other[i] for other in others)) for i in range(times.shape[0])]
    return torch.stack(rows, dim=-1)
