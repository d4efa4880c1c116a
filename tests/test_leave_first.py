"""leave_first=True: J has to be on the other side of its target before a crossing counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from turning import F64, TIGHT, Turning, largest_gap, leaf, run
from variants import slow_after

from ode_stopping import (
    AllOf,
    AnyOf,
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    Status,
    StepAdjoint,
    StoppingTask,
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
every_route = pytest.mark.parametrize(
    "route", slow_after(2, ROUTES), ids=lambda route: type(route).__name__
)
both_directions = pytest.mark.parametrize("direction", ["falling", "rising"])


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
    result = run(turning, 0.0, direction="rising", gradient=DirectAdjoint(), evidence="light")
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
    # T_2 does not depend on where the first run stopped: that derivative is zero by cancellation.
    first = run(turning, evidence="light")
    second = stopping_time(
        turning.flow,
        first.state,
        turning.first,
        turning.eps,
        t0=first.time,
        leave_first=True,
        solver=TIGHT,
        evidence="light",
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
