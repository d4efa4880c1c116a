"""A solved stopping-index problem, as the gradient routes and the index definitions see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ode_stopping.core.functions import CriterionMap
from ode_stopping.core.leaves import LeafSet
from ode_stopping.core.stats import Stats

from ..iterating.iteration import Clock, UpdateMap
from ..iterating.store import StateStore

__all__ = ["IndexProblem"]


@dataclass(frozen=True)
class IndexProblem:
    """What is needed to differentiate the index.

    Attributes:
        update: G_k on flat vectors.
        criterion: J on flat vectors.
        clock: t_k = t0 + k h.
        leaves: Tensors that receive gradients, besides x0, t0 and the target.
        store: The kept states.
        x0: Start, shape (n,), without graph.
        previous: x_{N-1}, shape (n,).
        state: x_N, shape (n,).
        index: N >= 1.
        previous_loss: J(x_{N-1}).
        loss: J(x_N).
        target: eps.
        stats: Counts, shared with the result.
        first: Index of the start: 0, unless this is the part of a run between two targets.
    """

    update: UpdateMap
    criterion: CriterionMap
    clock: Clock
    leaves: LeafSet
    store: StateStore | None
    x0: Tensor
    previous: Tensor
    state: Tensor
    index: int
    previous_loss: float
    loss: float
    target: float
    stats: Stats
    first: int = 0

    @property
    def decrease(self) -> float:
        """J(x_N) - J(x_{N-1}), negative."""
        return self.loss - self.previous_loss
