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
    forward = _forward(problem, time, on_time, on_state)
    gradients, end, rate, scale, switches = forward
    backward, natural = _backward(problem, time, on_time, on_state)
    return Answer(
        time=end,
        gradients=gradients,
        natural=natural,
        difference={
            name: float(np.linalg.norm(np.ravel(gradients[name] - backward[name])))
            for name in gradients
        },
        rate=rate,
        rate_scale=scale,
        switches=switches,
    )


def _forward(
    problem: Problem, time: float, on_time: float, on_state: Any
) -> tuple[dict[str, Any], float, float, float, int]:
    solver = Solver(problem, columns=True)
    path = solver.solve(time, FORWARD_RTOL)
    side, y, n = path.parts[-1][2], path.last, len(problem.x0)
    # T is known to a few units of the tolerance: what is left is first order.
    value = float(solver.derivative(problem.measure, time, y, side)[0])
    by_x, by_t = gradient(problem, problem.measure, time, y[:n], side)
    rates = solver.rates(time, y, side)
    late = (problem.target - value) / float(by_x @ rates[:n] + by_t)
    end, y = time + late, y + late * rates
    by_x, by_t = gradient(problem, problem.measure, end, y[:n], side)
    velocity = solver.rates(end, y, side)[:n]
    rate = float(by_x @ velocity + by_t)
    along = solver.derivative(problem.measure, end, y, side)[1].reshape(-1)
    of_time = -along / rate
    s = y[n:].reshape(n, -1)
    row = on_time * of_time + on_state @ (s + velocity[:, None] * of_time)
    found = solver.directions.split(row)
    found["target"] = np.asarray((on_time + on_state @ velocity) / rate)
    scale = float(np.abs(by_x * velocity).sum() + abs(by_t))
    return found, end, rate, scale, len(path.parts) - 1


def _backward(
    problem: Problem, time: float, on_time: float, on_state: Any
) -> tuple[dict[str, Any], dict[str, float]]:
    """The continuous adjoint with its quadratures, and the natural sizes."""
    plain, n = Solver(problem, columns=False), len(problem.x0)
    path = plain.solve(time, BACKWARD_RTOL)
    side, x = path.parts[-1][2], path.last
    by_x, by_t = gradient(problem, problem.measure, time, x, side)
    velocity = plain.rates(time, x, side)
    rate = float(by_x @ velocity + by_t)
    value = float(np.ravel(plain.derivative(problem.measure, time, x, side)[0])[0])
    late = (problem.target - value) / rate
    end, x = time + late, x + late * velocity
    by_x, by_t = gradient(problem, problem.measure, end, x, side)
    velocity = plain.rates(end, x, side)
    rate = float(by_x @ velocity + by_t)
    x_end, share = x, -(on_state @ velocity + on_time) / rate
    lam = on_state + share * by_x

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
        columns = y[:n] @ products(problem.velocity, t, dense(t), side)
        sizes = [np.linalg.norm(columns[here]) for _, here in leaves]
        return -np.concatenate([columns[:n], columns[first:], sizes])

    count = directions.count - first
    y = np.concatenate([lam, np.zeros(count + len(leaves))])
    # An estimate of what lam is without cancellation: its terms.
    uncancelled = np.abs(on_state) + np.abs(share * by_x)
    largest = float(np.linalg.norm(uncancelled))
    scale = float((uncancelled * np.abs(velocity)).sum())
    size = max(largest, 1e-300)
    atol = np.full(len(y), ATOL_PER_RTOL * BACKWARD_RTOL * size)
    atol[n : n + count] *= problem.state / directions.lengths[first:]
    for index, (_, here) in enumerate(leaves):
        atol[n + count + index] *= 1e3 * problem.state / directions.lengths[here].max()
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
            moved = -float(y[:n] @ (before - after)) / float(h_x @ before + h_t)
            by_leaves = products(problem.switch, begin, x, side).reshape(-1)[first:]
            y = y.copy()
            y[:n] += moved * h_x
            y[n : n + count] += moved * by_leaves
    start_side = path.parts[0][2]
    row = np.zeros(directions.count)
    row[:n] = y[:n]
    row[n] = -(y[:n] @ plain.rates(problem.t0, problem.x0, start_side))
    row[first:] = y[n : n + count]
    row[first:] += (
        share * products(problem.measure, end, x_end, path.parts[-1][2]).reshape(-1)[first:]
    )
    gradients = directions.split(row * directions.lengths)
    gradients["target"] = np.asarray(-share)
    natural = {"x0": largest, "t0": scale, "target": 0.0}
    for index, (name, _) in enumerate(leaves):
        natural[name] = float(y[n + count + index])
        if on_time == 0.0:
            # As x_T moves along the path, a leaf that acts along F cancels at every point.
            length = max(float(np.linalg.norm(np.ravel(problem.leaves[name]))), 1e-300)
            natural[name] = max(natural[name], scale * (end - problem.t0) / length)
    return gradients, natural
