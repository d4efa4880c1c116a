"""What is claimed about the energies of the flows, and by how much a claim is missed.

A claim about an energy E is a bound, E' <= bound(t, state), at every state: that is tested at
random states without any solve. `excess` is by how much the worst of them exceeds the bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from augmented import Pieces, hessian_damped, points, problem, rate_along
from torch import Tensor

from ode_stopping.flows import (
    AdamFlow,
    AtLeast,
    DiagonalPreconditioner,
    GradientFlow,
    HeavyBallFlow,
    HighResolutionFlow,
    InertialHessianFlow,
    NesterovFlow,
    PolynomialSchedule,
    PreconditionedFlow,
    RMSPropFlow,
    StronglyConvexNesterovFlow,
    VanishingDamping,
    convergence_margins,
)
from ode_stopping.flows.hessian_damping import HessianDampedFlow
from ode_stopping.flows.inertial import InertialFlow
from ode_stopping.problems import LogisticRegression

TIMES = (0.6, 2.0, 9.0)
Energy = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Objective:
    """f with its modulus of convexity, its least value and where that is."""

    f: Any
    modulus: float
    minimum: float
    minimizer: Tensor


def ridge() -> Objective:
    """Logistic regression on noise, with x* by Newton's method."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.arange(20) % 3 == 0, 1.0, -1.0).double()
    f = LogisticRegression(rows, labels, regularization=0.1)
    x = torch.zeros(3, dtype=torch.float64)
    for _ in range(20):
        x = x - torch.linalg.solve(torch.autograd.functional.hessian(f, x), f.gradient(x))
    assert float(f.gradient(x).norm()) < 1e-15
    return Objective(f, 0.1, float(f(x)), x)


CONVEX = {
    "quartic": Objective(problem(), 1.0, 0.0, torch.zeros(3, dtype=torch.float64)),
    "ridge": ridge(),
}


def slope_squared(flow: Any, x: Tensor) -> Tensor:
    return flow.gradient(x).square().sum(-1)


@dataclass(frozen=True)
class Claim:
    """E' <= bound(flow, objective, t, state, E), for a flow made for an objective.

    Attributes:
        exact: E' is the bound.
        wrong: a wrong energy (flow, objective, t, state), which must not pass.
    """

    make: Callable[[Objective], Any]
    bound: Callable[[Any, Objective, Tensor, Pieces, Tensor], Tensor]
    wrong: Callable[[Any, Objective, Tensor, Pieces], Tensor]
    exact: bool = False


def squares(v: Tensor) -> Tensor:
    return v.square().sum(-1)


def margin_bound(
    flow: InertialHessianFlow, o: Objective, t: Tensor, s: Pieces, E: Tensor
) -> Tensor:
    """-t ((alpha - 3) w - t w') (f - f*) - t^2 w beta |g|^2, from convexity alone where w > 0."""
    weight, spare = convergence_margins(flow, t).values
    assert float(weight) > 0
    beta = flow.coefficients(t, t).beta
    return -t * spare * (o.f(s[0]) - o.minimum) - t**2 * weight * beta * slope_squared(flow, s[0])


def adam_bound(flow: AdamFlow, o: Objective, t: Tensor, s: Pieces, E: Tensor) -> Tensor:
    tau1, tau2 = float(flow.tau1), float(flow.tau2)
    return -(1 - tau1 / (4 * tau2)) * (s[1].square() / (s[2].sqrt() + flow.eps)).sum(-1)


def nesterov_energy(flow: Any, o: Objective, t: Tensor, s: Pieces, factor: float) -> Tensor:
    """t^2 w (f - f*) + |factor (alpha - 1)(x - x*) + t v|^2/2."""
    is_damped = isinstance(flow, InertialHessianFlow)
    weight = convergence_margins(flow, t).values[0] if is_damped else 1.0
    alpha = t * (flow.coefficients(t, t).damping if is_damped else flow.damping_at(t, t))
    moved = factor * (alpha - 1) * (s[0] - o.minimizer) + t * s[1]
    return t**2 * weight * (o.f(s[0]) - o.minimum) + 0.5 * squares(moved)


def doubled_cross_term(flow: Any, o: Objective, t: Tensor, s: Pieces) -> Tensor:
    return nesterov_energy(flow, o, t, s, 2.0)


def damped(o: Objective, **schedules: Any) -> InertialHessianFlow:
    return hessian_damped(o.f, **{"damping": VanishingDamping(3.5), **schedules})


CLAIMS: dict[str, Claim] = {
    "gradient": Claim(
        lambda o: GradientFlow(o.f),
        lambda flow, o, t, s, E: -slope_squared(flow, s[0]),
        lambda flow, o, t, s: 2 * o.f(s[0]),
        exact=True,
    ),
    "preconditioned": Claim(
        lambda o: PreconditionedFlow(
            o.f, preconditioner=DiagonalPreconditioner(torch.tensor([0.5, 1.0, 2.0]).double())
        ),
        lambda flow, o, t, s, E: (
            -(flow.preconditioner.values * flow.gradient(s[0]).square()).sum(-1)
        ),
        lambda flow, o, t, s: 2 * o.f(s[0]),
        exact=True,
    ),
    "heavy ball": Claim(
        lambda o: HeavyBallFlow(o.f, damping=0.7),
        lambda flow, o, t, s, E: -0.7 * squares(s[1]),
        lambda flow, o, t, s: o.f(s[0]) + squares(s[1]),
        exact=True,
    ),
    "heavy ball, schedule": Claim(
        lambda o: HeavyBallFlow(o.f, damping=lambda t: 1 / t),
        lambda flow, o, t, s, E: -squares(s[1]) / t,
        lambda flow, o, t, s: o.f(s[0]) + squares(s[1]),
        exact=True,
    ),
    "rmsprop": Claim(
        lambda o: RMSPropFlow(o.f, tau=0.5, eps=0.01),
        lambda flow, o, t, s, E: -(flow.gradient(s[0]).square() / (s[1].sqrt() + 0.01)).sum(-1),
        lambda flow, o, t, s: 2 * o.f(s[0]),
        exact=True,
    ),
    "nesterov 3": Claim(
        lambda o: NesterovFlow(o.f),
        lambda flow, o, t, s, E: torch.zeros_like(E),
        doubled_cross_term,
    ),
    "nesterov 5": Claim(
        lambda o: NesterovFlow(o.f, alpha=AtLeast(3, value=5)),
        lambda flow, o, t, s, E: -2 * t * (o.f(s[0]) - o.minimum),
        doubled_cross_term,
    ),
    "strongly convex": Claim(
        lambda o: StronglyConvexNesterovFlow(o.f, mu=o.modulus),
        lambda flow, o, t, s, E: -(o.modulus**0.5) * E,
        lambda flow, o, t, s: (
            o.f(s[0]) - o.minimum + 0.5 * squares(s[1] + 2 * o.modulus**0.5 * (s[0] - o.minimizer))
        ),
    ),
    "high resolution": Claim(
        lambda o: HighResolutionFlow(o.f, mu=o.modulus, s=0.02),
        lambda flow, o, t, s, E: -(o.modulus**0.5) / 4 * E,
        lambda flow, o, t, s: (
            (1 + (o.modulus * 0.02) ** 0.5) * (o.f(s[0]) - o.minimum)
            + 0.25 * squares(flow.position_velocity(t, s))
            + 0.25 * squares(s[1] + 4 * o.modulus**0.5 * (s[0] - o.minimizer))
        ),
    ),
    "hessian": Claim(lambda o: damped(o, beta=0.3, gamma=1.2), margin_bound, doubled_cross_term),
    "hessian, schedules": Claim(
        lambda o: damped(
            o, beta=PolynomialSchedule(0.3, -0.4), gamma=PolynomialSchedule(1.5, -0.1)
        ),
        margin_bound,
        # The velocity in the place of v.
        lambda flow, o, t, s: nesterov_energy(
            flow, o, t, (s[0], flow.position_velocity(t, s)), 1.0
        ),
    ),
    # Its second margin is negative: the rate is bounded all the same, but not by 0.
    "hessian, growing w": Claim(
        lambda o: damped(o, beta=0.1, gamma=lambda t: 1 + t), margin_bound, doubled_cross_term
    ),
    "adam": Claim(
        lambda o: AdamFlow(o.f, tau1=0.3, tau2=0.4, eps=0.01),
        adam_bound,
        lambda flow, o, t, s: (
            o.f(s[0]) + float(flow.tau1) * (s[1].square() / (s[2].sqrt() + flow.eps)).sum(-1)
        ),
    ),
    "adam, tau1 = 4 tau2": Claim(
        lambda o: AdamFlow(o.f, tau1=0.8, tau2=0.2, eps=0.0),
        adam_bound,
        lambda flow, o, t, s: o.f(s[0]) + float(flow.tau1) * (s[1].square() / s[2].sqrt()).sum(-1),
    ),
}


def energy_of(flow: Any, o: Objective) -> Energy:
    return lambda t, s: flow.energy(t, s, minimum=o.minimum, minimizer=o.minimizer)


def random_states(flow: Any, o: Objective, scale: float) -> Pieces:
    """200 of them around x*; Adam's of infinite age, for which its claim is made."""
    x, v = scale * points(200, seed=4) + o.minimizer, scale * points(200, seed=5)
    # Small against most gradients as well as large, for either may break a claim.
    m = 0.1 * scale * points(200, seed=6)
    one = torch.ones((), dtype=torch.float64)
    if isinstance(flow, InertialFlow | HessianDampedFlow):
        return x, v
    if isinstance(flow, RMSPropFlow):
        return x, v.square() + 0.01
    return (x, m, v.square() + 0.01, one, one) if isinstance(flow, AdamFlow) else (x,)


def excess(claim: Claim, o: Objective, energy: Energy | None = None) -> float:
    """By how much E' exceeds its bound at the worst state, relative to their sizes."""
    flow, worst = claim.make(o), -math.inf
    for scale in (0.1, 1.0, 3.0):
        states = random_states(flow, o, scale)
        on_tuples = flow if len(states) > 1 else lambda t, s: (flow(t, s[0]),)
        for t in torch.tensor(TIMES, dtype=torch.float64):
            value, rate = rate_along(energy or energy_of(flow, o), on_tuples, t, states)
            with torch.no_grad():
                bound = claim.bound(flow, o, t, states, value)
            gap = (rate - bound) / (rate.abs() + bound.abs())
            worst = max(worst, float((gap.abs() if claim.exact else gap).max()))
    return worst
