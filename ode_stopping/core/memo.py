"""A product that flow and criterion both need at one point is computed once.

A gradient flow makes Q x (or X w) in its last stage, at the very state at which the criterion is
looked at next. The forward run owns a memo of the latest product of each kind; while it is active
(`sharing`), the library's problems ask it first (`shared`). It holds the point itself, so that no
other tensor can have its address, and a product counts only while nothing that it was made of, nor
it itself, has been changed in place. With gradients enabled it is never asked, for what it keeps
has no graph. Nothing is kept in the problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Memo", "shared", "sharing"]

# Below this many numbers a product costs less than the question.
_SMALL = 256


class _Entry(NamedTuple):
    """A value, and what it was made of."""

    point: Tensor
    value: Tensor
    # The owner's tensors, then the point and the value.
    tensors: list[Tensor]
    versions: list[int]

    def is_of(self, point: Tensor) -> bool:
        """Whether it is the value at this point still."""
        kept = self.point
        same = kept is point or (
            kept.data_ptr() == point.data_ptr()
            and kept.shape == point.shape
            and kept.stride() == point.stride()
            and kept.dtype is point.dtype
        )
        return same and [tensor._version for tensor in self.tensors] == self.versions


class Memo:
    """The latest value of each kind."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str], _Entry] = {}
        # Owners are held, so that their addresses do not become those of others.
        self._held: dict[int, tuple[nn.Module, list[Tensor]]] = {}

    def get(
        self, owner: nn.Module, kind: str, point: Tensor, compute: Callable[[], Tensor]
    ) -> Tensor:
        """The value at this point: the kept one, or a new one that is kept from now on."""
        key = (id(owner), kind)
        entry = self._entries.get(key)
        if entry is not None and entry.is_of(point):
            return entry.value
        value = compute()
        if id(owner) not in self._held:
            self._held[id(owner)] = (owner, _tensors(owner))
        tensors = [*self._held[id(owner)][1], point, value]
        self._entries[key] = _Entry(point, value, tensors, [t._version for t in tensors])
        return value


def _tensors(owner: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and tensors that are plain attributes, of all submodules."""
    found: list[Tensor] = []
    for module in owner.modules():
        found += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return [*found, *owner.parameters(), *owner.buffers()]


_ACTIVE: ContextVar[Memo | None] = ContextVar("memo of the forward run", default=None)


@contextmanager
def sharing(memo: Memo) -> Iterator[None]:
    """Inside, `shared` asks this memo first."""
    token = _ACTIVE.set(memo)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def shared(owner: nn.Module, kind: str, point: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` gives, or gave in this forward run for the same point.

    Args:
        owner: The problem that it is a value of; all that it depends on besides the point.
        kind: Tells several values of one problem apart.
        point: What it is computed at.
        compute: The computation.
    """
    memo = _ACTIVE.get()
    if memo is None or point.numel() < _SMALL or torch.is_grad_enabled():
        return compute()
    return memo.get(owner, kind, point, compute)
