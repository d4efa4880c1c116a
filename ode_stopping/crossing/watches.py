"""What a run still waits for, criterion by criterion, and how close J came to its targets."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import inf

from ..call import Call, Watch
from ..core.functions import CriterionMap
from ..core.level import Rounding, near_targets, warn_of_the_start
from ..solving.solver import StepFailed
from ..solving.stepper import Stepper
from .near_miss import Dips, NearMiss, closest
from .point import Crossing
from .scan import Scan
from .watch import Hit, clearance

__all__ = ["Level", "Watches"]

# Relative to the time of a hit: what is not later than that is the hit.
_AFTER = 1e-12


class Level:
    """The targets of one criterion that are still to be met, and what J did so far.

    Args:
        criterion: J.
        waiting: Its watches.
        value: J at the start.
        start: t0.

    Attributes:
        criterion: As given.
        waiting: The watches that were not met yet, the highest first.
        value: J at the last node of the path.
    """

    def __init__(
        self, criterion: CriterionMap, waiting: Iterable[Watch], value: float, start: float
    ) -> None:
        self.criterion = criterion
        self.waiting = sorted(waiting, key=lambda watch: -watch.target)
        self.value = value
        # Of J, for the targets that count from the start.
        self._dips = Dips()
        self._dips.add([(start, value)])
        # Of the others: of -J before J has left them, and of J from then on.
        late = [watch for watch in self.waiting if watch.leave is not None]
        self._turns = {watch.index: _Turns([(start, value)], start) for watch in late}

    def met(self) -> list[Watch]:
        """Those that the present value meets, the highest first."""
        return [w for w in self.waiting if w.leave is None and self.value <= w.target]

    def take(self, index: int) -> None:
        """It was met, and is not waited for any more."""
        self.waiting = [watch for watch in self.waiting if watch.index != index]

    def put_back(self, watch: Watch, time: float) -> None:
        """It was met at a time, and is waited for again."""
        self.take(watch.index)
        insort(self.waiting, watch, key=lambda other: -other.target)
        self._turns[watch.index] = _Turns([], time)

    def count(self, event: int) -> None:
        """An event was met once more."""
        self.waiting = [
            replace(w, count=w.count - 1) if w.event == event and w.count is not None else w
            for w in self.waiting
        ]

    def look(self, scan: Scan, until: float) -> None:
        """Note what J did inside a step, up to a time."""
        self._dips.add(point for point in scan.points if point[0] < until)
        for watch, time in scan.left:
            if watch.index in self._turns:
                self._turns[watch.index].left(time)
        for watch in self.waiting:
            if watch.index in self._turns:
                self._turns[watch.index].add(scan.points, until)

    def passed(self, scan: Scan) -> bool:
        """After a step: the targets that J has left count now; whether there are any."""
        self.value = scan.end_value
        met = {one.watch.index: one.time for one in scan.met}
        # (What was met again behind the rise waits to be left once more.)
        return self._counting({w.index for w, t in scan.left if t > met.get(w.index, -inf)})

    def jumped(self, value: float, time: float) -> None:
        """J has jumped to a value: it may have left targets by that."""
        self.value = value
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


class Watches:
    """What a run waits for: levels of criteria, and times on the clock.

    Without `leave_first` every target that J is above of counts from the start, and the others are
    met there. With it a target that J is not clearly above of has to be left first.

    Args:
        call: What was asked.

    Attributes:
        levels: One for each criterion.
        clocks: Watches of known times, in order of time.
    """

    def __init__(self, call: Call) -> None:
        watches = list(call.watches)
        self.clocks = sorted((w for w in watches if w.time is not None), key=_time_of)
        self.levels: list[Level] = []
        for criterion in call.criteria:
            waiting = [w for w in watches if w.criterion is criterion and w.time is None]
            if not waiting:
                continue
            value = criterion.value(call.start, call.x0)
            if call.leave_first:
                rounding = Rounding.at(criterion, call.start, call.x0)
                waiting = [replace(w, leave=rounding.beyond(w.target)) for w in waiting]
            else:
                _warn_of_the_start(call, criterion, waiting, value)
            waiting = [
                w.counting() if w.leave is not None and value > w.leave else w for w in waiting
            ]
            self.levels.append(Level(criterion, waiting, value, call.start))

    def __bool__(self) -> bool:
        return bool(self.waiting or self.clocks)

    @property
    def waiting(self) -> list[Watch]:
        """The watches of criteria that were not met yet."""
        return [watch for level in self.levels for watch in level.waiting]

    def end_with(self, watch: Watch) -> bool:
        """Whether the run ends where this one is met."""
        left = [*self.waiting, *self.clocks]
        now = next(one for one in left if one.index == watch.index)
        return now.count == 1 or (len(left) == 1 and not now.repeats)

    def of(self, watch: Watch) -> Level:
        """The level of a watch."""
        return next(level for level in self.levels if level.criterion is watch.criterion)

    def mirror_of(self, level: Level) -> int | None:
        """The place of an earlier level whose J is -J of this one."""
        for place, other in enumerate(self.levels):
            if other is level:
                break
            if other.criterion.function is level.criterion.function:
                return place
        return None

    def met_at_start(self) -> list[Watch]:
        """Take those that are met at the start away; of each criterion the highest first."""
        met = [watch for level in self.levels for watch in level.met()]
        for watch in met:
            self.of(watch).take(watch.index)
        return met

    def take(self, hit: Hit) -> None:
        """A watch was met: it is taken away, or waited for again."""
        watch = hit.watch
        if watch.time is not None:
            self.clocks = [clock for clock in self.clocks if clock.index != watch.index]
            return
        level = self.of(watch)
        if not watch.repeats:
            level.take(watch.index)
            return
        if watch.count is not None:
            for one in self.levels:
                one.count(watch.event)
            watch = next(one for one in level.waiting if one.index == watch.index)
        rounding = Rounding.at(watch.criterion, hit.time, hit.state)
        level.put_back(replace(watch, leave=rounding.beyond(watch.target)), hit.time)

    def clearance(self) -> float:
        """How far the criteria are from the nearest target; infinite where there is none."""
        gaps = [clearance(one.waiting, one.value, one.value) for one in self.levels if one.waiting]
        return min(gaps, default=inf)

    @property
    def nearest_miss(self) -> NearMiss | None:
        """The closest turn short of a target that was not met; None where all were."""
        return closest(self.of(watch).near_miss(watch) for watch in self.waiting)

    def never_left(self) -> str:
        """What to say of targets that J was never above of; else nothing."""
        late = [w for w in self.waiting if w.leave is not None and not w.repeats]
        if not late:
            return ""
        names = ", ".join(f"{w.criterion.shown(w.target):g}" for w in late)
        side = late[0].criterion.far_side
        return f"; J never was {side} the target {names}, as leave_first=True asks for"


def _time_of(watch: Watch) -> float:
    return -watch.target


class _Turns:
    """The turns of J short of a target: before it was left from below, afterwards from above."""

    def __init__(self, start: Iterable[tuple[float, float]], begin: float) -> None:
        self._begin = begin
        self._below, self._above = Dips(), Dips()
        self._left = inf
        self._below.add((t, -value) for t, value in start)

    def left(self, time: float) -> None:
        """From this time on J is above the target."""
        if time > self._begin:
            self._left = min(self._left, time)

    def add(self, points: Iterable[tuple[float, float]], until: float) -> None:
        """Go on with points (t, J) before a time."""
        # (J at a hit is its target to rounding, which is no turn.)
        begin = self._begin + _AFTER * abs(self._begin)
        points = [(t, value) for t, value in points if begin < t < until]
        self._below.add((t, -value) for t, value in points if t < self._left)
        self._above.add((t, value) for t, value in points if t >= self._left)

    def near_miss(self, target: float) -> NearMiss | None:
        """The closest turn."""
        return closest([self._below.near_miss(-target), self._above.near_miss(target)])


def _warn_of_the_start(
    call: Call, criterion: CriterionMap, watches: Sequence[Watch], value: float
) -> None:
    """Warn where a rounding decides whether a target is met at the start."""
    counting = [watch.target for watch in watches if watch.leave is None]
    near = near_targets(value, call.x0, counting)
    if not near:
        return
    rounding = Rounding.at(criterion, call.start, call.x0)
    for target in near:
        if abs(value - target) <= rounding.around(target) and _moves_away(
            call, criterion, target, rounding
        ):
            warn_of_the_start(criterion, value, target)


def _moves_away(call: Call, criterion: CriterionMap, target: float, rounding: Rounding) -> bool:
    """Whether J rises from its target: J' > 0, or where that is 0, by one short step."""
    flow = call.flow.on(call.first_piece)
    point = Crossing.at(criterion, call.start, call.x0, flow(call.start, call.x0))
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
    return first is not None and criterion.value(first.t1, first.y1) > rounding.beyond(target)
