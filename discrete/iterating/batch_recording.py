"""The graph of a short batched run, kept while it is made. Twin of `recording`.

Samples meet their targets at different steps, so a chunk does not end at a hit: it keeps x_k of
every one of its steps, and cotangents enter in the middle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ode_stopping.core.rows import Rows

from ..rules.rows import UpdateRows
from .recording import CHUNK, measured

__all__ = ["Piece", "RowsChunk", "RowsRecorder", "RowsRecording"]


@dataclass(frozen=True)
class Piece:
    """Steps that are taken with the same samples in the computation.

    Attributes:
        first: Index of the state from which the first of them starts.
        rows: The samples.
        kept: Their positions among those of the piece before; None: all.
        begin: Their starts, shape (b, n), which stand in for samples whose run is over. There the
            update has been evaluated, so it may be again.
    """

    first: int
    rows: Rows
    kept: Tensor | None
    begin: Tensor

    def entered(self, k: int, states: Tensor, playing: Tensor | None) -> Tensor:
        """What a step starts from, shape (b, n), differentiably.

        Args:
            k: The step.
            states: x_k as the step before has left it.
            playing: Who is in play, shape (b,); None: all.
        """
        if k == self.first and self.kept is not None:
            states = states.index_select(0, self.kept)
        return states if playing is None else torch.where(playing[:, None], states, self.begin)


@dataclass(frozen=True)
class RowsChunk:
    """Some steps with their graph.

    Attributes:
        begin: Index of the start.
        start: x_begin, shape (b, n): a leaf.
        states: x_{begin+1}, x_{begin+2}, ..., each with a graph to `start`, the clock's start and
            all parameters.
    """

    begin: int
    start: Tensor
    states: list[Tensor]

    @property
    def end(self) -> int:
        """Index of the end."""
        return self.begin + len(self.states)


@dataclass(frozen=True)
class RowsRecording:
    """The graph of a whole run.

    Attributes:
        time: The stand-in for t0 in it, shape ().
        chunks: In order of the steps.
    """

    time: Tensor
    chunks: tuple[RowsChunk, ...]


class RowsRecorder:
    """Takes the steps of a run: with a graph as long as that fits into a budget, then without.

    Args:
        update: G_k.
        memory: Budget in bytes; 0: no graph is made.
        wanted: Whether something requires grad that the graph need not show.

    Attributes:
        step_bytes: What the graph of one step keeps alive; None: not known.
    """

    def __init__(self, update: UpdateRows, memory: int, *, wanted: bool) -> None:
        start = update.clock.start
        self._update = update
        self._memory = memory
        self._wanted = wanted
        self._active = memory > 0
        self._time = start.detach().clone().requires_grad_(start.requires_grad)
        self._clock = update.clock.traced(self._time)
        self._moves = start.requires_grad or isinstance(update.clock.step, Tensor)
        self._chunks: list[RowsChunk] = []
        self.step_bytes: int | None = None

    def step(
        self, k: int, states: Tensor, t: Tensor, piece: Piece, playing: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the step starts from, and x_{k+1}, each shape (b, n), without graph; t is t_k."""
        if self._active:
            try:
                return self._recorded(k, states, t, piece, playing)
            except RuntimeError:
                # It works without a graph, or the same error comes again from there.
                self.stop()
        with piece.rows.shown():
            entered = piece.entered(k, states, playing)
            return entered, self._update.step(k, entered, t)

    def recording(self) -> RowsRecording | None:
        """What was recorded; None where the graph was given up."""
        return RowsRecording(self._time, tuple(self._chunks)) if self._active else None

    def stop(self) -> None:
        """No graph is wanted any more."""
        self._active = False
        self._chunks = []

    def _recorded(
        self, k: int, states: Tensor, t: Tensor, piece: Piece, playing: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if not self._chunks or k - self._chunks[-1].begin >= CHUNK:
            leaf = states.detach().clone().requires_grad_(True)
            self._chunks.append(RowsChunk(k, leaf, []))
        chunk = self._chunks[-1]
        last = chunk.states[-1] if chunk.states else chunk.start
        with torch.enable_grad(), piece.rows.shown():
            time = self._clock(k) if self._moves else t
            entered = piece.entered(k, last, playing)
            state = self._update.step_recorded(k, entered, time)
        chunk.states.append(state)
        if k == 1:
            self._measure(chunk)
        if self.step_bytes is not None and (k + 1) * self.step_bytes > self._memory:
            self.stop()
        return entered.detach(), state.detach()

    def _measure(self, chunk: RowsChunk) -> None:
        """Look at the second step: what it keeps, and whether anyone needs it."""
        before, after = chunk.states[-2:]
        size, leaves = measured(before, after)
        self.step_bytes = size + after.nbytes
        own = {id(chunk.start), id(self._time)}
        if not (self._wanted or any(id(leaf) not in own for leaf in leaves)):
            self.stop()
