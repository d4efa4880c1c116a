"""Which tensors an iteration depends on, and whether it knows its own derivatives.

Looked at before a gradient is promised; see `core.leaves` and `core.consistency`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ode_stopping.core.consistency import (
    check_derivatives,
    check_reproducible,
    check_time,
    noise_like,
)
from ode_stopping.core.leaves import LeafSet
from ode_stopping.core.states import StateLayout
from ode_stopping.core.status import KinkWarning, MissingGradientError, Status
from ode_stopping.core.warn import warn_user

from ..iterating.run import Run
from .problem import IndexProblem

__all__ = ["check_functions", "compare_derivatives", "trace_leaves"]

_TRACE_POINTS = 8
# Where a kink is suspected: points nearby, at this share of the size of the state.
_NEARBY_POINTS = 4
_NEARBY = 1e-2
# Share of the slope by which one-sided slopes differ at a kink.
_KINK = 1e-3


def trace_leaves(run: Run) -> None:
    """Find every tensor that update and criterion depend on.

    Looked at are the last step, twice, which tells nodes older than the evaluation (a
    hyper-network's history) from its own, the other hits, and the graph
    of the run where it was recorded; else some kept states, for a parameter that is used on another
    branch only.
    """
    call = run.call
    update, criterion, leaves, clock = call.update, call.criterion, call.leaves, call.update.clock
    last = max(run.index - 1, 0)

    def of_update(k: int, state: Tensor) -> tuple[Tensor, set[Any]]:
        time, point = update.inputs(clock.time(k), state)
        value = update.step_traced(k, point, time)
        return value.detach(), leaves.add_from([value], inputs=(time, point))

    def of_criterion() -> tuple[Tensor, set[Any]]:
        time, point = criterion.inputs(clock.time(run.index), run.state)
        value = criterion.traced(time, point)
        return value.detach(), leaves.add_from([value], inputs=(time, point))

    for name, ((first, nodes), (second, others)) in (
        ("update", [of_update(last, run.previous) for _ in range(2)]),
        ("criterion", [of_criterion() for _ in range(2)]),
    ):
        if run.status is Status.REACHED:
            check_reproducible(first, second, name=name)
        leaves.note_history(nodes, others)
    # The step belongs to the clock even where the update does not use it through its own graph.
    if isinstance(clock.step, Tensor):
        leaves.add_from([clock.step], inputs=())
    for hit in run.hits:
        if 0 < hit.index <= last:
            of_update(hit.index - 1, hit.previous)
    if run.recording is not None:
        # The values are of evaluations with a graph. Without one they have to be the same.
        if run.status is Status.REACHED:
            update.require_same(update.step(last, run.previous), run.state, run.index)
        for chunk in run.recording.chunks:
            leaves.add_from([chunk.state], inputs=(chunk.start, run.recording.time))
        return
    store = run.store
    kept = [] if store is None else [k for k in store.indices() if k < last]
    for k in kept[:: max(len(kept) // _TRACE_POINTS, 1)][:_TRACE_POINTS]:
        state = None if store is None else store.get(k)
        if state is not None:
            of_update(k, state)


def check_functions(
    problem: IndexProblem, *, clock_matters: bool, with_criterion: bool = True
) -> None:
    """Compare the derivatives of update and criterion with differences.

    Args:
        problem: The solved problem.
        clock_matters: Whether the update's derivative to t is used: for t0, the step, or an index
            that shortens the last step.
        with_criterion: Whether the criterion's derivatives are used; not at a known step.

    Of an update, what it adds to x is looked at: in x_{k+1} itself a wrong derivative would be
    small by a factor h and could pass for rounding.

    Raises:
        MissingGradientError: A derivative is missing or partly missing.
    """
    update, criterion, last = problem.update, problem.criterion, problem.index - 1
    end = problem.clock.time(problem.index)
    # The first step as well: an optimiser's first step may be another than the others (a buffer
    # that starts as a copy of the gradient, without its graph).
    if problem.first < last:
        _note_history(problem, problem.first, problem.x0)
        _check_update(problem, problem.first, problem.x0)
    _check_update(problem, last, problem.previous)
    begin = problem.clock.time(last)
    if with_criterion:
        compare_derivatives(
            lambda y: criterion.plain(end, y),
            lambda y: criterion.traced(criterion.time_tensor(end), y),
            problem.state,
            problem.leaves,
            name="criterion",
            where=f"x_{problem.index}",
        )
        check_time(
            lambda t: criterion.plain(t, problem.state),
            lambda t: criterion.traced(t, problem.state),
            end,
            bounds=(begin, end),
            like=problem.state,
            name="criterion",
        )
    if clock_matters and update.rule is not None:
        check_time(
            lambda t: update.step(last, problem.previous, t),
            lambda t: update.step_traced(last, problem.previous, t),
            begin,
            bounds=(begin, end),
            like=problem.previous,
            name="update",
            layout=update.layout,
        )


def _note_history(problem: IndexProblem, k: int, x: Tensor) -> None:
    """Nodes that two evaluations of step k share are older: a hyper-network used there alone."""
    nodes = []
    for _ in range(2):
        time, point = problem.update.inputs(problem.clock.time(k), x)
        value = problem.update.step_traced(k, point, time)
        nodes.append(problem.leaves.add_from([value], inputs=(time, point)))
    problem.leaves.note_history(*nodes)


def _check_update(problem: IndexProblem, k: int, x: Tensor) -> None:
    """Compare the derivatives of step k at x with differences."""
    update = problem.update
    # Fixed numbers: the comparison moves the parameters, h among them.
    time = torch.tensor(problem.clock.time(k), dtype=torch.float64, device=x.device)

    def added(y: Tensor) -> Tensor:
        if update.adds:
            return update.increment(k, y, time)
        # x_k is added again, so that the value says how much rounding there is in it.
        return update.step_traced(k, y, time) - y + x

    def added_plain(y: Tensor) -> Tensor:
        return added(y.detach().requires_grad_(True)).detach()

    compare_derivatives(
        added_plain,
        added,
        x,
        problem.leaves,
        name="update",
        where=f"x_{k}",
        layout=update.layout,
        beside=None if update.adds else x,
    )


def compare_derivatives(
    evaluate: Callable[[Tensor], Tensor],
    traced: Callable[[Tensor], Tensor],
    x: Tensor,
    leaves: LeafSet,
    *,
    name: str,
    where: str,
    layout: StateLayout | None = None,
    beside: Tensor | None = None,
) -> None:
    """`check_derivatives`, which does not take a kink for a derivative that is missing.

    Where many kinks meet in one point (a projection that starts at zero), autograd's choice need
    not lie between the one-sided slopes. There the one-sided slopes differ however short the step,
    and the derivative is right at points nearby; one that is missing is missing there as well.

    Raises:
        MissingGradientError: A derivative is missing or partly missing.

    Warns:
        KinkWarning: x is on a kink.
    """
    try:
        check_derivatives(evaluate, traced, x, leaves, name=name, layout=layout, beside=beside)
        return
    except MissingGradientError:
        if not _on_kink(evaluate, x):
            raise
        for attempt in range(_NEARBY_POINTS):
            point = x + _NEARBY * _random_move(x, seed=1 + attempt)
            try:
                check_derivatives(
                    evaluate, traced, point, leaves, name=name, layout=layout, beside=beside
                )
                break
            except MissingGradientError:
                continue
        else:
            raise
    warn_user(
        f"the {name} has kinks at {where} (a projection or a threshold that starts at its edge?): "
        "the index has one-sided derivatives only, and the gradient is the one that torch's own "
        "functions choose there. A start that is moved a little has a derivative",
        KinkWarning,
    )


def _random_move(x: Tensor, *, seed: int) -> Tensor:
    """A random direction at the scale of x; every element moves, also one that is zero."""
    size = x.square().mean().sqrt()
    return noise_like(seed=seed)(x) * (x.abs() + (size if bool(size > 0) else 1.0))


def _on_kink(evaluate: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether one-sided differences at x disagree, however short the step."""
    move, here = _random_move(x, seed=0), evaluate(x)
    eps = torch.finfo(x.dtype).eps
    size, gaps = 10 * eps ** (1 / 3), []
    for _ in range(2):
        ahead, behind = evaluate(x + size * move), evaluate(x - size * move)
        gaps.append(float((ahead - 2 * here + behind).norm()) / size)
        noise = 100 * eps * float(here.norm() + x.norm()) / size
        if not gaps[-1] > _KINK * float((ahead - behind).norm()) / size + noise:
            return False
        size /= 10
    return gaps[1] > 0.5 * gaps[0]
