"""Which states are kept on the way: all, every s-th (checkpoints), or the last few."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["CheckpointStore", "JoinedStore", "RecentStore", "ShiftedStore", "StateStore"]


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

    Args:
        memory: Budget in bytes. At least two states are always kept.
        stride: The s to start with.
    """

    def __init__(self, memory: int, *, stride: int = 1) -> None:
        self._memory = memory
        self._states: dict[int, Tensor] = {}
        self.stride = stride

    def add(self, k: int, state: Tensor) -> None:
        """Offer x_k, shape (n,)."""
        if k % self.stride:
            return
        self._states[k] = state
        limit = max(self._memory // max(state.numel() * state.element_size(), 1), 2)
        while len(self._states) > limit:
            self.stride *= 2
            self._states = {i: x for i, x in self._states.items() if i % self.stride == 0}

    def get(self, k: int) -> Tensor | None:
        """x_k if it was kept."""
        return self._states.get(k)

    def indices(self) -> list[int]:
        """Which states were kept, ascending."""
        return sorted(self._states)


class ShiftedStore:
    """A store whose first state is x_first: for the part of a run that begins there.

    Args:
        store: Receives x_first as its state 0.
        first: The index that it begins with.
    """

    def __init__(self, store: StateStore, first: int) -> None:
        self._store = store
        self._first = first

    def add(self, k: int, state: Tensor) -> None:
        """Offer x_k, shape (n,)."""
        self._store.add(k - self._first, state)

    def get(self, k: int) -> Tensor | None:
        """x_k if it was kept."""
        return self._store.get(k - self._first)

    def indices(self) -> list[int]:
        """Which states were kept, ascending."""
        return [k + self._first for k in self._store.indices()]


class JoinedStore:
    """The stores of the parts of a run, to be looked into."""

    def __init__(self, stores: Sequence[StateStore]) -> None:
        self._stores = list(stores)

    def add(self, k: int, state: Tensor) -> None:
        """Refused: the parts have received their states."""
        raise RuntimeError("a joined store is complete")

    def get(self, k: int) -> Tensor | None:
        """x_k if one of them kept it."""
        found = (store.get(k) for store in self._stores)
        return next((state for state in found if state is not None), None)

    def indices(self) -> list[int]:
        """Which states were kept, ascending."""
        return sorted({k for store in self._stores for k in store.indices()})


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
