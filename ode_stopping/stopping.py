"""`stopping_time`: the entry point of the continuous side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .attach import attach_constant, attach_crossing, attach_miss
from .breakpoints import smooth_pieces
from .control import Tolerances
from .evaluation import CriterionMap, FlowMap, Stats
from .evidence import Evidence, warn_about_grazing
from .gradients import DirectAdjoint, GradientRoute, InterpolatingAdjoint
from .leaves import LeafSet
from .result import StoppingResult, scalar
from .search import Search, find_crossing
from .solved import StoppingProblem
from .solver import Torchdiffeq
from .states import State, StateLayout
from .status import ERROR_OF_STATUS, Status
from .tracing import check_criterion, check_functions, check_start, trace_leaves
from .validation import (
    checked_scalar,
    checked_state,
    checked_target,
    described,
    leaving_inference_mode,
    refuse_lost_views,
    refuse_transforms,
    require_callable,
    require_flag,
    require_instance,
)
from .warn import warn_about_clock, warn_about_rounding

__all__ = ["stopping_time"]

_DEFAULT_HORIZON = 1e6


@leaving_inference_mode
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
    evidence: Literal["cheap", "thorough"] = "cheap",
) -> StoppingResult:
    """First time at which the criterion is down to the target, with its derivatives.

        T = inf{ t >= t0 : J(t, x(t)) <= target },   x' = F(t, x),   x(t0) = x0

    (Definition 1 of arXiv 2505.22509; derivatives by its Theorem 1.) T is differentiable to every
    parameter of flow and criterion, every other tensor that requires grad and is used in them, x0,
    target and t0.

    Args:
        flow: Module or callable (t, x) -> dx/dt; t is a 0-d tensor.
        x0: Start: a tensor of any shape, or a tuple of tensors.
        criterion: Module or callable (t, x) -> J, a 0-d tensor.
        target: eps.
        t0: Start time, in flow time.
        max_time: Absolute horizon, in flow time; None: t0 + 1e6.
        solver: Adaptive method with its tolerances; None: `Torchdiffeq()`.
        gradient: Route of the derivatives; None: the time only, and no states are kept.
        params: Tensors to differentiate to that cannot be found from a traced evaluation; non-leaf
            tensors named here receive their gradient themselves instead of through their history.
        breakpoints: Times at which the flow jumps, in flow time. Steps end there, forward and
            backward; each side sees its own limit of the flow. T is not differentiated to them.
        censored: What a miss counts as: a time, or "horizon". None: infinity, which raises if a
            non-zero cotangent reaches it.
        batched: Many independent problems on one clock (not available yet).
        throw: Raise for DEGENERATE, DIVERGED and STALLED instead of returning the status.
        evidence: Every backward pass leaves estimates of its error on `result.evidence`, and warns
            (`GradientAccuracyWarning`) where they exceed 50 rtol. "cheap": from what the solves
            know, for two evaluations of flow and criterion. "thorough": a second run at a tenth
            of the tolerance besides, with its own backward pass, for 2.5 times the cost.

    Raises:
        TypeError, ValueError: Bad input, naming the argument.
        StoppingError: The run ended DEGENERATE, DIVERGED or STALLED, and `throw` is True.
        GradientError: Flow or criterion lose part of their derivatives, or are not reproducible.
        NotImplementedError: `batched`.

    Warns:
        GradientAccuracyWarning: J nearly reached the target before T (a grazing crossing); or, in
            the backward pass, the estimated error of the gradient exceeds the promise.
        StoppingWarning: The dtype cannot hold the tolerance on T.

    Valid when: the flow is smooth between t0 and T but for its `breakpoints`, and the crossing is
    transversal (tested).
    """
    _refuse_unavailable(batched=batched)
    _check_evidence(evidence)
    refuse_transforms(x0, target, t0)
    _check_kinds(flow, criterion, solver, gradient)
    require_flag(throw, name="throw")
    state = checked_state(x0)
    layout = StateLayout.of(state)
    packed = layout.pack(state)
    start_time = checked_scalar(t0, name="t0", like=packed)
    eps = checked_target(target, like=packed, criterion=criterion)
    start = float(start_time.detach())
    horizon = _checked_horizon(max_time, start, packed)
    limit = _checked_censoring(censored, horizon)
    settings = solver if solver is not None else Torchdiffeq()
    tolerances = settings.tolerances(packed.dtype)
    x_start = packed.detach().clone()  # an optimiser may move x0 before the backward pass
    times, jumps_at_start = smooth_pieces(start, horizon, breakpoints, x_start)
    setup = _Setup(
        flow=FlowMap(flow, layout, x_start, times=times, jumps_at_start=jumps_at_start),
        criterion=CriterionMap(criterion, layout, x_start),
        leaves=LeafSet.collect(flow, criterion, params=params),
        settings=settings,
        tolerances=tolerances,
        times=times,
        x0=x_start,
        target=float(eps.detach()),
        stats=Stats(),
        censored=limit,
        thorough=evidence == "thorough",
    )
    search = setup.search(gradient)
    time, end_state, problem = _attached(setup, search, gradient, (packed, start_time, eps))
    return _finished(search, layout, time, end_state, setup.stats, problem, throw=throw)


def _needs_grad(inputs: Iterable[Tensor], leaves: LeafSet) -> bool:
    # An evaluation without a graph hides its leaves: then nobody knows what is needed.
    return bool(leaves.tensors) or leaves.has_gap or any(tensor.requires_grad for tensor in inputs)


@dataclass(frozen=True)
class _Setup:
    """A checked call."""

    flow: FlowMap
    criterion: CriterionMap
    leaves: LeafSet
    settings: Torchdiffeq
    tolerances: Tolerances
    times: tuple[float, ...]
    x0: Tensor
    target: float
    stats: Stats
    censored: float | None
    thorough: bool

    def search(self, gradient: GradientRoute | None) -> Search:
        """The forward run."""
        if gradient is not None:
            check_start(self.flow, self.x0)
        return find_crossing(
            self.flow,
            self.criterion,
            self.x0,
            self.target,
            times=self.times,
            settings=self.settings,
            tolerances=self.tolerances,
            keep=gradient is not None and gradient.keeps_trajectory,
            stats=self.stats,
        )

    def solved(self, search: Search) -> StoppingProblem:
        """The problem as the routes see it, after a transversal crossing."""
        assert search.crossing is not None
        assert search.state_error is not None
        return StoppingProblem(
            flow=self.flow,
            criterion=self.criterion,
            leaves=self.leaves,
            layout=self.flow.layout,
            settings=self.settings,
            tolerances=self.tolerances,
            trajectory=search.trajectory,
            crossing=search.crossing,
            x0=self.x0,
            stats=self.stats,
            target=self.target,
            times=self.times,
            state_error=search.state_error,
            evidence=Evidence(
                rtol=self.tolerances.rtol,
                dtype=self.x0.dtype,
                rate=search.crossing.rate,
                rate_scale=search.crossing.rate_scale,
                near_miss=search.near_miss,
                velocity_error=search.velocity_error,
            ),
            thorough=self.thorough,
        )


def _attached(
    setup: _Setup,
    search: Search,
    gradient: GradientRoute | None,
    inputs: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, StoppingProblem | None]:
    """T and the state with their graph, and the problem where it was solved for a gradient."""
    flow, criterion, leaves, stats = setup.flow, setup.criterion, setup.leaves, setup.stats
    status, problem = search.status, None
    differentiated = gradient is not None and torch.is_grad_enabled()
    time, state = scalar(search.time, setup.x0), search.state
    if differentiated:
        trace_leaves(flow, criterion, leaves, search)
        if not isinstance(gradient, DirectAdjoint):
            refuse_lost_views(has_history=leaves.has_history)
    needed = differentiated and _needs_grad(inputs, leaves)
    if needed and status is Status.DEGENERATE:
        # A criterion without its derivative has J' = 0, too: that is no touch, but an error.
        check_criterion(criterion, leaves, search.time, search.state)
    if differentiated and status is Status.REACHED:
        assert gradient is not None
        assert search.crossing is not None
        warn_about_rounding(search.crossing, setup.times[0], setup.tolerances)
        warn_about_grazing(search.near_miss, setup.tolerances)
        problem = setup.solved(search)
        if needed:
            check_functions(problem)
            warn_about_clock(problem, gradient, t0_wanted=inputs[1].requires_grad)
    # Before the graph is attached: a route may evaluate the flow for it.
    stats.checks = flow.calls - stats.nfe_forward
    if problem is not None:
        assert gradient is not None
        time, state = attach_crossing(problem, gradient, inputs)
    elif status is Status.AT_START and differentiated:
        time, state = attach_constant(search, inputs, leaves)
    elif status not in (Status.REACHED, Status.AT_START, Status.DEGENERATE) or (
        status is Status.DEGENERATE and gradient is not None
    ):
        time, state = attach_miss(search, inputs, leaves, setup.censored)
    return time, state, problem


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
        near_miss=search.near_miss,
        evidence=None if problem is None else problem.evidence,
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


def _check_kinds(flow: object, criterion: object, solver: object, gradient: object) -> None:
    require_callable(flow, name="flow")
    require_callable(criterion, name="criterion")
    require_instance(solver, Torchdiffeq, name="solver", example='Torchdiffeq(method="dopri5")')
    require_instance(gradient, GradientRoute, name="gradient", example="InterpolatingAdjoint()")


def _refuse_unavailable(*, batched: bool) -> None:
    if batched:
        raise NotImplementedError(
            "batched=True is not available yet: call stopping_time once a sample"
        )


def _check_evidence(evidence: object) -> None:
    if evidence not in ("cheap", "thorough"):
        raise ValueError(f'evidence must be "cheap" or "thorough"; got {evidence!r}')


def _checked_horizon(max_time: float | None, start: float, like: Tensor) -> float:
    if max_time is None:
        return start + _DEFAULT_HORIZON
    horizon = float(checked_scalar(max_time, name="max_time", like=like).detach())
    if not horizon > start:
        raise ValueError(f"max_time must be later than t0 = {start:g}; got {horizon:g}")
    return horizon


def _checked_censoring(censored: float | str | None, horizon: float) -> float | None:
    if censored is None:
        return None
    if censored == "horizon":
        return horizon
    if isinstance(censored, str):
        raise ValueError(f'censored must be a number or "horizon"; got {censored!r}')
    if isinstance(censored, bool) or not isinstance(censored, int | float):
        raise TypeError(f'censored must be a number or "horizon"; got {described(censored)}')
    value = float(censored)
    if value != value:
        raise ValueError("censored must not be NaN")
    return value
