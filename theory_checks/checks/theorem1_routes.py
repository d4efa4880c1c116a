"""Theorem 1 on rotated problems: gradient routes against the truth, and the plain road."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..plotting import COLOURS, MARKERS, new_figure
from ..registry import Context, Figure, Outcome, Table, check
from ._odeint_adjoint import BACKWARD, FORWARD
from ._rotated import PLAIN_MAX_STEPS, PLAIN_RTOL, ROUTES, WITNESS, Answer, Cell, solve

DEFAULT = "StepAdjoint"
TARGET = 1e-3
MILD_TARGET = 1e-2
RTOL = 1e-9
TRUTH_RTOL = 1e-11
DEFAULT_BOUND = 1e-6
BACKSOLVE_BOUND = 1e3 * RTOL


@check(
    name="theorem-1-routes",
    title="Gradient routes on rotated quadratics and the quartic",
    source="Theorem 1",
    group="theorem-1",
    order=11,
)
def routes(context: Context) -> Outcome:
    """On stiff problems in a rotated basis, the default route is right and no route is wrong.

    x' = -p grad f(x), J = |grad f|^2, d = 50; f = x^T Q x/2 with Q rotated and of condition number
    10, 100 and 1000, and the same with a quartic term. Differentiated to p and to x0. Truth: the
    eigen-decomposition for quadratics, differentiation through the solver at rtol 1e-11 for the
    quartic. By the five routes (`StepAdjoint`, the default: the exact transpose of the accepted
    steps; `InterpolatingAdjoint`, Theorem 1's continuous adjoint as the theory has it) and by an
    independent witness, that same adjoint solved by torchdiffeq's `odeint` alone over a forward
    solve that was kept, with nothing of this library's solver, search or quotient in it.

    Measured: the relative error of the gradient at rtol 1e-9, and whether StepAdjoint gave its own
    numbers rather than those it falls back to. Expected: 0. Tolerance: 1e-6 for every route and
    the witness; 1e3 rtol for `BacksolveAdjoint` where it does not refuse to answer. The row
    "torchdiffeq alone" (odeint_event with odeint_adjoint, at rtol 1e-6 and eps = 1e-3) is a
    diagnostic and never judged: x integrated backward grows as exp(L (T - t0)). A mild quadratic
    (d = 10, condition 3), on which every route has to answer, comes first. In the quick
    profile ForwardSensitivity, with a column for each of 2 d numbers, runs on that one only, and
    DirectAdjoint and the witness up to condition 100.
    """
    seed = context.seed
    problems = [Cell("quadratic", 10, 3.0, MILD_TARGET, seed, "", RTOL)]
    problems += [Cell("quadratic", 50, c, TARGET, seed, "", RTOL) for c in (10.0, 100.0, 1000.0)]
    problems.append(Cell("quartic", 50, 10.0, TARGET, seed, "", RTOL))
    most_columns = context.choose(quick=20, paper=100)
    cells = []
    for problem in problems:
        roads = [*ROUTES, WITNESS]
        if 2 * problem.dim > most_columns or problem.condition > 100.0:
            roads.remove("ForwardSensitivity")
        if problem.condition > context.choose(quick=100.0, paper=1000.0):
            roads.remove("DirectAdjoint")
            roads.remove(WITNESS)
        cells += [replace(problem, road=road) for road in roads]
        rtol = RTOL if problem.kind == "quadratic" else TRUTH_RTOL
        cells.append(replace(problem, road="truth", rtol=rtol))
    plain = [replace(p, road="plain", rtol=PLAIN_RTOL) for p in problems if p.condition <= 100.0]
    return judge_routes(context, cells, plain)


def judge_routes(context: Context, cells: Sequence[Cell], plain: Sequence[Cell]) -> Outcome:
    """The check on a choice of problems and roads; each problem has its road "truth" among them."""
    everything = [*cells, *plain]
    context.progress(f"{len(everything)} solves on rotated problems")
    order = sorted(everything, key=lambda c: (-c.condition, c.road != "ForwardSensitivity"))
    found = dict(zip(order, context.map(solve, order), strict=True))
    truths = {c.problem: answer for c, answer in found.items() if c.road == "truth"}
    measured: dict[str, float] = {}
    bounds: dict[str, float] = {}
    rows: list[list[Any]] = []
    for cell in everything:
        answer, truth = found[cell], truths[cell.problem]
        error = answer.error(truth)
        name = "torchdiffeq alone" if cell.road == "plain" else cell.road
        of_time = abs(answer.time - truth.time) / truth.time
        if cell.road != "truth":
            cost = answer.cost if any(answer.cost) else (None, None)
            rtol = None if cell.road == WITNESS else cell.rtol
            said = "fell back" if answer.fallback else answer.raised.split(":")[0]
            rows.append([cell.problem, name, rtol, of_time, error, *cost, said])
        if cell.road in (*ROUTES, WITNESS):
            _judge(cell, error, of_time, answer, measured, bounds)
    return Outcome.below(
        measured,
        bounds,
        details={
            "rtol": RTOL,
            "dtype": "float64",
            "truth of the quartic": f"DirectAdjoint, dopri8 at rtol {TRUTH_RTOL:g}",
            WITNESS: f"forward {FORWARD}, backward {BACKWARD}",
            "torchdiffeq alone": _plain_details(plain, found, truths),
        },
        tables=[
            Table(
                "Gradient (dT/dp, dT/dx0) against the truth",
                [
                    "problem",
                    "route",
                    "rtol",
                    "error of T",
                    "error of the gradient",
                    "evaluations forward",
                    "backward",
                    "raised, or fell back",
                ],
                rows,
                "Relative errors, in norm. Not a number: the route raised instead of answering. "
                "The rows of torchdiffeq alone are diagnostics, limited to "
                f"{PLAIN_MAX_STEPS} steps in each direction.",
            )
        ],
        figures=[_figure(everything, found, truths)],
    )


def _figure(cells: Sequence[Cell], found: dict[Cell, Answer], truths: dict[str, Answer]) -> Figure:
    figure, axes = new_figure()
    for position, road in enumerate([*ROUTES, WITNESS, "plain"]):
        chosen = [c for c in cells if c.road == road and c.kind == "quadratic"]
        errors = [found[c].error(truths[c.problem]) for c in chosen]
        axes.plot(
            [c.condition for c in chosen],
            errors,
            marker=MARKERS[position],
            color=COLOURS[position],
            markerfacecolor="white",
            label="torchdiffeq alone (rtol 1e-6)" if road == "plain" else road,
        )
    axes.axhline(DEFAULT_BOUND, color="#555555", linestyle=(0, (4, 3)), label="bar")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="condition number of the quadratic",
        ylabel="relative error of the gradient",
    )
    axes.legend(loc="best")
    caption = (
        f"Error of the gradient of T against the eigen-decomposition at rtol {RTOL:g}, over the "
        "condition number of a rotated quadratic. BacksolveAdjoint has no point where it refused; "
        "torchdiffeq's own adjoint (at rtol 1e-6) answers, and is wrong, from condition 10 on."
    )
    return Figure("condition", caption, figure, "errors near rtol, and one road far above one")


def _judge(
    cell: Cell,
    error: float,
    of_time: float,
    answer: Answer,
    measured: dict[str, float],
    bounds: dict[str, float],
) -> None:
    """Enter one road's error and its bound; a refusal of a stiff problem is no error.

    Routes share T, which is entered once; the witness has found its own.
    """
    if cell.road == DEFAULT:
        measured[f"T: {cell.problem}"], bounds[f"T: {cell.problem}"] = of_time, DEFAULT_BOUND
        # The identity has then seen a wrong transpose, and the continuous adjoint has hidden it.
        name = f"{cell.road} fell back: {cell.problem}"
        measured[name], bounds[name] = float(bool(answer.fallback)), 0.0
    if cell.road == WITNESS:
        name = f"T, {cell.road}: {cell.problem}"
        measured[name], bounds[name] = of_time, DEFAULT_BOUND
    refusal_allowed = cell.target != MILD_TARGET
    if cell.road == "BacksolveAdjoint" and answer.raised and refusal_allowed:
        return
    name = f"{cell.road}: {cell.problem}"
    measured[name] = error
    bounds[name] = BACKSOLVE_BOUND if cell.road == "BacksolveAdjoint" else DEFAULT_BOUND


def _plain_details(
    plain: Sequence[Cell], found: dict[Cell, Answer], truths: dict[str, Answer]
) -> dict[str, str]:
    """One sentence a problem on what torchdiffeq's own road gave."""
    said = {}
    for cell in plain:
        answer, truth = found[cell], truths[cell.problem]
        of_time = abs(answer.time - truth.time) / truth.time
        what = answer.raised or f"relative error of the gradient {answer.error(truth):.2g}"
        said[cell.problem] = f"relative error of T {of_time:.1g}; {what}"
    return said
