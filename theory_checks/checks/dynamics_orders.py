"""Every flow with every discretisation: the orders at which h N* and h dN* tend to T and dT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..measurements import Measurement
from ..plotting import COLOURS, MARKERS, log_axes, new_figure
from ..registry import Context, Figure, Outcome, Table, check
from ..slopes import SlopeFit, fit_slope, local_slopes
from ._flows import FLOWS, ONE_STATE, TARGET, Cell, measure, minima_before
from ._from_rest import from_rest_figure, from_rest_points

ORDERS = {"Euler": 1, "semi-implicit Euler": 1, "Heun": 2, "Runge-Kutta 4": 4}
# Steps from t0 to T at the largest and at the smallest step size. The first is where the terms of
# higher order have become small, the last is what the time allows (and, for Runge-Kutta, rounding).
RANGES = {
    "Euler": (50, 200),
    "semi-implicit Euler": (50, 200),
    "Heun": (30, 120),
    "Runge-Kutta 4": (20, 80),
}
PAPER_RANGES = {
    "Euler": (50, 1600),
    "semi-implicit Euler": (50, 1600),
    "Heun": (30, 480),
    "Runge-Kutta 4": (20, 160),
}
# A fitted slope misses the order by the size of the next term of the error, C h^p (1 + c h); the
# orders of two rules are at least 1 apart.
TOLERANCE = 0.2
# At the small end of the range less is left of it.
END_TOLERANCE = 0.12
REFERENCE_SHARE = 0.05


@dataclass(frozen=True)
class Curve:
    """The errors of one flow with one rule, over step sizes.

    Attributes:
        steps: h, descending, each the middle of those whose errors are one point.
        gradient_errors: Relative errors of h dN*, root mean squares over the phases.
        time_errors: Errors of t0 + h N* relative to T - t0, likewise.
        gradient: The fit to the first.
        time: The fit to the second.
        spread: The largest ratio of error/h^p between two phases.
    """

    steps: tuple[float, ...]
    gradient_errors: tuple[float, ...]
    time_errors: tuple[float, ...]
    gradient: SlopeFit
    time: SlopeFit
    spread: float

    def ends(self) -> tuple[float, float]:
        """The slopes between the two smallest step sizes, of gradient and value."""
        errors = (self.gradient_errors, self.time_errors)
        gradient, time = (local_slopes(self.steps[-2:], e[-2:])[0] for e in errors)
        return float(gradient), float(time)


@check(
    name="orders-dynamics",
    title="Every flow with every discretisation",
    source="Theorem 2, and beyond the paper (higher orders)",
    group="orders",
    order=62,
)
def orders_dynamics(context: Context) -> Outcome:
    """h N* tends to T and h dN* to dT at the order of the rule, for every flow of the library.

    Ten flows with learnable hyperparameters (and curvatures of f, on which J = f depends as well),
    with Euler and semi-implicit Euler (order 1), Heun (2) and Runge-Kutta 4 (4), and a partial last
    step. The flows of second order cross the target after J has risen again. The adaptive ones
    start from v0 > 0.

    The error with a partial last step is h^p c(phase), where the phase, of T within its step, runs
    through a bounded sawtooth. Each point is the root mean square over step sizes that put T at
    evenly spread phases, the same ones at every point.

    Measured: of each rule the slope that is farthest from its order, of the fits and at the small
    end of the range. Expected: the order. Tolerance: 0.2 for the fit and 0.12 at the end. The
    reference, dopri8 at rtol 1e-12, may differ from the one at 1e-10 by a twentieth of the smallest
    error.
    """
    ranges = context.choose(quick=RANGES, paper=PAPER_RANGES)
    levels, phases = context.choose(quick=(3, 2), paper=(9, 4))
    return judge_orders(context, tuple(FLOWS), ranges, levels=levels, phases=phases)


def judge_orders(
    context: Context,
    flows: Sequence[str],
    ranges: Mapping[str, tuple[int, int]],
    *,
    levels: int = 4,
    phases: int = 2,
    from_rest: bool = True,
) -> Outcome:
    """The check on a choice of flows and rules.

    Args:
        context: The settings.
        flows: Keys of `FLOWS`.
        ranges: Keys of `RULES` with the least and the most steps.
        levels: Points a curve.
        phases: Step sizes a point.
        from_rest: Measure what a start from v = 0 does.
    """
    references = _references(context, flows)
    curves = _curves(context, references, ranges, levels, phases)
    smallest = {
        flow: min(min(c.gradient_errors) for (own, _), c in curves.items() if own == flow)
        for flow in flows
    }
    measured: dict[str, float] = {}
    expected: dict[str, float] = {}
    tolerance: dict[str, float] = {}
    for rule in ranges:
        own = [curve for (_, name), curve in curves.items() if name == rule]
        found = {
            "gradient": ([c.gradient.slope for c in own], TOLERANCE),
            "value": ([c.time.slope for c in own], TOLERANCE),
            "gradient, at the small end": ([c.ends()[0] for c in own], END_TOLERANCE),
            "value, at the small end": ([c.ends()[1] for c in own], END_TOLERANCE),
        }
        for what, (slopes, bound) in found.items():
            order = ORDERS[rule]
            measured[f"{rule}: {what}"] = _farthest(slopes, order)
            expected[f"{rule}: {what}"], tolerance[f"{rule}: {what}"] = order, bound
    share = "change of the reference from rtol 1e-10, over the smallest error"
    measured[share] = max(_reference_error(references[flow]) / smallest[flow] for flow in flows)
    expected[share], tolerance[share] = 0.0, REFERENCE_SHARE
    first = next(iter(curves.values())).gradient
    details: dict[str, Any] = {
        "target": TARGET,
        "dtype": "float64",
        "minima of J before T": dict(zip(flows, context.map(minima_before, flows), strict=True)),
        "largest ratio of error/h^p between phases": max(c.spread for c in curves.values()),
        "semi-implicit Euler": "Euler where the state is the position alone: not run again",
    }
    figures = [_figure(curves, tuple(ranges))]
    if from_rest:
        rest = from_rest_points(context)
        details["slopes of the value from v0 = 0"] = {
            f"{flow}, {rule}": str(fit_slope(*points)) for (flow, rule), points in rest.items()
        }
        figures.append(from_rest_figure(rest))
    return Outcome.within(
        measured,
        expected,
        tolerance,
        details=details,
        tables=[_table(curves, references)],
        figures=figures,
        interval=first.interval,
    )


def _farthest(slopes: Sequence[float], order: int) -> float:
    return max(slopes, key=lambda slope: abs(slope - order))


def _references(
    context: Context, flows: Sequence[str]
) -> dict[str, tuple[Measurement, Measurement]]:
    """The continuous side of each flow, at rtol 1e-12 and at 1e-10."""
    cells = [Cell(flow, rtol=rtol) for flow in flows for rtol in (1e-12, 1e-10)]
    found = context.map(measure, cells)
    return dict(zip(flows, zip(found[::2], found[1::2], strict=True), strict=True))


def _reference_error(pair: tuple[Measurement, Measurement]) -> float:
    """The distance to the gradient at rtol 1e-10, which is the less accurate of the two."""
    tight, loose = pair
    return float((loose.gradient - tight.gradient).norm() / tight.gradient.norm())


def _span(flow: str, reference: Measurement) -> float:
    """T - t0."""
    return reference.time - FLOWS[flow].t0


def _curves(
    context: Context,
    references: Mapping[str, tuple[Measurement, Measurement]],
    ranges: Mapping[str, tuple[int, int]],
    levels: int,
    phases: int,
) -> dict[tuple[str, str], Curve]:
    """The curve of every flow with every rule that does something of its own on it."""
    # Off the whole numbers, where N itself could turn on the last digit of h.
    offsets = [(j + 0.5) / phases for j in range(phases)]
    cells: dict[tuple[str, str], list[list[Cell]]] = {}
    for flow, (truth, _) in references.items():
        for rule, (low, high) in ranges.items():
            if rule == "semi-implicit Euler" and flow in ONE_STATE:
                continue
            counts = [round(float(count)) for count in np.geomspace(low, high, levels)]
            span = _span(flow, truth)
            cells[flow, rule] = [
                [Cell(flow, rule, span / (count + offset)) for offset in offsets]
                for count in counts
            ]
    every = [cell for points in cells.values() for point in points for cell in point]
    # The long runs first: a short one fits in at the end, a long one would be waited for.
    every.sort(key=lambda cell: cell.step)
    found = dict(zip(every, context.map(measure, every), strict=True))
    return {
        (flow, rule): _curve(flow, rule, references[flow][0], points, found)
        for (flow, rule), points in cells.items()
    }


def _curve(
    flow: str,
    rule: str,
    truth: Measurement,
    points: Sequence[Sequence[Cell]],
    found: Mapping[Cell, Measurement],
) -> Curve:
    span, order = _span(flow, truth), ORDERS[rule]
    steps, errors, spread = [], [], 1.0
    for point in points:
        h = np.array([cell.step for cell in point])
        runs = [found[cell] for cell in point]
        gaps = [float((r.gradient - truth.gradient).norm()) for r in runs]
        constants = np.array(
            [
                np.array(gaps) / float(truth.gradient.norm()) / h**order,
                np.array([abs(r.time - truth.time) for r in runs]) / span / h**order,
            ]
        )
        middle = float(np.exp(np.log(h).mean()))
        steps.append(middle)
        errors.append(np.sqrt((constants**2).mean(axis=1)) * middle**order)
        spread = max(spread, float(constants[0].max() / constants[0].min()))
    of_gradient, of_time = (tuple(float(e[i]) for e in errors) for i in (0, 1))
    return Curve(
        tuple(steps),
        of_gradient,
        of_time,
        fit_slope(steps, of_gradient),
        fit_slope(steps, of_time),
        spread,
    )


def _table(
    curves: Mapping[tuple[str, str], Curve],
    references: Mapping[str, tuple[Measurement, Measurement]],
) -> Table:
    rows: list[list[Any]] = []
    for (flow, rule), curve in curves.items():
        ends = curve.ends()
        rows.append(
            [
                flow,
                rule,
                ORDERS[rule],
                str(curve.gradient),
                ends[0],
                str(curve.time),
                ends[1],
                curve.gradient_errors[-1],
                curve.spread,
                references[flow][0].time,
            ]
        )
    return Table(
        "Slopes of the errors over h",
        [
            "flow",
            "rule",
            "order",
            "gradient: slope and interval",
            "at the end",
            "value: slope and interval",
            "at the end",
            "smallest error of the gradient",
            "phases: ratio",
            "T",
        ],
        rows,
        "Intervals of 95 %. At the end: between the two smallest step sizes. Phases: the largest "
        "ratio of error/h^p between step sizes that end T at different phases of their last step.",
    )


def _figure(curves: Mapping[tuple[str, str], Curve], rules: Sequence[str]) -> Figure:
    figure, axes = new_figure(2, len(rules), width=2.9, height=2.6)
    grid = np.asarray(axes).reshape(2, len(rules))
    names = list(dict.fromkeys(flow for flow, _ in curves))
    for column, rule in enumerate(rules):
        for row in (0, 1):
            panel = grid[row, column]
            for (flow, own), curve in curves.items():
                if own != rule:
                    continue
                position = names.index(flow)
                panel.plot(
                    curve.steps,
                    (curve.gradient_errors, curve.time_errors)[row],
                    color=COLOURS[position % len(COLOURS)],
                    marker=MARKERS[position % len(MARKERS)],
                    markersize=3.5,
                    markerfacecolor="white" if position < len(COLOURS) else None,
                    linewidth=0.9,
                    label=flow,
                )
            _slope_triangle(panel, ORDERS[rule])
            log_axes(panel)
            if row == 0:
                panel.set_title(f"{rule}, order {ORDERS[rule]}")
            else:
                panel.set_xlabel(r"step size $h$ (flow time)")
    grid[0, 0].set_ylabel(r"relative error of $h\,dN^*$")
    grid[1, 0].set_ylabel(r"relative error of $t_0 + h N^*$")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    caption = (
        "Relative errors of the gradient (above) and of the value (below) over the step size, one "
        "curve a flow, one column a rule; dashed: the order of the rule. The slopes are in the "
        "table."
    )
    return Figure("orders", caption, figure, "bundles of parallel lines of slopes 1, 1, 2 and 4")


def _slope_triangle(panel: Any, order: int) -> None:
    """A dashed line of the order, below all points."""
    lines = panel.get_lines()
    steps = np.concatenate([line.get_xdata() for line in lines])
    errors = np.concatenate([line.get_ydata() for line in lines])
    ends = np.array([steps.min(), steps.max()])
    constant = 0.4 * float((errors / steps**order).min())
    panel.plot(ends, constant * ends**order, color="#555555", linestyle=(0, (4, 3)), linewidth=1)
