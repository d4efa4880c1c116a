"""`check_index_gradient`: the gradient of a fractional stopping index against independent roads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from ode_stopping.checking.differences import (
    along,
    compared,
    difference_slopes,
    gradients_of,
    require_reached,
    require_subjects,
    rounding_of,
    widened,
)
from ode_stopping.checking.ladder import Slope
from ode_stopping.checking.quiet import listening, quiet
from ode_stopping.checking.report import Finding, GradientReport
from ode_stopping.checking.subjects import Call, Directions, Subject, chosen_directions, subjects_of
from ode_stopping.core.states import State
from ode_stopping.core.status import GradientError, Status
from ode_stopping.core.validation import Direction, require_count, require_instance

from .gradients.adjoint import DiscreteAdjoint, IndexRoute, Truncated, Unrolled
from .gradients.problem import IndexProblem
from .result import StoppingIndexResult
from .stopping import Interpolation, stopping_index

__all__ = ["check_index_gradient"]

# The iteration is differentiated as it ran: what remains is rounding, summed over the steps and
# divided by a decrease. Half the digits are a bound that leaves it room.
_PROMISE_PER_ROOT_EPS = 10.0
# Rounding of J, in units of eps, that ends up in the index.
_ROUNDING = 10.0
# A moved iteration that takes this many times as long is too far from the one that is checked.
_PATIENCE = 4
# Numbers in the graph of the whole loop above which it is not built.
_UNROLLED_NUMBERS = 10_000_000
_UNROLLED_STEPS = 20_000
UNROLLED = "unrolled loop"
ADJOINT = "discrete adjoint"


def check_index_gradient(
    update: Callable[..., Any],
    x0: State,
    criterion: Callable[..., Any],
    target: float | Tensor,
    *,
    gradient: IndexRoute = DiscreteAdjoint(),  # noqa: B008 - immutable
    interpolation: Interpolation | None = "log",
    t0: float | Tensor = 0.0,
    direction: Direction = "falling",
    leave_first: bool = False,
    max_steps: int = 1_000_000,
    directions: int = 3,
    seed: int = 0,
    params: Iterable[Tensor] | None = None,
) -> GradientReport:
    """Compare the gradient of N* by one route with independent roads, leaf by leaf.

    The twin of `ode_stopping.check_stopping_gradient`. The roads, each along the same random
    directions in every leaf, x0, target and t0 that requires grad:

    - central differences of N* on a ladder of step sizes; the best plateau counts. N* is continuous
      where N jumps, with a kink: the ladder goes down until it does not see the next one, and where
      the kink is at the point itself both one-sided slopes are reported, and the gradient has to be
      one of them or lie between them;
    - reverse mode through the unrolled loop (Proposition 1 of arXiv 2505.22509), up to 20,000 steps
      and 10 million numbers; the discrete adjoint where the unrolled loop is the route.

    A row passes within 10 sqrt(eps of the dtype), relative to the largest figure of its leaf, and
    three times what its reference is uncertain by.

    Cost: about 6 to 16 runs for every leaf and direction, and one run with a graph. Nothing of the
    user's is changed, not for a moment: other values are seen in the place of parameters, and x0,
    target and t0 are copied.

    Args:
        update: As for `stopping_index`.
        x0: As for `stopping_index`.
        criterion: As for `stopping_index`.
        target: As for `stopping_index`.
        gradient: The route that is checked. A `Truncated` one is wrong on purpose and is found to
            be, unless its sum is full.
        interpolation: The fractional index; None has no differences to be held against.
        t0: As for `stopping_index`.
        direction: As for `stopping_index`.
        leave_first: As for `stopping_index`.
        max_steps: As for `stopping_index`.
        directions: Random directions a leaf.
        seed: Seed of the directions.
        params: As for `stopping_index`.

    Returns:
        The report, with N* as `.time` and J_N - J_{N-1} as `.rate`. A route that refuses (a
        GradientError) has failed, with its reason.

    Raises:
        TypeError, ValueError: Bad input; `interpolation=None`; nothing requires grad; or the target
            is not reached, or met at the start (the message names the status).
    """
    if interpolation is None:
        raise ValueError(
            "interpolation=None cannot be checked by differences: N is a step function, whose "
            "slopes are 0 or infinite, and Definition 3 is not one of them. Use "
            'interpolation="log", "hermite" or "partial_step"'
        )
    if gradient is None:
        raise TypeError("gradient must be a route, as DiscreteAdjoint(); got None")
    require_instance(gradient, IndexRoute, name="gradient")
    require_count(directions, name="directions")
    call = Call.of(x0, target, t0)
    named = None if params is None else list(params)
    job = _Job(update, criterion, interpolation, direction, leave_first, max_steps, named)
    with torch.enable_grad():
        return _checked(job, call, gradient, directions, seed)


@dataclass
class _Job:
    """The arguments that stay the same from one run to the next.

    Attributes:
        runs: Number of runs so far.
    """

    update: Callable[..., Any]
    criterion: Callable[..., Any]
    interpolation: Interpolation
    direction: Direction
    leave_first: bool
    max_steps: int
    params: list[Tensor] | None
    runs: int = 0

    def run(
        self, call: Call, route: IndexRoute | None, *, limit: int | None = None
    ) -> StoppingIndexResult:
        """One run; a bad end is in the status."""
        self.runs += 1
        return stopping_index(
            self.update,
            call.x0,
            self.criterion,
            call.target,
            t0=call.t0,
            direction=self.direction,
            leave_first=self.leave_first,
            max_steps=self.max_steps if limit is None else min(limit, self.max_steps),
            gradient=route,
            interpolation=self.interpolation,
            params=self.params,
            throw=False,
        )


def _checked(
    job: _Job, call: Call, route: IndexRoute, directions: int, seed: int
) -> GradientReport:
    error, problem = "", None
    gradients: list[Tensor] = []
    subjects: list[Subject] = []
    with listening() as warned:
        try:
            result = job.run(call, route)
            require_reached(result)
            problem = result.problem
            assert problem is not None
            subjects = _subjects(job, call, result, problem)
            gradients = gradients_of(result.steps, subjects)
        except GradientError as refused:
            error = f"{type(refused).__name__}: {refused}"
    if isinstance(route, Truncated):
        warned.append(f"{route} leaves out what earlier steps contribute, on purpose")
    if problem is None:
        with quiet():
            result = job.run(call.detached(), None)
        require_reached(result)
    report = GradientReport(
        "N*",
        type(route).__name__,
        float(result.steps.detach()),
        float(result.decrease),
        error=error,
        warnings=tuple(warned),
    )
    if problem is None or error:
        return report
    chosen = chosen_directions(subjects, directions, seed)
    with quiet():
        findings = _findings(job, call, route, problem, chosen, gradients, report.time)
    names = tuple(subject.name for subject in subjects)
    return replace(report, findings=tuple(findings), subjects=names, solves=job.runs - 1)


def _findings(
    job: _Job,
    call: Call,
    route: IndexRoute,
    problem: IndexProblem,
    chosen: Directions,
    gradients: list[Tensor],
    at: float,
) -> list[Finding]:
    """Finite differences and another exact route, subject by subject."""
    promise = _PROMISE_PER_ROOT_EPS * sqrt(torch.finfo(problem.x0.dtype).eps)
    chosen = widened(chosen, gradients, _noise(problem), promise)
    subjects = [subject for subject, _ in chosen]
    others, road, why_not = _other_road(job, call, route, problem, subjects)
    exact: list[list[Slope | None]] | None = None
    if others is not None:
        exact = [
            [Slope(along(other, move), 0.0, 0.0) for move in moves]
            for other, (_, moves) in zip(others, chosen, strict=True)
        ]
    return compared(
        chosen,
        gradients,
        lambda subject, moves, gradient: _differences(
            job, call, subject, moves, gradient, problem, at, promise
        ),
        promise=promise,
        least=rounding_of(problem.index, problem.x0.dtype),
        road=road,
        others=exact,
        why_not=why_not,
        parts=problem.index,
    )


def _subjects(
    job: _Job, call: Call, result: StoppingIndexResult, problem: IndexProblem
) -> list[Subject]:
    subjects = subjects_of(
        call,
        problem.leaves,
        {"update": job.update, "criterion": job.criterion},
        job.params,
        span=problem.clock.step_value * problem.index,
        height=float(
            (result.trajectory.losses - problem.criterion.shown(problem.target)).abs().max()
        ),
    )
    require_subjects(subjects, "N*")
    return subjects


def _differences(
    job: _Job,
    call: Call,
    subject: Subject,
    moves: list[Tensor],
    gradient: Tensor,
    problem: IndexProblem,
    at: float,
    promise: float,
) -> tuple[list[Slope | None], str]:
    """Slopes of N*, and why there are none where there are none."""
    limit = _PATIENCE * problem.index + 10

    def solve(shifted: Call) -> tuple[Status, float]:
        result = job.run(shifted, None, limit=limit)
        return result.status, float(result.steps)

    return difference_slopes(
        call, subject, moves, gradient, solve, at=at, noise=_noise(problem), promise=promise
    )


def _noise(problem: IndexProblem) -> float:
    """Rounding of N*: s is J's distance to the target over its decrease, and so is that in it."""
    eps = torch.finfo(problem.x0.dtype).eps
    height = max(abs(problem.previous_loss), abs(problem.loss), abs(problem.target))
    return _ROUNDING * eps * height / abs(problem.decrease) + eps * problem.index


def _other_road(
    job: _Job, call: Call, route: IndexRoute, problem: IndexProblem, subjects: list[Subject]
) -> tuple[list[Tensor] | None, str, str]:
    """The gradients by another exact route, its name, and why there are none if there are none."""
    other: IndexRoute = Unrolled()
    road = UNROLLED
    if isinstance(route, Unrolled):
        other, road = DiscreteAdjoint(), ADJOINT
    else:
        steps, numbers = problem.index, problem.index * problem.x0.numel()
        if steps > _UNROLLED_STEPS or numbers > _UNROLLED_NUMBERS:
            return None, road, f"{steps} steps of {problem.x0.numel()} numbers are too many"
    try:
        result = job.run(call, other)
        require_reached(result)
        return gradients_of(result.steps, subjects), road, ""
    except GradientError as error:
        return None, road, f"{type(error).__name__}: {error}"
