"""The forward loop: iterate until the criterion is down to the target, without gradients."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from ode_stopping.core.functions import CriterionMap
from ode_stopping.core.stats import Stats
from ode_stopping.core.status import Status

from .iteration import UpdateMap
from .store import StateStore

__all__ = ["IndexSearch", "find_index"]


@dataclass
class IndexSearch:
    """Outcome of the forward run.

    Attributes:
        status: How it ended.
        index: N, or the number of steps that were taken.
        losses: J(x_k), k = first..index, as Python floats (float64).
        state: x_N, shape (n,).
        previous: x_{N-1}; the start where there was no step.
        note: One more sentence.
        first: Index of the start.
    """

    status: Status
    index: int
    losses: list[float]
    state: Tensor
    previous: Tensor
    note: str = ""
    first: int = 0

    @property
    def best(self) -> tuple[float, int]:
        """Smallest J and its index."""
        finite = [(value, k) for k, value in enumerate(self.losses, self.first) if isfinite(value)]
        return min(finite) if finite else (float("nan"), self.first)


def find_index(
    update: UpdateMap,
    criterion: CriterionMap,
    x0: Tensor,
    target: float,
    *,
    max_steps: int,
    store: StateStore | None,
    stats: Stats,
    first: int = 0,
) -> IndexSearch:
    """N = min{ k : J(x_k) <= target } (Definition 2 of arXiv 2505.22509).

    Args:
        update: G_k.
        criterion: J.
        x0: Start, shape (n,).
        target: eps.
        max_steps: Limit on k.
        store: Receives x_first .. x_N.
        stats: Counts, filled in.
        first: Index of the start, where this run goes on with another.
    """

    def ended(status: Status, note: str = "") -> IndexSearch:
        return IndexSearch(status, k, losses, x, previous, note, first)

    clock = update.clock
    x = previous = x0
    losses: list[float] = []
    k = first
    try:
        while True:
            value = criterion.value(clock.time(k), x)
            losses.append(value)
            if store is not None:
                store.add(k, x)
            if not isfinite(value):
                return ended(Status.DIVERGED, f"J is {value} at step {k}")
            if value <= target or k >= max_steps:
                # J may look at a part of the state only: NaN elsewhere is no hit.
                if not bool(torch.isfinite(x).all()):
                    return ended(Status.DIVERGED, f"NaN or inf in x_{k}")
                if value <= target:
                    return ended(Status.REACHED if k > first else Status.AT_START)
                return ended(Status.NOT_REACHED, f"the limit of {max_steps} steps was used up")
            previous, x = x, update.step(k, x)
            k += 1
    finally:
        stats.nfe_forward = update.calls
        stats.criterion_calls = criterion.calls
        stats.accepted = k - first
