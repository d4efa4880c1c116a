"""A solved stopping-index problem, as the gradient routes and the index definitions see it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ode_stopping.core.functions import CriterionMap
from ode_stopping.core.leaves import LeafSet

from ..iterating.run import Hit, Run
from ..iterating.store import StateStore
from ..rules.maps import Clock, UpdateMap

__all__ = ["IndexProblem"]


@dataclass(frozen=True)
class IndexProblem:
    """What is needed to differentiate the index of one target, or the state at a known step.

    Values are those of a J that falls (`core.functions.CriterionMap`); `criterion.shown` has them
    in the user's sign.

    Attributes:
        run: The forward run; it has the call.
        hit: Where the target was met.
        target: eps; NaN at a step that meets none.
        since: The hit before, where this is the part of a run between two hits.
    """

    run: Run
    hit: Hit
    target: float
    since: Hit | None = None

    @property
    def update(self) -> UpdateMap:
        """G_k on flat vectors."""
        return self.run.call.update

    @property
    def criterion(self) -> CriterionMap:
        """J on flat vectors."""
        return self.run.call.criterion

    @property
    def clock(self) -> Clock:
        """t_k = t0 + k h."""
        return self.update.clock

    @property
    def leaves(self) -> LeafSet:
        """Tensors that receive gradients, besides x0, t0 and the target."""
        return self.run.call.leaves

    @property
    def store(self) -> StateStore | None:
        """The kept states."""
        return self.run.store

    @property
    def first(self) -> int:
        """Index of the start: 0, unless this is the part of a run between two hits."""
        return 0 if self.since is None else self.since.index

    @property
    def x0(self) -> Tensor:
        """x at the start, shape (n,), without graph."""
        return self.run.call.begin if self.since is None else self.since.state

    @property
    def index(self) -> int:
        """N >= 1."""
        return self.hit.index

    @property
    def previous(self) -> Tensor:
        """x_{N-1}, shape (n,)."""
        return self.hit.previous

    @property
    def state(self) -> Tensor:
        """x_N, shape (n,)."""
        return self.hit.state

    @property
    def previous_loss(self) -> float:
        """J(x_{N-1})."""
        return self.hit.previous_loss

    @property
    def loss(self) -> float:
        """J(x_N)."""
        return self.hit.loss

    @property
    def decrease(self) -> float:
        """J(x_N) - J(x_{N-1}), negative."""
        return self.loss - self.previous_loss
