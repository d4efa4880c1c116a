"""Stopping times of the flows with more states than the position, and of Newton's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from augmented import WeightedSpeed
from torch import Tensor

from ode_stopping import (
    GradientError,
    LossValue,
    Quadratic,
    QuarticQuadratic,
    Rosenbrock,
    Torchdiffeq,
    check_stopping_gradient,
    stopping_time,
)
from ode_stopping.flows import (
    AdamFlow,
    AtLeast,
    Flow,
    HeavyBallFlow,
    HighResolutionFlow,
    InertialHessianFlow,
    NesterovFlow,
    NetworkSchedule,
    NewtonFlow,
    PolynomialSchedule,
    Positive,
    RMSPropFlow,
    StronglyConvexNesterovFlow,
    VanishingDamping,
    WithIntegrals,
)

F = QuarticQuadratic([1.0, 4.0], quartic=0.5)
X0 = torch.tensor([1.0, -0.8], dtype=torch.float64)


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def hessian_damped(t: float, **schedules: Any) -> tuple[Flow, Any]:
    given = {"damping": VanishingDamping(3.5), "beta": 0.4, "gamma": 1.2, **schedules}
    flow = InertialHessianFlow(F, **given)
    return flow, flow.initial_state(X0, t0=t)


def at_rest(flow: Any, **options: Any) -> tuple[Flow, Any]:
    return flow, flow.initial_state(X0, **options)


# What makes a flow and its start, and the start time. Starts carry their own derivatives.
CASES: dict[str, tuple[Callable[[], tuple[Flow, Any]], float]] = {
    "heavy ball": (lambda: at_rest(HeavyBallFlow(F, damping=Positive(1.5))), 0.0),
    "nesterov": (lambda: at_rest(NesterovFlow(F, alpha=AtLeast(3, value=4.0))), 0.5),
    "strongly convex": (lambda: at_rest(StronglyConvexNesterovFlow(F, mu=leaf(0.9))), 0.0),
    "high resolution": (lambda: at_rest(HighResolutionFlow(F, mu=0.9, s=leaf(0.1))), 0.0),
    "hessian": (
        lambda: hessian_damped(0.7, beta=PolynomialSchedule(leaf(0.4), torch.tensor(0.5))),
        0.7,
    ),
    "hessian, network": (
        lambda: hessian_damped(0.7, beta=NetworkSchedule(0.4, hidden=1).requires_grad_(False)),
        0.7,
    ),
    "rmsprop": (lambda: at_rest(RMSPropFlow(F, tau=Positive(0.3), eps=0.1), age=0.1), 0.0),
    "adam": (lambda: at_rest(AdamFlow(F, tau1=leaf(0.3), tau2=0.6, eps=0.1), age=0.1), 0.0),
    "newton": (lambda: at_rest(NewtonFlow(F, damping=Positive(0.3))), 0.0),
    "integrals": (
        lambda: at_rest(WithIntegrals(HeavyBallFlow(F, damping=leaf(1.5)), WeightedSpeed())),
        0.0,
    ),
}


# Flows that have a like among the others: these alone take half of the time.
LIKE_OTHERS = ("strongly convex", "high resolution", "hessian", "adam")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ()) for name in CASES],
)
def test_the_gradient_by_independent_roads(name: str) -> None:
    make, t0 = CASES[name]
    flow, start = make()
    if name == "hessian, network":
        next(flow.beta.parameters()).requires_grad_()
    # The check moves one leaf at a time: a start that moves with it has a test of its own.
    fixed = start.detach() if isinstance(start, Tensor) else tuple(s.detach() for s in start)
    time = leaf(t0) if name == "nesterov" else t0
    report = check_stopping_gradient(flow, fixed, LossValue(F), 1.5, t0=time, directions=1)
    assert report.passed, str(report)
    assert len(report.subjects) >= 1


def solved(make: Callable[[float], tuple[Flow, Any]], value: float, t0: float) -> float:
    flow, start = make(value)
    result = stopping_time(
        flow,
        start,
        LossValue(F),
        1.5,
        t0=t0,
        solver=Torchdiffeq(rtol=1e-10),
        gradient=None,
        evidence="light",
    )
    return float(result.time)


THROUGH_THE_START: dict[str, tuple[Callable[[Any], tuple[Flow, Any]], float, float]] = {
    "beta": (lambda b: hessian_damped(0.7, beta=b), 0.4, 0.7),
    "s": (lambda s: at_rest(HighResolutionFlow(F, mu=0.9, s=s)), 0.1, 0.0),
    "tau": (lambda tau: at_rest(RMSPropFlow(F, tau=tau, eps=0.1), age=0.1), 0.3, 0.0),
    "tau1": (lambda tau: at_rest(AdamFlow(F, tau1=tau, tau2=0.6, eps=0.1), age=0.1), 0.3, 0.0),
    "tau2": (lambda tau: at_rest(AdamFlow(F, tau1=0.3, tau2=tau, eps=0.1), age=0.1), 0.6, 0.0),
}


@pytest.mark.parametrize("name", THROUGH_THE_START)
def test_hyperparameters_that_shape_the_start_as_well(name: str) -> None:
    """The total derivative, against differences of T with a start made anew."""
    make, value, t0 = THROUGH_THE_START[name]
    parameter = leaf(value)
    flow, start = make(parameter)
    tight = Torchdiffeq(rtol=1e-9)
    result = stopping_time(flow, start, LossValue(F), 1.5, t0=t0, solver=tight, evidence="light")
    (slope,) = torch.autograd.grad(result.time, parameter)
    errors = []
    for h in (0.04 * value, 0.02 * value):
        difference = (solved(make, value + h, t0) - solved(make, value - h, t0)) / (2 * h)
        errors.append(difference - float(slope))
    assert abs(errors[1]) < 2e-3 * abs(float(slope))
    assert errors[0] / errors[1] == pytest.approx(4.0, abs=0.3)
    # Without the start's own part it would be another number.
    fixed = tuple(piece.detach() for piece in start)
    (partial,) = torch.autograd.grad(
        stopping_time(flow, fixed, LossValue(F), 1.5, t0=t0, evidence="light").time, parameter
    )
    assert abs(float(partial - slope)) > 100 * abs(errors[1])


# --- first crossings ------------------------------------------------------------------------------

TWO_MODES = Quadratic([1.0, 60.0])


def two_modes(damping: float) -> tuple[float, float, list[str]]:
    """Closed form 7: T, dT/ddamping, and what was warned about."""
    a = leaf(damping)
    flow = HeavyBallFlow(TWO_MODES, damping=a)
    start = flow.initial_state(torch.tensor([1.0, 0.3], dtype=torch.float64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = stopping_time(flow, start, LossValue(TWO_MODES), 0.08, evidence="light")
        (slope,) = torch.autograd.grad(result.time, a)
    return float(result.time.detach()), float(slope), [str(w.message) for w in caught]


def exact_loss(times: Tensor, damping: float) -> Tensor:
    """Sum of l x_l^2/2 of the damped oscillators x'' + a x' + l x = 0, x(0) given, x'(0) = 0."""
    total = torch.zeros_like(times)
    for curvature, start in ((1.0, 1.0), (60.0, 0.3)):
        w = math.sqrt(curvature - damping**2 / 4)
        wave = torch.cos(w * times) + damping / (2 * w) * torch.sin(w * times)
        total += 0.5 * curvature * (start * torch.exp(-damping / 2 * times) * wave) ** 2
    return total


# Next to the jump dT/da is small and its quadrature cancels: the backward pass warns at 0.88.
@pytest.mark.filterwarnings("ignore:the gradient of this stopping time")
@pytest.mark.parametrize(("damping", "known"), [(0.87, 1.428), (0.88, 1.793)])
def test_the_first_crossing_of_an_oscillating_loss(damping: float, known: float) -> None:
    time, slope, caught = two_modes(damping)
    assert time == pytest.approx(known, abs=5e-4)
    before = torch.arange(0.0, time - 1e-5, 1e-4, dtype=torch.float64)
    values = exact_loss(before, damping)
    assert bool((values > 0.08).all())
    assert bool((values[1:] > values[:-1]).any())  # it rises in between
    end = torch.tensor(time, dtype=torch.float64)
    assert float(exact_loss(end, damping)) == pytest.approx(0.08, abs=1e-6)
    # The dip before, nearly a crossing, is told of.
    assert any("the stopping time jumps there" in text for text in caught) == (damping == 0.88)
    h = 1e-6
    rate = (exact_loss(end + h, damping) - exact_loss(end - h, damping)) / (2 * h)
    change = (exact_loss(end, damping + h) - exact_loss(end, damping - h)) / (2 * h)
    assert slope == pytest.approx(-float(change / rate), rel=1e-4)


def test_momentum_on_a_function_that_is_not_convex() -> None:
    """Heavy ball through Rosenbrock's valley: f rises before it reaches the target."""
    f = Rosenbrock(dim=2)
    flow = HeavyBallFlow(f, damping=3.0)
    start = flow.initial_state(torch.tensor([-1.2, 1.0], dtype=torch.float64))
    result = stopping_time(flow, start, LossValue(f), 0.5, evidence="light")
    times = torch.linspace(0.0, float(result.time.detach()), 4000, dtype=torch.float64)[:-1]
    values = f(result.trajectory(times)[0])
    assert bool((values > 0.5).all())
    assert bool((values[1:] > values[:-1]).any())


# --- Adam from age 0 ------------------------------------------------------------------------------


def adam(tau1: Any, age: float) -> tuple[Flow, Any]:
    return at_rest(AdamFlow(F, tau1=tau1, tau2=0.5, eps=1e-8), age=age)


def test_rmsprop_of_age_zero_says_so() -> None:
    tau = leaf(0.5)
    flow = RMSPropFlow(F, tau=tau, eps=1e-2)
    result = stopping_time(flow, flow.initial_state(X0), LossValue(F), 1.0)
    with pytest.raises(GradientError, match="age"):
        result.time.backward()
    again = stopping_time(flow, flow.initial_state(X0, age=1e-2), LossValue(F), 1.0)
    again.time.backward()
    assert tau.grad is not None


def test_adam_of_age_zero_has_a_time_but_no_gradient() -> None:
    """There the quotient m/c1 has an infinite derivative to m."""
    tau1 = leaf(0.1)
    flow, start = adam(tau1, 0.0)
    result = stopping_time(flow, start, LossValue(F), 1.5)
    plain = float(result.time.detach())
    # At once, and not after all of the steps that a backward solve may take.
    with pytest.raises(GradientError, match="age"):
        result.time.backward()
    assert result.stats.vjps is None
    assert tau1.grad is None
    # A small age moves T by as much, and has the derivatives of age 0.
    flow, start = adam(tau1, 1e-4)
    result = stopping_time(flow, start, LossValue(F), 1.5)
    assert float(result.time.detach()) == pytest.approx(plain, abs=2e-4)
    (slope,) = torch.autograd.grad(result.time, tau1)
    up, down = (solved(lambda tau: adam(tau, 0.0), 0.1 + s * 1e-3, 0.0) for s in (1, -1))
    assert float(slope) == pytest.approx((up - down) / 2e-3, rel=5e-3)
