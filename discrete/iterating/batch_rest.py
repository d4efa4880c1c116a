"""Has a batch come to rest short of its targets? `rest` for rows: all that are in play rest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batch_watches import RowWatches
from .rest import BLOCK, ROUNDING, Rest, probes

__all__ = ["RowsRest"]


class RowsRest(Rest):
    """See `Rest`: the samples in play are one state of many entries, with a J for each row.

    A batch is at rest where all of them are: one that has come to rest goes on beside one that
    moves.
    """

    def kept(self, kept: Tensor, k: int) -> RowsRest:
        """The same for the samples at some positions, to be asked again once J is known of them."""
        rest = RowsRest(self._update, self._criterion, self._limit)
        rest.due = max(rest.due, k + 2 * BLOCK)
        rest._largest = None if self._largest is None else self._largest[kept]
        return rest

    def _is_quiet(self, k: int, losses: list[Any], watches: Any) -> bool:
        """Whether J of nobody meets or leaves a target at the pace of the last two blocks."""
        assert isinstance(watches, RowWatches)
        older = torch.stack(losses[-2 * BLOCK : -BLOCK])
        newer = torch.stack(losses[-BLOCK:])
        low, high = newer.amin(dim=0), newer.amax(dim=0)
        first, most = older.amin(dim=0), older.amax(dim=0)
        spread = torch.maximum(most, high) - torch.minimum(first, low)
        blocks = (self._limit - k) / BLOCK
        fall, rise = (first - low).clamp(min=0.0), (high - most).clamp(min=0.0)
        above, below = low - watches.highest, watches.leave - high
        quiet = torch.minimum(above, below) > spread
        quiet = quiet & (above > fall * blocks) & (below > rise * blocks)
        return bool((quiet | ~watches.playing).all())

    def _wakes_at(
        self, k: int, x: Tensor, losses: list[Any], watches: Any, largest: Tensor
    ) -> tuple[int | None, bool]:
        """A step that moves x or J of somebody; else whether every step gave x exactly."""
        assert isinstance(watches, RowWatches)
        eps, playing = torch.finfo(x.dtype).eps, watches.playing
        allowed = self._allowed(x, largest)
        recent = torch.stack(losses[-BLOCK:])
        low, high = recent.amin(dim=0), recent.amax(dim=0)
        room = (high - low) + ROUNDING * eps * torch.maximum(low.abs(), high.abs())
        clock, still = self._update.clock, True
        for step in probes(k, self._limit):
            try:
                moved = self._update.step(step, x)
                value = self._criterion.plain(clock.time(step + 1), x).to(torch.float64)
            except Exception:
                # A table of rates that ends, say. The run will see it when it gets there.
                return step, False
            gap = torch.where(playing[:, None], (moved - x).abs(), 0.0)
            still = still and not bool(gap.any())
            quiet = watches.waiting(value) & (low - room <= value) & (value <= high + room)
            if not bool((gap <= allowed).all() & (quiet | ~playing).all()):
                return step, False
        return None, still
