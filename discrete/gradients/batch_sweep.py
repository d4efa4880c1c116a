"""Algorithm 1 for a batch: one lam with a row for each sample, one sweep from the last N to x0.

Each sample's cotangents enter at its own N. Behind it its row of lam is zero, and what stands there
is its start, of which nothing is asked. So one backward pass costs what the longest sample costs,
and a sample that is not differentiated takes no part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ode_stopping.core.directional import contradictions
from ode_stopping.core.rows import Rows
from ode_stopping.core.status import GradientError, NotReproducibleError
from ode_stopping.core.sweep import Sweep

from ..iterating.batch import BatchRun, piece_number
from ..iterating.batch_recording import Piece, RowsRecording
from ..iterating.store import CheckpointStore, StateStore
from .adjoint import DiscreteAdjoint, stored_state
from .batch_index import Injections
from .directional import warn_about

__all__ = ["PulledBatch", "pulled_batch"]


@dataclass(frozen=True)
class PulledBatch:
    """Cotangents, pulled back through the iteration.

    Attributes:
        start: On x0, shape (B, n).
        start_time: On t0, shape ().
        leaves: One tensor a leaf.
        steps: How many steps were differentiated.
        checks: Evaluations that only looked at the gradient.
    """

    start: Tensor
    start_time: Tensor
    leaves: list[Tensor]
    steps: int
    checks: int


def pulled_batch(run: BatchRun, injections: Injections) -> PulledBatch:
    """Pull the cotangents that enter a run back to x0, t0 and the leaves.

    Raises:
        GradientError: A sample that is not differentiated spoils what is shared.
    """
    sweep = _BatchSweep(run, injections, run.recording)
    sweep.go()
    some = injections.needed > 0
    if not sweep.is_finite() and bool(some.any()) and not bool(some.all()):
        # Samples without a part in the gradient were in the graph. Their rows of lam are zero, and
        # zero times a derivative that is infinite is none of the others'.
        sweep = _BatchSweep(run, injections, None, alone=True)
        sweep.go()
        if not (run.call.droppable or sweep.is_finite()):
            idle = int((~some).nonzero()[0])
            raise GradientError(
                "the gradient of the batch is not finite, and samples that have no part in it "
                f"(sample {idle} is one) may be why: their data or derivatives are not finite. "
                "Name what has one row a sample in per_sample=, so that they are left out"
            )
    calls = run.call.update.calls
    if run.call.evidence == "standard" and injections.last > 0:
        sweep.hold_against_difference()
    return sweep.result(run.call.update.calls - calls)


class _BatchSweep:
    """The sweep, through graphs that were recorded or through replays.

    Args:
        run: The forward run.
        injections: What enters it.
        recording: Its graph; None: it is made by replay.
        alone: Whether samples at which no cotangent enters are left out of a replay, where that is
            possible; else they stand where another one starts.
    """

    def __init__(
        self,
        run: BatchRun,
        injections: Injections,
        recording: RowsRecording | None,
        *,
        alone: bool = False,
    ) -> None:
        self._run, self._call, self._into = run, run.call, injections
        self._recording = recording
        t0 = run.call.update.clock.start
        self._start = (
            t0.detach().clone().requires_grad_(t0.requires_grad)
            if recording is None
            else recording.time
        )
        self._time = run.call.update.clock.traced(self._start)
        moving = [self._start] if t0.requires_grad else []
        self._leaves = [*moving, *run.call.leaves.tensors]
        self._sweep = Sweep([], self._leaves)
        # What arrives at the leaves by the criterion itself: no part of a state.
        self._direct = Sweep([], self._leaves)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._size = torch.zeros((), dtype=torch.float64, device=run.call.begin.device)
        self._earliest = int(injections.needed.min())
        self._pieces = run.pieces
        # Of each piece, which of its samples are in the sweep; None: all.
        self._selected: list[Tensor | None] = [None] * len(run.pieces)
        if alone:
            self._leave_out_idle()

    def _leave_out_idle(self) -> None:
        some = self._into.needed > 0
        if not self._call.droppable:
            (piece,) = self._run.pieces
            other = self._call.begin[some.nonzero()[0]]
            begin = torch.where(some[:, None], self._call.begin, other)
            self._pieces = (Piece(0, piece.rows, None, begin),)
            return
        pieces: list[Piece] = []
        for place, piece in enumerate(self._run.pieces):
            chosen = piece.rows.of(some).nonzero()[:, 0]
            rows, kept = piece.rows.keeping(chosen), None
            if pieces:
                former, own = pieces[-1].rows.index, rows.index
                assert former is not None
                assert own is not None
                kept = torch.searchsorted(former, own)
            pieces.append(Piece(piece.first, rows, kept, piece.begin[chosen]))
            self._selected[place] = chosen
        self._pieces = tuple(pieces)

    def _piece_of(self, k: int) -> Piece:
        """The samples that take the step from x_k."""
        return self._pieces[piece_number(self._pieces, k)]

    def _rows_at(self, k: int) -> Rows:
        """The samples of x_k as the step before has left it."""
        return self._pieces[piece_number(self._pieces, k - 1)].rows

    def _stored(self, store: StateStore, k: int) -> Tensor:
        states, chosen = (
            stored_state(store, k),
            self._selected[piece_number(self._run.pieces, k - 1)],
        )
        return states if chosen is None else states[chosen]

    def go(self) -> None:
        """Take lam from the last step to x0."""
        last = self._into.last
        if last <= 0:
            begin = self._pieces[0].begin
            self._sweep.lam = [torch.zeros_like(begin) if last < 0 else self._injected(0, begin)]
            return
        if self._recording is None:
            self._by_replay(last)
            return
        for chunk in reversed(self._recording.chunks):
            if chunk.begin >= last:
                continue
            end = min(chunk.end, last)
            states = dict(enumerate(chunk.states[: end - chunk.begin], chunk.begin + 1))
            if end == last:
                self._sweep.lam = [self._injected(last, states[last].detach())]
            self._through_graph(chunk.begin, chunk.start, end, states)

    def _by_replay(self, last: int) -> None:
        call, store = self._call, self._run.store
        assert store is not None
        assert isinstance(call.route, DiscreteAdjoint)
        path = [(0, self._pieces[0].begin)]
        path += [(k, self._stored(store, k)) for k in store.indices() if 0 < k <= last]
        k, states = path[-1]
        if k < last:
            for j in range(k, last):
                states = self._step(j, states)
            path.append((last, states))
        self._sweep.lam = [self._injected(last, states)]
        call.route.through_path(self, path, self._run.step_bytes)

    def _entered(self, k: int, states: Tensor) -> Tensor:
        """What the step from x_k starts from: who has no cotangent behind it stays at its start."""
        piece, needed = self._piece_of(k), self._into.needed
        playing = None if k < self._earliest else piece.rows.of(needed) > k
        return piece.entered(k, states, playing)

    def _step(self, k: int, states: Tensor, time: float | None = None) -> Tensor:
        with self._piece_of(k).rows.shown():
            return self._call.update.step(k, self._entered(k, states), time)

    def _require_same(self, k: int, replayed: Tensor, stored: Tensor) -> None:
        """Those that a cotangent enters at x_k or later have to come to the same x_k."""
        there = (self._rows_at(k).of(self._into.needed) >= k)[:, None]
        self._call.update.require_same(replayed.where(there, 0.0), stored.where(there, 0.0), k)

    def through(self, begin: int, end: int, first: Tensor, last: Tensor) -> None:
        """Take lam from x_end to x_begin through a replay that has to arrive at `last`.

        Raises:
            NotReproducibleError: It does not.
            UntrackedTensorError: The replay uses a tensor that no traced evaluation used.
        """
        update = self._call.update
        leaf = first.detach().clone().requires_grad_(True)
        states = {begin: leaf}
        wanted, y = {*self._into.steps, end}, leaf
        with torch.enable_grad():
            for k in range(begin, end):
                with self._piece_of(k).rows.shown():
                    y = update.step_traced(k, self._entered(k, y), self._time(k))
                if k + 1 in wanted:
                    states[k + 1] = y
        self._require_same(end, y.detach(), last)
        where = f"by the update between steps {begin} and {end}"
        self._call.leaves.require_known([y], inputs=[leaf, self._start], where=where)
        keep = self._call.leaves.has_history
        self._through_graph(begin, leaf, end, states, keep=keep)

    def replayed(
        self, begin: int, first: Tensor, end: int, last: Tensor, store: CheckpointStore
    ) -> list[tuple[int, Tensor]]:
        """The path from x_begin to x_end anew, with states in between as the store allows."""
        states = first
        for k in range(begin, end):
            store.add(k - begin, states)
            states = self._step(k, states)
        self._require_same(end, states, last)
        kept = [(begin + k, stored_state(store, k)) for k in store.indices()]
        return [*kept, (end, last)]

    def _through_graph(
        self, begin: int, start: Tensor, end: int, states: dict[int, Tensor], *, keep: bool = True
    ) -> None:
        """Take lam through steps that have their graph; what enters in between joins it."""
        inner = [k for k in self._into.steps if begin < k < end]
        self._sweep.join([self._injected(k, states[k].detach()) for k in inner])
        ends = [states[end], *(states[k] for k in inner)]
        self._sweep.through(ends, [start], keep=keep)
        if begin in self._into.steps:
            arrived = self._sweep.lam[0]
            self._sweep.lam = [arrived + self._injected(begin, start.detach())]
        for piece in self._pieces:
            if piece.first >= begin:
                piece.rows.release()

    def _injected(self, k: int, states: Tensor) -> Tensor:
        """What enters lam at x_k, shape (b, n): cotangents on states, and weights times grad J."""
        rows = self._rows_at(k)
        weights, cotangent = self._into.at(k, rows)
        cotangent = cotangent.to(states.dtype)
        if k in self._into.weighted:
            cotangent = cotangent + self._by_criterion(k, rows, states, weights)
        if self._call.evidence == "standard":
            some = (cotangent != 0).any(dim=1).nonzero()[:, 0]
            kept = cotangent[some]
            self._kept[k] = some, kept
            self._size += (kept * states[some]).abs().sum()
        return cotangent

    def _by_criterion(self, k: int, rows: Rows, states: Tensor, weights: Tensor) -> Tensor:
        """weights times grad J(x_k), row by row; what arrives at the leaves is added up."""
        call, some, mine = self._call, None, weights != 0
        if call.droppable:
            some = mine.nonzero()[:, 0]
            rows, states, weights = rows.keeping(some), states[some], weights[some]
            mine = mine[some]
        else:
            # The others may be anything: of them J is taken where it has been taken before.
            states = torch.where(mine[:, None], states, self._pieces[0].begin)
        x = states.detach().clone().requires_grad_(True)
        with torch.enable_grad(), rows.shown():
            time = call.criterion.time_tensor(self._time(k))
            value = call.criterion.traced(time, x)
        self._require_same_values(k, rows, value.detach(), x.detach(), mine)
        found = torch.zeros_like(x)
        if value.requires_grad:
            call.leaves.require_known([value], inputs=[x, self._start], where="in the last step")
            grads = torch.autograd.grad(
                value,
                [x, *self._leaves],
                weights.to(value.dtype),
                allow_unused=True,
                retain_graph=True,  # it may run through older nodes (a hyper-network's)
            )
            self._direct.leave(grads[1:])
            found = found if grads[0] is None else grads[0].where(mine[:, None], 0.0)
        if some is None:
            return found
        count = len(self._rows_at(k)), x.shape[1]
        return found.new_zeros(count).index_copy(0, some, found)

    def _require_same_values(
        self, k: int, rows: Rows, value: Tensor, x: Tensor, mine: Tensor
    ) -> None:
        """J of the forward run, computed again, has to be the same; see `check_same_value`."""
        before = rows.of(self._run.losses[k])
        size = x.abs().sum(dim=1).double() + before.abs()
        eps = torch.finfo(x.dtype).eps
        allowed = 1e3 * (torch.finfo(torch.float64).eps * before.abs() + eps * size)
        wrong = mine & ~((value.double() - before).abs() <= allowed)
        if bool(wrong.any()):
            place = int(wrong.nonzero()[0])
            raise NotReproducibleError(
                f"the criterion gave {float(before[place]):.9g} in the forward run and "
                f"{float(value[place]):.9g} now, at the same point (step {k} of a sample): "
                "something that it uses has changed since (a loop variable in a closure, a buffer "
                "of a module), so its derivative would belong to another problem. Take the "
                "gradient before the change, or bind the value when the function is made."
            )

    def is_finite(self) -> bool:
        """Whether what has arrived is."""
        found = (*self._sweep.lam, *self._sweep.sums, *self._direct.sums)
        return all(bool(torch.isfinite(one).all()) for one in found)

    def hold_against_difference(self) -> None:
        """Warn by name of tensors whose derivative is lost or wrong in some of the steps.

        One difference, of what the cotangents that enter make of the states, for all samples: two
        runs, and more only where something is wrong.
        """
        call, clock = self._call, self._call.update.clock
        leaves = call.leaves.detached_from_history()
        moving = len(self._leaves) - len(call.leaves.tensors)
        places = {id(leaf): moving + i for i, leaf in enumerate(call.leaves.tensors)}

        def value(start: Tensor) -> float:
            # Through torch, which shows another step where that is moved.
            step = clock.step
            h = float(step.detach() + 0.0) if isinstance(step, Tensor) else step
            states, total = start, self._size.new_zeros(())
            for k in range(self._into.last + 1):
                if k in self._kept:
                    some, cotangents = self._kept[k]
                    total += (cotangents * states[some]).sum()
                if k < self._into.last:
                    states = self._step(k, states, clock.start_value + k * h)
            return float(total)

        gradients = [self._sweep.lam[0], *(self._sweep.sums[places[id(leaf)]] for leaf in leaves)]
        errors = contradictions(value, self._pieces[0].begin, leaves, gradients, float(self._size))
        warn_about(errors, leaves, call, "the states at the end")

    def result(self, checks: int) -> PulledBatch:
        """What was summed up."""
        sums = [a + b for a, b in zip(self._sweep.sums, self._direct.sums, strict=True)]
        moving = len(sums) - len(self._call.leaves.tensors)
        by_start = sums[0] if moving else torch.zeros_like(self._start)
        (start,) = self._sweep.lam
        if self._selected[0] is not None:
            start = torch.zeros_like(self._call.begin).index_copy(0, self._selected[0], start)
        last = max(self._into.last, 0)
        return PulledBatch(start, by_start, sums[moving:], last, checks)
