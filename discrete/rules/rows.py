"""The user's update on the rows of a batch: many problems, one evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ode_stopping.core.rows import packed_rows
from ode_stopping.core.status import NotReproducibleError

from .maps import UpdateMap

__all__ = ["UpdateRows"]


class UpdateRows(UpdateMap):
    """x_{k+1} = G_k(x_k) of every sample: rows, shape (b, n), to rows; the layout is of one."""

    def _call(self, time: Tensor, flat: Tensor) -> Tensor:
        state = flat if self._is_vector else self.layout.unpack(flat)
        return self._packed(self.function(time, state), len(flat))

    def _checked(self, output: Any) -> Tensor:
        return self._packed(output, None)

    def _packed(self, output: Any, count: int | None) -> Tensor:
        return packed_rows(self.layout, output, name="update", dtype=self.dtype, count=count)

    def require_same(self, replayed: Tensor, stored: Tensor, k: int) -> None:
        """See `UpdateMap.require_same`; by the sample as well as by the piece.

        Raises:
            NotReproducibleError: Naming the sample.
        """
        if torch.equal(replayed, stored):
            return
        eps = torch.finfo(stored.dtype).eps
        gap, size = (replayed - stored).abs(), stored.abs()
        wrong = torch.zeros_like(gap[:, 0], dtype=torch.bool)
        for piece in self.layout.slices():
            if gap[:, piece].numel():
                own = size[:, piece].amax(dim=1, keepdim=True)
                allowed = eps * (100 * own + size.amax(dim=1, keepdim=True))
                wrong |= ~(gap[:, piece] <= allowed).all(dim=1)
        if bool(wrong.any()):
            raise NotReproducibleError(self._differs(k))
