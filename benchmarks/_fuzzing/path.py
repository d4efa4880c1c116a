"""A problem in numpy, and its path with derivatives, by SciPy.

All derivatives of flow and criterion are by complex steps, Im f(x + i h v) / h, that have no error
of cancellation. Where the flow changes its formula on a surface (`Flow.switch`) the integration
stops there, and the derivatives of the state jump as they have to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp

from .operations import NUMPY, Criterion, Flow

STEP = 1e-40  # of the complex differences: its square is nothing
# Absolute tolerances, in units of the relative one and the size of what is integrated.
ATOL_PER_RTOL = 1e-3
_MOST_EVALUATIONS = 400_000
_RTOL = 1e-12  # of `explore`
# Slower than this against its terms, a switch is no crossing but a touch.
_SLOWEST_SWITCH = 1e-3


class Unusable(Exception):
    """No problem for a comparison: the path ends early, slides along a surface, and the like."""


@dataclass(frozen=True)
class Problem:
    """A flow and a criterion in units.

    F(t, x) = (s / tau) f(t / tau, x / s) and J(t, x) = c j(t / tau, x / s).

    Attributes:
        flow: The flow without dimension.
        criterion: The criterion without dimension.
        state: s.
        time: tau.
        value: c; of either sign.
        leaves: What is differentiated to, of flow and criterion, by name.
        constants: What else p holds.
        x0: Start in units of the state, shape (n,).
        t0: In units of time.
        target: eps, in units of J.
    """

    flow: Flow
    criterion: Criterion
    state: float
    time: float
    value: float
    leaves: dict[str, Any]
    constants: dict[str, Any]
    x0: Any
    t0: float
    target: float = float("nan")

    @property
    def end(self) -> float:
        """Latest time of the path."""
        return self.t0 + self.flow.span * self.time

    def velocity(self, xp: Any, t: Any, x: Any, p: Any, side: Any) -> Any:
        """F(t, x)."""
        rate = self.flow.f(xp, t / self.time, x / self.state, p, side)
        return rate * (self.state / self.time)

    def measure(self, xp: Any, t: Any, x: Any, p: Any, side: Any) -> Any:
        """J(t, x)."""
        clock, z = t / self.time, x / self.state
        rate: Callable[[], Any] = lambda: self.flow.f(xp, clock, z, p, side)  # noqa: E731
        return self.value * self.criterion.j(xp, clock, z, p, rate)

    def switch(self, xp: Any, t: Any, x: Any, p: Any, side: Any = None) -> Any:
        """What changes its sign where the flow changes its formula."""
        assert self.flow.switch is not None
        return self.flow.switch(xp, t / self.time, x / self.state, p)


class Directions:
    """The columns in which everything is differentiated: x0, t0 and every entry of the leaves.

    Each is as long as what it changes, so that all columns of S have the size of the state.
    """

    def __init__(self, problem: Problem) -> None:
        n = len(problem.x0)
        self.names = [("x0", n, (n,)), ("t0", 1, ())]
        self.names += [(name, np.size(v), np.shape(v)) for name, v in problem.leaves.items()]
        self.count = sum(size for _, size, _ in self.names)
        self.lengths = np.ones(self.count)
        self.seeds: dict[str, Any] = {}
        self.slices: dict[str, slice] = {}
        at = 0
        for name, size, shape in self.names:
            here = slice(at, at + size)
            self.slices[name] = here
            if name == "x0":
                self.lengths[here] = problem.state
            elif name == "t0":
                self.lengths[here] = problem.time
            else:
                values = np.abs(np.ravel(problem.leaves[name]))
                self.lengths[here] = np.maximum(values, 0.1 * max(values.max(), 1e-3))
                seed = np.zeros((size, self.count))
                seed[np.arange(size), np.arange(at, at + size)] = self.lengths[here]
                self.seeds[name] = seed.reshape(*shape, self.count)
            at += size

    def parameters(self, problem: Problem) -> dict[str, Any]:
        """p with every column moved a complex step along its direction."""
        found = {
            name: np.asarray(v, float)[..., None] + 1j * STEP * self.seeds[name]
            for name, v in problem.leaves.items()
        }
        return found | columns_of(problem.constants)

    def split(self, row: Any) -> dict[str, Any]:
        """A number for every column to an array for every name."""
        per_unit = row / self.lengths
        return {name: per_unit[self.slices[name]].reshape(shape) for name, _, shape in self.names}


def columns_of(values: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(v, float)[..., None] for name, v in values.items()}


@dataclass
class Path:
    """x(t), and S(t) where it was asked for.

    Attributes:
        parts: (begin, end, side, dense output) of the smooth parts.
        last: State and columns at the end, flat.
    """

    parts: list[tuple[float, float, float, Any]] = field(default_factory=list)
    last: Any = None

    def at(self, times: Any, n: int) -> tuple[Any, Any]:
        """The state at ascending times, shape (n, times), and the side there."""
        states, sides = np.empty((n, len(times))), np.empty(len(times))
        for begin, _, side, dense in self.parts:
            later = times >= begin
            if later.any():
                states[:, later] = dense(times[later])[:n]
                sides[later] = side
        return states, sides


class Solver:
    """Integrates a problem, with or without its columns."""

    def __init__(self, problem: Problem, *, columns: bool) -> None:
        self.problem = problem
        self.n = len(problem.x0)
        self.directions = Directions(problem)
        self.count = self.directions.count if columns else 0
        plain = columns_of(problem.leaves | problem.constants)
        self.p = self.directions.parameters(problem) if columns else plain
        self.evaluations = 0

    def derivative(self, what: Any, t: float, y: Any, side: float) -> tuple[Any, Any]:
        """Value and derivative along every column."""
        x, s = y[: self.n], y[self.n :].reshape(self.n, self.count)
        if not self.count:
            return what(NUMPY, t, x[:, None], self.p, side)[..., 0], s[0] if s.size else s
        found = what(NUMPY, t, x[:, None] + 1j * STEP * s, self.p, side)
        found = np.broadcast_to(found, (*np.shape(found)[:-1], self.count))
        return found[..., 0].real, found.imag / STEP

    def rates(self, t: float, y: Any, side: float) -> Any:
        self.evaluations += 1
        if self.evaluations > _MOST_EVALUATIONS:
            raise Unusable("too many evaluations")
        value, along = self.derivative(self.problem.velocity, t, y, side)
        return np.concatenate([value, along.ravel()]) if self.count else value

    def start(self) -> tuple[Any, float]:
        """The state, the columns, and the side at t0."""
        problem = self.problem
        side = 1.0
        y = np.concatenate([problem.x0, np.zeros(self.n * self.count)])
        if problem.flow.switch is not None:
            found = float(np.ravel(self.derivative(problem.switch, problem.t0, y, 0.0)[0])[0])
            side = 1.0 if found > 0 else -1.0
        if self.count:
            s = np.zeros((self.n, self.count))
            s[:, self.directions.slices["x0"]] = problem.state * np.eye(self.n)
            y = np.concatenate([problem.x0, s.ravel()])
            rate = self.derivative(problem.velocity, problem.t0, y, side)[0]
            s[:, self.directions.slices["t0"]] = -problem.time * rate[:, None]
            y = np.concatenate([problem.x0, s.ravel()])
        return y, side

    def solve(self, end: float, rtol: float, *, partial: bool = False) -> Path:
        """The path to `end`; with `partial` what there is of it, where it does not get there."""
        problem, path = self.problem, Path()
        t, (y, side) = problem.t0, self.start()
        settings: dict[str, Any] = {"method": "DOP853", "dense_output": True, "rtol": rtol}
        settings["atol"] = ATOL_PER_RTOL * rtol * problem.state
        plain = {name: v.real[..., :1] for name, v in self.p.items()}

        def surface(t: float, y: Any, side: float) -> float:
            x = y[: self.n, None]
            return side * float(np.ravel(problem.switch(NUMPY, t, x, plain).real)[0])

        # From this side to the other only: behind a switch, `side` has changed.
        surface.terminal, surface.direction = True, -1.0  # type: ignore[attr-defined]
        events = surface if problem.flow.switch is not None else None
        while t < end:
            with np.errstate(all="ignore"):
                found = solve_ivp(self.rates, (t, end), y, args=(side,), events=events, **settings)
            finite = bool(np.isfinite(found.y).all())
            if found.status < 0 or not finite:
                if not partial or not finite or len(found.t) < 3:
                    raise Unusable("the path ends early")
                path.parts.append((t, float(found.t[-1]), side, found.sol))
                break
            path.parts.append((t, float(found.t[-1]), side, found.sol))
            t, y = float(found.t[-1]), found.y[:, -1]
            if found.status == 1:
                try:
                    y, side = self.across(t, y, side)
                except Unusable:
                    if not partial:
                        raise
                    break
            if len(path.parts) > 60:
                raise Unusable("it changes its formula too often")
        path.last = y
        return path

    def across(self, t: float, y: Any, side: float) -> tuple[Any, float]:
        """State and columns behind a switch.

        S+ = S- + (F- - F+) dtau, dtau = -(h_x S- + h_p) / (h_x F- + h_t).
        """
        before = self.rates(t, y, side)[: self.n]
        after = self.rates(t, y, -side)[: self.n]
        speeds, scales = zip(
            *(self._of_switch(t, y, rate) for rate in (before, after)), strict=True
        )
        if speeds[0] * speeds[1] <= 0:
            raise Unusable("it slides")
        if abs(speeds[0]) < _SLOWEST_SWITCH * scales[0]:
            raise Unusable("it touches the surface")
        if not self.count:
            return y, -side
        moved = -self.derivative(self.problem.switch, t, y, side)[1].reshape(-1) / speeds[0]
        s = y[self.n :].reshape(self.n, self.count) + (before - after)[:, None] * moved
        return np.concatenate([y[: self.n], s.ravel()]), -side

    def _of_switch(self, t: float, y: Any, rate: Any) -> tuple[float, float]:
        """h_x F + h_t, and sum |h_i F_i| + |h_t|."""
        by_x, by_t = gradient(self.problem, self.problem.switch, t, y[: self.n], 0.0)
        return float(by_x @ rate + by_t), float(np.abs(by_x * rate).sum() + abs(by_t))


def gradient(problem: Problem, what: Any, t: float, x: Any, side: float) -> tuple[Any, float]:
    """Derivatives of a number to x, shape (n,), and to t."""
    n = len(x)
    p = columns_of(problem.leaves | problem.constants)
    moved = x[:, None] + 1j * STEP * problem.state * np.eye(n, n + 1)
    clock = t + 1j * STEP * problem.time * np.eye(1, n + 1, n)[0]
    found = np.broadcast_to(what(NUMPY, clock, moved, p, side), (n + 1,)).imag / STEP
    return found[:n] / problem.state, float(found[n] / problem.time)


def crossing_rate(problem: Problem, t: float, x: Any, side: float) -> tuple[float, float]:
    """J' = g^T F + J_t and its terms, sum_i |g_i F_i| + |J_t|."""
    by_x, by_t = gradient(problem, problem.measure, t, x, side)
    velocity = Solver(problem, columns=False).rates(t, x, side)
    return float(by_x @ velocity + by_t), float(np.abs(by_x * velocity).sum() + abs(by_t))


def explore(problem: Problem) -> Path:
    """The path as far as it gets, without derivatives."""
    path = Solver(problem, columns=False).solve(problem.end, _RTOL, partial=True)
    if path.parts[-1][1] - problem.t0 < 0.02 * problem.flow.span * problem.time:
        raise Unusable("the path ends at once")
    return path


def values_along(problem: Problem, path: Path, times: Any) -> Any:
    """J at ascending times on a path."""
    states, sides = path.at(times, len(problem.x0))
    p = columns_of(problem.leaves | problem.constants)
    with np.errstate(all="ignore"):
        found = problem.measure(NUMPY, times, states, p, sides)
    return np.broadcast_to(found, times.shape)
