"""Flows with more states than the position: the cases that the tests of the new flows share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ode_stopping.flows import (
    AdamFlow,
    AtLeast,
    Flow,
    GradientFlow,
    HeavyBallFlow,
    HighResolutionFlow,
    InertialHessianFlow,
    NesterovFlow,
    NetworkSchedule,
    PolynomialSchedule,
    Positive,
    RMSPropFlow,
    StronglyConvexNesterovFlow,
    VanishingDamping,
    WithIntegrals,
)
from ode_stopping.problems import QuarticQuadratic, geometric_spectrum, random_rotation

DIM = 3
TIME = torch.tensor(0.7, dtype=torch.float64)
Pieces = tuple[Tensor, ...]


def problem() -> QuarticQuadratic:
    """Strongly convex with modulus 1, rotated, f* = 0 at 0."""
    return QuarticQuadratic(
        geometric_spectrum(DIM, 10.0), rotation=random_rotation(DIM, seed=1), quartic=0.5
    )


def plain(x: Tensor) -> Tensor:
    return torch.cosh(x).sum(-1) + 0.1 * (x * x.roll(1, -1)).sum(-1)


class WeightedSpeed(nn.Module):
    """weight |v|^2: an integrand with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def forward(self, t: Tensor, state: Pieces) -> Tensor:
        return self.weight * state[1].square().sum()


def position_squared(t: Tensor, state: Any) -> Tensor:
    x = state if isinstance(state, Tensor) else state[0]
    return torch.cos(t) * x.square().sum()


def parameter(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(value, dtype=torch.float64))


def hessian_damped(objective: Any, **changed: Any) -> InertialHessianFlow:
    return InertialHessianFlow(objective, **{"damping": 3.5, "beta": 0.4, "gamma": 1.2, **changed})


# To add a flow to the contract, add a line.
AUGMENTED: dict[str, Callable[[], Flow]] = {
    "heavy-ball": lambda: HeavyBallFlow(problem(), damping=0.8),
    "heavy-ball-autograd": lambda: HeavyBallFlow(plain, damping=0.8),
    "heavy-ball-tensor": lambda: HeavyBallFlow(problem(), damping=parameter(0.8)),
    "heavy-ball-positive": lambda: HeavyBallFlow(plain, damping=Positive(0.8)),
    "heavy-ball-schedule": lambda: HeavyBallFlow(problem(), damping=PolynomialSchedule(0.8, 0.5)),
    "heavy-ball-function": lambda: HeavyBallFlow(problem(), damping=lambda t: 1 / (1 + t)),
    "nesterov": lambda: NesterovFlow(problem()),
    "nesterov-at-least": lambda: NesterovFlow(plain, alpha=AtLeast(3, value=4.0)),
    "strongly-convex": lambda: StronglyConvexNesterovFlow(problem(), mu=0.9),
    "strongly-convex-positive": lambda: StronglyConvexNesterovFlow(plain, mu=Positive(0.5)),
    "high-resolution": lambda: HighResolutionFlow(problem(), mu=0.9, s=0.05),
    "high-resolution-learnable": lambda: HighResolutionFlow(
        plain, mu=Positive(0.5), s=parameter(0.1)
    ),
    "hessian": lambda: hessian_damped(problem()),
    "hessian-learnable": lambda: hessian_damped(
        plain, damping=parameter(2.0), beta=Positive(0.3), gamma=AtLeast(1, value=1.5)
    ),
    "hessian-polynomial": lambda: hessian_damped(
        problem(),
        damping=VanishingDamping(AtLeast(3, value=3.5)),
        beta=PolynomialSchedule(0.4, 0.5, start=0.1),
        gamma=PolynomialSchedule(1.2, 0.3),
    ),
    "hessian-network": lambda: hessian_damped(
        plain,
        damping=VanishingDamping(3.1),
        beta=NetworkSchedule(0.4, hidden=2),
        gamma=NetworkSchedule(1.2, hidden=2, seed=1),
    ),
    "hessian-function": lambda: hessian_damped(
        problem(), beta=lambda t: 0.1 * t * t, gamma=lambda t: 1.5
    ),
    "rmsprop": lambda: RMSPropFlow(problem(), tau=0.3, eps=1e-3),
    "rmsprop-learnable": lambda: RMSPropFlow(plain, tau=Positive(0.3), eps=parameter(0.01)),
    "adam": lambda: AdamFlow(problem(), tau1=0.3, tau2=0.6, eps=1e-3),
    "adam-learnable": lambda: AdamFlow(
        plain, tau1=Positive(0.3), tau2=Positive(0.5), eps=parameter(0.01)
    ),
    "adam-inside": lambda: AdamFlow(
        problem(), tau1=0.3, tau2=lambda t: 0.5 + t, eps=0.0, inside=parameter(0.1)
    ),
    "integrals": lambda: WithIntegrals(
        HeavyBallFlow(problem(), damping=Positive(0.8)), WeightedSpeed(), position_squared
    ),
    "integrals-plain": lambda: WithIntegrals(GradientFlow(plain), position_squared),
    "integrals-nested": lambda: WithIntegrals(
        WithIntegrals(NesterovFlow(problem()), WeightedSpeed()), position_squared
    ),
}
# Python functions made on the spot cannot be pickled.
UNPICKLABLE = {"heavy-ball-function", "hessian-function", "adam-inside"}


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)


def state_of(flow: Flow, *batch: int, seed: int = 0) -> Pieces:
    """A state with nothing zero or infinite in it: moments and bias corrections are positive."""
    if isinstance(flow, WithIntegrals):
        inner = flow.flow
        assert isinstance(inner, Flow)
        kept = points(*batch, seed=seed) if type(inner) is GradientFlow else state_of(inner, *batch)
        state = flow.initial_state(kept)
        n = len(flow.integrands)
        return (*state[:-n], *(q + 0.1 * (i + 1) for i, q in enumerate(state[-n:])))
    x, v = points(*batch, seed=seed), points(*batch, seed=seed + 100)
    if isinstance(flow, RMSPropFlow):
        return x, v.abs() + 0.2
    if isinstance(flow, AdamFlow):
        corrections = torch.tensor([0.6, 0.7], dtype=torch.float64)
        return x, points(*batch, seed=seed + 200), v.abs() + 0.2, *corrections.unbind()
    return x, v


def rate_along(
    function: Callable[..., Tensor], flow: Flow, t: Tensor, state: Pieces
) -> tuple[Tensor, Tensor]:
    """function(t, state) and its derivative in time along the flow, by the chain rule."""
    velocity = tuple(piece.detach() for piece in flow(t, state))
    value, rate = torch.autograd.functional.jvp(
        lambda t, *pieces: function(t, pieces), (t, *state), (torch.ones_like(t), *velocity)
    )
    return value, rate
