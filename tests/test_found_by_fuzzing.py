"""Wrong numbers that a search for wrong numbers once found; none may come back."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from discrete import Euler, stopping_index
from ode_stopping import (
    DegenerateCrossingError,
    DirectAdjoint,
    GradientAccuracyWarning,
    MissingGradientError,
    NotReproducibleError,
    StalledError,
    StoppingWarning,
    Torchdiffeq,
    stopping_time,
)

ONE = torch.ones(1, dtype=torch.float64)


def leaf(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("after", [0.2, 1.5, 5.0])
def test_crossing_just_after_a_breakpoint_on_a_long_run(after: float) -> None:
    """The last steps were once taken again across the breakpoint, by the flow of one side."""
    jump, rates = 2.29, torch.tensor([1.0, 40.0], dtype=torch.float64)
    result = stopping_time(
        lambda t, x: -x * torch.where(t < jump, 1.0, after) * rates,
        torch.ones(2, dtype=torch.float64),
        lambda t, x: x[0],
        0.1,
        breakpoints=[jump],
    )
    assert result.time.item() == pytest.approx(jump + (math.log(10) - jump) / after, rel=1e-8)


def test_many_breakpoints() -> None:
    times = [0.1 * k for k in range(1, 40)]
    rate = leaf(0.7)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -rate * (1 + sum(float(t.detach()) > b for b in times) % 2) * x

    result = stopping_time(flow, ONE, lambda t, x: x[0], 0.2, breakpoints=times)
    (gradient,) = torch.autograd.grad(result.time, rate)
    # The speed is 1 in even and 2 in odd tenths: 0.3 in every 0.2.
    whole = math.log(5) / 0.7
    pairs = math.floor(whole / 0.3)
    left = whole - 0.3 * pairs
    end = 0.2 * pairs + (left if left <= 0.1 else 0.1 + (left - 0.1) / 2)
    speed = 1 if left <= 0.1 else 2
    assert result.time.item() == pytest.approx(end, rel=1e-8)
    assert gradient.item() == pytest.approx(-whole / 0.7 / speed, rel=1e-6)


LOSSES: dict[str, Callable[[Tensor], object]] = {
    "item": lambda t: t.item(),
    "detach": lambda t: t.detach(),
    "numpy": lambda t: t.detach().numpy(),
}


@pytest.mark.parametrize("lost", LOSSES.values(), ids=LOSSES)
def test_a_criterion_that_loses_its_clock(lost: Callable[[Tensor], object]) -> None:
    """dJ/dt belongs to J'(T): without it every gradient is off by the same factor."""
    theta = leaf(1.0)
    with pytest.raises(MissingGradientError, match="t in the criterion"):
        stopping_time(lambda t, x: -theta * x, ONE, lambda t, x: x[0] - 0.3 * lost(t), 0.1)  # type: ignore[operator]


def test_a_flow_that_reads_its_clock_as_a_number() -> None:
    """Gradients do not need F_t; DirectAdjoint does for t0, and the identity does."""
    theta, t0 = leaf(1.0), leaf(0.3)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -theta * (1 + 0.5 * math.sin(t.item())) * x

    with pytest.warns(StoppingWarning, match="reads t as a number"):
        result = stopping_time(flow, ONE, lambda t, x: x[0], 0.1, t0=t0)
    by_theta, by_t0 = torch.autograd.grad(result.time, [theta, t0])
    end = result.time.item()
    rate = 1 + 0.5 * math.sin(end)
    assert by_theta.item() == pytest.approx(-math.log(10) / rate, rel=1e-6)
    assert by_t0.item() == pytest.approx((1 + 0.5 * math.sin(0.3)) / rate, rel=1e-6)
    assert result.evidence is not None
    assert result.evidence.identity is None
    with pytest.raises(MissingGradientError, match="DirectAdjoint needs"):
        stopping_time(flow, ONE, lambda t, x: x[0], 0.1, t0=t0, gradient=DirectAdjoint())


@pytest.mark.parametrize("interpolation", [None, "log", "hermite", "partial_step"])
def test_an_update_that_reads_its_clock_as_a_number(interpolation: str | None) -> None:
    step, t0 = leaf(0.01), leaf(0.5)
    update = Euler(lambda t, x: -x * (1 + 0.5 * math.sin(t.item())), step=step)
    with pytest.raises(MissingGradientError, match="t in the update"):
        stopping_index(
            update,
            ONE,
            lambda t, x: x[0] ** 2,
            0.1,
            t0=t0,
            interpolation=interpolation,  # type: ignore[arg-type]
        )


def test_a_criterion_that_changed_before_the_backward_pass() -> None:
    weight, theta = leaf(1.0), leaf(1.0)
    times, steps = [], []
    for k in (1.0, 4.0):

        def criterion(t: Tensor, x: Tensor) -> Tensor:
            return weight * k * x[0] ** 2  # noqa: B023 - the late binding is the point

        times.append(stopping_time(lambda t, x: -theta * x, ONE, criterion, 0.1))
        update = Euler(lambda t, x: -theta * x, step=0.01)
        steps.append(stopping_index(update, ONE, criterion, 0.1))
    with pytest.raises(NotReproducibleError, match=r"0\.1 in the forward run and 0\.4 now"):
        times[0].time.backward()
    with pytest.raises(NotReproducibleError, match=r"in the forward run and"):
        steps[0].steps.backward()


def test_a_criterion_that_jumps_over_the_target() -> None:
    """J(x_T) is not the target, so the quotient is of something else."""
    rates = leaf([1.0, 2.0])
    with pytest.raises(DegenerateCrossingError, match="J jumps over the target"):
        stopping_time(
            lambda t, x: -rates * x,
            torch.ones(2, dtype=torch.float64),
            lambda t, x: x[1] + torch.where(x[0] < 0.5, 0.0, 0.02),
            0.26,
        )


def test_a_criterion_that_jumps_at_a_breakpoint() -> None:
    def criterion(t: Tensor, x: Tensor) -> Tensor:
        return x[0] + torch.where(t < 0.4, 0.3, 0.0)

    with pytest.raises(DegenerateCrossingError, match="J jumps over the target"):
        stopping_time(lambda t, x: -x, ONE, criterion, 0.75, breakpoints=[0.4])
    later = stopping_time(lambda t, x: -x, ONE, criterion, 0.5, breakpoints=[0.4])
    assert later.time.item() == pytest.approx(math.log(2), rel=1e-7)


@pytest.mark.parametrize("size", [1e3, 1e5, 1e7])
def test_a_derivative_lost_in_a_small_piece_of_the_state(size: float) -> None:
    p = leaf([1.0, 1.0])
    with pytest.raises(MissingGradientError):
        stopping_time(
            lambda t, s: (-p[0] * s[0], -p[1].detach() * s[1] + 0 * p[1]),
            (size * ONE, ONE),
            lambda t, s: s[1].sum(),
            0.5,
        )


def test_a_derivative_lost_for_a_small_leaf() -> None:
    large, small = leaf(1e6), leaf(1e-3)
    with pytest.raises(MissingGradientError):
        stopping_time(
            lambda t, x: -large * 1e-6 * x - small.detach() * x + 0 * small,
            ONE,
            lambda t, x: x[0],
            0.5,
        )


@pytest.mark.parametrize(("start", "span"), [(1e9, 1e-3), (1e6, 1e-8)])
def test_a_clock_that_is_too_coarse(start: float, span: float) -> None:
    theta = leaf(1.0)
    result = stopping_time(
        lambda t, x: -theta * x, ONE, lambda t, x: x[0], math.exp(-span), t0=start
    )
    with pytest.warns(GradientAccuracyWarning, match="clock"):
        result.time.backward()


def test_the_stopping_time_on_a_breakpoint() -> None:
    theta = leaf(1.0)
    with pytest.warns(GradientAccuracyWarning, match="falls on the breakpoint"):
        stopping_time(
            lambda t, x: -theta * x * torch.where(t < 1 + 1e-9, 1.0, 3.0),
            ONE,
            lambda t, x: x[0],
            math.exp(-1.0),
            breakpoints=[1 + 1e-9],
        )


@pytest.mark.parametrize("width", [0.3, 1.0, 3.0])
def test_a_dip_on_a_run_that_nothing_limits(width: float) -> None:
    """x' = 1: the steps grow without limit, and only J knows on which scale it lives."""
    result = stopping_time(
        lambda t, x: torch.ones_like(x),
        torch.zeros(1, dtype=torch.float64),
        lambda t, x: (1 - x / 100 - 0.6 * torch.exp(-(((x - 20) / width) ** 2))).sum(),
        0.5,
    )
    assert 20 - 2 * width < result.time.item() < 20


def test_a_sliding_mode_is_no_rest() -> None:
    """The state hardly moves in 256 steps, for the steps are tiny."""
    with pytest.raises(StalledError):
        stopping_time(
            lambda t, x: -torch.stack([3 * torch.sign(x[0]), x[1]]),
            torch.tensor([0.5, 1.0], dtype=torch.float64),
            lambda t, x: x[1],
            0.5,
            solver=Torchdiffeq(max_steps=2000),
        )


def test_a_saddle_is_no_rest() -> None:
    """x grows from 1e-12, far below the tolerance of the state, while y decays at once."""
    # Fast enough for 256 steps in which x does not move (100 is too slow).
    rate = 300.0

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return torch.stack([x[0] - x[0] ** 3, -rate * x[1]])

    def criterion(t: Tensor, x: Tensor) -> Tensor:
        return 0.25 * (1 - x[0] ** 2) ** 2 + rate / 2 * x[1] ** 2

    result = stopping_time(
        flow,
        torch.tensor([1e-12, 1.0], dtype=torch.float64),
        criterion,
        1e-3,
        max_time=100.0,
        gradient=None,
    )
    # x/sqrt(1 - x^2) grows as e^t; at the target x^2 = 1 - sqrt(0.004).
    end = 1 - math.sqrt(0.004)
    exact = math.log(math.sqrt(end / (1 - end)) / 1e-12)
    assert result.time.item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize("beyond", [1e-12, 1e-9, 1e-6])
@pytest.mark.parametrize("bend", [torch.log, lambda a: a**2 - 1], ids=["concave", "convex"])
def test_next_to_a_kink_no_derivative_is_missing(
    bend: Callable[[Tensor], Tensor], beyond: float
) -> None:
    """With a concave side the one-sided difference falls short of the slope that autograd has."""
    a = leaf(1.0 + beyond)

    def flow(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return -state[0], torch.relu(bend(a))

    start = (ONE, torch.ones((), dtype=torch.float64))
    result = stopping_time(flow, start, lambda t, state: state[0].square().sum(), 0.1)
    (slope,) = torch.autograd.grad(result.state[1], a)
    side = 1.0 if bend is torch.log else 2.0
    assert slope.item() == pytest.approx(side * result.time.item(), rel=1e-4)
