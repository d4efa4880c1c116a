"""`stopping_index`: the entry point of the discrete side, twin of `ode_stopping.stopping_time`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ode_stopping.attach import MissedValue, ZeroWithGraph
from ode_stopping.consistency import check_derivatives, check_reproducible
from ode_stopping.evaluation import CriterionMap, Stats
from ode_stopping.leaves import LeafSet
from ode_stopping.result import scalar
from ode_stopping.states import State, StateLayout
from ode_stopping.status import ERROR_OF_STATUS, Status
from ode_stopping.validation import checked_scalar, checked_state, checked_target, refuse_transforms

from .adjoint import DiscreteAdjoint, IndexRoute
from .attach import Inputs, attach_index, evaluate_index
from .index import INTERPOLATIONS, IndexDefinition
from .iteration import Clock, UpdateMap
from .problem import IndexProblem
from .result import IndexTrajectory, StoppingIndexResult
from .search import IndexSearch, find_index
from .updates import UpdateRule

__all__ = ["Interpolation", "stopping_index"]

Interpolation = Literal["log", "hermite", "partial_step"]

_TRACE_POINTS = 8


def stopping_index(
    update: Callable[..., Any],
    x0: State,
    criterion: Callable[..., Any],
    target: float | Tensor,
    *,
    t0: float | Tensor = 0.0,
    max_steps: int = 1_000_000,
    gradient: IndexRoute | None = DiscreteAdjoint(),  # noqa: B008 - immutable
    interpolation: Interpolation | None = None,
    params: Iterable[Tensor] | None = None,
    censored: float | Literal["horizon"] | None = None,
    batched: bool = False,
    throw: bool = True,
) -> StoppingIndexResult:
    """First step at which the criterion is down to the target, with its derivatives.

        N = min{ k : J(t_k, x_k) <= target },   x_{k+1} = G_k(x_k, theta),   t_k = t0 + k h

    (Definition 2 of arXiv 2505.22509; derivatives by its Definition 3 and Algorithm 1.) `.steps` is
    differentiable to every parameter of update and criterion, every other tensor that requires grad and is used
    in them, the step h, x0, target and t0.

    Args:
        update: An `UpdateRule` (k, x, t) -> x_next, or any callable (k, x) -> x_next.
        x0: Start: a tensor of any shape, or a tuple of tensors.
        criterion: Module or callable (t, x) -> J, a 0-d tensor.
        target: eps.
        t0: Start time, in flow time.
        max_steps: Limit on the number of steps.
        gradient: Route of the derivatives; None: the index only, and no states are kept.
        interpolation: None: Definition 3, `.steps` has the value N. "log", "hermite", "partial_step": a
            fractional index N* with its exact gradient; the last two need an `UpdateRule`.
        params: Tensors to differentiate to that cannot be found from a traced evaluation.
        censored: What a miss counts as: a number of steps, or "horizon" (max_steps). None: infinity, which
            raises if a non-zero cotangent reaches it.
        batched: Many independent problems at once (not available yet).
        throw: Raise for DIVERGED instead of returning the status.

    Raises:
        TypeError, ValueError: Bad input, naming the argument.
        StoppingError: The run diverged, and `throw` is True.
        GradientError: The update or the criterion lose part of their derivatives, or are not reproducible.
        NotImplementedError: `batched`.
    """
    if batched:
        raise NotImplementedError("batched=True is not available yet: call stopping_index once a sample")
    state = checked_state(x0)
    refuse_transforms(state)
    layout = StateLayout.of(state)
    packed = layout.pack(state)
    inputs = (
        packed,
        checked_scalar(t0, name="t0", like=packed),
        checked_target(target, like=packed, criterion=criterion),
    )
    definition = _checked_definition(interpolation, update, float(inputs[2].detach()))
    limit = _checked_limits(update, max_steps, censored)
    x_start = packed.detach()
    clock = Clock.of(update, inputs[1].to(torch.float64))
    update_map = UpdateMap(update, layout, x_start, clock)
    criterion_map = CriterionMap(criterion, layout, x_start)
    leaves = LeafSet.collect(update, criterion, params=params)
    stats = Stats()
    store = gradient.store() if gradient is not None else None
    search = find_index(
        update_map,
        criterion_map,
        x_start,
        float(inputs[2].detach()),
        max_steps=max_steps,
        store=store,
        stats=stats,
    )
    problem = None
    if search.status is Status.REACHED:
        problem = IndexProblem(
            update=update_map,
            criterion=criterion_map,
            clock=clock,
            leaves=leaves,
            store=store,
            x0=x_start,
            previous=search.previous,
            state=search.state,
            index=search.index,
            previous_loss=search.losses[-2],
            loss=search.losses[-1],
            target=float(inputs[2].detach()),
            stats=stats,
        )
    steps, end_state = _attached(search, problem, definition, gradient, inputs, leaves, limit)
    stats.checks = update_map.calls - stats.nfe_forward
    trajectory = IndexTrajectory(layout, search.losses, store)
    return _finished(
        search,
        layout,
        steps,
        end_state,
        clock,
        trajectory,
        stats,
        problem,
        has_step=isinstance(update, UpdateRule),
        throw=throw,
    )


def _attached(
    search: IndexSearch,
    problem: IndexProblem | None,
    definition: IndexDefinition,
    gradient: IndexRoute | None,
    inputs: Inputs,
    leaves: LeafSet,
    limit: float | None,
) -> tuple[Tensor, Tensor]:
    """The index and the end state with the graph that the outcome allows."""
    x0, _, target = inputs
    with_graph = gradient is not None and torch.is_grad_enabled()
    if problem is not None:
        if not with_graph:
            return scalar(evaluate_index(problem, definition), x0), search.state
        trace_leaves(problem)
        if leaves.tensors or any(tensor.requires_grad for tensor in (*inputs, *_step_tensors(problem))):
            check_functions(problem)
        value = evaluate_index(problem, definition)
        assert gradient is not None
        return attach_index(problem, definition, gradient, value, inputs)
    if search.status is Status.AT_START:
        if not with_graph:
            return scalar(0.0, x0), search.state
        zero = ZeroWithGraph.apply(target, *leaves.tensors)
        return scalar(0.0, x0) + zero, x0 + zero.to(x0.dtype)
    value = float("inf") if limit is None else limit
    steps = scalar(value, x0)
    tensors = (*inputs, *leaves.tensors)
    if not (with_graph and any(tensor.requires_grad for tensor in tensors)):
        return steps, search.state
    if limit is not None:
        return steps + ZeroWithGraph.apply(*tensors), search.state
    where = f"{search.status.name}: {search.status.value}"
    missed, state = MissedValue.apply(where, steps, search.state, *tensors)
    return missed, state


def _step_tensors(problem: IndexProblem) -> list[Tensor]:
    return [problem.clock.step] if isinstance(problem.clock.step, Tensor) else []


def trace_leaves(problem: IndexProblem) -> None:
    """Find every tensor that update and criterion depend on: at the last step, and at kept states."""
    update, criterion, leaves, last = problem.update, problem.criterion, problem.leaves, problem.index - 1
    nodes, values = [], []
    for _ in range(2):
        time, point = update.inputs(problem.clock.time(last), problem.previous)
        value = update.step_traced(last, point, time)
        nodes.append(leaves.add_from([value], inputs=(time, point)))
        values.append(value.detach())
    check_reproducible(*values, name="update")
    leaves.note_history(*nodes)
    nodes, values = [], []
    for _ in range(2):
        time, point = criterion.inputs(problem.clock.time(problem.index), problem.state)
        value = criterion.traced(time, point)
        nodes.append(leaves.add_from([value], inputs=(time, point)))
        values.append(value.detach())
    check_reproducible(*values, name="criterion")
    leaves.note_history(*nodes)
    # The step belongs to the clock even where the update does not use it through its own graph.
    for step in _step_tensors(problem):
        leaves.add_from([step], inputs=())
    kept = problem.store.indices() if problem.store is not None else [0]
    kept = [k for k in kept if k < last]
    for k in kept[:: max(len(kept) // _TRACE_POINTS, 1)][:_TRACE_POINTS]:
        state = problem.store.get(k) if problem.store is not None else problem.x0
        assert state is not None
        time, point = update.inputs(problem.clock.time(k), state)
        leaves.add_from([update.step_traced(k, point, time)], inputs=(time, point))


def check_functions(problem: IndexProblem) -> None:
    """Compare the derivatives of update and criterion with differences (see `ode_stopping.consistency`)."""
    update, criterion, last = problem.update, problem.criterion, problem.index - 1
    time = torch.tensor(problem.clock.time(last), dtype=torch.float64, device=problem.x0.device)
    check_derivatives(
        lambda y: update.step(last, y),
        lambda y: update.step_traced(last, y, time),
        problem.previous,
        problem.leaves,
        name="update",
    )
    end = problem.clock.time(problem.index)
    check_derivatives(
        lambda y: criterion.plain(end, y),
        lambda y: criterion.traced(criterion.time_tensor(end), y),
        problem.state,
        problem.leaves,
        name="criterion",
    )


def _finished(
    search: IndexSearch,
    layout: StateLayout,
    steps: Tensor,
    state: Tensor,
    clock: Clock,
    trajectory: IndexTrajectory,
    stats: Stats,
    problem: IndexProblem | None,
    *,
    has_step: bool,
    throw: bool,
) -> StoppingIndexResult:
    reached = search.status in (Status.REACHED, Status.AT_START)
    best, best_index = search.best
    result = StoppingIndexResult(
        index=search.index if reached else -1,
        steps=steps,
        time=clock.start + clock.step * steps if has_step else None,
        state=layout.unpack(state),
        status=search.status,
        reached=torch.tensor(reached, device=state.device),
        decrease=scalar(problem.decrease if problem else float("nan"), state),
        trajectory=trajectory,
        stats=stats,
        best=best,
        best_index=best_index,
        note=search.note,
        problem=problem,
    )
    error = ERROR_OF_STATUS.get(search.status)
    if throw and error is not None:
        raise error(
            f"{search.status.name}: {search.status.value} [{search.note}; best J = {best:.6g} at step {best_index}]",
            time=clock.time(search.index),
            step=search.index,
            best=best,
            result=result,
        )
    return result


def _checked_definition(
    interpolation: str | None, update: object, target: float
) -> IndexDefinition:
    if interpolation not in INTERPOLATIONS:
        names = [name for name in INTERPOLATIONS if name is not None]
        raise ValueError(f"interpolation must be None or one of {names}; got {interpolation!r}")
    definition = INTERPOLATIONS[interpolation]
    if definition.needs_flow and not isinstance(update, UpdateRule):
        raise ValueError(
            f'interpolation="{interpolation}" needs an update with a flow (Euler, Heun, RungeKutta4, ...); got '
            f"{type(update).__name__}"
        )
    if interpolation == "log" and not target > 0:
        raise ValueError(f'interpolation="log" needs a positive target; got {target:g}')
    return definition


def _checked_limits(update: object, max_steps: int, censored: float | str | None) -> float | None:
    if not callable(update):
        raise TypeError(f"update must be callable (k, x) -> x_next; got {type(update).__name__}")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int):
        raise TypeError(f"max_steps must be an int; got {type(max_steps).__name__}")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1; got {max_steps}")
    if censored is None:
        return None
    if censored == "horizon":
        return float(max_steps)
    if isinstance(censored, str | bool) or float(censored) != float(censored):
        raise ValueError(f'censored must be a number of steps or "horizon"; got {censored!r}')
    return float(censored)
