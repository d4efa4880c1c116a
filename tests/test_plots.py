from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from plotted import (
    F64,
    LOSS,
    START,
    TARGET,
    circle,
    data,
    decay,
    decay_time,
    drawn_and_closed,
    energy,
    euler,
    labels,
    matplotlib,
    pyplot,
    square,
    start,
    theta,
    with_marker,
)

from discrete import DiscreteAdjoint, Euler, stopping_index
from ode_stopping import GradientFlow, GradientNorm, Quadratic, plots, stopping_time
from ode_stopping.plots.levels import on_grid
from ode_stopping.plots.style import COLOURS


@pytest.fixture(autouse=True)
def every_figure() -> Iterator[None]:
    yield from drawn_and_closed()


HELPERS: dict[str, Callable[..., Any]] = {
    "paths": lambda axes: plots.plot_paths(LOSS, [decay(), euler()], axes=axes),
    "criterion": lambda axes: plots.plot_criterion([decay(), euler()], axes=axes),
    "fan": lambda axes: plots.plot_fan(decay(), [euler()], axes=axes),
    "sensitivity": lambda axes: plots.plot_sensitivity([1.0, 2.0], [3.0, 2.0], axes=axes),
    "energy": lambda axes: plots.plot_energy(None, circle(), energy=energy, axes=axes),
    "phase": lambda axes: plots.plot_phase(circle(), axes=axes),
    "states": lambda axes: plots.plot_states(decay(), axes=axes),
    "spectrum": lambda axes: plots.plot_spectrum(torch.eye(2), axes=axes),
    "result": lambda axes: decay().plot(axes),
    "index result": lambda axes: euler().plot(axes),
    "trajectory": lambda axes: decay().trajectory.plot(axes),
    "index trajectory": lambda axes: euler().trajectory.plot(axes),
}


@pytest.mark.parametrize("helper", HELPERS.values(), ids=HELPERS.keys())
def test_axes_are_made_or_used(helper: Callable[..., Any]) -> None:
    made = helper(None)
    assert isinstance(made, matplotlib.axes.Axes)
    assert made.get_lines()
    assert made.get_xlabel()
    assert made.get_ylabel()
    assert pyplot.fignum_exists(made.figure.number)
    given = pyplot.figure().add_subplot()
    before = pyplot.get_fignums()
    assert helper(given) is given
    assert len(given.get_lines()) == len(made.get_lines())
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("helper", HELPERS.values(), ids=HELPERS.keys())
def test_without_matplotlib_the_extra_is_named(
    helper: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*ode-stopping\[checks\]"):
        helper(None)


def test_importing_needs_no_matplotlib() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import discrete, ode_stopping, ode_stopping.plots as plots\n"
        "assert all(callable(getattr(plots, name)) for name in plots.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_criterion_of_both_sides_over_flow_time() -> None:
    flow, iteration = decay(t0=0.5), euler(t0=0.5)
    axes = plots.plot_criterion({"flow": flow, "Euler": iteration}, target=TARGET)
    target, path, crossing, dots, index = axes.get_lines()
    assert list(target.get_ydata()) == [TARGET, TARGET]
    assert axes.get_yscale() == "log"
    t, j = data(path).T
    exact = 3.25 * np.exp(-2.0 * (t - 0.5))
    assert len(t) >= 400
    # Between the accepted steps, too.
    np.testing.assert_allclose(j, exact, rtol=1e-4)
    np.testing.assert_allclose(data(crossing), [[0.5 + decay_time(), TARGET]], rtol=1e-5)
    k = np.arange(iteration.index + 1)
    np.testing.assert_allclose(data(dots)[:, 0], 0.5 + 0.1 * k, rtol=1e-14)
    np.testing.assert_allclose(data(dots)[:, 1], 3.25 * 0.81**k, rtol=1e-12)
    np.testing.assert_allclose(data(index)[0], data(dots)[-1])
    assert len({line.get_color() for line in (path, crossing)}) == 1
    assert path.get_color() != dots.get_color()
    assert labels(axes)[1:] == [
        f"flow, T = {0.5 + decay_time():.5g}",
        f"Euler, N = {iteration.index}",
    ]


def test_iterations_alone_are_drawn_over_steps() -> None:
    run = euler(interpolation="log")
    axes = plots.plot_criterion(run)
    dots, mark = axes.get_lines()
    assert data(dots)[:, 0].tolist() == list(range(run.index + 1))
    np.testing.assert_allclose(data(mark), [[float(run.steps.detach()), TARGET]], rtol=1e-12)
    assert axes.get_xlabel() == "step k"
    in_time = plots.plot_criterion(run, against="time").get_lines()[0]
    np.testing.assert_allclose(data(in_time)[:, 0], 0.1 * data(dots)[:, 0])
    with pytest.raises(ValueError, match="flow has no step"):
        plots.plot_criterion(decay(), against="steps")
    with pytest.raises(ValueError, match="against must be"):
        plots.plot_criterion(decay(), against="steps of time")  # type: ignore[arg-type]


def test_every_target_of_several_is_marked() -> None:
    targets = torch.tensor([2.0, TARGET, 0.5, 1e-9], dtype=F64)
    times = [decay_time(target=target) for target in (2.0, TARGET, 0.5)]
    flow = decay(target=targets, max_time=3.0)
    axes = plots.plot_criterion(flow, target=targets)
    (mark,) = with_marker(axes, "o")
    np.testing.assert_allclose(data(mark), np.stack([times, targets[:-1]], axis=-1), rtol=1e-5)
    assert labels(axes)[-1] == "T of 3 targets"
    paths = plots.plot_paths(LOSS, flow)
    places = [[x * math.exp(-t) for x in START] for t in times]
    np.testing.assert_allclose(data(with_marker(paths, "*")[0]), places, rtol=1e-5)
    assert len(with_marker(paths, "x")) == 1
    iteration = euler(target=targets, max_steps=20)
    (mark,) = with_marker(iteration.plot(), "o")
    steps = [euler(target=float(target)).index for target in targets[:-1]]
    expected = np.stack([steps, [3.25 * 0.81**k for k in steps]], axis=-1)
    np.testing.assert_allclose(data(mark), expected)
    rings = with_marker(plots.plot_paths(LOSS, iteration), "o")
    places = [[x * 0.9**k for x in START] for k in steps]
    np.testing.assert_allclose(data(rings[0]), places)


def test_a_target_between_accepted_steps_is_marked_on_the_line() -> None:
    one = decay()
    times = [decay_time(target=target) for target in (2.0, 0.5)]
    several = replace(
        one,
        time=torch.tensor(times, dtype=F64, requires_grad=True),
        reached=torch.tensor([True, True]),
        status=[one.status] * 2,
    )
    (mark,) = with_marker(plots.plot_criterion(several), "o")
    np.testing.assert_allclose(data(mark), np.stack([times, [2.0, 0.5]], axis=-1), rtol=1e-4)


def test_a_given_criterion_is_drawn_as_it_is() -> None:
    run = decay()
    line = plots.plot_criterion(run, criterion=lambda t, x: 2.0 * square(t, x)).get_lines()[0]
    t, j = data(line).T
    np.testing.assert_allclose(j, 6.5 * np.exp(-2.0 * t), rtol=1e-5)


def test_misses_and_divergence_do_not_spoil_the_picture() -> None:
    runs = {
        "met": euler(),
        "short": euler(max_steps=3),
        "wild": euler(step=1e3, max_steps=10**4, throw=False),
        "at start": euler(target=9.0),
    }
    axes = plots.plot_criterion(runs, target=TARGET)
    assert labels(axes)[2:] == ["short, not reached", "wild, diverged", "at start, N = 0"]
    assert len(with_marker(axes, "o")) == 2
    assert axes.get_ylim()[1] < 1e3
    assert axes.get_ylim()[0] < TARGET
    alone = plots.plot_criterion(decay(max_time=0.5))
    assert labels(alone) == ["J(x(t)), not reached"]
    paths = plots.plot_paths(LOSS, runs)
    assert len(with_marker(paths, "x")) == 2
    assert max(np.abs([*paths.get_xlim(), *paths.get_ylim()])) < 3.0
    plots.plot_paths(LOSS, runs["wild"], criterion=square, target=TARGET)


def test_iterations_that_missed_or_have_no_step_over_flow_time() -> None:
    missed = euler(max_steps=3, t0=0.5)
    bare = stopping_index(lambda k, x: 0.9 * x, start(), square, TARGET)
    with pytest.raises(ValueError, match=r"'run 3' does not say its step.*step=h"):
        plots.plot_criterion([decay(), missed, bare])
    axes = plots.plot_criterion([decay(t0=0.5), missed, bare], step=0.1)
    dots = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    for line, run in zip(dots, (missed, bare), strict=True):
        expected = 0.5 + 0.1 * np.arange(len(run.trajectory))
        np.testing.assert_allclose(data(line)[:, 0], expected)


def test_paths_over_level_sets() -> None:
    objective = Quadratic(torch.tensor([1.0, 4.0], dtype=F64))
    flow, criterion = GradientFlow(objective), GradientNorm(objective)
    run = stopping_time(flow, start(), criterion, 0.5)
    iteration = stopping_index(Euler(flow, step=0.05), start(), criterion, 0.5)
    axes = plots.plot_paths(
        objective, {"flow": run, "Euler": iteration}, criterion=criterion, target=[0.5, 1e3]
    )
    solid = next(line for line in axes.get_lines() if line.get_label() == "flow")
    path = data(solid)
    slow = path[:, 0] / START[0]  # exp(-t)
    np.testing.assert_allclose(path[:, 1], START[1] * slow**4, rtol=1e-5)
    dots = next(line for line in axes.get_lines() if line.get_label() == "Euler")
    assert len(data(dots)) == iteration.index + 1
    (star,) = with_marker(axes, "*")
    np.testing.assert_allclose(data(star)[0], run.state.numpy())
    # The thick level set is that of J = 0.5, and the other is out of sight.
    thick = axes.collections[-1]
    vertices = np.concatenate([part.vertices for part in thick.get_paths()])
    levels = criterion(torch.zeros(()), torch.from_numpy(vertices)).numpy()
    np.testing.assert_allclose(levels, 0.5, rtol=0.02)
    assert labels(axes) == ["J = 0.5", "flow", "Euler", "start"]
    thin = axes.collections[-2].levels
    assert len(thin) == 17
    np.testing.assert_allclose(np.diff(np.log(thin)), np.log(thin[1] / thin[0]))
    left, right = axes.get_xlim()
    assert left < 0.0 < START[0] < right  # the minimiser, too


def test_paths_of_augmented_states_and_of_projections() -> None:
    axes = plots.plot_paths(LOSS, circle(), criterion=lambda t, s: s[0].square().sum(), target=1.0)
    path = data(next(line for line in axes.get_lines() if len(data(line)) > 400 - 1))
    np.testing.assert_allclose(path[:, 1], 1.5 * path[:, 0], atol=1e-7)
    phase = plots.plot_paths(None, circle(), position=lambda s: torch.stack((s[0][0], s[1][0])))
    path = data(phase.get_lines()[0])
    np.testing.assert_allclose(np.hypot(*path.T), 1.0, rtol=1e-6)
    long = stopping_time(lambda t, x: -x, torch.ones(3, dtype=F64), square, TARGET)
    with pytest.raises(ValueError, match=r"two entries.*got 3"):
        plots.plot_paths(LOSS, long)
    plots.plot_paths(None, long, position=lambda x: x[:2])
    with pytest.raises(RuntimeError, match="states were not kept"):
        plots.plot_paths(LOSS, decay(gradient=None))
    with pytest.raises(ValueError, match="go together"):
        plots.plot_paths(LOSS, decay(), target=1.0)


def test_checkpoints_end_at_the_last_iterate() -> None:
    run = euler(step=0.01, gradient=DiscreteAdjoint(memory=200))
    assert run.trajectory.indices[-1] < run.index
    dots = data(plots.plot_paths(None, run).get_lines()[0])
    assert len(dots) == len(run.trajectory.indices) + 1
    np.testing.assert_allclose(dots[0], START)
    np.testing.assert_allclose(dots[-1], run.state.numpy())


def test_objectives_of_one_point_are_drawn_as_those_of_batches() -> None:
    extent = (-1.0, 2.0, -1.0, 1.0)
    like = torch.zeros(2, dtype=F64)
    batched = on_grid(lambda x: x[..., 0] ** 2 + 3.0 * x[..., 1], extent, like)
    for single in (lambda x: x[0] ** 2 + 3.0 * x[1], lambda x: (x[0] ** 2 + 3.0 * x[1:]).sum()):
        x, y, values = on_grid(single, extent, like)
        np.testing.assert_allclose(values, x**2 + 3.0 * y)
    x, y, values = batched
    assert values.shape > (80, 80)
    np.testing.assert_allclose(values, x**2 + 3.0 * y)


def test_graphs_are_left_alone() -> None:
    rate = theta(1.3)
    run, iteration = decay(rate), euler(rate=rate)
    plots.plot_criterion([run, iteration], criterion=square, target=theta(TARGET))
    plots.plot_paths(LOSS, [run, iteration])
    plots.plot_sensitivity([rate], [run])
    assert rate.grad is None
    run.time.backward()
    assert rate.grad is not None
    assert float(rate.grad) == pytest.approx(-decay_time(1.3) / 1.3, rel=1e-5)


def test_what_is_no_run_is_named() -> None:
    with pytest.raises(TypeError, match="got float"):
        plots.plot_criterion([decay(), 1.0])
    with pytest.raises(ValueError, match="labels: 1 for 2 runs"):
        plots.plot_criterion([decay(), decay()], labels=["one"])
    with pytest.raises(ValueError, match="runs is empty"):
        plots.plot_phase([])


def test_many_runs_and_the_colours() -> None:
    runs = [decay(rate) for rate in (0.5, 1.0, 2.0)]
    axes = plots.plot_criterion(runs)
    assert len(axes.get_lines()) == 6
    assert [line.get_color() for line in axes.get_lines()[::2]] == list(COLOURS[:3])
    again = plots.plot_criterion(runs[0].trajectory, axes=axes, labels=["once more"])
    assert again.get_lines()[-1].get_color() == COLOURS[3]
    chosen = plots.plot_criterion(runs, colors=["red"]).get_lines()
    assert {line.get_color() for line in chosen} == {"red"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_devices_and_dtypes(device: torch.device, dtype: torch.dtype) -> None:
    objective = Quadratic(torch.tensor([1.0, 4.0], dtype=dtype, device=device))
    x0 = torch.tensor(START, dtype=dtype, device=device, requires_grad=True)
    flow, criterion = GradientFlow(objective), GradientNorm(objective)
    runs = {
        "flow": stopping_time(flow, x0, criterion, 0.5),
        "Euler": stopping_index(Euler(flow, step=0.05), x0, criterion, 0.5),
    }
    axes = plots.plot_paths(objective, runs, criterion=criterion, target=0.5)
    assert "J = 0.5" in labels(axes)
    assert len(plots.plot_criterion(runs, criterion=criterion).get_lines()) == 4
    plots.plot_energy(None, runs, energy=lambda t, x: objective(x))
    assert plots.flow_spectrum(flow, 0.0, x0).real.tolist() == pytest.approx([-4.0, -1.0])
