"""From a batched run to indices and states with the graph that each sample's outcome allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ode_stopping.core.guards import CENSORED, first_derivatives_only
from ode_stopping.core.stats import Costs, Stats
from ode_stopping.core.status import GradientError, NotReachedError, Status, StoppingWarning
from ode_stopping.core.validation import refuse_batched_cotangent, refuse_lost_views
from ode_stopping.core.warn import warn_user

from ..call import BatchCall
from ..iterating.batch import BatchRun
from ..rules.step_decrease import StepDecrease
from .batch_checks import check_functions_of_batch, trace_leaves_of_batch
from .batch_index import Injections, LinearIndex, accurate_decreases, linear_index
from .batch_smoothness import look_at_criteria
from .batch_sweep import pulled_batch
from .smoothness import Smoothness

__all__ = ["AttachedBatch", "attach_batch"]


@dataclass(frozen=True)
class AttachedBatch:
    """A run with the graph that it allows.

    Attributes:
        run: The forward run.
        steps: The indices, shape (B, K), float64.
        states: x_N, shape (B, K, n).
        states_at: x_k for every k of `at`, shape (A, B, n); NaN beyond the end.
        costs: What run and backward passes cost.
    """

    run: BatchRun
    steps: Tensor
    states: Tensor
    states_at: Tensor
    costs: Costs


@dataclass(frozen=True)
class _Refusal:
    """Indices without a derivative, and why.

    Attributes:
        mask: Which, shape (B, K).
        error: What a non-zero cotangent raises.
        reason: The sentence.
        states: Whether it is raised for the state as well.
    """

    mask: Tensor
    error: type[RuntimeError]
    reason: str
    states: bool = False


@dataclass(frozen=True)
class _Solved:
    """A run that is to be differentiated."""

    run: BatchRun
    linear: LinearIndex
    refusals: list[_Refusal]


def attach_batch(run: BatchRun) -> AttachedBatch:
    """The indices and the end states, with the graph that the outcome of each sample allows."""
    call, samples = run.call, run.samples
    differentiated = run.store is not None and torch.is_grad_enabled()
    refusals: list[_Refusal] = []
    asked = any(call.at) and bool(run.at_known.any())
    solved = asked or bool((samples.index > 0).any())
    marks = _marks(call, samples.previous) & (samples.index > 0)
    if bool(marks.any()) and not call.definition.whole:
        sample = int(marks.any(dim=1).nonzero()[0])
        warn_user(
            f"sample {sample} has no value of the criterion to interpolate from before its last "
            "step (it is the start, or f went up there): the fraction of its index says nothing. "
            "Use interpolation=None",
            StoppingWarning,
        )
    decreases = samples.decrease
    if differentiated:
        trace_leaves_of_batch(run)
        refuse_lost_views(has_history=call.leaves.has_history)
        needed = call.leaves.has_gap or any(tensor.requires_grad for tensor in call.inputs)
        if solved and needed:
            check_functions_of_batch(run)
            refused = look_at_criteria(run, (samples.index > 0) & ~marks)
            refusals.append(_Refusal(refused, GradientError, Smoothness(True, True).refusal))
            decreases = accurate_decreases(run)
    linear = linear_index(run, decreases)
    spent = call.update.calls - run.stats.nfe_forward
    costs = Costs(run.stats + Stats(checks=spent))
    steps = torch.where(samples.met, linear.value, float(call.missed))
    if not (differentiated and any(tensor.requires_grad for tensor in call.inputs)):
        return AttachedBatch(run, steps, samples.state, run.states_at, costs)
    refusals += _refusals(call, run, linear, marks)
    steps, states, states_at = _BatchIndex.apply(
        _Solved(run, linear, refusals), steps, costs, call.x0, call.t0, *call.inputs[2:]
    )
    return AttachedBatch(run, steps, states, states_at, costs)


def _marks(call: BatchCall, states: Tensor) -> Tensor:
    """Where J at states of shape (B, K, n) is a mark and no measurement, shape (B, K)."""
    criterion = call.criterion.function
    if not isinstance(criterion, StepDecrease):
        return torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
    return ~criterion.measured(call.layout.unpack(states))


def _refusals(call: BatchCall, run: BatchRun, linear: LinearIndex, marks: Tensor) -> list[_Refusal]:
    samples, found = run.samples, []
    if not isfinite(float(call.missed)):
        for status in (Status.NOT_REACHED, Status.DIVERGED):
            mask = ~samples.met & samples.is_status(status)[:, None]
            reason = (
                "a gradient was asked of a value that the run did not come to. "
                f"{status.name}: {status.value} {CENSORED}"
            )
            found.append(_Refusal(mask, NotReachedError, reason, states=True))
    slope = (
        "the criterion does not change along the last step where it meets the target (its slope is "
        "exactly zero), so the index has no derivative there: a criterion that is piecewise "
        "constant, or a flat piece of it. Use a smooth criterion, or another target"
    )
    mark = (
        "the criterion has no value one step before (J there is a mark, as at the start and after "
        "an increase), so J_N - J_(N-1) is no difference quotient: the index has no derivative "
        "here. Choose a smaller target, a smaller step, or gradient=None"
    )
    found.append(_Refusal(marks, GradientError, mark))
    found.append(_Refusal(linear.flat, GradientError, slope))
    return found


class _BatchIndex(torch.autograd.Function):
    """(indices, states, states at given steps) as a function of (x0, t0, targets, *leaves)."""

    @staticmethod
    def forward(ctx: Any, solved: _Solved, steps: Tensor, costs: Costs, *tensors: Tensor) -> Any:
        ctx.solved, ctx.costs = solved, costs
        # Saved so that autograd notices a parameter that was changed in place before backward.
        ctx.save_for_backward(*tensors)
        run = solved.run
        return steps.clone(), run.samples.state.clone(), run.states_at.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        refuse_batched_cotangent(cotangents[0])
        tensors, solved = ctx.saved_tensors, ctx.solved
        update = solved.run.call.update
        calls = update.calls
        with torch.no_grad():
            gradients, vjps, checks = _pulled_back(solved, *cotangents)
        nfe = update.calls - calls - checks
        ctx.costs.note(Stats(nfe_backward=nfe, vjps=vjps, checks=checks))
        shaped = [
            gradient.to(p.dtype).reshape(p.shape)
            for gradient, p in zip(gradients, tensors, strict=True)
        ]
        guarded = first_derivatives_only(shaped, (*tensors, *cotangents), "stopping index")
        return (None, None, None, *guarded)


def _pulled_back(
    solved: _Solved, on_steps: Tensor, on_states: Tensor, on_at: Tensor
) -> tuple[Sequence[Tensor], int, int]:
    """Gradients to (x0, t0, targets, *leaves), with steps and evaluations that only look."""
    run, linear, samples = solved.run, solved.linear, solved.run.samples
    moved = (on_states != 0).any(dim=2)
    for refusal in solved.refusals:
        asked = (on_steps != 0) | moved if refusal.states else on_steps != 0
        wrong = refusal.mask & asked
        if bool(wrong.any()):
            some = wrong.any(dim=1).nonzero()[:, 0].tolist()
            raise refusal.error(f"{_named(some)}: {refusal.reason}")
    beyond = (on_at != 0).any(dim=2) & ~run.at_known
    if bool(beyond.any()):
        place, sample = beyond.nonzero()[0].tolist()
        raise NotReachedError(
            "a gradient was asked of a value that the run did not come to. "
            f"x_{run.call.at[place]} was asked for (at), and the run of sample {sample} ended at "
            f"step {int(samples.ended[sample])}: ask for steps up to there, or select the rows "
            "that are finite."
        )
    on_values = [(weight * on_steps) for weight in linear.weights]
    asked_steps = torch.tensor(run.call.at, dtype=torch.long, device=on_at.device)
    injections = Injections(
        (torch.cat(linear.steps, dim=1), torch.cat(on_values, dim=1)),
        (
            torch.cat([samples.index, asked_steps.expand(len(on_steps), -1)], dim=1),
            torch.cat([on_states.where(samples.met[:, :, None], 0.0), on_at.movedim(0, 1)], dim=1),
        ),
    )
    pulled = pulled_batch(run, injections)
    on_targets = linear.by_target * on_steps
    gradients = [pulled.start, pulled.start_time, on_targets, *pulled.leaves]
    return gradients, pulled.steps, pulled.checks


def _named(samples: Sequence[int]) -> str:
    """Some samples, by their numbers."""
    shown = ", ".join(str(sample) for sample in samples[:5])
    more = f" and {len(samples) - 5} others" if len(samples) > 5 else ""
    return f"sample{'s' if len(samples) > 1 else ''} {shown}{more}"
