"""The problem of a number: a family's sketch, with an end, fixed times and L."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.random import Generator

from .families import FAMILIES, Sketch
from .path import Run, Walk
from .problem import Hybrid, Observable, Unusable

_TRIES = 30
_EXPLORE = 1e-9  # tolerance
_MOST_HITS = 14
LEAST_GAP = 0.01
"""Of the run: nearer to each other than this hits and known times are not told apart."""
LEAST_RATE = 0.03
"""Of |J'| at a hit, relative to its terms."""
LEAST_DIP = 0.02
"""Of a dip of J that does not reach the target, relative to the range of J."""


def draw(
    seed: int, number: int, dropped: list[str] | None = None, *, family: str | None = None
) -> Hybrid:
    """The problem of a number.

    Args:
        seed: Of the sample.
        number: Of the problem.
        dropped: Receives the reason of every draw that was thrown away.
        family: Of this family; None: drawn.

    Raises:
        Unusable: None was found in as many draws as are made.
    """
    # The family is the same in every draw: those that are hard to draw must not become rare.
    drawn = str(np.random.default_rng([seed, number]).choice(list(FAMILIES)))
    family = family or drawn
    for attempt in range(_TRIES):
        rng = np.random.default_rng([seed, number, attempt])
        try:
            return _drawn(family, rng)
        except Unusable as failure:
            if dropped is not None:
                dropped.append(f"{family}: {failure}")
    raise Unusable("nothing usable was drawn")


def _drawn(family: str, rng: Generator) -> Hybrid:
    sketch = FAMILIES[family](rng)
    t0 = float(rng.uniform(-1, 1)) if rng.random() < 0.7 else 0.0
    problem = sketch.starting_at(t0, family)
    problem = _ended(problem, sketch, rng)
    problem = _with_fixed_times(problem, rng)
    run = Walk(problem, rtol=_EXPLORE, samples=24).go()
    require_clear(problem, run)
    return replace(problem, terms=_terms(problem, run, rng))


def _ended(problem: Hybrid, sketch: Sketch, rng: Generator) -> Hybrid:
    """With an end: a time between two hits, or the n-th hit of a watch."""
    horizon = problem.leaves["t0"] + sketch.span * math.exp(rng.uniform(-0.5, 0.2))
    bounded = replace(problem, leaves=problem.leaves | {"until": horizon})
    run = Walk(bounded, rtol=_EXPLORE, samples=12, most=_MOST_HITS).go()
    if not run.hits:
        raise Unusable("no hit")
    if rng.random() < 0.5:
        if run.ended != "most":
            return bounded
        until = float(rng.uniform(run.hits[-2].time, run.hits[-1].time))
        return replace(problem, leaves=problem.leaves | {"until": until})
    last = run.hits[int(rng.integers(len(run.hits) // 2, len(run.hits)))]
    watch = problem.watches[last.event]
    # A known time comes once, and is not counted.
    single = last.count == 1 and (watch.criterion is None or bool(rng.random() < 0.5))
    ending = replace(watch, terminal=single, count=None if single else last.count)
    watches = tuple(ending if i == last.event else w for i, w in enumerate(problem.watches))
    # With a time that it does not come to, half of them: its derivative is zero.
    leaves = problem.leaves
    if rng.random() < 0.5:
        leaves = leaves | {"until": max(horizon, run.end_time) + 0.5 * sketch.span}
    return replace(problem, leaves=leaves, watches=watches)


def _with_fixed_times(problem: Hybrid, rng: Generator) -> Hybrid:
    """With up to four fixed times, in any order."""
    run = Walk(problem, rtol=_EXPLORE).go()
    t0 = problem.leaves["t0"]
    number = int(rng.integers(0, 5))
    if not number:
        return problem
    length = run.end_time - t0
    return replace(
        problem,
        leaves=problem.leaves | {"at": t0 + length * rng.uniform(0.03, 0.97, number)},
    )


def require_clear(problem: Hybrid, run: Run) -> None:
    """Nothing that two solvers may see differently, and no crossing that is nearly a touch.

    Raises:
        Unusable: There is.
    """
    t0 = problem.leaves["t0"]
    least = LEAST_GAP * (run.end_time - t0)
    if not run.hits:
        raise Unusable("no hit")
    if run.end_time - t0 < 0.05:
        raise Unusable("it ends at once")
    times, at_once = [t0], [False]
    hits = iter(run.hits)
    for (kind, _), time in zip(run.sequence, run.times, strict=True):
        # Hits that a reset, or the start, makes at once belong together.
        hit = next(hits) if kind == "hit" else None
        at_once.append(
            (hit is not None and (hit.at_once or time == t0))
            or (kind == "event" and time == times[-1])
        )
        times.append(time)
    gaps = np.diff(times)[~np.array(at_once[1:])]
    if gaps.size and float(gaps.min()) < least:
        raise Unusable("hits or known times too near to each other")
    for hit in run.hits:
        on_surface = problem.watches[hit.event].criterion is not None and not hit.at_once
        if on_surface and hit.time > t0 and not abs(hit.rate) > LEAST_RATE * hit.rate_scale:
            raise Unusable("J' is nearly 0 at a hit")
    if run.closest < LEAST_DIP:
        raise Unusable("J nearly touches a target")
    if max(float(np.abs(m.state).max()) for m in run.marks) > 1e3:
        raise Unusable("the state grows large")


def _terms(problem: Hybrid, run: Run, rng: Generator) -> tuple[tuple[float, Observable], ...]:
    """A random combination of what the run gives, every kind scaled by its size."""
    n = len(problem.leaves["x0"])
    sizes = np.max([np.abs(m.state) for m in run.marks], axis=0) + 1e-3
    length = run.end_time - problem.leaves["t0"]
    terms: list[tuple[float, Observable]] = []

    def weigh(size: float, *what: Any) -> None:
        terms.append((float(rng.standard_normal()) / size, Observable(*what)))

    chosen = rng.permutation(len(run.hits))[: int(rng.integers(1, 4))]
    for hit in (run.hits[k] for k in chosen):
        watch = problem.watches[hit.event]
        kinds = ["time", "state"] + (["after"] if watch.reset is not None else [])
        for kind in kinds:
            if rng.random() < (0.8 if kind == "time" else 0.4):
                if kind == "time":
                    weigh(length, kind, hit.event, hit.count)
                else:
                    for i in range(n):
                        weigh(sizes[i], kind, hit.event, hit.count, i)
    for k in range(len(problem.leaves.get("at", ()))):
        for i in range(n):
            weigh(sizes[i], "at", -1, k, i)
    if not terms or rng.random() < 0.3:
        weigh(length, "end_time")
    if rng.random() < 0.3:
        for i in range(n):
            weigh(sizes[i], "end_state", -1, 0, i)
    return tuple(terms)
