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
from .style import GREY, array, canvas, is_log, legend, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_energy", "plot_phase", "plot_states"]

# Coordinates that are drawn unless others are asked for.
_FIRST = 6


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
    labels: Sequence[str] | None = None,
    colors: Sequence[Any] | None = None,
) -> Axes:
    """Phase portrait: the position against the velocity, for states (x, v, ...).

    Continuous paths are lines, iterations dots; ends are marked as in `plot_paths`.

    Args:
        runs: See `ode_stopping.plots`; they must have kept their states.
        axes: Where to draw; None makes a figure.
        coordinate: Which entry of x and v.
        direction: Draw the components of x and v along this vector instead; it is normalised.
        labels: Names for the legend; None: the keys of a mapping.
        colors: One a run; None: the cycle of the axes.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is missing.
        RuntimeError: A run kept no states.
        TypeError: A run is none, or its states have no velocity.
        ValueError: The direction is zero or does not fit x.
        IndexError: x has no such coordinate.
    """
    shown = views(runs, labels)

    def project(state: State) -> Any:
        return _in_phase_plane(state, coordinate, direction)

    paths = [np.stack([project(state) for state in view.states()[1]]) for view in shown]
    axes = canvas(axes, "plot_phase")
    for line in (axes.axhline, axes.axvline):
        line(0.0, color=GREY, linewidth=0.6, zorder=1)
    for index, (view, path) in enumerate(zip(shown, paths, strict=True)):
        color = None if colors is None else colors[index % len(colors)]
        draw_course(axes, view, path, project, color)
    mark_starts(axes, paths, named=any(view.name is not None for view in shown))
    which = rf"_{{{coordinate + 1}}}" if direction is None else r" \cdot d"
    axes.set(xlabel=f"position $x{which}$", ylabel=f"velocity $v{which}$")
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
