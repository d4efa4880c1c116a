"""Derivatives of T and x_T without torch and without the library.

Two answers that share neither the direction nor the tolerance:

- forward: the variational equations S' = F_x S + F_p with the state, SciPy's DOP853 at rtol 1e-12;
  dT = -(g^T S + J_p) / J', dx_T = S + F dT (Theorem 1 of arXiv 2505.22509);
- backward: lam' = -F_x^T lam over another path, at rtol 1e-11, the parameters by quadrature.

Their difference is the oracle's own error; the backward one also gives the natural size of every
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.integrate import solve_ivp

from .operations import NUMPY
from .path import ATOL_PER_RTOL, STEP, Directions, Problem, Solver, Unusable, gradient

FORWARD_RTOL, BACKWARD_RTOL = 1e-12, 1e-11
ROUNDED = 1e-9
"""Of J and x_T: a natural size of which a share counts as rounding."""


@dataclass(frozen=True)
class Answer:
    """Gradients of c T + w^T x_T.

    Attributes:
        time: T.
        gradients: To "x0", "t0", "target" and the leaves, by name.
        natural: What each would be if nothing cancelled; 0 where that is the gradient itself.
        difference: |forward - backward| of each.
        rate: J'(T).
        rate_scale: sum_i |g_i F_i| + |J_t|.
        switches: How often the flow changed its formula.
    """

    time: float
    gradients: dict[str, Any]
    natural: dict[str, float]
    difference: dict[str, float]
    rate: float
    rate_scale: float
    switches: int


def answer(problem: Problem, time: float, on_time: float, on_state: Any) -> Answer:
    """Gradients of on_time T + on_state^T x_T, T the crossing next to `time`.

    Raises:
        Unusable: The path cannot be integrated.
    """
    gradients, at, switches = _forward(problem, time, on_time, on_state)
    backward, natural = _backward(problem, time, on_time, on_state)
    return Answer(
        time=at.time,
        gradients=gradients,
        natural=natural,
        difference={
            name: float(np.linalg.norm(np.ravel(gradients[name] - backward[name])))
            for name in gradients
        },
        rate=at.rate,
        rate_scale=at.rate_scale,
        switches=switches,
    )


@dataclass(frozen=True)
class _Crossing:
    """What is known at T on a path that ends next to it: what is left of the way is first order."""

    time: float
    y: Any
    side: float
    by_x: Any
    by_t: float
    velocity: Any

    @classmethod
    def next_to(cls, problem: Problem, solver: Solver, path: Any, time: float) -> _Crossing:
        side, y, n = path.parts[-1][2], path.last, len(problem.x0)
        value = float(np.ravel(solver.derivative(problem.measure, time, y, side)[0])[0])
        by_x, by_t = gradient(problem, problem.measure, time, y[:n], side)
        rates = solver.rates(time, y, side)
        late = (problem.target - value) / float(by_x @ rates[:n] + by_t)
        end, y = time + late, y + late * rates
        by_x, by_t = gradient(problem, problem.measure, end, y[:n], side)
        return cls(end, y, side, by_x, by_t, solver.rates(end, y, side)[:n])

    @property
    def rate(self) -> float:
        return float(self.by_x @ self.velocity + self.by_t)

    @property
    def rate_scale(self) -> float:
        return float(np.abs(self.by_x * self.velocity).sum() + abs(self.by_t))


def _forward(
    problem: Problem, time: float, on_time: float, on_state: Any
) -> tuple[dict[str, Any], _Crossing, int]:
    solver = Solver(problem, columns=True)
    path = solver.solve(time, FORWARD_RTOL)
    at, n = _Crossing.next_to(problem, solver, path, time), len(problem.x0)
    along = solver.derivative(problem.measure, at.time, at.y, at.side)[1].reshape(-1)
    of_time = -along / at.rate
    s = at.y[n:].reshape(n, -1)
    row = on_time * of_time + on_state @ (s + at.velocity[:, None] * of_time)
    found = solver.directions.split(row)
    found["target"] = np.asarray((on_time + on_state @ at.velocity) / at.rate)
    return found, at, len(path.parts) - 1


def _backward(
    problem: Problem, time: float, on_time: float, on_state: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """The continuous adjoint with its quadratures, and the natural sizes.

    lam = w + share grad J at T; the part of grad J is carried by itself as well, for where nothing
    arrives at T the two cancel (in one dimension altogether).
    """
    plain, n = Solver(problem, columns=False), len(problem.x0)
    path = plain.solve(time, BACKWARD_RTOL)
    at = _Crossing.next_to(problem, plain, path, time)
    end, x_end, by_x, velocity = at.time, at.y, at.by_x, at.velocity
    share = -(on_state @ velocity + on_time) / at.rate
    lams = np.stack([on_state + share * by_x, share * by_x])

    directions = Directions(problem)
    leaves = [(name, directions.slices[name]) for name in problem.leaves]
    first = n + 1  # the columns of x0 serve for x, that of t0 for nothing
    p = directions.parameters(problem)
    moves = np.zeros((n, directions.count))
    moves[:, :n] = problem.state * np.eye(n)

    def products(what: Any, t: float, x: Any, side: float) -> Any:
        found = what(NUMPY, t, x[:, None] + 1j * STEP * moves, p, side)
        found = np.broadcast_to(found, (*np.shape(found)[:-1], directions.count))
        return found.imag / STEP / directions.lengths

    def rates(t: float, y: Any, side: float, dense: Any) -> Any:
        by_leaves = products(problem.velocity, t, dense(t), side)
        lam, other = lams = y[: 2 * n].reshape(2, n)
        columns = lams @ by_leaves
        # lam^T F is 0 where nothing arrives at T: a leaf that acts along F cancels at every point.
        uncancelled = (np.abs(lam - other) + np.abs(other)) @ np.abs(by_leaves)
        parts = columns[0] if on_time else uncancelled
        sizes = [np.linalg.norm(parts[here]) for _, here in leaves]
        return -np.concatenate([columns[:, :n].reshape(-1), columns[0, first:], sizes])

    count = directions.count - first
    sums = slice(2 * n, 2 * n + count)
    y = np.concatenate([lams.reshape(-1), np.zeros(count + len(leaves))])
    # An estimate of what lam is without cancellation: its terms.
    uncancelled = np.abs(on_state) + np.abs(share * by_x)
    largest = float(np.linalg.norm(uncancelled))
    scale = float((uncancelled * np.abs(velocity)).sum())
    size = max(largest, 1e-300)
    atol = np.full(len(y), ATOL_PER_RTOL * BACKWARD_RTOL * size)
    atol[sums] *= problem.state / directions.lengths[first:]
    for index, (_, here) in enumerate(leaves):
        atol[sums.stop + index] *= 1e3 * problem.state / directions.lengths[here].max()
    last = end
    for begin, _, side, dense in reversed(path.parts):
        found = solve_ivp(
            rates,
            (last, begin),
            y,
            method="DOP853",
            rtol=BACKWARD_RTOL,
            atol=atol,
            args=(side, dense),
        )
        if found.status != 0 or not np.isfinite(found.y).all():
            raise Unusable("the adjoint ends early")
        for t, column in zip(found.t, found.y.T, strict=True):
            largest = max(largest, float(np.linalg.norm(column[:n])))
            speed = np.abs(plain.rates(t, dense(t), side))
            scale = max(scale, float((np.abs(column[:n]) * speed).sum()))
        y, last = found.y[:, -1], begin
        if begin > problem.t0:
            x = dense(begin)
            # `side` is the one behind the switch.
            before, after = plain.rates(begin, x, -side), plain.rates(begin, x, side)
            h_x, h_t = gradient(problem, problem.switch, begin, x, 0.0)
            lams = y[: 2 * n].reshape(2, n)
            moved = -(lams @ (before - after)) / float(h_x @ before + h_t)
            by_leaves = products(problem.switch, begin, x, side).reshape(-1)[first:]
            y = y.copy()
            y[: 2 * n] += np.outer(moved, h_x).reshape(-1)
            y[sums] += moved[0] * by_leaves
    start_side = path.parts[0][2]
    row = np.zeros(directions.count)
    row[:n] = y[:n]
    row[n] = -(y[:n] @ plain.rates(problem.t0, problem.x0, start_side))
    row[first:] = y[sums]
    row[first:] += share * products(problem.measure, end, x_end, at.side).reshape(-1)[first:]
    gradients = directions.split(row * directions.lengths)
    gradients["target"] = np.asarray(-share)
    natural = {"x0": largest, "t0": scale, "target": 0.0}
    for index, (name, _) in enumerate(leaves):
        length = max(float(np.linalg.norm(np.ravel(problem.leaves[name]))), 1e-300)
        # J and x_T are known to their rounding, and with them what a parameter does in vain.
        known = abs(share * problem.target) + float(np.abs(on_state * x_end).sum())
        natural[name] = max(float(y[sums.stop + index]), ROUNDED * known / length)
    return gradients, natural
