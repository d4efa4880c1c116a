"""Tuning by descending T or N: closed-form optima, averages, misses, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from discrete import Euler, StoppingIndexTask, minimise_stopping_index, stopping_index
from ode_stopping import (
    HeavyBallFlow,
    LossValue,
    Positive,
    Quadratic,
    StoppingTask,
    TuningError,
    TuningHistory,
    minimise_stopping_time,
    stopping_time,
)

F64 = torch.float64


def half_square(t: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


def decay(theta: Tensor, x0: float = 2.0, **options: Any) -> StoppingTask:
    """T = log(x0^2/(2 eps))/(2 theta), eps = 1e-3."""
    start = torch.tensor([x0], dtype=F64)
    return StoppingTask(lambda t, x: -theta * x, start, half_square, 1e-3, **options)


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


OPTIMIZERS = {
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.2),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closed_form_optimum_with_a_penalty(name: str) -> None:
    """min over theta of S/(2 theta) + theta is at sqrt(S/2), S = log(x0^2/(2 eps))."""
    theta = leaf(1.0)
    history = minimise_stopping_time(
        decay(theta),
        [theta],
        optimizer=OPTIMIZERS[name],
        iterations=8 if name == "LBFGS" else 100,
        penalty=lambda task, result: theta,
        progress=False,
    )
    best = math.sqrt(math.log(4 / 2e-3) / 2)
    assert float(theta.detach()) == pytest.approx(best, rel=1e-3)
    assert isinstance(history, TuningHistory)
    assert history.best.objective == pytest.approx(2 * best, rel=1e-5)
    assert history.objectives[0] > history.best.objective


def test_the_objective_is_the_mean_over_the_tasks() -> None:
    theta = leaf(1.0)
    starts = (1.0, 2.0, 5.0)
    tasks = [decay(theta, x0) for x0 in starts]
    history = minimise_stopping_time(
        tasks, [theta], optimizer=lambda p: torch.optim.SGD(p, lr=0.0), iterations=1, progress=False
    )
    truth = sum(math.log(x0**2 / 2e-3) / 2 for x0 in starts) / 3
    assert history.objectives[0] == pytest.approx(truth, rel=1e-7)
    # dT/dtheta = -T at theta = 1
    assert history.records[0].gradient_norm == pytest.approx(truth, rel=1e-5)


def test_heavy_ball_damping_is_near_the_best_of_a_scan() -> None:
    f = Quadratic(torch.tensor([1.0, 4.0], dtype=F64))
    x0, eps = torch.tensor([1.0, 1.0], dtype=F64), 1e-3
    damping = Positive(3.5)
    flow = HeavyBallFlow(f, damping=damping)
    task = StoppingTask(flow, flow.initial_state(x0), LossValue(f), eps)
    minimise_stopping_time(
        task, damping, optimizer=OPTIMIZERS["Adam"], iterations=15, progress=False
    )
    tuned = float(stopping_time(flow, flow.initial_state(x0), LossValue(f), eps).time.detach())

    def at(a: float) -> float:
        one = HeavyBallFlow(f, damping=a)
        state = one.initial_state(x0)
        return float(stopping_time(one, state, LossValue(f), eps, gradient=None).time)

    # The branch that descent from above can reach: T has jumps below it.
    scan = [at(a) for a in torch.linspace(2.0, 3.5, 16).tolist()]
    assert tuned <= min(scan) + 0.02
    assert tuned < 0.8 * at(3.5)


def test_misses_are_counted_and_censored() -> None:
    theta = leaf(1.0)
    tasks = [decay(theta), decay(theta, x0=50.0, max_time=4.5)]
    history = minimise_stopping_time(tasks, [theta], iterations=2, progress=False)
    first = history.records[0]
    assert (first.reached, first.missed) == (1, 1)
    known = math.log(4 / 2e-3) / 2
    assert first.objective == pytest.approx((known + 4.5) / 2, rel=1e-6)


def test_nothing_reached_is_an_error() -> None:
    theta = leaf(1.0)
    with pytest.raises(TuningError, match=r"horizon|reached"):
        minimise_stopping_time(decay(theta, max_time=0.1), [theta], iterations=3, progress=False)


def test_minibatches_callback_history_and_picture() -> None:
    theta = leaf(1.0)
    tasks = [decay(theta, x0) for x0 in (1.0, 2.0, 3.0, 4.0)]
    seen: list[int] = []

    def callback(record: Any) -> bool:
        seen.append(record.iteration)
        return len(seen) == 3

    history = minimise_stopping_time(
        tasks, [theta], iterations=10, batch_size=2, callback=callback, progress=False
    )
    assert len(seen) == 3
    assert "TuningHistory" in repr(history)
    assert len(history.to_dataframe()) == len(history)
    import matplotlib.pyplot as plt

    assert history.plot() is not None
    plt.close("all")


def test_refused() -> None:
    theta = leaf(1.0)
    with pytest.raises((TypeError, ValueError), match="parameters"):
        minimise_stopping_time(decay(theta), [theta.detach()], progress=False)
    with pytest.raises((TypeError, ValueError), match="iterations"):
        minimise_stopping_time(decay(theta), [theta], iterations=0, progress=False)
    with pytest.raises((TypeError, ValueError), match="tasks"):
        minimise_stopping_time([], [theta], progress=False)


def test_the_discrete_side_tunes_a_step() -> None:
    """Gradient descent on diag(1, 9): the fewest steps are near lr = 2/(1 + 9)."""
    f = Quadratic(torch.tensor([1.0, 9.0], dtype=F64))
    x0 = torch.tensor([1.0, 1.0], dtype=F64)
    log_lr = leaf(math.log(0.05))

    def update(k: int, x: Tensor) -> Tensor:
        return x - log_lr.exp() * f.gradient(x)

    task = StoppingIndexTask(update, x0, LossValue(f), 1e-6, interpolation="log")
    before = float(task.run(gradient=None).steps)
    minimise_stopping_index(
        task,
        [log_lr],
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        iterations=60,
        progress=False,
    )
    flow = lambda t, x: -f.gradient(x)  # noqa: E731
    steps = {
        lr: stopping_index(Euler(flow, step=lr), x0, LossValue(f), 1e-6, gradient=None).index
        for lr in torch.linspace(0.05, 0.21, 33).tolist()
    }
    after = float(task.run(gradient=None).steps)
    assert after < 0.5 * before
    assert after <= min(steps.values()) + 3
