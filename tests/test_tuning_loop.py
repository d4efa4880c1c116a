"""Tuning: minibatches, the loop's manners, the history, bad input."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from iterations import number
from torch import nn
from tuned import (
    EPS,
    FAST,
    batch_tasks,
    decay,
    decay_task,
    half_square,
    log_ratio,
    one_step,
    sgd,
    tune,
)

from discrete import StoppingIndexTask
from ode_stopping import Positive, StoppingTask, TuningError, TuningRecord, minimise_stopping_time

# Minibatches -------------------------------------------------------------------------------------


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
    for record, following in itertools.pairwise(history.records[:4]):
        assert (record.parameters == following.parameters) is (record.missed > 0)
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


# Manners -----------------------------------------------------------------------------------------


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
    theta = number(1.0)
    _, gradient = one_step(decay_task(theta), theta, clip=100.0)
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


# The history -------------------------------------------------------------------------------------


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


# Errors ------------------------------------------------------------------------------------------


# Ids by position and argument: the address of a lambda would differ from worker to worker.
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
        ({"solver": "dopri5"}, TypeError, "solver must be a Solver"),
        ({"penalty": lambda task, result: 1.0}, TypeError, "penalty must return a 0-d tensor"),
        ({"penalty": lambda task, result: torch.ones(2)}, ValueError, "penalty must return a fl"),
        (
            {"penalty": lambda task, result: torch.tensor(math.nan)},
            ValueError,
            "penalty must be finite",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
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
