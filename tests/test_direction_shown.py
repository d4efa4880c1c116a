"""direction="rising": results, pictures, notes, errors and bad input, in the sign of J."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from turning import F64, first, growth, leaf

from discrete import (
    Euler,
    StepDecrease,
    stopping_index,
)
from ode_stopping import (
    DivergedError,
    GradientError,
    Quadratic,
    Status,
    stopping_time,
)

Criterion = Callable[[Tensor, Tensor], Tensor]


# --- what is shown ------------------------------------------------------------------------------


def test_results_are_in_the_sign_of_j() -> None:
    theta = leaf(0.7)
    time = stopping_time(growth(theta), leaf([0.2]), first, 2.0, direction="rising")
    time.time.backward()
    steps = stopping_index(
        Euler(growth(theta), step=0.1), leaf([0.2]), first, 2.0, direction="rising"
    )
    for result in (time, pickle.loads(pickle.dumps(time)), steps, pickle.loads(pickle.dumps(steps))):  # fmt: skip # noqa: E501
        assert result.best >= 2.0 - 1e-9
        numbers = json.loads(json.dumps(result.to_dict()))
        assert numbers["best"] == result.best
        assert numbers.get("rate", 1.0) > 0
        assert numbers.get("decrease", 1.0) > 0
        assert " best        2" in repr(result)
    assert time.evidence.to_dict()["rate"] == pytest.approx(1.4, rel=1e-4)
    assert time.trajectory.values[0] == 0.2
    assert time.trajectory.values[-1].item() == pytest.approx(2.0)
    assert steps.trajectory.losses[0] == 0.2


def test_pictures_are_in_the_sign_of_j() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    flow = growth(leaf(0.7))
    for result in (
        stopping_time(flow, leaf([0.2]), first, 2.0, direction="rising"),
        stopping_index(Euler(flow, step=0.1), leaf([0.2]), first, 2.0, direction="rising"),
    ):
        axes = result.plot()
        heights = [list(map(float, line.get_ydata())) for line in axes.get_lines()]
        assert [2.0, 2.0] in heights
        assert all(value > 0 for some in heights for value in some)


def test_errors_are_in_the_sign_of_j() -> None:
    """The flow, or J, ends in NaN or inf, and J = -x never rises."""
    with pytest.raises(DivergedError, match=r"target 5: .*best J = -1 at t = 0\]") as caught:
        stopping_time(
            lambda t, x: torch.where(t > 1, math.nan, 1.0) * x,
            torch.ones(1, dtype=F64),
            lambda t, x: -x.sum(),
            torch.tensor([5.0, 7.0, -3.0], dtype=F64),
            direction="rising",
        )
    assert caught.value.best == -1.0
    assert caught.value.result.reached.tolist() == [False, False, True]
    with pytest.raises(DivergedError, match=r"target 5: .*J is -inf.*best J = -1 at step 0\]"):
        stopping_index(
            lambda k, x: 1e200 * x,
            torch.ones(1, dtype=F64),
            lambda t, x: -x.sum(),
            torch.tensor([5.0, 7.0, -3.0], dtype=F64),
            direction="rising",
        )


def test_a_jump_over_the_target_is_in_the_sign_of_j() -> None:
    result = stopping_time(
        lambda t, x: torch.ones_like(x),
        torch.zeros(1, dtype=F64),
        lambda t, x: torch.where(t > 1, 3.0, 0.0) + 0.1 * x[0],
        1.0,
        direction="rising",
        breakpoints=[1.0],
        throw=False,
    )
    assert result.status is Status.DEGENERATE
    assert "J(T) - eps = 2.1" in result.note


def test_a_touch_from_below_is_degenerate() -> None:
    """J = sin t touches 1."""
    result = stopping_time(
        lambda t, x: torch.ones_like(x),
        torch.zeros(1, dtype=F64),
        lambda t, x: torch.sin(x[0]),
        1.0,
        direction="rising",
        throw=False,
    )
    assert result.status is Status.DEGENERATE
    assert result.time.item() == pytest.approx(math.pi / 2, abs=1e-3)


def test_a_miss_has_the_largest_value() -> None:
    """J = sin t below 1.5; the iteration likewise."""
    flow: Criterion = lambda t, x: torch.ones_like(x)  # noqa: E731
    wave: Criterion = lambda t, x: torch.sin(x[0])  # noqa: E731
    x0 = torch.zeros(1, dtype=F64)
    missed = stopping_time(flow, x0, wave, 1.5, direction="rising", max_time=7.0)
    assert missed.status is Status.NOT_REACHED
    assert missed.best == pytest.approx(1.0, abs=1e-2)
    assert missed.near_miss is not None
    assert missed.near_miss.margin == pytest.approx(0.5, abs=1e-3)
    index = stopping_index(Euler(flow, step=0.01), x0, wave, 1.5, direction="rising", max_steps=700)
    assert (index.status, index.index) == (Status.NOT_REACHED, -1)
    assert index.best == pytest.approx(1.0, abs=1e-4)


def test_at_rest_below_a_target_it_should_rise_to() -> None:
    x0 = torch.tensor([0.1], dtype=F64)
    logistic: Criterion = lambda t, x: 3 * x * (1 - x)  # noqa: E731
    time = stopping_time(logistic, x0, first, 1.5, direction="rising")
    assert "come to rest" in time.note
    assert time.best == pytest.approx(1.0)
    index = stopping_index(Euler(logistic, step=0.1), x0, first, 1.5, direction="rising")
    assert "at rest" in index.note


# --- bad input ----------------------------------------------------------------------------------


def test_the_piecewise_constant_criterion_is_refused() -> None:
    """A counter that rises: a step that autograd knows nothing of."""
    theta = leaf(0.7)
    result = stopping_index(
        Euler(growth(theta), step=0.1),
        torch.tensor([0.2], dtype=F64),
        lambda t, x: torch.round(x[0]),
        2.0,
        direction="rising",
    )
    with pytest.raises(GradientError, match="changes in jumps"):
        result.steps.backward()
    with pytest.raises(GradientError, match="changes by 1"):
        stopping_time(
            growth(theta),
            torch.tensor([0.2], dtype=F64),
            lambda t, x: torch.round(x[0]),
            2.0,
            direction="rising",
        )


def test_log_needs_a_positive_criterion_all_the_way() -> None:
    """The value before the target is the smaller one here."""
    with pytest.raises(ValueError, match=r"stays positive; got J = -0.1 at step 0"):
        stopping_index(
            lambda k, x: x + 0.5,
            torch.tensor([-0.1], dtype=F64),
            first,
            0.3,
            direction="rising",
            interpolation="log",
        )


def test_a_step_decrease_does_not_rise() -> None:
    criterion = StepDecrease(Quadratic(torch.ones(2, dtype=F64)))
    rule = Euler(lambda t, x: -x, step=0.1)
    with pytest.raises(ValueError, match='direction must be "falling" for a StepDecrease'):
        stopping_index(
            criterion.wrap(rule),
            criterion.initial_state(torch.ones(2, dtype=F64)),
            criterion,
            1e-3,
            direction="rising",
        )
