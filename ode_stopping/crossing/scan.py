"""The first downward crossings of targets inside one accepted step.

A target that J has to leave first is met by a fall that follows a rise, which is a fall of -J.

Solvers look at step ends only. A criterion that dips below the target and comes back inside one
step would be missed, so J is sampled on the dense output and followed by a local cubic. Where the
cubic, less twice its error, stays above the target, the interval is cleared; else it is split, at
the cubic's lowest point. A step over which the samples do not look like a cubic at all (a trivial
flow with an oscillating criterion: the solver's steps grow without limit) is taken again, shorter,
and the growth of steps is held to what J allows.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from heapq import merge
from itertools import pairwise
from math import isfinite

from scipy.optimize import brentq
from torch import Tensor

from ..call import Watch
from ..core.functions import CriterionMap
from ..core.level import Rounding
from ..solving.solver import Dense
from ..solving.step import Step
from .cubic import DEEPER, SAFETY, Cubic, cleared
from .watch import clearance

__all__ = ["Met", "NonFiniteCriterion", "Scan", "scan_step"]

# Two interior points, not symmetric and not at simple fractions, so that a periodic J is not
# aliased.
_INTERIOR = (0.36, 0.71)

# In a step that the flow does not limit in any way nothing is known of the scale on which J lives.
_MANY = (0.07, 0.15, 0.24, 0.31, 0.4, 0.46, 0.55, 0.62, 0.69, 0.78, 0.86, 0.93)

# What is next to an end.
_NEAR_THE_END = 0.06

_MAX_DEPTH = 14

# Misfit of a parabola to the four samples, relative to their range, up to which steps may keep
# their length, and above which J was not resolved.
_SMOOTH = 0.05

_ROUGH = 0.15

_MAX_SHRINK = 0.1

_MAX_GROWTH = 3.0


class NonFiniteCriterion(Exception):
    """J became NaN or infinite at `time`."""

    def __init__(self, time: float) -> None:
        super().__init__(f"non-finite criterion at t = {time:.9g}")
        self.time = time


@dataclass(frozen=True)
class Met:
    """A target that J meets in a step.

    Attributes:
        watch: Which one, as it was before.
        time: When, on the dense output.
        grazing: Whether J only touches the target there: it turns back within the tolerance of it.
        again: Whether it was met in the same step before.
    """

    watch: Watch
    time: float
    grazing: bool = False
    again: bool = False


@dataclass(frozen=True)
class Scan:
    """What was seen of J in one step.

    Attributes:
        end_value: J at the end of the step.
        met: The targets that are met, in order of time; empty where none is.
        left: Those that J had to leave first and has left, and a time from which on it is above.
        growth: By which factor the next step may be longer than this one for J to stay resolved.
        resolved: Whether the samples of J look smooth; if not, the step is to be taken again,
            `growth` times as long, and targets were not looked for.
        points: (t, J) in order, without the start of the step.
        samples: The same for a search of -J.
    """

    end_value: float
    met: tuple[Met, ...] = ()
    left: tuple[tuple[Watch, float], ...] = ()
    growth: float = _MAX_GROWTH
    resolved: bool = True
    points: tuple[tuple[float, float], ...] = ()
    samples: _Samples | None = None


class _Samples:
    """J at the points of a step that were looked at."""

    def __init__(
        self,
        step: Step,
        dense: Callable[[float], Tensor],
        criterion: CriterionMap,
        start_value: float,
    ) -> None:
        self.step = step
        self._dense = dense
        self._criterion = criterion
        self._sign = 1.0
        self.points = [(0.0, start_value)]
        self.look((*_INTERIOR, 1.0))

    @property
    def later(self) -> tuple[tuple[float, float], ...]:
        """(t, J) in order, without the start of the step."""
        return tuple((self.time(s), value) for s, value in self.points[1:])

    def miss(self, watches: Sequence[Watch], misfit: float, rtol: float) -> bool:
        """Whether four samples say at once that no target is met, and none is left.

        What `_first_bracket` asks of the three intervals, asked of the one cubic through them.
        """
        if len(self.points) != 4:
            return False
        cubic = Cubic.through(self.points)
        values = [value for _, value in self.points]
        falls = [w.target for w in watches if w.leave is None]
        rises = [-w.leave for w in watches if w.leave is not None]
        extent = max(max(values) - min(values), *map(abs, values))
        if falls and not cleared(cubic, self.points, max(falls), misfit, rtol * extent):
            return False
        if not rises:
            return True
        mirrored = [(s, -value) for s, value in self.points]
        return cleared(cubic.mirrored(), mirrored, max(rises), misfit, 0.0)

    def mirrored(self) -> _Samples:
        """The samples of -J; what is added to them is not seen here."""
        other = copy(self)
        other._sign = -self._sign
        other.points = [(s, -value) for s, value in self.points]
        return other

    def take_from(self, mirrored: _Samples) -> None:
        """What was looked at in the mirror image is seen here, too."""
        self.points = [(s, -value) for s, value in mirrored.points]

    def fraction(self, t: float) -> float:
        return (t - self.step.t0) / (self.step.t1 - self.step.t0)

    def again(self, met: Met) -> Watch:
        """The watch of a target that was met, as it waits from then on."""
        rounding = Rounding.at(self._criterion, met.time, self._dense(met.time))
        return replace(met.watch, leave=rounding.beyond(met.watch.target))

    def time(self, s: float) -> float:
        return self.step.t1 if s == 1.0 else self.step.t0 + s * (self.step.t1 - self.step.t0)

    def look(self, fractions: tuple[float, ...]) -> None:
        """Add J at further points, read in one go."""
        times = [self.time(s) for s in fractions]
        values = self._criterion.values(list(zip(times, self._states(fractions), strict=True)))
        for s, t, value in zip(fractions, times, values, strict=True):
            if not isfinite(value):
                raise NonFiniteCriterion(t)
            insort(self.points, (s, self._sign * value))

    def _states(self, fractions: tuple[float, ...]) -> Sequence[Tensor]:
        """x there; from a polynomial all at once."""
        if not isinstance(self._dense, Dense):
            return [self._dense(self.time(s)) for s in fractions]
        if fractions[-1] != 1.0:
            return self._dense.at_fractions(fractions)
        # The end itself is the state that the flow has just been evaluated at.
        return [*self._dense.at_fractions(fractions[:-1]), self.step.y1]

    def _value(self, s: float) -> float:
        value = self._criterion.value(self.time(s), self._dense(self.time(s)))
        if not isfinite(value):
            raise NonFiniteCriterion(self.time(s))
        return self._sign * value

    def at(self, s: float) -> float:
        value = self._value(s)
        insort(self.points, (s, value))
        return value

    def root(self, target: float, bracket: tuple[float, float]) -> float:
        """Where J meets the target in the bracket, in flow time."""
        # SciPy leaves a reference cycle around its argument; through the cell it holds nothing of
        # size.
        cell = [self._value]
        try:
            return self.time(
                brentq(lambda s: cell[0](s) - target, *bracket, xtol=1e-12, rtol=1e-12)
            )
        finally:
            cell.clear()

    def model(self, a: float) -> Cubic:
        """The cubic through the four points around the interval that starts at a."""
        index = next(i for i, (s, _) in enumerate(self.points) if s >= a)
        first = min(max(index - 1, 0), len(self.points) - 4)
        return Cubic.through(self.points[first : first + 4])

    def resolution(self, watches: Sequence[Watch]) -> tuple[float, bool]:
        """By how much the next step may be longer for J to stay resolved, and whether it is now."""
        values = [value for _, value in self.points]
        low, high = min(values), max(values)
        # Wiggles that are small against the distance to the nearest target do not matter.
        extent = high - low + 0.25 * clearance(watches, low, high)
        roughness = self.misfit() / extent if extent > 0 else 0.0
        growth = 0.9 * (_SMOOTH / max(roughness, 1e-9)) ** (1 / 3)
        return min(max(growth, _MAX_SHRINK), _MAX_GROWTH), roughness <= _ROUGH

    def look_at_ends(self, watches: Sequence[Watch]) -> None:
        """Look at J next to an end of the step where it may have dipped to a target and back.

        J that is lowest at an end may turn just before it (or just after), which four samples do
        not show: they say so only where the target is farther away than J has come in the step.
        """
        values = [value for _, value in self.points]
        extent = max(values) - min(values)
        for value, fraction in ((values[0], _NEAR_THE_END), (values[-1], 1 - _NEAR_THE_END)):
            near = value == min(values) and any(0 < value - w.target < extent for w in watches)
            if near and all(s != fraction for s, _ in self.points):
                self.look((fraction,))

    def lowest(self, begin: float = 0.0) -> tuple[float, float]:
        """(s, J) of the smallest value seen from `begin` on."""
        return min((p for p in self.points if p[0] >= begin), key=lambda point: point[1])

    def touches(self, low: float, gap: float, rtol: float) -> bool:
        """Whether J is as near to a target where it turns as the error of x moves it there.

        An error of rtol |x_i| in each x_i: |J| itself may be any constant more.
        """
        values = [value for _, value in self.points]
        extent = max(values) - min(values)
        if abs(gap) <= 0.01 * rtol * extent:
            return True
        if abs(gap) > rtol * max(extent, *map(abs, values)):
            return False
        t, x = self.time(low), self._dense(self.time(low))
        return abs(gap) <= rtol * float((self._criterion.gradient(t, x)[1] * x).abs().sum())

    def misfit(self) -> float:
        """By how much the third of four samples misses the parabola through the others, at most."""
        worst = 0.0
        for first in range(len(self.points) - 3):
            four = self.points[first : first + 4]
            (s0, _), (s1, _), (s, _), (s3, _) = four
            third = Cubic.through(four).coefficients[3]
            worst = max(worst, abs(third * (s - s0) * (s - s1) * (s - s3)))
        return worst


def scan_step(
    step: Step,
    dense: Callable[[float], Tensor],
    criterion: CriterionMap,
    start_value: float,
    watches: Sequence[Watch],
    *,
    rtol: float = 0.0,
    may_retake: bool = False,
    unlimited: bool = False,
    seen: Scan | None = None,
) -> Scan:
    """Look for the first crossings in a step whose start is above all targets that count.

    Args:
        step: The accepted step.
        dense: t -> x(t) inside of it.
        criterion: J.
        start_value: J at the start of the step: above every target that counts, and not above
            what it has to exceed to leave another.
        watches: The targets that are still to be met, from the highest.
        rtol: Relative tolerance of the solve: a dip below the target that is shallower than what an
            error of this size in x does to J is a touch.
        may_retake: Whether an unresolved step may be given back; else it is searched as it is.
        unlimited: Whether nothing limited the length of the step: J is looked at more often.
        seen: What was seen in the step of -J, which need not be looked at again.

    Raises:
        NonFiniteCriterion: J is NaN or infinite at a point that was looked at.
    """
    if seen is not None and seen.samples is not None:
        samples = seen.samples.mirrored()
    else:
        samples = _Samples(step, dense, criterion, start_value)
    growth, resolved = samples.resolution(watches)
    if resolved and unlimited and seen is None:
        samples.look(_MANY)
        finer, resolved = samples.resolution(watches)
        growth = min(growth, finer)
    end_value = samples.points[-1][1]
    if may_retake and not resolved:
        return Scan(end_value, growth=growth, resolved=False)
    samples.look_at_ends(watches)
    misfit = samples.misfit()
    if samples.miss(watches, misfit, rtol):
        return Scan(end_value, growth=growth, points=samples.later, samples=samples)
    falls: list[Met] = []
    for watch in watches:
        if watch.leave is not None:
            continue
        found = _first_crossing(samples, watch, misfit, rtol)
        if found is None:
            break  # nor does J meet the lower ones
        falls.append(found)
    returns: list[Met] = []
    left: list[tuple[Watch, float]] = []
    late = [watch for watch in watches if watch.leave is not None]
    for watch, begin in [
        *((watch, 0.0) for watch in late),
        *((samples.again(one), samples.fraction(one.time)) for one in falls if one.watch.repeats),
    ]:
        for rise, fall in _returns(samples, watch, misfit, rtol, begin):
            left.append(rise)
            if fall is not None:
                returns.append(replace(fall, again=watch not in late or fall.again))
    # Close targets stay in their order, whatever the rounding of their times.
    returns.sort(key=_time_of)
    met = tuple(merge(falls, returns, key=_time_of))
    return Scan(end_value, met, tuple(left), growth, points=samples.later, samples=samples)


def _time_of(met: Met) -> float:
    return met.time


def _returns(
    samples: _Samples, watch: Watch, misfit: float, rtol: float, begin: float
) -> Iterator[tuple[tuple[Watch, float], Met | None]]:
    """From `begin` on: J leaves the target, and when; how it comes down to it again; and so on."""
    again = False
    while watch.leave is not None:
        rise = _first_rise(samples, watch.leave, misfit, begin)
        if rise is None:
            return
        fall = _first_crossing(samples, watch, misfit, rtol, rise)
        yield (watch, samples.time(rise)), None if fall is None else replace(fall, again=again)
        if fall is None or not watch.repeats:
            return
        watch, begin, again = samples.again(fall), samples.fraction(fall.time), True


def _first_rise(samples: _Samples, level: float, misfit: float, begin: float = 0.0) -> float | None:
    """A point of the step, as a share of it, at which J has just risen to a level; or None."""
    mirrored = samples.mirrored()
    bracket = None
    if begin > 0.0 and all(s != begin for s, _ in mirrored.points):
        mirrored.at(begin)
    for (a, va), (b, vb) in pairwise([point for point in mirrored.points if point[0] >= begin]):
        bracket = _first_bracket(mirrored, -level, a, va, b, vb, misfit, 0)
        if bracket is not None:
            break
    samples.take_from(mirrored)
    # J rises inside of the bracket and stays up to its end.
    return None if bracket is None else bracket[1]


def _first_crossing(
    samples: _Samples, watch: Watch, misfit: float, rtol: float, begin: float = 0.0
) -> Met | None:
    """Where J meets a target for the first time in the step, or touches it, from `begin` on."""
    bracket, target = None, watch.target
    for (a, va), (b, vb) in pairwise([point for point in samples.points if point[0] >= begin]):
        bracket = _first_bracket(samples, target, a, va, b, vb, misfit, 0)
        if bracket is not None:
            break
    low, value = samples.lowest(begin)
    turns_back = begin < low < 1.0 and samples.points[-1][1] > target
    touches = turns_back and samples.touches(low, value - target, rtol)
    if bracket is not None:
        return Met(watch, samples.root(target, bracket), grazing=touches)
    return Met(watch, samples.time(low), grazing=True) if touches else None


def _first_bracket(
    samples: _Samples,
    target: float,
    a: float,
    va: float,
    b: float,
    vb: float,
    error: float,
    depth: int,
) -> tuple[float, float] | None:
    """The first subinterval with J(a) > target >= J(b), or None if there is no room for one."""
    model = samples.model(a)
    low = model.lowest(a, b)
    below = vb <= target
    if below and (depth >= _MAX_DEPTH or (low == b and va - vb > SAFETY * error)):
        return a, b
    above = model(low) - target
    # The misfit elsewhere says little of a dip: it is looked at, unless it would have to be deeper
    # than the model's by far.
    dip = min(va, vb) - model(low) if a < low < b and depth == 0 else 0.0
    cleared = above > SAFETY * error and above > DEEPER * dip
    if not below and (cleared or depth >= _MAX_DEPTH):
        return None
    # Splitting at the lowest point finds a dip, and a touch, in a few evaluations.
    margin = 0.1 * (b - a)
    m = min(max(low, a + margin), b - margin) if a < low < b else 0.5 * (a + b)
    vm = samples.at(m)
    error = abs(vm - model(m))
    left = _first_bracket(samples, target, a, va, m, vm, error, depth + 1)
    if left is not None or vm <= target:
        return left
    return _first_bracket(samples, target, m, vm, b, vb, error, depth + 1)
