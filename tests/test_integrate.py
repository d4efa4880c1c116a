"""`integrate` against closed forms and against DOP853 with differences, by every route."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hybrid_forms import F64, Ball, leaf, reached, slopes
from scipy.optimize import brentq
from scipy.special import ellipk
from torch import Tensor
from variants import slow_after

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    Event,
    ForwardSensitivity,
    InterpolatingAdjoint,
    Status,
    StepAdjoint,
    Torchdiffeq,
    integrate,
    stopping_time,
)

ROUTES = [
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
]
each_route = pytest.mark.parametrize(
    "route", slow_after(2, ROUTES), ids=lambda route: type(route).__name__
)


def grads(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, leaves, strict=True)]


def assert_close(value: Tensor, truth: Tensor, leaves: list[Tensor], rel: float) -> None:
    """The value and all its derivatives."""
    assert float(value.detach()) == pytest.approx(float(truth.detach()), rel=rel)
    for found, right in zip(grads(value, leaves), grads(truth, leaves), strict=True):
        size = float(right.abs().max())
        assert float((found - right).abs().max()) <= rel * size + 1e-12


class TestBall:
    @each_route
    def test_impacts(self, route: Any) -> None:
        ball = Ball()
        event = ball.impact(count=8)
        solution = integrate(ball.flow, ball.start, events=[event], gradient=route)
        assert solution.status is Status.REACHED
        assert [hit.count for hit in solution.hits] == list(range(1, 9))
        for n, hit in enumerate(solution.hits, 1):
            assert_close(hit.time, ball.time(n), ball.leaves, 1e-7)
            assert_close(hit.state[1], -ball.speed(n - 1), ball.leaves, 1e-7)
            assert_close(hit.after[1], ball.speed(n), ball.leaves, 1e-7)
        assert solution.end is solution.hits[-1]

    @each_route
    def test_height_behind_the_fifth(self, route: Any) -> None:
        ball, at, until = Ball(), leaf(3.9), leaf(4.05)
        at.data = (ball.time(5) + 0.4 * (ball.time(6) - ball.time(5))).detach()
        until.data = (ball.time(5) + 0.8 * (ball.time(6) - ball.time(5))).detach()
        solution = integrate(
            ball.flow,
            ball.start,
            until=until,
            at=[until, at, 0.1],
            events=[ball.impact()],
            gradient=route,
        )
        assert solution.status is Status.FINISHED
        assert len(solution.hits) == 5
        leaves = [*ball.leaves, at, until]
        assert_close(solution.states[1, 0], ball.height(at, 5), leaves, 1e-7)
        assert_close(solution.states[0, 0], ball.height(until, 5), leaves, 1e-7)
        assert_close(solution.end.state[0], ball.height(until, 5), leaves, 1e-7)
        assert_close(solution.states[2, 0], ball.h0 - ball.g * 0.01 / 2, leaves, 1e-7)
        # One backward pass for all of it.
        weights = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
        total = (solution.states[:, 0] * weights).sum() + 3 * solution.hits[2].time
        truth = (
            ball.height(until, 5)
            - 2 * ball.height(at, 5)
            + 0.5 * (ball.h0 - ball.g * 0.01 / 2)
            + 3 * ball.time(3)
        )
        assert_close(total, truth, leaves, 1e-7)

    def test_zeno_is_told(self) -> None:
        """T_inf = sqrt(2 h0/g) (1 + e)/(1 - e): the impacts before it are there, with gradients."""
        ball = Ball(0.5)
        solution = integrate(ball.flow, ball.start, until=10.0, at=[9.0], events=[ball.impact()])
        assert solution.status is Status.ZENO
        last = (2 * ball.h0 / ball.g).sqrt() * (1 + ball.e) / (1 - ball.e)
        assert float(solution.end.time.detach()) == pytest.approx(float(last.detach()), rel=1e-5)
        assert len(solution.hits) > 15
        assert_close(solution.hits[11].time, ball.time(12), ball.leaves, 1e-7)
        assert bool(solution.states.isnan().all())

    def test_second_derivatives(self) -> None:
        ball = Ball()
        solution = integrate(
            ball.flow, ball.start, events=[ball.impact(count=3)], gradient=DirectAdjoint()
        )

        def second(value: Tensor) -> list[Tensor]:
            first = torch.autograd.grad(value, ball.leaves, create_graph=True, retain_graph=True)
            return grads(sum((k + 1) * one for k, one in enumerate(first)), ball.leaves)  # type: ignore[arg-type]

        for value, truth in (
            (solution.hits[2].time, ball.time(3)),
            (solution.hits[1].after[1], ball.speed(2)),
        ):
            for found, right in zip(second(value), second(truth), strict=True):
                assert float(found) == pytest.approx(float(right), rel=1e-7, abs=1e-9)

    def test_second_derivatives_raise_elsewhere(self) -> None:
        ball = Ball()
        solution = integrate(ball.flow, ball.start, events=[ball.impact(count=2)])
        (first,) = torch.autograd.grad(solution.end.time, [ball.e], create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            first.backward()


def accuracies(rtol: float | None, bound: float, quick: int) -> list[Any]:
    """Every route at one tolerance; those behind the first `quick` are slow tests."""
    return [
        pytest.param(route, rtol, bound, marks=() if index < quick else pytest.mark.slow)
        for index, route in enumerate(ROUTES)
    ]


@pytest.mark.parametrize(
    ("route", "rtol", "bound"), [*accuracies(1e-10, 1e-8, 1), *accuracies(None, 5e-6, 2)]
)
def test_pendulum(route: Any, rtol: float | None, bound: float) -> None:
    """Passages through the bottom: T_n = (2 n - 1) K(sin^2(a/2)) sqrt(l/g)."""
    angle, g, length = leaf(1.0), leaf(9.81), leaf(0.7)
    solution = integrate(
        lambda t, x: torch.stack([x[1], -g / length * torch.sin(x[0])]),
        torch.stack([angle, torch.zeros((), dtype=F64)]),
        events=[Event(lambda t, x: x[0], direction="either", count=5)],
        solver=None if rtol is None else Torchdiffeq(rtol=rtol),
        gradient=route,
    )
    assert len(solution.hits) == 5
    unit = math.sqrt(0.7 / 9.81)

    def quarter(a: float) -> float:
        return float(ellipk(math.sin(a / 2) ** 2)) * unit

    slope = (8 * (quarter(1.001) - quarter(0.999)) - (quarter(1.002) - quarter(0.998))) / 0.012
    for n, hit in enumerate(solution.hits, 1):
        time = (2 * n - 1) * quarter(1.0)
        assert float(hit.time.detach()) == pytest.approx(time, rel=bound)
        found = [float(one) for one in grads(hit.time, [angle, g, length])]
        truth = [(2 * n - 1) * slope, -time / 2 / 9.81, time / 2 / 0.7]
        assert found == pytest.approx(truth, rel=bound)


@each_route
def test_infusions(route: Any) -> None:
    """12 infusions with learned start and duration: time above a level, by superposition."""
    decay, rate, level = leaf(0.3), leaf(2.0), leaf(2.5)
    numbers = np.arange(12)
    begins = leaf(6.0 * numbers + 0.3 * np.sin(numbers) + 0.1)
    durations = leaf(1.5 + 0.2 * np.cos(numbers))

    def flow(t: Tensor, x: Tensor) -> Tensor:
        runs = (t >= begins) & (t < begins + durations)
        return -decay * x + rate * runs.to(F64).sum()

    def exact(t: Tensor) -> Tensor:
        ends = torch.minimum(begins + durations, t)
        parts = torch.exp(-decay * (t - ends)) - torch.exp(-decay * (t - begins))
        return torch.where(begins < t, rate / decay * parts, 0.0).sum()

    def exact_time(guess: Tensor) -> Tensor:
        """A Newton step at the root has its derivatives."""
        t = guess.detach().clone()
        for _ in range(4):
            at = t.clone().requires_grad_(True)
            value = exact(at)
            (slope,) = torch.autograd.grad(value, at, retain_graph=True)
            t = (t - (value - level) / slope).detach()
        return t - (exact(t) - level) / slope

    solution = integrate(
        flow,
        torch.zeros(1, dtype=F64),
        until=80.0,
        events=[Event(lambda t, x: x[0], level, direction="either")],
        breakpoints=[*begins.unbind(), *(begins + durations).unbind()],
        gradient=route,
    )
    hits = solution.hits
    assert len(hits) == 24
    above = sum(b.time - a.time for a, b in zip(hits[::2], hits[1::2], strict=True))
    truth = sum(
        exact_time(b.time) - exact_time(a.time) for a, b in zip(hits[::2], hits[1::2], strict=True)
    )
    assert isinstance(above, Tensor)
    assert isinstance(truth, Tensor)
    assert float((above - truth).detach()) == pytest.approx(0.0, abs=1e-6)
    for found, right in zip(
        grads(above, [decay, rate, level, begins, durations]),
        grads(truth, [decay, rate, level, begins, durations]),
        strict=True,
    ):
        size = right.abs() if isinstance(route, StepAdjoint) else right.norm()
        assert float(((found - right).abs() / size).max()) <= 1e-6


class Neuron:
    """Leaky integrate-and-fire: v' = (-v + I0 + A sin(w t + p)) / tau, v -> r at the threshold."""

    NAMES = ("tau", "drive", "amplitude", "frequency", "phase", "threshold", "rest", "v0")

    def __init__(self, amplitude: float) -> None:
        self.values = [2.0, 1.6, amplitude, 1.3, 0.4, 1.0, 0.1, 0.2]

    def spikes(self, values: np.ndarray, count: int) -> np.ndarray:
        """v relaxes to p(t) = I0 + A (sin(w t + p) - w tau cos(w t + p))/(1 + w^2 tau^2)."""
        tau, drive, amplitude, frequency, phase, threshold, rest, v = values
        t, found, turn = 0.0, [], frequency * tau

        def forced(s: Any) -> Any:
            angle = frequency * s + phase
            return drive + amplitude * (np.sin(angle) - turn * np.cos(angle)) / (1 + turn**2)

        for _ in range(count):
            begin, off = t, v - forced(t)

            def above(s: Any, begin: float = begin, off: float = off) -> Any:
                return forced(s) + off * np.exp((begin - s) / tau) - threshold

            times = begin + np.linspace(0.0, 20.0, 8001)
            (over,) = np.nonzero(above(times) >= 0.0)
            t = brentq(above, times[over[0] - 1], times[over[0]], xtol=1e-15, rtol=1e-14)
            found.append(t)
            v = rest
        return np.array(found)

    def integrated_spikes(self, values: np.ndarray, count: int) -> np.ndarray:
        """The same times by DOP853."""
        tau, drive, amplitude, frequency, phase, threshold, rest, v = values
        t, found = 0.0, []
        for _ in range(count):
            t, _ = reached(
                lambda s, x: (-x + drive + amplitude * np.sin(frequency * s + phase)) / tau,
                lambda s, x: x[0] - threshold,
                t,
                [v],
            )
            found.append(t)
            v = rest
        return np.array(found)


@pytest.mark.parametrize("amplitude", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_integrate_and_fire(amplitude: float) -> None:
    """20 spikes against DOP853; their derivatives against differences of the closed form."""
    neuron = Neuron(amplitude)
    leaves = [leaf(value) for value in neuron.values]
    tau, drive, size, frequency, phase, threshold, rest, v0 = leaves
    solution = integrate(
        lambda t, x: (-x + drive + size * torch.sin(frequency * t + phase)) / tau,
        v0.reshape(1),
        events=[
            Event(
                lambda t, x: x[0],
                threshold,
                direction="rising",
                reset=lambda t, x: rest.reshape(1),
                count=20,
            )
        ],
    )
    truth = neuron.integrated_spikes(np.array(neuron.values), 20)
    assert neuron.spikes(np.array(neuron.values), 20) == pytest.approx(truth, rel=1e-10)
    jacobian = slopes(lambda values: neuron.spikes(values, 20), neuron.values)
    assert [float(hit.time.detach()) for hit in solution.hits] == pytest.approx(truth, rel=1e-6)
    for n in (0, 4, 11, 19):
        found = np.array([float(g) for g in grads(solution.hits[n].time, leaves)])
        assert np.abs(found - jacobian[n]).max() <= 1e-6 * np.abs(jacobian[n]).max()


TANKS = {"inflow": 1.0, "outflow": 0.5, "high": 2.0, "low": 1.2, "width": 1.5}


def rates(values: Any, h1: Any, h2: Any, m: Any, root: Any) -> tuple[Any, Any]:
    """Of the levels in the two tanks."""
    inflow, outflow, _, _, width = values
    through = width * m * root(h1)
    return inflow - through, through - outflow * root(h2)


@cache
def switches() -> tuple[np.ndarray, np.ndarray]:
    """Time and second level at six switches, by DOP853, and their differences to TANKS."""

    def oracle(values: np.ndarray) -> np.ndarray:
        t, x, m, found = 0.0, np.array([1.0, 1.0]), 0.0, []
        for _ in range(6):
            level = values[2] if m == 0.0 else values[3]
            t, x = reached(
                lambda s, x, m=m: rates(values, x[0], x[1], m, np.sqrt),
                lambda s, x, level=level: x[0] - level,
                t,
                x,
                rising=m == 0.0,
            )
            found += [t, x[1]]
            m = 1.0 - m
        return np.array(found)

    values = list(TANKS.values())
    return oracle(np.array(values)), slopes(oracle, values)


@each_route
def test_two_tanks(route: Any) -> None:
    """The valve between two tanks opens and closes: a mode in the state, two events, two resets."""
    leaves = [leaf(value) for value in TANKS.values()]

    def flow(t: Tensor, x: Tensor) -> Tensor:
        first, second = rates(leaves, x[0], x[1], x[2], torch.sqrt)
        return torch.stack([first, second, torch.zeros_like(first)])

    def switched(m: float) -> Any:
        return lambda t, x: torch.stack([x[0], x[1], torch.full_like(x[2], m)])

    # Off the surface in the other mode, so that the reset lands nowhere near it.
    events = [
        Event(lambda t, x: x[0] - leaves[2] - 9 * x[2], direction="rising", reset=switched(1.0)),
        Event(lambda t, x: x[0] - leaves[3] + 9 * (1 - x[2]), reset=switched(0.0)),
    ]
    until = leaf(0.0)
    truth, jacobian = switches()
    until.data = torch.tensor(truth[-2] + 0.2, dtype=F64)
    solution = integrate(
        flow,
        torch.tensor([1.0, 1.0, 0.0], dtype=F64),
        until=until,
        events=events,
        gradient=route,
    )
    assert [hit.event for hit in solution.hits] == [0, 1] * 3
    for n, hit in enumerate(solution.hits):
        for row, value in ((2 * n, hit.time), (2 * n + 1, hit.state[1])):
            assert float(value.detach()) == pytest.approx(truth[row], rel=1e-6)
            found = np.array([float(g) for g in grads(value, leaves)])
            assert np.abs(found - jacobian[row]).max() <= 1e-6 * np.abs(jacobian[row]).max(), [
                *TANKS
            ]


def test_stopping_time_is_the_special_case() -> None:
    rate, x0, level = leaf([1.0, 3.0]), leaf([2.0, 1.0]), leaf(0.1)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -rate * x

    def criterion(t: Tensor, x: Tensor) -> Tensor:
        return (x**2).sum()

    result = stopping_time(flow, x0, criterion, level)
    solution = integrate(flow, x0, events=[Event(criterion, level, terminal=True)])
    assert float(solution.end.time.detach()) == float(result.time.detach())
    assert torch.equal(solution.end.state, result.state)
    leaves = [rate, x0, level]
    for a, b in zip(grads(solution.end.time, leaves), grads(result.time, leaves), strict=True):
        assert torch.equal(a, b)
    assert solution.stats.nfe_forward == result.stats.nfe_forward
