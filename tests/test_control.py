"""Error control of the forward run: tolerances that scale with the state, and the velocity's."""

from __future__ import annotations

import warnings

import pytest
import torch
from rotated import RotatedQuadratic
from torch import Tensor

from ode_stopping import (
    DirectAdjoint,
    GradientAccuracyWarning,
    InterpolatingAdjoint,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.core.states import StateLayout
from ode_stopping.solving import errors as control
from ode_stopping.solving.errors import StateError, VelocityError
from ode_stopping.solving.solver import Tolerances
from ode_stopping.solving.step import Step

LAYOUT = StateLayout((torch.Size([2]), torch.Size([1])), is_tuple=True)


def trial(*, y1: Tensor, error: Tensor, f1: Tensor | None = None) -> Step:
    velocity = torch.ones_like(y1) if f1 is None else f1
    return Step(0.0, 0.1, y1, velocity, y1, velocity, error)


def test_error_is_measured_in_the_size_of_each_piece() -> None:
    measure = StateError(LAYOUT, Tolerances(1e-3))
    y = torch.tensor([1.0, 1.0, 1e-9], dtype=torch.float64)
    assert measure(trial(y1=y, error=1e-3 * y)) == pytest.approx(1.0, rel=1e-3)
    assert measure(trial(y1=1e8 * y, error=1e5 * y)) == pytest.approx(1.0, rel=1e-3)
    # The small piece does not hide behind the large one.
    bad = torch.tensor([0.0, 0.0, 1e-9], dtype=torch.float64)
    assert measure(trial(y1=y, error=bad)) > 900


def test_an_element_at_zero_may_err_a_little() -> None:
    measure = StateError(StateLayout((torch.Size([2]),), is_tuple=False), Tolerances(1e-3))
    y = torch.tensor([1.0, 0.0], dtype=torch.float64)
    error = torch.tensor([0.0, 1e-7], dtype=torch.float64)
    assert measure(trial(y1=y, error=error)) == pytest.approx(1.0, rel=1e-6)
    zero = torch.zeros(2, dtype=torch.float64)
    assert measure(trial(y1=zero, error=zero)) == 0.0


def test_an_absolute_tolerance_is_taken_as_it_is() -> None:
    measure = StateError(StateLayout((torch.Size([1]),), is_tuple=False), Tolerances(1e-3, 1.0))
    y = torch.tensor([1e-9], dtype=torch.float64)
    assert measure(trial(y1=y, error=0.5 + y)) == pytest.approx(0.5, rel=1e-6)


def test_noise_in_a_fast_direction_is_rejected() -> None:
    """Errors of the same size: along the slow direction it passes, along the fast one it fails."""
    layout = StateLayout((torch.Size([2]),), is_tuple=False)
    matrix = 5e3 * torch.tensor([[1, -1], [-1, 1]], dtype=torch.float64)
    matrix += 0.5 * torch.ones(2, 2, dtype=torch.float64)
    tolerances = Tolerances(1e-6)
    y = torch.ones(2, dtype=torch.float64)

    def ratio(error: Tensor) -> tuple[float, float]:
        state = StateError(layout, tolerances)
        measure = VelocityError(lambda t, x: -matrix @ x, state, layout, tolerances)
        step = trial(y1=y, error=error, f1=-matrix @ y)
        return float(state(step)), measure(step)

    assert ratio(5e-7 * y) == pytest.approx((0.5, 0.5), rel=1e-3)
    # The velocity errs by 5e-3 where 1e-5 is allowed.
    noise = 5e-7 * torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert ratio(noise) == pytest.approx((0.5, 500.0), rel=1e-3)


def test_looks_at_the_velocity_now_and_then_where_the_state_decides() -> None:
    result = stopping_time(
        lambda t, x: -x * (1 + 0.5 * torch.sin(5 * t)),
        torch.tensor([1.0], dtype=torch.float64),
        lambda t, x: x.sum(),
        1e-6,
    )
    assert 0 < result.stats.control < 0.3 * result.stats.accepted


@pytest.mark.parametrize(
    "route", [InterpolatingAdjoint(), DirectAdjoint()], ids=["adjoint", "direct"]
)
def test_a_loose_tolerance_on_a_stiff_flow(route: InterpolatingAdjoint | DirectAdjoint) -> None:
    """Condition 300 at rtol 1e-5, where differentiating through a plain dopri5 is 85 % wrong."""
    problem = RotatedQuadratic(condition=300.0)
    leaves = problem.leaves()
    result = problem.solve(leaves, 1e-3, route, 1e-5)
    result.time.backward()
    truth = problem.truth(1e-3)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert float((leaf.grad - truth[name]).norm() / truth[name].norm()) < 1e-4


def test_without_the_control_of_the_velocity_it_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted omission: the same run with the state's error alone."""
    problem = RotatedQuadratic(condition=1000.0)

    def error() -> float:
        leaves = problem.leaves()
        result = problem.solve(leaves, 1e-5, InterpolatingAdjoint(), 1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradientAccuracyWarning)
            result.time.backward()
        truth = problem.truth(1e-5)
        assert leaves["p"].grad is not None
        return float((leaves["p"].grad - truth["p"]).norm() / truth["p"].norm())

    controlled = error()
    monkeypatch.setattr(control.VelocityError, "_ratio", lambda self, *lists: 0.0)
    monkeypatch.setattr("ode_stopping.crossing.run._POLISH_AFTER", 10**9)
    assert error() > 20 * controlled


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_defaults_scale_with_the_state(scale: float) -> None:
    """T of x' = -x^3/s^2 from s to s/10 knows nothing of s, and neither do the steps."""
    x0 = torch.tensor([scale], dtype=torch.float64, requires_grad=True)
    result = stopping_time(lambda t, x: -(x**3) / scale**2, x0, lambda t, x: x.sum(), 0.1 * scale)
    (gradient,) = torch.autograd.grad(result.time, x0)
    assert result.time.item() == pytest.approx(49.5, rel=1e-6)
    assert gradient.item() * scale == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("rate", [1e-8, 1.0, 1e8])
def test_defaults_scale_with_time(rate: float) -> None:
    x0 = torch.tensor([2.0], dtype=torch.float64)
    result = stopping_time(
        lambda t, x: -rate * x, x0, lambda t, x: x.sum(), 0.1, max_time=100.0 / rate
    )
    assert result.time.item() * rate == pytest.approx(2.995732273553991, rel=1e-7)
    assert result.stats.accepted < 60


def test_a_small_target_is_not_drowned_by_the_absolute_tolerance() -> None:
    """x_T = 1e-10: an absolute tolerance of 1e-11 would leave one digit."""
    theta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    result = stopping_time(
        lambda t, x: -theta * x, torch.ones(1, dtype=torch.float64), lambda t, x: x.sum(), 1e-10
    )
    (gradient,) = torch.autograd.grad(result.time, theta)
    assert gradient.item() == pytest.approx(-result.time.item() / 1.3, rel=1e-6)


def test_an_explicit_absolute_tolerance_still_counts() -> None:
    loose = Torchdiffeq(rtol=1e-9, atol=1e-3)
    x0 = torch.ones(1, dtype=torch.float64)
    coarse = stopping_time(lambda t, x: -x, x0, lambda t, x: x.sum(), 1e-3, solver=loose)
    fine = stopping_time(lambda t, x: -x, x0, lambda t, x: x.sum(), 1e-3)
    assert coarse.stats.accepted < fine.stats.accepted
