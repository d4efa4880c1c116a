"""The targets of a run that are still to be met, and how close J came to each before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf

from ..call import Call
from ..core.level import Rounding, near_targets, warn_of_the_start
from ..solving.solver import StepFailed
from ..solving.stepper import Stepper
from .near_miss import Dips, NearMiss, closest
from .point import Crossing
from .scan import Scan
from .watch import Watch, clearance

__all__ = ["Watches"]


class Watches:
    """What a run waits for.

    Without `leave_first` every target that J is above of counts from the start, and the others are
    met there. With it a target that J is not clearly above of has to be left first.

    Args:
        call: What was asked.
        value: J at the start.

    Attributes:
        waiting: The targets that were not met yet, the highest first.
    """

    def __init__(self, call: Call, value: float) -> None:
        targets = sorted(enumerate(call.targets), key=lambda pair: -pair[1])
        self.waiting = [Watch(index, target) for index, target in targets]
        if call.leave_first:
            rounding = Rounding.at(call.criterion, call.start, call.x0)
            levels = [rounding.beyond(watch.target) for watch in self.waiting]
            self.waiting = [
                watch if value > level else replace(watch, leave=level)
                for watch, level in zip(self.waiting, levels, strict=True)
            ]
        else:
            _warn_of_the_start(call, self.waiting, value)
        start = [(call.start, value)]
        # Of J, for the targets that count from the start.
        self._dips = Dips()
        self._dips.add(start)
        # Of the others: of -J before J has left them, and of J from then on.
        self._turns = {w.index: _Turns(start) for w in self.waiting if w.leave is not None}

    def __bool__(self) -> bool:
        return bool(self.waiting)

    def met_by(self, value: float) -> list[Watch]:
        """Take those that a value of J meets away; the highest first."""
        met = [w for w in self.waiting if w.leave is None and value <= w.target]
        for watch in met:
            self.take(watch)
        return met

    def take(self, watch: Watch) -> None:
        """It was met."""
        self.waiting = [other for other in self.waiting if other.index != watch.index]

    def clearance(self, value: float) -> float:
        """How far a value of J is from the nearest target."""
        return clearance(self.waiting, value, value)

    def look(self, scan: Scan, until: float) -> None:
        """Note what J did inside a step, up to a time."""
        self._dips.add(point for point in scan.points if point[0] < until)
        for watch, time in scan.left:
            self._turns[watch.index].left(time)
        for watch in self.waiting:
            if watch.index in self._turns:
                self._turns[watch.index].add(scan.points, until)

    def passed(self, scan: Scan) -> bool:
        """After a step: the targets that J has left count now; whether there are any."""
        left = {watch.index for watch, _ in scan.left}
        return self._counting(left)

    def jumped(self, value: float, time: float) -> None:
        """J has jumped to a value: it may have left targets by that."""
        left = {w.index for w in self.waiting if w.leave is not None and value > w.leave}
        for index in left:
            self._turns[index].left(time)
        self._counting(left)

    def _counting(self, left: set[int]) -> bool:
        self.waiting = [w.counting() if w.index in left else w for w in self.waiting]
        return bool(left)

    def near_miss(self, watch: Watch) -> NearMiss | None:
        """The turn of J that came closest to a target without meeting it."""
        if watch.index in self._turns:
            return self._turns[watch.index].near_miss(watch.target)
        return self._dips.near_miss(watch.target)

    @property
    def nearest_miss(self) -> NearMiss | None:
        """The closest turn short of a target that was not met; None where all were."""
        return closest(self.near_miss(watch) for watch in self.waiting)

    def never_left(self, call: Call) -> str:
        """What to say of targets that J was never above of; else nothing."""
        shown, side = call.criterion.shown, call.criterion.far_side
        names = [f"{shown(w.target):g}" for w in self.waiting if w.leave is not None]
        if not names:
            return ""
        return f"; J never was {side} the target {', '.join(names)}, as leave_first=True asks for"


class _Turns:
    """The turns of J short of a target: before it was left from below, afterwards from above."""

    def __init__(self, start: Iterable[tuple[float, float]]) -> None:
        self._below, self._above = Dips(), Dips()
        self._left = inf
        self._below.add((t, -value) for t, value in start)

    def left(self, time: float) -> None:
        """From this time on J is above the target."""
        self._left = min(self._left, time)

    def add(self, points: Iterable[tuple[float, float]], until: float) -> None:
        """Go on with points (t, J) before a time."""
        points = [(t, value) for t, value in points if t < until]
        self._below.add((t, -value) for t, value in points if t < self._left)
        self._above.add((t, value) for t, value in points if t >= self._left)

    def near_miss(self, target: float) -> NearMiss | None:
        """The closest turn."""
        return closest([self._below.near_miss(-target), self._above.near_miss(target)])


def _warn_of_the_start(call: Call, watches: Sequence[Watch], value: float) -> None:
    """Warn where a rounding decides whether a target is met at the start."""
    near = near_targets(value, call.x0, [watch.target for watch in watches])
    if not near:
        return
    rounding = Rounding.at(call.criterion, call.start, call.x0)
    for target in near:
        if abs(value - target) <= rounding.around(target) and _moves_away(call, target, rounding):
            warn_of_the_start(call.criterion, value, target)


def _moves_away(call: Call, target: float, rounding: Rounding) -> bool:
    """Whether J rises from its target: J' > 0, or where that is 0, by one short step."""
    flow = call.flow.on(0)
    point = Crossing.at(call, call.start, call.x0, flow(call.start, call.x0))
    if not point.is_finite():
        return False
    if point.is_transversal(call.tolerances.rtol):
        return point.rate > 0
    stepper = Stepper(
        call.method,
        flow,
        call.start,
        call.times[1],
        call.x0,
        measure=lambda step: 0.0,
        max_step=call.solver.max_step,
        first_step=call.solver.first_step,
    )
    try:
        first = stepper.attempt()
    except StepFailed:
        return False
    # (Where it ends in NaN, J is above of nothing.)
    return first is not None and (
        call.criterion.value(first.t1, first.y1) > rounding.beyond(target)
    )
