"""The index and x_N as functions of everything they depend on: one backward pass for all hits.

From the last hit to x0: lam arrives at x_N from the later hits, and receives there what the index
and the state of this hit were given. The step N-1 -> N is differentiated together with the
definition of the index, the steps before it by the route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ode_stopping.core.describe import scalar
from ode_stopping.core.guards import first_derivatives_only
from ode_stopping.core.stats import Costs, Stats
from ode_stopping.core.status import GradientError
from ode_stopping.core.validation import refuse_batched_cotangent

from .adjoint import IndexRoute
from .directional import warn_about_lost
from .index import LastStep
from .problem import IndexProblem

__all__ = ["Group", "attach_index", "evaluate_index"]


@dataclass(frozen=True)
class Group:
    """What there is at one hit.

    Attributes:
        part: The part of the run from the hit before.
        problems: One for each target that was met; empty at a step that is only asked for.
    """

    part: IndexProblem
    problems: tuple[IndexProblem, ...]


def attach_index(
    groups: Sequence[Group], values: Sequence[Sequence[float]], costs: Costs
) -> tuple[list[tuple[Tensor, ...]], list[Tensor]]:
    """The indices, each shape (), and x_N, shape (n,), of every hit, differentiable.

    To x0, t0, the targets and the leaves; x_N with N held fixed.

    Args:
        groups: The hits, in order of the steps.
        values: The indices as numbers.
        costs: Receives what a backward pass cost.
    """
    x0, *others = groups[0].part.run.call.inputs
    numbers = tuple(value for some in values for value in some)
    outputs = _Index.apply(tuple(groups), numbers, costs, _Reached.apply(x0), *others)
    steps, states = iter(outputs[: len(numbers)]), outputs[len(numbers) :]
    return [tuple(next(steps) for _ in group.problems) for group in groups], list(states)


def evaluate_index(problem: IndexProblem) -> float:
    """The index as a number: N or N*."""
    if problem.run.call.definition.whole:
        return float(problem.index)
    (steps,), _, _ = _last_step(Group(problem, (problem,)))
    return float(steps.detach())


def _last_step(group: Group) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The indices and x_N with a graph to the parameters and to fresh (x_{N-1}, t0, *targets)."""
    problem = group.part
    definition = problem.run.call.definition
    start = problem.clock.start.detach().clone().requires_grad_(True)
    targets = [
        torch.tensor(p.target, dtype=torch.float64, device=start.device, requires_grad=True)
        for p in group.problems
    ]
    previous = problem.previous.detach().clone().requires_grad_(True)
    time = problem.clock.traced(start)
    with torch.enable_grad():
        state = problem.update.step_traced(problem.index - 1, previous, time(problem.index - 1))
        problem.update.require_same(state.detach(), problem.state, problem.index)
        steps = [
            definition.build(LastStep(own, time, previous, state, target))
            for own, target in zip(group.problems, targets, strict=True)
        ]
    return steps, state, [previous, start, *targets]


class _Index(torch.autograd.Function):
    """(*indices, *states) of all hits as a function of (x0, t0, *targets, *leaves)."""

    @staticmethod
    def forward(
        ctx: Any,
        groups: tuple[Group, ...],
        values: tuple[float, ...],
        costs: Costs,
        *tensors: Tensor,
    ) -> Any:
        ctx.groups, ctx.costs = groups, costs
        # Saved so that autograd notices a parameter that was changed in place before backward.
        ctx.save_for_backward(*tensors)
        steps = (scalar(value, tensors[0]) for value in values)
        return (*steps, *(group.part.state.clone() for group in groups))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        refuse_batched_cotangent(cotangents[0])
        tensors, groups = ctx.saved_tensors, ctx.groups
        update = groups[0].part.update
        calls = update.calls
        with torch.no_grad():
            gradients, vjps, checks = _pulled_back(groups, cotangents)
        nfe = update.calls - calls - checks
        ctx.costs.note(Stats(nfe_backward=nfe, vjps=vjps, checks=checks))
        shaped = [
            None if gradient is None else gradient.to(p.dtype).reshape(p.shape)
            for gradient, p in zip(gradients, tensors, strict=True)
        ]
        guarded = first_derivatives_only(shaped, (*tensors, *cotangents), "stopping index")
        return (None, None, None, *guarded)


def _pulled_back(
    groups: Sequence[Group], cotangents: Sequence[Tensor]
) -> tuple[list[Tensor | None], int | None, int]:
    """Gradients to (x0, t0, *targets, *leaves), with how many steps and evaluations they took.

    The steps are those that were differentiated, the evaluations those that only look at them.
    None for x0 where the route does not reach it.
    """
    call = groups[0].part.run.call
    lam: Tensor | None = None
    by_start = torch.zeros_like(call.update.clock.start.detach())
    by_targets = [by_start.clone() for _ in call.targets]
    by_leaves = call.leaves.zeros()
    steps: int | None = 0
    checks = 0
    end = len(cotangents) - len(groups)
    for group, on_state in zip(reversed(groups), reversed(cotangents[end:]), strict=True):
        count = len(group.problems)
        on_steps, end = cotangents[end - count : end], end - count
        arrived = on_state if lam is None else on_state + lam
        # Later targets that are not differentiated cost nothing.
        if lam is None and not any(bool((c != 0).any()) for c in (*on_steps, arrived)):
            continue
        lam, t0, *others = _through_last_step(group, [*on_steps, arrived])
        for position, gradient in zip(group.part.hit.targets, others, strict=False):
            by_targets[position] += gradient
        assert isinstance(call.route, IndexRoute)
        pulled = call.route.pull_back(group.part, lam)
        if call.evidence == "standard" and bool((lam != 0).any()):
            calls = call.update.calls
            warn_about_lost(group.part, lam, pulled)
            checks += call.update.calls - calls
        lam = pulled.start
        by_start += t0 + pulled.start_time
        by_leaves = [
            a + b + c for a, b, c in zip(by_leaves, pulled.leaves, others[count:], strict=True)
        ]
        steps = None if steps is None or pulled.steps is None else steps + pulled.steps + 1
    on_x0 = torch.zeros_like(call.begin) if steps == 0 else lam
    return [on_x0, by_start, *by_targets, *by_leaves], steps, checks


def _through_last_step(group: Group, cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gradients to (x_{N-1}, t0, *targets of the group, *leaves)."""
    known = group.part.leaves
    steps, state, own = _last_step(group)
    known.require_known([*steps, state], inputs=own, where="in the last step")
    return torch.autograd.grad(
        [*steps, state],
        [*own, *known.tensors],
        cotangents,
        allow_unused=True,
        materialize_grads=True,
        retain_graph=True,  # it may run through older nodes (a hyper-network's)
    )


class _Reached(torch.autograd.Function):
    """x0, with an error where a gradient is asked of it that its route does not have.

    A function of its own, since autograd runs it only if the gradient to x0 is wanted.
    """

    @staticmethod
    def forward(ctx: Any, x0: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return x0.view_as(x0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            raise GradientError(
                "a truncated sum does not reach x0: use DiscreteAdjoint for its gradient, or "
                "detach x0"
            )
        return gradient
