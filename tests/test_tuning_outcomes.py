"""Tuning: how each outcome counts, and what happens where there is nothing to follow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from iterations import number
from torch import Tensor
from tuned import (
    EPS,
    FAST,
    decay_task,
    half_square,
    log_ratio,
    one_step,
    sgd,
    tune,
)

from ode_stopping import (
    GradientError,
    MissingGradientError,
    Status,
    StoppingTask,
    Torchdiffeq,
    TuningError,
    stopping_time,
)

# Means and outcomes ------------------------------------------------------------------------------


def test_several_starts_average() -> None:
    starts, theta = (1.0, 2.0, 5.0), number(1.5)
    tasks = [decay_task(theta, start) for start in starts]
    times = [stopping_time(t.flow, t.x0, t.criterion, EPS, solver=FAST).time for t in tasks]
    single = [torch.autograd.grad(time, theta)[0].item() for time in times]
    history, gradient = one_step(tasks, theta)
    assert gradient == pytest.approx(sum(single) / 3, rel=1e-12)
    assert gradient == pytest.approx(-sum(map(log_ratio, starts)) / 3 / 1.5**2, rel=1e-5)
    assert history.records[0].mean == pytest.approx(sum(t.item() for t in times) / 3, rel=1e-12)
    assert history.records[0].tasks == (0, 1, 2)


@pytest.mark.parametrize("censored", ["horizon", 7.0])
def test_misses_are_censored(censored: Any) -> None:
    theta = number(1.0)
    tasks = [decay_task(theta, start, max_time=2.5) for start in (1.0, 50.0)]
    history, gradient = one_step(tasks, theta, censored=censored)
    record = history.records[0]
    counted = 2.5 if censored == "horizon" else censored
    assert (record.reached, record.missed) == (1, 1)
    assert record.mean == pytest.approx((log_ratio(1.0) + counted) / 2, rel=1e-6)
    assert gradient == pytest.approx(-log_ratio(1.0) / 2, rel=1e-5)
    assert "reached     " in repr(history)


def test_penalty_of_a_miss_counts_as_far_as_it_does_not_come_from_the_path() -> None:
    theta = number(1.0)
    tasks = [decay_task(theta, start, max_time=2.5) for start in (1.0, 50.0)]

    def penalty(task: StoppingTask, result: Any) -> Tensor:
        return 3 * theta + result.state.sum()

    history, gradient = one_step(tasks, theta, penalty=penalty, weight=2.0)
    # The state of the hit lies on J = eps whatever theta is; that of the miss is a constant.
    assert gradient == pytest.approx(-log_ratio(1.0) / 2 + 2 * 3, rel=1e-5)
    states = math.sqrt(2 * EPS) + 50 * math.exp(-2.5)
    assert history.records[0].penalty == pytest.approx(3 + states / 2, rel=1e-5)
    assert history.records[0].objective == pytest.approx(
        history.records[0].mean + 2 * history.records[0].penalty
    )


def test_runs_that_break_off_count_as_misses_without_penalty() -> None:
    theta = number(1.0)
    diverges = StoppingTask(
        lambda t, x: theta * x**2,
        torch.ones(1, dtype=torch.float64),
        half_square,
        EPS,
        max_time=9.0,
    )
    stalls = decay_task(theta, max_time=30.0)
    seen: list[Status] = []

    def penalty(task: StoppingTask, result: Any) -> Tensor:
        seen.append(result.status)
        return result.state.sum() * 0 + 1.0

    tasks = [decay_task(theta), diverges]
    history, gradient = one_step(tasks, theta, penalty=penalty)
    assert diverges.run().status in (Status.DIVERGED, Status.STALLED)
    assert seen == [Status.REACHED, Status.REACHED]
    assert history.records[0].missed == 1
    assert history.records[0].mean == pytest.approx((log_ratio(2.0) + 9.0) / 2, rel=1e-6)
    assert history.records[0].penalty == 0.5
    assert gradient == pytest.approx(-log_ratio(2.0) / 2, rel=1e-5)
    short = Torchdiffeq(max_steps=3)
    assert stalls.run(solver=short).status is Status.STALLED
    assert stalls.run(solver=short).time.item() == 30.0


def test_start_at_the_target_counts_with_a_gradient_of_zero() -> None:
    theta = number(1.0)
    history, gradient = one_step([decay_task(theta, 0.01, t0=0.3), decay_task(theta)], theta)
    assert history.records[0].mean == pytest.approx((0.3 + log_ratio(2.0)) / 2, rel=1e-6)
    assert gradient == pytest.approx(-log_ratio(2.0) / 2, rel=1e-5)
    assert history.records[0].reached == 2


def test_degenerate_crossing_counts_as_a_constant() -> None:
    theta = number(1.0)
    zero = torch.zeros(1, dtype=torch.float64)

    def touches(t: Tensor, x: Tensor) -> Tensor:
        return (x - 1.0).square().sum() + 0.1

    task = StoppingTask(lambda t, x: theta * torch.ones_like(x), zero, touches, 0.1, max_time=5.0)
    assert task.run(gradient=None).status is Status.DEGENERATE

    def penalty(task: StoppingTask, result: Any) -> Tensor:
        return result.state.sum()

    history, gradient = one_step([task, decay_task(theta)], theta, penalty=penalty)
    assert history.records[0].mean == pytest.approx((1.0 + log_ratio(2.0)) / 2, rel=1e-4)
    assert gradient == pytest.approx(-log_ratio(2.0) / 2, rel=1e-5)
    with pytest.raises(TuningError, match="touched it only"):
        tune(task, theta, iterations=1)


# Nothing to follow -------------------------------------------------------------------------------


def test_nothing_reached_is_an_error_with_the_history() -> None:
    theta = number(1.0)
    tasks = [decay_task(theta, 50.0, max_time=1.0), decay_task(theta, 60.0, max_time=1.0)]
    with pytest.raises(TuningError, match=r"iteration 0: .*2 NOT_REACHED.*Raise the horizon") as e:
        tune(tasks, theta)
    assert theta.item() == 1.0
    assert len(e.value.history) == 1
    # The penalty alone is no direction for a stopping time.
    with pytest.raises(TuningError, match="nothing was reached"):
        tune(tasks, theta, penalty=lambda task, result: theta)


def test_parameters_that_leave_the_reachable_region() -> None:
    theta = number(1.0)
    with pytest.raises(TuningError, match=r"iteration 1: .*Smaller steps") as caught:
        tune(
            decay_task(theta, max_time=50.0),
            theta,
            optimizer=sgd(1.0),
            penalty=lambda task, result: 4 * theta,
        )
    history = caught.value.history
    assert theta.item() == pytest.approx(1.0 + log_ratio(2.0) - 4, rel=1e-5)
    assert [record.missed for record in history.records] == [0, 1]
    history.load_best(theta)
    assert theta.item() == 1.0


def test_parameters_that_are_not_used() -> None:
    theta, other = number(1.0), number(1.0)
    with pytest.raises(TuningError, match="do not depend on the parameters"):
        tune(decay_task(theta), other)
    stale = (2 * theta).detach()
    with pytest.raises(TuningError, match="do not depend on the parameters"):
        tune(decay_task(stale), theta)


def test_every_start_at_the_target() -> None:
    theta = number(1.0)
    with pytest.raises(TuningError, match="there at the start"):
        tune(decay_task(theta, 0.01), theta)


def test_parameters_that_become_nan() -> None:
    theta = number(1.0)
    with pytest.raises(TuningError, match="NaN or infinite in the step of iteration 0"):
        tune(decay_task(theta), theta, optimizer=sgd(math.inf))


# Gradients that fail -----------------------------------------------------------------------------


def careless_task(theta: Tensor) -> StoppingTask:
    """A flow whose derivative to theta is partly lost."""
    flow = lambda t, x: -0.5 * (theta + theta.detach()) * x  # noqa: E731
    x0 = torch.tensor([3.0], dtype=torch.float64)
    return StoppingTask(flow, x0, half_square, EPS, name="careless")


def test_gradient_error_ends_the_run() -> None:
    theta = number(1.0)
    with pytest.raises(TuningError, match=r"iteration 0: .*task 1 \(careless\)") as caught:
        tune([decay_task(theta), careless_task(theta)], theta)
    assert isinstance(caught.value.__cause__, MissingGradientError)


def test_gradient_error_can_be_skipped() -> None:
    theta = number(1.0)
    tasks = [decay_task(theta), careless_task(theta)]
    history, gradient = one_step(tasks, theta, on_error="skip")
    record = history.records[0]
    assert gradient == pytest.approx(-log_ratio(2.0) / 2, rel=1e-5)
    assert record.mean == pytest.approx((log_ratio(2.0) + log_ratio(3.0)) / 2, rel=1e-6)
    assert (record.reached, len(record.errors)) == (2, 1)
    assert record.errors[0].startswith("task 1 (careless): MissingGradientError")
    assert "1 gradients were missing" in repr(history)
    with pytest.raises(TuningError, match="the first error was: task 0"):
        tune(careless_task(number(1.0)), theta, on_error="skip")


def test_gradient_of_nan_never_reaches_the_optimiser() -> None:
    theta = number(1.0)
    second = decay_task(theta, name="root")

    def penalty(task: StoppingTask, result: Any) -> Tensor:
        return (theta - 1.0).abs().sqrt() if task is second else 0 * theta  # NaN at theta = 1

    tasks = [decay_task(theta), second]
    with pytest.raises(TuningError, match=r"NaN or inf.*task 1 \(root\)") as caught:
        tune(tasks, theta, penalty=penalty)
    assert isinstance(caught.value.__cause__, GradientError)
    assert theta.item() == 1.0
    _, gradient = one_step(tasks, theta, penalty=penalty, on_error="skip")
    assert gradient == pytest.approx(-log_ratio(2.0) / 2, rel=1e-5)


def test_other_errors_say_where_they_arose() -> None:
    theta = number(1.0)

    def broken(task: StoppingTask, result: Any) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        tune([decay_task(theta, name="first")], theta, penalty=broken)
    notes = " ".join(caught.value.__notes__)
    assert "task 0 (first)" in notes
    assert "iteration 0" in notes
