"""`stopping_index`: the entry point of the discrete side, twin of `ode_stopping.stopping_time`."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ode_stopping.core.describe import scalar
from ode_stopping.core.functions import CriterionMap
from ode_stopping.core.leaves import LeafSet
from ode_stopping.core.states import State, StateLayout
from ode_stopping.core.validation import (
    Direction,
    checked_direction,
    checked_scalar,
    checked_state,
    checked_targets,
    described,
    leaving_inference_mode,
    refuse_transforms,
    require_callable,
    require_count,
    require_flag,
    require_instance,
)
from ode_stopping.flows import Flow

from .batch import Asked, batched_index, checked_batch, checked_levels
from .call import Call
from .gradients.adjoint import DiscreteAdjoint, IndexRoute
from .gradients.attach import attach
from .gradients.index import INTERPOLATIONS, IndexDefinition
from .iterating.run import find_index
from .result import StoppingIndexResult, finished
from .rules.maps import Clock, UpdateMap
from .rules.step_decrease import AugmentedRule, StepDecrease
from .rules.updates import UpdateRule

__all__ = ["Interpolation", "stopping_index"]

Interpolation = Literal["log", "hermite", "partial_step"]


@leaving_inference_mode
def stopping_index(
    update: Callable[..., Any],
    x0: State,
    criterion: Callable[..., Any],
    target: float | Tensor,
    *,
    t0: float | Tensor = 0.0,
    direction: Direction = "falling",
    leave_first: bool = False,
    max_steps: int = 1_000_000,
    gradient: IndexRoute | None = DiscreteAdjoint(),  # noqa: B008 - immutable
    interpolation: Interpolation | None = None,
    params: Iterable[Tensor] | None = None,
    censored: float | Literal["horizon"] | None = None,
    batched: bool = False,
    per_sample: Iterable[Tensor] | None = None,
    throw: bool = True,
    evidence: Literal["light", "standard"] = "standard",
    at: Iterable[int] | Tensor = (),
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
        target: eps; or several, shape (K,): then `.index`, `.steps`, `.time`, `.reached` and
            `.decrease` have shape (K,), the states a first axis of K, and `.status` is a list, all
            in the order of the targets, from one run and with one backward pass.
        t0: Start time, in flow time.
        direction: "rising": N = min{ k : J >= target }, as if J and target had the other sign; one
            for all targets. `.decrease` (then positive), `.best` (the largest J) and `.trajectory`
            stay in the sign of J. AnyOf and AllOf change places (see there).
        leave_first: J has to be on the other side of the target first (above it for "falling"), by
            more than its rounding, and N is the first step after that which meets the target: for
            restarts at x_N, and for "falls below again". Judged target by target; nothing is
            AT_START.
        max_steps: Limit on the number of steps. A run that has come to rest above the target ends
            before, as NOT_REACHED: the state has not changed beyond rounding for 1024 steps, and
            update and criterion, tried at later steps, leave it there.
        gradient: Route of the derivatives; None: the index only, and no states are kept.
        interpolation: None: Definition 3, `.steps` has the value N. "log", "hermite",
            "partial_step": a fractional index N* with its exact gradient; the last two need an
            `UpdateRule`.
        params: Tensors to differentiate to that cannot be found from a traced evaluation.
        censored: What a miss counts as: a number of steps, or "horizon" (max_steps). None:
            infinity, which raises if a non-zero cotangent reaches it.
        batched: dim 0 of every piece of x0 is a batch of B independent problems, solved in one run.
            `update` and `criterion` work on states of shape (B, ...), the criterion gives (B,); one
            that lets a sample depend on another is refused. Each sample has its own N, status and
            derivatives, and is frozen where its run is over (its last target met, diverged, at the
            limit), whatever the others do. All results have a first axis of B. `target`: () for
            all, (B,) one a sample, (1, K) or (B, K) for K targets of each, with results (B, K). One
            backward pass for all, by `DiscreteAdjoint`; "hermite" and "partial_step" are refused,
            and so are the other routes. t0, max_steps, `at` and `censored` are those of all.
        per_sample: Of a batch, every tensor with one row a sample that update and criterion use, as
            they use it (the data, a parameter for each problem); () where there is none. Then
            samples leave the computation once a quarter of those in it is over: the functions see
            the rows that are left, of x and of these tensors. None: not declared, and all B rows
            are always computed.
        throw: Raise for DIVERGED instead of returning the status; of a batch after all samples are
            solved.
        evidence: "standard": every backward pass is held against one difference along everything
            that x_N depends on, which sees a derivative that is lost in some steps only; it costs
            the run twice. "light": without it, for inner loops; update and criterion are looked at
            at the first and the last step, as always.
        at: Steps k at which the state is asked for: `.states_at` has x_k, in this order, with its
            derivatives to all but the targets (k is a number that nothing moves), from the same run
            and the same backward pass. Beyond the end it is NaN, and raises where it is
            differentiated; a run that has come to rest goes on to the last of them. Not with
            `Truncated`.

    Of `integrate`'s other events some have no meaning here: a k that is learned (a whole number has
    no derivative; of a time tau = k h that is learned, ask `integrate`), and resets between two
    steps. A reset at a step belongs to the update, which knows k.

    Raises:
        TypeError, ValueError: Bad input, naming the argument; coupled samples of a batch, or
            tensors with one row a sample that `per_sample` leaves out.
        StoppingError: The run diverged, and `throw` is True.
        GradientError: The update or the criterion lose part of their derivatives, or are not
            reproducible; or, in the backward pass, the criterion is piecewise constant.
        NotImplementedError: What a batch does not have.

    Warns:
        GradientAccuracyWarning: A derivative is lost or wrong in some of the steps; naming tensors.
        KinkWarning: The criterion has a kink at x_N: the derivative is one-sided.
        StoppingWarning: The criterion jumps in the last step, or is flat at x_N; or J is within its
            rounding of the target at the start and moves away from it (the warning names
            `leave_first=True`).
    """
    # First, since a transformed tensor cannot be looked into.
    refuse_transforms(x0, target, t0)
    state = checked_state(x0, half=True)
    _checked_objects(update, criterion, gradient)
    require_flag(throw, name="throw")
    if evidence not in ("light", "standard"):
        raise ValueError(f'evidence must be "light" or "standard"; got {evidence!r}')
    rises = checked_direction(direction)
    require_flag(leave_first, name="leave_first")
    require_flag(batched, name="batched")
    if per_sample is not None and not batched:
        raise ValueError("per_sample is of a batch: it needs batched=True")
    like = state[0] if isinstance(state, tuple) else state
    start = checked_scalar(t0, name="t0", like=like)
    if batched:
        levels = checked_levels(target, like=like, count=checked_batch(state), criterion=criterion)
        targets, several = [levels], isinstance(target, Tensor) and target.ndim == 2
    else:
        targets = checked_targets(target, like=like, criterion=criterion)
        several = isinstance(target, Tensor) and target.ndim == 1
    values = [value for one in targets for value in one.detach().reshape(-1).tolist()]
    if isinstance(criterion, StepDecrease):
        criterion.check_direction(rises=rises)
        for value in dict.fromkeys(values):
            criterion.check_target(value)
    definition = _checked_definition(interpolation, update, min(values))
    limit = _checked_limits(max_steps, censored)
    options: dict[str, Any] = {
        "leaves": LeafSet.collect(update, criterion, params=params),
        "definition": definition,
        "missed": scalar(float("inf") if limit is None else limit, like),
        "max_steps": max_steps,
        "route": gradient,
        "throw": throw,
        "evidence": evidence,
        "leave_first": leave_first,
        "at": _checked_steps(at),
    }
    if batched:
        asked = Asked(state, several, rises, per_sample, options)
        return batched_index(update, criterion, start, levels, asked)
    layout = StateLayout.of(state)
    packed = layout.pack(state)
    # A copy: an update that changes its argument in place is refused, but not before it did so.
    begin = packed.detach().clone()
    measured = CriterionMap(criterion, layout, begin, rises=rises)
    call = Call(
        update=UpdateMap(update, layout, begin, Clock.of(update, start.to(torch.float64))),
        criterion=measured,
        x0=packed,
        begin=begin,
        t0=start,
        targets=tuple(measured.oriented(one) for one in targets),
        several=several,
        **options,
    )
    if gradient is None:
        return finished(attach(find_index(call, None)))
    graphs = gradient.graph_memory if torch.is_grad_enabled() else 0
    store = gradient.store(len(targets) + len(set(call.at)))
    return finished(attach(find_index(call, store, graphs=graphs)))


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


def _checked_steps(at: object) -> tuple[int, ...]:
    """The steps of `at` as numbers.

    Raises:
        TypeError, ValueError: Not whole numbers; negative.
    """
    if isinstance(at, Tensor):
        if at.is_floating_point() or at.is_complex() or at.dtype == torch.bool:
            raise TypeError(
                f"at must hold steps, which are whole numbers; got a tensor of {at.dtype}. A step "
                "has no derivative: times that are learned are `at` of ode_stopping.integrate"
            )
        if at.ndim != 1:
            raise ValueError(
                f"at must be a list of steps or a 1-d tensor; got shape {tuple(at.shape)}"
            )
        at = at.tolist()
    if isinstance(at, str) or not isinstance(at, Iterable):
        raise TypeError(f"at must be a list of steps; got {described(at)}")
    return tuple(_checked_step(k, f"at[{place}]") for place, k in enumerate(at))


def _checked_step(k: object, name: str) -> int:
    """One step as a number; integers of NumPy's and 0-d tensors of integers are some as well."""
    try:
        if isinstance(k, bool) or (isinstance(k, Tensor) and k.ndim):
            raise TypeError
        number = operator.index(k)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, a step; got {described(k)}") from None
    if number < 0:
        raise ValueError(f"{name} must not be negative; got {number}")
    return number


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
