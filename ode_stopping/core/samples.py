"""How every sample of a batch fared: steps, status and the values at its targets, as tensors.

B samples, K targets each. Knows nothing of who makes the steps: an iteration or a solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import nan

import torch
from torch import Tensor

from .rows import Rows
from .status import Status

__all__ = ["Samples"]

_STATUSES = tuple(Status)


@dataclass(frozen=True)
class Samples:
    """The record of a batch; every change gives a new one.

    Values are those of a J that falls, whatever the user's does.

    Attributes:
        index: Step at which a target was met, shape (B, K); -1 where it was not.
        value: J there, shape (B, K), float64; NaN where it was not.
        before: J one step before, shape (B, K); NaN also at the start.
        state: The state there, shape (B, K, n); that at the end where a target was not met.
        previous: The state one step before, shape (B, K, n); the start where there is none.
        ended: Last step of the run of each sample, shape (B,).
        codes: Its status, as a number of `Status`'s order, shape (B,); -1 while it runs.
        best: Smallest finite J that it has seen, shape (B,); NaN where there is none.
        best_index: The step of that, shape (B,).
    """

    index: Tensor
    value: Tensor
    before: Tensor
    state: Tensor
    previous: Tensor
    ended: Tensor
    codes: Tensor
    best: Tensor
    best_index: Tensor

    @classmethod
    def at_start(cls, states: Tensor, targets: int) -> Samples:
        """Nothing has happened yet.

        Args:
            states: The start of every sample, shape (B, n).
            targets: K.
        """
        count = len(states)
        numbers = states.new_full((count, targets), nan, dtype=torch.float64)
        whole = states.new_full((count, targets), -1, dtype=torch.long)
        repeated = states[:, None].expand(-1, targets, -1)
        zeros, none = torch.zeros_like(whole[:, 0]), whole[:, 0]
        return cls(whole, numbers, numbers, repeated, repeated, zeros, none, numbers[:, 0], zeros)

    @property
    def met(self) -> Tensor:
        """Which targets were met, shape (B, K)."""
        return self.index >= 0

    @property
    def decrease(self) -> Tensor:
        """J where a target was met, less J a step before, shape (B, K); NaN where there is none."""
        return self.value - self.before

    def with_hits(
        self,
        step: int,
        rows: Rows,
        met: Tensor,
        values: tuple[Tensor, Tensor],
        states: tuple[Tensor, Tensor],
    ) -> Samples:
        """Some targets were met.

        Args:
            step: The step.
            rows: The samples in play.
            met: Which of their targets, shape (b, K).
            values: J now, and a step before, each shape (b,).
            states: The states now, and a step before, each shape (b, n).
        """
        now, before = (value[:, None] for value in values)
        here, there = (state[:, None] for state in states)
        return replace(
            self,
            index=rows.into(self.index, met, step),
            value=rows.into(self.value, met, now),
            before=rows.into(self.before, met, before),
            state=rows.into(self.state, met, here),
            previous=rows.into(self.previous, met, there),
        )

    def with_ends(
        self, step: int, rows: Rows, ended: Tensor, status: Status, states: Tensor
    ) -> Samples:
        """The runs of some samples are over.

        Args:
            step: The last step.
            rows: The samples in play.
            ended: Which of them, shape (b,).
            status: How.
            states: The states now, shape (b, n).
        """
        missed = ended[:, None] & (rows.of(self.index) < 0)
        return replace(
            self,
            state=rows.into(self.state, missed, states[:, None]),
            ended=rows.into(self.ended, ended, step),
            codes=rows.into(self.codes, ended, _STATUSES.index(status)),
        )

    def with_best(self, losses: Tensor) -> Samples:
        """The smallest finite values of J.

        Args:
            losses: Shape (steps, B); what is not finite does not count.
        """
        finite = torch.isfinite(losses)
        best, step = torch.where(finite, losses, torch.inf).min(dim=0)
        some = finite.any(dim=0)
        return replace(
            self, best=torch.where(some, best, nan), best_index=torch.where(some, step, 0)
        )

    def is_status(self, status: Status) -> Tensor:
        """Whose run ended so, shape (B,)."""
        return self.codes == _STATUSES.index(status)

    def statuses(self) -> list[list[Status]]:
        """Of every sample, and every target of it."""
        codes: Sequence[int] = self.codes.tolist()
        return [
            [
                _STATUSES[code] if n < 0 else Status.REACHED if n else Status.AT_START
                for n in indices
            ]
            for code, indices in zip(codes, self.index.tolist(), strict=True)
        ]
