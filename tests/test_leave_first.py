"""leave_first=True: J has to be on the other side of its target before a crossing counts."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scripted import Keeping, Scene, Script, indices
from torch import Tensor
from turning import F64, Turning, largest_gap, leaf

from ode_stopping import (
    AllOf,
    AnyOf,
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientAccuracyWarning,
    GradientRoute,
    InterpolatingAdjoint,
    NotReachedError,
    Status,
    StepAdjoint,
    StoppingResult,
    StoppingTask,
    StoppingWarning,
    Torchdiffeq,
    check_stopping_gradient,
    minimise_stopping_time,
    stopping_time,
)

ROUTES = (
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
)
every_route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: type(route).__name__)
both_directions = pytest.mark.parametrize("direction", ["falling", "rising"])
TIGHT = Torchdiffeq(rtol=1e-10)
NAMES = "leave_first=True"


def run(turning: Turning, target: Any = None, **options: Any) -> StoppingResult:
    arguments = {"t0": turning.t0, "solver": TIGHT, "leave_first": True, **options}
    target = turning.eps if target is None else target
    return stopping_time(turning.flow, turning.x0, turning.first, target, **arguments)


# --- closed forms -------------------------------------------------------------------------------


@every_route
@pytest.mark.parametrize(
    ("x0", "eps", "direction"),
    [
        ([-0.6, 0.7], 0.3, "falling"),  # below at the start
        ([1.0, 0.2], 0.3, "falling"),  # above: as without
        ([1.0, 0.2], 0.3, "rising"),  # above at the start
        ([0.2, -1.0], 0.2, "falling"),  # on the target, and rising from it
        ([0.25, 1.0], 0.25, "rising"),  # on the target, and falling from it
        ([0.2, 1.0], 0.2, "falling"),  # on the target, and crossing it: the next one counts
    ],
)
def test_the_first_crossing_after_the_other_side(
    route: GradientRoute, x0: list[float], eps: float, direction: str
) -> None:
    """T and its derivatives to a, w, x0, eps and t0."""
    turning = Turning(x0, eps)
    result = run(turning, gradient=route, direction=direction)
    truth = turning.crossings(eps, direction)[0]
    assert result.status is Status.REACHED
    assert result.time.item() == pytest.approx(truth, abs=1e-8)
    assert math.copysign(1.0, result.rate.item()) == (1.0 if direction == "rising" else -1.0)
    found = torch.autograd.grad(result.time, turning.leaves)
    assert largest_gap(list(found), turning.derivatives(truth)) < 1e-6


@pytest.mark.parametrize("evidence", ["standard", "thorough"])
def test_with_the_error_of_every_leaf(evidence: Any) -> None:
    turning = Turning([-0.6, 0.7], 0.3)
    result = run(turning, evidence=evidence)
    found = torch.autograd.grad(result.time, turning.leaves)
    truth = turning.crossings(0.3, "falling")[0]
    assert largest_gap(list(found), turning.derivatives(truth)) < 1e-7
    assert {one.name for one in result.evidence.leaves} >= {"x0", "t0", "target"}
    assert result.evidence.passed


def test_second_derivatives() -> None:
    """On the target 0: T = t0 + (pi/2 - atan2(x_2, x_1) + 2 pi)/w, whatever a."""
    turning = Turning([0.5, 1.0], 0.0)
    turning.a.requires_grad_(False)
    result = run(turning, 0.0, direction="rising", gradient=DirectAdjoint())
    angle = 1.5 * math.pi - torch.atan2(turning.x0[1], turning.x0[0])
    truth = turning.t0 + angle / turning.w
    assert result.time.item() == pytest.approx(truth.item(), abs=1e-8)
    leaves = [turning.w, turning.x0]
    firsts = [
        torch.autograd.grad(value, leaves, create_graph=True) for value in (result.time, truth)
    ]
    for first, second in zip(*firsts, strict=True):
        assert torch.allclose(first, second, rtol=1e-7, atol=1e-8)
    seconds = [
        torch.autograd.grad(sum((one * one).sum() for one in first), leaves) for first in firsts
    ]
    for first, second in zip(*seconds, strict=True):
        assert torch.allclose(first, second, rtol=1e-6, atol=1e-7)


# --- restarts -----------------------------------------------------------------------------------


@both_directions
@pytest.mark.parametrize("eps", [0.0, 0.2, -0.35])
def test_restarts_walk_from_crossing_to_crossing(eps: float, direction: str) -> None:
    """From x_T the next crossing, again and again, on whichever side rounding left x_T."""
    turning = Turning([1.0, 0.0], eps)
    truth = turning.crossings(eps, direction, until=14.0)
    result = run(turning, direction=direction, leave_first=False)
    if result.status is Status.AT_START:
        result = run(turning, direction=direction)
    for expected in truth[:4]:
        assert result.status is Status.REACHED
        assert result.time.item() == pytest.approx(expected, abs=1e-7)
        result = stopping_time(
            turning.flow,
            result.state.detach(),
            turning.first,
            eps,
            t0=result.time.detach(),
            direction=direction,  # type: ignore[arg-type]
            leave_first=True,
            solver=TIGHT,
        )


@both_directions
@pytest.mark.parametrize("target", [0.0, 0.2])
def test_restarts_in_float32(target: float, direction: Any) -> None:
    turning = Turning([0.3, -1.0], target, t0=0.0)
    truth = turning.crossings(target, direction)
    x, t = turning.x0.detach().float(), 0.0
    for expected in truth[:3]:
        result = stopping_time(
            turning.flow,
            x,
            turning.first,
            target,
            t0=t,
            direction=direction,
            leave_first=True,
            solver=Torchdiffeq(rtol=1e-5),
            gradient=None,
        )
        assert result.time.item() == pytest.approx(expected, abs=1e-3)
        x, t = result.state, result.time.item()


def test_a_crossing_of_a_crossing() -> None:
    """T_2 through x_T and T_1 has the derivatives of the second crossing."""
    turning = Turning([1.0, 0.0], 0.2)
    first = run(turning)
    second = stopping_time(
        turning.flow,
        first.state,
        turning.first,
        turning.eps,
        t0=first.time,
        leave_first=True,
        solver=TIGHT,
    )
    truth = turning.crossings(0.2, "falling")[1]
    assert second.time.item() == pytest.approx(truth, abs=1e-8)
    found = torch.autograd.grad(second.time, turning.leaves)
    assert largest_gap(list(found), turning.derivatives(truth)) < 1e-6


# --- several targets ----------------------------------------------------------------------------


@every_route
@both_directions
def test_each_target_by_itself(route: GradientRoute, direction: str) -> None:
    """From J = 0.1: some targets are above of it and have to be left, some are below."""
    x0 = [0.1, 1.0 if direction == "falling" else -1.0]
    turning = Turning(x0, 0.0)
    values = [0.5, 0.05, 0.2, -0.3]
    eps = leaf(values)
    result = run(turning, eps, gradient=route, direction=direction)
    truth = [turning.crossings(value, direction)[0] for value in values]
    assert result.time.tolist() == pytest.approx(truth, abs=1e-8)
    # In time they come in another order than in height.
    order = sorted(range(4), key=lambda k: truth[k])
    assert order == ([1, 3, 0, 2] if direction == "falling" else [2, 0, 3, 1])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)
    leaves = [turning.a, turning.w, turning.x0, turning.t0]
    found = torch.autograd.grad((weights * result.time).sum(), [*leaves, eps])
    expected = [torch.zeros_like(p) for p in [*leaves, eps]]
    for k, (value, time) in enumerate(zip(values, truth, strict=True)):
        alone = Turning(x0, value)
        *parts, by_eps, by_t0 = alone.derivatives(time)
        for total, part in zip(expected, (*parts, by_t0), strict=False):
            total += weights[k] * part
        expected[-1][k] = weights[k] * by_eps
    assert largest_gap(list(found), expected) < 1e-6


def test_each_target_as_by_itself_with_evidence() -> None:
    turning = Turning([0.1, 1.0], 0.0)
    eps = torch.tensor([0.5, 0.05, 0.2, -0.3], dtype=F64)
    together = run(turning, eps, evidence="standard")
    leaves = [turning.a, turning.w, turning.x0, turning.t0]
    total = together.time.sum() + together.state.square().sum()
    alone = [run(turning, one, evidence="standard") for one in eps]
    other = sum(one.time + one.state.square().sum() for one in alone)
    gap = largest_gap(
        list(torch.autograd.grad(total, leaves)),
        list(torch.autograd.grad(other, leaves)),
    )
    assert gap < 1e-6


def test_at_start_is_judged_target_by_target() -> None:
    turning = Turning([0.1, 1.0], 0.0)
    eps = torch.tensor([0.5, 0.05], dtype=F64)
    without = run(turning, eps, leave_first=False)
    assert without.status == [Status.AT_START, Status.REACHED]
    rising = run(turning, eps, leave_first=False, direction="rising")
    assert rising.status == [Status.REACHED, Status.AT_START]
    left = run(turning, eps)
    assert left.status == [Status.REACHED, Status.REACHED]


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


# --- the warning --------------------------------------------------------------------------------


def warned(turning: Turning, **options: Any) -> tuple[StoppingResult, list[warnings.WarningMessage]]:  # fmt: skip # noqa: E501
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(turning, **{"leave_first": False, **options})
    return result, [one for one in caught if issubclass(one.category, StoppingWarning)]


@pytest.mark.parametrize("gradient", [StepAdjoint(), None])
@pytest.mark.parametrize(
    ("x0", "eps", "direction"),
    [
        ([0.0, -1.0], 0.0, "falling"),
        ([0.25, -1.0], 0.25, "falling"),
        ([math.nextafter(0.25, 0.0), -1.0], 0.25, "falling"),
        ([math.nextafter(0.25, 1.0), -1.0], 0.25, "falling"),
        ([0.25, 1.0], 0.25, "rising"),
        ([1e-17, 1.0], 0.0, "rising"),
    ],
)
def test_a_start_on_the_target_that_moves_away(
    x0: list[float], eps: float, direction: str, gradient: Any
) -> None:
    turning = Turning(x0, eps)
    result, caught = warned(turning, direction=direction, gradient=gradient)
    assert len(caught) == 1
    assert NAMES in str(caught[0].message)
    assert f"target {eps:g}" in str(caught[0].message)
    assert Path(caught[0].filename).name == Path(__file__).name
    met = (x0[0] <= eps) if direction == "falling" else (x0[0] >= eps)
    assert result.status is (Status.AT_START if met else Status.REACHED)
    # What the warning names gives the same answer on either side.
    again, silent = warned(turning, direction=direction, leave_first=True)
    assert not silent
    assert again.time.item() == pytest.approx(turning.crossings(eps, direction)[0], abs=1e-8)


def test_each_target_is_warned_about_by_itself() -> None:
    _, caught = warned(Turning([0.25, -1.0], 0.25), target=torch.tensor([0.25, 0.5], dtype=F64))
    assert len(caught) == 1
    assert "target 0.25" in str(caught[0].message)


@pytest.mark.parametrize(
    ("x0", "eps", "direction"),
    [
        ([0.25, 1.0], 0.25, "falling"),  # on the target, and on its way below
        ([0.25, -1.0], 0.25, "rising"),
        ([0.2, -1.0], 0.25, "falling"),  # clearly below
        ([0.25 - 1e-9, -1.0], 0.25, "falling"),
        ([0.3, 1.0], 0.25, "rising"),
        ([0.25 + 1e-9, 1.0], 0.25, "rising"),
    ],
)
def test_other_starts_are_at_start_without_a_warning(
    x0: list[float], eps: float, direction: str
) -> None:
    result, caught = warned(Turning(x0, eps), direction=direction)
    assert not caught
    assert result.status is Status.AT_START
    assert result.time.item() == 0.3


@pytest.mark.parametrize(("weight", "expected"), [(-1.0, 1), (1.0, 0)])
def test_a_start_at_rest_on_the_target(weight: float, expected: int) -> None:
    """x'' = -x from rest at 1: x falls, and J' is zero at the start."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = stopping_time(
            lambda t, s: (s[1], -s[0]),
            (torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)),
            lambda t, s: weight * (s[0].sum() - 1.0),
            0.0,
        )
    assert result.status is Status.AT_START
    assert sum(NAMES in str(one.message) for one in caught) == expected


def test_a_flow_at_rest_on_the_target_does_not_move_away() -> None:
    result = stopping_time(
        lambda t, x: torch.zeros_like(x), torch.ones(1, dtype=F64), lambda t, x: x[0].clone(), 1.0
    )
    assert result.status is Status.AT_START


# --- through the library ------------------------------------------------------------------------


def test_combined_criteria() -> None:
    """J = min or max of (x_1 + 2, x_2 + 2) over 2: below 1 at the start, where both are."""
    turning = Turning([-0.6, -0.2], 0.0)
    criteria = [lambda t, x: x[0] + 2.0, lambda t, x: x[1] + 2.0]
    a, w = turning.a.item(), turning.w.item()

    def at(t: float) -> list[float]:
        s = t - 0.3
        c, n, e = math.cos(w * s), math.sin(w * s), math.exp(-a * s)
        return [e * (-0.6 * c + 0.2 * n), e * (-0.6 * n - 0.2 * c)]

    for kind, choose in ((AnyOf, min), (AllOf, max)):
        result = stopping_time(
            turning.flow,
            turning.x0,
            kind(*criteria, targets=[2.0, 2.0]),
            1.0,
            t0=turning.t0,
            leave_first=True,
            solver=TIGHT,
        )
        T = result.time.item()
        assert choose(at(T)) == pytest.approx(0.0, abs=1e-9)
        before = [choose(at(0.3 + (T - 0.3) * k / 1000)) for k in range(1000)]
        signs = "".join("+" if value > 0 else "-" for value in before)
        assert signs.strip("-").strip("+") == ""
        assert signs[0] == "-"
        assert signs[-1] == "+"


def test_the_check_and_the_tuner_take_it() -> None:
    turning = Turning([-0.6, 0.7], 0.3)
    report = check_stopping_gradient(
        turning.flow,
        turning.x0,
        turning.first,
        turning.eps,
        t0=turning.t0,
        leave_first=True,
        directions=1,
    )
    assert report.passed
    assert report.time == pytest.approx(turning.crossings(0.3, "falling")[0], abs=1e-5)
    task = StoppingTask(
        turning.flow,
        turning.x0.detach(),
        turning.first,
        0.3,
        t0=0.3,
        direction="falling",
        leave_first=True,
    )
    before = task.run().time.item()
    assert before == pytest.approx(report.time, abs=1e-5)
    minimise_stopping_time(
        task,
        turning.w,
        optimizer=torch.optim.SGD([turning.w], lr=0.1),
        iterations=3,
        progress=False,
    )
    assert task.run().time.item() < before
    with pytest.raises(ValueError, match="direction must be"):
        StoppingTask(turning.flow, turning.x0, turning.first, 0.3, direction="up")  # type: ignore[arg-type]


def test_nothing_changes_where_j_starts_clearly_above() -> None:
    turning = Turning([1.0, 0.2], 0.3)
    results = [run(turning, leave_first=flag) for flag in (False, True)]
    assert results[0].time.item() == results[1].time.item()
    for a, b in zip(
        *(torch.autograd.grad(result.time, turning.leaves) for result in results), strict=True
    ):
        assert torch.equal(a, b)


def test_no_attribute_of_a_criterion_is_needed() -> None:
    """A norm has no derivative at zero: the rounding is then that of its value."""

    def norm(t: Tensor, x: Tensor) -> Tensor:
        return x.norm()

    result = stopping_time(
        lambda t, x: torch.where(t < 1.0, 1.0, -1.0) * torch.ones_like(x),
        torch.zeros(2, dtype=F64),
        norm,
        0.0 + 0.5,
        breakpoints=[1.0],
        leave_first=True,
    )
    # |x| = sqrt(2) t, then sqrt(2) (2 - t).
    assert result.time.item() == pytest.approx(2 - 0.5 / math.sqrt(2), abs=1e-9)
