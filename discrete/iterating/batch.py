"""The forward loop for a batch: iterate until every sample has met its targets. Twin of `run`.

Rows are samples. A sample whose run is over is frozen: it starts every further step from its x0,
and what becomes of it is looked at by nobody. Where everything with one row a sample is declared,
such rows leave the computation once they are a quarter of it. One number is read from the device a
step: how many samples wait for something that has not come (a second one where several targets, or
`leave_first`, leave open whether who has met something is at the end).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, nan

import torch
from torch import Tensor

from ode_stopping.core.memo import Memo, sharing
from ode_stopping.core.rows import Rows
from ode_stopping.core.samples import Samples
from ode_stopping.core.stats import Stats
from ode_stopping.core.status import Status

from ..call import BatchCall
from .batch_recording import Piece, RowsRecorder, RowsRecording
from .batch_rest import RowsRest
from .batch_watches import RowWatches
from .store import StateStore

__all__ = ["BatchRun", "find_indices", "piece_number"]

# Samples leave once so many of those in the computation are over.
_SHARE = 0.25


@dataclass(frozen=True)
class BatchRun:
    """What the forward run of a batch found.

    Attributes:
        call: What was asked.
        samples: How every sample fared.
        index: Number of steps that were taken.
        losses: J(x_k), shape (index + 1, B), float64, of a J that falls; NaN behind a sample's end.
        pieces: Which samples took part, in order of the steps.
        states_at: x_k at the steps of `at`, shape (A, B, n); NaN where `at_known` is False.
        at_known: Whose run came to them, shape (A, B).
        store: The kept states, as a step left them; None where no gradient is wanted.
        stats: What it cost.
        recording: The graph of all steps, where it was small enough to be kept.
        step_bytes: What the graph of one step keeps alive; None: not known.
        row_steps: How many evaluations of the update for one sample there were.
        note: One more sentence on how it ended.
    """

    call: BatchCall
    samples: Samples
    index: int
    losses: Tensor
    pieces: tuple[Piece, ...]
    states_at: Tensor
    at_known: Tensor
    store: StateStore | None
    stats: Stats
    recording: RowsRecording | None
    step_bytes: int | None
    row_steps: int
    note: str

    def piece_of(self, k: int) -> Piece:
        """The samples that take the step from x_k."""
        return self.pieces[piece_number(self.pieces, k)]

    def rows_at(self, k: int) -> Rows:
        """The samples of x_k as the step before has left it."""
        return self.pieces[piece_number(self.pieces, k - 1)].rows


def piece_number(pieces: Sequence[Piece], k: int) -> int:
    """Which of some pieces takes the step from x_k; the first for k < 0.

    Two may begin at step 0, where many samples are at their target from the start.
    """
    before = [place for place, piece in enumerate(pieces) if piece.first <= k]
    return before[-1] if before else 0


def find_indices(call: BatchCall, store: StateStore | None, *, graphs: int = 0) -> BatchRun:
    """N = min{ k : J(x_k) <= eps } for every target of every sample.

    Args:
        call: What is asked.
        store: Receives x_0, x_1, ..., each shape (b, n) of the samples in the computation.
        graphs: Bytes of the graph that may be kept from the run itself; 0: none is made.
    """
    with torch.no_grad(), sharing(Memo()):
        return _Loop(call, store, graphs).run()


class _Loop:
    """The state of a run.

    Args:
        call, store, graphs: See `find_indices`.
    """

    def __init__(self, call: BatchCall, store: StateStore | None, graphs: int) -> None:
        self.call, self.store = call, store
        wanted = any(tensor.requires_grad for tensor in call.inputs)
        self.recorder = RowsRecorder(call.update, graphs, wanted=wanted)
        self.rest = RowsRest(call.update, call.criterion, call.max_steps)
        self.samples = Samples.at_start(call.begin, call.levels.shape[1])
        self.pieces = [Piece(0, call.rows, None, call.begin)]
        self.alive = len(call.begin)
        count = len(call.at), *call.begin.shape
        self.states_at = call.begin.new_full(count, nan)
        self.at_known = torch.zeros(count[:2], dtype=torch.bool, device=call.begin.device)
        self.losses: list[tuple[Piece, list[Tensor]]] = [(self.pieces[0], [])]
        self.row_steps = 0
        self.note = ""
        self._calls = call.criterion.calls

    def run(self) -> BatchRun:
        """Go on until nobody is in play."""
        call, update, criterion = self.call, self.call.update, self.call.criterion
        clock, asked, limit = update.clock, self.call.asked, self.call.max_steps
        states = before = call.begin
        value_before = call.begin.new_full((len(states),), nan, dtype=torch.float64)
        watches: RowWatches | None = None
        resting, last, k = False, max(asked, default=0), 0
        while True:
            piece = self.pieces[-1]
            t = update.time_tensor(clock.time(k))
            with piece.rows.shown():
                value = criterion.row_values(t, states)
            if t._version:  # the criterion has changed it in place
                t = update.time_tensor(clock.time(k))
            self.losses[-1][1].append(value)
            if self.store is not None:
                self.store.add(k, states)
            if watches is None:
                watches = RowWatches(call, value)
            waiting = int(watches.waiting(value).sum())
            if waiting < self.alive or k >= limit or k in asked:
                hit = (value, value_before), (states, before)
                self._event(k, watches, hit, waiting)
                if not self.alive:
                    break
                value = self._dropped(k, watches, value)
            new = self.pieces[-1]
            playing = None if self.alive == len(new.rows) else watches.playing
            # To know it once is enough: a state that is asked for later is still gone to.
            if not resting and k >= self.rest.due and self.losses[-1][1]:
                with new.rows.shown():
                    entered = new.entered(k, states, playing)
                    resting = self.rest.is_resting(k, entered, self.losses[-1][1], watches)
            if resting and k >= last:
                self._finish_at_rest(k, watches, new.entered(k, states, playing))
                break
            before, states = self.recorder.step(k, states, t, new, playing)
            value_before = value
            self.row_steps += len(states)
            k += 1
        return self._found(k)

    def _event(
        self,
        k: int,
        watches: RowWatches,
        hit: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
        waiting: int,
    ) -> None:
        """Somebody meets a target, or fails; or the state is asked for, or the limit reached."""
        (value, _), (states, _) = hit
        rows, playing, last = self.pieces[-1].rows, watches.playing, k >= self.call.max_steps
        finite, whole = torch.isfinite(value), torch.isfinite(states).all(dim=1)
        # J may look at a part of the state only: NaN elsewhere is no hit.
        ending = torch.ones_like(finite) if last else ~watches.waiting(value)
        failed = playing & (~finite | (ending & ~whole))
        may = playing & ~failed
        samples = self.samples.with_hits(k, rows, watches.meet(value, may), *hit)
        for place in self.call.asked.get(k, ()):
            known = playing & finite & whole
            self.states_at[place] = rows.into(self.states_at[place], known, states)
            self.at_known[place] = rows.into(self.at_known[place], known, known)
        done = may & watches.done
        samples = samples.with_ends(k, rows, failed, Status.DIVERGED, states)
        samples = samples.with_ends(k, rows, done, Status.REACHED, states)
        if last:
            samples = samples.with_ends(k, rows, may & ~done, Status.NOT_REACHED, states)
            self.note = f"the limit of {self.call.max_steps} steps was used up"
        self.samples = samples
        if last:
            self._say_never_left(watches, may & ~done)
            self.alive = 0
            return
        watches.end(failed | done)
        # With one target whoever does not wait is at the end; else it has to be looked at.
        self.alive = waiting if watches.single else int(watches.playing.sum())

    def _dropped(self, k: int, watches: RowWatches, value: Tensor) -> Tensor:
        """Leave out the samples that are over, where they are many; J of the others."""
        piece = self.pieces[-1]
        if not self.call.droppable or self.alive > (1 - _SHARE) * len(piece.rows):
            return value
        kept = watches.playing.nonzero()[:, 0]
        watches.keep(kept)
        piece.rows.release()
        new = Piece(k, piece.rows.keeping(kept), kept, piece.begin[kept])
        self.pieces.append(new)
        self.rest = self.rest.kept(kept, k)
        self.losses.append((new, []))
        return value[kept]

    def _finish_at_rest(self, k: int, watches: RowWatches, states: Tensor) -> None:
        rows, playing = self.pieces[-1].rows, watches.playing
        self.samples = self.samples.with_ends(k, rows, playing, Status.NOT_REACHED, states)
        since = self.rest.since
        self.note = f"at rest from step {since} on: x changes by no more than rounding"
        self._say_never_left(watches, playing)

    def _say_never_left(self, watches: RowWatches, missed: Tensor) -> None:
        never = missed & watches.never_left
        if self.call.leave_first and bool(never.any()):
            far = self.call.criterion.far_side
            self.note += (
                f"; {int(never.sum())} samples have a target that J never was {far}, as "
                "leave_first=True asks for"
            )

    def _found(self, k: int) -> BatchRun:
        call = self.call
        losses = call.begin.new_full((k + 1, len(call.begin)), inf, dtype=torch.float64)
        first = 0
        for piece, values in self.losses:
            if values:
                rows, block = piece.rows, torch.stack(values)
                part = losses[first : first + len(block)]
                part[:, slice(None) if rows.index is None else rows.index] = block
                first += len(block)
            piece.rows.release()
        samples = self.samples
        steps = torch.arange(k + 1, device=losses.device)
        losses = torch.where(steps[:, None] > samples.ended, nan, losses)
        samples = samples.with_best(losses)
        spent = call.criterion.calls - self._calls
        stats = Stats(nfe_forward=k, criterion_calls=spent, accepted=k)
        return BatchRun(
            call,
            samples,
            k,
            losses,
            tuple(self.pieces),
            self.states_at,
            self.at_known,
            self.store,
            stats,
            self.recorder.recording(),
            self.recorder.step_bytes,
            self.row_steps,
            self.note,
        )
