"""`stopping_time`: the entry point of the continuous side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from .attach import attach_constant, attach_crossing, attach_miss
from .consistency import check_derivatives, check_reproducible
from .evaluation import CriterionMap, FlowMap, Stats
from .gradients import GradientRoute, InterpolatingAdjoint
from .leaves import LeafSet
from .problem import StoppingProblem
from .result import StoppingResult, scalar
from .search import Search, find_crossing
from .solver import Tolerances, Torchdiffeq
from .states import State, StateLayout
from .status import ERROR_OF_STATUS, Status
from .validation import checked_scalar, checked_state, checked_target, refuse_transforms
from .warn import warn_about_rounding

__all__ = ["stopping_time"]

_DEFAULT_HORIZON = 1e6
_TRACE_POINTS = 8


def stopping_time(
    flow: Callable[..., Any],
    x0: State,
    criterion: Callable[..., Any],
    target: float | Tensor,
    *,
    t0: float | Tensor = 0.0,
    max_time: float | None = None,
    solver: Torchdiffeq | None = None,
    gradient: GradientRoute | None = InterpolatingAdjoint(),  # noqa: B008 - immutable
    params: Iterable[Tensor] | None = None,
    breakpoints: Iterable[float] | None = None,
    censored: float | Literal["horizon"] | None = None,
    batched: bool = False,
    throw: bool = True,
) -> StoppingResult:
    """First time at which the criterion is down to the target, with its derivatives.

        T = inf{ t >= t0 : J(t, x(t)) <= target },   x' = F(t, x),   x(t0) = x0

    (Definition 1 of arXiv 2505.22509; derivatives by its Theorem 1.) T is differentiable to every parameter of
    flow and criterion, every other tensor that requires grad and is used in them, x0, target and t0.

    Args:
        flow: Module or callable (t, x) -> dx/dt; t is a 0-d tensor.
        x0: Start: a tensor of any shape, or a tuple of tensors.
        criterion: Module or callable (t, x) -> J, a 0-d tensor.
        target: eps.
        t0: Start time, in flow time.
        max_time: Absolute horizon, in flow time; None: t0 + 1e6.
        solver: Adaptive method with its tolerances; None: `Torchdiffeq()`.
        gradient: Route of the derivatives; None: the time only, and no states are kept.
        params: Tensors to differentiate to that cannot be found from a traced evaluation; non-leaf tensors
            named here receive their gradient themselves instead of through their history.
        breakpoints: Times at which the flow jumps (not available yet).
        censored: What a miss counts as: a time, or "horizon". None: infinity, which raises if a non-zero
            cotangent reaches it.
        batched: Many independent problems on one clock (not available yet).
        throw: Raise for DEGENERATE, DIVERGED and STALLED instead of returning the status.

    Raises:
        TypeError, ValueError: Bad input, naming the argument.
        StoppingError: The run ended DEGENERATE, DIVERGED or STALLED, and `throw` is True.
        GradientError: Flow or criterion lose part of their derivatives, or are not reproducible.
        NotImplementedError: `batched`, `breakpoints`.

    Valid when: the flow is smooth between t0 and T, and the crossing is transversal (tested).
    """
    _refuse_unavailable(batched=batched, breakpoints=breakpoints)
    state = checked_state(x0)
    refuse_transforms(state)
    layout = StateLayout.of(state)
    packed = layout.pack(state)
    start_time = checked_scalar(t0, name="t0", like=packed)
    eps = checked_target(target, like=packed, criterion=criterion)
    start = float(start_time.detach())
    horizon = _checked_horizon(max_time, start)
    limit = _checked_censoring(censored, horizon)
    settings = solver if solver is not None else Torchdiffeq()
    tolerances = settings.tolerances(packed.dtype)
    x_start = packed.detach()
    flow_map = FlowMap(flow, layout, x_start, start=start, end=horizon)
    criterion_map = CriterionMap(criterion, layout, x_start)
    leaves = LeafSet.collect(flow, criterion, params=params)
    stats = Stats()
    search = find_crossing(
        flow_map,
        criterion_map,
        x_start,
        float(eps.detach()),
        start=start,
        max_time=horizon,
        settings=settings,
        tolerances=tolerances,
        keep=gradient is not None and gradient.keeps_trajectory,
        stats=stats,
    )
    time, end_state, problem = scalar(search.time, x_start), search.state, None
    inputs = (packed, start_time, eps)
    if gradient is not None and torch.is_grad_enabled():
        trace_leaves(flow_map, criterion_map, leaves, search.trajectory, search.time)
        if search.status is Status.REACHED:
            problem = _solved(flow_map, criterion_map, leaves, settings, tolerances, search, start, x_start, stats)
            check_functions(problem, active=_needs_grad(inputs, leaves))
            stats.checks = flow_map.calls - stats.nfe_forward
            time, end_state = attach_crossing(problem, gradient, inputs)
        elif search.status is Status.AT_START:
            time, end_state = attach_constant(search, inputs, leaves)
    if search.status not in (Status.REACHED, Status.AT_START, Status.DEGENERATE) or (
        search.status is Status.DEGENERATE and gradient is not None
    ):
        time, end_state = attach_miss(search, inputs, leaves, limit)
    if problem is None:
        stats.checks = flow_map.calls - stats.nfe_forward
    return _finished(search, layout, time, end_state, stats, problem, throw=throw)


def trace_leaves(
    flow: FlowMap, criterion: CriterionMap, leaves: LeafSet, path: Any, end: float
) -> None:
    """Find every tensor that flow and criterion depend on, at the start and at points along the path.

    Two evaluations at the start tell nodes that are older than the evaluation (a hyper-network's history)
    from its own; the further points catch a parameter that is used on another branch only.
    """
    for function, first in ((flow, path.start), (criterion, end)):
        x = path.flat(first) if path.steps else path.flat(path.start)
        nodes = []
        values = []
        for _ in range(2):
            time, point = function.inputs(first, x)
            value = function.traced(time, point)
            nodes.append(leaves.add_from([value], inputs=(time, point)))
            values.append(value.detach())
        check_reproducible(*values, name=function.name)
        leaves.note_history(*nodes)
    stride = max(len(path.steps) // _TRACE_POINTS, 1)
    for step in path.steps[::stride][:_TRACE_POINTS]:
        time, point = flow.inputs(0.5 * (step.t0 + step.t1), step.at_fraction(0.5))
        leaves.add_from([flow.traced(time, point)], inputs=(time, point))


def check_functions(problem: StoppingProblem, *, active: bool) -> None:
    """Compare the derivatives of flow and criterion with differences (see `consistency`)."""
    if not active:
        return
    flow, criterion = problem.flow, problem.criterion
    steps = problem.trajectory.steps
    middle = steps[len(steps) // 2] if steps else None
    t = 0.5 * (middle.t0 + middle.t1) if middle else problem.start
    x = middle.at_fraction(0.5) if middle else problem.x0
    check_derivatives(
        lambda y: flow.plain(t, y),
        lambda y: flow.traced(flow.time_tensor(t), y),
        x,
        problem.leaves,
        name="flow",
    )
    end = problem.end
    check_derivatives(
        lambda y: criterion.plain(end, y),
        lambda y: criterion.traced(criterion.time_tensor(end), y),
        problem.crossing.state,
        problem.leaves,
        name="criterion",
    )


def _needs_grad(inputs: Iterable[Tensor], leaves: LeafSet) -> bool:
    return bool(leaves.tensors) or any(tensor.requires_grad for tensor in inputs)


def _solved(
    flow: FlowMap,
    criterion: CriterionMap,
    leaves: LeafSet,
    settings: Torchdiffeq,
    tolerances: Tolerances,
    search: Search,
    start: float,
    x0: Tensor,
    stats: Stats,
) -> StoppingProblem:
    assert search.crossing is not None
    warn_about_rounding(search.crossing, start, tolerances)
    return StoppingProblem(
        flow=flow,
        criterion=criterion,
        leaves=leaves,
        layout=flow.layout,
        settings=settings,
        tolerances=tolerances,
        trajectory=search.trajectory,
        crossing=search.crossing,
        start=start,
        x0=x0,
        stats=stats,
    )


def _finished(
    search: Search,
    layout: StateLayout,
    time: Tensor,
    state: Tensor,
    stats: Stats,
    problem: StoppingProblem | None,
    *,
    throw: bool,
) -> StoppingResult:
    reached = search.status in (Status.REACHED, Status.AT_START, Status.DEGENERATE)
    result = StoppingResult(
        time=time,
        state=layout.unpack(state),
        status=search.status,
        reached=torch.tensor(reached, device=state.device),
        rate=scalar(search.crossing.rate if search.crossing else float("nan"), state),
        trajectory=search.trajectory,
        stats=stats,
        best=search.best[0],
        best_time=search.best[1],
        note=search.note,
        problem=problem,
    )
    error = ERROR_OF_STATUS.get(search.status)
    if throw and error is not None:
        raise error(
            f"{search.status.name}: {search.status.value} [{search.note}; t = {search.time:.9g}, "
            f"{stats.accepted} steps, best J = {search.best[0]:.6g} at t = {search.best[1]:.6g}]",
            time=search.time,
            step=stats.accepted,
            best=search.best[0],
            result=result,
        )
    return result


def _refuse_unavailable(*, batched: bool, breakpoints: Iterable[float] | None) -> None:
    if batched:
        raise NotImplementedError(
            "batched=True is not available yet: call stopping_time once a sample"
        )
    if breakpoints is not None:
        raise NotImplementedError("breakpoints= is not available yet: the flow must be smooth in t")


def _checked_horizon(max_time: float | None, start: float) -> float:
    if max_time is None:
        return start + _DEFAULT_HORIZON
    if isinstance(max_time, bool) or not isinstance(max_time, int | float | Tensor):
        raise TypeError(f"max_time must be a number; got {type(max_time).__name__}")
    horizon = float(max_time)
    if not abs(horizon) < float("inf"):
        raise ValueError(f"max_time must be finite; got {horizon}")
    if not horizon > start:
        raise ValueError(f"max_time must be later than t0 = {start:g}; got {horizon:g}")
    return horizon


def _checked_censoring(censored: float | str | None, horizon: float) -> float | None:
    if censored is None:
        return None
    if censored == "horizon":
        return horizon
    if isinstance(censored, str) or isinstance(censored, bool):
        raise ValueError(f'censored must be a number or "horizon"; got {censored!r}')
    value = float(censored)
    if value != value:
        raise ValueError("censored must not be NaN")
    return value
