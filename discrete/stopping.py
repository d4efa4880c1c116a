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

from .adjoint import DiscreteAdjoint, IndexRoute, require_count
from .attach import Inputs, attach_index, evaluate_index
from .index import INTERPOLATIONS, IndexDefinition
from .iteration import Clock, UpdateMap
from .problem import IndexProblem
from .result import IndexTrajectory, StoppingIndexResult
from .search import IndexSearch, find_index
from .store import StateStore
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
        raise NotImplementedError(
            "batched=True is not available yet: call stopping_index once a sample"
        )
    state = checked_state(x0)
    refuse_transforms(state)
    _checked_objects(update, gradient)
    layout = StateLayout.of(state)
    packed = layout.pack(state)
    inputs = (
        packed,
        checked_scalar(t0, name="t0", like=packed),
        checked_target(target, like=packed, criterion=criterion),
    )
    definition = _checked_definition(interpolation, update, float(inputs[2].detach()))
    limit = _checked_limits(max_steps, censored)
    # A copy: an update that changes its argument in place is refused, but not before it did so.
    x_start = packed.detach().clone()
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
    steps, end_state = scalar(float("inf") if limit is None else limit, x_start), search.state
    if gradient is not None and torch.is_grad_enabled():
        trace_leaves(search, update_map, criterion_map, leaves, store, x_start)
        steps, end_state = _attached(search, problem, definition, gradient, inputs, leaves, steps)
    elif problem is not None:
        steps = scalar(evaluate_index(problem, definition), x_start)
    elif search.status is Status.AT_START:
        steps = scalar(0.0, x_start)
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
    gradient: IndexRoute,
    inputs: Inputs,
    leaves: LeafSet,
    missed: Tensor,
) -> tuple[Tensor, Tensor]:
    """The index and the end state with the graph that the outcome allows; `missed` is what a miss counts as."""
    tensors = (*inputs, *leaves.tensors)
    if problem is not None:
        if any(tensor.requires_grad for tensor in tensors):
            check_functions(problem)
        value = evaluate_index(problem, definition)
        return attach_index(problem, definition, gradient, value, inputs)
    if search.status is Status.AT_START:
        zero = ZeroWithGraph.apply(*tensors)
        return zero, inputs[0] + zero.to(inputs[0].dtype)
    if not any(tensor.requires_grad for tensor in tensors):
        return missed, search.state
    if bool(torch.isfinite(missed)):
        return missed + ZeroWithGraph.apply(*tensors), search.state
    where = f"{search.status.name}: {search.status.value}"
    steps, state = MissedValue.apply(where, missed, search.state, *tensors)
    return steps, state


def trace_leaves(
    search: IndexSearch,
    update: UpdateMap,
    criterion: CriterionMap,
    leaves: LeafSet,
    store: StateStore | None,
    x0: Tensor,
) -> None:
    """Find every tensor that update and criterion depend on.

    Looked at are the last step, twice, which tells nodes older than the evaluation (a hyper-network's history)
    from its own, and kept states, for a parameter that is used on another branch only.
    """
    clock, last = update.clock, max(search.index - 1, 0)

    def of_update(k: int, state: Tensor) -> tuple[Tensor, set[Any]]:
        time, point = update.inputs(clock.time(k), state)
        value = update.step_traced(k, point, time)
        return value.detach(), leaves.add_from([value], inputs=(time, point))

    def of_criterion() -> tuple[Tensor, set[Any]]:
        time, point = criterion.inputs(clock.time(search.index), search.state)
        value = criterion.traced(time, point)
        return value.detach(), leaves.add_from([value], inputs=(time, point))

    for name, evaluated in (
        ("update", [of_update(last, search.previous) for _ in range(2)]),
        ("criterion", [of_criterion() for _ in range(2)]),
    ):
        (first, nodes), (second, others) = evaluated
        if search.status is Status.REACHED:
            check_reproducible(first, second, name=name)
        leaves.note_history(nodes, others)
    # The step belongs to the clock even where the update does not use it through its own graph.
    if isinstance(clock.step, Tensor):
        leaves.add_from([clock.step], inputs=())
    kept = [k for k in store.indices() if k < last] if store is not None else []
    points = [(k, store.get(k)) for k in _spread(kept)] if store is not None else [(0, x0)]
    for k, state in points:
        if state is not None:
            of_update(k, state)


def _spread(indices: list[int]) -> list[int]:
    """A few of them, the first among them."""
    return indices[:: max(len(indices) // _TRACE_POINTS, 1)][:_TRACE_POINTS]


def check_functions(problem: IndexProblem) -> None:
    """Compare the derivatives of update and criterion with differences (see `ode_stopping.consistency`).

    Of an update, what it adds to x is looked at: in x_{k+1} itself a wrong derivative would be small by a
    factor h and could pass for rounding.
    """
    update, criterion, last = problem.update, problem.criterion, problem.index - 1
    # Fixed numbers: the comparison moves the parameters, h among them.
    time = torch.tensor(problem.clock.time(last), dtype=torch.float64, device=problem.x0.device)
    end = problem.clock.time(problem.index)

    def added(y: Tensor) -> Tensor:
        if update.adds:
            return update.increment(last, y, time)
        # x_{N-1} is added again, so that the value says how much rounding there is in it.
        return update.step_traced(last, y, time) - y + problem.previous

    def added_plain(y: Tensor) -> Tensor:
        return added(y.detach().requires_grad_(True)).detach()

    check_derivatives(added_plain, added, problem.previous, problem.leaves, name="update")
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
        time=_time(clock, steps) if has_step else None,
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


def _time(clock: Clock, steps: Tensor) -> Tensor:
    """t0 + h steps; for a miss infinity by way of the steps alone, since 0 * inf in a backward pass is NaN."""
    return clock.start + clock.step * steps if bool(torch.isfinite(steps)) else steps


def _checked_objects(update: object, gradient: object) -> None:
    if not callable(update):
        raise TypeError(f"update must be callable (k, x) -> x_next; got {type(update).__name__}")
    if isinstance(update, type):
        raise TypeError(
            f"update must be an object, as in {update.__name__}(flow, step=h); got a class"
        )
    if gradient is not None and not isinstance(gradient, IndexRoute):
        raise TypeError(
            f"gradient must be a route, as DiscreteAdjoint(), or None; got {gradient!r}"
        )


def _checked_definition(
    interpolation: str | None, update: object, target: float
) -> IndexDefinition:
    if not (interpolation is None or isinstance(interpolation, str)) or (
        interpolation not in INTERPOLATIONS
    ):
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


def _checked_limits(max_steps: int, censored: float | str | None) -> float | None:
    require_count(max_steps, name="max_steps")
    if censored is None:
        return None
    if censored == "horizon":
        return float(max_steps)
    if isinstance(censored, bool) or not isinstance(censored, int | float):
        raise TypeError(f'censored must be a number of steps or "horizon"; got {censored!r}')
    if censored != censored:
        raise ValueError("censored must not be NaN")
    return float(censored)
