"""What the flows of the adaptive methods do from zero moments, where the algorithms start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from discrete import stopping_index
from ode_stopping import Torchdiffeq, stopping_time

from ..plotting import COLOURS, MARKERS, log_axes, new_figure
from ..registry import Context, Figure
from ..slopes import fit_slope
from ._flows import FROM_REST, RULES, TARGET, setting

RestPoints = tuple[tuple[float, ...], tuple[float, ...]]
REST_COUNTS = (20, 40, 80, 160)


def from_rest(case: tuple[str, str]) -> RestPoints:
    """Step sizes and errors of t0 + h N*, from zero moments, for a flow and a rule.

    Values only: at zero moments no gradient route of Adam has a derivative to work with.
    """
    name, rule = case
    own = setting(name, age=0.0)
    problem: Any = (own.state, own.criterion, TARGET)
    solver = Torchdiffeq(rtol=1e-11)
    span = float(stopping_time(own.flow, *problem, solver=solver, gradient=None).time)
    steps, errors = [], []
    for count in REST_COUNTS:
        squares = []
        for offset in (0.25, 0.75):
            h = span / (count + offset)
            update = RULES[rule](own.flow, step=h)
            run = stopping_index(update, *problem, gradient=None, interpolation="partial_step")
            squares.append((h * float(run.steps) / span - 1.0) ** 2)
        steps.append(span / (count + 0.5))
        errors.append(float(np.sqrt(np.mean(squares))))
    return tuple(steps), tuple(errors)


def from_rest_points(context: Context) -> dict[tuple[str, str], RestPoints]:
    """`from_rest` of every flow that has moments, with the rules of higher order."""
    cases = [(flow, rule) for flow in FROM_REST for rule in ("Heun", "Runge-Kutta 4")]
    return dict(zip(cases, context.map(from_rest, cases), strict=True))


def from_rest_figure(rest: Mapping[tuple[str, str], RestPoints]) -> Figure:
    """The errors over h."""
    figure, axes = new_figure()
    for position, ((flow, rule), (steps, errors)) in enumerate(rest.items()):
        axes.plot(
            steps,
            errors,
            color=COLOURS[position],
            marker=MARKERS[position],
            markerfacecolor="white",
            label=f"{flow}, {rule}: {fit_slope(steps, errors).slope:.2f}",
        )
    axes.set(
        xscale="log", yscale="log", xlabel=r"step size $h$", ylabel=r"relative error of $h N^*$"
    )
    log_axes(axes)
    axes.legend(loc="best")
    caption = (
        "From zero moments, as the algorithms start. RMSProp's root is not smooth there: every "
        "rule of higher order falls to about 1.5. Adam's corrected moments are smooth along the "
        "flow but not along a step from zero: Runge-Kutta keeps 3 of its 4, and Heun nearly its 2."
    )
    return Figure("from-rest", caption, figure, "slopes near 1.5 for RMSProp, 2 and 3 for Adam")
