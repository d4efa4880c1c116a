"""The forward loop: step until the criterion is down to the target, or say why it is not.

Knows nothing of gradients.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .crossing import NonFiniteCriterion, Scan, refine, scan_step
from .evaluation import CriterionMap, FlowMap, Stats
from .implicit import Crossing
from .rest import Rest
from .solver import Step, StepFailed, Stepper, Tolerances, Torchdiffeq
from .states import StateLayout
from .status import Status
from .trajectory import Trajectory

__all__ = ["Search", "find_crossing"]

# Steps that are taken again in a row because J was not resolved: a J that jumps never is.
_MAX_RETAKES = 12
# The last steps before the crossing are taken again at a fraction of the tolerance, on runs long
# enough to be stiff.
_POLISH_AFTER = 20
_POLISH_STEPS = 3
_POLISH = 1e-2
_POLISH_LIMIT = 500


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
    """

    status: Status
    time: float
    state: Tensor
    trajectory: Trajectory
    crossing: Crossing | None
    best: tuple[float, float]
    note: str = ""


@dataclass
class _Path:
    """The accepted part of the run so far."""

    layout: StateLayout
    start: float
    x0: Tensor
    keep: bool
    steps: list[Step] = field(default_factory=list)
    grid: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    best: tuple[float, float] = (float("inf"), float("nan"))
    largest: float = 0.0
    recent: deque[Step] = field(default_factory=lambda: deque(maxlen=_POLISH_STEPS))

    def add(self, step: Step, value: float) -> None:
        self.recent.append(step)
        if self.keep:
            self.steps.append(step)
        self.largest = max(self.largest, float(step.y1.norm()))
        self.grid.append(step.t1)
        self.values.append(value)

    def replace_recent(self, steps: Sequence[tuple[Step, float]]) -> None:
        """Put other steps, with the values of J at their ends, in the place of the recent ones."""
        for kept in (self.steps, self.grid, self.values) if self.keep else (self.grid, self.values):
            del kept[len(kept) - len(self.recent) :]
        self.recent.clear()
        for step, value in steps:
            self.add(step, value)

    def end(
        self, status: Status, time: float, state: Tensor, note: str, crossing: Crossing | None
    ) -> Search:
        path = Trajectory(
            self.layout,
            self.start,
            self.x0,
            self.steps,
            self.grid,
            self.values,
            largest=self.largest,
        )
        return Search(status, time, state, path, crossing, self.best, note)


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
    start: float,
    max_time: float,
    settings: Torchdiffeq,
    tolerances: Tolerances,
    keep: bool,
    stats: Stats,
) -> Search:
    """Integrate from (start, x0) until J <= target for the first time.

    Args:
        flow: dx/dt.
        criterion: J.
        x0: Start, shape (n,).
        target: eps.
        start: t0, in flow time.
        max_time: Horizon, in flow time.
        settings: Solver.
        tolerances: Of the solve.
        keep: Whether to keep the dense output of the steps.
        stats: Counts, filled in.
    """
    path = _Path(flow.layout, start, x0, keep, grid=[start], largest=float(x0.norm()))
    value = criterion.value(start, x0)
    path.values.append(value)
    path.best = (value, start)
    try:
        return _run(flow, criterion, path, target, max_time, settings, tolerances, stats)
    finally:
        stats.nfe_forward = flow.calls
        stats.criterion_calls = criterion.calls


def _run(
    flow: FlowMap,
    criterion: CriterionMap,
    path: _Path,
    target: float,
    max_time: float,
    settings: Torchdiffeq,
    tolerances: Tolerances,
    stats: Stats,
) -> Search:
    x, value = path.x0, path.values[0]
    if not _finite(value):
        return path.end(Status.DIVERGED, path.start, x, "the criterion is not finite at t0", None)
    if value <= target:
        return path.end(Status.AT_START, path.start, x, "", None)
    stepper = Stepper(
        settings,
        flow.plain,
        path.start,
        max_time,
        x,
        rtol=tolerances.rtol,
        atol=tolerances.atol,
        norm=flow.layout.norm,
    )
    if not bool(torch.isfinite(stepper.derivative).all()):
        return path.end(Status.DIVERGED, path.start, x, "the flow is not finite at t0", None)
    rest = Rest(tolerances)
    retakes = 0
    ends_at: NonFiniteCriterion | None = None
    while not stepper.done:
        if stepper.accepted + stepper.rejected >= settings.max_steps:
            note = f"the step limit of {settings.max_steps} was used up"
            return path.end(Status.STALLED, stepper.time, stepper.value, note, None)
        try:
            step = stepper.attempt()
        except StepFailed as failure:
            if ends_at is not None:
                return path.end(Status.DIVERGED, ends_at.time, stepper.value, str(ends_at), None)
            status = Status.DIVERGED if failure.nonfinite else Status.STALLED
            return path.end(status, stepper.time, stepper.value, str(failure), None)
        finally:
            stats.accepted, stats.rejected = stepper.accepted, stepper.rejected
        if step is None:
            continue
        may_retake = retakes < _MAX_RETAKES
        try:
            scan = scan_step(
                step, criterion, value, target, rtol=tolerances.rtol, may_retake=may_retake
            )
        except NonFiniteCriterion as failure:
            # The crossing may come before the point where J ends: walk up to it in shorter steps.
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
        path.best = min(path.best, (scan.best_value, scan.best_time))
        if scan.crossing is not None:
            coarse = _Found(stepper, step, scan)
            found = _polished(flow, criterion, path, coarse, target, max_time, settings, tolerances)
            stats.accepted = len(path.grid)
            return _finish(flow, criterion, path, found or coarse, target, tolerances)
        stepper.limit_next_step(scan.growth * (step.t1 - step.t0))
        path.add(step, scan.end_value)
        value = scan.end_value
        if rest.is_resting(step, value - target) and rest.stays(flow, stepper, max_time):
            note = f"the state has come to rest at t = {step.t1:.6g}"
            return path.end(Status.NOT_REACHED, step.t1, step.y1, note, None)
    return path.end(
        Status.NOT_REACHED, stepper.time, stepper.value, f"at the horizon {max_time:g}", None
    )


def _polished(
    flow: FlowMap,
    criterion: CriterionMap,
    path: _Path,
    coarse: _Found,
    target: float,
    max_time: float,
    settings: Torchdiffeq,
    tolerances: Tolerances,
) -> _Found | None:
    """The last few steps again, at a hundredth of the tolerance.

    Explicit steps at the limit of stability leave noise of the size of the tolerance in the fast
    modes. J hardly sees it, but its gradient weighs it by the curvature, and so J'(T) and every
    derivative are wrong by much more than T. Over a few finer steps the flow itself damps that
    noise.

    Returns:
        The crossing among the finer steps, the others having replaced those in `path`; or None,
        `path` being as it was, where the run was short or the finer steps have no crossing (a touch
        within the tolerance).
    """
    if len(path.grid) <= _POLISH_AFTER or not path.recent:
        return None
    first = path.recent[0]
    floor = 30 * torch.finfo(path.x0.dtype).eps
    fine = Stepper(
        settings,
        flow.plain,
        first.t0,
        min(coarse.step.t1 + (coarse.step.t1 - coarse.step.t0), max_time),
        first.y0,
        rtol=max(_POLISH * tolerances.rtol, min(floor, tolerances.rtol)),
        atol=_POLISH * tolerances.atol,
        norm=flow.layout.norm,
        first_step=0.25 * (first.t1 - first.t0),
    )
    value = path.values[-1 - len(path.recent)]
    steps: list[tuple[Step, float]] = []
    while not fine.done and fine.accepted + fine.rejected < _POLISH_LIMIT:
        try:
            step = fine.attempt()
            if step is None:
                continue
            scan = scan_step(step, criterion, value, target, rtol=tolerances.rtol)
        except (StepFailed, NonFiniteCriterion):
            return None
        if scan.crossing is not None:
            path.replace_recent(steps)
            return _Found(fine, step, scan)
        steps.append((step, scan.end_value))
        value = scan.end_value
    return None


def _finish(
    flow: FlowMap,
    criterion: CriterionMap,
    path: _Path,
    found: _Found,
    target: float,
    tolerances: Tolerances,
) -> Search:
    assert found.scan.crossing is not None
    last = refine(found.stepper, found.step, criterion, target, found.scan.crossing)
    value, g, explicit = criterion.gradient(last.t1, last.y1)
    velocity = flow.plain(last.t1, last.y1)
    crossing = Crossing(last.t1, last.y1, value, velocity, g, explicit)
    path.add(last, value)
    path.best = (value, last.t1)
    if not (
        _finite(value) and bool(torch.isfinite(velocity).all()) and bool(torch.isfinite(g).all())
    ):
        return path.end(
            Status.DIVERGED, last.t1, last.y1, "a derivative at the crossing is not finite", None
        )
    if crossing.is_transversal(tolerances.rtol) and not found.scan.grazing:
        return path.end(Status.REACHED, last.t1, last.y1, "", crossing)
    note = f"J'(T) = {crossing.rate:.3g} against a scale of {crossing.rate_scale:.3g}"
    return path.end(Status.DEGENERATE, last.t1, last.y1, note, crossing)


def _finite(value: float) -> bool:
    return value - value == 0.0
