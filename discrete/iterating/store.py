"""Which states are kept on the way: all, every s-th (checkpoints), or the last few."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from torch import Tensor

__all__ = ["CheckpointStore", "RecentStore", "StateStore"]


# States, and bytes, that are allocated at once.
_ROWS = 64
_BLOCK = 2**22
# Bytes of a state below which copying it costs more than it saves.
_SMALL = 2**14


class StateStore(Protocol):
    """Receives x_0, x_1, ... in order and keeps what its gradient route will need."""

    def add(self, k: int, state: Tensor) -> None:
        """Offer x_k, shape (n,)."""

    def get(self, k: int) -> Tensor | None:
        """x_k if it was kept."""

    def indices(self) -> list[int]:
        """Which states were kept, ascending."""


class CheckpointStore:
    """Every s-th state within a budget; s starts at 1 and doubles when the budget is used up.

    Large states are copied into blocks. Kept where they were made they would lie scattered among
    the temporaries of the steps, and the gaps between them cost several times the budget.

    Args:
        memory: Budget in bytes. At least two states are always kept.
        stride: The s to start with.
    """

    def __init__(self, memory: int, *, stride: int = 1) -> None:
        self._memory = memory
        self._states: dict[int, Tensor] = {}
        self._free: list[Tensor] = []
        self._largest = 1
        self.stride = stride

    def add(self, k: int, state: Tensor) -> None:
        """Offer x_k, shape (n,)."""
        if k % self.stride:
            return
        size = state.numel() * state.element_size()
        # Of a batch later states may have fewer rows; the budget is for the first ones.
        self._largest = max(size, self._largest)
        limit = max(self._memory // self._largest, 2)
        if len(self._states) >= limit:
            self._thin_out()
            if k % self.stride:
                return
        if size < _SMALL:
            self._states[k] = state
            return
        if not self._free or self._free[-1].shape != state.shape:
            rows = min(_ROWS, max(_BLOCK // size, 1), limit - len(self._states))
            self._free = list(state.new_empty((rows, *state.shape)).unbind())
        self._states[k] = self._free.pop().copy_(state)

    def _thin_out(self) -> None:
        """Every second state goes, and its place is free."""
        self.stride *= 2
        self._free += [x for i, x in self._states.items() if i % self.stride and x.nbytes >= _SMALL]
        self._states = {i: x for i, x in self._states.items() if i % self.stride == 0}

    def get(self, k: int) -> Tensor | None:
        """x_k if it was kept."""
        return self._states.get(k)

    def indices(self) -> list[int]:
        """Which states were kept, ascending."""
        return sorted(self._states)


class RecentStore:
    """The last `count` states."""

    def __init__(self, count: int) -> None:
        self._states: deque[tuple[int, Tensor]] = deque(maxlen=count)

    def add(self, k: int, state: Tensor) -> None:
        """Offer x_k, shape (n,)."""
        self._states.append((k, state))

    def get(self, k: int) -> Tensor | None:
        """x_k if it was kept."""
        return next((state for index, state in self._states if index == k), None)

    def indices(self) -> list[int]:
        """Which states were kept, ascending."""
        return [index for index, _ in self._states]
