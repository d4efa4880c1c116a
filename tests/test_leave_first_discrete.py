"""leave_first=True of `stopping_index`: N and its derivative against loops by hand."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from turning import F64, Turning, hand_loop, largest_gap, leaf

from discrete import (
    DiscreteAdjoint,
    Euler,
    RungeKutta4,
    StepDecrease,
    StoppingIndexResult,
    StoppingIndexTask,
    Truncated,
    Unrolled,
    check_index_gradient,
    stopping_index,
)
from ode_stopping import NotReachedError, Quadratic, Status, StoppingWarning
from theory_checks import convergence_study

H = 0.05
STARTS = [
    ([-0.6, 0.7], 0.3, "falling"),
    ([1.0, 0.2], 0.3, "falling"),
    ([1.0, 0.2], 0.3, "rising"),
    ([0.25, -1.0], 0.25, "falling"),
    ([0.25, 1.0], 0.25, "falling"),
    ([0.25, 1.0], 0.25, "rising"),
]


def by_hand(turning: Turning, k: int, x: Tensor) -> Tensor:
    """A step of Euler's method."""
    return x + H * turning.flow(torch.zeros((), dtype=F64), x)


def run(turning: Turning, target: Any = None, **options: Any) -> StoppingIndexResult:
    target = turning.eps if target is None else target
    arguments = {"leave_first": True, "max_steps": 2000, **options}
    update = arguments.pop("update", None) or Euler(turning.flow, step=H)
    return stopping_index(update, turning.x0, turning.first, target, **arguments)


@pytest.mark.parametrize(("x0", "eps", "direction"), STARTS)
@pytest.mark.parametrize(
    "route",
    [DiscreteAdjoint(), DiscreteAdjoint(memory=1), DiscreteAdjoint(chunk=7), Unrolled()],
    ids=str,
)
def test_against_a_loop_by_hand(x0: list[float], eps: float, direction: str, route: Any) -> None:
    """N and Definition 3's derivative to a, w, x0 and eps."""
    turning = Turning(x0, eps)
    result = run(turning, direction=direction, gradient=route)
    sign = 1.0 if direction == "falling" else -1.0
    n, steps = hand_loop(
        lambda k, x: by_hand(turning, k, x),
        turning.x0,
        lambda x: x[0],
        turning.eps,
        sign=sign,
        leave=True,
    )
    assert result.status is Status.REACHED
    assert result.index == n > 1
    assert math.copysign(1.0, result.decrease.item()) == -sign
    leaves = turning.leaves[:4]
    found = torch.autograd.grad(result.steps, leaves)
    assert largest_gap(list(found), list(torch.autograd.grad(steps, leaves))) < 1e-10


def test_truncated() -> None:
    turning = Turning([-0.6, 0.7], 0.3)
    full = run(turning)
    turning.x0.requires_grad_(False)
    result = run(turning, gradient=Truncated(steps=full.index))
    assert result.index == full.index
    found = torch.autograd.grad(result.steps, [turning.a, turning.w])
    whole = torch.autograd.grad(full.steps, [turning.a, turning.w])
    assert largest_gap(list(found), list(whole)) < 1e-10


@pytest.mark.parametrize("interpolation", ["hermite", "partial_step"])
@pytest.mark.parametrize(("x0", "eps", "direction"), STARTS)
def test_fractional_indices_tend_to_the_crossing(
    x0: list[float], eps: float, direction: str, interpolation: Any
) -> None:
    turning = Turning(x0, eps)
    result = run(
        turning,
        t0=turning.t0,
        direction=direction,
        interpolation=interpolation,
        update=RungeKutta4(turning.flow, step=0.02),
    )
    truth = turning.crossings(eps, direction)[0]
    assert result.time is not None
    assert result.time.item() == pytest.approx(truth, abs=1e-6)
    found = torch.autograd.grad(result.time, turning.leaves)
    assert largest_gap(list(found), turning.derivatives(truth)) < 1e-4


@pytest.mark.parametrize("direction", ["falling", "rising"])
def test_log_of_a_positive_criterion(direction: Any) -> None:
    """J = 2 + x_1: N* of log J, linear between the last two steps, by hand."""
    turning = Turning([-0.6, 0.7] if direction == "falling" else [0.6, -0.7], 2.1)
    result = stopping_index(
        Euler(turning.flow, step=H),
        turning.x0,
        lambda t, x: 2 + x[0],
        turning.eps,
        direction=direction,
        interpolation="log",
        leave_first=True,
    )
    x: list[Tensor] = [turning.x0]
    for k in range(result.index):
        x.append(by_hand(turning, k, x[-1]))
    before, after = ((2 + state[0]).log() for state in x[-2:])
    expected = result.index - 1 + (before - turning.eps.log()) / (before - after)
    assert result.steps.item() == pytest.approx(expected.item(), rel=1e-12)
    leaves = turning.leaves[:4]
    found = torch.autograd.grad(result.steps, leaves)
    assert largest_gap(list(found), list(torch.autograd.grad(expected, leaves))) < 1e-10


@pytest.mark.parametrize("direction", ["falling", "rising"])
def test_each_target_by_itself(direction: Any) -> None:
    turning = Turning([0.1, 1.0 if direction == "falling" else -1.0], 0.0)
    eps = leaf([0.5, 0.05, 0.2, -0.3])
    sign = 1.0 if direction == "falling" else -1.0
    result = run(turning, eps, direction=direction)
    alone = [
        hand_loop(
            lambda k, x: by_hand(turning, k, x),
            turning.x0,
            lambda x: x[0],
            one,
            sign=sign,
            leave=True,
        )
        for one in eps
    ]
    assert result.index.tolist() == [n for n, _ in alone]
    order = sorted(range(4), key=lambda k: alone[k][0])
    assert order == ([1, 3, 0, 2] if direction == "falling" else [2, 0, 3, 1])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)
    leaves = [turning.a, turning.w, turning.x0, eps]
    found = torch.autograd.grad((weights * result.steps).sum(), leaves)
    expected = torch.autograd.grad((weights * torch.stack([s for _, s in alone])).sum(), leaves)
    assert largest_gap(list(found), list(expected)) < 1e-10
    without = run(turning, eps, direction=direction, leave_first=False)
    names = ["AT_START", "REACHED", "AT_START", "REACHED"]
    assert [one.name for one in without.status] == (
        names if direction == "falling" else ["REACHED", "AT_START", "REACHED", "AT_START"]
    )


@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize("direction", ["falling", "rising"])
def test_against_loops_over_random_tables(direction: Any, leave: bool) -> None:
    """J_k from a table of 60 numbers, 6 targets, one of them J_0: 40 tables."""
    random = np.random.default_rng(0)
    sign = 1.0 if direction == "falling" else -1.0
    misses = 0
    for _ in range(40):
        table = torch.from_numpy(random.normal(size=61))
        targets = torch.from_numpy(random.normal(size=6) * 1.5)
        targets[2] = table[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the start on the target
            result = stopping_index(
                lambda k, x, table=table: table[k + 1 : k + 2].clone(),
                table[:1].clone(),
                lambda t, x: x[0].clone(),
                targets,
                direction=direction,
                leave_first=leave,
                max_steps=60,
                gradient=None,
            )
        expected = []
        for target in targets.tolist():
            excess = [sign * (value - target) for value in table.tolist()]
            first = next((k for k, e in enumerate(excess) if e > 1e-9), 61) if leave else 0
            expected.append(next((k for k in range(first, 61) if excess[k] <= 0), -1))
        misses += expected.count(-1)
        assert result.index.tolist() == expected
    assert misses > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_restarts(dtype: torch.dtype) -> None:
    """J = x falls below eps again and again: a saw tooth of period 5."""

    def update(k: int, x: Tensor) -> Tensor:
        return torch.where(x > 0, x - 1, x + 4)

    x = torch.tensor([4.0], dtype=dtype)
    first = stopping_index(update, x, lambda t, x: x[0].clone(), 2.0, gradient=None)
    assert (first.index, first.state.item()) == (2, 2.0)
    again = stopping_index(
        update, first.state, lambda t, x: x[0].clone(), 2.0, gradient=None, leave_first=True
    )
    assert (again.index, again.state.item()) == (5, 2.0)


def test_a_target_that_is_never_left_is_a_miss() -> None:
    turning = Turning([-0.5, 0.0], 0.9)
    turning.a.data.fill_(0.5)
    result = run(turning, max_steps=500)
    assert (result.status, result.index) == (Status.NOT_REACHED, -1)
    assert "J never was above the target 0.9" in result.note
    with pytest.raises(NotReachedError):
        result.steps.backward()
    rising = run(turning, -0.9, max_steps=500, direction="rising")
    assert "J never was below the target -0.9" in rising.note


def test_at_rest_below_the_target() -> None:
    """Of a limit of a million steps, some thousand are taken."""
    result = stopping_index(
        lambda k, x: 0.9 * x,
        torch.tensor([-1.0, 0.5], dtype=F64),
        lambda t, x: x[0].clone(),
        0.5,
        leave_first=True,
        gradient=None,
    )
    assert "at rest from step" in result.note
    assert "never was above the target 0.5" in result.note
    assert len(result.trajectory) < 12_000


def test_an_iteration_that_leaves_late_is_not_at_rest() -> None:
    """x creeps up by 1e-5 a step, leaves 0.05 at step 5001 and falls at 6000."""

    def update(k: int, x: Tensor) -> Tensor:
        return x + 1e-5 if k < 5999 else torch.zeros_like(x)

    x0 = torch.zeros(1, dtype=F64)
    result = stopping_index(
        update, x0, lambda t, x: x[0].clone(), 0.05, leave_first=True, gradient=None
    )
    assert result.index == 6000


# --- the warning --------------------------------------------------------------------------------


def warned(turning: Turning, **options: Any) -> tuple[StoppingIndexResult, list[Any]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(turning, **{"leave_first": False, **options})
    return result, [one for one in caught if issubclass(one.category, StoppingWarning)]


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), None])
@pytest.mark.parametrize(
    ("x0", "eps", "direction"),
    [
        ([0.25, -1.0], 0.25, "falling"),
        ([math.nextafter(0.25, 0.0), -1.0], 0.25, "falling"),
        ([math.nextafter(0.25, 1.0), -1.0], 0.25, "falling"),
        ([0.25, 1.0], 0.25, "rising"),
    ],
)
def test_a_start_on_the_target_that_moves_away(
    x0: list[float], eps: float, direction: str, gradient: Any
) -> None:
    turning = Turning(x0, eps)
    result, caught = warned(turning, direction=direction, gradient=gradient)
    assert len(caught) == 1
    assert "leave_first=True" in str(caught[0].message)
    assert Path(caught[0].filename).name == Path(__file__).name
    met = (x0[0] <= eps) if direction == "falling" else (x0[0] >= eps)
    assert result.status is (Status.AT_START if met else Status.REACHED)
    again, silent = warned(turning, direction=direction, leave_first=True)
    assert not silent
    assert again.status is Status.REACHED
    assert again.index > 5


@pytest.mark.parametrize(
    ("x0", "direction"),
    [([0.25, 1.0], "falling"), ([0.2, -1.0], "falling"), ([0.3, 1.0], "rising")],
)
def test_other_starts_are_at_start_without_a_warning(x0: list[float], direction: str) -> None:
    result, caught = warned(Turning(x0, 0.25), direction=direction)
    assert not caught
    assert (result.status, result.index) == (Status.AT_START, 0)


# --- through the library ------------------------------------------------------------------------


def test_a_step_decrease_begins_above_every_target() -> None:
    criterion = StepDecrease(Quadratic(torch.ones(2, dtype=F64)))
    rule = Euler(lambda t, x: -x, step=0.1)
    x0 = criterion.initial_state(torch.ones(2, dtype=F64))
    found = [
        stopping_index(criterion.wrap(rule), x0, criterion, 1e-3, leave_first=flag).index
        for flag in (False, True)
    ]
    assert found[0] == found[1] > 1


def test_check_task_and_study() -> None:
    turning = Turning([-0.6, 0.7], 0.3)
    report = check_index_gradient(
        Euler(turning.flow, step=H),
        turning.x0,
        turning.first,
        turning.eps,
        interpolation="partial_step",
        leave_first=True,
        directions=1,
    )
    assert report.passed
    task = StoppingIndexTask(
        Euler(turning.flow, step=H), turning.x0.detach(), turning.first, 0.3, leave_first=True
    )
    assert task.run().index == math.ceil(report.time)
    study = convergence_study(
        turning.flow,
        turning.x0.detach(),
        turning.first,
        0.3,
        steps=[0.02, 0.01, 0.005, 0.0025],
        interpolation="partial_step",
        leave_first=True,
    )
    assert study.reference.time == pytest.approx(turning.crossings(0.3, "falling")[0] - 0.3)
    assert study.slope.slope == pytest.approx(1.0, abs=0.2)
