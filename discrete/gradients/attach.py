"""From a run to indices and states with the graph that each outcome allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ode_stopping.core.describe import scalar
from ode_stopping.core.guards import CENSORED, MissedValue, ZeroWithGraph
from ode_stopping.core.stats import Costs, Stats
from ode_stopping.core.status import GradientError, StoppingWarning
from ode_stopping.core.validation import refuse_lost_views
from ode_stopping.core.warn import warn_user

from ..call import Call
from ..iterating.run import Run
from .backward import Group, attach_index, evaluate_index
from .problem import IndexProblem
from .smoothness import look_at_criterion
from .tracing import check_functions, trace_leaves

__all__ = ["Attached", "attach"]

Found: TypeAlias = list[tuple[Sequence[int], Sequence[Tensor], Tensor]]


@dataclass(frozen=True)
class Attached:
    """A run with the graph that it allows.

    Attributes:
        run: The forward run.
        steps: The index of every target, shape (), float64.
        states: x_N of every target, shape (n,).
        problems: The solved problem of every target; None where it was met at the start or missed.
        costs: What run and backward passes cost.
    """

    run: Run
    steps: list[Tensor]
    states: list[Tensor]
    problems: list[IndexProblem | None]
    costs: Costs


def attach(run: Run) -> Attached:
    """The index and the end state of every target, with the graph that the outcome allows."""
    call = run.call
    differentiated = run.store is not None and torch.is_grad_enabled()
    if differentiated:
        trace_leaves(run)
    groups = _groups(run)
    _warn_about_marks(call, groups)
    refusals: list[str] = [""] * len(groups)
    if differentiated:
        # A view that is named counts as an input; the leaf behind it may be older all the same.
        refuse_lost_views(has_history=call.leaves.has_history)
        if groups and _needs_grad(call):
            _check(call, groups)
            for number, group in enumerate(groups):
                refusals[number] = _looked_at(call, group[0])
    values = [[evaluate_index(problem) for problem in group] for group in groups]
    spent = call.update.calls - run.stats.nfe_forward
    costs = Costs(run.stats + Stats(checks=spent))
    count = len(call.targets)
    steps: list[Tensor] = [call.missed] * count
    states: list[Tensor] = [run.state] * count
    problems: list[IndexProblem | None] = [None] * count
    found = _differentiable(run, groups, values, costs) if differentiated else _plain(run, values)
    for positions, some_steps, state in found:
        for position, one in zip(positions, some_steps, strict=True):
            steps[position], states[position] = one, state
    for hit, group, refusal in zip(
        [hit for hit in run.hits if hit.index], groups, refusals, strict=True
    ):
        for position, problem in zip(hit.targets, group, strict=True):
            problems[position] = problem
            if refusal:
                _refuse(steps[position], refusal)
            if differentiated and not call.measures(problem.previous):
                _refuse(steps[position], _meaningless(problem))
    return Attached(run, steps, states, problems, costs)


def _plain(run: Run, values: Sequence[Sequence[float]]) -> Found:
    """Positions, indices and the state for each hit, without graph."""
    some = iter(values)
    return [
        (
            hit.targets,
            [scalar(v, hit.state) for v in (next(some) if hit.index else [0.0] * len(hit.targets))],
            hit.state,
        )
        for hit in run.hits
    ]


def _differentiable(
    run: Run, groups: Sequence[Group], values: Sequence[Sequence[float]], costs: Costs
) -> Found:
    """Positions, indices and the state, with graph, for each hit and for what was missed."""
    call, tensors = run.call, run.call.inputs
    found: Found = []
    if groups:
        steps, states = attach_index(groups, values, costs)
        hits = [hit for hit in run.hits if hit.index]
        found += [(hit.targets, own, x) for hit, own, x in zip(hits, steps, states, strict=True)]
    if run.hits and not run.hits[0].index:
        zero = ZeroWithGraph.apply(*tensors)
        targets = run.hits[0].targets
        found.append((targets, [zero] * len(targets), call.x0 + zero.to(call.x0.dtype)))
    missed = [k for k in range(len(call.targets)) if run.hit(k) is None]
    if missed and any(tensor.requires_grad for tensor in tensors):
        where = f"{run.status.name}: {run.status.value} {CENSORED}"
        if bool(torch.isfinite(call.missed)):
            counted, state = call.missed + ZeroWithGraph.apply(*tensors), run.state
        else:
            counted, state = MissedValue.apply(where, call.missed, run.state, *tensors)
        found.append((missed, [counted] * len(missed), state))
    return found


def _groups(run: Run) -> list[Group]:
    """The solved problems, hit by hit; a part of the run begins where the one before ended."""
    values = run.call.values
    hits = [hit for hit in run.hits if hit.index]
    return [
        tuple(IndexProblem(run, hit, values[position], since) for position in hit.targets)
        for hit, since in zip(hits, [None, *hits], strict=False)
    ]


def _needs_grad(call: Call) -> bool:
    # An evaluation without a graph hides its leaves: then nobody knows what is needed.
    return call.leaves.has_gap or any(tensor.requires_grad for tensor in call.inputs)


def _check(call: Call, groups: Sequence[Group]) -> None:
    """Compare derivatives with differences on the way to the first target, and to the last."""
    moved = call.t0.requires_grad or isinstance(call.update.clock.step, Tensor)
    for group in dict.fromkeys((0, len(groups) - 1)):
        check_functions(groups[group][0], clock_matters=moved or call.definition.needs_flow)


def _warn_about_marks(call: Call, groups: Sequence[Group]) -> None:
    """Warn where a fraction of the last step is asked for and J_{N-1} is no measurement."""
    for problem, *_ in groups:
        if call.definition.whole or call.measures(problem.previous):
            continue
        warn_user(
            f"step {problem.index - 1} has no value of the criterion to interpolate from (it is "
            "the start, or f went up there): the fraction of the index says nothing. Use "
            "interpolation=None",
            StoppingWarning,
        )


def _looked_at(call: Call, problem: IndexProblem) -> str:
    """Warn where J leaves the derivative in doubt; why there is none, where there is none."""
    if not call.measures(problem.previous):
        return ""  # J_{N-1} is a mark, which is refused by itself
    seen = look_at_criterion(problem)
    seen.warn(problem.index)
    return seen.refusal


def _meaningless(problem: IndexProblem) -> str:
    """Where J_{N-1} is a mark and no measurement, the quotient over the last step says nothing."""
    n = problem.index
    return (
        f"the criterion has no value at step {n - 1} (J = {problem.previous_loss:g} there is a "
        f"mark, as at the start and after an increase), so J_N - J_(N-1) at N = {n} is no "
        "difference quotient: the index has no derivative here. Choose a smaller target, a "
        "smaller step, or gradient=None"
    )


def _refuse(steps: Tensor, message: str) -> None:
    """Let a non-zero cotangent on the index raise."""

    def refuse(cotangent: Tensor | None) -> None:
        if cotangent is not None and bool(cotangent != 0):
            raise GradientError(message)

    if steps.requires_grad:
        steps.register_hook(refuse)
