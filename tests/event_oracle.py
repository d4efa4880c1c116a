"""Problems with events, and their right values from SciPy: nothing of torch or of the library.

A problem is written once, in formulas that take the module they compute with (`math` here, `torch`
where the library solves it). The solution here is DOP853 at 1e-12, one step after the other, with
events of its own: J is looked at in every step at many points, the crossing is found by Brent's
method on the interpolant and polished by Newton's on paths that are integrated anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.integrate import DOP853
from scipy.optimize import brentq

# A number, the name of a leaf, or a formula (m, p) -> number.
Number = float | str | Callable[[Any, Mapping[str, Any]], Any]
# (m, p, t, x) -> a number, or a list of the entries of a state.
Formula = Callable[[Any, Mapping[str, Any], Any, Sequence[Any]], Any]

# J that is this close to its target counts as on it.
ON_TARGET = 1e-10
POINTS_A_STEP = 12
RTOL, ATOL = 1e-12, 1e-13
# Steps of the differences, relative to the leaf; the second is half of the first.
STEP = 1e-4


def number(of: Number, m: Any, p: Mapping[str, Any]) -> Any:
    """The value of a number, with the leaves p."""
    if isinstance(of, str):
        return p[of]
    return of(m, p) if callable(of) else of


@dataclass(frozen=True)
class Crossing:
    """An event where J meets a target; the fields are those of the library's `Event`."""

    criterion: Formula
    target: Number = 0.0
    direction: str = "falling"
    terminal: bool = False
    reset: Formula | None = None
    count: int | None = None
    leave_first: bool = False


@dataclass(frozen=True)
class Known:
    """An event at a known time."""

    time: Number
    reset: Formula | None = None
    terminal: bool = False


@dataclass(frozen=True)
class Problem:
    """A flow with events, and what is asked of it.

    Attributes:
        name: What it is.
        source: Where a problem of this kind was seen; "-": nowhere, it is our own.
        flow: (m, p, t, x) -> x', a list of n entries.
        start: (m, p) -> x(t0), a list of n entries.
        leaves: Numbers to differentiate to, by name.
        events: What is looked for.
        asked: Numbers to find: ("time", event, n), ("state", event, n, entry), ("after", event, n,
            entry), ("at", row, entry), ("end", entry); events from 0, n from 1; ("end time",).
        t0: Start time.
        until: End time.
        at: Times of values.
        breakpoints: Times at which the flow jumps.
        closed: p -> the same numbers in closed form, where there is one.
    """

    name: str
    source: str
    flow: Formula
    start: Callable[[Any, Mapping[str, Any]], list[Any]]
    leaves: dict[str, float]
    events: tuple[Crossing | Known, ...]
    asked: tuple[tuple[Any, ...], ...]
    t0: Number = 0.0
    until: Number | None = None
    at: tuple[Number, ...] = ()
    breakpoints: tuple[Number, ...] = ()
    closed: Callable[[Mapping[str, float]], list[float]] | None = None


@dataclass
class Path:
    """What was found: hits (event, time, before, after) in order of time, values, the end."""

    hits: list[tuple[int, float, np.ndarray, np.ndarray]] = field(default_factory=list)
    values: dict[int, np.ndarray] = field(default_factory=dict)
    end: tuple[float, np.ndarray] = (math.nan, np.empty(0))


@dataclass
class _Watch:
    """One direction of one event: it is met where `distance` comes down to zero."""

    event: int
    sign: float
    crossing: Crossing
    armed: bool = False


class _Run:
    def __init__(self, problem: Problem, leaves: Mapping[str, float]) -> None:
        self.problem, self.leaves = problem, leaves
        self.path = Path()
        self.t = float(number(problem.t0, math, leaves))
        self.x = np.array(problem.start(math, leaves), dtype=float)
        self.over = False
        self.watches = [
            _Watch(index, sign, event)
            for index, event in enumerate(problem.events)
            if isinstance(event, Crossing)
            for sign in {"falling": [1.0], "rising": [-1.0]}.get(event.direction, [1.0, -1.0])
        ]

    def rates(self, t: float, x: np.ndarray) -> np.ndarray:
        return np.array(self.problem.flow(math, self.leaves, t, x.tolist()), dtype=float)

    def distance(self, watch: _Watch, t: float, x: np.ndarray) -> float:
        value = watch.crossing.criterion(math, self.leaves, t, x.tolist())
        return watch.sign * float(value - number(watch.crossing.target, math, self.leaves))

    def slope(self, watch: _Watch, t: float, x: np.ndarray) -> float:
        step, rates = 1e-6, self.rates(t, x)
        ahead = self.distance(watch, t + step, x + step * rates)
        return (ahead - self.distance(watch, t - step, x - step * rates)) / (2 * step)

    def value_of(self, of: Number) -> float:
        return float(number(of, math, self.leaves))

    def solve(self) -> Path:
        problem = self.problem
        for watch in self.watches:
            distance = self.distance(watch, self.t, self.x)
            late = watch.crossing.leave_first or watch.crossing.direction == "either"
            watch.armed = distance > ON_TARGET if late else True
        self.settle(at_start=True)
        stops = [(self.value_of(one), 0, None) for one in problem.breakpoints]
        for index, event in enumerate(problem.events):
            if isinstance(event, Known):
                stops.append((self.value_of(event.time), 1, index))
        # Behind the events at the same time: a value at a jump is the one behind it.
        stops += [(self.value_of(one), 2, row) for row, one in enumerate(problem.at)]
        last = math.inf if problem.until is None else self.value_of(problem.until)
        if problem.until is not None:
            stops.append((last, 3, None))
        for time, kind, index in sorted(stops, key=lambda stop: stop[:2]):
            while not self.over and self.t < time:
                self.advance(time)
            if self.over or time > last:
                break
            if kind == 1:
                self.take(index, problem.events[index])
                self.settle()
            elif kind == 2:
                self.path.values[index] = self.x
            elif kind == 3:
                self.over = True
        while not self.over:
            self.advance(math.inf)
        self.path.end = (self.t, self.x)
        return self.path

    def advance(self, stop: float) -> None:
        """Up to the next hit or to `stop`."""
        begin, margin = self.t, 1e-13

        def inside(t: float, x: np.ndarray) -> np.ndarray:
            # Stages at both ends of a stretch belong to this side of a jump.
            if self.problem.breakpoints:
                t = min(max(t, begin + margin), stop - margin)
            return self.rates(t, x)

        solver = DOP853(inside, self.t, self.x, stop, rtol=RTOL, atol=ATOL)
        while solver.status == "running":
            before, since = solver.y.copy(), solver.t
            assert solver.step() is None, "DOP853 gave up"
            path = solver.dense_output()
            times = np.linspace(since, solver.t, POINTS_A_STEP + 1)
            states = [before, *(path(t) for t in times[1:-1]), solver.y]
            found: list[tuple[float, int, _Watch]] = []
            left: list[tuple[float, _Watch]] = []
            for place, watch in enumerate(self.watches):
                previous = times[0]
                for t, x in zip(times, states, strict=True):
                    distance = self.distance(watch, t, x)
                    if watch.armed and distance <= 0.0 and t > times[0]:
                        root = self.root(watch, path, previous, t)
                        found.append((root, place, watch))
                        break
                    if not watch.armed and distance > ON_TARGET:
                        watch.armed = True
                        left.append((t, watch))
                    previous = t
            if found:
                time, _, watch = min(found, key=lambda one: one[:2])
                for since_then, other in left:  # what comes after the hit never happens
                    other.armed = other.armed and since_then <= time
                self.polish(watch, since, before, time, inside)
                self.take(watch.event, watch.crossing)
                self.settle()
                return
        self.t, self.x = solver.t, solver.y

    def root(self, watch: _Watch, path: Any, left: float, right: float) -> float:
        """Where the interpolant of a step meets the target."""
        return brentq(lambda t: self.distance(watch, t, path(t)), left, right, xtol=1e-14)

    def polish(
        self, watch: _Watch, since: float, before: np.ndarray, time: float, rates: Any
    ) -> None:
        """Newton's method for the time, on paths integrated anew from the step's start."""
        for _ in range(4):
            solver = DOP853(rates, since, before, time, rtol=RTOL, atol=ATOL)
            while solver.status == "running":
                solver.step()
            change = self.distance(watch, time, solver.y) / self.slope(watch, time, solver.y)
            self.t, self.x = time, solver.y
            if abs(change) < 1e-14 * max(1.0, abs(time)):
                break
            time = max(time - change, since + 1e-15)

    def take(self, index: int, event: Crossing | Known) -> None:
        before = after = self.x
        if event.reset is not None:
            entries = event.reset(math, self.leaves, self.t, before.tolist())
            after = np.array(entries, dtype=float)
        self.path.hits.append((index, self.t, before, after))
        self.x = after
        count = sum(hit[0] == index for hit in self.path.hits)
        ends = event.count if isinstance(event, Crossing) else None
        if count >= ends if ends is not None else event.terminal:
            self.over = True
        for watch in self.watches:
            if watch.event == index:
                watch.armed = self.distance(watch, self.t, self.x) > ON_TARGET

    def settle(self, *, at_start: bool = False) -> None:
        """What the state meets here already: past the target, or on it and moving through."""
        again = True
        while again and not self.over:
            again = False
            for watch in self.watches:
                distance = self.distance(watch, self.t, self.x)
                watch.armed = watch.armed or distance > ON_TARGET
                on_it = abs(distance) <= ON_TARGET
                through = on_it and self.slope(watch, self.t, self.x) < 0
                met = distance <= 0 if at_start else distance < -ON_TARGET or through
                if watch.armed and met:
                    self.take(watch.event, watch.crossing)
                    again, at_start = True, False
                    break
                if watch.armed and on_it and not met:
                    watch.armed = False


def path_of(problem: Problem, leaves: Mapping[str, float]) -> Path:
    """The solution for given leaves."""
    return _Run(problem, leaves).solve()


def numbers_of(problem: Problem, leaves: Mapping[str, float]) -> tuple[np.ndarray, list[int]]:
    """What is asked, shape (len(asked),), and the events in order of their hits."""
    path = path_of(problem, leaves)
    numbers = []
    for kind, *where in problem.asked:
        if kind == "at":
            row, entry = where
            numbers.append(path.values[row][entry])
        elif kind == "end":
            numbers.append(path.end[1][where[0]])
        elif kind == "end time":
            numbers.append(path.end[0])
        else:
            event, n, *entry = where
            hit = [one for one in path.hits if one[0] == event][n - 1]
            column = {"time": 1, "state": 2, "after": 3}[kind]
            numbers.append(hit[column][entry[0]] if entry else hit[column])
    return np.array(numbers, dtype=float), [hit[0] for hit in path.hits]


@dataclass(frozen=True)
class Right:
    """The right values and derivatives.

    Attributes:
        values: Shape (len(asked),).
        jacobian: By leaf, each of shape (len(asked),).
    """

    values: np.ndarray
    jacobian: dict[str, np.ndarray]


def right_values(problem: Problem) -> Right:
    """Values, and derivatives by central differences with one step of Richardson's.

    Raises:
        AssertionError: The differences do not agree with each other, or the hits are others.
    """
    values, hits = numbers_of(problem, problem.leaves)
    jacobian = {}
    for name, value in problem.leaves.items():
        quotients = []
        for step in (STEP * max(abs(value), 0.1), STEP / 2 * max(abs(value), 0.1)):
            above, first = numbers_of(problem, {**problem.leaves, name: value + step})
            below, second = numbers_of(problem, {**problem.leaves, name: value - step})
            assert first == second == hits, f"{name}: other hits"
            quotients.append((above - below) / (2 * step))
        wide, narrow = quotients
        better = narrow + (narrow - wide) / 3
        gap = np.abs(better - narrow) / (np.abs(better) + 1e-3 * np.abs(better).max() + 1e-9)
        assert gap.max() < 1e-3, f"{name}: differences disagree by {gap}"
        jacobian[name] = better
    return Right(values, jacobian)
