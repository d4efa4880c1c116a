"""The forward loop: iterate until the criterion has met every target, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from ode_stopping.core.memo import Memo, sharing
from ode_stopping.core.stats import Stats
from ode_stopping.core.status import Status

from ..call import Call
from .recording import Recorder, Recording
from .rest import Rest
from .store import StateStore
from .watches import Watches

__all__ = ["Hit", "Run", "find_index"]


@dataclass(frozen=True)
class Hit:
    """A step at which targets were met for the first time, or the state is asked for.

    Attributes:
        index: N.
        state: x_N, shape (n,).
        previous: x_{N-1}; x_0 where N = 0.
        loss: J(x_N), of a J that falls (`core.functions.CriterionMap`), as all of a run.
        previous_loss: J(x_{N-1}); NaN where N = 0.
        targets: Positions of the targets in the call; empty where none was met.
        places: Places of the step in the call's `at`; empty where it is not there.
    """

    index: int
    state: Tensor
    previous: Tensor
    loss: float
    previous_loss: float
    targets: tuple[int, ...]
    places: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """What the forward run found.

    Attributes:
        call: What was asked.
        status: How it ended: REACHED where every target was met.
        index: Number of steps that were taken.
        losses: J(x_k), k = 0..index, as Python floats (float64).
        state: x at the end, shape (n,).
        previous: The state before; the start where there was no step.
        hits: In order of the steps.
        store: The kept states; None where no gradient is wanted.
        stats: What it cost.
        recording: The graph of all steps, where it was small enough to be kept.
        step_bytes: What the graph of one step keeps alive; None: not known.
        note: One more sentence on how it ended.
    """

    call: Call
    status: Status
    index: int
    losses: list[float]
    state: Tensor
    previous: Tensor
    hits: tuple[Hit, ...]
    store: StateStore | None
    stats: Stats
    recording: Recording | None = None
    step_bytes: int | None = None
    note: str = ""

    @property
    def best(self) -> tuple[float, int]:
        """Smallest J (the largest of one that rises, in the user's sign) and its index."""
        finite = [(value, k) for k, value in enumerate(self.losses) if isfinite(value)]
        value, k = min(finite) if finite else (float("nan"), 0)
        return self.call.criterion.shown(value), k

    def hit(self, target: int) -> Hit | None:
        """Where the target at this position was met."""
        return next((hit for hit in self.hits if target in hit.targets), None)

    def status_of(self, target: int) -> Status:
        """How the run to the target at this position ended."""
        hit = self.hit(target)
        if hit is None:
            return self.status
        return Status.REACHED if hit.index else Status.AT_START


def find_index(call: Call, store: StateStore | None, *, graphs: int = 0) -> Run:
    """N = min{ k : J(x_k) <= eps } for every target (Definition 2 of arXiv 2505.22509).

    Args:
        call: What is asked.
        store: Receives x_0 .. x_N of the last target.
        graphs: Bytes of the graph that may be kept from the run itself; 0: none is made.
    """
    update, criterion = call.update, call.criterion
    with torch.no_grad(), sharing(Memo()):
        wanted = any(tensor.requires_grad for tensor in call.inputs)
        run = _iterated(call, store, Recorder(update, graphs, wanted=wanted))
    stats = Stats(nfe_forward=run.index, criterion_calls=criterion.calls, accepted=run.index)
    return replace(run, stats=stats)


def _iterated(call: Call, store: StateStore | None, recorder: Recorder) -> Run:
    update, criterion, clock = call.update, call.criterion, call.update.clock
    x = previous = call.begin
    losses: list[float] = []
    hits: list[Hit] = []
    k = 0

    def ended(status: Status, note: str = "") -> Run:
        found = call, status, k, losses, x, previous, tuple(hits), store, Stats()
        return Run(*found, recorder.recording(), recorder.step_bytes, note)

    rest = Rest(update, criterion, call.max_steps)
    watches: Watches | None = None
    asked, resting = call.asked, False
    last = max(asked, default=0)
    while True:
        t = update.time_tensor(clock.time(k))
        value = criterion.value(t, x)
        if t._version:  # the criterion has changed it in place
            t = update.time_tensor(clock.time(k))
        losses.append(value)
        if store is not None:
            store.add(k, x)
        if not isfinite(value):
            return ended(Status.DIVERGED, f"J is {criterion.shown(value)} at step {k}")
        if watches is None:
            watches = Watches(call, value)
        ending = watches.concerned(value) or k >= call.max_steps
        if ending or k in asked:
            # J may look at a part of the state only: NaN elsewhere is no hit.
            finite = bool(torch.isfinite(x).all())
            if ending and not finite:
                return ended(Status.DIVERGED, f"NaN or inf in x_{k}")
            met = watches.met_by(value) if ending else []
            places = asked.get(k, ()) if finite else ()
            if met or places:
                hits.append(_hit(k, x, previous, losses, met, places))
                recorder.hit(k)
            if not watches:
                return ended(Status.REACHED if k else Status.AT_START)
            if k >= call.max_steps:
                note = f"the limit of {call.max_steps} steps was used up"
                return ended(Status.NOT_REACHED, note + watches.never_left(call))
        # To know it once is enough: a state that is asked for later is still gone to.
        resting = resting or (k >= rest.due and rest.is_resting(k, x, losses, watches))
        if resting and k >= last:
            note = f"at rest from step {rest.since} on: x changes by no more than rounding"
            return ended(Status.NOT_REACHED, note + watches.never_left(call))
        previous, x = x, recorder.step(k, x, t)
        k += 1


def _hit(
    k: int,
    x: Tensor,
    previous: Tensor,
    losses: list[float],
    met: Sequence[int],
    places: tuple[int, ...],
) -> Hit:
    before = losses[-2] if k else float("nan")
    return Hit(k, x, previous, losses[-1], before, tuple(met), places)
