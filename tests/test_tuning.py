"""Tuning by descending the stopping time: closed forms, how outcomes count, the loop's manners."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from iterations import number
from torch import Tensor, nn

from discrete import (
    Euler,
    StoppingIndexTask,
    minimise_stopping_index,
    stopping_index,
)
from ode_stopping import (
    GradientError,
    GradientNorm,
    HeavyBallFlow,
    MissingGradientError,
    Positive,
    Quadratic,
    Status,
    StoppingTask,
    Torchdiffeq,
    TuningError,
    TuningRecord,
    minimise_stopping_time,
    stopping_time,
)

EPS = 0.02
FAST = Torchdiffeq(rtol=1e-6)


def half_square(t: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


def decay(theta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """x' = -theta x."""
    return lambda t, x: -theta * x


def log_ratio(start: float) -> float:
    """theta T of `decay` with `half_square`: ln(x0^2/(2 eps))/2."""
    return math.log(start**2 / (2 * EPS)) / 2


def decay_task(theta: Tensor, start: float = 2.0, **options: Any) -> StoppingTask:
    x0 = torch.tensor([start], dtype=torch.float64)
    return StoppingTask(decay(theta), x0, half_square, EPS, **options)


def sgd(rate: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def tune(tasks: Any, parameters: Any, **options: Any) -> Any:
    return minimise_stopping_time(tasks, parameters, **{"solver": FAST, **options})


# Closed forms and grid searches -------------------------------------------------------------------


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
    assert history.best.objective == pytest.approx(2 * math.sqrt(log_ratio(2.0) * weight), abs=1e-7)
    assert history.records[0].objective == pytest.approx(log_ratio(2.0) + weight, rel=1e-6)
    assert history.records[0].gradient_norm == pytest.approx(log_ratio(2.0) - weight, rel=1e-5)
    assert len(history) == iterations + 1
    assert theta.grad is None


def test_damping_of_the_heavy_ball() -> None:
    objective = Quadratic(torch.tensor([1.0, 6.0], dtype=torch.float64))
    x0 = torch.tensor([1.0, 0.6], dtype=torch.float64)
    damping = Positive(3.5)
    flow = HeavyBallFlow(objective, damping=damping)

    def energy(t: Tensor, state: Any) -> Tensor:
        # It never rises, so that T does not jump where a swing grazes the target.
        return flow.energy(t, state)

    def time_at(value: float) -> float:
        fixed = HeavyBallFlow(objective, damping=value)
        start = fixed.initial_state(x0)
        return stopping_time(fixed, start, energy, 1e-3, gradient=None, solver=FAST).time.item()

    grid = [time_at(value) for value in torch.linspace(1.2, 2.4, 49).tolist()]
    history = tune(
        StoppingTask(flow, flow.initial_state(x0), energy, 1e-3),
        damping,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        iterations=30,
    )
    assert history.records[0].mean == pytest.approx(10.38, abs=0.02)
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


# Means and outcomes -------------------------------------------------------------------------------


def one_step(tasks: Any, theta: Tensor, **options: Any) -> tuple[Any, float]:
    """The history, and the gradient that SGD saw."""
    before = theta.item()
    history = tune(tasks, theta, optimizer=sgd(1.0), iterations=1, restore_best=False, **options)
    return history, before - theta.item()


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


# Nothing to follow --------------------------------------------------------------------------------


def test_nothing_reached_is_an_error_with_the_history() -> None:
    theta = number(1.0)
    tasks = [decay_task(theta, 50.0, max_time=1.0), decay_task(theta, 60.0, max_time=1.0)]
    with pytest.raises(TuningError, match=r"iteration 0: .*2 NOT_REACHED.*Raise the horizon") as e:
        tune(tasks, theta)
    assert theta.item() == 1.0
    assert e.value.history.records == []
    # The penalty alone is no direction for a stopping time.
    with pytest.raises(TuningError, match="nothing was reached"):
        tune(tasks, theta, penalty=lambda task, result: theta)


def test_parameters_that_leave_the_reachable_region() -> None:
    theta = number(1.0)
    with pytest.raises(TuningError, match="iteration 1: .*Smaller steps") as caught:
        tune(
            decay_task(theta, max_time=5.0),
            theta,
            optimizer=sgd(1.0),
            penalty=lambda task, result: 4 * theta,
        )
    history = caught.value.history
    assert theta.item() == pytest.approx(1.0 + log_ratio(2.0) - 4, rel=1e-5)
    assert len(history) == 1
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


# Gradients that fail ------------------------------------------------------------------------------


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


# Minibatches --------------------------------------------------------------------------------------


def batch_tasks(theta: Tensor) -> list[StoppingTask]:
    return [decay_task(theta, start) for start in (1.0, 2.0, 3.0, 4.0, 5.0)]


def test_minibatches_are_passes_in_random_order() -> None:
    theta = number(1.0)
    state = torch.random.get_rng_state()
    history = tune(batch_tasks(theta), theta, batch_size=2, iterations=6, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    batches = [record.tasks for record in history.records]
    assert [len(batch) for batch in batches] == [2, 2, 1, 2, 2, 1, 5]
    assert sorted(sum(batches[:3], ())) == sorted(sum(batches[3:6], ())) == [0, 1, 2, 3, 4]
    assert batches[:3] != batches[3:6]
    assert [r.full_objective is not None for r in history.records] == [
        True, False, False, True, False, False, True,
    ]  # fmt: skip
    again = number(1.0)
    other = tune(batch_tasks(again), again, batch_size=2, iterations=6, seed=3)
    assert other.objectives == history.objectives
    assert again.item() == theta.item()
    different = number(1.0)
    seeds = tune(batch_tasks(different), different, batch_size=2, iterations=6, seed=4)
    assert [r.tasks for r in seeds.records] != batches


def test_best_of_minibatches_is_that_of_all_tasks() -> None:
    theta = number(1.5)
    tasks = batch_tasks(theta)
    history = tune(
        tasks,
        theta,
        batch_size=1,
        iterations=10,
        optimizer=sgd(4.0),  # too large: the last is not the best
        penalty=lambda task, result: 0.5 * theta,
    )
    full = [(r.full_objective, r.parameters) for r in history.records if r.full_objective]
    assert len(full) == 3
    assert (history.best.objective, (theta.item(),)) == min(full)
    assert [p.item() for p in history.best_parameters] == [theta.item()]
    mean = sum(task.run(gradient=None, solver=FAST).time.item() for task in tasks) / 5
    assert history.best.objective == pytest.approx(mean + 0.5 * theta.item(), rel=1e-9)


def test_minibatches_without_restoring() -> None:
    theta = number(1.0)
    tasks = batch_tasks(theta)
    history = tune(tasks, theta, batch_size=3, iterations=2, restore_best=False)
    assert [r.full_objective is None for r in history.records] == [True, True, False]
    assert history.records[-1].parameters == (theta.item(),)


def test_batch_without_a_hit_is_passed_over_but_not_a_whole_pass() -> None:
    theta = number(1.0)
    tasks = [decay_task(theta, start, max_time=4.0) for start in (2.0, 500.0)]
    history = tune(tasks, theta, batch_size=1, iterations=4)
    assert sorted(r.missed for r in history.records[:4]) == [0, 0, 1, 1]
    still = [r for r in history.records[:4] if r.missed]
    assert all(math.isnan(record.gradient_norm) for record in still)
    hopeless = [decay_task(theta, start, max_time=4.0) for start in (400.0, 500.0)]
    with pytest.raises(TuningError, match="iteration 1: "):
        tune(hopeless, theta, batch_size=1, restore_best=False)


def test_lbfgs_refuses_minibatches() -> None:
    theta = number(1.0)
    with pytest.raises(ValueError, match="batch_size must be None with LBFGS"):
        tune(batch_tasks(theta), theta, batch_size=2, optimizer=lambda p: torch.optim.LBFGS(p))
    # As many as there are is no minibatch.
    tune(
        batch_tasks(theta),
        theta,
        batch_size=5,
        iterations=1,
        optimizer=lambda p: torch.optim.LBFGS(p, max_iter=2),
        penalty=lambda task, result: theta,
    )


# Manners ------------------------------------------------------------------------------------------


def test_restores_the_best_unless_told_otherwise() -> None:
    for restore in (True, False):
        theta = number(2.1)
        history = tune(
            decay_task(theta),
            theta,
            optimizer=sgd(9.0),
            iterations=3,
            penalty=lambda task, result, theta=theta: 0.5 * theta,
            restore_best=restore,
        )
        values = dict(zip(history.objectives, [r.parameters for r in history.records], strict=True))
        assert history.best.objective == min(values)
        wanted = values[min(values)] if restore else history.records[-1].parameters
        assert (theta.item(),) == wanted
        assert history.best.iteration < 3


def test_clipping() -> None:
    theta = number(1.0)
    history, gradient = one_step(decay_task(theta), theta, clip=0.25)
    assert gradient == pytest.approx(-0.25, rel=1e-12)
    assert history.records[0].gradient_norm == pytest.approx(log_ratio(2.0), rel=1e-5)
    _, gradient = (
        one_step(decay_task(number(1.0)), theta := number(1.0), clip=None)
        if False
        else (
            None,
            one_step(decay_task(theta2 := number(1.0)), theta2, clip=100.0)[1],
        )
    )
    assert gradient == pytest.approx(-log_ratio(2.0), rel=1e-5)


def test_callback_stops_and_schedules() -> None:
    theta = number(1.0)
    optimizer = torch.optim.SGD([theta], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    seen: list[TuningRecord] = []

    def callback(record: TuningRecord) -> bool:
        seen.append(record)
        scheduler.step()
        return record.iteration == 2

    history = tune(decay_task(theta), theta, optimizer=optimizer, callback=callback)
    assert history.stopped == "callback"
    assert [record.iteration for record in history.records] == [0, 1, 2, 3]
    assert seen == history.records[:3]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
    assert all(record.seconds > 0 for record in history.records)


def test_interrupt_leaves_the_latest_parameters() -> None:
    theta = number(1.0)

    def callback(record: TuningRecord) -> None:
        if record.iteration == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(decay_task(theta), theta, optimizer=sgd(0.1), callback=callback)
    second = 1.0 + 0.1 * log_ratio(2.0)
    assert theta.item() == pytest.approx(second + 0.1 * log_ratio(2.0) / second**2, rel=1e-6)
    assert theta.grad is None


def test_works_under_no_grad() -> None:
    theta = number(1.0)
    with torch.no_grad():
        _, gradient = one_step(decay_task(theta), theta)
    assert gradient == pytest.approx(-log_ratio(2.0), rel=1e-5)


@pytest.mark.parametrize("wanted", [True, False, None])
def test_progress(wanted: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    theta = number(1.0)
    tune(decay_task(theta), theta, iterations=2, progress=wanted)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("reached 1 of 1" in err) is (wanted is True)


def test_modules_and_tensors_are_parameters_alike() -> None:
    rate, theta = Positive(1.0), number(1.0)
    task = StoppingTask(
        lambda t, x: -theta * rate.value * x, torch.full((1,), 2.0).double(), half_square, EPS
    )
    history = tune(task, [rate, theta, rate], optimizer=sgd(0.1), iterations=1)
    assert history.records[0].parameters == (0.0, 1.0)
    step = 0.1 * log_ratio(2.0)
    assert rate.raw.item() == pytest.approx(step, rel=1e-5)
    assert theta.item() == pytest.approx(1 + step, rel=1e-5)


def test_default_optimiser_is_adam() -> None:
    theta = number(1.0)
    tune(decay_task(theta), theta, iterations=1)
    assert theta.item() == pytest.approx(1.01, rel=1e-6)


# The history --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def missing_history() -> Any:
    """A run with a miss in it."""
    theta = number(1.0)
    tasks = [decay_task(theta, start, max_time=2.5) for start in (1.0, 13.0)]
    return tune(tasks, theta, optimizer=sgd(0.2), iterations=4)


def test_history_is_readable(missing_history: Any) -> None:
    text = repr(missing_history)
    assert text.startswith("TuningHistory of a stopping time")
    for part in ("iterations  4 (iterations)", "objective", "->", "best", "of 2 in the last"):
        assert part in text
    assert "penalty" not in text


def test_history_as_a_table(missing_history: Any) -> None:
    pytest.importorskip("pandas")
    table = missing_history.to_dataframe()
    assert len(table) == 5
    assert list(table["objective"]) == missing_history.objectives
    assert list(table["parameter_0"]) == [r.parameters[0] for r in missing_history.records]


def test_history_as_a_picture(missing_history: Any) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = missing_history.plot()
    assert list(axes.lines[0].get_ydata()) == missing_history.objectives
    assert axes.get_xlabel() == "iteration"
    figure, own = pyplot.subplots()
    assert missing_history.plot(own) is own
    theta = number(1.0)
    tune(batch_tasks(theta), theta, batch_size=2, iterations=4).plot(own)
    figure.canvas.draw()
    pyplot.close("all")


def test_history_without_a_full_run() -> None:
    theta = number(1.0)

    def callback(record: TuningRecord) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        tune(decay_task(theta), theta, callback=callback)
    from ode_stopping import TuningHistory

    empty = TuningHistory("time")
    assert repr(empty) == "TuningHistory(no records)"
    with pytest.raises(ValueError, match="no iteration ran all tasks"):
        _ = empty.best
    with pytest.raises(ValueError, match="the best parameters have shapes"):
        empty.load_best(theta)


def test_many_parameters_are_kept_as_the_best_only() -> None:
    weights = torch.full((40,), 0.05, dtype=torch.float64, requires_grad=True)
    task = StoppingTask(
        lambda t, x: -weights.sum() * x, torch.full((1,), 2.0).double(), half_square, EPS
    )
    history = tune(task, weights, iterations=1)
    assert history.records[0].parameters is None
    assert torch.equal(history.best_parameters[0], weights.detach())


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": []}, ValueError, "tasks must hold at least one"),
        ({"tasks": 3}, TypeError, "tasks must be tasks"),
        ({"tasks": [3]}, TypeError, "tasks must hold tasks.*entry 0"),
        ({"parameters": []}, ValueError, "parameters must hold at least one"),
        ({"parameters": 1.0}, TypeError, "parameters must be tensors"),
        ({"parameters": [1.0]}, TypeError, "parameters must hold floating-point.*entry 0"),
        ({"parameters": [torch.ones(1)]}, ValueError, "parameters must require grad; entry 0"),
        ({"parameters": nn.ReLU()}, ValueError, "parameters must hold at least one"),
        ({"optimizer": 1.0}, TypeError, "optimizer must be a torch.optim.Optimizer"),
        ({"optimizer": lambda p: p}, TypeError, "optimizer must be a torch.optim.Optimizer"),
        ({"optimizer": torch.optim.SGD([number(1.0)])}, ValueError, "1 of them .* 1 others"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"censored": None}, ValueError, "censored must be a finite number"),
        ({"censored": "never"}, ValueError, "censored must be a finite number"),
        ({"censored": math.inf}, ValueError, "censored must be finite"),
        ({"weight": -1.0}, ValueError, "weight must be finite and >= 0"),
        ({"weight": "1"}, TypeError, "weight must be a number"),
        ({"clip": 0.0}, ValueError, "clip must be finite and > 0"),
        ({"penalty": 1.0}, TypeError, "penalty must be callable"),
        ({"callback": 1.0}, TypeError, "callback must be callable"),
        ({"on_error": "ignore"}, ValueError, "on_error must be"),
        ({"progress": "yes"}, TypeError, "progress must be True or False"),
        ({"restore_best": 1}, TypeError, "restore_best must be True or False"),
        ({"gradient": None}, ValueError, "gradient must be a route"),
        ({"gradient": "adjoint"}, TypeError, "gradient must be a GradientRoute"),
        ({"solver": "dopri5"}, TypeError, "solver must be a Torchdiffeq"),
        ({"penalty": lambda task, result: 1.0}, TypeError, "penalty must return a 0-d tensor"),
        ({"penalty": lambda task, result: torch.ones(2)}, ValueError, "penalty must return a fl"),
        (
            {"penalty": lambda task, result: torch.tensor(math.nan)},
            ValueError,
            "penalty must be finite",
        ),
    ],
    ids=str,
)
def test_bad_input_is_named(options: dict[str, Any], error: type, message: str) -> None:
    theta = number(1.0)
    call = {"tasks": [decay_task(theta)], "parameters": theta, **options}
    tasks, parameters = call.pop("tasks"), call.pop("parameters")
    with pytest.raises(error, match=message):
        minimise_stopping_time(tasks, parameters, **call)
    assert theta.item() == 1.0


def test_what_would_be_out_of_date_after_a_step_is_refused() -> None:
    theta = number(1.0)
    x0 = torch.ones(1, dtype=torch.float64)
    for what, options in {
        "x0": {"x0": theta * x0},
        "target": {"target": EPS * theta},
        "t0": {"t0": 0.5 * theta},
    }.items():
        arguments = {"x0": x0, "target": EPS, "t0": 0.0, **options}
        task = StoppingTask(
            decay(theta), arguments["x0"], half_square, arguments["target"], t0=arguments["t0"]
        )
        with pytest.raises(ValueError, match=f"{what} of task 0 was computed .* out of date"):
            tune(task, theta)
    many = StoppingTask(decay(theta), x0, half_square, torch.tensor([0.1, 0.2]).double())
    with pytest.raises(ValueError, match=r"target of task 0 must be one number; got shape \(2,\)"):
        tune(many, theta)


def test_tasks_refuse_what_they_do_not_know() -> None:
    theta = number(1.0)
    with pytest.raises(TypeError, match="has no setting memory"):
        decay_task(theta).run(memory=3)
    with pytest.raises(TypeError, match="flow must be callable"):
        StoppingTask(3, torch.ones(1), half_square, EPS)  # type: ignore[arg-type]
    index = StoppingIndexTask(lambda k, x: x, torch.ones(1), half_square, EPS)
    with pytest.raises(TypeError, match="has no setting solver"):
        index.run(solver=FAST)


# The discrete side --------------------------------------------------------------------------------

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
