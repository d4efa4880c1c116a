"""Solutions of `integrate`: entries of the state over time, their jumps, the events on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.states import State
from .runs import View, finite, views
from .style import INK, MARKERS, array, canvas, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Course", "entries", "mark_ends", "mark_events", "plot_solution", "symbols_of"]

# Entries that are drawn unless others are asked for.
_FIRST = 6
_PATH: dict[str, Any] = {"linewidth": 1.4, "zorder": 3.5}
_JUMP: dict[str, Any] = {"linewidth": 0.9, "linestyle": ":", "alpha": 0.7, "zorder": 3.2}
# Jumps below this part of the range are not drawn: resets often replace a rounding error by zero.
_LEAST = 1e-6
# An end of these kinds is what was asked for; the others get a cross.
_AS_ASKED = ("REACHED", "FINISHED", "AT_START")


@dataclass(frozen=True)
class Course:
    """What is drawn of a solution: its stretches, jumps and hits, as rows of chosen numbers.

    Attributes:
        times: Times of the rows, shape (K,); NaN between two stretches.
        rows: Numbers of the state there, shape (K, d); NaN between two stretches.
        start: The numbers at t0, before anything has happened there, shape (d,).
        leaps: Time, numbers before and numbers behind of every hit that moves the state.
        hits: For each event that was met: times (M,), and the numbers before, (M, d).
        end: Time and numbers of an end that nobody asked for (ZENO, say); None: it was asked for.
        status: How it ended.
    """

    times: Any
    rows: Any
    start: Any
    leaps: list[tuple[float, Any, Any]]
    hits: dict[int, tuple[Any, Any]]
    end: tuple[float, Any] | None
    status: str

    @classmethod
    def of(cls, view: View, project: Callable[[State], Any]) -> Course:
        """The course of a solution.

        Args:
            view: The solution.
            project: state -> the numbers that are drawn, (d,).

        Raises:
            RuntimeError: The solution kept no states.
        """
        solution, times, rows = view.run, [], []
        for at, states in view.stretches():
            values = np.stack([project(state) for state in states])
            # A row of NaN keeps the line from crossing a jump.
            times.append(np.append(at, np.nan))
            rows.append(np.vstack([values, np.full_like(values[:1], np.nan)]))
        met: dict[int, list[tuple[float, Any]]] = {}
        leaps = []
        for hit in solution.hits:
            at, before, after = float(array(hit.time)), project(hit.state), project(hit.after)
            met.setdefault(hit.event, []).append((at, before))
            if not np.array_equal(before, after, equal_nan=True):
                leaps.append((at, before, after))
        start = rows[0][0]
        if solution.hits and float(array(solution.hits[0].time)) <= view.trajectory.start:
            start = project(solution.hits[0].state)
        status = solution.status.name
        asked = status in _AS_ASKED
        return cls(
            times=np.concatenate(times)[:-1],
            rows=np.concatenate(rows)[:-1],
            start=start,
            leaps=leaps,
            hits={
                event: (np.array([t for t, _ in found]), np.stack([row for _, row in found]))
                for event, found in sorted(met.items())
            },
            end=None if asked else (view.trajectory.end, project(solution.end.after)),
            status=status.lower().replace("_", " "),
        )

    def draw_entry(self, axes: Axes, index: int, *, label: str) -> None:
        """One of the numbers over time, with dotted verticals at its jumps."""
        (line,) = axes.plot(self.times, self.rows[:, index], label=label, **_PATH)
        heights = np.array([*self.rows[:, index], *(one[2][index] for one in self.leaps)])
        known = heights[np.isfinite(heights)]
        seen = _LEAST * float(np.ptp(known)) if len(known) else 0.0
        ends = [
            ((t, before[index]), (t, after[index]))
            for t, before, after in self.leaps
            if abs(after[index] - before[index]) > seen
        ]
        _draw_leaps(axes, ends, line.get_color())

    def draw_in_plane(self, axes: Axes, *, label: str | None, color: Any) -> None:
        """Two numbers against each other, with dotted lines for jumps."""
        (line,) = axes.plot(*self.rows.T, color=color, label=label, **_PATH)
        _draw_leaps(axes, [(before, after) for _, before, after in self.leaps], line.get_color())


def mark_events(
    axes: Axes,
    courses: Sequence[Course],
    names: Sequence[str] | None,
    *,
    over_time: bool = False,
) -> None:
    """A mark at every hit, of one kind for each event, or for all events of one name.

    Args:
        axes: Where to draw.
        courses: The solutions.
        names: Of the events, for the legend; events of one name are marked alike. None:
            "event 0", ...
        over_time: Every number over its time; False: two numbers against each other.

    Raises:
        ValueError: Fewer names than events.
    """
    kinds: dict[str, list[int]] = {}
    for event in sorted({event for course in courses for event in course.hits}):
        if names is not None and event >= len(names):
            raise ValueError(f"events: {len(names)} names, but event {event} was met")
        kinds.setdefault(f"event {event}" if names is None else names[event], []).append(event)
    for name, alike in kinds.items():
        found = [course.hits[e] for course in courses for e in alike if e in course.hits]
        times = np.concatenate([at for at, _ in found])
        rows = np.concatenate([values for _, values in found])
        label = name
        if over_time:
            label += f", T = {times[0]:.5g}" if len(times) == 1 else f", {len(times)} hits"
            points = np.stack([np.repeat(times, rows.shape[1]), rows.reshape(-1)], axis=-1)
        else:
            points = rows
        axes.plot(
            *points.T,
            linestyle="none",
            marker=MARKERS[alike[0] % len(MARKERS)],
            markersize=6.5 if len(times) <= 20 else 4.5 if len(times) <= 60 else 3.0,
            markeredgecolor="white",
            markeredgewidth=0.6,
            color=INK,
            zorder=5,
            label=label,
        )


def mark_ends(axes: Axes, courses: Sequence[Course], *, over_time: bool = False) -> None:
    """A cross where a solution ended without what it was to end with; one label a status.

    Args:
        axes: Where to draw.
        courses: The solutions.
        over_time: Every number over its time; False: two numbers against each other.
    """
    points: dict[str, list[Any]] = {}
    for course in courses:
        if course.end is not None:
            at, values = course.end
            places = [(at, value) for value in values] if over_time else [values]
            points.setdefault(course.status, []).extend(places)
    for status, places in points.items():
        axes.plot(
            *np.array(places).T,
            linestyle="none",
            marker="x",
            markersize=7,
            markeredgewidth=1.8,
            color=INK,
            zorder=6,
            label=status,
        )


def plot_solution(
    solution: Any,
    *,
    axes: Axes | None = None,
    coordinates: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    events: Sequence[str] | None = None,
) -> Axes:
    """The entries of x(t) over flow time, with jumps and events.

    A dotted vertical is a jump. Every event that was met has marks of its own kind on all entries,
    at the state before the jump; a cross is where it ended without what it was to end with.

    Args:
        solution: What `integrate` returned; it must have kept its states.
        axes: Where to draw; None makes a figure.
        coordinates: Which entries of the flattened state (pieces of a tuple one behind the other);
            None: the first six.
        labels: Names of the entries, for the legend; None: their symbols.
        events: Names of the events, for the legend; events of one name are marked alike. None:
            "event 0", ...

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is missing.
        RuntimeError: The solution kept no states.
        TypeError: It is no solution.
        ValueError: Not as many labels as entries, or fewer names than events.
        IndexError: x has no such entry.
    """
    if not (hasattr(solution, "hits") and hasattr(solution, "trajectory")):
        raise TypeError(
            f"solution must be what integrate returns; got {type(solution).__name__} (results of "
            "stopping_time have plots of their own)"
        )
    (view,) = views(solution, hybrid=True)
    symbols = symbols_of(solution.end.state)
    chosen = list(range(min(len(symbols), _FIRST))) if coordinates is None else list(coordinates)
    names = [symbols[index] for index in chosen] if labels is None else list(labels)
    if len(names) != len(chosen):
        raise ValueError(f"labels: {len(names)} for {len(chosen)} entries")
    course = Course.of(view, lambda state: finite(entries(state)[chosen]))
    axes = canvas(axes, "plot_solution")
    for index, name in enumerate(names):
        course.draw_entry(axes, index, label=name)
    mark_events(axes, [course], events, over_time=True)
    mark_ends(axes, [course], over_time=True)
    axes.set(xlabel="flow time t", ylabel="state x")
    legend(axes, outside=True)
    return axes


def entries(state: State) -> Any:
    """All numbers of a state, shape (n,): pieces of a tuple one behind the other."""
    pieces = state if isinstance(state, tuple) else (state,)
    return np.concatenate([array(piece).reshape(-1) for piece in pieces])


def symbols_of(state: State) -> list[str]:
    """Names of the entries: x_i, i from 1; for tuples with the number of the piece on top."""
    if not isinstance(state, tuple):
        return [rf"$x_{{{i + 1}}}$" for i in range(state.numel())]
    return [
        rf"$x^{{({k + 1})}}_{{{i + 1}}}$" if piece.numel() > 1 else rf"$x^{{({k + 1})}}$"
        for k, piece in enumerate(state)
        for i in range(piece.numel())
    ]


def _draw_leaps(axes: Axes, ends: Sequence[tuple[Any, Any]], color: Any) -> None:
    """Dotted segments, as one line with gaps."""
    if not ends:
        return
    gap = (np.nan, np.nan)
    points = np.array([point for before, after in ends for point in (before, after, gap)])
    axes.plot(*points[:-1].T, color=color, **_JUMP)
