"""`stopping_index`: the entry point of the discrete side, twin of `ode_stopping.stopping_time`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ode_stopping.attach import MissedValue, ZeroWithGraph
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
from .result import IndexTrajectory, StoppingIndexResult
from .search import IndexSearch, find_index
from .solved import IndexProblem
from .store import StateStore
from .tracing import check_functions, trace_leaves
from .updates import UpdateRule

__all__ = ["Interpolation", "stopping_index"]

Interpolation = Literal["log", "hermite", "partial_step"]


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
    differentiable to every parameter of update and criterion, every other tensor that requires grad
    and is used in them, the step h, x0, target and t0.

    Args:
        update: An `UpdateRule` (k, x, t) -> x_next, or any callable (k, x) -> x_next.
        x0: Start: a tensor of any shape, or a tuple of tensors.
        criterion: Module or callable (t, x) -> J, a 0-d tensor.
        target: eps.
        t0: Start time, in flow time.
        max_steps: Limit on the number of steps.
        gradient: Route of the derivatives; None: the index only, and no states are kept.
        interpolation: None: Definition 3, `.steps` has the value N. "log", "hermite",
            "partial_step": a fractional index N* with its exact gradient; the last two need an
            `UpdateRule`.
        params: Tensors to differentiate to that cannot be found from a traced evaluation.
        censored: What a miss counts as: a number of steps, or "horizon" (max_steps). None:
            infinity, which raises if a non-zero cotangent reaches it.
        batched: Many independent problems at once (not available yet).
        throw: Raise for DIVERGED instead of returning the status.

    Raises:
        TypeError, ValueError: Bad input, naming the argument.
        StoppingError: The run diverged, and `throw` is True.
        GradientError: The update or the criterion lose part of their derivatives, or are not
            reproducible.
        NotImplementedError: `batched`.
    """
    if batched:
        raise NotImplementedError(
            "batched=True is not available yet: call stopping_index once a sample"
        )
    # First, since a transformed tensor cannot be looked into.
    if isinstance(x0, Tensor | tuple):
        refuse_transforms(x0)
    state = checked_state(x0)
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
    setup = _Setup(
        update=UpdateMap(update, layout, x_start, Clock.of(update, inputs[1].to(torch.float64))),
        criterion=CriterionMap(criterion, layout, x_start),
        leaves=LeafSet.collect(update, criterion, params=params),
        store=gradient.store() if gradient is not None else None,
        definition=definition,
        x0=x_start,
        target=float(inputs[2].detach()),
        missed=scalar(float("inf") if limit is None else limit, x_start),
        stats=Stats(),
    )
    search = find_index(
        setup.update,
        setup.criterion,
        x_start,
        setup.target,
        max_steps=max_steps,
        store=setup.store,
        stats=setup.stats,
    )
    steps, end, problem = _attached(setup, search, gradient, inputs)
    return _finished(setup, search, steps, end, problem, throw=throw)


@dataclass(frozen=True)
class _Setup:
    """A checked call."""

    update: UpdateMap
    criterion: CriterionMap
    leaves: LeafSet
    store: StateStore | None
    definition: IndexDefinition
    x0: Tensor
    target: float
    missed: Tensor
    stats: Stats

    def solved(self, search: IndexSearch) -> IndexProblem:
        """The problem as the routes see it, after the target was met at N >= 1."""
        return IndexProblem(
            update=self.update,
            criterion=self.criterion,
            clock=self.update.clock,
            leaves=self.leaves,
            store=self.store,
            x0=self.x0,
            previous=search.previous,
            state=search.state,
            index=search.index,
            previous_loss=search.losses[-2],
            loss=search.losses[-1],
            target=self.target,
            stats=self.stats,
        )


def _attached(
    setup: _Setup, search: IndexSearch, gradient: IndexRoute | None, inputs: Inputs
) -> tuple[Tensor, Tensor, IndexProblem | None]:
    """The index and the end state with the graph that the outcome allows, and the problem."""
    leaves, missed, definition = setup.leaves, setup.missed, setup.definition
    problem = setup.solved(search) if search.status is Status.REACHED else None
    if gradient is None or setup.store is None or not torch.is_grad_enabled():
        if problem is not None:
            return scalar(evaluate_index(problem, definition), search.state), search.state, problem
        at_start = search.status is Status.AT_START
        return scalar(0.0, search.state) if at_start else missed, search.state, None
    trace_leaves(search, setup.update, setup.criterion, leaves, setup.store)
    tensors = (*inputs, *leaves.tensors)
    if problem is not None:
        # An evaluation without a graph hides its leaves: then nobody knows what is needed.
        if leaves.has_gap or any(tensor.requires_grad for tensor in tensors):
            check_functions(problem)
        value = evaluate_index(problem, definition)
        return *attach_index(problem, definition, gradient, value, inputs), problem
    if search.status is Status.AT_START:
        zero = ZeroWithGraph.apply(*tensors)
        return zero, inputs[0] + zero.to(inputs[0].dtype), None
    if not any(tensor.requires_grad for tensor in tensors):
        return missed, search.state, None
    if bool(torch.isfinite(missed)):
        return missed + ZeroWithGraph.apply(*tensors), search.state, None
    where = f"{search.status.name}: {search.status.value}"
    steps, state = MissedValue.apply(where, missed, search.state, *tensors)
    return steps, state, None


def _finished(
    setup: _Setup,
    search: IndexSearch,
    steps: Tensor,
    state: Tensor,
    problem: IndexProblem | None,
    *,
    throw: bool,
) -> StoppingIndexResult:
    update, layout, clock, stats = (
        setup.update,
        setup.update.layout,
        setup.update.clock,
        setup.stats,
    )
    stats.checks = update.calls - stats.nfe_forward
    reached = search.status in (Status.REACHED, Status.AT_START)
    best, best_index = search.best
    result = StoppingIndexResult(
        index=search.index if reached else -1,
        steps=steps,
        time=_time(clock, steps) if update.rule is not None else None,
        state=layout.unpack(state),
        status=search.status,
        reached=torch.tensor(reached, device=state.device),
        decrease=scalar(problem.decrease if problem else float("nan"), state),
        trajectory=IndexTrajectory(layout, search.losses, setup.store),
        stats=stats,
        best=best,
        best_index=best_index,
        note=search.note,
        problem=problem,
    )
    error = ERROR_OF_STATUS.get(search.status)
    if throw and error is not None:
        raise error(
            f"{search.status.name}: {search.status.value} [{search.note}; best J = {best:.6g} at "
            f"step {best_index}]",
            time=clock.time(search.index),
            step=search.index,
            best=best,
            result=result,
        )
    return result


def _time(clock: Clock, steps: Tensor) -> Tensor:
    """t0 + h steps; a miss by way of the steps alone, since 0 * inf on the way back is NaN."""
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
            f'interpolation="{interpolation}" needs an update with a flow (Euler, Heun, '
            f"RungeKutta4, ...); got {type(update).__name__}"
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
