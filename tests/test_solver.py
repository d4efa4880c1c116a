"""The adapter around torchdiffeq: steps, failures, and what every method delivers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ode_stopping import InterpolatingAdjoint, Torchdiffeq, stopping_time
from ode_stopping.solving.interpolation import accurate_path
from ode_stopping.solving.solver import StepFailed
from ode_stopping.solving.step import Step
from ode_stopping.solving.stepper import Stepper
from ode_stopping.solving.torchdiffeq import adaptive_methods
from theory_checks.closed_forms import CLOSED_FORMS

ONE = torch.ones(1, dtype=torch.float64)


def stepper(function: object, *, end: float = 1.0, method: str = "dopri5") -> Stepper:
    return Stepper(
        Torchdiffeq(method=method).method(torch.float64),
        function,  # type: ignore[arg-type]
        0.0,
        end,
        ONE,
        measure=lambda step: float((step.error / (1e-10 + 1e-8 * step.y1.abs())).abs().max()),
    )


def test_steps_end_exactly_at_the_end() -> None:
    seen: list[float] = []

    def function(t: float, y: Tensor) -> Tensor:
        seen.append(t)
        return -y

    steps: list[Step] = []
    run = stepper(function)
    value = run.integrate(1000, after_step=steps.append)
    assert run.time == 1.0
    assert max(seen) <= 1.0
    assert value.item() == pytest.approx(math.exp(-1), rel=1e-7)
    assert len(steps) == run.accepted
    assert all(a.t1 == b.t0 for a, b in pairwise(steps))


def test_a_step_can_be_taken_back() -> None:
    run = stepper(lambda t, y: -y)
    step = run.attempt()
    assert step is not None
    run.take_back(0.5)
    assert run.time == 0.0
    assert (run.accepted, run.rejected) == (0, 1)
    again = run.attempt()
    assert again is not None
    assert again.t1 == pytest.approx(0.5 * step.t1)


def test_non_finite_trial_steps_are_shortened() -> None:
    """sqrt(1 - y) does not exist beyond y = 1; the solution, 1 - (1 - t/2)^2, stays below."""
    run = stepper(lambda t, y: torch.sqrt(1 - y + 1), end=0.5)
    run.next_step = 100.0
    value = run.integrate(1000)
    assert value.item() == pytest.approx(2 - (1 - 0.25) ** 2, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_function_fails_as_such(bad: float) -> None:
    run = stepper(lambda t, y: torch.full_like(y, bad) if t > 0.3 else -y)
    with pytest.raises(StepFailed) as failure:
        run.integrate(10_000)
    assert failure.value.nonfinite
    assert run.time == pytest.approx(0.3, abs=1e-6)


def test_step_limit_fails() -> None:
    with pytest.raises(StepFailed, match="after 3 steps"):
        stepper(lambda t, y: -y).integrate(3)


@pytest.mark.parametrize("method", adaptive_methods())
def test_dense_output(method: str) -> None:
    """Inside the steps, and the velocities at their ends."""
    steps: list[Step] = []
    dense = Torchdiffeq(method=method).method(torch.float64).dense
    end = 0.1 if method == "adaptive_heun" else 1.0
    run = stepper(lambda t, y: -y, end=end, method=method)
    run.integrate(100_000, after_step=steps.append)
    # The quartic after the long steps of the order-8 method is coarse: routes do not use it.
    allowed = 1e-4 if method == "dopri8" else 1e-6
    for step in steps[:: max(len(steps) // 10, 1)]:
        for s in (0.0, 0.3, 0.5, 0.9, 1.0):
            t = step.t0 + s * (step.t1 - step.t0)
            assert dense(step)(t).item() == pytest.approx(math.exp(-t), rel=allowed)
        assert step.f0.item() == pytest.approx(-math.exp(-step.t0), rel=1e-6)
        assert step.f1.item() == pytest.approx(-math.exp(-step.t1), rel=1e-6)


ACHIEVED = {"adaptive_heun": (1e-4, 1e-3), "fehlberg2": (1e-5, 2e-2), "bosh3": (1e-6, 1e-4)}


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize("method", adaptive_methods())
def test_accuracy_of_every_method(method: str) -> None:
    """Gradients follow the tolerance; fehlberg2's own error estimate is the loosest."""
    rtol, allowed = ACHIEVED.get(method, (1e-8, 1e-6))
    for case in CLOSED_FORMS[2:5]:
        leaves = case.leaves(1e-2, 0.25)
        result = case.solve(leaves, InterpolatingAdjoint(), rtol=rtol, method=method)
        result.time.backward()
        of_time, of_derivatives = case.errors(result.time, leaves)
        assert of_time < allowed, case.name
        assert max(of_derivatives.values()) < allowed, case.name
        assert result.stats.vjps is not None
        assert result.stats.vjps < 2.5 * result.stats.nfe_forward, case.name


def test_path_between_the_long_steps_of_order_8() -> None:
    result = stopping_time(
        lambda t, x: -x,
        2 * ONE,
        lambda t, x: x.sum(),
        1e-3,
        solver=Torchdiffeq(method="dopri8", rtol=1e-10),
    )
    problem = result.problem
    assert problem is not None
    path = accurate_path(problem.trajectory, problem.flow, problem.segments)
    times = torch.linspace(0, problem.end, 200, dtype=torch.float64).tolist()
    coarse = max(abs(problem.trajectory.flat(t).item() / (2 * math.exp(-t)) - 1) for t in times)
    fine = max(abs(path(t).item() / (2 * math.exp(-t)) - 1) for t in times)
    assert fine < 1e-9
    assert coarse > 10 * fine


def test_single_precision() -> None:
    theta = torch.tensor(1.3, requires_grad=True)
    x0 = torch.tensor([2.0], requires_grad=True)
    result = stopping_time(lambda t, x: -theta * x, x0, lambda t, x: 0.5 * x.square().sum(), 1e-3)
    result.time.backward()
    span = math.log(4 / 2e-3) / (2 * 1.3)
    # Times are float64 whatever the state is: T - t0 may be a small difference.
    assert result.time.dtype == torch.float64
    assert isinstance(result.state, Tensor)
    assert result.state.dtype == torch.float32
    assert result.time.item() == pytest.approx(span, rel=1e-4)
    assert theta.grad is not None
    assert theta.grad.dtype == torch.float32
    assert theta.grad.item() == pytest.approx(-span / 1.3, rel=1e-3)
    assert x0.grad is not None
    assert x0.grad.item() == pytest.approx(1 / 2.6, rel=1e-3)
