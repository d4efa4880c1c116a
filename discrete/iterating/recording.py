"""The graph of a short run, kept while it is made: what is kept need not be replayed.

The graph is cut into chunks, each from a leaf x_k, so that lam goes back through one after the
other, and at every hit N: x_{N-1} ends a chunk and x_N begins the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ode_stopping.core.leaves import walk

from ..rules.maps import UpdateMap

__all__ = ["CHUNK", "Chunk", "Recorder", "Recording", "measured"]

# Steps in one graph where memory is no limit: longer ones gain nothing.
CHUNK = 64
# A node of autograd's beside the tensors that it saves.
_NODE_BYTES = 1024


@dataclass(frozen=True)
class Chunk:
    """Some steps with their graph.

    Attributes:
        begin: Index of the start.
        end: Index of the end.
        start: x_begin, shape (n,): a leaf.
        state: x_end, shape (n,), with a graph to `start`, the clock's start and all parameters.
    """

    begin: int
    end: int
    start: Tensor
    state: Tensor


@dataclass(frozen=True)
class Recording:
    """The graph of a whole run.

    Attributes:
        time: The stand-in for t0 in it, shape ().
        chunks: In order of the steps; without the last step before each hit.
    """

    time: Tensor
    chunks: tuple[Chunk, ...]


class Recorder:
    """Takes the steps of a run: with a graph as long as that fits into a budget, then without.

    Args:
        update: G_k.
        memory: Budget in bytes; 0: no graph is made.
        wanted: Whether something requires grad that the graph need not show.

    Attributes:
        step_bytes: What the graph of one step keeps alive; None: not known.
    """

    def __init__(self, update: UpdateMap, memory: int, *, wanted: bool) -> None:
        start = update.clock.start
        self._update = update
        self._memory = memory
        self._wanted = wanted
        self._active = memory > 0
        self._time = start.detach().clone().requires_grad_(start.requires_grad)
        self._clock = update.clock.traced(self._time)
        self._moves = start.requires_grad or isinstance(update.clock.step, Tensor)
        self._chunks: list[Chunk] = []
        self._open: list[Tensor] = []  # of the chunk at work: its start, and the last two states
        self._begin = 0
        self.step_bytes: int | None = None

    def step(self, k: int, x: Tensor, t: Tensor) -> Tensor:
        """x_{k+1}, shape (n,), without graph; t is t_k."""
        if self._active:
            try:
                return self._recorded(k, x, t)
            except RuntimeError:
                # It works without a graph, or the same error comes again from there.
                self._stop()
        return self._update.step(k, x, t)

    def hit(self, n: int) -> None:
        """A hit at x_n: the chunk ends at x_{n-1}, and the next begins at x_n."""
        self._close(n - 1, -2)

    def recording(self) -> Recording | None:
        """What was recorded up to the last hit; None where the graph was given up."""
        return Recording(self._time, tuple(self._chunks)) if self._active else None

    def _recorded(self, k: int, x: Tensor, t: Tensor) -> Tensor:
        if self._open and k - self._begin >= CHUNK:
            self._close(k, -1)
        if not self._open:
            leaf = x.detach().clone().requires_grad_(True)
            self._begin, self._open = k, [leaf, leaf, leaf]
        start, _, last = self._open
        with torch.enable_grad():
            time = self._clock(k) if self._moves else t
            state = self._update.step_recorded(k, last, time)
        self._open = [start, last, state]
        if k == 1:
            self._measure()
        if self.step_bytes is not None and (k + 1) * self.step_bytes > self._memory:
            self._stop()
        return state.detach()

    def _measure(self) -> None:
        """Look at the second step: what it keeps, and whether anyone needs it."""
        start, before, after = self._open
        self.step_bytes, leaves = measured(before, after)
        own = {id(start), id(self._time)}
        if not (self._wanted or any(id(leaf) not in own for leaf in leaves)):
            self._stop()

    def _close(self, end: int, last: int) -> None:
        if self._open and end > self._begin:
            self._chunks.append(Chunk(self._begin, end, self._open[0], self._open[last]))
        self._open = []

    def _stop(self) -> None:
        self._active = False
        self._chunks, self._open = [], []


def measured(before: Tensor, after: Tensor) -> tuple[int, list[Tensor]]:
    """Bytes that the graph from one state to the next keeps alive, and all leaves below."""
    _, older = walk([before])
    leaves, nodes = walk([after])
    constants, own = _saved(older), nodes - older
    sizes = (size for place, size in _saved(own).items() if place not in constants)
    return sum(sizes) + _NODE_BYTES * len(own), leaves


def _saved(nodes: Iterable[Any]) -> dict[int, int]:
    """The storages that graph nodes keep alive: where each is, and its bytes."""
    names: dict[type, list[str]] = {}
    found: dict[int, int] = {}
    for node in nodes:
        kind = type(node)
        if kind not in names:
            names[kind] = [n for n in dir(node) if n.startswith("_saved_") or n == "saved_tensors"]
        for name in names[kind]:
            value = getattr(node, name)
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    found[storage.data_ptr()] = storage.nbytes()
    return found
