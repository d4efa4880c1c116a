"""Paths of runs in the plane, over the level sets of the objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.states import State
from .levels import draw_objective, draw_target, on_grid
from .runs import View, finite, position_of, views
from .style import INK, array, canvas, legend, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_course", "mark_starts", "plot_paths"]

_MARGIN = 0.12
# A path along a line has no second extent of its own.
_LEAST_SHAPE = 0.2


def plot_paths(
    objective: Callable[[Tensor], Tensor] | None,
    runs: Any,
    *,
    axes: Axes | None = None,
    levels: int | Sequence[float] = 16,
    labels: Sequence[str] | None = None,
    colors: Sequence[Any] | None = None,
    position: Callable[[Any], Tensor] | None = None,
    extent: Sequence[float] | None = None,
    criterion: Callable[..., Any] | None = None,
    target: float | Sequence[float] | Tensor | None = None,
) -> Axes:
    """Paths of runs with two unknowns over the level sets of the objective.

    Continuous paths are lines, iterations dots; a white dot is the start. A star is where a flow
    met a target, a ring the first iterate that did, a cross where a run ended without.

    Args:
        objective: f, x -> one value; None draws no level sets.
        runs: See `ode_stopping.plots`; they must have kept their states.
        axes: Where to draw; None makes a figure.
        levels: How many levels of f, equally spaced in log(f - f*) (f* is `objective.minimum`, or
            the least value in sight); or the values of f.
        labels: Names for the legend; None: the keys of a mapping.
        colors: One a run; None: the cycle of the axes.
        position: state -> x of shape (2,); None: the first entry of a tuple, else the state.
        extent: (left, right, bottom, top); None: what the runs need that met the target.
        criterion: J, (t, state) -> one value. Its level sets J = target are drawn thick, where they
            are in sight; for states of several pieces at rest (the others are zero), and for a J
            that changes with time at the time where the first flow ends.
        target: One target or several.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is missing.
        RuntimeError: A run kept no states.
        TypeError: A run is none.
        ValueError: Positions have not two entries; criterion without target, or the reverse.
    """
    if (criterion is None) != (target is None):
        raise ValueError("criterion and target go together: the level set is criterion = target")
    shown = views(runs, labels)
    paths = [_in_plane(view.positions(position)[1]) for view in shown]
    given = axes is not None
    axes = canvas(axes, "plot_paths")
    if extent is None and (objective is not None or not given):
        extent = _extent(shown, paths, _minimizer(objective))
    if extent is not None:
        axes.set(xlim=extent[:2], ylim=extent[2:])
    if not given:
        axes.grid(visible=False)
        axes.set(xlabel=r"$x_1$", ylabel=r"$x_2$")
        axes.locator_params(nbins=6)
    window = (*axes.get_xlim(), *axes.get_ylim())
    like = _like(shown, position)
    if objective is not None:
        known = getattr(objective, "minimum", None)
        minimum = None if known is None else float(array(known))
        draw_objective(axes, on_grid(objective, window, like), levels, minimum)
    if criterion is not None:
        measured = _at_rest(criterion, shown)
        draw_target(axes, on_grid(measured, window, like), np.atleast_1d(array(target)))

    def project(state: State) -> Any:
        return array(position_of(state, position)).reshape(-1)

    for index, (view, path) in enumerate(zip(shown, paths, strict=True)):
        color = None if colors is None else colors[index % len(colors)]
        draw_course(axes, view, path, project, color)
    mark_starts(axes, paths, named=any(view.name is not None for view in shown))
    legend(axes, outside=True)
    return axes


def draw_course(
    axes: Axes,
    view: View,
    path: Any,
    project: Callable[[State], Any],
    color: Any,
) -> None:
    """A curve in a plane as a line or dots, with the places marked where it met its targets.

    Args:
        axes: Where to draw.
        view: The run.
        path: The curve, (K, 2).
        project: state -> its place in the plane, (2,).
        color: None: the cycle of the axes.
    """
    drawn = look(iterates=view.iterates, count=len(path))
    (line,) = axes.plot(*path.T, color=color, label=view.name, **drawn)
    ends: dict[str, Any] = {"color": line.get_color(), "linestyle": "none", "zorder": 5}
    met = [project(state) for state in view.met()]
    if met and view.iterates:
        axes.plot(*np.stack(met).T, marker="o", markersize=8, markerfacecolor="none", **ends)
    elif met:
        axes.plot(*np.stack(met).T, marker="*", markersize=11, markeredgecolor="white", **ends)
    if view.missed:
        axes.plot(*path[-1], marker="x", markersize=7, markeredgewidth=1.8, **ends)


def mark_starts(axes: Axes, paths: Sequence[Any], *, named: bool) -> None:
    """A white dot at each start, with an entry in the legend if there is to be one."""
    starts = np.unique(np.array([path[0] for path in paths]), axis=0)
    axes.plot(
        *starts.T,
        linestyle="none",
        marker="o",
        markersize=6,
        color=INK,
        markerfacecolor="white",
        zorder=6,
        label="start" if named else None,
    )


def _in_plane(place: Any) -> Any:
    if place.shape[-1] != 2:
        raise ValueError(
            f"the positions must have two entries to be drawn in the plane, got {place.shape[-1]}: "
            "choose two with position=lambda state: ... (and objective=None)"
        )
    return finite(place)


def _minimizer(objective: object) -> Any:
    """x*, shape (1, 2), where the objective knows it; else (0, 2)."""
    known = getattr(objective, "minimizer", None)
    if isinstance(known, Tensor) and known.shape == (2,):
        return array(known)[None]
    return np.zeros((0, 2))


def _extent(
    shown: list[View], paths: list[Any], minimizer: Any
) -> tuple[float, float, float, float]:
    """The box around the runs that met the target (else around all), with a margin."""
    met = [path for view, path in zip(shown, paths, strict=True) if not view.missed]
    # Of a run that diverged the start is enough.
    points = np.concatenate([*(met or paths), *(path[:1] for path in paths)])
    low, high = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
    size = float((high - low).max())
    # The minimum belongs into the picture, unless the runs would be small beside the way to it.
    near = np.abs(minimizer - (low + high) / 2).max(axis=1) <= size
    low = np.minimum(low, minimizer[near].min(axis=0, initial=np.inf))
    high = np.maximum(high, minimizer[near].max(axis=0, initial=-np.inf))
    middle, span = (low + high) / 2, high - low
    largest = span.max() or max(float(np.abs(middle).max()), 1.0)
    half = (0.5 + _MARGIN) * np.maximum(span, _LEAST_SHAPE * largest)
    (left, bottom), (right, top) = middle - half, middle + half
    return float(left), float(right), float(bottom), float(top)


def _like(shown: list[View], position: Callable[[Any], Tensor] | None) -> Tensor:
    """A tensor of the dtype and device that the objective is used to."""
    return position_of(shown[0].states(1)[1][0], position)


def _at_rest(criterion: Callable[..., Any], shown: list[View]) -> Callable[[Tensor], Tensor]:
    """J as a function of the position alone."""
    ends = [view.trajectory.end for view in shown if not view.iterates]
    last = shown[0].states(1)[1][-1]

    def measured(x: Tensor) -> Tensor:
        clock = torch.tensor(ends[0] if ends else 0.0, dtype=x.dtype, device=x.device)
        if not isinstance(last, tuple):
            found: Tensor = criterion(clock, x)
            return found
        others = (piece.new_zeros(*x.shape[:-1], *piece.shape) for piece in last[1:])
        state: State = (x, *others)
        found = criterion(clock, state)
        return found

    return measured
