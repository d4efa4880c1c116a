"""The heavy ball on two modes by the library, on both sides, and their jumps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discrete import SemiImplicitEuler, stopping_index
from ode_stopping import GradientAccuracyWarning, LossValue, Quadratic, Torchdiffeq, stopping_time
from ode_stopping.flows import HeavyBallFlow

from ._two_modes import CURVATURES, START, TARGET, Crossing, jump

RTOL = 1e-10


@dataclass(frozen=True)
class Flowed:
    """The library's continuous answer.

    Attributes:
        time: T.
        minima: Of J before T, along the dense output.
        warned: Whether it said that T is about to jump.
    """

    time: float
    minima: int
    warned: bool


@dataclass(frozen=True)
class Run:
    """An iteration: a damping and a step size."""

    damping: float
    step: float


@dataclass(frozen=True)
class Bracket:
    """An interval of dampings with a jump in it, and the step size (None: the flow)."""

    low: float
    high: float
    step: float | None = None


def problem(damping: float) -> tuple[HeavyBallFlow, Any, LossValue, Tensor]:
    """Flow, start, J = f and the damping as a leaf."""
    a = torch.tensor(damping, dtype=torch.float64, requires_grad=True)
    f = Quadratic(torch.tensor(CURVATURES, dtype=torch.float64))
    flow = HeavyBallFlow(f, damping=a)
    return flow, flow.initial_state(torch.tensor(START, dtype=torch.float64)), LossValue(f), a


def by_flow(damping: float) -> Flowed:
    """T at one damping, with the warnings about grazing counted instead of shown."""
    flow, state, criterion, _ = problem(damping)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = stopping_time(
            flow, state, criterion, TARGET, solver=Torchdiffeq(method="dopri8", rtol=RTOL)
        )
    warned = any(issubclass(w.category, GradientAccuracyWarning) for w in caught)
    times = torch.linspace(0.0, result.trajectory.end, 401, dtype=torch.float64)
    with torch.no_grad():
        values = flow.objective(flow.position(result.trajectory(times)))
    return Flowed(float(result.time.detach()), minima_of(values.numpy()), warned)


def by_iteration(run: Run) -> Crossing:
    """H N of semi-implicit Euler (Definition 3), and the minima of its losses before step N."""
    flow, state, criterion, _ = problem(run.damping)
    update = SemiImplicitEuler(flow, step=run.step)
    result = stopping_index(update, state, criterion, TARGET, gradient=None)
    return Crossing(run.step * result.index, minima_of(result.trajectory.losses.numpy()))


def minima_of(values: Any) -> int:
    """How many values are less than the one before and at most the one after."""
    inner = values[1:-1]
    return int(((inner < values[:-2]) & (inner <= values[2:])).sum())


def jump_of(bracket: Bracket) -> float:
    """The damping at which T, or N, jumps."""
    count: Callable[[float], int]
    if bracket.step is None:
        width = 2e-8
        count = _oscillation_of_the_flow
    else:
        step = bracket.step
        width = 5e-3 * step

        def count(damping: float) -> int:
            return by_iteration(Run(damping, step)).minima

    return jump(count, bracket.low, bracket.high, width)


def _oscillation_of_the_flow(damping: float) -> int:
    return by_flow(damping).minima
