"""Tuning by descending T or N: closed forms and grid searches."""

from __future__ import annotations

import dataclasses
import inspect
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
    sgd,
    tune,
)

from discrete import Euler, StoppingIndexTask, minimise_stopping_index, stopping_index
from ode_stopping import (
    GradientNorm,
    HeavyBallFlow,
    Positive,
    Quadratic,
    Status,
    StoppingTask,
    minimise_stopping_time,
    stopping_time,
)
from ode_stopping.tuning import TuningOptions

# Closed forms and grid searches ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "iterations"),
    [
        (sgd(0.8), 30),
        (lambda p: torch.optim.Adam(p, lr=0.2, betas=(0.5, 0.9)), 50),
        (lambda p: torch.optim.LBFGS(p, max_iter=8), 3),
        (lambda p: torch.optim.LBFGS(p, max_iter=8, line_search_fn="strong_wolfe"), 3),
    ],
    ids=["sgd", "adam", "lbfgs", "lbfgs with a line search"],
)
def test_closed_form(optimizer: Any, iterations: int) -> None:
    # T + w theta with T = S/theta is least at sqrt(S/w), and is 2 sqrt(S w) there.
    theta, weight = number(1.0), 0.5
    history = tune(
        decay_task(theta),
        theta,
        optimizer=optimizer,
        iterations=iterations,
        penalty=lambda task, result: theta,
        weight=weight,
    )
    best = math.sqrt(log_ratio(2.0) / weight)
    assert theta.item() == pytest.approx(best, abs=1e-4)
    assert history.best.objective == pytest.approx(2 * math.sqrt(log_ratio(2.0) * weight), rel=1e-6)
    assert history.records[0].objective == pytest.approx(log_ratio(2.0) + weight, rel=1e-6)
    assert history.records[0].gradient_norm == pytest.approx(log_ratio(2.0) - weight, rel=1e-5)
    assert len(history) == iterations + 1
    assert theta.grad is None


@pytest.mark.slow
def test_damping_of_the_heavy_ball() -> None:
    objective = Quadratic(torch.tensor([1.0, 6.0], dtype=torch.float64))
    x0 = torch.tensor([1.0, 0.6], dtype=torch.float64)
    damping = Positive(2.6)
    flow = HeavyBallFlow(objective, damping=damping)

    def energy(t: Tensor, state: Any) -> Tensor:
        # It never rises, so that T does not jump where a swing grazes the target.
        return flow.energy(t, state)

    def time_at(value: float) -> float:
        fixed = HeavyBallFlow(objective, damping=value)
        start = fixed.initial_state(x0)
        return stopping_time(fixed, start, energy, 1e-2, gradient=None, solver=FAST).time.item()

    grid = [time_at(value) for value in torch.linspace(1.2, 2.2, 21).tolist()]
    history = tune(
        StoppingTask(flow, flow.initial_state(x0), energy, 1e-2),
        damping,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.1),
        iterations=12,
    )
    assert history.records[0].mean > min(grid) + 1.0
    assert history.best.objective < min(grid) + 0.02
    assert time_at(damping.value.item()) == pytest.approx(history.best.objective, abs=1e-5)


def test_start_that_depends_on_the_parameters_is_made_anew() -> None:
    # x' = -x from theta: T = ln(theta^2/(2 eps))/2, dT/dtheta = 1/theta.
    theta = number(2.0)
    task = StoppingTask(lambda t, x: -x, lambda: theta.reshape(1), half_square, EPS)
    history = tune(task, theta, optimizer=sgd(0.5), iterations=3, restore_best=False)
    expected = 2.0
    for record in history.records:
        assert record.parameters == pytest.approx((expected,), rel=1e-5)
        assert record.mean == pytest.approx(log_ratio(expected), rel=1e-5)
        expected -= 0.5 / expected


def test_parameters_of_criterion_target_and_start_time() -> None:
    # x' = -x, J = a x^2/2 to eps: T = t0 + ln(a x0^2/(2 eps))/2; the gradients are 1/(2a),
    # -1/(2 eps) and 1, so one step of SGD tells them apart.
    a, eps, t0 = number(2.0), number(EPS), number(0.5)
    x0 = torch.tensor([2.0], dtype=torch.float64)
    task = StoppingTask(lambda t, x: -x, x0, lambda t, x: a * half_square(t, x), eps, t0=t0)
    tune(task, [a, eps, t0], optimizer=sgd(1e-4), iterations=1)
    moved = [2.0 - 1e-4 / 4, EPS + 1e-4 / (2 * EPS), 0.5 - 1e-4]
    assert [a.item(), eps.item(), t0.item()] == pytest.approx(moved, abs=1e-9)


# The discrete side -------------------------------------------------------------------------------

SPECTRUM = torch.tensor([1.0, 9.0], dtype=torch.float64)
START = torch.tensor([3.0, 1.0], dtype=torch.float64)


def index_at(step: float) -> float:
    """N* of gradient descent with "log"."""
    objective = Quadratic(SPECTRUM)
    update = lambda k, x: x - step * objective.gradient(x)  # noqa: E731
    options: dict[str, Any] = {"interpolation": "log", "gradient": None}
    return stopping_index(update, START, GradientNorm(objective), 1e-6, **options).steps.item()


def test_learning_rate_of_gradient_descent() -> None:
    objective = Quadratic(SPECTRUM)
    log_step = number(math.log(0.05))
    task = StoppingIndexTask(
        lambda k, x: x - log_step.exp() * objective.gradient(x),
        START,
        GradientNorm(objective),
        1e-6,
        max_steps=2000,
        interpolation="log",
    )
    history = minimise_stopping_index(
        task, log_step, optimizer=lambda p: torch.optim.Adam(p, lr=0.1), iterations=60
    )
    grid = min(index_at(step) for step in torch.linspace(0.18, 0.215, 71).tolist())
    assert history.quantity == "steps"
    assert history.records[0].mean == pytest.approx(index_at(0.05), rel=1e-12)
    assert history.best.objective < grid + 0.2
    assert history.best.objective < 0.3 * history.records[0].mean
    assert index_at(log_step.exp().item()) == pytest.approx(history.best.objective, rel=1e-9)
    assert "TuningHistory of a stopping index" in repr(history)


def test_step_of_euler_is_tuned_as_the_leaf_it_is() -> None:
    objective, step = Quadratic(SPECTRUM), number(0.1)
    rule = Euler(lambda t, x: -objective.gradient(x), step=step)
    task = StoppingIndexTask(rule, START, GradientNorm(objective), 1e-6)
    result = stopping_index(rule, START, GradientNorm(objective), 1e-6)
    (slope,) = torch.autograd.grad(result.steps, step)
    history = minimise_stopping_index(task, step, optimizer=sgd(1e-5), iterations=1)
    assert history.records[0].objective == result.index
    assert step.item() == pytest.approx(0.1 - 1e-5 * slope.item(), rel=1e-12)
    with pytest.raises(TypeError, match="gradient must be a IndexRoute"):
        minimise_stopping_index(task, step, gradient="adjoint")  # type: ignore[arg-type]


def test_misses_of_the_discrete_side() -> None:
    rate = number(0.1)
    one = torch.ones(1, dtype=torch.float64)
    tasks = [
        StoppingIndexTask(lambda k, x: x - rate * x, start * one, half_square, EPS, max_steps=20)
        for start in (1.0, 50.0)
    ]
    diverges = StoppingIndexTask(lambda k, x: x * (50 + rate), one, half_square, EPS)
    history = minimise_stopping_index([*tasks, diverges], rate, iterations=1, censored=100)
    first = tasks[0].run(gradient=None).index
    assert diverges.run(gradient=None).status is Status.DIVERGED
    assert (history.records[0].reached, history.records[0].missed) == (1, 2)
    assert history.records[0].mean == pytest.approx((16 + 100 + 100) / 3)
    assert first < 16  # faster after the step


@pytest.mark.parametrize("function", [minimise_stopping_time, minimise_stopping_index])
def test_every_option_is_a_keyword_with_the_same_default(function: Any) -> None:
    keywords = inspect.signature(function).parameters
    for option in dataclasses.fields(TuningOptions):
        assert keywords[option.name].default == option.default, option.name
