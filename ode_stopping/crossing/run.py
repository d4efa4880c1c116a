"""The forward loop: step until the criterion is down to the target, or say why it is not.

Knows nothing of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nextafter

import torch
from torch import Tensor

from ..core.functions import CriterionMap
from ..core.stats import Stats
from ..core.status import Status
from ..solving.errors import StateError, VelocityError
from ..solving.flow_map import FlowMap
from ..solving.step import Step
from ..solving.stepper import StepFailed, Stepper
from ..solving.tolerances import Tolerances
from ..solving.torchdiffeq import Torchdiffeq
from ..solving.trajectory import Trajectory
from .near_miss import NearMiss
from .path import Path
from .point import Crossing
from .refine import refine
from .rest import Rest
from .scan import NonFiniteCriterion, Scan, scan_step

__all__ = ["Search", "find_crossing"]

# Steps that are taken again in a row because J was not resolved: a J that jumps never is.
_MAX_RETAKES = 12

# The last steps before the crossing are taken again at a fraction of the tolerance, on runs long
# enough to be stiff.
_POLISH_AFTER = 20

_POLISH = 1e-2

_POLISH_LIMIT = 500

# A step whose error is this small against the tolerance, on a run that has found its pace, was not
# limited by the flow, and J is looked at more often inside.
_EASY = 1e-3

_EASY_AFTER = 4


@dataclass
class Search:
    """Outcome of the forward run.

    Attributes:
        status: How it ended.
        time: Flow time at which it ended.
        state: State there, shape (n,).
        trajectory: The path.
        crossing: Present for REACHED and DEGENERATE.
        best: Smallest J seen, and where.
        note: One more sentence on how it ended.
        near_miss: The interior minimum of J before the crossing that came closest to the target.
        velocity_error: Largest relative error of the velocity in the steps that were looked at.
        state_error: Estimate of the error of the state by the last steps, shape (n,).
        next_step: Size of the step that would have come next, in flow time; None without steps.
    """

    status: Status
    time: float
    state: Tensor
    trajectory: Trajectory
    crossing: Crossing | None
    best: tuple[float, float]
    note: str = ""
    near_miss: NearMiss | None = None
    velocity_error: float = 0.0
    state_error: Tensor | None = None
    next_step: float | None = None


@dataclass(frozen=True)
class _Found:
    """The step that has the crossing in it, and who took it."""

    stepper: Stepper
    step: Step
    scan: Scan


def find_crossing(
    flow: FlowMap,
    criterion: CriterionMap,
    x0: Tensor,
    target: float,
    *,
    times: Sequence[float],
    settings: Torchdiffeq,
    tolerances: Tolerances,
    keep: bool,
    stats: Stats,
    steps_before: int = 0,
    first_step: float | None = None,
) -> Search:
    """Integrate from (times[0], x0) until J <= target for the first time.

    Args:
        flow: dx/dt.
        criterion: J.
        x0: Start, shape (n,).
        target: eps.
        times: The start, the times at which the flow jumps, and the horizon, increasing.
        settings: Solver.
        tolerances: Of the solve.
        keep: Whether to keep the dense output of the steps.
        stats: Counts, filled in.
        steps_before: Steps that were tried before, where this run goes on with another.
        first_step: Size of the first step, in flow time; None: the solver's choice.
    """
    path = Path(flow.layout, times[0], x0, keep, target)
    run = _Run(flow, criterion, path, target, settings, tolerances)
    run.steps_before, run.first_step = steps_before, first_step
    calls = flow.calls
    try:
        return run.through(times)
    finally:
        flow.leave()
        stats.nfe_forward = flow.calls - calls
        stats.criterion_calls = criterion.calls
        stats.control = run.control.evaluations
        stats.accepted = len(path.grid) - 1
        stats.rejected = run.rejected


class _Run:
    """One forward run: the loop over segments between breakpoints, and over steps in each."""

    def __init__(
        self,
        flow: FlowMap,
        criterion: CriterionMap,
        path: Path,
        target: float,
        settings: Torchdiffeq,
        tolerances: Tolerances,
    ) -> None:
        self.flow = flow
        self.criterion = criterion
        self.path = path
        self.target = target
        self.settings = settings
        self.tolerances = tolerances
        self.steps_before = 0
        self.first_step: float | None = None
        self.steppers: list[Stepper] = []
        self.control = self._control(tolerances)
        self.rest = Rest(tolerances)

    @property
    def rejected(self) -> int:
        """Steps that were rejected, over all segments."""
        return sum(stepper.rejected for stepper in self.steppers)

    @property
    def taken(self) -> int:
        """Steps that were tried, over all segments and in the runs that this one goes on with."""
        own = sum(stepper.accepted + stepper.rejected for stepper in self.steppers)
        return self.steps_before + own

    def _control(self, tolerances: Tolerances) -> VelocityError:
        layout = self.flow.layout
        state = StateError(layout, tolerances)
        return VelocityError(self.flow.plain, state, layout, tolerances)

    def through(self, times: Sequence[float]) -> Search:
        """Run through the segments between `times`, the start and the horizon at its ends."""
        path = self.path
        value = self.criterion.value(path.start, path.x0)
        path.begin(value)
        if not _finite(value):
            return self._end(Status.DIVERGED, path.start, path.x0, "J is not finite at t0")
        if value <= self.target:
            return self._end(Status.AT_START, path.start, path.x0)
        for index in range(len(times) - 1):
            self.flow.enter(index)
            found = self._segment(times[index], times[index + 1], last=index == len(times) - 2)
            if found is not None:
                return found
        note = f"at the horizon {times[-1]:g}"
        return self._end(Status.NOT_REACHED, path.grid[-1], path.state, note)

    def _segment(self, begin: float, end: float, *, last: bool) -> Search | None:
        """From breakpoint to breakpoint; None where it was passed without an outcome."""
        path = self.path
        # Steps before a jump are not taken again after it.
        path.recent.clear()
        if begin > path.start:
            # J may jump with the flow.
            value = self.criterion.value(nextafter(begin, end), path.state)
            if value <= self.target:
                return self._jumped(begin, path.state, value)
            path.values[-1] = value
        stepper = Stepper(
            self.settings,
            self.flow.plain,
            begin,
            end,
            path.state,
            measure=self.control,
            first_step=None if self.steppers else self.first_step,
        )
        self.steppers.append(stepper)
        if not bool(torch.isfinite(stepper.derivative).all()):
            note = f"the flow is not finite at t = {begin:.6g}"
            return self._end(Status.DIVERGED, begin, path.state, note)
        retakes = 0
        ends_at: NonFiniteCriterion | None = None
        while not stepper.done:
            if self.taken >= self.settings.max_steps:
                note = f"the step limit of {self.settings.max_steps} was used up"
                return self._end(Status.STALLED, stepper.time, stepper.value, note)
            try:
                step = stepper.attempt()
            except StepFailed as failure:
                if ends_at is not None:
                    return self._end(Status.DIVERGED, ends_at.time, stepper.value, str(ends_at))
                status = Status.DIVERGED if failure.nonfinite else Status.STALLED
                return self._end(status, stepper.time, stepper.value, str(failure))
            if step is None:
                continue
            try:
                unlimited = stepper.ratio < _EASY and stepper.accepted > _EASY_AFTER
                scan = self._scan(
                    step, path.values[-1], may_retake=retakes < _MAX_RETAKES, unlimited=unlimited
                )
            except NonFiniteCriterion as failure:
                # The crossing may come before the point where J ends: walk up to it in shorter
                # steps.
                ends_at = failure
                stepper.take_back(0.1)
                continue
            if not scan.resolved:
                stepper.take_back(scan.growth)
                retakes += 1
                continue
            retakes = 0
            if ends_at is not None and step.t1 > ends_at.time:
                ends_at = None
            path.look(scan)
            if scan.crossing is not None:
                coarse = _Found(stepper, step, scan)
                return self._finish(self._polished(coarse, end) or coarse)
            stepper.limit_next_step(scan.growth * (step.t1 - step.t0))
            path.add(step, scan.end_value)
            if (
                last
                and self.rest.is_resting(step, scan.end_value - self.target)
                and self.rest.stays(self.flow, stepper, end)
            ):
                note = f"the state has come to rest at t = {step.t1:.6g}"
                return self._end(Status.NOT_REACHED, step.t1, step.y1, note)
        return None

    def _scan(
        self, step: Step, value: float, *, may_retake: bool = False, unlimited: bool = False
    ) -> Scan:
        return scan_step(
            step,
            self.criterion,
            value,
            self.target,
            rtol=self.tolerances.rtol,
            may_retake=may_retake,
            unlimited=unlimited,
        )

    def _polished(self, coarse: _Found, end: float) -> _Found | None:
        """The last few steps again, at a hundredth of the tolerance.

        The control of the velocity keeps the noise of explicit steps at their limit of stability
        down to a few tolerances of the flow. grad J may weigh it once more by the curvature (J =
        |grad f|^2 does), and J'(T) and lam(T) are made of it. Over a few finer steps the flow
        itself damps that noise, whatever the criterion.

        Returns:
            The crossing among the finer steps, the others having replaced those in the path; or
            None, the path being as it was, where the run was short or the finer steps have no
            crossing (a touch within the tolerance).
        """
        path = self.path
        if self.steps_before + len(path.grid) <= _POLISH_AFTER:
            return None
        # Right after a jump, or after another target, the step with the crossing alone.
        first = path.recent[0] if path.recent else coarse.step
        tolerances = finer(self.tolerances, _POLISH, path.x0.dtype)
        fine = Stepper(
            self.settings,
            self.flow.plain,
            first.t0,
            min(coarse.step.t1 + (coarse.step.t1 - coarse.step.t0), end),
            first.y0,
            measure=self._control(tolerances),
            first_step=0.25 * (first.t1 - first.t0),
        )
        value = path.values[-1 - len(path.recent)]
        steps: list[tuple[Step, float]] = []
        while not fine.done and fine.accepted + fine.rejected < _POLISH_LIMIT:
            try:
                step = fine.attempt()
                if step is None:
                    continue
                scan = self._scan(step, value)
            except (StepFailed, NonFiniteCriterion):
                return None
            if scan.crossing is not None:
                path.replace_recent(steps)
                return _Found(fine, step, scan)
            steps.append((step, scan.end_value))
            value = scan.end_value
        return None

    def _finish(self, found: _Found) -> Search:
        assert found.scan.crossing is not None
        criterion = self.criterion
        last = refine(found.stepper, found.step, criterion, self.target, found.scan.crossing)
        value, g, explicit = criterion.gradient(last.t1, last.y1)
        velocity = self.flow.plain(last.t1, last.y1)
        crossing = Crossing(last.t1, last.y1, value, velocity, g, explicit)
        self.path.add(last, value)
        self.path.best = (value, last.t1)
        if not (
            _finite(value)
            and bool(torch.isfinite(velocity).all())
            and bool(torch.isfinite(g).all())
        ):
            note = "a derivative at the crossing is not finite"
            return self._end(Status.DIVERGED, last.t1, last.y1, note)
        if self._is_jump(crossing):
            note = f"J jumps over the target: J(T) - eps = {value - self.target:.3g}"
            return self._end(Status.DEGENERATE, last.t1, last.y1, note, crossing=crossing)
        if crossing.is_transversal(self.tolerances.rtol) and not found.scan.grazing:
            return self._end(Status.REACHED, last.t1, last.y1, crossing=crossing)
        note = f"J'(T) = {crossing.rate:.3g} against a scale of {crossing.rate_scale:.3g}"
        return self._end(Status.DEGENERATE, last.t1, last.y1, note, crossing=crossing)

    def _is_jump(self, crossing: Crossing) -> bool:
        """Whether J misses the target by more than T can be moved by tolerance and rounding."""
        eps = torch.finfo(crossing.state.dtype).eps
        rate, value = abs(crossing.rate), abs(crossing.value)
        in_time = 10 * self.tolerances.rtol * (crossing.time - self.path.start)
        in_time += 4 * eps * max(abs(crossing.time), abs(self.path.start))
        rounding = eps * (value + float((crossing.gradient * crossing.state).abs().sum()))
        return abs(crossing.value - self.target) > in_time * rate + 100 * rounding

    def _jumped(self, time: float, state: Tensor, value: float) -> Search:
        """J falls below the target where the flow jumps, and not by the flow."""
        _, g, explicit = self.criterion.gradient(time, state)
        crossing = Crossing(time, state, value, self.flow.plain(time, state), g, explicit)
        note = f"J jumps over the target: J(T) - eps = {value - self.target:.3g}"
        return self._end(Status.DEGENERATE, time, state, note, crossing=crossing)

    def _end(
        self,
        status: Status,
        time: float,
        state: Tensor,
        note: str = "",
        *,
        crossing: Crossing | None = None,
    ) -> Search:
        return Search(
            status,
            time,
            state,
            self.path.trajectory(),
            crossing,
            self.path.best,
            note,
            near_miss=self.path.near_miss,
            velocity_error=self.control.largest,
            state_error=self.path.state_error(),
            next_step=self.steppers[-1].next_step if self.steppers else None,
        )


def finer(tolerances: Tolerances, fraction: float, dtype: torch.dtype) -> Tolerances:
    """Tolerances `fraction` as large, but not below what the dtype can hold."""
    floor = 30 * torch.finfo(dtype).eps
    atol = None if tolerances.atol is None else fraction * tolerances.atol
    return Tolerances(max(fraction * tolerances.rtol, min(floor, tolerances.rtol)), atol)


def _finite(value: float) -> bool:
    return value - value == 0.0
