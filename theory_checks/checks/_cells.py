"""Convergence studies of the standard problems, one cached cell a step size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from discrete import Euler, Heun, RungeKutta4, UpdateRule
from ode_stopping import Torchdiffeq, stopping_time

from ..context import Context
from ..measurements import Measurement, measure_index, measure_time
from ..registry import Table
from ..slopes import SlopeFit, local_slopes
from ..studies import ConvergenceStudy, assemble
from ._problems import Instance, Setup, build

UPDATES: dict[str, type[UpdateRule]] = {"Euler": Euler, "Heun": Heun, "RungeKutta4": RungeKutta4}

# h L p: below the 1 at which a mode of Euler's iteration starts to change its sign with every step
# (at 2 it is unstable), and from there down by a decade and a half, eight values a decade.
LARGEST_FRACTION = 0.8
FRACTIONS = tuple(LARGEST_FRACTION * 10.0 ** (-k / 8) for k in range(13))


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        setup: The problem.
        step: h; None for the continuous side.
        update: A key of `UPDATES`.
        interpolation: As in `stopping_index`.
        rtol: Of the continuous side.
    """

    setup: Setup
    step: float | None = None
    update: str = "Euler"
    interpolation: str | None = None
    rtol: float = 1e-9


def measure(cell: Cell) -> Measurement:
    """Run one cell."""
    instance = build(cell.setup)
    problem = (instance.x0, instance.criterion, instance.target)
    if cell.step is None:
        # A tight reference takes a third of the evaluations by the method of higher order.
        method = "dopri8" if cell.rtol <= 1e-10 else "dopri5"
        return measure_time(
            instance.flow,
            *problem,
            parameters=instance.parameters,
            solver=Torchdiffeq(method=method, rtol=cell.rtol),
        )
    update = UPDATES[cell.update](instance.flow, step=cell.step)
    return measure_index(
        update, *problem, parameters=instance.parameters, interpolation=cell.interpolation
    )


@dataclass(frozen=True)
class Series:
    """One curve of a study: a problem, a method and its step sizes as multiples of 1/(L p).

    Attributes:
        setup: The problem.
        fractions: The values of h L p, descending.
        update: A key of `UPDATES`.
        interpolation: As in `stopping_index`.
        rtol: Of the continuous side.
        spread: Nudge the step sizes as `spread_phases` does.
    """

    setup: Setup
    fractions: Sequence[float] = FRACTIONS
    update: str = "Euler"
    interpolation: str | None = None
    rtol: float = 1e-9
    spread: bool = False


@dataclass(frozen=True)
class Result:
    """A study with the problem that it is about.

    Attributes:
        instance: The problem.
        study: The rows and slopes.
        runs: The discrete side, one measurement a step size, the largest first.
    """

    instance: Instance
    study: ConvergenceStudy
    runs: list[Measurement]


def spread_phases(instance: Instance, steps: Sequence[float]) -> list[float]:
    """Step sizes changed by less than one part in N, so that the sawtooth is met at all its phases.

    The error of Definition 3 is about h c(phase), the phase being that of (T - t0)/h between two
    whole numbers. Over a list of step sizes the phases come as they come, and their accidental
    trend shows as a wrong slope. Phases that are golden ratios apart cover the sawtooth evenly, and
    arranged symmetrically about the middle of a list that is even in log h they have no linear
    trend, whatever the function c is. The scatter stays, and so does the interval's width.
    """
    horizon = stopping_time(
        instance.flow,
        instance.x0,
        instance.criterion,
        instance.target,
        solver=Torchdiffeq(rtol=1e-7),
        gradient=None,
    )
    span = float(horizon.time)
    golden = (math.sqrt(5.0) - 1.0) / 2.0
    middle = (len(steps) - 1) / 2
    # Off the whole numbers, where N itself could turn on the last digit of h.
    phases = [(0.5 + abs(k - middle) * golden) % 1.0 for k in range(len(steps))]
    return [span / (math.floor(span / h) + phase) for h, phase in zip(steps, phases, strict=True)]


def run_series(context: Context, series: Sequence[Series]) -> list[Result]:
    """All curves at once, so that the cells of one fill the gaps that another leaves."""
    instances = [build(one.setup) for one in series]
    cells: list[list[Cell]] = []
    for one, instance in zip(series, instances, strict=True):
        steps = [fraction / instance.stiffness for fraction in one.fractions]
        if one.spread:
            steps = spread_phases(instance, steps)
        reference = Cell(one.setup, rtol=one.rtol)
        cells.append(
            [reference, *(Cell(one.setup, h, one.update, one.interpolation) for h in steps)]
        )
    every = list(dict.fromkeys(cell for group in cells for cell in group))
    # The long runs first: a short one fits in at the end, a long one would be waited for.
    every.sort(key=lambda cell: -math.inf if cell.step is None else cell.step)
    found = dict(zip(every, context.map(measure, every), strict=True))
    results = []
    for one, instance, group in zip(series, instances, cells, strict=True):
        truth, *runs = (found[cell] for cell in group)
        steps = [cell.step for cell in group if cell.step is not None]
        assert steps == sorted(steps, reverse=True)
        study = assemble(truth, steps, runs, update=one.update, interpolation=one.interpolation)
        results.append(Result(instance, study, runs))
    return results


ROW_COLUMNS = (
    "h",
    "h L p",
    "N",
    "h N",
    "T",
    "error of T",
    "error of the gradient",
    "local slope",
    "(T - t0 - hN)/h",
    "J_N - J_(N-1)",
    "flow evaluations forward",
    "backward",
    "vjps",
    "seconds",
)


def row_table(title: str, result: Result, note: str = "") -> Table:
    """All rows of a study, and those of its continuous side last."""
    study = result.study
    slopes: list[Any] = [None, *local_slopes(study.h, study.gradient_errors)]
    rows: list[list[Any]] = [
        [
            row.h,
            row.h * result.instance.stiffness,
            row.N,
            row.hN,
            row.T,
            row.time_error,
            row.gradient_error,
            slope,
            row.bracket,
            row.decrease,
            row.nfe_forward,
            row.nfe_backward,
            row.vjps,
            row.seconds,
        ]
        for row, slope in zip(study.rows, slopes, strict=True)
    ]
    side = study.reference
    seconds = side.seconds_forward + side.seconds_backward
    counts = [side.nfe_forward, side.nfe_backward, side.vjps, seconds]
    rows.append(["adaptive", *[None] * 3, side.time, *[None] * 5, *counts])
    explanation = (
        "h, h N, T in flow time; errors relative (gradients in norm over theta); the last row is "
        "the continuous side. "
    )
    return Table(title, ROW_COLUMNS, rows, explanation + note)


def fit_details(fit: SlopeFit) -> dict[str, float]:
    """A fit as plain numbers."""
    return {
        "slope": fit.slope,
        "low": fit.low,
        "high": fit.high,
        "r_squared": fit.r_squared,
        "points": fit.n,
    }


def describe_gradient(result: Result) -> str:
    """How many parameters theta has."""
    return f"{result.study.reference.gradient.numel()} parameters"
