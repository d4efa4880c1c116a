"""`check_stopping_gradient`: the gradient of a stopping time against independent roads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, is_dataclass, replace
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.states import State
from ..core.status import GradientError, Status, StoppingError
from ..core.validation import Direction, require_count, require_instance
from ..gradients import ForwardSensitivity, GradientRoute, StepAdjoint
from ..gradients.problem import StoppingProblem
from ..result import StoppingResult
from ..solving.solver import PROMISE_PER_RTOL, Solver
from ..solving.torchdiffeq import Torchdiffeq, adaptive_methods
from ..stopping import stopping_time
from .differences import (
    compared,
    difference_slopes,
    gradients_of,
    require_reached,
    require_subjects,
    rounding_of,
    widened,
)
from .identities import identity_findings
from .ladder import Slope
from .quiet import listening, quiet
from .report import (
    AT_A_KINK,
    FORWARD_SENSITIVITY,
    NOTHING,
    SAME_ROAD,
    Finding,
    GradientReport,
)
from .sensitivity import sensitivity_slopes
from .subjects import Call, Directions, Subject, chosen_directions, subjects_of

__all__ = ["check_stopping_gradient"]

# The references are solved at this fraction of rtol, but no looser and no tighter than these.
_TIGHTER = 1e-2

_TIGHT = 1e-10

_FLOOR_IN_EPS = 20.0

# A method of high order takes long steps at a tight tolerance.
_TIGHT_METHOD = "dopri8"

# A moved problem that takes this many times as long as the one that is checked is too far from it.
_PATIENCE = 3.0


def check_stopping_gradient(
    flow: Callable[..., Any],
    x0: State,
    criterion: Callable[..., Any],
    target: float | Tensor,
    *,
    gradient: GradientRoute = StepAdjoint(),  # noqa: B008 - immutable
    solver: Solver | None = None,
    t0: float | Tensor = 0.0,
    direction: Direction = "falling",
    leave_first: bool = False,
    max_time: float | None = None,
    directions: int = 3,
    seed: int = 0,
    params: Iterable[Tensor] | None = None,
    breakpoints: Iterable[float] | None = None,
) -> GradientReport:
    """Compare the gradient of T by one route with independent roads, leaf by leaf.

    The roads, each along the same random directions in every leaf, x0, target and t0 that requires
    grad:

    - central differences of T on a ladder of step sizes, solved at a tight tolerance without any
      gradient; the best plateau counts. At a kink the two one-sided slopes are reported, and the
      gradient has to be one of them or lie between them (path-differentiable);
    - forward sensitivity, s' = F_x s + F_theta d, at the tight tolerance: no adjoint, no dense
      output, and dT = -(grad J^T s + dJ/dtheta d)/J'(T) (Theorem 1 of arXiv 2505.22509);
    - the identities of the adjoint (dT/dt0 two ways; lam^T x' = -1 on autonomous problems);
    - the same route again at a tenth of the tolerance.

    A row passes within the promise (50 rtol, see `evidence`), relative to the largest figure of its
    leaf, and three times what its reference is uncertain by. The verdict is "right" where no row
    fails and every leaf was judged by differences or sensitivity; else "wrong", "kink" or "noise"
    (`GradientReport.verdict`, `.verdicts` leaf by leaf). The differences also tell the order of the
    Taylor remainder |T(theta + h d) - T(theta) - h dT.d|: about 2 where the gradient is right.

    Cost: about 6 to 16 solves at a tight tolerance for every leaf and direction (a kink or a wrong
    gradient takes 16), and one joint solve with all directions; a single number has one direction.
    Nothing of the user's is changed, not for a moment: other values are seen in the place of
    parameters, and x0, target and t0 are copied.

    Args:
        flow: As for `stopping_time`.
        x0: As for `stopping_time`.
        criterion: As for `stopping_time`.
        target: As for `stopping_time`.
        gradient: The route that is checked.
        solver: The solver that is checked with it.
        t0: As for `stopping_time`.
        direction: As for `stopping_time`.
        leave_first: As for `stopping_time`.
        max_time: As for `stopping_time`.
        directions: Random directions a leaf.
        seed: Seed of the directions.
        params: As for `stopping_time`.
        breakpoints: As for `stopping_time`.

    Returns:
        The report. A route that refuses (a GradientError) has failed, with its reason.

    Raises:
        TypeError, ValueError: Bad input; nothing requires grad; or the problem itself has no
            transversal crossing (the message names its status).
    """
    if gradient is None:
        raise TypeError("gradient must be a route, as StepAdjoint(); got None")
    require_instance(gradient, GradientRoute, name="gradient")
    require_count(directions, name="directions")
    call = Call.of(x0, target, t0)
    job = _Job(
        flow,
        criterion,
        solver if solver is not None else Torchdiffeq(),
        direction,
        leave_first,
        max_time,
        None if params is None else list(params),
        None if breakpoints is None else list(breakpoints),
    )
    with torch.enable_grad():
        return _checked(job, call, gradient, directions, seed)


@dataclass
class _Job:
    """The arguments that stay the same from one solve to the next.

    Attributes:
        runs: Number of solves so far.
    """

    flow: Callable[..., Any]
    criterion: Callable[..., Any]
    solver: Solver
    direction: Direction
    leave_first: bool
    max_time: float | None
    params: list[Tensor] | None
    breakpoints: list[float] | None
    runs: int = 0

    def solve(
        self,
        call: Call,
        route: GradientRoute | None,
        solver: Solver,
        *,
        params: list[Tensor] | None = None,
        horizon: float = inf,
        evidence: Literal["light", "standard"] = "light",
    ) -> StoppingResult:
        """One run; a bad end is in the status."""
        self.runs += 1
        limit = self.max_time if self.max_time is None else min(float(self.max_time), horizon)
        if limit is None and horizon < inf:
            limit = horizon
        return stopping_time(
            self.flow,
            call.x0,
            self.criterion,
            call.target,
            t0=call.t0,
            direction=self.direction,
            leave_first=self.leave_first,
            max_time=limit,
            solver=solver,
            gradient=route,
            params=params if params is not None else self.params,
            breakpoints=self.breakpoints,
            throw=False,
            evidence=evidence,
        )


@dataclass(frozen=True)
class _Answer:
    """The gradient by the route that is checked."""

    problem: StoppingProblem
    subjects: list[Subject]
    gradients: list[Tensor]


def _checked(
    job: _Job, call: Call, route: GradientRoute, directions: int, seed: int
) -> GradientReport:
    name = type(route).__name__
    error = ""
    answer = None
    with listening() as warned:
        try:
            # What a call gives that asks for nothing else.
            result = job.solve(call, route, job.solver, evidence="standard")
            require_reached(result)
            subjects = _subjects(job, call, result)
            assert result.problem is not None
            gradients = gradients_of(result.time, subjects)
            answer = _Answer(result.problem, subjects, gradients)
        except GradientError as refused:
            error = f"{type(refused).__name__}: {refused}"
    if answer is None:
        with quiet():
            result = job.solve(call.detached(), None, job.solver)
        require_reached(result)
        time, rate = float(result.time), float(result.rate)
        return GradientReport("T", name, time, rate, error=error, warnings=tuple(warned))
    problem = answer.problem
    promise = problem.call.promise
    chosen = widened(
        chosen_directions(answer.subjects, directions, seed),
        answer.gradients,
        _tight(problem).tolerances(problem.x0.dtype).rtol * (problem.end - problem.start),
        promise,
    )
    with quiet():
        findings = _against_references(job, call, answer, chosen, promise)
        findings += identity_findings(problem, route, promise)
        kinks = {finding.subject for finding in findings if finding.sides is not None}
        findings += _against_itself(job, call, answer, route, promise, kinks)
    return GradientReport(
        "T",
        name,
        problem.end,
        problem.criterion.shown(problem.crossing.rate),
        tuple(findings),
        tuple(subject.name for subject in answer.subjects),
        warnings=tuple(warned),
        solves=job.runs - 1,
    )


def _subjects(job: _Job, call: Call, result: StoppingResult) -> list[Subject]:
    problem = result.problem
    assert problem is not None
    target = problem.criterion.shown(problem.target)
    height = float((result.trajectory.values - target).abs().max())
    subjects = subjects_of(
        call,
        problem.leaves,
        {"flow": job.flow, "criterion": job.criterion},
        job.params,
        span=problem.end - problem.start,
        height=height,
    )
    require_subjects(subjects, "T")
    return subjects


def _against_references(
    job: _Job, call: Call, answer: _Answer, chosen: Directions, promise: float
) -> list[Finding]:
    """Finite differences and forward sensitivities, both at the tight tolerance."""
    tight = _tight(answer.problem)
    leaves = answer.problem.leaves.tensors
    reference, sums, why_not = None, None, ""
    try:
        # Sensitivities need no kept trajectory; what the route's run found need not be found again.
        result = job.solve(call, ForwardSensitivity(), tight, params=list(leaves))
        reference = result.problem
        why_not = f"{result.status.name} at the tight tolerance"
        if reference is not None:
            sums = sensitivity_slopes(reference, chosen, PROMISE_PER_RTOL)
    except (GradientError, StoppingError) as error:
        why_not = f"{type(error).__name__}: {error}"
    return compared(
        chosen,
        answer.gradients,
        lambda subject, moves, gradient: _differences(
            job, call, subject, moves, gradient, reference, tight, promise, why_not
        ),
        promise=promise,
        least=_rounding(answer.problem),
        road=FORWARD_SENSITIVITY,
        others=sums,
        why_not=why_not,
    )


def _tight(problem: StoppingProblem) -> Torchdiffeq:
    """The solver of the references."""
    solver, rtol = problem.solver, problem.tolerances.rtol
    floor = _FLOOR_IN_EPS * torch.finfo(problem.x0.dtype).eps
    tight = max(min(_TIGHTER * rtol, _TIGHT), floor)
    atol = None if solver.atol is None else solver.atol * min(tight / rtol, 1.0)
    # Another method than the one that is checked, where there is one.
    method = _TIGHT_METHOD if _TIGHT_METHOD in adaptive_methods() else "dopri5"
    return Torchdiffeq(
        method, rtol=tight, atol=atol, max_steps=solver.max_steps, max_step=solver.max_step
    )


def _differences(
    job: _Job,
    call: Call,
    subject: Subject,
    moves: list[Tensor],
    gradient: Tensor,
    reference: StoppingProblem | None,
    tight: Solver,
    promise: float,
    why_not: str,
) -> tuple[list[Slope | None], str]:
    """Slopes of T at the tight tolerance, and why there are none where there are none."""
    if reference is None:
        return [None] * len(moves), why_not
    span = reference.end - reference.start
    horizon = reference.end + _PATIENCE * span

    def solve(shifted: Call) -> tuple[Status, float]:
        result = job.solve(shifted, None, tight, horizon=horizon)
        return result.status, float(result.time)

    return difference_slopes(
        call,
        subject,
        moves,
        gradient,
        solve,
        at=reference.end,
        noise=reference.tolerances.rtol * span,
        promise=promise,
    )


def _rounding(problem: StoppingProblem) -> float:
    return rounding_of(problem.end - problem.start, problem.x0.dtype)


def _against_itself(
    job: _Job,
    call: Call,
    answer: _Answer,
    route: GradientRoute,
    promise: float,
    kinks: set[str],
) -> list[Finding]:
    """The same route at a tenth of the tolerance: the difference is an error of this run's size."""
    rtol = 0.1 * answer.problem.tolerances.rtol
    nan = float("nan")
    if rtol < _FLOOR_IN_EPS * torch.finfo(answer.problem.x0.dtype).eps:
        note = f"rtol = {rtol:g} is below what the dtype can hold"
        return [Finding("all", SAME_ROAD, nan, nan, nan, promise, None, note=note)]
    settings = job.solver
    atol = None if settings.atol is None else 0.1 * settings.atol
    own = getattr(route, "rtol", None)
    if own is not None and is_dataclass(route):
        route = replace(route, rtol=0.1 * own)
    try:
        result = job.solve(
            call, route, replace(settings, rtol=rtol, atol=atol), evidence="standard"
        )
        require_reached(result)
        again = gradients_of(result.time, answer.subjects)
    except (GradientError, StoppingError, ValueError) as error:
        note = f"{type(error).__name__}: {error}"
        return [Finding("all", SAME_ROAD, nan, nan, nan, promise, None, note=note)]
    findings = []
    for subject, first, second in zip(answer.subjects, answer.gradients, again, strict=True):
        size, other = float(first.norm()), float(second.norm())
        gap = float((first - second).norm())
        difference = gap / other if other > 0 else (0.0 if gap == 0 else inf)
        passed: bool | None = difference <= promise
        note = ""
        own = max(float(subject.tensor.detach().norm()), 1.0) if subject.kind == "leaf" else inf
        if not passed and max(size, other) * own <= _rounding(answer.problem):
            passed, note = True, NOTHING
        if not passed and subject.name in kinks:
            passed, note = None, AT_A_KINK
        findings.append(
            Finding(subject.name, SAME_ROAD, size, other, difference, promise, passed, note=note)
        )
    return findings
