"""`StepAdjoint` where the transpose is garbage, and where a flow is not what it was."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from driven_pair import F64, PairProblem, distance, functional
from rotated import RotatedQuadratic
from torch import Tensor

from ode_stopping import (
    DirectAdjoint,
    ForwardSensitivity,
    GradientAccuracyWarning,
    GradientFlow,
    GradientRoute,
    InterpolatingAdjoint,
    LossValue,
    NotReproducibleError,
    Rosenbrock,
    StepAdjoint,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.gradients.steps import _Transpose
from theory_checks.closed_forms import CLOSED_FORMS

# --- where the transpose is garbage -------------------------------------------------------------

GENTLE, PLANTED, FAR, LOOSE = (-1.2, 2.0), (-1.2, 1.0), (-1.8, 3.2), (-1.5, 2.0)


def rosenbrock(
    start: tuple[float, float], route: GradientRoute, rtol: float
) -> tuple[Tensor, StoppingResult]:
    """dT/dx0 and the result; x' = -grad f, J = f, target 0.5."""
    x0 = torch.tensor(start, dtype=F64, requires_grad=True)
    objective = Rosenbrock(dim=2)
    result = stopping_time(
        GradientFlow(objective),
        x0,
        LossValue(objective),
        0.5,
        gradient=route,
        solver=Torchdiffeq(rtol=rtol),
        evidence="light",
    )
    (gradient,) = torch.autograd.grad(result.time, x0)
    return gradient, result


@cache
def truth_of(start: tuple[float, float]) -> Tensor:
    return rosenbrock(start, InterpolatingAdjoint(), 1e-6)[0]


def error_of(gradient: Tensor, truth: Tensor) -> float:
    return float((gradient - truth).norm() / truth.norm())


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize(
    ("start", "rtol"),
    [
        (PLANTED, 1e-3),
        *(pytest.param(LOOSE, rtol, marks=pytest.mark.slow) for rtol in (1e-3, 1e-2)),
    ],
    ids=str,
)
def test_the_transpose_is_garbage_there(start: tuple[float, float], rtol: float) -> None:
    """What is planted: DirectAdjoint is off by a factor, the continuous adjoint is not."""
    truth = truth_of(start)
    assert error_of(rosenbrock(start, DirectAdjoint(), rtol)[0], truth) > 1.0
    assert error_of(rosenbrock(start, InterpolatingAdjoint(), rtol)[0], truth) < 1e-2


@pytest.mark.parametrize(
    ("start", "rtol"),
    [
        pytest.param(FAR, 1e-4, marks=pytest.mark.slow),
        (PLANTED, 1e-3),
        *(pytest.param(LOOSE, rtol, marks=pytest.mark.slow) for rtol in (1e-3, 1e-2)),
    ],
    ids=str,
)
def test_garbage_falls_back(start: tuple[float, float], rtol: float) -> None:
    gradient, result = rosenbrock(start, StepAdjoint(), rtol)
    assert result.stats.route == "InterpolatingAdjoint"
    assert "departs from what it has to be" in result.stats.fallback
    assert error_of(gradient, truth_of(start)) < 1e-2
    assert result.evidence.passed
    assert "quadrature" in result.evidence.figures


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize(
    ("start", "rtol"),
    [(GENTLE, 1e-3), pytest.param(GENTLE, 1e-5, marks=pytest.mark.slow), (PLANTED, 1e-5)],
    ids=str,
)
def test_a_transpose_that_is_good_stays(start: tuple[float, float], rtol: float) -> None:
    gradient, result = rosenbrock(start, StepAdjoint(), rtol)
    assert result.stats.route == "StepAdjoint"
    assert result.stats.fallback is None
    assert error_of(gradient, truth_of(start)) < 50 * rtol


def test_a_planted_departure_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """lam turned by a third at every chunk."""
    through = _Transpose.through

    def turned(self: _Transpose, begin: int, end: int, share: Any = None) -> None:
        through(self, begin, end, share)
        self._sweep.lam = [1.3 * self._sweep.lam[0]]

    leaves = CLOSED_FORMS[2].leaves(1e-3, 0.25)
    monkeypatch.setattr(_Transpose, "through", turned)
    result = CLOSED_FORMS[2].solve(leaves, StepAdjoint(chunk=2), rtol=1e-9)
    result.time.backward()
    assert result.stats.route == "InterpolatingAdjoint"
    assert max(CLOSED_FORMS[2].errors(result.time, leaves)[1].values()) < 1e-6


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("rtol", [1e-4, 1e-7, 1e-9])
def test_cotangents_on_the_state_alone_do_not_fall_back(which: int, rtol: float) -> None:
    """lam^T F is 0 there but for rounding, which is compared with sum |lam_i F_i|."""
    problem = PairProblem()
    result = problem.solve(StepAdjoint(), rtol=rtol)
    weights = torch.tensor([0.4, -0.7, 1.1], dtype=F64)
    problem.gradients(result.state[which] @ weights)
    assert result.stats.fallback is None
    assert result.stats.route == "StepAdjoint"


def test_cotangents_on_the_state_of_a_linear_flow() -> None:
    problem = RotatedQuadratic(10.0, dim=12)
    found = []
    for route in (StepAdjoint(), DirectAdjoint()):
        leaves = problem.leaves()
        assert [*leaves][-1] == "speed"
        result = problem.solve(leaves, 1e-3, route, 1e-7)
        assert isinstance(result.state, Tensor)
        value = result.state[0] - 0.3 * result.state[5]
        *gradient, by_speed = torch.autograd.grad(value, [*leaves.values()])
        found.append(gradient)
        # The speed moves x along its path only.
        assert abs(float(by_speed)) < 1e-8
        assert result.stats.fallback is None
    assert distance(*found) < 1e-9


# --- flows that are not what they were ----------------------------------------------------------


@pytest.mark.parametrize("change", [1.0, 1e-6])
def test_a_flow_that_changed_before_the_backward_pass(change: float) -> None:
    """A variable in a closure: no version counter knows."""
    speed = {"now": 1.0}
    rate = torch.tensor(1.3, dtype=F64, requires_grad=True)
    result = stopping_time(
        lambda t, x: -rate * speed["now"] * x,
        torch.tensor([2.0, -1.0], dtype=F64),
        lambda t, x: x.square().sum(),
        1e-2,
    )
    speed["now"] += change
    with pytest.raises(NotReproducibleError, match="does not give the state"):
        result.time.backward()


def test_a_flow_that_changed_after_a_while_only() -> None:
    """Its early steps are the same, and the chunk in which they are not says when."""
    late = {"on": 0.0}
    rate = torch.tensor(1.3, dtype=F64, requires_grad=True)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -rate * x * (1 + late["on"] * torch.relu(t - 1.0))

    result = stopping_time(
        flow,
        torch.tensor([2.0, -1.0], dtype=F64),
        lambda t, x: x.square().sum(),
        1e-2,
        gradient=StepAdjoint(chunk=2),
    )
    late["on"] = 0.1
    with pytest.raises(NotReproducibleError, match=r"replaying the steps from t = [12]"):
        result.time.backward()


# --- odds and ends ------------------------------------------------------------------------------


def test_it_is_the_default() -> None:
    rate = torch.tensor(1.3, dtype=F64, requires_grad=True)
    result = stopping_time(
        lambda t, x: -rate * x,
        torch.tensor([2.0], dtype=F64),
        lambda t, x: x.square().sum(),
        1e-2,
    )
    result.time.backward()
    assert result.stats.route == "StepAdjoint"
    assert result.evidence.second_route is None


def test_products_are_those_of_the_accepted_steps() -> None:
    """One evaluation with a graph and one product for each of the six stages of a step."""
    case = CLOSED_FORMS[0]
    leaves = case.leaves(1e-3, 0.0)
    result = case.solve(leaves, StepAdjoint(), rtol=1e-8)
    result.time.backward()
    assert result.stats.vjps <= 6 * result.stats.accepted
    assert result.stats.nfe_backward <= 6 * result.stats.accepted


def test_single_precision() -> None:
    rate = torch.tensor(1.3, requires_grad=True)
    x0 = torch.tensor([2.0, 1.0], requires_grad=True)
    result = stopping_time(lambda t, x: -rate * x, x0, lambda t, x: x.square().sum(), 1e-2)
    found = torch.autograd.grad(result.time, [rate, x0])
    span = torch.log(x0.detach().square().sum() / 1e-2) / (2 * 1.3)
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(-span.item() / 1.3, rel=1e-3)
    assert result.stats.fallback is None


def test_loose_evidence_is_a_warning_and_not_a_fallback() -> None:
    """adaptive_heun at a loose tolerance: the time term is large, the identity is not."""
    problem = PairProblem()
    result = problem.solve(StepAdjoint(), rtol=1e-4, method="adaptive_heun")
    with pytest.warns(GradientAccuracyWarning):
        problem.gradients(result.time)
    assert result.stats.fallback is None


def test_routes_that_do_not_differentiate_the_steps_agree_at_a_tight_tolerance() -> None:
    found = []
    for route in (StepAdjoint(), InterpolatingAdjoint(), ForwardSensitivity()):
        problem = PairProblem([0.5, 0.1])
        found.append(problem.gradients(functional(problem.solve(route, rtol=1e-9))))
    assert distance(found[0], found[1]) < 1e-6
    assert distance(found[0], found[2]) < 1e-6
