"""Theorem 1 against closed forms: T and all its derivatives, by every gradient route."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ode_stopping import (
    BacksolveAdjoint,
    BacksolveMismatchError,
    DirectAdjoint,
    ForwardSensitivity,
    InterpolatingAdjoint,
    StepAdjoint,
)

from ..closed_forms import FORMS
from ..plotting import COLOURS, MARKERS, new_figure
from ..registry import Context, Figure, Outcome, Table, check

ROUTES = {
    "StepAdjoint": StepAdjoint,
    "InterpolatingAdjoint": InterpolatingAdjoint,
    "DirectAdjoint": DirectAdjoint,
    "ForwardSensitivity": ForwardSensitivity,
    "BacksolveAdjoint": BacksolveAdjoint,
}
DEFAULT = "StepAdjoint"
TARGETS = (1e-1, 1e-4, 1e-8, 1e-12)
TIGHT = 1e-10
LADDER = (1e-4, 1e-6, 1e-8, TIGHT)
LADDER_TARGET = 1e-4
TIME_BOUND = 1e-9
DERIVATIVE_BOUND = 1e-7
# Errors at a looser tolerance: at most this many times rtol, and gone down by the factor below
# from the first rung to the last.
ERROR_PER_RTOL = 1e3
FALL = 1e-3
# Below this, errors are rounding and need not fall any more.
ROUNDING = 1e-12
START = 0.25
SYMBOLS = ("theta", "phi", "theta = phi", "x0", "eps", "t0")


@dataclass(frozen=True)
class Cell:
    """One solve: a closed form, a route, a target and a relative tolerance."""

    form: str
    route: str
    target: float
    rtol: float


@dataclass(frozen=True)
class Errors:
    """Relative errors of one solve.

    Attributes:
        time: Of T.
        derivatives: Of dT/d., by symbol of the theory (norms for vectors); empty where the route
            refused to answer.
        fell_back: Whether the route gave another one's numbers.
    """

    time: float
    derivatives: dict[str, float]
    fell_back: bool = False

    @property
    def refused(self) -> bool:
        """Whether the route raised instead of answering."""
        return not self.derivatives

    @property
    def worst(self) -> float:
        """The largest error of a derivative; NaN where there is none."""
        return max(self.derivatives.values(), default=math.nan)


def solve(cell: Cell) -> Errors:
    """Relative errors of T and of its derivatives; a `BacksolveMismatchError` is a refusal."""
    form = FORMS[cell.form]
    leaves = form.leaves(cell.target, START)
    method = "dopri5" if cell.route == DEFAULT or cell.target == max(TARGETS) else "dopri8"
    result = form.solve(leaves, ROUTES[cell.route](), rtol=cell.rtol, method=method)
    try:
        result.time.backward()
    except BacksolveMismatchError:
        return Errors(form.errors(result.time, leaves)[0], {})
    of_time, of_leaves = form.errors(result.time, leaves)
    derivatives: dict[str, float] = {}
    for name, error in of_leaves.items():
        symbol = form.symbol(name)
        # Not max(): it would lose a NaN.
        derivatives[symbol] = float(np.maximum(error, derivatives.get(symbol, 0.0)))
    return Errors(of_time, derivatives, result.stats.fallback is not None)


@check(
    name="theorem-1-closed-forms",
    title="Stopping times and derivatives against closed forms",
    source="Theorem 1",
    group="theorem-1",
    order=10,
)
def closed_forms(context: Context) -> Outcome:
    """On closed forms 1 to 6, T and its derivatives are right by all five gradient routes.

    The derivatives are those to the parameters of the flow (theta), of the criterion (phi), of
    both, to x0, to the target eps and to the start t0, at eps = 1e-1, 1e-4, 1e-8 and 1e-12 (form 4
    down to 1e-4: its T grows as 1/eps). Quick: the looser tolerances and the targets between the
    largest and the smallest for the default route, StepAdjoint, only.

    Measured: the largest relative error of T and of each derivative at rtol 1e-10; the largest
    ratio of an error to rtol for rtol = 1e-4, 1e-6, 1e-8 and by how much errors fall from 1e-4 to
    1e-10; how many answers of StepAdjoint were those that it falls back to. Expected: 0. Tolerance:
    1e-9 for T, 1e-7 for derivatives. `BacksolveAdjoint` may refuse to answer (it integrates x
    backward, which is unstable), but not at the largest target of a form. Always in float64: the
    bars mean nothing in a shorter type. The default route solves with the default method, dopri5;
    the others with dopri8 below the largest target.
    """
    fewer = context.choose(quick=TARGETS[::3], paper=TARGETS)
    by_route = {route: TARGETS if route == DEFAULT else fewer for route in ROUTES}
    on_ladder = context.choose(quick=(DEFAULT,), paper=tuple(ROUTES))
    return judge_closed_forms(context, tuple(FORMS), by_route, LADDER, on_ladder)


def judge_closed_forms(
    context: Context,
    forms: Sequence[str],
    by_route: Mapping[str, Sequence[float]],
    ladder: Sequence[float],
    on_ladder: Sequence[str],
) -> Outcome:
    """The check on a choice of forms and targets by route.

    Args:
        context: The settings.
        forms: Keys of `FORMS`.
        by_route: The targets of every route (the first has them all); a route also gets the
            smallest target of a form.
        ladder: Tolerances, the tightest (which is the one that is judged) last.
        on_ladder: The routes that go through all of them, the first route among them.
    """
    tight, routes = ladder[-1], tuple(by_route)
    targets = sorted({e for chosen in by_route.values() for e in chosen}, reverse=True)
    usable = {form: [e for e in targets if e >= FORMS[form].smallest] for form in forms}
    main = [
        Cell(f, r, e, tight)
        for f in forms
        for r in routes
        for e in usable[f]
        if e in (*by_route[r], usable[f][-1])
    ]
    ends = {form: _rung_target(usable[form]) for form in forms}
    rungs = [Cell(f, r, ends[f], s) for f in forms for r in on_ladder for s in ladder]
    cells = list(dict.fromkeys([*main, *rungs]))
    # The long ones first: two workers then finish together.
    cells.sort(key=lambda c: (c.rtol, c.target, c.route != "ForwardSensitivity"))
    context.progress(f"{len(cells)} solves of closed forms")
    found = dict(zip(cells, context.map(solve, cells), strict=True))
    measured, bounds = _main_figures({cell: found[cell] for cell in main}, usable)
    if len(ladder) > 1:
        fall, ratio = _ladder_figures(found, rungs, ladder)
        measured["errors over rtol, looser tolerances"] = ratio
        bounds["errors over rtol, looser tolerances"] = ERROR_PER_RTOL
        measured["errors at the tightest over those at the loosest"] = fall
        bounds["errors at the tightest over those at the loosest"] = FALL
    refusals = [cell for cell in main if found[cell].refused]
    return Outcome.below(
        measured,
        bounds,
        details={
            "rtol": tight,
            "dtype": "float64",
            "targets by route": {route: list(chosen) for route, chosen in by_route.items()},
            "solves": len(cells),
            "refused by BacksolveAdjoint": [f"{c.form}, eps = {c.target:g}" for c in refusals],
        },
        tables=[_error_table(found, usable, routes, tight), _ladder_table(found, rungs, ladder)],
        figures=[_ladder_figure(found, forms, routes, usable, ladder)],
    )


def _rung_target(targets: Sequence[float]) -> float:
    """The target of the ladder: the usual one where the form has it, else the largest."""
    return LADDER_TARGET if LADDER_TARGET in targets else max(targets)


def _main_figures(
    found: dict[Cell, Errors], usable: dict[str, list[float]]
) -> tuple[dict[str, float], dict[str, float]]:
    """The largest errors by quantity, with their bounds; wrong refusals count, too."""
    measured = {"T": float(np.max([errors.time for errors in found.values()]))}
    bounds = {"T": TIME_BOUND}
    for symbol in SYMBOLS:
        values = [e.derivatives[symbol] for e in found.values() if symbol in e.derivatives]
        if values:
            name = f"dT/d({symbol})" if " " in symbol else f"dT/d{symbol}"
            measured[name], bounds[name] = float(np.max(values)), DERIVATIVE_BOUND
    wrongly = [
        cell
        for cell, errors in found.items()
        if errors.refused
        and (cell.route != "BacksolveAdjoint" or cell.target == max(usable[cell.form]))
    ]
    measured["refusals where an answer is due"] = float(len(wrongly))
    bounds["refusals where an answer is due"] = 0.0
    # A wrong transpose would be hidden by the continuous adjoint, which takes its place.
    measured["answers by another route"] = float(sum(e.fell_back for e in found.values()))
    bounds["answers by another route"] = 0.0
    return measured, bounds


def _ladder_figures(
    found: dict[Cell, Errors], rungs: Sequence[Cell], ladder: Sequence[float]
) -> tuple[float, float]:
    """How far errors fall over the ladder, and the largest error in units of rtol."""
    ratios, falls = [0.0], [0.0]
    for cell in rungs:
        errors = found[cell]
        worst = float(np.maximum(errors.time, 0.0 if errors.refused else errors.worst))
        if cell.rtol > ladder[-1]:
            ratios.append(worst / cell.rtol)
        if cell.rtol == ladder[0] and not errors.refused:
            last = found[Cell(cell.form, cell.route, cell.target, ladder[-1])]
            if not last.refused and not last.worst <= ROUNDING:
                falls.append(last.worst / errors.worst)
    return float(np.max(falls)), float(np.max(ratios))


def _error_table(
    found: dict[Cell, Errors],
    usable: dict[str, list[float]],
    routes: Sequence[str],
    rtol: float,
) -> Table:
    columns = sorted({target for targets in usable.values() for target in targets}, reverse=True)
    rows: list[list[object]] = []
    for form, targets in usable.items():
        of_time = [found[Cell(form, routes[0], e, rtol)].time for e in targets]
        rows.append([form, "T", *of_time, *[None] * (len(columns) - len(targets))])
        for route in routes:
            entries: list[object] = []
            for target in columns:
                errors = found.get(Cell(form, route, target, rtol))
                if errors is None:
                    entries.append(None)
                else:
                    entries.append("refused" if errors.refused else errors.worst)
            rows.append([form, route, *entries])
    return Table(
        f"Worst relative error over all derivatives, rtol {rtol:g}",
        ["form", "route", *[f"eps = {target:g}" for target in columns]],
        rows,
        "Rows named T hold the relative error of T by the first route. Refused: "
        "BacksolveAdjoint raised because x integrated backward did not come back to x0.",
    )


def _ladder_table(
    found: dict[Cell, Errors], rungs: Sequence[Cell], ladder: Sequence[float]
) -> Table:
    rows: list[list[object]] = []
    for first in [cell for cell in rungs if cell.rtol == ladder[0]]:
        entries = [found[Cell(first.form, first.route, first.target, rtol)] for rtol in ladder]
        rows.append(
            [first.form, first.route, *["refused" if e.refused else e.worst for e in entries]]
        )
    return Table(
        "Worst relative error over all derivatives, by tolerance",
        ["form", "route", *[f"rtol = {rtol:g}" for rtol in ladder]],
        rows,
        f"At eps = {LADDER_TARGET:g}, absolute tolerance a tenth of rtol times the size of x_T.",
    )


def _ladder_figure(
    found: dict[Cell, Errors],
    forms: Sequence[str],
    routes: Sequence[str],
    usable: dict[str, list[float]],
    ladder: Sequence[float],
) -> Figure:
    figure, axes = new_figure(1, 2, sharey=True)
    for axis, title in zip(axes, ("error of T", "worst error of a derivative"), strict=True):
        for position, form in enumerate(forms):
            cells = [Cell(form, routes[0], _rung_target(usable[form]), rtol) for rtol in ladder]
            errors = [found[c].time if title == "error of T" else found[c].worst for c in cells]
            axis.plot(
                ladder,
                np.maximum(errors, 1e-17),
                marker=MARKERS[position],
                color=COLOURS[position],
                markerfacecolor="white",
                label=form,
            )
        axis.plot(ladder, ladder, color="#555555", linestyle=(0, (4, 3)), label="error = rtol")
        axis.set(xscale="log", yscale="log", xlabel="rtol", title=title)
    axes[0].set_ylabel("relative error")
    axes[1].legend(loc="center", bbox_to_anchor=(0.52, 0.28), ncols=2)
    caption = (
        f"{routes[0]}: relative errors against the closed forms over the solver's tolerance, at "
        f"eps = {LADDER_TARGET:g}. Errors fall as the tolerance does; form 2 has a constant "
        "velocity, so that only rounding is left (drawn at 1e-17 where it is zero)."
    )
    return Figure("tolerance", caption, figure, "errors falling in proportion to the tolerance")
