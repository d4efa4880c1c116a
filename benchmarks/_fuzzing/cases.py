"""What a sample is of, and the case of a number."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    StepAdjoint,
    Torchdiffeq,
)
from ode_stopping.solving.solver import LARGEST_PROMISE, PROMISE_PER_RTOL

from .criteria import CRITERIA
from .descents import DESCENTS
from .flows import FLOWS
from .jumps import JUMPING
from .path import Problem, Unusable, crossing_rate, explore, values_along

LEVELS = ("light", "standard", "thorough")
COTANGENTS = ("time", "state", "both")
METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
ROUTES: dict[str, GradientRoute] = {
    "StepAdjoint": StepAdjoint(),
    "InterpolatingAdjoint": InterpolatingAdjoint(),
    "DirectAdjoint": DirectAdjoint(),
    "ForwardSensitivity": ForwardSensitivity(),
    "BacksolveAdjoint": BacksolveAdjoint(),
}
_ROUTE_SHARES = (0.5, 0.2, 0.1, 0.1, 0.1)
_GRID = 4001
_TRIES = 40
_SPANS = (math.log(0.5), math.log(3.0))  # of the path, over what its family says
_LOW_ORDER_RTOL = 1e-5  # fehlberg2 at 1e-8 would take a million steps
_SINGLE_RTOL = 3e-5
_LEAST_MARGIN = 0.02  # of dips of J before T, relative to how far it rose again
_LEAST_RATE = 0.02  # of J'(T), relative to its terms


@dataclass(frozen=True)
class Settings:
    """What a sample is of.

    Attributes:
        seed: Of the sample.
        evidence: Level of the evidence.
        what: Where the cotangents are: "time", "state" or "both".
        jumps: Whether the flows jump in the state.
        methods: Among which the method is drawn.
        dtypes: Among which the dtype is drawn.
        route: Name of the route; None: drawn.
        cost: Whether the cost over evidence="light" is measured.
    """

    seed: int = 0
    evidence: str = "standard"
    what: str = "time"
    jumps: bool = False
    methods: tuple[str, ...] = ("dopri5", "dopri8")
    dtypes: tuple[str, ...] = ("float64",)
    route: str | None = None
    cost: bool = False


SAMPLES: tuple[tuple[Settings, int], ...] = (
    (Settings(), 1000),
    (Settings(what="state"), 550),
    (Settings(jumps=True), 320),
    (Settings(evidence="thorough"), 530),
    (Settings(methods=METHODS, dtypes=tuple(DTYPES)), 150),
    (Settings(cost=True, seed=1), 40),
    (Settings(cost=True, seed=1, evidence="thorough"), 40),
)
"""What `--all` runs, and how many cases of each; the stored table has all but other methods."""


@dataclass(frozen=True)
class Case:
    """One problem and how it is solved.

    Attributes:
        flow: Name of the family.
        criterion: Name of the criterion.
        method: Method of torchdiffeq.
        rtol: Tolerance.
        default: Whether that is the default of the dtype, and is not passed.
        route: Name of the route.
        dtype: Of the state and the leaves.
        problem: Flow and criterion with numbers, and the target.
        near: T on the oracle's path.
        margin: Of the closest dip of J before T, relative to how far it rose again; inf: none.
        on_time: Cotangent on T, in 1 / time.
        on_state: Cotangent on x_T, in 1 / state, shape (n,).
    """

    flow: str
    criterion: str
    method: str
    rtol: float
    default: bool
    route: str
    dtype: str
    problem: Problem
    near: float
    margin: float
    on_time: float
    on_state: Any

    @property
    def promise(self) -> float:
        """50 rtol, at most 0.1."""
        return min(PROMISE_PER_RTOL * self.rtol, LARGEST_PROMISE)


def draw(settings: Settings, number: int) -> Case:
    """The case of a number.

    Raises:
        Unusable: No target was found in as many tries as are made.
    """
    reason = "no target"
    for attempt in range(_TRIES):
        rng = np.random.default_rng([settings.seed, number, int(settings.jumps), attempt])
        try:
            return _drawn(settings, rng)
        except Unusable as failure:
            reason = str(failure)
    raise Unusable(reason)


def _drawn(settings: Settings, rng: np.random.Generator) -> Case:
    families = JUMPING if settings.jumps else FLOWS | DESCENTS
    family = str(rng.choice(list(families)))
    flow = families[family](rng)
    flow = replace(flow, span=flow.span * math.exp(rng.uniform(*_SPANS)))
    kinds = [k for k in CRITERIA if k != "speed" or not settings.jumps]  # it would jump itself
    kind = str(rng.choice(kinds))
    criterion = CRITERIA[kind](rng, len(flow.x0))
    scales = [1.0, 1.0, 1.0]
    for index in range(3):
        exponent = rng.uniform(-6, 6)
        if rng.random() < 0.4:
            scales[index] = float(10**exponent)
    exponent, is_default = rng.uniform(-8, -2), bool(rng.random() < 0.3)
    route = settings.route or str(rng.choice(list(ROUTES), p=_ROUTE_SHARES))
    dtype = settings.dtypes[int(rng.integers(1000)) % len(settings.dtypes)]
    method = settings.methods[int(rng.integers(1000)) % len(settings.methods)]
    lowest = _SINGLE_RTOL if dtype == "float32" else 1e-8
    if method not in ("dopri5", "dopri8"):
        lowest, is_default = max(lowest, _LOW_ORDER_RTOL), False
    rtol = max(float(10**exponent), lowest)
    if is_default:
        rtol = Torchdiffeq().tolerances(DTYPES[dtype]).rtol
    held = np.float32 if dtype == "float32" else np.float64

    def rounded(value: Any) -> Any:
        return np.asarray(value, dtype=held).astype(float)

    problem = Problem(
        flow=flow,
        criterion=criterion,
        state=scales[0],
        time=scales[1],
        value=scales[2],
        leaves={name: rounded(v) for name, v in (flow.leaves | criterion.leaves).items()},
        constants={name: rounded(v) for name, v in flow.constants.items()},
        x0=rounded(scales[0] * flow.x0),
        t0=float(rng.uniform(-1, 1)) * scales[1] if rng.random() < 0.7 else 0.0,
    )
    problem, near, margin = _with_target(problem, rng)
    weights = rng.standard_normal(len(problem.x0)) / scales[0]
    on_time = 0.0 if settings.what == "state" else 1.0 / scales[1]
    on_state = weights if settings.what != "time" else np.zeros_like(weights)
    return Case(
        family,
        kind,
        method,
        rtol,
        is_default,
        route,
        dtype,
        problem,
        near,
        margin,
        on_time,
        on_state,
    )


def _with_target(problem: Problem, rng: np.random.Generator) -> tuple[Problem, float, float]:
    """J or -J, and a value that it falls to for the first time at a random point of the path."""
    path = explore(problem)
    latest = min(problem.end, path.parts[-1][1])
    times = np.linspace(problem.t0, latest, _GRID)
    values = values_along(problem, path, times)
    if not np.isfinite(values).all():
        raise Unusable("J is not finite")
    for sign in rng.permutation([1.0, 1.0, -1.0]):
        falling = sign * values
        lowest = np.minimum.accumulate(falling)
        first = np.flatnonzero(falling[1:] < lowest[:-1]) + 1
        first = first[first >= _GRID // 25]
        tries: Any = rng.choice(first, (10, 2)) if len(first) else []
        late = bool(rng.random() < 0.5)  # the later of two: most first crossings are early
        for index in (max(pair) if late else pair[0] for pair in tries):
            margin = _margin(falling, index)
            share = float(rng.random())
            if margin < _LEAST_MARGIN:
                continue
            near = float(times[index] - share * (times[index] - times[index - 1]))
            found = replace(problem, value=float(sign) * problem.value)
            target = float(values_along(found, path, np.array([near]))[0])
            if not target < lowest[index - 1]:
                continue
            state, side = path.at(np.array([near]), len(problem.x0))
            slope, terms = crossing_rate(found, near, state[:, 0], float(side[0]))
            if -slope > _LEAST_RATE * terms:
                return replace(found, target=target), near, margin
    raise Unusable("no target")


def _margin(values: Any, index: int) -> float:
    """Of the dips before a point: how far above it, over how far J rose behind; the smallest."""
    before = values[: index + 1]
    dips = np.flatnonzero((before[1:-1] < before[:-2]) & (before[1:-1] <= before[2:])) + 1
    if not len(dips):
        return math.inf
    behind = np.maximum.accumulate(before[::-1])[::-1]
    return float(((before[dips] - before[-1]) / (behind[dips] - before[dips] + 1e-300)).min())
