"""Closed form 7: the first crossing of a criterion that oscillates, where T jumps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..plotting import COLOURS, MARKERS, log_axes, new_figure
from ..registry import Context, Figure, Outcome, Table, check
from ..slopes import SlopeFit, fit_slope
from ._two_modes import Crossing, first_crossing, jump
from ._two_modes_runs import (
    Bracket,
    Flowed,
    Run,
    by_flow,
    by_iteration,
    jump_of,
)

TIME_BOUND = 1e-7
# |h N - T| in steps: one for rounding up to a whole N, and the error of the method at T, which is
# about as large.
STEPS_BOUND = 3.0
# The iteration's jump is within h of the flow's; nearer than this to it the two may disagree.
NEAR_A_JUMP = 20.0
# A dip that goes below the target by some 1e-8 only can be missed.
JUMP_BOUND = 1e-7
# A dip that is looked at in whole steps seems higher by O(h^2): a third more at the largest h.
SLOPE_BOUND = 0.2
# How far from the exact one a side's jump is sought, in units of the damping; for an
# iteration, whose jump is off by up to h, in units of h.
FLOW_REACH, ITERATION_REACH = 1e-4, 2.0
# How far above a jump the dip that is missed is sure to be worth a warning.
JUST_ABOVE = (1e-4, 1e-3)
FAR_FROM_A_JUMP = 0.1


@check(
    name="first-crossing-oscillating",
    title="The first crossing of an oscillating criterion, and its jumps",
    source="Definitions 1 and 2 (closed form 7)",
    group="first-crossing",
    order=66,
)
def first_crossing_check(context: Context) -> Outcome:
    """T and h N are those of the first crossing, on the same oscillation of J, up to its jumps.

    Heavy ball on two modes of curvatures 1 and 60 (closed form 7), over dampings from 0.4 to 1.9: T
    jumps twice, where a dip of J just misses the target. The truth is each mode's closed form in
    NumPy, with every dip looked at. The iteration is semi-implicit Euler.

    Measured, and tolerated: the error of the flow's T (1e-7); |h N - T| in steps (3) and dampings
    on another oscillation (none), for dampings farther than 20 h from a jump; the error of the
    damping at which the flow's T jumps (1e-7), and the slope over h of that of the iteration's
    (1 within 0.2), both by bisection. Just above a jump the library has to warn, and a tenth away
    from it not to.
    """
    dampings = np.linspace(0.4, 1.9, context.choose(quick=16, paper=151))
    return judge_crossings(
        context,
        [float(a) for a in dampings],
        step=context.choose(quick=1e-3, paper=2.5e-4),
        jump_steps=context.choose(
            quick=(8e-3, 4e-3, 2e-3, 1e-3), paper=(8e-3, 4e-3, 2e-3, 1e-3, 5e-4, 2.5e-4)
        ),
    )


@dataclass(frozen=True)
class Row:
    """One damping.

    Attributes:
        damping: a.
        truth: By the closed form.
        flow: The continuous side.
        run: The discrete side.
        distance: Of a to the nearest jump.
        step: h.
    """

    damping: float
    truth: Crossing
    flow: Flowed
    run: Crossing
    distance: float
    step: float

    @property
    def far(self) -> bool:
        """Whether both sides have to be on the same oscillation."""
        return self.distance > NEAR_A_JUMP * self.step

    @property
    def gap(self) -> float:
        """(h N - T)/h."""
        return (self.run.time - self.truth.time) / self.step


@dataclass(frozen=True)
class Jump:
    """A damping at which T jumps, and where the two sides have it.

    Attributes:
        damping: By the closed form.
        flow: Of the flow's T.
        runs: Of N, one a step size.
        fit: Of |runs - damping| over the step sizes.
    """

    damping: float
    flow: float
    runs: tuple[float, ...]
    fit: SlopeFit


def judge_crossings(
    context: Context, dampings: Sequence[float], *, step: float, jump_steps: Sequence[float]
) -> Outcome:
    """The check on a grid of dampings.

    Args:
        context: The settings.
        dampings: Ascending; a jump is sought between neighbours on different oscillations.
        step: h, for the comparison on the grid.
        jump_steps: Step sizes of the iterations whose jump is sought.
    """
    jumps = _jumps(context, dampings, jump_steps)
    above = [j.damping + gap for j in jumps for gap in JUST_ABOVE]
    grid = sorted({*dampings, *above})
    rows = rows_of(context, grid, [j.damping for j in jumps], step)
    figures = claims(rows, above)
    for j in jumps:
        figures[f"jump at {j.damping:.4f}: error of the flow's"] = (
            abs(j.flow - j.damping),
            0.0,
            JUMP_BOUND,
        )
        figures[f"jump at {j.damping:.4f}: slope of the iteration's"] = (
            j.fit.slope,
            1.0,
            SLOPE_BOUND,
        )
    measured, expected, tolerance = (
        {name: values[i] for name, values in figures.items()} for i in range(3)
    )
    return Outcome.within(
        measured,
        expected,
        tolerance,
        details={
            "h": step,
            "dtype": "float64",
            "jumps": {
                f"{j.damping:.10f}": {
                    "T below": first_crossing(j.damping - 1e-9).time,
                    "T above": first_crossing(j.damping + 1e-9).time,
                    "slope": str(j.fit),
                }
                for j in jumps
            },
            "dampings too near to a jump to compare the iteration": [
                row.damping for row in rows if not row.far
            ],
            "dampings with a warning": [row.damping for row in rows if row.flow.warned],
        },
        tables=[_table(rows), _jump_table(jumps, jump_steps)],
        figures=[_figure(rows, jumps), _jump_figure(jumps, jump_steps)],
    )


def rows_of(
    context: Context, grid: Sequence[float], jumps: Sequence[float], step: float
) -> list[Row]:
    """Both sides and the closed form at every damping."""
    flows = context.map(by_flow, grid)
    runs = context.map(by_iteration, [Run(a, step) for a in grid])
    return [
        Row(a, first_crossing(a), flow, run, min(abs(a - j) for j in jumps), step)
        for a, flow, run in zip(grid, flows, runs, strict=True)
    ]


def claims(rows: Sequence[Row], above: Sequence[float]) -> dict[str, tuple[float, float, float]]:
    """Measured, expected and tolerance of what the grid shows.

    Args:
        rows: The dampings.
        above: Those just above a jump.
    """
    far = [row for row in rows if row.far]
    # numpy's maximum, for it does not lose a NaN.
    return {
        "T of the flow: largest error": (
            float(np.max([abs(r.flow.time - r.truth.time) for r in rows])),
            0.0,
            TIME_BOUND,
        ),
        "largest |h N - T|, in steps": (float(np.max([abs(r.gap) for r in far])), 0.0, STEPS_BOUND),
        "flow on another oscillation": (
            float(sum(r.flow.minima != r.truth.minima for r in rows)),
            0.0,
            0.0,
        ),
        "iteration on another oscillation": (
            float(sum(r.run.minima != r.truth.minima for r in far)),
            0.0,
            0.0,
        ),
        "no warning just above a jump": (
            float(sum(not r.flow.warned for r in rows if r.damping in above)),
            0.0,
            0.0,
        ),
        "warnings a tenth away from a jump": (
            float(sum(r.flow.warned for r in rows if r.distance > FAR_FROM_A_JUMP)),
            0.0,
            0.0,
        ),
    }


def _jumps(context: Context, dampings: Sequence[float], steps: Sequence[float]) -> list[Jump]:
    """The jumps between neighbours of the grid, by the closed form and on both sides.

    Raises:
        ValueError: No jump between the dampings.
    """
    counts = [first_crossing(a).minima for a in dampings]
    places = [i for i, (a, b) in enumerate(itertools.pairwise(counts)) if a != b]
    if not places:
        raise ValueError("dampings: T does not jump between them, so there is nothing to compare")
    brackets = [(dampings[i], dampings[i + 1]) for i in places]
    exact = [jump(lambda a: first_crossing(a).minima, *ends, 1e-12) for ends in brackets]
    # A side that does not jump in here has no jump to show, and raises. Off the middle, for at the
    # jump itself J touches the target, and no T has a derivative.
    cells = [
        Bracket(e - reach, e + 0.9 * reach, step)
        for e in exact
        for step, reach in ((None, FLOW_REACH), *((h, ITERATION_REACH * h) for h in steps))
    ]
    found = iter(context.map(jump_of, cells))
    jumps = []
    for e in exact:
        flow, *runs = (next(found) for _ in range(1 + len(steps)))
        fit = fit_slope(steps, [abs(run - e) for run in runs])
        jumps.append(Jump(e, flow, tuple(runs), fit))
    return jumps


def _table(rows: Sequence[Row]) -> Table:
    return Table(
        "Dampings",
        [
            "damping",
            "T",
            "minima before T",
            "error of the flow's T",
            "flow: minima",
            "(h N - T)/h",
            "iteration: minima",
            "warned",
        ],
        [
            [
                r.damping,
                r.truth.time,
                r.truth.minima,
                abs(r.flow.time - r.truth.time),
                r.flow.minima,
                r.gap,
                r.run.minima,
                r.flow.warned,
            ]
            for r in rows
        ],
        "T: closed form, in flow time. Minima: of J before the crossing. Warned: that T is about "
        "to jump.",
    )


def _jump_table(jumps: Sequence[Jump], steps: Sequence[float]) -> Table:
    rows: list[list[Any]] = []
    for j in jumps:
        rows.append([j.damping, "flow", j.flow, j.flow - j.damping, None])
        rows += [
            [j.damping, f"iteration, h = {h:g}", run, run - j.damping, (run - j.damping) / h]
            for h, run in zip(steps, j.runs, strict=True)
        ]
    return Table(
        "Dampings at which T jumps",
        ["closed form", "side", "found", "difference", "difference / h"],
        rows,
        "By bisection on the number of minima of J before the crossing.",
    )


def _figure(rows: Sequence[Row], jumps: Sequence[Jump]) -> Figure:
    figure, axes = new_figure(width=4.4)
    ends = [rows[0].damping, *(j.damping for j in jumps), rows[-1].damping]
    for low, high in itertools.pairwise(ends):
        # Closer together towards the upper end, where T has a root in the damping; off both ends,
        # which are jumps.
        piece = low + (high - low) * (1.0 - np.linspace(1.0 - 1e-5, 1e-3, 40) ** 2)
        times = [first_crossing(float(a)).time for a in piece]
        label = "closed form" if low == ends[0] else None
        axes.plot(piece, times, color="#555555", linewidth=1.0, label=label)
    for j in jumps:
        axes.axvline(j.damping, color="#555555", linestyle=":", linewidth=0.8)
    dampings = [r.damping for r in rows]
    axes.plot(
        dampings,
        [r.flow.time for r in rows],
        linestyle="none",
        marker=MARKERS[0],
        color=COLOURS[0],
        markerfacecolor="white",
        label="T, flow",
    )
    axes.plot(
        dampings,
        [r.run.time for r in rows],
        linestyle="none",
        marker="x",
        color=COLOURS[1],
        label=f"h N, h = {rows[0].step:g}",
    )
    loud = [r for r in rows if r.flow.warned]
    axes.plot(
        [r.damping for r in loud],
        [r.truth.time + 0.04 for r in loud],
        linestyle="none",
        marker="v",
        color=COLOURS[4],
        label="warned",
    )
    axes.set(xlabel="damping", ylabel="first crossing (flow time)")
    axes.legend(loc="upper left")
    caption = (
        "Stopping time and index over the damping. Dotted: where T jumps, as a dip of J no longer "
        "reaches the target. Triangles: the library warned that T is about to jump."
    )
    return Figure(
        "over-damping", caption, figure, "three flat pieces with two jumps, all markers on"
    )


def _jump_figure(jumps: Sequence[Jump], steps: Sequence[float]) -> Figure:
    figure, axes = new_figure()
    for position, j in enumerate(jumps):
        axes.plot(
            steps,
            [abs(run - j.damping) for run in j.runs],
            marker=MARKERS[position],
            color=COLOURS[position],
            markerfacecolor="white",
            label=f"jump at {j.damping:.4f}: slope {j.fit.slope:.2f}",
        )
    log_axes(axes)
    axes.set(xlabel=r"step size $h$ (flow time)", ylabel="distance of the iteration's jump")
    axes.legend(loc="best")
    caption = (
        "Distance between the dampings at which N and T jump, over the step size: it falls at "
        "first order, so that both sides are on the same oscillation but for an interval of O(h)."
    )
    return Figure("jumps", caption, figure, "two lines of slope one")
