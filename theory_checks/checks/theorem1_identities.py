"""Two exact identities of the adjoint of Theorem 1, which see its error without a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ode_stopping import (
    ExponentialSchedule,
    GradientFlow,
    GradientNorm,
    InterpolatingAdjoint,
    LossValue,
    PreconditionedFlow,
    RescaledGradientFlow,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.gradients import quotient as implicit
from ode_stopping.gradients.route import PullBack

from ..closed_forms import FORMS
from ..plotting import COLOURS, new_figure
from ..registry import Context, Figure, Outcome, Table, check
from ._problems import Setup, build, quadratic, unit_start

RTOL = 1e-9
LADDER = (1e-5, 1e-7, RTOL)
SAMPLES = 41
BOUND = 1e-6
START = 0.25
KINDS = {
    "quadratic": {"dim": 50, "condition": 100.0, "target": 1e-3},
    "quartic": {"dim": 20, "condition": 10.0, "target": 1e-3},
    "logistic": {"target": 1e-2},
}


@dataclass(frozen=True)
class Cell:
    """An autonomous problem and a tolerance."""

    setup: Setup
    rtol: float


@dataclass(frozen=True)
class Course:
    """lam(t)^T x'(t) along a path.

    Attributes:
        description: Of the problem.
        times: (n,) times, from t0 to T.
        products: (n,) values of lam^T x', -1 in theory.
    """

    description: str
    times: tuple[float, ...]
    products: tuple[float, ...]

    @property
    def worst(self) -> float:
        """The largest departure from -1."""
        return float(np.max(np.abs(np.array(self.products) + 1.0)))


def adjoint(result: StoppingResult, times: Sequence[float]) -> PullBack:
    """The continuous adjoint of T itself: lam(T) = -g / J', by the library's own quotient."""
    problem = result.problem
    assert problem is not None
    state = problem.crossing.state
    cotangent, _ = implicit.cotangent_at_crossing(
        problem.crossing, torch.ones_like(state[0]), torch.zeros_like(state)
    )
    return InterpolatingAdjoint().solve(problem, cotangent, times=times)


def along_the_path(cell: Cell) -> Course:
    """lam(t)^T x'(t) at equidistant times.

    The identity is that of an autonomous flow, so the schedule of the standard logistic problem is
    left out: the plain gradient flow.
    """
    instance = build(cell.setup)
    flow, description = instance.flow, instance.description
    if cell.setup.kind == "logistic":
        assert isinstance(flow, PreconditionedFlow)
        flow, description = GradientFlow(flow.objective), "logistic regression, breast cancer"
    result = stopping_time(
        flow,
        instance.x0,
        instance.criterion,
        instance.target,
        t0=START,
        max_time=1e4,
        solver=Torchdiffeq(rtol=cell.rtol),
        gradient=InterpolatingAdjoint(),
        evidence="light",
    )
    end = float(result.time.detach())
    times = np.linspace(START, end, SAMPLES).tolist()
    samples = adjoint(result, times).samples
    assert samples is not None
    products = []
    for t, lam in zip(times, samples, strict=True):
        x = result.trajectory(t)
        assert isinstance(x, Tensor)
        velocity = flow(torch.tensor(t, dtype=x.dtype, device=x.device), x)
        products.append(float((lam * velocity.detach()).sum()))
    return Course(description, tuple(times), tuple(products))


def two_forms(result: StoppingResult) -> tuple[float, float]:
    """dT/dt0 as -lam(t0)^T F(t0, x0), and as g^T F(T, x_T)/J' + int lam^T F_t dt."""
    problem = result.problem
    assert problem is not None
    pulled = adjoint(result, ())
    assert pulled.time is not None
    crossing = problem.crossing
    first = -float(pulled.start @ problem.flow.plain(problem.start, problem.x0))
    second = float(crossing.gradient @ crossing.velocity) / crossing.rate + pulled.time
    return first, second


@dataclass(frozen=True)
class Start:
    """A flow or criterion that depends on t; `seed` is of basis and start."""

    name: str
    seed: int
    rtol: float


def start_derivatives(case: Start) -> tuple[float, float, float]:
    """Both forms of dT/dt0, and its true value where that is known (else NaN)."""
    if case.name in FORMS:
        form, eps = FORMS[case.name], 1e-4
        result = form.solve(form.leaves(eps, START), InterpolatingAdjoint(), rtol=case.rtol)
        truth = form.answer(form.values(eps, START))["t0"]
        return (*two_forms(result), float(truth))
    solver = Torchdiffeq(rtol=case.rtol)
    setup = Setup("quadratic", 1e-3, dim=20, condition=30.0, seed=case.seed)
    objective = quadratic(setup)
    weights = torch.linspace(0.8, 1.2, 20, dtype=torch.float64)
    if case.name == MOVING_CRITERION:
        flow, base = PreconditionedFlow(objective, preconditioner=weights), LossValue(objective)
        result = stopping_time(
            flow,
            unit_start(setup),
            lambda t, x: base(t, x) * (1.0 + 0.2 * torch.sin(3.0 * t)),
            1e-4,
            t0=START,
            max_time=1e4,
            solver=solver,
            gradient=InterpolatingAdjoint(),
            evidence="light",
        )
    else:
        scheduled = RescaledGradientFlow(objective, schedule=ExponentialSchedule(1.0, 0.1))
        result = stopping_time(
            scheduled,
            unit_start(setup),
            GradientNorm(objective),
            1e-3,
            t0=START,
            max_time=1e4,
            solver=solver,
            gradient=InterpolatingAdjoint(),
            evidence="light",
        )
    return (*two_forms(result), float("nan"))


CLOSED = "form3-schedule"
SCHEDULED = "rotated quadratic, exponential schedule"
MOVING_CRITERION = "rotated quadratic, criterion f(x) (1 + sin(3 t)/5)"
STARTS = (CLOSED, SCHEDULED, MOVING_CRITERION)


@check(
    name="theorem-1-identities",
    title="Exact identities of the adjoint",
    source="Theorem 1",
    group="theorem-1",
    order=13,
)
def identities(context: Context) -> Outcome:
    """For an autonomous flow and criterion lam(t)^T x'(t) = -1 all the way from T back to t0.

    lam is that of the continuous adjoint, `InterpolatingAdjoint`. And where flow or criterion
    depend on t, the two forms of dT/dt0 agree. They are independent computations of one number:
    -lam(t0)^T F(t0, x0), and g^T F(T, x_T)/J'(T) + int lam^T F_t dt.
    Autonomous: a rotated quadratic of condition 100 with the preconditioner of 10 numbers a
    coordinate, a quartic, logistic regression. Time-dependent: closed form 3 (whose dT/dt0 is
    known), a rotated quadratic with an exponential schedule, and one with a criterion that
    oscillates.

    Measured: the largest departure from -1 at 41 times, and the relative difference of the two
    forms (and from the truth), at rtol 1e-9. Expected: 0. Tolerance: 1e-6. Both see lam along F
    only: what they do not see, the comparison with closed forms and other routes does.
    """
    return judge_identities(context, KINDS, STARTS, LADDER)


def judge_identities(
    context: Context,
    kinds: dict[str, dict[str, float]],
    starts: Sequence[str],
    ladder: Sequence[float],
) -> Outcome:
    """The check on a choice of problems and tolerances (the tightest last; it is judged)."""
    tight = ladder[-1]
    cells = {
        (kind, rtol): Cell(Setup(kind, seed=context.seed, **settings), rtol)  # type: ignore[arg-type]
        for kind, settings in kinds.items()
        for rtol in ladder
    }
    courses = dict(zip(cells, context.map(along_the_path, cells.values()), strict=True))
    cases = [Start(name, context.seed, tight) for name in starts]
    pairs = dict(zip(starts, context.map(start_derivatives, cases), strict=True))
    measured: dict[str, float] = {}
    for kind in kinds:
        measured[f"lam^T x' + 1: {kind}"] = courses[kind, tight].worst
    rows = []
    for name, (first, second, truth) in pairs.items():
        measured[f"two forms of dT/dt0: {name}"] = abs(first - second) / abs(second)
        if name == CLOSED:
            measured["dT/dt0 against closed form 3"] = abs(first - truth) / abs(truth)
        known = truth if name == CLOSED else None
        rows.append([name, first, second, abs(first - second) / abs(second), known])
    by_tolerance = [
        [courses[kind, tight].description, *[courses[kind, rtol].worst for rtol in ladder]]
        for kind in kinds
    ]
    return Outcome.below(
        measured,
        BOUND,
        details={"rtol": tight, "times": SAMPLES, "dtype": "float64"},
        tables=[
            Table(
                "Largest departure of lam^T x' from -1, by tolerance",
                ["problem", *[f"rtol = {rtol:g}" for rtol in ladder]],
                by_tolerance,
            ),
            Table(
                "Two forms of dT/dt0",
                ["problem", "-lam(t0)^T F", "g^T F/J' + integral", "relative difference", "truth"],
                rows,
            ),
        ],
        figures=[_figure(courses, kinds, ladder)],
    )


def _figure(
    courses: dict[tuple[str, float], Course],
    kinds: dict[str, dict[str, float]],
    ladder: Sequence[float],
) -> Figure:
    figure, grid = new_figure(1, len(kinds), width=3.0, sharey=True)
    panels = [grid] if len(kinds) == 1 else list(grid)
    for axis, kind in zip(panels, kinds, strict=True):
        for position, rtol in enumerate(ladder):
            course = courses[kind, rtol]
            gaps = np.maximum(np.abs(np.array(course.products) + 1.0), 1e-16)
            axis.plot(course.times, gaps, color=COLOURS[position], label=f"rtol = {rtol:g}")
        axis.set(yscale="log", xlabel=r"flow time $t$", title=kind)
    panels[0].set_ylabel(r"$|\lambda(t)^{\mathsf{T}} x'(t) + 1|$")
    panels[-1].legend(loc="best")
    caption = (
        "The departure of lam(t)^T x'(t) from -1 between t0 and T, at three tolerances of the "
        "solver (lam is integrated backward from T, on the right). It goes down with the tolerance."
    )
    return Figure("course", caption, figure, "departures from -1 over time on a log axis")
