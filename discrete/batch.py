"""`stopping_index(..., batched=True)`: many independent problems in one run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ode_stopping.core.describe import joined
from ode_stopping.core.rows import CriterionRows, Rows, checked_per_sample
from ode_stopping.core.states import State, StateLayout
from ode_stopping.core.status import DivergedError, Status
from ode_stopping.core.validation import described

from .call import BatchCall
from .gradients.adjoint import DiscreteAdjoint
from .gradients.batch import AttachedBatch, attach_batch
from .gradients.batch_checks import refuse_dependent_samples
from .iterating.batch import BatchRun, find_indices
from .result import IndexTrajectory, StoppingIndexResult
from .rules.maps import Clock
from .rules.rows import UpdateRows

__all__ = ["Asked", "batched_index", "checked_batch", "checked_levels"]


def checked_batch(state: State) -> int:
    """B, the length of dim 0 of every piece.

    Raises:
        ValueError: The pieces have no dim 0, or different ones.
    """
    pieces = state if isinstance(state, tuple) else (state,)
    for place, piece in enumerate(pieces):
        if not piece.ndim:
            raise ValueError(
                f"x0 must have the samples along dim 0 when batched=True; entry {place} is 0-d"
            )
    counts = [len(piece) for piece in pieces]
    if len(set(counts)) > 1:
        raise ValueError(
            "x0 must have as many samples in every piece when batched=True; got dim 0 of "
            + ", ".join(map(str, counts))
        )
    return counts[0]


def checked_levels(target: object, *, like: Tensor, count: int, criterion: object) -> Tensor:
    """The targets, shape (B, K), float64 or the dtype given, with their graph.

    Args:
        target: A number or shape () for all samples; (B,) one a sample; (1, K) or (B, K) several.
        like: The state, for the device.
        count: B.
        criterion: J, which may say that it is never negative.

    Raises:
        TypeError, ValueError: No such tensor; not finite; a value twice among those of a sample;
            negative where J is not.
    """
    if isinstance(target, bool) or not isinstance(target, int | float | Tensor):
        raise TypeError(f"target must be a float or a tensor; got {described(target)}")
    tensor = target
    if not isinstance(tensor, Tensor):
        tensor = torch.full((), float(tensor), dtype=torch.float64, device=like.device)
    if not tensor.is_floating_point():
        raise TypeError(f"target must be floating-point; got dtype {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"target is on {tensor.device} but x0 on {like.device}")
    shape = tuple(tensor.shape)
    fits = tensor.ndim == 0 or (
        shape == (count,) if tensor.ndim == 1 else tensor.ndim == 2 and shape[0] in (1, count)
    )
    if not fits or tensor.numel() == 0:
        raise ValueError(
            f"target must have shape (), ({count},) (one a sample), (1, K) or ({count}, K) "
            f"(several a sample) for a batch of {count}; got {shape}"
        )
    values = tensor.detach()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("target must be finite; got NaN or inf")
    if getattr(criterion, "nonnegative", False) is True and bool((values < 0).any()):
        raise ValueError(
            f"target must not be negative: {type(criterion).__name__} is never below 0, so it "
            f"would never be crossed; got {float(values.min()):g}"
        )
    if tensor.ndim < 2:
        return tensor.reshape(-1, 1).expand(count, 1)
    ordered = values.sort(dim=1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if bool(twice.any()):
        value = float(ordered[:, 1:][twice][0])
        raise ValueError(f"target must not hold a value twice; got {value:g} more than once")
    return tensor.expand(count, -1)


@dataclass(frozen=True)
class Asked:
    """What a batched call hands on beside the options of `Call`.

    Attributes:
        state: x0, checked.
        several: Whether the target has an axis of K.
        rises: Whether J rises to the targets.
        per_sample: Tensors with one row a sample; None: not declared.
        options: The fields of a `Call` that need no more.
    """

    state: State
    several: bool
    rises: bool
    per_sample: Iterable[Tensor] | None
    options: dict[str, Any]


def batched_index(
    update: Any, criterion: Any, start: Tensor, levels: Tensor, asked: Asked
) -> StoppingIndexResult:
    """The indices of a batch.

    Args:
        update: The user's.
        criterion: The user's.
        start: t0, shape ().
        levels: The targets, shape (B, K).
        asked: All else.

    Raises:
        NotImplementedError: A route, or an interpolation, that batches do not have.
        ValueError: Coupled samples; rows that are not declared.
        StoppingError: A sample diverged, and `throw` is True; after all have been solved.
    """
    route, definition = asked.options["route"], asked.options["definition"]
    if route is not None and not isinstance(route, DiscreteAdjoint):
        raise NotImplementedError(
            f"gradient must be DiscreteAdjoint(...) or None when batched=True; got "
            f"{type(route).__name__}"
        )
    if definition.needs_flow:
        raise NotImplementedError(
            'interpolation must be None or "log" when batched=True: "hermite" and "partial_step" '
            "need a call a sample"
        )
    count = checked_batch(asked.state)
    pieces = asked.state if isinstance(asked.state, tuple) else (asked.state,)
    shapes = tuple(piece.shape[1:] for piece in pieces)
    layout = StateLayout(shapes, isinstance(asked.state, tuple))
    packed = layout.pack_rows(asked.state)
    # A copy: an update that changes its argument in place is refused, but not before it did so.
    begin = packed.detach().clone()
    tensors = checked_per_sample(asked.per_sample, count)
    measured = CriterionRows(criterion, layout, begin, rises=asked.rises)
    clock = Clock.of(update, start.to(torch.float64))
    call = BatchCall(
        update=UpdateRows(update, layout, begin, clock),
        criterion=measured,
        x0=packed,
        begin=begin,
        t0=start,
        targets=(measured.oriented(levels),),
        several=asked.several,
        rows=Rows(count, tensors or ()),
        droppable=tensors is not None,
        **asked.options,
    )
    refuse_dependent_samples(call, 0, begin)
    if route is None:
        return _finished(attach_batch(find_indices(call, None)))
    graphs = route.graph_memory if torch.is_grad_enabled() else 0
    return _finished(attach_batch(find_indices(call, route.store(), graphs=graphs)))


class _BatchTrajectory(IndexTrajectory):
    """The losses of a batched run, shape (steps, B), and those of its states that were kept."""

    def __init__(self, run: BatchRun, *, clock: tuple[float, float] | None) -> None:
        super().__init__(run.call.layout, [], run.store, clock=clock)
        self.losses = run.call.criterion.shown(run.losses)
        self._ended = run.samples.ended
        self._rows = {k: run.rows_at(k).index for k in self.indices}

    @property
    def states(self) -> State:
        """The kept states in the order of `indices`; each piece has shape (len(indices), B, ...).

        NaN behind the end of a sample.

        Raises:
            RuntimeError: None were kept.
        """
        if self._store is None or not self.indices:
            raise RuntimeError("no states were kept: gradient=None")
        return self._layout.unpack(torch.stack([self._spread(k) for k in self.indices]))

    def _spread(self, k: int) -> Tensor:
        assert self._store is not None
        states, index = self._store.get(k), self._rows[k]
        assert states is not None
        full = states
        if index is not None:
            full = states.new_full((len(self._ended), states.shape[1]), torch.nan)
            full = full.index_copy(0, index, states)
        return full.where((self._ended >= k)[:, None], torch.nan)


def _finished(attached: AttachedBatch) -> StoppingIndexResult:
    """The result of a batched run.

    Raises:
        StoppingError: A sample diverged, and `throw` is True.
    """
    run, call, samples = attached.run, attached.run.call, attached.run.samples
    clock, ruled = call.update.clock, call.update.rule is not None
    shown = call.criterion.shown
    one = (lambda values: values) if call.several else (lambda values: values[:, 0])
    statuses = samples.statuses()
    steps = one(attached.steps)
    status: list[Any] = statuses if call.several else [some[0] for some in statuses]
    result = StoppingIndexResult(
        index=one(samples.index),
        steps=steps,
        time=_time(clock, steps) if ruled else None,
        state=call.layout.unpack(one(attached.states)),
        status=status,
        reached=one(samples.met),
        decrease=one(shown(samples.decrease)),
        trajectory=_BatchTrajectory(
            run, clock=(clock.start_value, clock.step_value) if ruled else None
        ),
        costs=attached.costs,
        best=shown(samples.best),
        best_index=samples.best_index,
        note=run.note,
        states_at=call.layout.unpack(attached.states_at),
        row_steps=run.row_steps,
    )
    if call.throw:
        _raise_failure(run, result)
    return result


def _time(clock: Clock, steps: Tensor) -> Tensor:
    """t0 + h steps; a miss by way of the steps alone, since 0 * inf on the way back is NaN."""
    finite = torch.isfinite(steps)
    return torch.where(finite, clock.start + clock.step * torch.where(finite, steps, 0.0), steps)


def _raise_failure(run: BatchRun, result: StoppingIndexResult) -> None:
    samples = run.samples
    failed = samples.is_status(Status.DIVERGED).nonzero()[:, 0].tolist()
    if not failed:
        return
    first = failed[0]
    ended, best = int(samples.ended[first]), float(result.best[first])
    names = joined([status.name for some in samples.statuses() for status in some])
    raise DivergedError(
        f"{len(failed)} of {len(samples.ended)} samples: {Status.DIVERGED.name}: "
        f"{Status.DIVERGED.value} [the first is sample {first}, at step {ended}; best J = "
        f"{best:.6g} at step {int(result.best_index[first])}; all: {names}]",
        time=run.call.update.clock.time(ended),
        step=ended,
        best=best,
        result=result,
    )
