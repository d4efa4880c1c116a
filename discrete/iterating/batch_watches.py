"""The targets of a batch that are still to be met. Twin of `watches`, with tensors for numbers."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ode_stopping.core.level import RowRounding, are_near, warn_of_the_start

from ..call import BatchCall

__all__ = ["RowWatches"]


class RowWatches:
    """What each sample waits for; see `Watches`.

    Args:
        call: What was asked.
        values: J at the start, shape (B,).

    Attributes:
        playing: Whose run is not over, shape (b,).
        highest: The highest target that counts, shape (b,): -inf where none does, and inf for a
            sample whose run is over, so that it never waits.
        leave: What J has to exceed for the next target to count; the largest float where all do.
    """

    def __init__(self, call: BatchCall, values: Tensor) -> None:
        self._levels = call.levels
        self._counting = torch.ones_like(self._levels, dtype=torch.bool)
        self._to_be_left = torch.zeros_like(self._counting)
        self._beyond = self._levels
        # One that meets its only target is at its end.
        self.single = self._levels.shape[1] == 1 and not call.leave_first
        if call.leave_first:
            start = call.update.clock.start_value
            self._beyond = RowRounding.at(call.criterion, start, call.begin).beyond(self._levels)
            self._to_be_left = ~(values[:, None] > self._beyond)
            self._counting = ~self._to_be_left
        else:
            _warn_of_the_start(call, values)
        self.playing = torch.ones_like(values, dtype=torch.bool)
        self._look()

    def _look(self) -> None:
        levels = self._levels
        highest = torch.where(self._counting, levels, -inf).amax(dim=1)
        self.highest = torch.where(self.playing, highest, inf)
        largest = torch.finfo(levels.dtype).max
        self.leave = torch.where(self._to_be_left, self._beyond, largest).amin(dim=1)

    def waiting(self, values: Tensor) -> Tensor:
        """Who is in play, with a finite J that meets no target and leaves none, shape (b,)."""
        return (values > self.highest) & (values <= self.leave)

    def meet(self, values: Tensor, may: Tensor) -> Tensor:
        """Take the targets away that values of J meet, and let others count that they leave.

        Args:
            values: J at a step, shape (b,).
            may: Who may meet or leave one, shape (b,).

        Returns:
            Which were met, shape (b, K).
        """
        values, may = values[:, None], may[:, None]
        met = self._counting & (values <= self._levels) & may
        left = self._to_be_left & (values > self._beyond) & may
        self._counting = (self._counting & ~met) | left
        self._to_be_left = self._to_be_left & ~left
        return met

    @property
    def done(self) -> Tensor:
        """Who waits for nothing any more, shape (b,)."""
        return ~(self._counting | self._to_be_left).any(dim=1)

    @property
    def never_left(self) -> Tensor:
        """Who has a target that J was never on the far side of, shape (b,)."""
        return self._to_be_left.any(dim=1)

    def end(self, ended: Tensor) -> None:
        """The runs of some samples are over, shape (b,)."""
        self.playing = self.playing & ~ended
        self._look()

    def keep(self, kept: Tensor) -> None:
        """Only the samples at some positions are left."""
        self._levels, self._beyond = self._levels[kept], self._beyond[kept]
        self._counting, self._to_be_left = self._counting[kept], self._to_be_left[kept]
        self.playing = self.playing[kept]
        self._look()


def _warn_of_the_start(call: BatchCall, values: Tensor) -> None:
    """Warn where a rounding decides whether a target is met at the start."""
    levels, criterion, update = call.levels, call.criterion, call.update
    near = are_near(values, call.begin, levels)
    if not bool(near.any()):
        return
    rounding = RowRounding.at(criterion, update.clock.start_value, call.begin)
    near = near & ((values[:, None] - levels).abs() <= rounding.around(levels))
    if not bool(near.any()):
        return
    following = criterion.row_values(update.clock.time(1), update.step(0, call.begin))
    for sample, place in (near & (following[:, None] > rounding.beyond(levels))).nonzero().tolist():
        warn_of_the_start(criterion, float(values[sample]), float(levels[sample, place]))
