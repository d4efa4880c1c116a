"""The criterion along runs, and the fan of iterations that converges to the flow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from ode_stopping.result import optional_module

from .runs import POINTS, View, between, finite, keep_in_sight, views
from .style import DASHES, GREY, array, canvas, is_log, legend, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_criterion", "plot_fan"]

Log = bool | Literal["auto"]

# Beyond so many, markers run into each other.
_MARKED = 100


def plot_criterion(
    runs: Any,
    *,
    axes: Axes | None = None,
    labels: Sequence[str] | None = None,
    colors: Sequence[Any] | None = None,
    against: Literal["auto", "time", "steps"] = "auto",
    target: float | Sequence[float] | Tensor | None = None,
    log: Log = "auto",
    criterion: Callable[..., Any] | None = None,
    step: float | Sequence[float | None] | None = None,
) -> Axes:
    """J over flow time or over steps, with the crossings marked.

    Small dots are the accepted steps of a flow, or the iterates; a large one is T or N (one for
    each target, where there are several). Between accepted steps a smooth curve without overshoot
    is drawn through the values, or J itself where `criterion` is given.

    Args:
        runs: See `ode_stopping.plots`.
        axes: Where to draw; None makes a figure.
        labels: Names for the legend; None: the keys of a mapping.
        colors: One a run; None: the cycle of the axes.
        against: "time": iterations are drawn at t0 + h k; "steps": at k (iterations only); "auto":
            time where there is a flow, else steps.
        target: eps, drawn as a line; one or several.
        log: Whether J is on a log axis; "auto": where all of it is positive.
        criterion: J, (t, state) -> one number, evaluated at 400 times of a flow that kept its
            states.
        step: h of iterations that do not say it (misses, bare callables): one for all, or one a
            run.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is missing.
        RuntimeError: criterion was given, and a flow kept no states.
        TypeError: A run is none.
        ValueError: A flow against steps; an iteration against time that does not say its step.
    """
    shown = views(runs, labels, step)
    in_time = _in_time(shown, against)
    axes = canvas(axes, "plot_criterion")
    curves = [_Curve.of(view, criterion, in_time=in_time) for view in shown]
    targets = np.atleast_1d(array(target)) if target is not None else np.array([])
    if is_log(log, [targets, *(curve.y for curve in curves)]):
        axes.set_yscale("log")
    logarithmic = axes.get_yscale() == "log"
    _draw_targets(axes, targets)
    for index, curve in enumerate(curves):
        color = None if colors is None else colors[index % len(colors)]
        outcome = curve.view.outcome()
        label = curve.view.name
        if label is not None and outcome:
            label = f"{label}, {outcome}"
        line = curve.draw(
            axes, label=label or _plain_label(curve.view), color=color, log=logarithmic
        )
        where = curve.view.crossings(in_time=in_time)
        _mark(axes, where, curve.at(where, log=logarithmic), line.get_color(), outcome, curve.view)
    keep_in_sight(axes, shown, [curve.y for curve in curves])
    axes.set(xlabel="flow time t" if in_time else "step k", ylabel="criterion J")
    legend(axes)
    return axes


def plot_fan(
    flow: Any,
    runs: Any,
    *,
    axes: Axes | None = None,
    labels: Sequence[str] | None = None,
    coordinate: int | None = None,
    target: float | Sequence[float] | Tensor | None = None,
    log: Log = "auto",
    criterion: Callable[..., Any] | None = None,
) -> Axes:
    """Iterations of many step sizes over t0 + h k, fanning out from the flow they converge to.

    Args:
        flow: The result of the flow, or its trajectory: the black line.
        runs: Iterations: a mapping h -> run, or runs that say their step (see `plot_criterion`).
        axes: Where to draw; None makes a figure.
        labels: Names for the legend; None: "h = ...".
        coordinate: Draw this entry of the position instead of J.
        target: eps, drawn as a line.
        log: Whether the y axis is logarithmic; "auto": where all of it is positive, for J.
        criterion: J, (t, state) -> one number, for the flow between its accepted steps.

    Returns:
        The axes. Light colours are small steps.

    Raises:
        ImportError: matplotlib is missing.
        RuntimeError: A run kept no states, where they are needed.
        TypeError: A run is none.
        ValueError: An iteration does not say its step; a target with a coordinate.
    """
    if coordinate is not None and target is not None:
        raise ValueError("target is a value of J, and coordinate draws no J: leave one out")
    fan = _by_step(runs, labels)
    axes = canvas(axes, "plot_fan")
    (limit,) = views(flow, ["flow"])
    if limit.iterates:
        raise TypeError("flow must be the result of stopping_time, got that of an iteration")
    curves = [
        _Curve.of(view, criterion, in_time=True, coordinate=coordinate) for view in (limit, *fan)
    ]
    targets = np.atleast_1d(array(target)) if target is not None else np.array([])
    automatic = log == "auto" and coordinate is not None
    if not automatic and is_log(log, [targets, *(curve.y for curve in curves)]):
        axes.set_yscale("log")
    logarithmic = axes.get_yscale() == "log"
    _draw_targets(axes, targets)
    shades = optional_module("matplotlib", "plot_fan").colormaps["plasma"]
    places = np.linspace(0.1, 0.85, max(len(fan), 2))
    colors = ["black", *(shades(place) for place in places)]
    for curve, color in zip(curves, colors, strict=False):
        name = curve.view.name
        curve.draw(axes, label=name, color=color, log=logarithmic, dots=curve.view.iterates)
        where = curve.view.crossings(in_time=True)
        _mark(axes, where, curve.at(where, log=logarithmic), color, "", curve.view)
    keep_in_sight(axes, [curve.view for curve in curves], [curve.y for curve in curves])
    name = "criterion J" if coordinate is None else f"$x_{{{coordinate + 1}}}$"
    axes.set(xlabel="flow time t = t0 + h k", ylabel=name)
    legend(axes)
    return axes


class _Curve:
    """What is drawn of a run: the points where it was looked at, and the line through them."""

    def __init__(self, view: View, x: Any, y: Any, *, smooth: bool) -> None:
        self.view = view
        self.x = x
        self.y = y
        self._smooth = smooth  # whether something is to be drawn between the points

    @classmethod
    def of(
        cls,
        view: View,
        criterion: Callable[..., Any] | None,
        *,
        in_time: bool,
        coordinate: int | None = None,
    ) -> _Curve:
        """J, or a coordinate, along a run."""
        if coordinate is not None:
            at, path = view.positions()
            return cls(
                view, view.axis(at, in_time=in_time), finite(path[:, coordinate]), smooth=False
            )
        if criterion is not None and not view.iterates:
            return cls(view, *view.along(criterion), smooth=False)
        return cls(view, *view.values(in_time=in_time), smooth=not view.iterates)

    def at(self, where: Any, *, log: bool) -> Any:
        """The curve at other places, on the line that is drawn."""
        usable = np.isfinite(self.y) & ((self.y > 0) | (not log))
        if not usable.any():
            return np.full(len(where), np.nan)
        x, first = np.unique(self.x[usable], return_index=True)  # increasing, as splines want it
        y = self.y[usable][first]
        heights = np.log(y) if log else y
        if self._smooth and len(x) > 1:
            found = PchipInterpolator(x, heights)(np.clip(where, x[0], x[-1]))
        else:
            found = np.interp(where, x, heights)
        return np.exp(found) if log else found

    def draw(
        self, axes: Axes, *, label: str | None, color: Any, log: bool, dots: bool = True
    ) -> Any:
        """The line, with markers where the run was looked at; returns it."""
        x, y, every = self.x, self.y, 1
        if self._smooth and np.isfinite(y).all() and len(x) > 1:
            x = between(self.x, POINTS)
            every = (len(x) - 1) // (len(self.x) - 1)
            y = self.at(x, log=log)
        drawn = look(iterates=self.view.iterates, count=len(self.x))
        if dots and self._smooth and len(self.x) <= _MARKED:
            drawn |= {"marker": ".", "markersize": 5, "markevery": every}
        (line,) = axes.plot(x, y, label=label, color=color, **drawn)
        return line


def _in_time(shown: list[View], against: str) -> bool:
    if against not in ("auto", "time", "steps"):
        raise ValueError(f'against must be "auto", "time" or "steps"; got {against!r}')
    flows = [view for view in shown if not view.iterates]
    if against == "steps" and flows:
        raise ValueError('against="steps" is for iterations: a flow has no step size')
    return bool(flows) if against == "auto" else against == "time"


def _draw_targets(axes: Axes, targets: Any) -> None:
    for index, target in enumerate(targets):
        label = f"target {target:.4g}" if len(targets) == 1 else "targets"
        axes.axhline(
            target,
            color=GREY,
            linestyle=DASHES,
            linewidth=1.0,
            zorder=1.5,
            label=label if index == 0 else None,
        )


def _plain_label(view: View) -> str | None:
    """The name of a run that is drawn alone; how it missed is said here, for there is no mark."""
    name = "J(x_k)" if view.iterates else "J(x(t))"
    missed = view.outcome() and not len(view.crossings(in_time=False))
    return f"{name}, {view.outcome()}" if missed else name


def _mark(axes: Axes, where: Any, heights: Any, color: Any, outcome: str, view: View) -> None:
    """A large dot at each crossing; labelled for a run that is drawn alone."""
    if not len(where):
        return
    axes.plot(
        where,
        heights,
        linestyle="none",
        marker="o",
        markersize=7 if view.iterates else 8,
        color=color,
        markeredgecolor="white",
        zorder=5 if view.iterates else 6,
        label=outcome if view.name is None and outcome else None,
    )


def _by_step(runs: Any, labels: Sequence[str] | None) -> list[View]:
    """Iterations from the largest step to the smallest, named after it."""
    steps: list[float | None] | None = None
    if isinstance(runs, Mapping):
        steps = [float(key) for key in runs]
        runs = list(runs.values())
    found = views([runs] if not isinstance(runs, Sequence) else runs, labels, steps)
    wrong = [view for view in found if not view.iterates]
    if wrong:
        raise TypeError("runs must be results of stopping_index, got one of a flow")
    sized = [(view.clock()[1], view) for view in found]
    sized.sort(key=lambda pair: -pair[0])
    if labels is not None:
        return [view for _, view in sized]
    return [View(view.run, f"h = {h:g}", view.step, view.start) for h, view in sized]
