"""What is looked at before the gradient of a batch is promised; see `tracing`.

All samples are looked at in the same evaluations, so nothing here grows with their number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ode_stopping.core.consistency import check_reproducible, check_time
from ode_stopping.core.coupling import refuse_coupling, refuse_undeclared
from ode_stopping.core.rows import Rows
from ode_stopping.core.status import GradientAccuracyWarning
from ode_stopping.core.warn import warn_user

from ..call import BatchCall
from ..iterating.batch import BatchRun
from .tracing import compare_derivatives

__all__ = ["check_functions_of_batch", "refuse_dependent_samples", "trace_leaves_of_batch"]

_TRACE_POINTS = 8
# The scale of a row of zeros: one has to be taken.
_OF_ZEROS = 0.1


def refuse_dependent_samples(call: BatchCall, k: int, states: Tensor) -> None:
    """Raise if update or criterion couple samples, or use rows that are not declared.

    Args:
        call: What was asked.
        k: The step.
        states: x of all samples, shape (B, n).

    Raises:
        ValueError: Naming the function.
    """
    time = call.update.clock.time(k)
    with torch.no_grad():
        for name, evaluate in (
            ("criterion", lambda rows: call.criterion.row_values(time, rows)),
            ("update", lambda rows: call.update.step(k, rows)),
        ):
            refuse_coupling(evaluate, states, name=name)
            if call.droppable:
                refuse_undeclared(evaluate, states, call.rows, name=name)


def trace_leaves_of_batch(run: BatchRun) -> None:
    """Find every tensor that update and criterion depend on; see `tracing.trace_leaves`."""
    call, everyone = run.call, run.call.rows
    update, criterion, leaves, clock = call.update, call.criterion, call.leaves, call.update.clock
    last = max(run.index - 1, 0)
    previous, end = _ends(run, run.samples.previous), _ends(run, run.samples.state)

    def of_update(k: int, states: Tensor, rows: Rows) -> tuple[Tensor, set[Any]]:
        time, point = update.inputs(clock.time(k), states)
        with rows.shown():
            value = update.step_traced(k, point, time)
        return value.detach(), leaves.add_from([value], inputs=(time, point))

    def of_criterion() -> tuple[Tensor, set[Any]]:
        time, point = criterion.inputs(clock.time(run.index), end)
        value = criterion.traced(time, point)
        return value.detach(), leaves.add_from([value], inputs=(time, point))

    for name, ((first, nodes), (second, others)) in (
        ("update", [of_update(last, previous, everyone) for _ in range(2)]),
        ("criterion", [of_criterion() for _ in range(2)]),
    ):
        if bool(run.samples.met.any()):
            check_reproducible(first, second, name=name)
        leaves.note_history(nodes, others)
    # The step belongs to the clock even where the update does not use it through its own graph.
    if isinstance(clock.step, Tensor):
        leaves.add_from([clock.step], inputs=())
    if last > 0:
        # An optimiser's first step may be another than the others.
        found = [of_update(0, call.begin, everyone)[1] for _ in range(2)]
        leaves.note_history(*found)
    if run.recording is not None and run.recording.chunks:
        _require_recorded(run)
        for chunk in run.recording.chunks:
            leaves.add_from([chunk.states[-1]], inputs=(chunk.start, run.recording.time))
        return
    store = run.store
    kept = [] if store is None else [k for k in store.indices() if k < last]
    for k in kept[:: max(len(kept) // _TRACE_POINTS, 1)][:_TRACE_POINTS]:
        states = None if store is None else store.get(k)
        if states is not None:
            of_update(k, _entered(run, k, states), run.piece_of(k).rows)


def _require_recorded(run: BatchRun) -> None:
    """The values are of evaluations with a graph. Without one they have to be the same."""
    assert run.recording is not None
    chunk = run.recording.chunks[-1]
    k = chunk.end - 1
    states = chunk.states[-2] if len(chunk.states) > 1 else chunk.start
    with run.piece_of(k).rows.shown():
        found = run.call.update.step(k, _entered(run, k, states.detach()))
    there = (run.rows_at(k + 1).of(run.samples.ended) > k)[:, None]
    right = chunk.states[-1].detach()
    run.call.update.require_same(found.where(there, 0.0), right.where(there, 0.0), k + 1)


def _entered(run: BatchRun, k: int, states: Tensor) -> Tensor:
    piece = run.piece_of(k)
    return piece.entered(k, states, piece.rows.of(run.samples.ended) > k)


def _ends(run: BatchRun, states: Tensor) -> Tensor:
    """The states at the hits of the last target, shape (B, n); starts where it was not met."""
    return torch.where(run.samples.met[:, -1, None], states[:, -1], run.call.begin)


def check_functions_of_batch(run: BatchRun) -> None:
    """Compare the derivatives of update and criterion with differences.

    The update at the start and before the last step, the criterion at x_N of all samples, each by
    one comparison in which every sample has the same weight.

    Raises:
        MissingGradientError: A derivative is missing or partly missing.
        ValueError: The samples are coupled at the end, though they were not at the start.

    Warns:
        GradientAccuracyWarning: Numbers that are not finite forbid the comparison.
    """
    call, clock, last = run.call, run.call.update.clock, run.index - 1
    previous, end = _ends(run, run.samples.previous), clock.time(run.index)
    solved = run.samples.index > 0
    moved = solved.any(dim=1)
    if any(call.at):
        moved = moved | run.at_known[torch.tensor(call.at) > 0].any(dim=0)
    rows, finite = _sound(run, moved)
    if call.evidence == "standard" and finite:
        refuse_dependent_samples(call, last, previous)
    if last > 0:
        _check_update(call, rows, moved, 0, call.begin)
    _check_update(call, rows, moved, last, previous)
    for place in sorted({0, solved.shape[1] - 1}):
        mine = solved[:, place]
        states = torch.where(mine[:, None], run.samples.state[:, place], call.begin)
        _check_criterion(call, rows, mine, end, states)
    begin = clock.time(last)
    if (call.t0.requires_grad or isinstance(clock.step, Tensor)) and call.update.rule is not None:
        _check_clock(call, rows, last, previous, (begin, end))
    state, criterion = rows.of(_ends(run, run.samples.state)), call.criterion
    check_time(
        _shown(rows, lambda t: criterion.plain(t, state)),
        _shown(rows, lambda t: criterion.traced(t, state)),
        end,
        bounds=(begin, end),
        like=state,
        name="criterion",
    )


def _sound(run: BatchRun, moved: Tensor) -> tuple[Rows, bool]:
    """The samples to look at, and whether all numbers are finite at the start.

    Those that have a part in a gradient are enough; one that has none may not even be smooth.

    Args:
        run: The forward run.
        moved: Who has a part, shape (B,).
    """
    call = run.call
    finite = torch.isfinite(run.losses[0])
    finite = finite & torch.isfinite(call.update.step(0, call.begin)).all(dim=1)
    every = bool(finite.all())
    if call.droppable:
        chosen = moved & finite
        return (call.rows if bool(chosen.all()) else call.rows.keeping(_places(chosen))), every
    if not every:
        warn_user(
            f"sample {int(_places(~finite)[0])} gives numbers that are not finite from the start, "
            "so the derivatives of update and criterion cannot be compared with differences. Name "
            "what has one row a sample in per_sample=, so that it is left out",
            GradientAccuracyWarning,
        )
    return call.rows, every


def _places(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


def _shown(rows: Rows, function: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """A function for some of the samples; what is moved from outside moves in their rows, too."""

    def evaluate(argument: Any) -> Tensor:
        with rows.shown():
            return function(argument)

    return evaluate


def _check_clock(
    call: BatchCall, rows: Rows, k: int, states: Tensor, bounds: tuple[float, float]
) -> None:
    update, states = call.update, rows.of(states)
    check_time(
        _shown(rows, lambda t: update.step(k, states, t)),
        _shown(rows, lambda t: update.step_traced(k, states, t)),
        bounds[0],
        bounds=bounds,
        like=states,
        name="update",
        layout=call.layout,
    )


def _check_update(call: BatchCall, rows: Rows, mine: Tensor, k: int, states: Tensor) -> None:
    """Compare the derivatives of step k with differences; see `tracing.check_functions`."""
    update, states = call.update, rows.of(states)
    time = torch.tensor(update.clock.time(k), dtype=torch.float64, device=states.device)

    def step(y: Tensor) -> Tensor:
        if update.adds:
            return update.increment(k, y, time)
        return update.step_traced(k, y, time) - y + states

    added = _shown(rows, step)

    def added_plain(y: Tensor) -> Tensor:
        return added(y.detach().requires_grad_(True)).detach()

    weight, scale = _weights(added_plain(states), rows.of(mine)), _scales(states)
    compare_derivatives(
        lambda u: added_plain(u * scale) * weight,
        lambda u: added(u * scale) * weight,
        states / scale,
        call.leaves,
        name="update",
        where=f"x_{k}",
        layout=call.layout,
    )


def _check_criterion(call: BatchCall, rows: Rows, mine: Tensor, t: float, states: Tensor) -> None:
    criterion, states = call.criterion, rows.of(states)
    plain = _shown(rows, lambda y: criterion.plain(t, y))
    traced = _shown(rows, lambda y: criterion.traced(criterion.time_tensor(t), y))
    weight = _weights(plain(states)[:, None], rows.of(mine))[:, 0]
    scale = _scales(states)
    compare_derivatives(
        lambda u: plain(u * scale) * weight,
        lambda u: traced(u * scale) * weight,
        states / scale,
        call.leaves,
        name="criterion",
        where="x_N",
    )


def _scales(states: Tensor) -> Tensor:
    """The size of each row, shape (b, 1): a comparison moves all of them by shares of their own.

    A small sample that is moved by the size of a large one would leave the range in which its
    functions are straight lines.
    """
    size = torch.linalg.vector_norm(states, dim=1, keepdim=True) / states.shape[1] ** 0.5
    return torch.where(size > 0, size, _OF_ZEROS)


def _weights(values: Tensor, mine: Tensor) -> Tensor:
    """One over the size of each row, shape (b, 1), so that no sample hides behind a larger one.

    Args:
        values: Shape (b, m).
        mine: Who counts, shape (b,); the others have the weight zero.
    """
    size = torch.where(mine[:, None], values.abs().amax(dim=1, keepdim=True), 0.0)
    # The smallest ones are not blown up: what is zero but for rounding has no derivative to show.
    least = torch.finfo(values.dtype).eps ** 0.5 * size.amax()
    inverse = torch.where(size > 0, 1.0 / size.clamp(min=least), 1.0)
    return torch.where(mine[:, None], inverse, 0.0)
