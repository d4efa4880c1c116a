"""The targets of a run that are still to be met. Twin of `ode_stopping.crossing.watches`."""

from __future__ import annotations

from math import inf

from ode_stopping.core.level import Rounding, near_targets, warn_of_the_start

from ..call import Call

__all__ = ["Watches"]


class Watches:
    """What a run waits for.

    Without `leave_first` every target counts from the start. With it a target that J is not clearly
    above of at the start has to be left first.

    Args:
        call: What was asked.
        value: J at the start.

    Attributes:
        highest: The highest target that counts; -inf where none does.
        leave: What J has to exceed for the next target to count; inf where all do.
    """

    def __init__(self, call: Call, value: float) -> None:
        values = call.values
        self._values = values
        self._counting = sorted(range(len(values)), key=lambda i: -values[i])
        self._to_be_left: dict[int, float] = {}
        if call.leave_first:
            rounding = Rounding.at(call.criterion, call.update.clock.start_value, call.begin)
            levels = {i: rounding.beyond(values[i]) for i in self._counting}
            self._to_be_left = {i: level for i, level in levels.items() if not value > level}
            self._counting = [i for i in self._counting if i not in self._to_be_left]
        else:
            _warn_of_the_start(call, value)
        self._look()

    def __bool__(self) -> bool:
        return bool(self._counting or self._to_be_left)

    def _look(self) -> None:
        self.highest = self._values[self._counting[0]] if self._counting else -inf
        self.leave = min(self._to_be_left.values(), default=inf)

    def concerned(self, value: float) -> bool:
        """Whether a value of J meets a target, or leaves one."""
        return value <= self.highest or value > self.leave

    def met_by(self, value: float) -> list[int]:
        """Take the targets that a value of J meets away, from the highest; others it leaves.

        Args:
            value: J at a step.
        """
        met = [i for i in self._counting if value <= self._values[i]]
        self._counting = self._counting[len(met) :]
        left = {i for i, level in self._to_be_left.items() if value > level}
        if left:
            self._to_be_left = {i: v for i, v in self._to_be_left.items() if i not in left}
            self._counting = sorted([*self._counting, *left], key=lambda i: -self._values[i])
        self._look()
        return met

    def never_left(self, call: Call) -> str:
        """What to say of targets that J was never above of; else nothing."""
        shown, side = call.criterion.shown, call.criterion.far_side
        names = [f"{shown(self._values[i]):g}" for i in self._to_be_left]
        if not names:
            return ""
        return f"; J never was {side} the target {', '.join(names)}, as leave_first=True asks for"


def _warn_of_the_start(call: Call, value: float) -> None:
    """Warn where a rounding decides whether a target is met at the start."""
    near = near_targets(value, call.begin, call.values)
    if not near:
        return
    criterion, update, clock = call.criterion, call.update, call.update.clock
    rounding = Rounding.at(criterion, clock.start_value, call.begin)
    near = [target for target in near if abs(value - target) <= rounding.around(target)]
    if not near:
        return
    following = criterion.value(clock.time(1), update.step(0, call.begin))
    for target in near:
        if following > rounding.beyond(target):
            warn_of_the_start(criterion, value, target)
