"""`stopping_index`: the entry point of the discrete side, twin of `ode_stopping.stopping_time`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ode_stopping.attach import MissedValue, ZeroWithGraph
from ode_stopping.evaluation import CriterionMap, Stats
from ode_stopping.flows import Flow
from ode_stopping.leaves import LeafSet
from ode_stopping.result import scalar
from ode_stopping.states import State, StateLayout
from ode_stopping.status import ERROR_OF_STATUS, GradientError, Status, StoppingWarning
from ode_stopping.validation import (
    checked_scalar,
    checked_state,
    checked_target,
    described,
    refuse_lost_views,
    refuse_transforms,
    require_callable,
    require_count,
    require_flag,
    require_instance,
)

from .adjoint import DiscreteAdjoint, IndexRoute
from .attach import Inputs, attach_index, evaluate_index
from .index import INTERPOLATIONS, IndexDefinition
from .iteration import Clock, UpdateMap
from .result import IndexTrajectory, StoppingIndexResult
from .search import IndexSearch, find_index
from .solved import IndexProblem
from .step_decrease import AugmentedRule, StepDecrease
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
    refuse_transforms(x0, target, t0)
    state = checked_state(x0, half=True)
    _checked_objects(update, criterion, gradient)
    require_flag(throw, name="throw")
    layout = StateLayout.of(state)
    packed = layout.pack(state)
    inputs = (
        packed,
        checked_scalar(t0, name="t0", like=packed),
        checked_target(target, like=packed, criterion=criterion),
    )
    if isinstance(criterion, StepDecrease):
        criterion.check_target(float(inputs[2].detach()))
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

    def measures(self, state: Tensor) -> bool:
        """Whether J is a measurement at a state; `StepDecrease` has marks as well."""
        criterion = self.criterion.function
        unpacked = self.criterion.layout.unpack(state)
        return not isinstance(criterion, StepDecrease) or criterion.measures(unpacked)

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
    if problem is not None and not (definition.whole or setup.measures(problem.previous)):
        warnings.warn(
            f"step {problem.index - 1} has no value of the criterion to interpolate from (it is "
            "the start, or f went up there): the fraction of the index says nothing. Use "
            "interpolation=None",
            StoppingWarning,
            stacklevel=3,
        )
    if gradient is None or setup.store is None or not torch.is_grad_enabled():
        if problem is not None:
            return scalar(evaluate_index(problem, definition), search.state), search.state, problem
        at_start = search.status is Status.AT_START
        return scalar(0.0, search.state) if at_start else missed, search.state, None
    trace_leaves(search, setup.update, setup.criterion, leaves, setup.store)
    tensors = (*inputs, *leaves.tensors)
    # A view that is named counts as an input; the leaf behind it may be older all the same.
    refuse_lost_views(has_history=leaves.has_history)
    if problem is not None:
        # An evaluation without a graph hides its leaves: then nobody knows what is needed.
        if leaves.has_gap or any(tensor.requires_grad for tensor in tensors):
            moved = inputs[1].requires_grad or isinstance(setup.update.clock.step, Tensor)
            check_functions(problem, clock_matters=moved or definition.needs_flow)
        value = evaluate_index(problem, definition)
        steps, state = attach_index(problem, definition, gradient, value, inputs)
        if not setup.measures(problem.previous):
            _refuse_meaningless(steps, problem)
        return steps, state, problem
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


def _refuse_meaningless(steps: Tensor, problem: IndexProblem) -> None:
    """Where J_{N-1} is a mark and no measurement, the quotient over the last step says nothing."""
    n = problem.index
    message = (
        f"the criterion has no value at step {n - 1} (J = {problem.previous_loss:g} there is a "
        f"mark, as at the start and after an increase), so J_N - J_(N-1) at N = {n} is no "
        "difference quotient: the index has no derivative here. Choose a smaller target, a "
        "smaller step, or gradient=None"
    )

    def refuse(cotangent: Tensor | None) -> None:
        if cotangent is not None and bool(cotangent != 0):
            raise GradientError(message)

    if steps.requires_grad:
        steps.register_hook(refuse)


def _time(clock: Clock, steps: Tensor) -> Tensor:
    """t0 + h steps; a miss by way of the steps alone, since 0 * inf on the way back is NaN."""
    return clock.start + clock.step * steps if bool(torch.isfinite(steps)) else steps


def _checked_objects(update: object, criterion: object, gradient: object) -> None:
    require_callable(update, name="update", call="(k, x) -> x_next")
    require_callable(criterion, name="criterion")
    if isinstance(update, Flow):
        raise TypeError(
            f"update must take a step, (k, x) -> x_next; got the flow {type(update).__name__}. "
            "Write Euler(flow, step=h)"
        )
    require_instance(gradient, IndexRoute, name="gradient", example="DiscreteAdjoint()")


def _checked_definition(
    interpolation: str | None, update: object, target: float
) -> IndexDefinition:
    if not (interpolation is None or isinstance(interpolation, str)) or (
        interpolation not in INTERPOLATIONS
    ):
        names = [name for name in INTERPOLATIONS if name is not None]
        raise ValueError(f"interpolation must be None or one of {names}; got {interpolation!r}")
    definition = INTERPOLATIONS[interpolation]
    if definition.needs_flow and isinstance(update, AugmentedRule):
        raise ValueError(
            f'interpolation="{interpolation}" needs a criterion that is a function of flow time; '
            'StepDecrease is none. Use None or "log"'
        )
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
        raise TypeError(
            f'censored must be a number of steps or "horizon"; got {described(censored)}'
        )
    if censored != censored:
        raise ValueError("censored must not be NaN")
    return float(censored)
