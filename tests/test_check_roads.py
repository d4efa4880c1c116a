"""The roads of `check_stopping_gradient` one by one: differences, their kinks, sensitivities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from ode_stopping import ForwardSensitivity, InterpolatingAdjoint, Torchdiffeq, stopping_time
from ode_stopping.checking.check import check_stopping_gradient
from ode_stopping.checking.ladder import Slope, measure_noise, measure_slope
from ode_stopping.checking.report import judge
from ode_stopping.gradients import PullBack
from ode_stopping.gradients.forward import Column, push_forward
from ode_stopping.gradients.problem import StoppingProblem
from ode_stopping.gradients.quotient import cotangent_at_crossing

EPS = 1e-1


def number(value: float | list[float], *, grad: bool = True) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=grad)


def half_square(t: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


# Kinks.


def test_kink_in_a_schedule() -> None:
    """alpha = 1 + |theta - 1| at theta = 1: T falls on both sides, with slopes T and -T."""
    theta = number(1.0)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -(1 + (theta - 1).abs()) * x

    report = check_stopping_gradient(flow, number([2.0], grad=False), half_square, EPS)
    assert report.passed, report
    assert report.kinks == ("theta",)
    assert report.verdict == "kink"
    assert repr(report).startswith("GradientReport of T by StepAdjoint: passed (kink: theta)")
    (sides,) = (f.sides for f in report.findings if f.sides is not None)
    span = math.log(2 / EPS) / 2
    assert sides == pytest.approx((span, -span), rel=1e-5)
    assert "below" in repr(report)
    assert "above" in repr(report)


def test_kink_of_a_maximum_is_path_differentiable() -> None:
    rates = number([1.0, 1.0])
    report = check_stopping_gradient(
        lambda t, x: -torch.maximum(rates[0], rates[1]) * x,
        number([2.0], grad=False),
        half_square,
        EPS,
    )
    assert report.passed, report
    assert report.verdicts == {"rates": "kink"}
    assert report.kinks == ("rates",)


@dataclass(frozen=True)
class Shifted(InterpolatingAdjoint):
    """The default route with a number added to every leaf's gradient."""

    shift: float = 0.0

    def pull_back(self, problem: StoppingProblem, cotangent: Tensor) -> PullBack:
        pulled = super().pull_back(problem, cotangent)
        return replace(pulled, leaves=[leaf + self.shift for leaf in pulled.leaves])


@pytest.mark.parametrize(("shift", "passed"), [(1.4, True), (-1.6, False)])
def test_at_a_kink_the_gradient_lies_between_the_slopes(shift: float, passed: bool) -> None:
    """The slopes are -1.498 and 1.498, and the route's own answer is 0."""
    theta = number(1.0)
    report = check_stopping_gradient(
        lambda t, x: -(1 + (theta - 1).abs()) * x,
        number([2.0], grad=False),
        half_square,
        EPS,
        gradient=Shifted(shift=shift),
    )
    (row,) = (f for f in report.findings if f.road == "finite differences")
    assert row.passed is passed


def test_at_a_kink_a_road_that_takes_one_side_is_no_judge() -> None:
    """A kink of T between the two runs: the reference may stand on the other side of it."""
    between = Slope(0.0, 1e-9, 1e-3, (-1.0, 1.0))
    other = Slope(1.0, 1e-9, 0.0)
    (row,) = judge("theta", "finite differences", [(-1.0, between)], promise=1e-5)
    assert row.passed is True
    (row,) = judge("theta", "forward sensitivity", [(-1.0, other)], promise=1e-5, kinked=[True])
    assert row.passed is None
    (row,) = judge("theta", "forward sensitivity", [(-1.0, other)], promise=1e-5, kinked=[False])
    assert row.passed is False


def test_a_reference_that_could_not_see_a_tenth_of_a_percent_is_no_judge() -> None:
    (row,) = judge("theta", "finite differences", [(1.0, Slope(1.001, 4e-4, 1e-3))], promise=1e-5)
    assert row.passed is None
    # Where that much is promised, it is.
    (row,) = judge("theta", "finite differences", [(1.0, Slope(1.001, 4e-4, 1e-3))], promise=2e-3)
    assert row.passed is True
    (row,) = judge("theta", "finite differences", [(1.0, Slope(1.01, 1e-2, 1e-3))], promise=1e-5)
    assert row.passed is None
    (row,) = judge("theta", "finite differences", [(1.0, Slope(1.1, 1e-2, 1e-3))], promise=1e-5)
    assert row.passed is False
    (row,) = judge("theta", "finite differences", [(math.nan, Slope(1.0, 0.0, 1.0))], promise=1.0)
    assert row.passed is False


def test_a_remainder_that_falls_as_the_square_puts_a_small_difference_in_doubt() -> None:
    slope = Slope(1.01, 1e-4, 1e-3, order=2.0)
    (row,) = judge("theta", "finite differences", [(1.0, slope)], promise=1e-5)
    assert row.passed is None
    (row,) = judge("theta", "finite differences", [(1.0, replace(slope, order=1.0))], promise=1e-5)
    assert row.passed is False
    (row,) = judge("theta", "finite differences", [(0.9, slope)], promise=1e-5)
    assert row.passed is False


def test_kink_beside_the_point_is_looked_through() -> None:
    theta = number(1.0003)
    report = check_stopping_gradient(
        lambda t, x: -(1 + (theta - 1).abs()) * x,
        number([2.0], grad=False),
        half_square,
        EPS,
    )
    assert report.passed, report
    assert report.kinks == ()


def test_one_sided_where_the_other_side_has_no_value() -> None:
    """A flow that is not defined for theta > 1: the slope from below is the slope."""
    theta = number(1.0)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -torch.where(theta > 1, math.nan, theta) * x

    report = check_stopping_gradient(flow, number([2.0], grad=False), half_square, EPS)
    assert report.passed, report
    (row,) = (f for f in report.findings if f.road == "finite differences")
    assert row.note == "slope from below only: no value above"
    assert row.reference == pytest.approx(-math.log(2 / EPS) / 2, rel=1e-6)
    assert theta.item() == 1.0


# The ladder, on functions of one number.


def slope_of(function: Callable[[float], float | None], noise: float = 1e-15) -> Slope | None:
    at = function(0.0)
    assert at is not None
    return measure_slope(function, at, noise=noise, goal=1e-8, largest=1e-2)


def test_ladder_on_smooth_functions() -> None:
    for function, truth in ((math.exp, 1.0), (lambda h: math.sin(30 * h) + 5, 30.0)):
        slope = slope_of(function)
        assert slope is not None
        assert slope.sides is None
        assert abs(slope.value - truth) <= 3 * slope.uncertainty
        assert slope.uncertainty < 1e-7 * truth


def test_ladder_knows_its_noise() -> None:
    """Noise of 1e-9, as of an adaptive solver: the reported uncertainty covers the error."""
    errors, uncertainties = [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):

        def noisy(h: float) -> float:
            jitter = 2 * float(torch.rand((), generator=generator, dtype=torch.float64)) - 1
            return math.exp(3 * h) + 1e-9 * jitter

        slope = measure_slope(noisy, 1.0, noise=1e-9, goal=1e-12, largest=1e-2)
        assert slope is not None
        assert slope.sides is None
        errors.append(abs(slope.value - 3.0))
        uncertainties.append(slope.uncertainty)
    assert all(e <= 3 * u for e, u in zip(errors, uncertainties, strict=True))
    assert max(uncertainties) < 1e-5


def test_ladder_at_a_kink() -> None:
    slope = slope_of(lambda h: math.exp(h) + max(0.5 * h, -0.2 * h))
    assert slope is not None
    assert slope.sides == pytest.approx((0.8, 1.5), rel=1e-6)


def test_ladder_without_values() -> None:
    assert slope_of(lambda h: 1.0 if h == 0 else None) is None
    one_sided = slope_of(lambda h: math.exp(h) if h <= 0 else None)
    assert one_sided is not None
    assert one_sided.value == pytest.approx(1.0, rel=1e-6)
    # Too far: values for small steps only.
    near = slope_of(lambda h: math.exp(h) if abs(h) < 1e-3 else None)
    assert near is not None
    assert near.value == pytest.approx(1.0, rel=1e-8)


def test_order_of_the_remainder() -> None:
    """exp(h) - 1 - g h: of order 2 for g = 1, of order 1 for others, not to be seen in noise."""

    def order(gradient: float, noise: float = 1e-15) -> float | None:
        slope = measure_slope(
            math.exp, 1.0, noise=noise, goal=1e-8, largest=1e-2, gradient=gradient
        )
        assert slope is not None
        return slope.order

    assert order(1.0) == pytest.approx(2.0, abs=0.02)
    for factor in (1.001, 0.9, -1.0):
        assert order(factor) == pytest.approx(1.0, abs=0.02)
    assert order(1.0, noise=1e-4) is None


def test_measured_noise_is_that_of_one_value() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1e-10, 1e-6):

        def noisy(h: float, size: float = size) -> float:
            jitter = 2 * float(torch.rand((), generator=generator, dtype=torch.float64)) - 1
            return math.exp(3 * h) + size * jitter

        measured = sorted(measure_noise(noisy, 1e-2) / size for _ in range(50))
        assert measured[0] > 0.1
        assert 0.5 < measured[25] < 2
        assert measured[-1] < 3
    assert measure_noise(lambda h: math.sin(3 * h), 1e-2) < 1e-14
    assert measure_noise(lambda h: round(h / 4e-3) * 4e-3, 1e-2) == pytest.approx(4e-3)
    # Between the jumps there is nothing to measure.
    assert measure_noise(lambda h: round(h / 4e-3) * 4e-3, 1e-4) == 0.0
    assert measure_noise(lambda h: round(h / 4e-3) * 4e-3, 1e-4, distinct=True) == math.inf


# Forward sensitivity along directions.


def test_forward_sensitivity_along_directions() -> None:
    """One direction is the sum of the columns; the clock's column is int F_t^T lam dt."""
    theta, x0 = number([1.1, 0.7]), number([1.0, -0.4])

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -theta * x * torch.exp(-0.3 * t) + 0.05 * torch.sin(2 * t) * x.flip(0)

    result = stopping_time(
        flow,
        x0,
        half_square,
        0.05,
        t0=0.2,
        gradient=ForwardSensitivity(),
        solver=Torchdiffeq(rtol=1e-9),
    )
    problem = result.problem
    assert problem is not None
    units = [
        Column(leaf=0, tangent=number([1.0, 0.0])),
        Column(leaf=0, tangent=number([0.0, 1.0])),
    ]
    mixed = Column(leaf=0, tangent=number([0.3, -2.0]))
    columns = push_forward(problem, [*units, mixed])
    expected = 0.3 * columns[:, 0] - 2.0 * columns[:, 1]
    assert torch.allclose(columns[:, 2], expected, rtol=1e-7, atol=1e-9)

    one = torch.ones((), dtype=torch.float64)
    lam, _ = cotangent_at_crossing(problem.crossing, one, torch.zeros_like(problem.x0))
    kept = stopping_time(flow, x0, half_square, 0.05, t0=0.2, solver=Torchdiffeq(rtol=1e-9))
    assert kept.problem is not None
    adjoint = InterpolatingAdjoint().pull_back(kept.problem, lam)
    forward = ForwardSensitivity().pull_back(problem, lam)
    assert adjoint.time is not None
    assert forward.time == pytest.approx(adjoint.time, rel=1e-6)
    at_start = float(forward.start @ problem.flow.plain(problem.start, problem.x0))
    at_end = float(lam @ problem.crossing.velocity)
    assert at_start == pytest.approx(at_end - forward.time, rel=1e-7)
