"""Flows, schedules and preconditioners: one contract for all flows, then each by its formula."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ode_stopping.flows import (
    ConstantSchedule,
    CoordinatewisePreconditioner,
    DiagonalPreconditioner,
    ExponentialSchedule,
    Flow,
    GradientFlow,
    NetworkPreconditioner,
    NewtonFlow,
    PolynomialSchedule,
    Positive,
    PreconditionedFlow,
    RescaledGradientFlow,
)
from ode_stopping.problems import QuarticQuadratic, geometric_spectrum, random_rotation

DIM = 4
TIME = torch.tensor(0.7, dtype=torch.float64)


def problem() -> QuarticQuadratic:
    return QuarticQuadratic(
        geometric_spectrum(DIM, 10.0), rotation=random_rotation(DIM, seed=1), quartic=0.5
    )


def plain(x: Tensor) -> Tensor:
    return torch.cosh(x).sum(-1) + 0.1 * (x * x.roll(1, -1)).sum(-1)


def hidden(seed: int = 0) -> CoordinatewisePreconditioner:
    return CoordinatewisePreconditioner(DIM, seed=seed)


DIAGONAL = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)

# To add a flow to the contract, add a line.
FLOWS: dict[str, Callable[[], Flow]] = {
    "gradient": lambda: GradientFlow(problem()),
    "gradient-autograd": lambda: GradientFlow(plain),
    "constant": lambda: RescaledGradientFlow(problem(), schedule=ConstantSchedule(0.8)),
    "exponential": lambda: RescaledGradientFlow(plain, schedule=ExponentialSchedule(0.8, 0.3)),
    "polynomial": lambda: RescaledGradientFlow(
        problem(), schedule=PolynomialSchedule(0.8, 0.5, start=0.1, scale=2.0)
    ),
    "schedule-function": lambda: RescaledGradientFlow(plain, schedule=lambda t: 1 / (1 + t)),
    "schedule-number": lambda: RescaledGradientFlow(plain, schedule=lambda t: 0.5),
    "diagonal-tensor": lambda: PreconditionedFlow(problem(), preconditioner=DIAGONAL),
    "diagonal": lambda: PreconditionedFlow(
        plain, preconditioner=DiagonalPreconditioner(DIAGONAL.tolist())
    ),
    "diagonal-log": lambda: PreconditionedFlow(
        problem(), preconditioner=DiagonalPreconditioner(DIAGONAL.log().tolist(), log=True)
    ),
    "network": lambda: PreconditionedFlow(plain, preconditioner=NetworkPreconditioner((5, 3))),
    "coordinatewise": lambda: PreconditionedFlow(problem(), preconditioner=hidden()),
    "preconditioner-function": lambda: PreconditionedFlow(
        plain, preconditioner=lambda x, g, t: 1 + t * torch.tanh(x * g)
    ),
    "newton": lambda: NewtonFlow(problem()),
    "newton-autograd": lambda: NewtonFlow(plain),
    "newton-damped": lambda: NewtonFlow(plain, damping=Positive(0.3)),
    "newton-schedule": lambda: NewtonFlow(problem(), damping=ExponentialSchedule(0.8, 0.3)),
}
every_flow = pytest.mark.parametrize("make", FLOWS.values(), ids=FLOWS.keys())


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)


# --- the contract -------------------------------------------------------------------------------


@every_flow
def test_velocity_has_the_state_s_shape_and_batches_equal_loops(make: Callable[[], Flow]) -> None:
    flow, x = make(), points(3)
    velocity = flow(TIME, x)
    assert velocity.shape == x.shape
    for one, row in zip(velocity, x, strict=True):
        torch.testing.assert_close(one, flow(TIME, row), rtol=1e-13, atol=1e-14)


@every_flow
def test_value_decreases_along_the_flow(make: Callable[[], Flow]) -> None:
    flow, x = make(), points(10)
    assert isinstance(flow, GradientFlow)
    gradient = flow.gradient(x)
    assert bool(((gradient * flow(TIME, x)).sum(-1) < 0).all())


@every_flow
def test_autograd_modes(make: Callable[[], Flow]) -> None:
    flow, x = make(), points()
    with torch.no_grad():
        quiet = flow(TIME, x)
    assert not quiet.requires_grad
    loud = flow(TIME, x.clone().requires_grad_())
    assert loud.requires_grad
    assert torch.equal(loud.detach(), quiet)
    learnable = any(p.requires_grad for p in flow.parameters())
    assert flow(TIME, x).requires_grad == learnable


@every_flow
def test_derivatives_to_state_time_and_parameters(make: Callable[[], Flow]) -> None:
    flow = make()
    named = dict(flow.named_parameters())
    inputs = tuple(v.detach().clone().requires_grad_() for v in (points(), TIME, *named.values()))

    def velocity(x: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(named, parameters, strict=True))
        return torch.func.functional_call(flow, state, (t, x))

    assert torch.autograd.gradcheck(velocity, inputs)
    assert torch.autograd.gradgradcheck(velocity, inputs)


@every_flow
def test_float32_is_kept_with_float64_parameters(make: Callable[[], Flow]) -> None:
    # Data of a problem have to be converted; parameters of the dynamics follow the state.
    flow, reference = make(), make()
    flow.objective = flow.objective.float() if isinstance(flow.objective, nn.Module) else plain
    x, t = points(2).float(), TIME.float()
    for time in (t, TIME):
        velocity = flow(time, x)
        assert velocity.dtype == torch.float32
        exact = reference(TIME, x.double())
        torch.testing.assert_close(velocity.double(), exact, rtol=1e-5, atol=1e-5)


@every_flow
def test_state_convention(make: Callable[[], Flow]) -> None:
    flow, x = make(), points()
    assert flow.initial_state(x) is x
    assert flow.position(x) is x
    assert flow.position((x, -x)) is x


@every_flow
def test_copies_compute_the_same(make: Callable[[], Flow]) -> None:
    flow, x = make(), points(2)
    assert torch.equal(copy.deepcopy(flow)(TIME, x), flow(TIME, x))


@every_flow
def test_tuple_states_are_refused(make: Callable[[], Flow]) -> None:
    with pytest.raises((TypeError, AttributeError)):
        make()(TIME, (points(), points()))


# --- formulas -------------------------------------------------------------------------------------


def test_formulas() -> None:
    f, x = problem(), points(2)
    gradient, t = f.gradient(x), 0.7
    cases = {
        GradientFlow(f): -gradient,
        RescaledGradientFlow(f, schedule=ConstantSchedule(0.8)): -0.8 * gradient,
        RescaledGradientFlow(f, schedule=ExponentialSchedule(0.8, 0.3, start=0.2)): (
            -0.8 * math.exp(-0.3 * (t - 0.2)) * gradient
        ),
        RescaledGradientFlow(f, schedule=PolynomialSchedule(0.8, 0.5, start=0.2, scale=2.0)): (
            -0.8 * (1 + (t - 0.2) / 2.0) ** -0.5 * gradient
        ),
        PreconditionedFlow(f, preconditioner=DIAGONAL): -DIAGONAL * gradient,
        PreconditionedFlow(f, preconditioner=DiagonalPreconditioner(DIAGONAL.log(), log=True)): (
            -DIAGONAL * gradient
        ),
    }
    for flow, expected in cases.items():
        torch.testing.assert_close(flow(TIME, x), expected, rtol=1e-14, atol=0)


def test_preconditioner_sees_state_gradient_and_time() -> None:
    seen: list[Tensor] = []

    def preconditioner(x: Tensor, grad: Tensor, t: Tensor) -> Tensor:
        seen.extend((x, grad, t))
        return torch.ones_like(x)

    f, x = problem(), points()
    PreconditionedFlow(f, preconditioner=preconditioner)(TIME, x)
    assert seen[0] is x
    assert torch.equal(seen[1], f.gradient(x))
    assert seen[2] is TIME


def test_rate_a_sample_and_scalar_diagonal() -> None:
    f, x = problem(), points(3)
    rates = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    flow = RescaledGradientFlow(f, schedule=lambda t: rates)
    torch.testing.assert_close(flow(TIME, x), -rates * f.gradient(x))
    for one in (torch.tensor(2.0), torch.tensor([2.0])):
        flow = PreconditionedFlow(f, preconditioner=one)
        torch.testing.assert_close(flow(TIME, x), -2 * f.gradient(x))
        flow = RescaledGradientFlow(f, schedule=lambda t, one=one: one)
        torch.testing.assert_close(flow(TIME, x), -2 * f.gradient(x))


# --- bad input ----------------------------------------------------------------------------------

BAD_FACTORS = {
    "vector rate in a batch": (torch.ones(3), None, ValueError, "schedule must return one number"),
    "wrong rate": (torch.ones(2, DIM), None, ValueError, "schedule gives shape"),
    "integer rate": (torch.tensor(1), None, TypeError, "schedule must give floating point"),
    "no rate": (None, None, TypeError, "schedule must give a tensor or a number"),
    "wrong diagonal": (None, torch.ones(DIM + 1), ValueError, "preconditioner gives shape"),
    "too many dimensions": (
        None,
        torch.ones(2, 1, 1),
        ValueError,
        "preconditioner gives shape",
    ),
    "growing diagonal": (None, torch.ones(7, 3, DIM), ValueError, "preconditioner gives shape"),
}


@pytest.mark.parametrize("name", BAD_FACTORS)
def test_bad_factors_are_named(name: str) -> None:
    rate, diagonal, error, message = BAD_FACTORS[name]
    flow = (
        RescaledGradientFlow(plain, schedule=lambda t: rate)
        if diagonal is None
        else PreconditionedFlow(plain, preconditioner=lambda x, g, t: diagonal)
    )
    with pytest.raises(error, match=message):
        flow(TIME, points(3))
