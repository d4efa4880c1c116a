"""Pictures of solutions of `integrate`: entries over time and in the plane, jumps, events, ends."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from plotted import F64, circle, data, decay, drawn_and_closed, labels, matplotlib, with_marker
from torch import Tensor

from ode_stopping import Event, integrate, plots
from ode_stopping.plots.style import COLOURS, INK

G = 9.81
HEIGHT = 2.0
FIRST = math.sqrt(2.0 * HEIGHT / G)  # time of the first impact
SPEED = math.sqrt(2.0 * G * HEIGHT)  # speed there


@pytest.fixture(autouse=True)
def every_figure() -> Iterator[None]:
    yield from drawn_and_closed()


def impact(restitution: Any, **options: Any) -> Event:
    def reset(t: Tensor, s: Tensor) -> Tensor:
        return torch.stack((torch.zeros_like(s[0]), -restitution * s[1]))

    return Event(lambda t, s: s[0], reset=reset, **options)


def ball(restitution: Any = 0.5, until: float | None = 1.7, **options: Any) -> Any:
    """A ball that is dropped from rest: impacts at FIRST (1, 1 + 2 e, 1 + 2 e + 2 e^2, ...)."""

    def flow(t: Tensor, s: Tensor) -> Tensor:
        return torch.stack((s[1], -G + 0.0 * s[1]))

    start = torch.tensor([HEIGHT, 0.0], dtype=F64)
    events = [impact(restitution, **options)]
    return integrate(flow, start, until=until, events=events)


def doses(times: tuple[float, ...] = (0.0, 1.5), **options: Any) -> Any:
    """c' = -c from 0 with a unit dose at each of the times, in a state of two pieces."""

    def dose(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return state[0] + 1.0, state[1]

    start = (torch.zeros((), dtype=F64), torch.ones(2, dtype=F64))
    events = [Event.at(time, reset=dose) for time in times]
    return integrate(lambda t, s: (-s[0], -2.0 * s[1]), start, until=3.0, events=events, **options)


def turning(**options: Any) -> Any:
    """x' = v, v' = -x from (1, 0), as one tensor: the unit circle, clockwise."""
    start = torch.tensor([1.0, 0.0], dtype=F64)
    return integrate(lambda t, s: torch.stack((s[1], -s[0])), start, until=4.0, **options)


def named(axes: Any) -> dict[str, Any]:
    return {line.get_label(): line for line in axes.get_lines()}


def dotted(axes: Any) -> list[Any]:
    return [line for line in axes.get_lines() if line.get_linestyle() == ":"]


def height_and_speed(t: Any, restitution: float) -> tuple[Any, Any]:
    """The closed form on the first two stretches, left-sided at the impact."""
    second = t > FIRST
    since = np.where(second, t - FIRST, t)
    rise = np.where(second, restitution * SPEED, 0.0)
    height = np.where(second, 0.0, HEIGHT) + rise * since - 0.5 * G * since**2
    return height, rise - G * since


HELPERS: dict[str, Callable[..., Any]] = {
    "solution": lambda axes: plots.plot_solution(ball(), axes=axes),
    "method": lambda axes: ball().plot(axes),
    "phase": lambda axes: plots.plot_phase(ball(), axes=axes),
}


@pytest.mark.parametrize("helper", HELPERS.values(), ids=HELPERS.keys())
def test_axes_are_made_or_used(helper: Callable[..., Any]) -> None:
    made = helper(None)
    assert isinstance(made, matplotlib.axes.Axes)
    assert made.get_xlabel()
    assert made.get_ylabel()
    given = matplotlib.pyplot.figure().add_subplot()
    before = matplotlib.pyplot.get_fignums()
    assert helper(given) is given
    assert len(given.get_lines()) == len(made.get_lines())
    assert matplotlib.pyplot.get_fignums() == before


@pytest.mark.parametrize("helper", HELPERS.values(), ids=HELPERS.keys())
def test_without_matplotlib_the_extra_is_named(
    helper: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*ode-stopping\[checks\]"):
        helper(None)


def test_entries_follow_the_closed_form_up_to_both_sides_of_a_jump() -> None:
    axes = plots.plot_solution(ball(until=1.2))
    lines = named(axes)
    height, speed = data(lines["$x_{1}$"]), data(lines["$x_{2}$"])
    assert len(height) >= 400
    (gap,) = np.flatnonzero(np.isnan(height[:, 0]))
    assert np.isnan(height[gap]).all()
    for part, side in ((slice(0, gap), 0), (slice(gap + 1, None), 1)):
        t = height[part, 0]
        # The instant of the impact belongs to the stretch that is looked at.
        shifted = t + (1e-9 if side else -1e-9)
        exact = height_and_speed(shifted, 0.5)
        np.testing.assert_allclose(height[part, 1], exact[0], atol=1e-7)
        np.testing.assert_allclose(speed[part, 1], exact[1], atol=1e-7)
    assert height[gap - 1, 0] == height[gap + 1, 0] == pytest.approx(FIRST, rel=1e-9)
    assert [axes.get_xlabel(), axes.get_ylabel()] == ["flow time t", "state x"]


def test_a_jump_is_a_dotted_vertical_and_only_of_what_jumps() -> None:
    (jumps,) = dotted(plots.plot_solution(ball()))
    assert jumps.get_color() == COLOURS[1]  # the height does not jump
    segments = data(jumps)
    assert np.isnan(segments[2::3]).all()
    times = FIRST * np.array([1.0, 2.0, 2.5])
    for side, factor in ((0, -1.0), (1, 0.5)):
        np.testing.assert_allclose(segments[side::3, 0], times, rtol=1e-9)
        speeds = factor * SPEED * 0.5 ** np.arange(3)
        np.testing.assert_allclose(segments[side::3, 1], speeds, rtol=1e-7)


def test_no_line_crosses_a_jump() -> None:
    """A slanted line would have a slope far beyond that of the flow."""
    for solution, steepest in ((ball(), G), (doses(), 2.0)):
        for line in plots.plot_solution(solution).get_lines():
            if line.get_linestyle() == "-":
                dt, dx = np.diff(data(line), axis=0).T
                assert np.nanmax(np.abs(dx) - 1.05 * steepest * dt) < 1e-6 + SPEED * np.nanmax(dt)
                assert (dt[np.isfinite(dt)] > 0.0).all()


def test_events_are_marked_before_the_jump() -> None:
    axes = plots.plot_solution(ball())
    (marks,) = with_marker(axes, "o")
    times = FIRST * np.array([1.0, 2.0, 2.5])
    expected = [[t, value] for n, t in enumerate(times) for value in (0.0, -SPEED * 0.5**n)]
    np.testing.assert_allclose(data(marks), expected, atol=1e-8)
    assert marks.get_color() == INK
    assert labels(axes) == ["$x_{1}$", "$x_{2}$", "event 0, 3 hits"]


def test_doses_of_a_tuple_state_have_marks_of_their_own() -> None:
    axes = plots.plot_solution(doses(), events=["first", "second"])
    assert labels(axes) == [
        "$x^{(1)}$",
        "$x^{(2)}_{1}$",
        "$x^{(2)}_{2}$",
        "first, T = 0",
        "second, T = 1.5",
    ]
    (jumps,) = dotted(axes)
    before = math.exp(-1.5)
    np.testing.assert_allclose(data(jumps)[[0, 1]], [[0.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(data(jumps)[[3, 4]], [[1.5, before], [1.5, 1.0 + before]], rtol=1e-6)
    (second,) = with_marker(axes, "s")
    rest = math.exp(-3.0)
    np.testing.assert_allclose(data(second)[:, 1], [before, rest, rest], rtol=1e-5)
    alike = plots.plot_solution(doses(), events=["dose", "dose"])
    assert labels(alike)[3:] == ["dose, 2 hits"]
    assert len(data(with_marker(alike, "o")[0])) == 6
    chosen = plots.plot_solution(doses(), coordinates=[2, 0], labels=["b", "c"])
    assert next(iter(named(chosen))) == "b"
    np.testing.assert_allclose(
        data(named(chosen)["b"])[:, 1],
        np.exp(-2.0 * data(named(chosen)["b"])[:, 0]),
        rtol=1e-5,
    )


def test_an_end_that_nobody_asked_for_has_a_cross() -> None:
    zeno = ball(until=9.0)
    assert zeno.status.name == "ZENO"
    axes = plots.plot_solution(zeno)
    (cross,) = with_marker(axes, "x")
    limit = FIRST * 3.0  # 1 + 2 (e + e^2 + ...) with e = 1/2
    np.testing.assert_allclose(data(cross)[:, 0], limit, rtol=1e-9)
    np.testing.assert_allclose(data(cross)[:, 1], 0.0, atol=1e-6)
    assert labels(axes)[-1] == "zeno"
    phase = plots.plot_phase({"a": zeno, "b": zeno})
    assert labels(phase).count("zeno") == 1
    assert not with_marker(plots.plot_solution(ball()), "x")
    ended = ball(until=None, terminal=True)
    assert not with_marker(plots.plot_solution(ended), "x")


def test_a_reset_at_the_very_end_is_drawn() -> None:
    ended = ball(until=None, count=2)
    (jumps,) = dotted(plots.plot_solution(ended))
    np.testing.assert_allclose(data(jumps)[-2:, 0], 2.0 * FIRST, rtol=1e-9)
    np.testing.assert_allclose(data(jumps)[-2:, 1], [-SPEED / 2.0, SPEED / 4.0], rtol=1e-7)


def test_a_solution_of_no_length_is_a_point() -> None:
    start = torch.tensor([1.0, 2.0], dtype=F64)
    found = integrate(lambda t, x: -x, start, events=[Event(lambda t, x: x[0], 3.0, terminal=True)])
    assert found.status.name == "AT_START" or len(found.hits) == 1
    axes = plots.plot_solution(found)
    np.testing.assert_allclose(data(with_marker(axes, "o")[0]), [[0.0, 1.0], [0.0, 2.0]])
    np.testing.assert_allclose(data(with_marker(plots.plot_phase(found), "o")[-1]), [[1.0, 2.0]])


def test_phase_of_a_ball() -> None:
    axes = plots.plot_phase(ball(until=1.2), events=["impact"])
    line = next(line for line in axes.get_lines() if len(data(line)) >= 400)
    rows = data(line)
    (gap,) = np.flatnonzero(np.isnan(rows[:, 0]))
    # Energy per mass over g is the height at rest: all of it, then e^2 of it.
    level = rows[:, 0] + rows[:, 1] ** 2 / (2.0 * G)
    np.testing.assert_allclose(level[:gap], HEIGHT, rtol=1e-8)
    np.testing.assert_allclose(level[gap + 1 :], HEIGHT / 4.0, rtol=1e-8)
    (jump,) = dotted(axes)
    assert jump.get_color() == line.get_color()
    np.testing.assert_allclose(data(jump), [[0.0, -SPEED], [0.0, SPEED / 2.0]], atol=1e-8)
    mark, start = with_marker(axes, "o")
    np.testing.assert_allclose(data(mark), [[0.0, -SPEED]], atol=1e-8)
    np.testing.assert_allclose(data(start), [[HEIGHT, 0.0]])
    assert labels(axes) == ["impact", "start"]
    assert [axes.get_xlabel(), axes.get_ylabel()] == ["$x_{1}$", "$x_{2}$"]


def test_zero_lines_of_a_phase_portrait_are_where_zero_is_in_sight() -> None:
    def constant(axes: Any) -> int:
        return sum(
            len(set(line.get_xdata())) == 1 or len(set(line.get_ydata())) == 1
            for line in axes.get_lines()
            if line.get_linestyle() == "-"
        )

    assert constant(plots.plot_phase(turning())) == 2
    assert constant(plots.plot_phase(ball(until=1.2))) == 1  # the floor is at the edge
    assert constant(plots.plot_phase(doses(), coordinates=(1, 0))) == 0


def test_phase_of_several_solutions_and_of_pairs() -> None:
    runs = {"0.5": ball(0.5), "0.7": ball(0.7)}
    axes = plots.plot_phase(runs)
    assert labels(axes) == ["0.5", "0.7", "event 0", "start"]
    colours = [line.get_color() for line in dotted(axes)]
    assert colours == list(COLOURS[:2])
    marks = with_marker(axes, "o")[0]
    assert len(data(marks)) == sum(len(run.hits) for run in runs.values())
    pair = (torch.tensor([1.0], dtype=F64), torch.tensor([0.0], dtype=F64))
    swinging = integrate(lambda t, s: (s[1], -s[0]), pair, until=3.0)
    portrait = plots.plot_phase(swinging)
    assert portrait.get_xlabel() == "position $x_{1}$"
    rows = data(portrait.get_lines()[2])
    np.testing.assert_allclose(np.hypot(*rows.T), 1.0, rtol=1e-6)
    assert rows[-1] == pytest.approx([math.cos(3.0), -math.sin(3.0)], abs=1e-6)
    mixed = plots.plot_phase({"integrate": swinging, "stopping_time": circle()})
    assert labels(mixed)[:2] == ["integrate", "stopping_time"]


def test_any_two_entries_of_a_run_without_jumps() -> None:
    axes = plots.plot_phase(decay(), coordinates=(1, 0))
    line = next(line for line in axes.get_lines() if len(data(line)) >= 400)
    np.testing.assert_allclose(data(line)[:, 0], 1.5 * data(line)[:, 1], rtol=1e-12)
    assert [axes.get_xlabel(), axes.get_ylabel()] == ["$x_{2}$", "$x_{1}$"]


def test_events_without_a_reset_leave_the_line_whole() -> None:
    crossing = Event(lambda t, s: s[0], direction="either")
    solution = turning(events=[crossing])
    axes = plots.plot_solution(solution)
    assert not dotted(axes)
    rows = data(named(axes)["$x_{1}$"])
    np.testing.assert_allclose(rows[:, 1], np.cos(rows[:, 0]), atol=1e-5)
    (marks,) = with_marker(axes, "o")
    np.testing.assert_allclose(data(marks)[0], [math.pi / 2.0, 0.0], atol=1e-5)
    np.testing.assert_allclose(data(marks)[1], [math.pi / 2.0, -1.0], atol=1e-5)


def test_graphs_are_left_alone_and_pickled_solutions_are_drawn() -> None:
    restitution = torch.tensor(0.5, dtype=F64, requires_grad=True)
    solution = ball(restitution)
    plots.plot_solution(solution)
    plots.plot_phase(solution)
    assert restitution.grad is None
    solution.first(0, n=2).backward()
    assert float(restitution.grad) == pytest.approx(2.0 * FIRST, rel=1e-7)  # type: ignore[arg-type]
    again = plots.plot_solution(pickle.loads(pickle.dumps(solution)))
    assert len(dotted(again)) == 1


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(TypeError, match="what integrate returns; got StoppingResult"):
        plots.plot_solution(decay())
    with pytest.raises(TypeError, match=r"or solutions of integrate; got float"):
        plots.plot_phase([ball(), 1.0])
    with pytest.raises(TypeError, match="got Solution"):
        plots.plot_criterion(ball())
    with pytest.raises(ValueError, match="labels: 1 for 2 entries"):
        plots.plot_solution(ball(), labels=["height"])
    with pytest.raises(ValueError, match="events: 1 names, but event 1 was met"):
        plots.plot_solution(doses(), events=["one"])
    with pytest.raises(ValueError, match="coordinates must be two"):
        plots.plot_phase(ball(), coordinates=(0,))  # type: ignore[arg-type]
    with pytest.raises(IndexError):
        plots.plot_solution(ball(), coordinates=[7])
    with pytest.raises(RuntimeError, match="states were not kept"):
        plots.plot_solution(doses(gradient=None))


def test_a_sweep_over_a_time_and_over_a_state() -> None:
    """T_2 = FIRST (1 + 2 e); the height at t = 1 is e SPEED (1 - FIRST) - G (1 - FIRST)^2 / 2."""
    values = [0.6, 0.8]
    times, slopes = plots.sweep(lambda e: ball(e, until=1.7).first(0, n=2), values)
    np.testing.assert_allclose(times, [FIRST * (1.0 + 2.0 * e) for e in values], rtol=1e-9)
    np.testing.assert_allclose(slopes[1:], 2.0 * FIRST, rtol=1e-7)
    heights, slopes = plots.sweep(lambda e: ball(e, until=1.0).end.state[0], values)
    since = 1.0 - FIRST
    exact = [e * SPEED * since - 0.5 * G * since**2 for e in values]
    np.testing.assert_allclose(heights, exact, rtol=1e-7)
    np.testing.assert_allclose(slopes, SPEED * since, rtol=1e-7)
    missed, slopes = plots.sweep(lambda e: ball(e, until=1.0).first(0, n=2), [0.9])
    assert missed.tolist() == [math.inf]
    assert math.isnan(slopes[0])
    with pytest.raises(ValueError, match="one target at a time"):
        plots.sweep(lambda e: ball(e).end.state, [0.9])


def test_float32_on_any_device(device: torch.device) -> None:
    start = torch.tensor([1.0, 0.0], device=device)
    solution = integrate(
        lambda t, s: torch.stack((s[1], -s[0])),
        start,
        until=2.0,
        events=[Event(lambda t, s: s[0], reset=lambda t, s: -0.5 * s)],
    )
    jumps = dotted(plots.plot_solution(solution))[-1]
    np.testing.assert_allclose(data(jumps)[:, 1], [-1.0, 0.5], rtol=1e-4)
