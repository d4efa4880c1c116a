"""Derivatives of L by differences of whole runs, and their natural sizes; no torch, no library.

Central differences at h, h/2 and h/4, extrapolated (Romberg): those of (h, h/2) and of (h/2, h/4)
are two answers, and a fifteenth of their distance is taken for the oracle's own error (the answer
is of one order more, from all three). Every run has to pass through the same hits in the same
order.

The natural size of a gradient is what it would be if nothing cancelled. lam(t) = dL / dx(t) at
points of the path is found by differences as well (runs that go on from there with another state):
max |lam| for x0, max sum_i |lam_i F_i| for t0 (and, at their own time, for all known times),
int |F_p^T lam| dt for a parameter of the velocity, and sum |weight| |d term| for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .drawing import require_clear
from .path import Mark, Run, Walk
from .problem import NUMPY, Hybrid, Observable, Unusable

STEPS = (4e-3, 5e-4, 6e-5)
"""h, relative to the size of what is moved; smaller where hits change or answers differ."""
DISAGREEMENT = 1e-6
"""Beyond this error of its own, relative to a leaf's size, the oracle has no answer."""
FLOOR = 1 / 50
"""Below this share of its natural size a gradient is judged by that share."""
_KNOWN = 1e-5  # of L: a relative change of a leaf that changes less than this share does nothing
_GOOD = 1e-9  # of L: an error that needs no smaller h
_POINTS = 24  # of lam
_ROUGH = 1e-8  # tolerance of the runs for natural sizes


@dataclass(frozen=True)
class Answer:
    """L and its gradients.

    Attributes:
        value: L.
        terms: What L weighs, shape (K,).
        run: The run.
        gradients: To every leaf, by name.
        natural: What the norm of each would be if nothing cancelled.
        difference: The oracle's own error of each, as a norm.
        runs: How many runs it took.
    """

    value: float
    terms: Any
    run: Run
    gradients: dict[str, Any]
    natural: dict[str, float]
    difference: dict[str, float]
    runs: int

    def size(self, name: str) -> float:
        """By which the error of a leaf is divided."""
        norm = float(np.linalg.norm(np.ravel(self.gradients[name])))
        return max(norm, FLOOR * self.natural[name])

    def clear(self, name: str) -> float:
        """The oracle's own relative error of a leaf."""
        gap, size = self.difference[name], self.size(name)
        return 0.0 if gap == 0.0 else gap / size if size > 0.0 else np.inf


def observed(problem: Hybrid, run: Run) -> Any:
    """The terms of L, shape (K,); NaN for hits that are not in the run."""
    hits = {(hit.event, hit.count): hit for hit in run.hits}

    def of(what: Observable) -> float:
        i = what.component
        if what.what == "end_time":
            return run.end_time
        if what.what == "end_state":
            return float(run.end_state[i])
        if what.what == "at":
            return float(run.at[what.nth][i]) if what.nth in run.at else np.nan
        hit = hits.get((what.event, what.nth))
        if hit is None:
            return np.nan
        if what.what == "time":
            return hit.time
        return float((hit.state if what.what == "state" else hit.after)[i])

    return np.array([of(what) for _, what in problem.terms])


def answer(problem: Hybrid) -> Answer:
    """L, its gradients by differences, and their natural sizes.

    Raises:
        Unusable: The run is not clear, another one passes through other hits, or the differences
            do not agree.
    """
    run = Walk(problem, samples=24).go()
    require_clear(problem, run)
    weights, terms = np.array([w for w, _ in problem.terms]), observed(problem, run)
    known = float(np.abs(weights * terms).sum())
    lams = _lams(problem, run)
    gradients, natural, difference, runs = {}, {}, {}, 1
    for name, value in problem.leaves.items():
        columns, errors = [], []
        for index in range(np.size(value)):
            column, error, count = _difference(problem, run, name, index, _GOOD * known)
            columns.append(column)
            errors.append(error)
            runs += count
        jacobian = np.stack(columns, axis=-1)
        gradients[name] = (weights @ jacobian).reshape(np.shape(value))
        difference[name] = float(np.linalg.norm(errors))
        length = max(float(np.linalg.norm(np.ravel(value))), 1e-2)
        by_terms = float(np.linalg.norm(np.abs(weights) @ np.abs(jacobian)))
        natural[name] = max(by_terms, _along(problem, run, lams, name), _KNOWN * known / length)
    found = Answer(
        float(weights @ terms), terms, run, gradients, natural, difference, runs + lams.runs
    )
    for name in gradients:
        if not found.clear(name) <= DISAGREEMENT:
            raise Unusable("the oracle does not agree with itself")
    return found


def _difference(
    problem: Hybrid, run: Run, name: str, index: int, good: float
) -> tuple[Any, float, int]:
    """Derivative of the terms to one entry of a leaf.

    Args:
        problem: The problem.
        run: Its run.
        name: Of the leaf.
        index: Of the entry, flat.
        good: An error of L's derivative, times the size of what is moved, that is small enough.

    Returns:
        The derivatives, how far two extrapolations of L's differ, and the number of runs.
    """
    p, value = problem.p, np.asarray(problem.leaves[name], float)
    weights = np.array([w for w, _ in problem.terms])
    # Times are moved by a share of the run, wherever their origin is.
    length = run.end_time - problem.leaves["t0"]
    size = max(abs(float(value.reshape(-1)[index])), 0.1)
    size = 0.25 * length if name in problem.times else size
    runs = 0

    def terms(offset: float) -> Any:
        nonlocal runs
        runs += 1
        moved = value.copy().reshape(-1)
        moved[index] += offset
        entry = moved.reshape(value.shape) if value.ndim else float(moved[0])
        other = Walk(problem, p | {name: entry}).go()
        if other.sequence != run.sequence:
            raise Unusable("the sequence of hits changes")
        return observed(problem, other)

    def central(h: float) -> Any:
        return (terms(h) - terms(-h)) / (2 * h)

    best: tuple[Any, float] = (None, np.inf)
    reason = Unusable("the oracle does not agree with itself")
    for share in STEPS:
        h = share * size
        try:
            first, second, third = central(h), central(h / 2), central(h / 4)
        except Unusable as failure:
            reason = failure
            continue
        coarse, fine = (4 * second - first) / 3, (4 * third - second) / 3
        error = abs(float(weights @ (fine - coarse))) / 15
        if error < best[1] or best[0] is None:
            best = ((16 * fine - coarse) / 15, error)
        if error * size <= good:
            break
    if best[0] is None:
        raise reason
    return *best, runs


@dataclass(frozen=True)
class _Lams:
    """lam = dL / dx(t) at points of a path.

    Attributes:
        marks: The points, in order.
        values: lam at each, shape (points, n).
        runs: How many runs it took.
    """

    marks: list[Mark]
    values: Any
    runs: int


def _lams(problem: Hybrid, run: Run) -> _Lams:
    """lam at points of the path; runs that pass through other hits are left out."""
    weights = np.array([w for w, _ in problem.terms])
    count = min(len(run.marks), _POINTS)
    marks = [run.marks[k] for k in np.linspace(0, len(run.marks) - 1, count).astype(int)]
    sizes = np.max([np.abs(m.state) for m in marks], axis=0) + 1e-3
    values, runs = [], 0
    for mark in marks:
        lam = np.zeros(len(sizes))
        for i, size in enumerate(sizes):
            step = np.zeros(len(sizes))
            step[i] = 1e-4 * size
            try:
                up, down = (
                    Walk(problem, rtol=_ROUGH).again(mark, mark.state + sign * step)
                    for sign in (1, -1)
                )
            except Unusable:
                continue
            runs += 2
            if up.sequence == down.sequence:
                change = (observed(problem, up) - observed(problem, down)) / (2 * step[i])
                lam[i] = weights @ np.nan_to_num(change)
        values.append(lam)
    return _Lams(marks, np.array(values), runs)


def _along(problem: Hybrid, run: Run, lams: _Lams, name: str) -> float:
    """The natural size of a leaf from what it does along the path."""
    walk = Walk(problem)

    def velocity(mark: Mark, p: dict[str, Any]) -> Any:
        on = [float(p[b] <= mark.time) for b in problem.breakpoints]
        return np.asarray(problem.velocity(NUMPY, mark.time, mark.state, p, on), float)

    sizes = np.abs(lams.values)
    if name == "x0":
        return float(np.linalg.norm(sizes, axis=1).max())
    if name in problem.times:
        work = [
            float(s @ np.abs(velocity(m, walk.p))) for m, s in zip(lams.marks, sizes, strict=True)
        ]
        return max(work)
    densities = [
        float(np.linalg.norm(lam @ _by_leaf(problem, mark, name, velocity)))
        for mark, lam in zip(lams.marks, lams.values, strict=True)
    ]
    return float(np.trapezoid(densities, [m.time for m in lams.marks]))


def _by_leaf(
    problem: Hybrid, mark: Mark, name: str, velocity: Callable[[Mark, dict[str, Any]], Any]
) -> Any:
    """F_p at a point, shape (n, entries)."""
    value = np.asarray(problem.leaves[name], float)
    columns = []
    for index in range(value.size):
        step = np.zeros(value.size)
        step[index] = 1e-6 * max(abs(float(value.reshape(-1)[index])), 0.1)
        moved = [value + sign * step.reshape(value.shape) for sign in (1, -1)]
        up, down = (
            velocity(mark, problem.p | {name: m if value.ndim else float(m)}) for m in moved
        )
        columns.append((up - down) / (2 * step[index]))
    return np.stack(columns, axis=-1)
