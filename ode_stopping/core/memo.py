"""A product that flow and criterion both need at one point is computed once.

A gradient flow makes Q x (or X w) in its last stage, at the very state at which the criterion is
looked at next. The forward run owns a memo of the latest product of each kind; while it is active
(`sharing`), the library's problems ask it first (`shared`). It holds the point itself, so that no
other tensor can have its address, and its key has the versions of everything that the problem
holds: a value that was changed in place is computed again. With gradients enabled it is never
asked, for what it keeps has no graph. Nothing is kept in the problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Memo", "shared", "sharing"]


class Memo:
    """The latest value of each kind, with what it was made of."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str], tuple[object, Tensor, Any, Any]] = {}
        self._held: dict[int, list[Tensor]] = {}

    def get(self, owner: nn.Module, kind: str, point: Tensor, compute: Callable[[], Any]) -> Any:
        """The value at this point: the kept one, or a new one that is kept from now on."""
        key = self._key(owner, point)
        entry = self._entries.get((id(owner), kind))
        if entry is not None and entry[2] == key:
            return entry[3]
        value = compute()
        # The owner is held too: its address must not become another problem's.
        self._entries[id(owner), kind] = (owner, point, key, value)
        return value

    def _key(self, owner: nn.Module, point: Tensor) -> tuple[Any, ...]:
        held = self._held.get(id(owner))
        if held is None:
            held = self._held[id(owner)] = _tensors(owner)
        versions = [tensor._version for tensor in held]
        return (
            point.data_ptr(),
            point._version,
            point.shape,
            point.stride(),
            point.dtype,
            versions,
        )


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


def shared(owner: nn.Module, kind: str, point: Tensor, compute: Callable[[], Any]) -> Any:
    """What `compute` gives, or gave in this forward run for the same point.

    Args:
        owner: The problem that it is a value of; all that it depends on besides the point.
        kind: Tells several values of one problem apart.
        point: What it is computed at.
        compute: The computation.
    """
    memo = _ACTIVE.get()
    if memo is None or torch.is_grad_enabled():
        return compute()
    return memo.get(owner, kind, point, compute)
