"""A solved stopping-time problem, as the gradient routes see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.functions import CriterionMap
from ..core.leaves import LeafSet
from ..core.states import StateLayout
from ..core.stats import Stats
from ..crossing.point import Crossing
from ..solving.flow_map import FlowMap
from ..solving.tolerances import Tolerances
from ..solving.torchdiffeq import Torchdiffeq
from ..solving.trajectory import Trajectory
from .evidence import Evidence

__all__ = ["StoppingProblem"]


@dataclass(frozen=True)
class StoppingProblem:
    """What a route needs to pull a cotangent back from x_T to the start and to the parameters.

    Attributes:
        flow: dx/dt on flat vectors.
        criterion: J on flat vectors.
        leaves: Tensors that receive gradients, besides x0, t0 and the target.
        layout: Layout of the state.
        settings: Solver of the forward run.
        tolerances: Tolerances of the forward run.
        trajectory: x(t) on [t0, T].
        crossing: The crossing.
        x0: x(t0), shape (n,), without graph.
        stats: Counts, shared with the result.
        target: eps.
        times: Start, breakpoints and horizon: the flow is smooth in t between them.
        state_error: Estimate of the error of x_T by the last steps, shape (n,).
        evidence: Figures for the error of a gradient, shared with the result.
        thorough: Whether a gradient is compared with that of a second run.
        origin: The time from which T is counted: t0 of the whole run, also where this problem is
            its part between two targets.
    """

    flow: FlowMap
    criterion: CriterionMap
    leaves: LeafSet
    layout: StateLayout
    settings: Torchdiffeq
    tolerances: Tolerances
    trajectory: Trajectory
    crossing: Crossing
    x0: Tensor
    stats: Stats
    target: float
    times: tuple[float, ...]
    state_error: Tensor
    evidence: Evidence
    thorough: bool = False
    origin: float | None = None

    @property
    def span(self) -> float:
        """T counted from the start of the whole run, in flow time."""
        return self.end - (self.start if self.origin is None else self.origin)

    @property
    def start(self) -> float:
        """t0, in flow time."""
        return self.times[0]

    @property
    def end(self) -> float:
        """T."""
        return self.crossing.time

    @property
    def segments(self) -> list[tuple[int, float, float]]:
        """(index, begin, end) of the smooth pieces of [t0, T], in order of time."""
        ends = [t for t in self.times[1:-1] if t < self.end] + [self.end]
        return [(i, self.times[i], end) for i, end in enumerate(ends)]
