"""The path of a hybrid problem by SciPy's DOP853, with event handling of its own.

Every step is sampled on its dense output for changes of sign; a crossing is found there by Brent's
method, then the step is taken again from its start to the crossing, which Newton's method polishes.
The rules of hits are those of the contract of `integrate`: what is met at the start is a hit unless
it is to be left first; a watch is armed again once J is on the other side; a reset that lands past
another watch's surface makes a hit of it at once, in the order of the list. What the contract ends
or leaves open (sliding, landing past the own surface, hits of two watches at once) is `Unusable`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.integrate import DOP853, solve_ivp
from scipy.optimize import brentq

from .problem import NUMPY, Hybrid, Unusable

RTOL, ATOL = 1e-13, 1e-14
_MOST_STEPS, _MOST_HITS, _MOST_AT_ONCE = 20_000, 60, 12
_ON_SURFACE = 1e-9  # of |target| + 1: nearer than this a reset has landed on the surface
_POLISHED = 4  # steps of Newton's method


@dataclass
class Hit:
    """One hit: which watch, when, and the state on both sides of its reset."""

    event: int
    time: float
    state: Any
    after: Any
    count: int
    rate: float = np.nan
    rate_scale: float = np.nan
    at_once: bool = False


@dataclass
class Run:
    """What a run passes through.

    Attributes:
        hits: In order.
        at: State at every fixed time, by its index; at a jump the one behind it.
        sequence: Hits, fixed times and breakpoints in order, without numbers.
        times: When each of these was.
        end_time: When it ended.
        end_state: The state there, before a reset.
        ended: By "until", "event", or "most" (hits that were wanted).
        dips: Of J that do not reach the target: the watch, and the distance.
        range: Least and largest J of every watch on the path.
        marks: After every step and every jump, where the run stood.
    """

    hits: list[Hit] = field(default_factory=list)
    at: dict[int, Any] = field(default_factory=dict)
    sequence: list[tuple[str, int]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    end_time: float = np.nan
    end_state: Any = None
    ended: str = ""
    dips: list[tuple[int, float]] = field(default_factory=list)
    range: dict[int, tuple[float, float]] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)

    @property
    def closest(self) -> float:
        """Of the dips of J that do not reach the target: distance over the range of J."""
        found = [far / max(self.range[e][1] - self.range[e][0], 1e-300) for e, far in self.dips]
        return min(found, default=np.inf)


@dataclass(frozen=True)
class Mark:
    """Where a run stands: enough to go on from there with another state.

    Attributes:
        time: Of it.
        state: There.
        sides: Of every watch: 1 where J is on the side from which it is met, else -1.
        counts: Hits of every watch so far.
        passed: How many of the known times lie behind.
    """

    time: float
    state: Any
    sides: tuple[float, ...]
    counts: tuple[int, ...]
    passed: int


class Walk:
    """One run.

    Args:
        problem: The problem.
        p: All values; the problem's own where None.
        rtol: Tolerance, atol a tenth of it.
        samples: A step is looked at this often for changes of sign.
        most: End after this many hits (for exploring), as if the time had come.
    """

    def __init__(
        self,
        problem: Hybrid,
        p: dict[str, Any] | None = None,
        *,
        rtol: float = RTOL,
        samples: int = 6,
        most: int | None = None,
    ) -> None:
        self.problem, self.p = problem, problem.p if p is None else p
        self.rtol, self.most = rtol, most
        self.shares = np.arange(1, samples + 1) / samples
        self.signs = [-1.0 if w.direction == "rising" else 1.0 for w in problem.watches]
        self.surfaces = [i for i, w in enumerate(problem.watches) if w.criterion is not None]
        self.stops = self._stops()
        self.run = Run()
        self.counts = [0] * len(problem.watches)
        self.sides = [0.0] * len(problem.watches)
        self.passed = 0
        self.on: list[float] = []
        self.tails: dict[int, Any] = {}  # the last values of J, for dips across steps

    def _stops(self) -> list[tuple[float, int, str, int]]:
        """Known times in order; where two coincide, jumps come before fixed times and the end."""
        p, problem = self.p, self.problem
        found = [(p[name], 0, "break", k) for k, name in enumerate(problem.breakpoints)]
        found += [
            (p[w.level], 1, "hit", i) for i, w in enumerate(problem.watches) if w.criterion is None
        ]
        found += [(float(t), 2, "at", k) for k, t in enumerate(p.get("at", ()))]
        if "until" in p:
            found.append((p["until"], 3, "until", 0))
        return sorted(s for s in found if s[0] >= p["t0"])

    # What is evaluated.

    def rates(self, t: float, x: Any) -> Any:
        return self.problem.velocity(NUMPY, t, x, self.p, self.on)

    def value(self, event: int, t: Any, x: Any) -> Any:
        """J less the target, positive on the side from which it is met."""
        watch = self.problem.watches[event]
        assert watch.criterion is not None
        return self.signs[event] * (watch.criterion(NUMPY, t, x, self.p) - self.p[watch.level])

    def slope(self, event: int, t: float, x: Any) -> tuple[float, float]:
        """Of `value` along the path, and its terms, sum_i |g_i F_i| + |J_t|; by differences."""
        rate = self.rates(t, x)
        sizes = 1e-5 * np.maximum(np.abs(x), 1.0)
        terms = []
        for i, h in enumerate(sizes):
            step = np.zeros_like(x)
            step[i] = h
            up, down = self.value(event, t, x + step), self.value(event, t, x - step)
            terms.append((up - down) / (2 * h) * rate[i])
        h = 1e-5 * max(abs(t), 1.0)
        terms.append((self.value(event, t + h, x) - self.value(event, t - h, x)) / (2 * h))
        return float(np.sum(terms)), float(np.abs(terms).sum())

    # The run.

    def go(self) -> Run:
        """From the start."""
        t, x = self.p["t0"], np.array(self.p["x0"], float)
        self.on = [float(self.p[name] <= t) for name in self.problem.breakpoints]
        met = []
        for i in self.surfaces:
            watch, value = self.problem.watches[i], float(self.value(i, t, x))
            if abs(value) <= 1e3 * self._rounding(i):
                raise Unusable("it starts on a surface")
            self.sides[i] = 1.0 if value > 0 else -1.0
            if value < 0 and watch.direction != "either" and not watch.leave_first:
                met.append(i)
        for i in met:  # in the order of the list; each sees what those before have left
            if float(self.value(i, t, x)) < 0:
                x, over = self._hit(i, t, x)
                if over:
                    return self._end(t, self.run.hits[-1].state, "event")
        return self._walk(t, x)

    def again(self, mark: Mark, state: Any) -> Run:
        """From the start of a smooth piece, or a step of it, with another state there."""
        self.sides, self.counts, self.passed = list(mark.sides), list(mark.counts), mark.passed
        self.on = [0.0] * len(self.problem.breakpoints)
        for _, _, kind, index in self.stops[: mark.passed]:
            if kind == "break":
                self.on[index] = 1.0
        self.most = None
        return self._walk(mark.time, np.array(state, float))

    def _walk(self, t: float, x: Any) -> Run:
        self._mark(t, x)
        first: float | None = None
        for _ in range(_MOST_STEPS):
            stop = self.stops[self.passed][0] if self.passed < len(self.stops) else t + 1e6
            if stop > t:
                t, x, event, first = self._to(t, x, stop, first)
                if event is not None:
                    x, over = self._hit(event, t, x)
                    if over:
                        return self._end(t, self.run.hits[-1].state, "event")
                    if self.most is not None and len(self.run.hits) >= self.most:
                        return self._end(t, x, "most")
                    self._mark(t, x)
                    continue
            if self.passed >= len(self.stops):
                raise Unusable("it has no end")
            _, _, kind, index = self.stops[self.passed]
            self.passed += 1
            if kind == "until":
                return self._end(t, x, "until")
            if kind == "at":
                self._note("at", index, t)
                self.run.at[index] = x
                continue
            if kind == "break":
                self._note("break", index, t)
                self.tails = {}
                self.on[index] = 1.0
            else:
                x, over = self._hit(index, t, x)
                if over:
                    return self._end(t, self.run.hits[-1].state, "event")
            self._mark(t, x)
        raise Unusable("too many steps")

    def _to(
        self, t: float, x: Any, stop: float, first: float | None
    ) -> tuple[float, Any, int | None, float | None]:
        """To the stop, or to the first crossing before it."""
        # A step that would end next to the stop makes the stop's own step a tiny one.
        first = None if first is None else min(first, stop - t)
        solver = DOP853(
            self.rates, t, x, stop, rtol=self.rtol, atol=0.1 * self.rtol, first_step=first
        )
        size = first
        while solver.status == "running":
            solver.step()
            if solver.status == "failed" or not np.isfinite(solver.y).all():
                raise Unusable("the path ends early")
            if solver.status == "running":
                size = float(solver.step_size)
            found = self._crossing(solver) if self.surfaces else None
            if found is not None:
                event, near = found
                time, state = self._polished(event, near, solver)
                return time, state, event, size
            self._mark(float(solver.t), solver.y)
        return stop, solver.y, None, size

    def _crossing(self, solver: Any) -> tuple[int, float] | None:
        """The first watch that is met within the step, and about when."""
        dense, begin = solver.dense_output(), float(solver.t_old)
        times = begin + self.shares * (float(solver.t) - begin)
        states = dense(times)
        found: list[tuple[float, int]] = []
        for i in self.surfaces:
            values = np.broadcast_to(self.value(i, times, states), times.shape)
            low, high = self.run.range.get(i, (np.inf, -np.inf))
            self.run.range[i] = (min(low, float(values.min())), max(high, float(values.max())))
            side, either = self.sides[i], self.problem.watches[i].direction == "either"
            for k, value in enumerate(values):
                new = 1.0 if value > 0 else -1.0
                if new != side and (either or side > 0):
                    left = times[k - 1] if k else begin
                    found.append((self._brent(i, dense, left, times[k], side), i))
                    break
                side = new
            else:
                self._dips(i, values)
        time, event = min(found, default=(float(solver.t), -1))
        for i in self.surfaces:
            if i != event:  # it may have been armed on the way
                self.sides[i] = 1.0 if float(self.value(i, time, dense(time))) > 0 else -1.0
        return (event, time) if found else None

    def _dips(self, event: int, values: Any) -> None:
        """Where J turns without having met the target."""
        values = np.concatenate([self.tails.get(event, values[:0]), values])
        self.tails[event] = values[-2:]
        inner, crossed = np.abs(values[1:-1]), values[:-1] * values[1:] <= 0
        turns = (inner < np.abs(values[:-2])) & (inner <= np.abs(values[2:]))
        turns &= ~(crossed[:-1] | crossed[1:])  # to the other side, where it is armed
        self.run.dips += [(event, float(v)) for v in inner[turns]]

    def _brent(self, event: int, dense: Any, left: float, right: float, side: float) -> float:
        value = lambda t: float(self.value(event, t, dense(t)))  # noqa: E731
        at_left = value(left)
        if at_left * side <= 0:
            # Just behind a hit or a reset the value is its rounding; it is looked for behind that.
            shares = left + (right - left) * np.geomspace(1e-6, 1.0, 20)
            left = next((t for t in shares[:-1] if value(t) * side > 0), np.nan)
            if not np.isfinite(left):
                raise Unusable("a hit right behind another")
        return float(brentq(value, left, right, xtol=1e-14, rtol=1e-14))

    def _polished(self, event: int, near: float, solver: Any) -> tuple[float, Any]:
        """The step again, from its start to the crossing."""
        time, state, aim = float(solver.t_old), solver.dense_output().y_old, near
        for _ in range(_POLISHED):
            if aim != time:
                found = solve_ivp(
                    self.rates,
                    (time, aim),
                    state,
                    method="DOP853",
                    rtol=self.rtol,
                    atol=0.1 * self.rtol,
                    first_step=abs(aim - time),
                )
                if found.status != 0:
                    raise Unusable("the path ends early")
                time, state = aim, found.y[:, -1]
            slope = self.slope(event, time, state)[0]
            late = float(self.value(event, time, state)) / slope if slope else np.inf
            if not np.isfinite(late):
                raise Unusable("J' is 0 at a hit")
            aim = time - late
        return time, state

    def _hit(self, event: int, t: float, x: Any) -> tuple[Any, bool]:
        """The hit, its reset, and the hits that the reset makes at once."""
        following: int | None = event
        self.tails = {}
        moved = False
        for _ in range(_MOST_AT_ONCE):
            if following is None:
                return x, False
            event, watch = following, self.problem.watches[following]
            rate = self.slope(event, t, x) if watch.criterion is not None else (np.nan, np.nan)
            self.counts[event] += 1
            hit = Hit(event, t, x, x, self.counts[event], *rate)
            hit.at_once = moved
            self.run.hits.append(hit)
            self._note("hit", event, t)
            if len(self.run.hits) > _MOST_HITS:
                raise Unusable("too many hits")
            # On the surface, or past it: the other side counts from now on.
            if watch.criterion is not None:
                self.sides[event] = -self.sides[event] if watch.direction == "either" else -1.0
            if watch.reset is not None:
                hit.after = np.asarray(watch.reset(NUMPY, t, x, self.p), float)
                x, moved = hit.after, True
            if watch.terminal or (watch.count is not None and self.counts[event] >= watch.count):
                return x, True
            following = self._landed(event, t, x) if moved else None
        raise Unusable("resets without end")

    def _landed(self, event: int, t: float, x: Any) -> int | None:
        """Sides behind a reset; the first watch, if any, past whose surface it landed."""
        following = None
        own = self.problem.watches[event].reset is not None
        for i in self.surfaces:
            watch, value = self.problem.watches[i], float(self.value(i, t, x))
            if i == event and not own:
                continue
            new = 1.0 if value > 0 else -1.0
            if abs(value) <= _ON_SURFACE * (1.0 + abs(self.p[watch.level])):
                if i != event:
                    raise Unusable("a reset lands on a surface")
                if watch.direction == "either" or self.slope(i, t, x)[0] <= 0:
                    raise Unusable("a reset lands on its surface, and J goes on through it")
                new = 1.0
            elif i == event and (watch.direction == "either" or new < 0):
                raise Unusable("a reset lands past its own surface")
            if new != self.sides[i] and watch.direction == "either":
                raise Unusable("a reset lands past a surface that is met from either side")
            if new > 0 or self.sides[i] < 0:
                self.sides[i] = new
            elif following is None:
                following = i
        return following

    def _rounding(self, event: int) -> float:
        return 1e-12 * (1.0 + abs(self.p[self.problem.watches[event].level]))

    def _note(self, kind: str, index: int, t: float) -> None:
        self.run.sequence.append((kind, index))
        self.run.times.append(t)

    def _mark(self, t: float, x: Any) -> None:
        self.run.marks.append(Mark(t, x, tuple(self.sides), tuple(self.counts), self.passed))

    def _end(self, t: float, x: Any, how: str) -> Run:
        self._note(how, 0, t)
        self.run.end_time, self.run.end_state, self.run.ended = t, x, how
        return self.run
