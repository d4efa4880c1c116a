"""Targets that J has to leave first: inside of one step, near misses, jumps, and misses."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scripted import Keeping, Scene, Script, indices
from turning import F64, Turning, leaf, run

from ode_stopping import (
    GradientAccuracyWarning,
    NotReachedError,
    Status,
    Torchdiffeq,
    stopping_time,
)

both_directions = pytest.mark.parametrize("direction", ["falling", "rising"])


# --- inside of one step -------------------------------------------------------------------------


def parabola(low: float, high: float, height: float = 1.0) -> Script:
    """Above zero between two times only."""
    return lambda t: (height * (t - low) * (high - t), height * (low + high - 2 * t))


def test_left_and_met_in_one_step() -> None:
    run, method = Scene(parabola(0.3, 0.7), leave_first=True).run()
    assert method.trials[0] == (0, 1)
    (hit,) = run.hits
    assert hit.status is Status.REACHED
    assert hit.time == pytest.approx(0.7, abs=1e-12)
    assert hit.point is not None
    assert hit.point.rate < 0


def test_left_in_one_step_and_met_in_another() -> None:
    """The same where the last steps are taken again, finer."""
    for low, high in ((0.3, 2.6), (24.3, 26.6), (24.3, 24.7)):
        run, _ = Scene(parabola(low, high), leave_first=True, route=Keeping(True)).run()
        assert run.time == pytest.approx(high, abs=1e-11)


def test_a_sample_just_above_the_target_is_no_touch() -> None:
    """y rises by the clock until t = 2; at t = 0.36, which is looked at, it is 1e-9 above of 1."""

    def script(t: float) -> tuple[float, float]:
        return (0.64 + 1e-9 + t, 1.0) if t <= 2 else (4.64 + 1e-9 - t, -1.0)

    run, _ = Scene(script, (1.0,), times=(0.0, 2.0, 100.0), leave_first=True).run()
    (hit,) = run.hits
    assert hit.status is Status.REACHED
    assert hit.time == pytest.approx(3.64 + 1e-9, abs=1e-12)


def test_targets_that_are_left_and_others_in_one_step() -> None:
    """J = 10 t (0.5 - t) (1 - t) from 0: up to 0.48 and down again below 0."""

    def script(t: float) -> tuple[float, float]:
        return 10 * t * (0.5 - t) * (1 - t), 5 - 30 * t + 30 * t**2

    targets = (0.3, -0.2, 0.0)
    run, _ = Scene(script, targets, leave_first=True, times=(0.0, 1.0)).run()
    assert indices(run.hits) == [0, 2, 1]
    for hit in run.hits:
        assert hit.state.item() == pytest.approx(targets[hit.watch.index], abs=1e-12)
    assert [hit.time for hit in run.hits] == sorted(hit.time for hit in run.hits)
    assert run.hits[1].time == pytest.approx(0.5, abs=1e-12)


def test_a_turn_short_of_leaving_is_a_near_miss() -> None:
    """y rises to -0.1 at t = 1.5 and turns back, and is above zero between 5 and 6."""

    def script(t: float) -> tuple[float, float]:
        if t <= 3:
            return -0.1 - (t - 1.5) ** 2, -2 * (t - 1.5)
        value = -2.35 + 4.7 * (t - 3) if t < 4 else 2.35 - 0.5 * (t - 4)
        return value, 4.7 if t < 4 else -0.5

    run, _ = Scene(script, times=(0.0, 3.0, 4.0, 100.0), leave_first=True).run()
    (hit,) = run.hits
    assert hit.time == pytest.approx(8.7, abs=1e-12)
    assert hit.near_miss is not None
    assert (hit.near_miss.time, hit.near_miss.margin) == pytest.approx((1.5, 0.1), abs=1e-12)
    assert hit.near_miss.rebound == pytest.approx(2.25, abs=1e-12)


def test_a_close_turn_is_warned_about() -> None:
    """J = sin t - 1.0003 + t/100 nearly leaves the target 0 near t = pi/2, one period too early."""
    weight = leaf(1.0)
    with pytest.warns(GradientAccuracyWarning, match="J came within"):
        result = stopping_time(
            lambda t, x: torch.ones_like(x),
            torch.zeros(1, dtype=F64),
            lambda t, x: weight * torch.sin(x[0]) - 1.0163 + 0.01 * x[0],
            0.0,
            leave_first=True,
        )
    assert result.time.item() > 2 * math.pi
    assert result.near_miss is not None
    assert 0 < result.near_miss.margin < 1e-3


def test_a_jump_of_j_leaves_the_target() -> None:
    """J jumps from -1 to 2 at t = 1 and falls with slope -1: T = 3."""
    result = stopping_time(
        lambda t, x: -torch.ones_like(x),
        torch.zeros(1, dtype=F64),
        lambda t, x: torch.where(t > 1, 3.0, -1.0) + x[0],
        0.0,
        breakpoints=[1.0],
        leave_first=True,
    )
    assert result.status is Status.REACHED
    assert result.time.item() == pytest.approx(3.0, abs=1e-9)


@pytest.mark.parametrize("leave", [True, False])
@both_directions
@pytest.mark.parametrize("seed", range(5))
def test_against_dense_samples_of_random_waves(seed: int, direction: str, leave: bool) -> None:
    """J = sum_i a_i sin(w_i t + p_i) on oscillators, 4 targets: J at 300,000 times says when."""
    random = np.random.default_rng(seed)
    a, w, p = random.normal(size=3), random.uniform(0.3, 6.0, size=3), random.uniform(0, 6.28, 3)
    targets = 0.5 * np.abs(a).sum() * random.normal(size=4)
    targets[0] = (a * np.sin(p)).sum()  # where J starts
    clock = np.linspace(0.0, 15.0, 300_001)
    sign = 1.0 if direction == "falling" else -1.0
    levels = sign * (a * np.sin(clock[:, None] * w + p)).sum(-1)
    expected, safe = [], []
    for target in sign * targets:
        above = levels > target + 1e-10
        first = int(above.argmax()) if leave else 0
        met = (levels[first:] <= target + (0.0 if first else 1e-12)) & (
            bool(above.any()) or not leave
        )
        end = first + int(met.argmax()) if met.any() else len(levels) - 1
        expected.append(clock[end] if met.any() else math.inf)
        turns = np.flatnonzero(np.diff(np.sign(np.diff(levels[: end + 1])))) + 1
        safe.append(bool((np.abs(levels[turns] - target) > 1e-3).all()))
    rates = torch.from_numpy(w)
    weights = torch.from_numpy(a)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of starts on the target, and of turns near one
        result = stopping_time(
            lambda t, x: torch.stack([rates * x[1], -rates * x[0]]),
            torch.from_numpy(np.stack([np.sin(p), np.cos(p)])),
            lambda t, x: (weights * x[0]).sum(),
            torch.from_numpy(targets),
            direction=direction,  # type: ignore[arg-type]
            leave_first=leave,
            max_time=15.0,
            solver=Torchdiffeq(rtol=1e-8),
            throw=False,
        )
    found = result.time.tolist()
    assert any(safe)
    for time, truth, certain in zip(found, expected, safe, strict=True):
        if certain:
            assert time == pytest.approx(truth, abs=1e-4)


# --- misses -------------------------------------------------------------------------------------


def test_a_target_that_is_never_left_is_a_miss() -> None:
    turning = Turning([-0.5, 0.0], 0.9)
    result = run(turning, max_time=20.0)
    assert result.status is Status.NOT_REACHED
    assert math.isinf(result.time.item())
    assert "J never was above the target 0.9, as leave_first=True asks for" in result.note
    with pytest.raises(NotReachedError):
        result.time.backward()
    counted = run(turning, max_time=20.0, censored="horizon")
    assert counted.time.item() == 20.0
    rising = run(Turning([0.5, 0.0], -0.9), direction="rising", max_time=20.0)
    assert "J never was below the target -0.9" in rising.note


def test_at_rest_below_the_target() -> None:
    """In seconds, with the default horizon of a million."""
    result = stopping_time(
        lambda t, x: -torch.tensor([1.0, 30.0], dtype=F64) * x,
        torch.tensor([-1.0, -1.0], dtype=F64),
        lambda t, x: x.sum(),
        0.5,
        leave_first=True,
    )
    assert result.status is Status.NOT_REACHED
    assert "come to rest" in result.note
    assert "never was above" in result.note
