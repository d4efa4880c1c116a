"""`stopping_time`: the entry point of the continuous side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor

from .call import Call, Watch
from .core.functions import CriterionMap
from .core.leaves import LeafSet
from .core.states import State, StateLayout
from .core.validation import (
    Direction,
    checked_direction,
    checked_evidence,
    checked_horizon,
    checked_scalar,
    checked_state,
    checked_targets,
    described,
    leaving_inference_mode,
    refuse_batches,
    refuse_transforms,
    require_callable,
    require_flag,
    require_instance,
)
from .crossing.run import find_crossings
from .gradients import GradientRoute, StepAdjoint
from .gradients.attach import Inputs, attached
from .gradients.tracing import check_start
from .result import StoppingResult, require_success, result_of
from .solving.breakpoints import as_list, learned_times, smooth_pieces
from .solving.flow_map import FlowMap
from .solving.solver import Solver
from .solving.torchdiffeq import Torchdiffeq

__all__ = ["stopping_time"]


@leaving_inference_mode
def stopping_time(
    flow: Callable[..., Any],
    x0: State,
    criterion: Callable[..., Any],
    target: float | Tensor,
    *,
    t0: float | Tensor = 0.0,
    direction: Direction = "falling",
    leave_first: bool = False,
    max_time: float | None = None,
    solver: Solver | None = None,
    gradient: GradientRoute | None = StepAdjoint(),  # noqa: B008 - immutable
    params: Iterable[Tensor] | None = None,
    breakpoints: Iterable[float | Tensor] | None = None,
    censored: float | Literal["horizon"] | None = None,
    batched: bool = False,
    throw: bool = True,
    evidence: Literal["light", "standard", "thorough", "cheap"] = "standard",
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
        target: eps; or several, shape (K,): then `.time`, `.rate`, `.reached` have shape (K,), the
            states a first axis of K, and `.status` and `.evidence` are lists, all in the order of
            the targets, from one solve and with one backward pass.
        t0: Start time, in flow time.
        direction: "rising": T = inf{ t >= t0 : J >= target }, as if J and target had the other
            sign; one for all targets. `.rate`, `.best` (then the largest J) and `.trajectory` stay
            in the sign of J. AnyOf and AllOf change places (see there).
        leave_first: J has to be on the other side of the target first (above it for "falling"), by
            more than its rounding, and T is the first crossing after that: for restarts at x_T, and
            for "falls below again". Judged target by target; nothing is AT_START. (Where J starts
            on the target and goes on through it, T jumps to t0 under a change of x0 or target that
            lifts J off it, as after a detached x_T; its derivatives are those of the next
            crossing.)
        max_time: Absolute horizon, in flow time; None: t0 + 1e6.
        solver: Adaptive method with its tolerances: `Torchdiffeq(...)`, or a `Solver` of one's own;
            None: `Torchdiffeq()`.
        gradient: Route of the derivatives: `StepAdjoint()`, the exact transpose of the accepted
            steps; `InterpolatingAdjoint()`, the continuous adjoint; another, or one of one's own.
            None: the time only, and no states are kept.
        params: Tensors to differentiate to that cannot be found from a traced evaluation; non-leaf
            tensors named here receive their gradient themselves instead of through their history.
        breakpoints: Times at which the flow jumps, in flow time: numbers, 0-d tensors, or one
            tensor of shape (B,). Steps end there, forward and backward; each side sees its own
            limit of the flow. T is differentiated to those that require grad (switching times):
            dL/db = lam(b)^T (F(b-) - F(b+)), besides what the flow itself does with b. Outside of
            (t0, T) the derivative is zero.
        censored: What a miss counts as: a time, or "horizon". None: infinity, which raises if a
            non-zero cotangent reaches it.
        batched: Many independent problems on one clock (not available yet).
        throw: Raise for DEGENERATE, DIVERGED and STALLED instead of returning the status.
        evidence: Every backward pass leaves estimates of its error on `result.evidence`, and warns
            (`GradientAccuracyWarning`) where they exceed 50 rtol. "standard": the error of every
            leaf, from the gradient on half as many steps; where that does not settle it, on twice
            as many, whose gradient is returned; besides, one difference of T along all leaves,
            which sees derivatives that are lost on the path, and jumps of the flow in the state.
            "light": from what the solves know, for two evaluations of flow and criterion; for inner
            loops. "thorough": steps are halved until two gradients in a row agree. ("cheap" is the
            former name of "light".)

    Raises:
        TypeError, ValueError: Bad input, naming the argument.
        StoppingError: The run ended DEGENERATE, DIVERGED or STALLED, and `throw` is True.
        GradientError: Flow or criterion lose part of their derivatives, or are not reproducible.
        NotImplementedError: `batched`.

    Warns:
        GradientAccuracyWarning: J nearly reached the target before T (a grazing crossing); or, in
            the backward pass, the estimated error of the gradient exceeds the promise.
        StoppingWarning: The dtype cannot hold the tolerance on T; or J is within its rounding of
            the target at the start and moves away from it (the warning names `leave_first=True`).

    Valid when: the flow is smooth between t0 and T but for its `breakpoints`, and the crossing is
    transversal (tested).
    """
    refuse_batches(batched=batched)
    level = checked_evidence(evidence)
    refuse_transforms(x0, target, t0)
    _check_kinds(flow, criterion, solver, gradient)
    require_flag(throw, name="throw")
    rises = checked_direction(direction)
    require_flag(leave_first, name="leave_first")
    state = checked_state(x0)
    layout = StateLayout.of(state)
    packed = layout.pack(state)
    start_time = checked_scalar(t0, name="t0", like=packed)
    targets = checked_targets(target, like=packed, criterion=criterion)
    start = float(start_time.detach())
    horizon = checked_horizon(max_time, start, packed)
    limit = _checked_censoring(censored, horizon)
    chosen = solver if solver is not None else Torchdiffeq()
    tolerances = chosen.tolerances(packed.dtype)
    x_start = packed.detach().clone()  # an optimiser may move x0 before the backward pass
    given = as_list(breakpoints)
    learned = learned_times(given)
    times, jumps_at_start = smooth_pieces(start, horizon, given, x_start)
    measured = CriterionMap(criterion, layout, x_start, rises=rises)
    targets = [measured.oriented(one) for one in targets]
    several = isinstance(target, Tensor) and target.ndim == 1
    call = Call(
        flow=FlowMap(flow, layout, x_start, times=times, jumps_at_start=jumps_at_start),
        leaves=LeafSet.collect(flow, criterion, params=params),
        solver=chosen,
        method=chosen.method(packed.dtype),
        tolerances=tolerances,
        times=times,
        x0=x_start,
        watches=tuple(
            Watch(
                index,
                measured,
                float(one.detach()),
                name=f"target[{index}]" if several else "target",
            )
            for index, one in enumerate(targets)
        ),
        learned=tuple(float(one.detach()) for one in learned),
        gradient=gradient,
        censored=limit,
        evidence=level,
        leave_first=leave_first,
    )
    if gradient is not None:
        check_start(call)
    run = find_crossings(call)
    found = attached(run, Inputs(packed, start_time, tuple(targets), learned))
    result = result_of(run, found, several=several)
    if throw:
        require_success(run, result)
    return result


def _check_kinds(flow: object, criterion: object, solver: object, gradient: object) -> None:
    require_callable(flow, name="flow")
    require_callable(criterion, name="criterion")
    require_instance(solver, Solver, name="solver", example='Torchdiffeq(method="dopri5")')
    require_instance(gradient, GradientRoute, name="gradient", example="StepAdjoint()")


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
