"""The fan of iterations that converges to the flow as the step gets smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from ..core.optional import optional_module
from .curves import Curve, draw_targets, keep_in_sight, mark
from .runs import View, views
from .style import array, canvas, is_log, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_fan"]


def plot_fan(
    flow: Any,
    runs: Any,
    *,
    axes: Axes | None = None,
    labels: Sequence[str] | None = None,
    coordinate: int | None = None,
    target: float | Sequence[float] | Tensor | None = None,
    log: bool | Literal["auto"] = "auto",
    criterion: Callable[..., Any] | None = None,
) -> Axes:
    """Iterations of many step sizes over t0 + h k, fanning out from the flow they converge to.

    Args:
        flow: The result of the flow, or its trajectory: the black line.
        runs: Iterations: a mapping h -> run, or runs of `UpdateRule`s, which say their step.
        axes: Where to draw; None makes a figure.
        labels: Names for the legend; None: "h = ...".
        coordinate: Draw this entry of the position instead of J.
        target: eps, drawn as a line.
        log: Whether the y axis is logarithmic; "auto": where all of it is positive, for J.
        criterion: J, (t, state) -> one number, for the flow between its accepted steps.

    Returns:
        The axes. Light colours are small steps.

    Raises:
        ImportError: Matplotlib is missing.
        RuntimeError: A run kept no states, where they are needed.
        TypeError: A run is none.
        ValueError: The update is a bare callable, and there is no step; a target with a coordinate.
    """
    if coordinate is not None and target is not None:
        raise ValueError("target is a value of J, and coordinate draws no J: leave one out")
    (limit,) = views(flow, ["flow"])
    if limit.iterates:
        raise TypeError("flow must be the result of stopping_time, got that of an iteration")
    fan = _by_step(runs, labels, limit.start)
    axes = canvas(axes, "plot_fan")
    curves = [
        Curve.of(view, criterion, in_time=True, coordinate=coordinate) for view in (limit, *fan)
    ]
    targets = np.atleast_1d(array(target)) if target is not None else np.array([])
    automatic = log == "auto" and coordinate is not None
    if not automatic and is_log(log, [targets, *(curve.y for curve in curves)]):
        axes.set_yscale("log")
    logarithmic = axes.get_yscale() == "log"
    draw_targets(axes, targets)
    shades = optional_module("matplotlib", "plot_fan").colormaps["plasma"]
    places = np.linspace(0.1, 0.85, max(len(fan), 2))
    colors = ["black", *(shades(place) for place in places)]
    for curve, color in zip(curves, colors, strict=False):
        name = curve.view.name
        curve.draw(axes, label=name, color=color, log=logarithmic, dots=curve.view.iterates)
        where = curve.view.crossings(in_time=True)
        mark(axes, where, curve.at(where, log=logarithmic), color, "", curve.view)
    keep_in_sight(axes, [curve.view for curve in curves], [curve.y for curve in curves])
    name = "criterion J" if coordinate is None else f"$x_{{{coordinate + 1}}}$"
    axes.set(xlabel="flow time t = t0 + h k", ylabel=name)
    legend(axes)
    return axes


def _by_step(runs: Any, labels: Sequence[str] | None, start: float) -> list[View]:
    """Iterations from the largest step to the smallest, named after it."""
    steps: list[float | None] | None = None
    if isinstance(runs, Mapping):
        steps = [float(key) for key in runs]
        runs = list(runs.values())
    listed = runs if isinstance(runs, Sequence) else [runs]
    found = [replace(view, start=start) for view in views(listed, labels, steps)]
    wrong = [view for view in found if not view.iterates]
    if wrong:
        raise TypeError("runs must be results of stopping_index, got one of a flow")
    sized = [(view.clock()[1], view) for view in found]
    sized.sort(key=lambda pair: -pair[0])
    if labels is not None:
        return [view for _, view in sized]
    return [replace(view, name=f"h = {h:g}") for h, view in sized]
