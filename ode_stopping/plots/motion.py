"""What a run does on its way: its energy, its phase portrait, the entries of its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from ..core.states import State
from .curves import keep_in_sight
from .paths import draw_course, mark_starts
from .runs import finite, views
from .solutions import Course, entries, mark_ends, mark_events, symbols_of
from .style import GREY, array, canvas, is_log, legend, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_energy", "plot_phase", "plot_states"]

# Coordinates that are drawn unless others are asked for.
_FIRST = 6
# Part of a range that counts as its edge.
_EDGE = 0.02


def plot_energy(
    flow: Any,
    runs: Any,
    *,
    axes: Axes | None = None,
    energy: Callable[..., Any] | None = None,
    labels: Sequence[str] | None = None,
    colors: Sequence[Any] | None = None,
    log: bool | Literal["auto"] = "auto",
    step: float | Sequence[float | None] | None = None,
) -> Axes:
    """The energy of a flow along runs, over flow time: continuous ones as lines, iterates as dots.

    Args:
        flow: The flow whose energy is meant; None if `energy` is given.
        runs: See `ode_stopping.plots`; they must have kept their states.
        axes: Where to draw; None makes a figure.
        energy: (t, state) -> one number; None: `flow.energy`.
        labels: Names for the legend; None: the keys of a mapping.
        colors: One a run; None: the cycle of the axes.
        log: Whether the energy is on a log axis; "auto": where all of it is positive.
        step: h of bare callables; see `plot_criterion`.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is missing.
        RuntimeError: A run kept no states.
        TypeError: A run is none; there is no energy.
        ValueError: The update of an iteration is a bare callable, and there is no step.
    """
    measured = energy if energy is not None else getattr(flow, "energy", None)
    if not callable(measured):
        raise TypeError(
            f"flow has no energy, got {type(flow).__name__}: pass energy=(t, state) -> number"
        )
    shown = views(runs, labels, step)
    axes = canvas(axes, "plot_energy")
    curves = [view.along(measured) for view in shown]
    if is_log(log, [values for _, values in curves]):
        axes.set_yscale("log")
    for index, (view, (times, values)) in enumerate(zip(shown, curves, strict=True)):
        color = None if colors is None else colors[index % len(colors)]
        drawn = look(iterates=view.iterates, count=len(times))
        axes.plot(times, values, color=color, label=view.name, **drawn)
    keep_in_sight(axes, shown, [values for _, values in curves])
    axes.set(xlabel="flow time t", ylabel="energy E(t, state)")
    legend(axes)
    return axes


def plot_phase(
    runs: Any,
    *,
    axes: Axes | None = None,
    coordinate: int = 0,
    direction: Tensor | Sequence[float] | None = None,
    coordinates: tuple[int, int] | None = None,
    labels: Sequence[str] | None = None,
    colors: Sequence[Any] | None = None,
    events: Sequence[str] | None = None,
) -> Axes:
    """Phase portrait: the position against the velocity, or any two entries of the state.

    Continuous paths are lines, iterations dots; ends are marked as in `plot_paths`. Of a solution
    of `integrate` the jumps are dotted lines, and every event that was met has a mark of its own
    kind, at the state before the jump; a cross is where it ended without what it was to end with.

    Args:
        runs: See `ode_stopping.plots`; they must have kept their states. Solutions of `integrate`
            may be among them.
        axes: Where to draw; None makes a figure.
        coordinate: Which entry of x and v, for states (x, v, ...).
        direction: Draw the components of x and v along this vector instead; it is normalised.
        coordinates: Draw these two entries of the flattened state against each other instead.
            None: the first two, for solutions whose state is one tensor.
        labels: Names for the legend; None: the keys of a mapping.
        colors: One a run; None: the cycle of the axes.
        events: Names of the events of solutions, for the legend; events of one name are marked
            alike. None: "event 0", ...

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is missing.
        RuntimeError: A run kept no states.
        TypeError: A run is none, or its states have no velocity.
        ValueError: The direction is zero or does not fit x; `coordinates` are not two.
        IndexError: x has no such coordinate.
    """
    shown = views(runs, labels, hybrid=True)
    if coordinates is None and all(view.hybrid and not _is_pair(view.first()) for view in shown):
        coordinates = (0, 1)
    if coordinates is not None and len(coordinates) != 2:
        raise ValueError(f"coordinates must be two entries of the state; got {coordinates}")

    def project(state: State) -> Any:
        if coordinates is not None:
            return finite(entries(state)[list(coordinates)])
        return _in_phase_plane(state, coordinate, direction)

    courses = [Course.of(view, project) if view.hybrid else None for view in shown]
    paths = [
        np.stack([project(state) for state in view.states()[1]]) if course is None else course.rows
        for view, course in zip(shown, courses, strict=True)
    ]
    axes = canvas(axes, "plot_phase")
    _draw_zeros(axes, None if coordinates is None else np.concatenate(paths))
    for index, (view, course, path) in enumerate(zip(shown, courses, paths, strict=True)):
        color = None if colors is None else colors[index % len(colors)]
        if course is None:
            draw_course(axes, view, path, project, color)
        else:
            course.draw_in_plane(axes, label=view.name, color=color)
    solutions = [course for course in courses if course is not None]
    mark_events(axes, solutions, events)
    mark_ends(axes, solutions)
    starts = [
        path if course is None else course.start[None]
        for course, path in zip(courses, paths, strict=True)
    ]
    mark_starts(axes, starts, named=any(view.name is not None or view.hybrid for view in shown))
    if coordinates is None:
        which = rf"_{{{coordinate + 1}}}" if direction is None else r" \cdot d"
        axes.set(xlabel=f"position $x{which}$", ylabel=f"velocity $v{which}$")
    else:
        symbols = symbols_of(shown[0].first())
        axes.set(xlabel=symbols[coordinates[0]], ylabel=symbols[coordinates[1]])
    legend(axes, outside=True)
    return axes


def plot_states(
    run: Any,
    *,
    axes: Axes | None = None,
    coordinates: Sequence[int] | None = None,
    position: Callable[[Any], Tensor] | None = None,
    step: float | None = None,
) -> Axes:
    """The entries of the position over flow time, or over the steps of an iteration.

    Args:
        run: A result or a trajectory; it must have kept its states.
        axes: Where to draw; None makes a figure.
        coordinates: Which entries; None: the first six.
        position: state -> x; None: the first entry of a tuple, else the state. x is flattened.
        step: Draw an iteration with this h over flow time instead.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is missing.
        RuntimeError: The run kept no states.
        TypeError: The run is none.
        IndexError: x has no such coordinate.
    """
    (view,) = views([run], step=step)
    at, path = view.positions(position)
    chosen = range(min(path.shape[1], _FIRST)) if coordinates is None else coordinates
    in_time = step is not None or not view.iterates
    axes = canvas(axes, "plot_states")
    for index in chosen:
        x = view.axis(at, in_time=in_time)
        drawn = look(iterates=view.iterates, count=len(x))
        axes.plot(x, finite(path[:, index]), label=f"$x_{{{index + 1}}}$", **drawn)
    axes.set(xlabel="flow time t" if in_time else "step k", ylabel="position x")
    legend(axes, outside=True)
    return axes


def _is_pair(state: State) -> bool:
    return isinstance(state, tuple) and len(state) > 1


def _draw_zeros(axes: Axes, points: Any | None) -> None:
    """Lines through the origin; with points, shape (K, 2), only those that pass between them.

    A position and a velocity are read against zero. Of other entries zero may be far away, and the
    axes would have to reach there; or it is at their edge, where jumps often are (a floor).
    """
    for index, line in enumerate((axes.axvline, axes.axhline)):
        if points is None or _is_inside(points[:, index]):
            line(0.0, color=GREY, linewidth=0.6, zorder=1)


def _is_inside(values: Any) -> bool:
    """Whether zero lies between numbers, not at their edge."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    edge = _EDGE * (high - low)
    return low < -edge and high > edge


def _in_phase_plane(
    state: State, coordinate: int, direction: Tensor | Sequence[float] | None
) -> Any:
    """(2,): the components of x and of v."""
    if not (isinstance(state, tuple) and len(state) > 1):
        raise TypeError(
            "a phase portrait needs states (x, v), as flows of second order have; got one tensor"
        )
    pair = np.stack([array(piece).reshape(-1) for piece in state[:2]])
    if direction is None:
        return finite(pair[:, coordinate])
    vector = array(direction).reshape(-1)
    length = float(np.linalg.norm(vector))
    if vector.shape != pair[0].shape or not length > 0:
        raise ValueError(
            f"direction must be a vector of {pair.shape[1]} entries that is not zero, "
            f"got {vector.tolist()}"
        )
    return finite(pair @ vector / length)
