"""The criterion along runs of either side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from .curves import Curve, draw_targets, keep_in_sight, mark
from .runs import View, views
from .style import array, canvas, is_log, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_criterion"]


def plot_criterion(
    runs: Any,
    *,
    axes: Axes | None = None,
    labels: Sequence[str] | None = None,
    colors: Sequence[Any] | None = None,
    against: Literal["auto", "time", "steps"] = "auto",
    target: float | Sequence[float] | Tensor | None = None,
    log: bool | Literal["auto"] = "auto",
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
        step: h of iterations whose update is a bare callable, and so has none (they start with
            the flow they are drawn with, or at 0): one for all, or one a run.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is missing.
        RuntimeError: `criterion` was given, and a flow kept no states.
        TypeError: A run is none.
        ValueError: A flow against steps; a bare callable against time, without a step.
    """
    shown = views(runs, labels, step)
    in_time = _in_time(shown, against)
    axes = canvas(axes, "plot_criterion")
    curves = [Curve.of(view, criterion, in_time=in_time) for view in shown]
    targets = np.atleast_1d(array(target)) if target is not None else np.array([])
    if is_log(log, [targets, *(curve.y for curve in curves)]):
        axes.set_yscale("log")
    logarithmic = axes.get_yscale() == "log"
    draw_targets(axes, targets)
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
        mark(axes, where, curve.at(where, log=logarithmic), line.get_color(), outcome, curve.view)
    keep_in_sight(axes, shown, [curve.y for curve in curves])
    axes.set(xlabel="flow time t" if in_time else "step k", ylabel="criterion J")
    legend(axes)
    return axes


def _in_time(shown: list[View], against: str) -> bool:
    if against not in ("auto", "time", "steps"):
        raise ValueError(f'against must be "auto", "time" or "steps"; got {against!r}')
    flows = [view for view in shown if not view.iterates]
    if against == "steps" and flows:
        raise ValueError('against="steps" is for iterations: a flow has no step size')
    return bool(flows) if against == "auto" else against == "time"


def _plain_label(view: View) -> str | None:
    """The name of a run that is drawn alone; how it missed is said here, for there is no mark."""
    name = "J(x_k)" if view.iterates else "J(x(t))"
    missed = view.outcome() and not len(view.crossings(in_time=False))
    return f"{name}, {view.outcome()}" if missed else name
