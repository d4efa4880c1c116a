"""A solved stopping-time problem, as the gradient routes see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .evaluation import CriterionMap, FlowMap, Stats
from .implicit import Crossing
from .leaves import LeafSet
from .solver import Tolerances, Torchdiffeq
from .states import StateLayout
from .trajectory import Trajectory

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
        start: t0, in flow time.
        x0: x(t0), shape (n,), without graph.
        stats: Counts, shared with the result.
    """

    flow: FlowMap
    criterion: CriterionMap
    leaves: LeafSet
    layout: StateLayout
    settings: Torchdiffeq
    tolerances: Tolerances
    trajectory: Trajectory
    crossing: Crossing
    start: float
    x0: Tensor
    stats: Stats

    @property
    def end(self) -> float:
        """T."""
        return self.crossing.time
