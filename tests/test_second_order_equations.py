"""The first-order systems against the equations that they stand for.

x'' is the derivative of `position_velocity` along the flow, by the chain rule; the right-hand side
is written out with the Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from augmented import TIME, Pieces, plain, points, problem, rate_along
from torch import Tensor

from ode_stopping.flows import (
    AdamFlow,
    ExponentialSchedule,
    Flow,
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
)
from ode_stopping.flows.hessian_damping import Coefficients
from ode_stopping.problems import Problem

T = 0.7
Numbers = tuple[float, float, float]


def hessian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(f, x)


def misfit(flow: Flow, numbers: Numbers, objective: Callable[[Tensor], Tensor]) -> float:
    """Largest entry of x'' + a x' + beta hess f x' + gamma grad f, at a state."""
    state = (points(), points(seed=1))
    velocity, acceleration = rate_along(flow.position_velocity, flow, TIME, state)
    damping, beta, gamma = numbers
    slope = torch.autograd.functional.jacobian(objective, state[0])
    curvature = hessian(objective, state[0]) @ velocity
    assert float(acceleration.abs().min()) > 0.01
    return float((acceleration + damping * velocity + beta * curvature + gamma * slope).abs().max())


def network_value(schedule: NetworkSchedule, t: float) -> float:
    """softplus of a tanh network of log(1 + t), in numbers."""
    units = zip(
        *(p.tolist() for p in (schedule.weight, schedule.shift, schedule.output)), strict=True
    )
    total = sum(v * math.tanh(w * math.log1p(t) + u) for w, u, v in units)
    return math.log1p(math.exp(float(schedule.bias.detach()) + total))


NETWORK = NetworkSchedule(0.4, hidden=3, seed=2)

# Flow of an objective, and a, beta and gamma at t = 0.7.
EQUATIONS: dict[str, tuple[Callable[[Problem], Flow], Numbers]] = {
    "heavy ball": (lambda f: HeavyBallFlow(f, damping=0.8), (0.8, 0, 1)),
    "heavy ball, schedule": (
        lambda f: HeavyBallFlow(f, damping=ExponentialSchedule(0.8, 0.5)),
        (0.8 * math.exp(-0.5 * T), 0, 1),
    ),
    "nesterov": (NesterovFlow, (3 / T, 0, 1)),
    "nesterov, 5": (lambda f: NesterovFlow(f, alpha=5), (5 / T, 0, 1)),
    "strongly convex": (
        lambda f: StronglyConvexNesterovFlow(f, mu=0.3),
        (2 * math.sqrt(0.3), 0, 1),
    ),
    "high resolution": (
        lambda f: HighResolutionFlow(f, mu=0.3, s=0.04),
        (2 * math.sqrt(0.3), 0.2, 1 + math.sqrt(0.3 * 0.04)),
    ),
    "constants": (
        lambda f: InertialHessianFlow(f, damping=1.7, beta=Positive(0.4), gamma=1.2),
        (1.7, 0.4, 1.2),
    ),
    "no Hessian": (
        lambda f: InertialHessianFlow(f, damping=VanishingDamping(3), beta=0.0, gamma=1.0),
        (3 / T, 0, 1),
    ),
    "polynomial": (
        lambda f: InertialHessianFlow(
            f,
            damping=VanishingDamping(3.5),
            beta=PolynomialSchedule(0.4, 0.5, start=0.1, scale=2.0),
            gamma=PolynomialSchedule(1.2, -0.3),
        ),
        (3.5 / T, 0.4 * (1 + (T - 0.1) / 2) ** -0.5, 1.2 * (1 + T) ** 0.3),
    ),
    "function": (
        lambda f: InertialHessianFlow(
            f, damping=lambda t: 1 + t, beta=lambda t: t**2, gamma=lambda t: torch.exp(t)
        ),
        (1 + T, T**2, math.exp(T)),
    ),
    "network": (
        lambda f: InertialHessianFlow(f, damping=2.0, beta=NETWORK, gamma=1.0),
        (2.0, network_value(NETWORK, T), 1.0),
    ),
}
every_equation = pytest.mark.parametrize("name", EQUATIONS)


@every_equation
@pytest.mark.parametrize("objective", [problem(), plain], ids=["problem", "autograd"])
def test_the_second_order_equation_holds(name: str, objective: Callable[[Tensor], Tensor]) -> None:
    make, numbers = EQUATIONS[name]
    assert misfit(make(objective), numbers, objective) < 1e-12


@pytest.mark.parametrize("name", ["polynomial", "function", "network"])
def test_without_the_rate_of_beta_it_does_not(name: str) -> None:
    """Planted error."""
    make, numbers = EQUATIONS[name]

    class Forgetful(InertialHessianFlow):
        def coefficients(self, t: Tensor, like: Tensor) -> Coefficients:
            now = super().coefficients(t, like)
            return Coefficients(now.damping, now.beta, torch.zeros_like(now.beta), now.gamma)

    flow = make(problem())
    flow.__class__ = Forgetful
    assert misfit(flow, numbers, problem()) > 1e-2


# --- starts ---------------------------------------------------------------------------------------


def test_hessian_damped_flows_start_at_rest() -> None:
    """v0 = beta(t0) grad f(x0), not 0."""
    f, x = problem(), points(2)
    flow = InertialHessianFlow(f, damping=3.0, beta=PolynomialSchedule(0.4, 0.5), gamma=1.0)
    for t0 in (T, TIME):
        start = tuple(piece.detach() for piece in flow.initial_state(x, t0=t0))
        torch.testing.assert_close(
            start[1], 0.4 * (1 + T) ** -0.5 * f.gradient(x), rtol=1e-14, atol=0
        )
        with torch.no_grad():
            assert float(flow.position_velocity(TIME, start).abs().max()) < 1e-14
            others = flow.position_velocity(TIME, (x, torch.zeros_like(x)))
            assert float(others.abs().min()) > 1e-3  # what v0 = 0 would be
            wanted = points(2, seed=3)
            moving = flow.initial_state(x, t0=t0, velocity=wanted)
            torch.testing.assert_close(flow.position_velocity(TIME, moving), wanted)


def test_the_start_time_of_a_schedule_is_asked_for() -> None:
    def flow(beta: object) -> InertialHessianFlow:
        return InertialHessianFlow(problem(), damping=3.0, beta=beta, gamma=1.0)

    for schedule in (PolynomialSchedule(0.4, 0.5), NETWORK, lambda t: 0.4):
        with pytest.raises(ValueError, match="initial_state needs t0=, the start time: beta is"):
            flow(schedule).initial_state(points())
    # A learnable constant is none.
    for constant in (0.4, torch.tensor(0.4).double(), Positive(0.4)):
        torch.testing.assert_close(
            flow(constant).initial_state(points())[1].detach(), 0.4 * problem().gradient(points())
        )


def test_the_start_carries_derivatives_to_t0_and_beta() -> None:
    beta = Positive(0.4)

    def start(t0: Tensor, raw: Tensor, x: Tensor) -> Pieces:
        flow = InertialHessianFlow(
            problem(), damping=3.0, beta=lambda t: raw * torch.sin(t), gamma=1.0
        )
        return flow.initial_state(x, t0=t0)

    leaves = (TIME.clone().requires_grad_(), beta.raw, points().requires_grad_())
    assert torch.autograd.gradcheck(start, leaves)


def test_high_resolution_starts_as_the_paper_says() -> None:
    f, x = problem(), points(2)
    flow = HighResolutionFlow(f, mu=0.3, s=0.04)
    velocity = flow.position_velocity(TIME, flow.initial_state(x))
    expected = -2 * 0.2 / (1 + math.sqrt(0.3 * 0.04)) * f.gradient(x)
    torch.testing.assert_close(velocity, expected, rtol=1e-13, atol=1e-14)
    at_rest = flow.initial_state(x, velocity=torch.zeros_like(x))
    assert float(flow.position_velocity(TIME, at_rest).abs().max()) < 1e-14


# --- first-order flows of moments -----------------------------------------------------------------


def test_adaptive_formulas() -> None:
    """Entry by entry, in Python numbers."""
    f = problem()
    x, m, v = points(), points(seed=1), points(seed=2).abs() + 0.1
    c1, c2 = torch.tensor([0.6, 0.7], dtype=torch.float64)
    tau1, tau2, eps, inside = 0.3, 0.6, 0.01, 0.02
    adam = AdamFlow(f, tau1=tau1, tau2=tau2, eps=eps, inside=inside)(TIME, (x, m, v, c1, c2))
    rms = RMSPropFlow(f, tau=tau2, eps=eps, inside=inside)(TIME, (x, v))
    for i, g in enumerate(f.gradient(x).tolist()):
        second = (g * g - float(v[i])) / tau2
        root = math.sqrt(float(v[i]) / 0.7 + inside)
        assert float(adam[0][i]) == pytest.approx(-float(m[i]) / 0.6 / (root + eps), rel=1e-13)
        assert float(adam[1][i]) == pytest.approx((g - float(m[i])) / tau1, rel=1e-13)
        assert float(adam[2][i]) == pytest.approx(second, rel=1e-13)
        root = math.sqrt(float(v[i]) + inside)
        assert float(rms[0][i]) == pytest.approx(-g / (root + eps), rel=1e-13)
        assert float(rms[1][i]) == pytest.approx(second, rel=1e-13)
    assert float(adam[3]) == pytest.approx(0.4 / tau1, rel=1e-13)
    assert float(adam[4]) == pytest.approx(0.3 / tau2, rel=1e-13)
