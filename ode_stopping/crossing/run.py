"""The forward loop: step until the criterion has met every target, or say why it has not.

Knows nothing of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite, nan, nextafter
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call, Watch
from ..core.memo import Memo, sharing
from ..core.stats import Stats
from ..core.status import Status
from ..solving.errors import StateError, VelocityError
from ..solving.flow_map import FlowPiece
from ..solving.solver import StepFailed, Tolerances
from ..solving.step import Step
from ..solving.stepper import Stepper
from ..solving.trajectory import Trajectory
from .near_miss import NearMiss
from .order import in_order
from .path import Path
from .point import Crossing, lam_change
from .polish import approach, polished
from .refine import refine
from .rest import Rest
from .scan import Met, NonFiniteCriterion, Scan, scan_step
from .stiffness import if_stiff
from .verdict import jump_note, verdict
from .watch import Hit
from .watches import Watches

__all__ = ["Run", "find_crossings"]

# Steps that are taken again in a row because J was not resolved: a J that jumps never is, and is
# passed in a step of this share of the time so far.
_MAX_RETAKES = 12
_SHORTEST = 1e-9
# The last steps before a crossing are taken again on runs long enough to be stiff.
_POLISH_AFTER = 20
# A step whose error is this small against the tolerance, on a run that has found its pace, was not
# limited by the flow, and J is looked at more often inside.
_EASY = 1e-3
_EASY_AFTER = 4


@dataclass(frozen=True)
class Run:
    """What a forward run found.

    Attributes:
        call: What was asked.
        hits: The watches that were met, in order of time.
        waiting: Those that still wait, as they do at the end.
        status: How the run ended: what the watches that are in no hit came to.
        time: Flow time at which it ended.
        state: State there, shape (n,).
        note: One more sentence on how it ended.
        trajectory: The path.
        best: Smallest J seen (the largest of one that rises), and where.
        near_miss: Of the targets that were missed: the turn of J that came closest to one.
        velocity_error: Largest relative error of the velocity in the steps that were looked at.
        stats: Its costs.
    """

    call: Call
    hits: tuple[Hit, ...]
    waiting: tuple[Watch, ...]
    status: Status
    time: float
    state: Tensor
    note: str
    trajectory: Trajectory
    best: tuple[float, float]
    near_miss: NearMiss | None
    velocity_error: float
    stats: Stats

    def hit(self, index: int) -> Hit | None:
        """The hit of a watch, by its place among those of the call; None for a miss."""
        return next((hit for hit in self.hits if hit.watch.index == index), None)


def find_crossings(call: Call) -> Run:
    """Integrate from (t0, x0) until J has come down to every target for the first time."""
    flow, criteria = call.flow, call.criteria
    evaluations, calls = flow.calls, sum(one.calls for one in criteria)
    with torch.no_grad(), sharing(Memo()):
        loop = _Loop(call)
        try:
            loop.through()
        except _Ended as end:
            # Not the exception itself: its traceback holds this frame, and with it the states.
            ended = end.end
        stats = Stats(
            nfe_forward=flow.calls - evaluations,
            criterion_calls=sum(one.calls for one in criteria) - calls,
            control=sum(control.evaluations for control in loop.controls),
            accepted=loop.path.node,
            rejected=loop.rejected,
        )
    path = loop.path
    return Run(
        call=call,
        hits=tuple(loop.hits),
        waiting=(*loop.watches.waiting, *loop.watches.clocks),
        status=ended.status,
        time=ended.time,
        state=ended.state,
        note=ended.note,
        trajectory=path.trajectory(loop.hits),
        best=(path.shown(path.best[0]), path.best[1]),
        near_miss=loop.watches.nearest_miss,
        velocity_error=max((control.largest for control in loop.controls), default=0.0),
        stats=stats,
    )


class _End(NamedTuple):
    """How a run ended, and where."""

    status: Status
    time: float
    state: Tensor
    note: str


class _Ended(Exception):
    """The end of the run, wherever it is found."""

    def __init__(self, status: Status, time: float, state: Tensor, note: str = "") -> None:
        super().__init__(note)
        self.end = _End(status, time, state, note)


class _Retakes:
    """Steps that J does not allow: taken again, shorter, but not for ever."""

    def __init__(self) -> None:
        self.in_a_row = 0
        self.edge: NonFiniteCriterion | None = None

    def not_finite(self, failure: NonFiniteCriterion) -> None:
        """J ends inside of a step: it is walked up to in shorter ones."""
        self.edge = failure

    def unresolved(self) -> None:
        """A step was given back for J was not resolved in it."""
        self.in_a_row += 1

    def passed(self, time: float) -> None:
        """A step was accepted that ends at this time."""
        self.in_a_row = 0
        if self.edge is not None and time > self.edge.time:
            self.edge = None


class _Loop:
    """One forward run: the loop over the pieces between breakpoints, and over steps in each."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.controls: list[VelocityError] = []
        self.rest = Rest(call.tolerances)
        self.rejected = 0
        self.hits: list[Hit] = []
        self.watches = Watches(call)
        first = next(iter(self.watches.levels), None)
        self.path = Path(call, first.criterion, first.value) if first else Path(call, None)

    def _control(self, flow: FlowPiece, tolerances: Tolerances) -> VelocityError:
        layout = self.call.layout
        return VelocityError(flow, StateError(layout, tolerances), layout, tolerances)

    def through(self) -> None:
        """Run until it ends.

        Raises:
            _Ended: Always.
        """
        call, path = self.call, self.path
        if not all(isfinite(level.value) for level in self.watches.levels):
            raise _Ended(Status.DIVERGED, call.start, call.x0, "J is not finite at t0")
        for watch in self.watches.met_at_start():
            self.hits.append(Hit(watch, Status.AT_START, call.start, call.x0))
        self._end_if_met(Status.AT_START, call.start, call.x0)
        for number, (begin, end) in enumerate(pairwise(call.times), call.first_piece):
            self._piece(number, begin, end)
        note = f"at the horizon {call.times[-1]:g}" + self.watches.never_left()
        raise _Ended(Status.NOT_REACHED, path.grid[-1], path.state, note)

    def _end_if_met(self, status: Status, time: float, state: Tensor, note: str = "") -> None:
        if not self.watches:
            raise _Ended(status, time, state, note)

    def _piece(self, number: int, begin: float, end: float) -> None:
        """From breakpoint to breakpoint."""
        call, path = self.call, self.path
        flow = call.flow.on(number)
        path.begin_piece()
        path.hold(path.node)
        if begin > call.start:
            self._over_the_jump(flow, nextafter(begin, end))
        stepper = self._stepper(flow, begin, end)
        retakes = _Retakes()
        try:
            while not stepper.done:
                step = self._attempt(stepper, retakes)
                scans = None if step is None else self._look(step, stepper, retakes)
                if step is None or scans is None:
                    continue
                self._meet(flow, step, scans, end)
                growth = min((scan.growth for scan in scans), default=inf)
                stepper.limit_next_step(growth * step.length)
                path.add(step, scans[0].end_value if scans else nan, self.controls[-1].size)
                pairs = zip(self.watches.levels, scans, strict=True)
                passed = [level.passed(scan) for level, scan in pairs]
                if any(passed):
                    path.hold(path.node)  # J was below the target before
                self._end_if_sunk(step, scans)
                if end == call.times[-1] and self._is_resting(step):
                    self._end_if_at_rest(flow, step, end)
        finally:
            self.rejected += stepper.rejected

    def _stepper(self, flow: FlowPiece, begin: float, end: float) -> Stepper:
        call = self.call
        self.controls.append(self._control(flow, call.tolerances))
        stepper = Stepper(
            call.method,
            flow,
            begin,
            end,
            self.path.state,
            measure=self.controls[-1],
            max_step=call.solver.max_step,
            first_step=call.solver.first_step,
        )
        if not bool(torch.isfinite(stepper.derivative).all()):
            note = f"the flow is not finite at t = {begin:.6g}"
            raise _Ended(Status.DIVERGED, begin, self.path.state, note)
        return stepper

    def _is_resting(self, step: Step) -> bool:
        if self.watches.clocks:
            return False  # what is asked for at a known time comes
        return self.rest.is_resting(step, self.watches.clearance(), self.path.largest)

    def _attempt(self, stepper: Stepper, retakes: _Retakes) -> Step | None:
        """A step, or None where it was rejected."""
        limit = self.call.solver.max_steps
        if self.path.node + self.rejected + stepper.rejected >= limit:
            note = f"the step limit of {limit} was used up"
            note += if_stiff(self.call.flow, stepper.time, stepper.value, self.path.grid)
            raise _Ended(Status.STALLED, stepper.time, stepper.value, note)
        try:
            return stepper.attempt()
        except StepFailed as failure:
            if retakes.edge is not None:
                time, note = retakes.edge.time, str(retakes.edge)
                raise _Ended(Status.DIVERGED, time, stepper.value, note) from failure
            status = Status.DIVERGED if failure.nonfinite else Status.STALLED
            raise _Ended(status, stepper.time, stepper.value, str(failure)) from failure

    def _look(self, step: Step, stepper: Stepper, retakes: _Retakes) -> list[Scan] | None:
        """What each J did in an accepted step, or None where the step was given back for one."""
        shortest = max(_SHORTEST, 16 * torch.finfo(step.y1.dtype).eps)
        # (What jumps at a named time is looked at from both sides there.)
        ends_piece = step.t1 >= stepper.end
        long_enough = ends_piece or step.length > shortest * (step.t1 - self.call.start)
        dense = self.call.method.dense(step)
        scans: list[Scan] = []
        for level in self.watches.levels:
            mirror = self.watches.mirror_of(level)
            try:
                scan = scan_step(
                    step,
                    dense,
                    level.criterion,
                    level.value,
                    level.waiting,
                    rtol=self.call.tolerances.rtol,
                    may_retake=long_enough and retakes.in_a_row < _MAX_RETAKES,
                    unlimited=stepper.ratio < _EASY and stepper.accepted > _EASY_AFTER,
                    seen=None if mirror is None else scans[mirror],
                )
            except NonFiniteCriterion as failure:
                # The crossing may come before the point where J ends.
                retakes.not_finite(failure)
                stepper.take_back(0.1)
                return None
            if not scan.resolved:
                stepper.take_back(scan.growth)
                retakes.unresolved()
                return None
            scans.append(scan)
        retakes.passed(step.t1)
        return scans

    def _meet(self, flow: FlowPiece, step: Step, scans: Sequence[Scan], end: float) -> None:
        """Note the targets that are met in a step; one that the run ends with ends it."""
        for met in in_order(self.call, flow, step, self.watches, scans):
            self._note(scans, met.time)
            if self.watches.end_with(met.watch):
                self._finish(flow, step, met, end)
            hit = self._side_hit(flow, step, met, end)
            self.hits.append(hit)
            self.watches.take(hit)
            if hit.status is Status.DEGENERATE and hit.watch.repeats:
                # Nobody knows how often it is met, nor what is from here on.
                raise _Ended(hit.status, hit.time, hit.state, hit.note)
        self._note(scans, inf)

    def _note(self, scans: Sequence[Scan], until: float) -> None:
        for scan in scans[:1]:
            self.path.look(scan, until)
        for level, scan in zip(self.watches.levels, scans, strict=True):
            level.look(scan, until)

    def _side_hit(self, flow: FlowPiece, step: Step, met: Met, end: float) -> Hit:
        """A target that is passed: by a partial step, or by several where that is too noisy."""
        path, watch = self.path, met.watch
        steps, guess, inherited = self._approached(flow, step, met, end)
        partial, point = refine(self.call, flow, steps[-1], watch, guess, step.t1)
        steps = (*steps[:-1], partial)
        error = torch.stack([inherited, *(s.error for s in steps)]).square().sum(0).sqrt()
        node = path.grid.index(steps[0].t0)
        hit = self._judged(met, point, node=node, steps=steps, error=error)
        if hit.status is Status.DIVERGED:
            raise _Ended(hit.status, hit.time, hit.state, hit.note)
        path.hold(hit.node)
        return hit

    def _approached(
        self, flow: FlowPiece, step: Step, met: Met, end: float
    ) -> tuple[tuple[Step, ...], float, Tensor]:
        """Steps to a target, the last with T in it; T on that one; the error that they inherit."""
        call, path = self.call, self.path
        error = path.state_error(room=1)
        plain = (step,), met.time, error
        known = met.watch.time is not None
        if known or met.grazing or met.again or not (call.keeps and self._is_long()):
            return plain
        state = call.method.dense(step)(met.time)
        point = Crossing.at(met.watch.criterion, met.time, state, flow(met.time, state))
        if not (point.is_finite() and point.is_transversal(call.tolerances.rtol)):
            return plain
        noise = lam_change(call.flow, point, path.state_error(step)) / call.promise
        chosen = approach(path.recent(), step, met.time, noise)
        if chosen is not None:
            return tuple(chosen.steps(call, flow, met.time)), met.time, chosen.damping * error
        found = polished(call, flow, path, step, end, met.watch)
        if found is None:
            return plain
        finer, last, again = found
        return (*(s for s, _ in finer), last), again.time, torch.zeros_like(error)

    def _is_long(self) -> bool:
        return len(self.path.grid) > _POLISH_AFTER

    def _finish(self, flow: FlowPiece, step: Step, met: Met, end: float) -> None:
        """The last target: its steps become part of the path, and the run ends."""
        path, watch = self.path, met.watch
        if self._is_long() and watch.time is None and not met.again:
            finer = polished(self.call, flow, path, step, end, watch)
            if finer is not None:
                steps, step, met = finer
                path.replace_recent(steps)
        last, point = refine(self.call, flow, step, watch, met.time, step.t1)
        shown = watch.criterion is path.criterion
        value = point.value if shown else path.value_at(last.t1, last.y1)
        path.add(last, value)
        path.best = min(path.best, (value, last.t1))
        self._end_with(self._judged(met, point, node=path.node, error=path.state_error()))

    def _end_with(self, hit: Hit) -> None:
        if hit.status is not Status.DIVERGED:
            self.watches.take(hit)
            self.hits.append(hit)
        raise _Ended(hit.status, hit.time, hit.state, hit.note)

    def _judged(
        self, met: Met, point: Crossing, *, node: int, error: Tensor, steps: tuple[Step, ...] = ()
    ) -> Hit:
        """The hit, with the verdict on its crossing."""
        watch, near_miss = met.watch, None
        if watch.time is None:
            near_miss = self.watches.of(watch).near_miss(watch)
        status, note = verdict(self.call, watch, point, grazing=met.grazing)
        return Hit(
            watch, status, point.time, point.state, point, node, steps, note, near_miss, error
        )

    def _over_the_jump(self, flow: FlowPiece, time: float) -> None:
        """J may jump with the flow: targets that it jumps over are met without a derivative."""
        path, state, now = self.path, self.path.state, self.path.grid[-1]
        for level in self.watches.levels:
            level.value = level.criterion.value(time, state)
            for watch in level.met():
                point = Crossing.at(level.criterion, now, state, flow(time, state))
                hit = Hit(
                    watch,
                    Status.DEGENERATE,
                    now,
                    state,
                    point,
                    path.node,
                    note=jump_note(watch, level.value),
                    near_miss=level.near_miss(watch),
                    state_error=path.state_error(),
                )
                self.hits.append(hit)
                self.watches.take(hit)
                self._end_if_met(hit.status, now, state, hit.note)
            level.jumped(level.value, now)
            if level.criterion is path.criterion:
                path.values[-1] = level.value
                path.best = min(path.best, (level.value, now))

    def _end_if_sunk(self, step: Step, scans: Sequence[Scan]) -> None:
        """J was put on a target by a reset, and goes through it without having left it."""
        for level, scan in zip(self.watches.levels, scans, strict=True):
            for watch in level.waiting:
                if watch.landed and watch.leave is not None:
                    band = watch.leave - watch.target
                    sunk = next((t for t, v in scan.points if v < watch.target - band), None)
                    if sunk is not None:
                        note = f"the criterion does not leave the target at t = {step.t0:.9g}"
                        raise _Ended(Status.ZENO, step.t0, step.y0, note)

    def _end_if_at_rest(self, flow: FlowPiece, step: Step, horizon: float) -> None:
        if self.rest.stays(flow, step.t1, step.y1, horizon):
            note = f"the state has come to rest at t = {step.t1:.6g}"
            note += self.watches.never_left()
            raise _Ended(Status.NOT_REACHED, step.t1, step.y1, note)
