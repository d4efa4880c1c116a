"""Runs in a row: an event may change the state, and what follows is a run of its own.

    x' = F(t, x) up to an event;   x+ = R(T, x-);   x' = F(t, x) from (T, x+) on;   and so on

The rules. *After a hit* an event counts again once J has left the target by more than its rounding.
A reset that leaves J on the event's own target, still going through it, ends everything (ZENO). A
reset that puts J past the target of *another* event meets that one at once, in the order of the
events. Events that are met at the same time, to rounding, take place in that order as well: each
sees the state that the one before has left, and counts only if it is still met there.

Knows nothing of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from ..call import Call, Rule, Watch
from ..core.functions import ResetMap
from ..core.level import Rounding
from ..core.stats import Stats
from ..core.status import Status
from .point import Crossing
from .run import Run, find_crossings
from .watch import Hit

__all__ = ["Arc", "Execution", "Transition", "follow"]

# So many events at one time never end.
_AT_ONCE = 100
# Runs of an event that are this short, relative to the time, cannot be told from none.
_SHORTEST = 64.0
# Of the clock: two times that are no further apart are one.
_OF_TIME = 8.0


@dataclass(frozen=True)
class Transition:
    """What an event makes of the state.

    Attributes:
        watch: What was met.
        time: T, in flow time.
        before: x-, shape (n,).
        after: x+, shape (n,).
        reset: R; None: x stays as it is.
    """

    watch: Watch
    time: float
    before: Tensor
    after: Tensor
    reset: ResetMap | None = None


@dataclass(frozen=True)
class Arc:
    """A stretch without resets, and what ends it.

    Attributes:
        time: Its start, in flow time.
        state: x there, shape (n,).
        opening: What is met there already: known times, and events that are met together with the
            one before.
        run: The run; None where it has no length.
        closing: The events that end it, in order: the first is the last hit, and the others are
            met by what that one makes of the state. Empty where nothing follows.
        together: Other events whose criteria are at their targets as well where it ends.
    """

    time: float
    state: Tensor
    opening: tuple[Hit, ...]
    run: Run | None
    closing: tuple[Transition, ...]
    together: tuple[Watch, ...] = ()


@dataclass(frozen=True)
class Execution:
    """All of it.

    Attributes:
        call: What was asked.
        first: The events that are met at t0.
        arcs: The stretches, in order of time.
        status: How it ended.
        time: When, in flow time.
        state: x there, behind the last reset, shape (n,).
        note: One more sentence on the end.
    """

    call: Call
    first: tuple[Transition, ...]
    arcs: tuple[Arc, ...]
    status: Status
    time: float
    state: Tensor
    note: str

    @property
    def stats(self) -> Stats:
        """The costs of all runs."""
        return sum((arc.run.stats for arc in self.arcs if arc.run is not None), Stats())


def follow(call: Call) -> Execution:
    """Integrate from event to event until a rule ends it, or a run fails.

    Args:
        call: What was asked; `rules` has one for every event.
    """
    with torch.no_grad():
        return _Follower(call).execution()


class _Follower:
    """Where it stands, and what still waits."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._time, self._state = call.start, call.x0
        self._waiting = {watch.index: watch for watch in call.watches}
        self._counts = [0] * len(call.rules)
        self._status: Status | None = None
        self._note = ""
        self._latest: Watch | None = None
        self._called = False  # whether anything has happened yet
        self._here = 0  # how much has happened at this time

    def execution(self) -> Execution:
        """Go through to the end."""
        call, arcs = self._call, []
        for watch in call.watches:
            if watch.time is None and call.rules[watch.event].late:
                self._wait_to_leave(watch)
        first = self._settled(exact=True)
        while self._status is None:
            arcs.append(self._arc())
        opening = tuple(self._due_times())
        if opening:
            # What is asked for at the very end is the state behind it.
            arcs.append(Arc(self._time, self._state, opening, None, ()))
        return Execution(
            call, tuple(first), tuple(arcs), self._status, self._time, self._state, self._note
        )

    def _arc(self) -> Arc:
        begin, state, event = self._time, self._state, self._latest
        opening, ending = self._opening()
        if ending is not None:
            others = self._at_targets(ending.watch)
            return Arc(begin, state, tuple(opening), None, tuple(self._closed(ending)), others)
        # What is asked for at the time of a reset is the state behind it.
        clocks = [watch for watch in self._waiting.values() if watch.time is not None]
        end = min((-clock.target for clock in clocks if clock.count == 1), default=inf)
        behind = [clock for clock in clocks if clock.time == end and clock.count != 1]
        run = find_crossings(self._next_call(without=behind))
        self._waiting = {watch.index: watch for watch in (*run.waiting, *behind)}
        for hit in run.hits:
            self._counts[hit.watch.event] += 1
        self._time, self._state, self._here = run.time, run.state, 0
        closing: list[Transition] = []
        together: tuple[Watch, ...] = ()
        if run.status is Status.REACHED:
            last = run.hits[-1]
            self._counts[last.watch.event] -= 1
            together = self._at_targets(last.watch)
            closing = self._closed(last)
            repeated = event is not None and event.event == last.watch.event
            if repeated and self._is_short(begin) and self._status is None:
                self._end(Status.ZENO, f"the last two events are {run.time - begin:.2g} apart")
        else:
            self._end(run.status, run.note)
        return Arc(begin, state, tuple(opening), run, tuple(closing), together)

    def _at_targets(self, watch: Watch) -> tuple[Watch, ...]:
        """The other events that are at their targets here, to rounding, and count."""
        found = []
        for other in self._waiting.values():
            if other.event == watch.event or other.leave is not None:
                continue
            if other.time is not None:
                if other.time == self._time and self._call.rules[other.event].reset is not None:
                    found.append(other)
                continue
            point = self._point(other)
            if abs(point.value - other.target) <= self._band(other, point):
                found.append(other)
        return tuple(found)

    def _is_short(self, begin: float) -> bool:
        eps = torch.finfo(torch.float64).eps
        return self._time - begin <= _SHORTEST * eps * max(abs(begin), abs(self._time))

    def _next_call(self, without: Sequence[Watch]) -> Call:
        call = self._call
        later = [t for t in call.times[1:-1] if t > self._time]
        return replace(
            call,
            x0=self._state,
            times=(self._time, *later, call.times[-1]),
            watches=tuple(w for w in self._waiting.values() if w not in without),
            leave_first=False,
        )

    def _end(self, status: Status, note: str = "") -> None:
        self._status, self._note = status, note

    def _closed(self, hit: Hit) -> list[Transition]:
        """The event that ends a run, and those that follow on it at once."""
        taken = [self._taken(hit.watch)]
        return taken if self._status is not None else taken + self._settled()

    def _taken(self, watch: Watch) -> Transition:
        """An event takes place here."""
        rule, self._latest = self._call.rules[watch.event], watch
        self._called = True
        self._here += 1
        self._counts[watch.event] += 1
        before = after = self._state
        if rule.reset is not None:
            after = rule.reset.plain(self._time, before)
        self._state = after
        if rule.count is not None and self._counts[watch.event] >= rule.count:
            at_start = rule.status is Status.REACHED and self._time == self._call.start
            self._end(Status.AT_START if at_start else rule.status)
        elif self._here > _AT_ONCE:
            self._end(Status.ZENO, f"more than {_AT_ONCE} events at once")
        elif not bool(torch.isfinite(after).all()):
            self._end(Status.DIVERGED, f"the reset of {rule.name} is not finite")
        elif watch.time is not None:
            self._waiting.pop(watch.index, None)
        else:
            self._put_back(watch, rule)
        return Transition(watch, self._time, before, after, rule.reset)

    def _put_back(self, watch: Watch, rule: Rule) -> None:
        """An event waits again: J has to leave the target first."""
        for one in [w for w in self._waiting.values() if w.event == watch.event]:
            left = None if one.count is None or rule.ends_runs else one.count - 1
            self._waiting[one.index] = replace(one, count=1 if rule.ends_runs else left)
        again = self._wait_to_leave(self._waiting.get(watch.index, watch))
        value = watch.criterion.value(self._time, self._state)
        band = (again.leave or 0.0) - watch.target
        if abs(value - watch.target) > band:
            return
        self._waiting[watch.index] = replace(again, landed=rule.reset is not None)
        if rule.reset is not None:
            point = self._point(watch)
            if point.is_transversal(self._call.tolerances.rtol) and point.rate < 0:
                self._end(Status.ZENO, f"{rule.name} is met again where its reset ends")
        for one in [w for w in self._waiting.values() if w.event == watch.event]:
            if one.index != watch.index:
                self._wait_to_leave(one)

    def _wait_to_leave(self, watch: Watch) -> Watch:
        rounding = Rounding.at(watch.criterion, self._time, self._state)
        again = replace(watch, leave=rounding.beyond(watch.target), landed=False)
        self._waiting[watch.index] = again
        return again

    def _point(self, watch: Watch) -> Crossing:
        flow = self._call.flow.on(self._call.flow.number_at(self._time))
        velocity = flow(self._time, self._state)
        return Crossing.at(watch.criterion, self._time, self._state, velocity)

    def _band(self, watch: Watch, point: Crossing) -> float:
        """How far J may be from its target here for rounding: its own, or that of T."""
        rounding = Rounding.at(watch.criterion, self._time, self._state)
        of_time = _OF_TIME * torch.finfo(torch.float64).eps * abs(self._time) * abs(point.rate)
        return rounding.around(watch.target) + of_time

    def _settled(self, *, exact: bool = False) -> list[Transition]:
        """The events that are met here and now, one after the other.

        Args:
            exact: At t0: J <= target, whatever its rounding.
        """
        taken: list[Transition] = []
        while self._status is None:
            due = self._due(exact=exact and not taken)
            if due is None:
                break
            taken.append(self._taken(due))
        return taken

    def _due(self, *, exact: bool) -> Watch | None:
        """The first event that is met here, past its target."""
        for watch in self._in_order():
            if watch.time is not None:
                continue
            value = watch.criterion.value(self._time, self._state)
            if watch.leave is not None:
                if value > watch.leave:
                    self._waiting[watch.index] = watch.counting()
                continue
            if value <= watch.target and (exact or self._is_past(watch, value)):
                return watch
        return None

    def _in_order(self) -> list[Watch]:
        return sorted(self._waiting.values(), key=lambda watch: (watch.event, watch.index))

    def _is_past(self, watch: Watch, value: float) -> bool:
        rounding = Rounding.at(watch.criterion, self._time, self._state)
        return value < watch.target - rounding.around(watch.target)

    def _due_times(self) -> list[Hit]:
        """The known times at which the state is asked for, and which are now."""
        due = [w for w in self._in_order() if w.time is not None and w.time <= self._time]
        hits = [self._opened(watch, self._point(watch)) for watch in due if watch.count != 1]
        for hit in hits:
            self._waiting.pop(hit.watch.index)
        return hits

    def _opening(self) -> tuple[list[Hit], Hit | None]:
        """What is met at the start of a run, up to one that ends it."""
        hits: list[Hit] = []
        for watch in self._in_order():
            if watch.time is not None:
                if watch.time <= self._time and watch.count == 1:
                    hits.append(self._opened(watch, self._point(watch)))
                    return hits, hits[-1]
                continue
            if watch.leave is not None or not self._called:
                continue
            point = self._point(watch)
            if point.value > watch.target + self._band(watch, point):
                continue
            if not (point.is_transversal(self._call.tolerances.rtol) and point.rate < 0):
                self._wait_to_leave(watch)
                continue
            hits.append(self._opened(watch, point))
            if watch.count == 1:
                return hits, hits[-1]
            self._counts[watch.event] += 1
            self._put_back(watch, self._call.rules[watch.event])
        # The state behind all that happens here is what is asked for.
        return hits + self._due_times(), None

    @staticmethod
    def _opened(watch: Watch, point: Crossing) -> Hit:
        return Hit(
            watch,
            Status.REACHED,
            point.time,
            point.state,
            point,
            state_error=torch.zeros_like(point.state),
        )
