"""The forward loop: step until the criterion has met every target, or say why it has not.

Knows nothing of gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, nextafter
from typing import NamedTuple

import torch
from torch import Tensor

from ..call import Call
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
from .path import Path
from .point import Crossing, lam_change
from .polish import approach, polished
from .refine import refine
from .rest import Rest
from .scan import Met, NonFiniteCriterion, Scan, scan_step
from .stiffness import if_stiff
from .watch import Hit, Watch
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
    status: Status
    time: float
    state: Tensor
    note: str
    trajectory: Trajectory
    best: tuple[float, float]
    near_miss: NearMiss | None
    velocity_error: float
    stats: Stats

    def hit(self, target: int) -> Hit | None:
        """The hit of a target, by its place among those of the call; None for a miss."""
        return next((hit for hit in self.hits if hit.watch.index == target), None)


def find_crossings(call: Call) -> Run:
    """Integrate from (t0, x0) until J has come down to every target for the first time."""
    flow, criterion = call.flow, call.criterion
    evaluations, calls = flow.calls, criterion.calls
    with torch.no_grad(), sharing(Memo()):
        loop = _Loop(call)
        try:
            loop.through()
        except _Ended as end:
            # Not the exception itself: its traceback holds this frame, and with it the states.
            ended = end.end
        stats = Stats(
            nfe_forward=flow.calls - evaluations,
            criterion_calls=criterion.calls - calls,
            control=sum(control.evaluations for control in loop.controls),
            accepted=loop.path.node,
            rejected=loop.rejected,
        )
    path = loop.path
    return Run(
        call=call,
        hits=tuple(loop.hits),
        status=ended.status,
        time=ended.time,
        state=ended.state,
        note=ended.note,
        trajectory=path.trajectory(
            {hit.time: (hit.point.value, hit.state) for hit in loop.hits if hit.point is not None}
        ),
        best=(criterion.shown(path.best[0]), path.best[1]),
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
        value = call.criterion.value(call.start, call.x0)
        self.path = Path(call, value)
        self.watches = Watches(call, value)

    def _control(self, flow: FlowPiece, tolerances: Tolerances) -> VelocityError:
        layout = self.call.layout
        return VelocityError(flow, StateError(layout, tolerances), layout, tolerances)

    def through(self) -> None:
        """Run until it ends.

        Raises:
            _Ended: Always.
        """
        call, path = self.call, self.path
        value = path.values[0]
        if not isfinite(value):
            raise _Ended(Status.DIVERGED, call.start, call.x0, "J is not finite at t0")
        for watch in self.watches.met_by(value):
            self.hits.append(Hit(watch, Status.AT_START, call.start, call.x0))
        self._end_if_met(Status.AT_START, call.start, call.x0)
        for index in range(len(call.times) - 1):
            self._piece(index)
        note = f"at the horizon {call.times[-1]:g}" + self.watches.never_left(call)
        raise _Ended(Status.NOT_REACHED, path.grid[-1], path.state, note)

    def _end_if_met(self, status: Status, time: float, state: Tensor, note: str = "") -> None:
        if not self.watches:
            raise _Ended(status, time, state, note)

    def _piece(self, index: int) -> None:
        """From breakpoint to breakpoint."""
        call, path = self.call, self.path
        begin, end = call.times[index], call.times[index + 1]
        flow = call.flow.on(index)
        path.begin_piece()
        path.hold(path.node)
        if index > 0:
            self._over_the_jump(flow, nextafter(begin, end))
        stepper = self._stepper(flow, begin, end)
        retakes = _Retakes()
        try:
            while not stepper.done:
                step = self._attempt(stepper, retakes)
                scan = None if step is None else self._look(step, stepper, retakes)
                if step is None or scan is None:
                    continue
                self._meet(flow, step, scan, end)
                stepper.limit_next_step(scan.growth * step.length)
                path.add(step, scan.end_value, self.controls[-1].size)
                if self.watches.passed(scan):
                    path.hold(path.node)  # J was below the target before
                if end == call.times[-1] and self._is_resting(step, scan):
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

    def _is_resting(self, step: Step, scan: Scan) -> bool:
        distance = self.watches.clearance(scan.end_value)
        return self.rest.is_resting(step, distance, self.path.largest)

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

    def _look(self, step: Step, stepper: Stepper, retakes: _Retakes) -> Scan | None:
        """What J did in an accepted step, or None where the step was given back for it."""
        shortest = max(_SHORTEST, 16 * torch.finfo(step.y1.dtype).eps)
        # (What jumps at a named time is looked at from both sides there.)
        ends_piece = step.t1 >= stepper.end
        long_enough = ends_piece or step.length > shortest * (step.t1 - self.call.start)
        try:
            scan = self._scan(
                step,
                may_retake=long_enough and retakes.in_a_row < _MAX_RETAKES,
                unlimited=stepper.ratio < _EASY and stepper.accepted > _EASY_AFTER,
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
        retakes.passed(step.t1)
        return scan

    def _scan(self, step: Step, *, may_retake: bool, unlimited: bool) -> Scan:
        return scan_step(
            step,
            self.call.method.dense(step),
            self.call.criterion,
            self.path.values[-1],
            self.watches.waiting,
            rtol=self.call.tolerances.rtol,
            may_retake=may_retake,
            unlimited=unlimited,
        )

    def _meet(self, flow: FlowPiece, step: Step, scan: Scan, end: float) -> None:
        """Note the targets that are met in a step; the last of all ends the run."""
        for met in scan.met:
            self._note(scan, met.time)
            if len(self.watches.waiting) == 1:
                self._finish(flow, step, met, end)
            self.hits.append(self._side_hit(flow, step, met, end))
            self.watches.take(met.watch)
        self._note(scan, inf)

    def _note(self, scan: Scan, until: float) -> None:
        self.path.look(scan, until)
        self.watches.look(scan, until)

    def _side_hit(self, flow: FlowPiece, step: Step, met: Met, end: float) -> Hit:
        """A target that is passed: by a partial step, or by several where that is too noisy."""
        path, watch = self.path, met.watch
        steps, guess, inherited = self._approached(flow, step, met, end)
        partial, point = refine(self.call, flow, steps[-1], watch.target, guess, step.t1)
        steps = (*steps[:-1], partial)
        error = torch.stack([inherited, *(s.error for s in steps)]).square().sum(0).sqrt()
        node = path.grid.index(steps[0].t0)
        hit = self._judged(watch, point, met, node=node, steps=steps, error=error)
        self._end_if_diverged(hit)
        path.hold(hit.node)
        return hit

    def _approached(
        self, flow: FlowPiece, step: Step, met: Met, end: float
    ) -> tuple[tuple[Step, ...], float, Tensor]:
        """Steps to a target, the last with T in it; T on that one; the error that they inherit."""
        call, path = self.call, self.path
        error = path.state_error(room=1)
        plain = (step,), met.time, error
        if met.grazing or not (call.keeps and self._is_long()):
            return plain
        state = call.method.dense(step)(met.time)
        point = Crossing.at(call, met.time, state, flow(met.time, state))
        if not (point.is_finite() and point.is_transversal(call.tolerances.rtol)):
            return plain
        noise = lam_change(call, point, path.state_error(step)) / call.promise
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

    @staticmethod
    def _end_if_diverged(hit: Hit) -> None:
        if hit.status is Status.DIVERGED:
            raise _Ended(Status.DIVERGED, hit.time, hit.state, hit.note)

    def _finish(self, flow: FlowPiece, step: Step, met: Met, end: float) -> None:
        """The last target: its steps become part of the path, and the run ends."""
        path, watch = self.path, met.watch
        if self._is_long():
            finer = polished(self.call, flow, path, step, end, watch)
            if finer is not None:
                steps, step, met = finer
                path.replace_recent(steps)
        last, point = refine(self.call, flow, step, watch.target, met.time, step.t1)
        path.add(last, point.value)
        path.best = min(path.best, (point.value, last.t1))
        hit = self._judged(watch, point, met, node=path.node, steps=(), error=path.state_error())
        self._end_if_diverged(hit)
        self.watches.take(watch)
        self.hits.append(hit)
        raise _Ended(hit.status, hit.time, hit.state, hit.note)

    def _judged(
        self,
        watch: Watch,
        point: Crossing,
        met: Met,
        *,
        node: int,
        steps: tuple[Step, ...],
        error: Tensor,
    ) -> Hit:
        """The hit, with the verdict on its crossing."""
        status, note = Status.REACHED, ""
        if not point.is_finite():
            status, note = Status.DIVERGED, "a derivative at the crossing is not finite"
        elif met.grazing or not point.is_transversal(self.call.tolerances.rtol) or point.rate > 0:
            # (J falls to its target: where it rises there, T is behind the bottom of a dip.)
            status = Status.DEGENERATE
            rate = self.call.criterion.shown(point.rate)
            note = f"J'(T) = {rate:.3g} against a scale of {point.rate_scale:.3g}"
            if met.grazing:
                note += "; J turns back next to the target, within its error"
        elif self._is_jump(watch, point):
            status = Status.DEGENERATE
            note = self._jump_note(point.value, watch)
        near_miss = self.watches.near_miss(watch)
        return Hit(
            watch, status, point.time, point.state, point, node, steps, note, near_miss, error
        )

    def _is_jump(self, watch: Watch, point: Crossing) -> bool:
        """Whether J misses the target by more than T can be moved by tolerance and rounding."""
        start, eps = self.call.start, torch.finfo(point.state.dtype).eps
        in_time = 10 * self.call.tolerances.rtol * (point.time - start)
        in_time += 4 * eps * max(abs(point.time), abs(start))
        return abs(point.value - watch.target) > in_time * abs(point.rate) + 100 * point.rounding

    def _over_the_jump(self, flow: FlowPiece, time: float) -> None:
        """J may jump with the flow: targets that it jumps over are met without a derivative."""
        path, state = self.path, self.path.state
        value = self.call.criterion.value(time, state)
        for watch in self.watches.met_by(value):
            point = Crossing.at(self.call, path.grid[-1], state, flow(time, state))
            note = self._jump_note(value, watch)
            self.hits.append(
                Hit(
                    watch,
                    Status.DEGENERATE,
                    point.time,
                    state,
                    point,
                    path.node,
                    note=note,
                    near_miss=self.watches.near_miss(watch),
                    state_error=path.state_error(),
                )
            )
            self._end_if_met(Status.DEGENERATE, point.time, state, note)
        self.watches.jumped(value, path.grid[-1])
        path.values[-1] = value
        path.best = min(path.best, (value, path.grid[-1]))

    def _jump_note(self, value: float, watch: Watch) -> str:
        gap = self.call.criterion.shown(value - watch.target)
        return f"J jumps over the target: J(T) - eps = {gap:.3g}"

    def _end_if_at_rest(self, flow: FlowPiece, step: Step, horizon: float) -> None:
        if self.rest.stays(flow, step.t1, step.y1, horizon):
            note = f"the state has come to rest at t = {step.t1:.6g}"
            note += self.watches.never_left(self.call)
            raise _Ended(Status.NOT_REACHED, step.t1, step.y1, note)
