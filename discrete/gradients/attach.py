"""Where the index and x_N get their graph: one backward around an index definition and a route."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ode_stopping.core.describe import scalar
from ode_stopping.core.guards import first_derivatives_only
from ode_stopping.core.status import GradientError
from ode_stopping.core.validation import refuse_batched_cotangent

from .adjoint import IndexRoute
from .index import IndexDefinition, LastStep
from .problem import IndexProblem

__all__ = ["Inputs", "attach_index", "evaluate_index"]

Inputs = tuple[Tensor, Tensor, Tensor]  # x0 (n,), t0 (), target ()


def attach_index(
    problems: Sequence[IndexProblem],
    definition: IndexDefinition,
    route: IndexRoute,
    values: Sequence[float],
    inputs: tuple[Tensor, Tensor],
    targets: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """The index, shape (), of every target met in one step, and x_N, shape (n,), differentiable.

    To x0, t0, the targets and the leaves; x_N with N held fixed, so that a run can go on from it.

    Args:
        problems: Alike but for the target.
        definition: Of the index.
        route: How to pull a cotangent on x_{N-1} back.
        values: The indices as numbers.
        inputs: x0, shape (n,), and t0, shape ().
        targets: eps, each shape ().
    """
    x0, t0 = inputs
    leaves = problems[0].leaves.tensors
    tensors = (_Reached.apply(x0), t0, *targets, *leaves)
    *steps, state = _Index.apply(tuple(problems), definition, route, tuple(values), *tensors)
    return steps, state


def evaluate_index(problem: IndexProblem, definition: IndexDefinition) -> float:
    """The index as a number: N or N*."""
    if definition.whole:
        return float(problem.index)
    (steps,), _, _ = _last_step([problem], definition)
    return float(steps.detach())


def _last_step(
    problems: Sequence[IndexProblem], definition: IndexDefinition
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The indices and x_N with a graph to the parameters and to fresh (x_{N-1}, t0, *targets)."""
    problem = problems[0]
    start = problem.clock.start.detach().clone().requires_grad_(True)
    targets = [
        torch.tensor(p.target, dtype=torch.float64, device=start.device, requires_grad=True)
        for p in problems
    ]
    previous = problem.previous.detach().clone().requires_grad_(True)
    time = problem.clock.traced(start)
    with torch.enable_grad():
        state = problem.update.step_traced(problem.index - 1, previous, time(problem.index - 1))
        problem.update.require_same(state.detach(), problem.state, problem.index)
        steps = [
            definition.build(LastStep(own, time, previous, state, target))
            for own, target in zip(problems, targets, strict=True)
        ]
    return steps, state, [previous, start, *targets]


class _Index(torch.autograd.Function):
    """(*steps, x_N) as a function of (x0, t0, *targets, *leaves)."""

    @staticmethod
    def forward(
        ctx: Any,
        problems: tuple[IndexProblem, ...],
        definition: IndexDefinition,
        route: IndexRoute,
        values: tuple[float, ...],
        *tensors: Tensor,
    ) -> Any:
        ctx.problems, ctx.definition, ctx.route = problems, definition, route
        # Saved so that autograd notices a parameter that was changed in place before backward.
        ctx.save_for_backward(*tensors)
        problem = problems[0]
        return (*(scalar(value, problem.x0) for value in values), problem.state.clone())

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        refuse_batched_cotangent(cotangents[0])
        tensors = ctx.saved_tensors
        if not any(bool((cotangent != 0).any()) for cotangent in cotangents):
            # An earlier target alone is differentiated.
            stats = ctx.problems[0].stats
            stats.vjps = stats.nfe_backward = 0
            return (None, None, None, None, *(torch.zeros_like(tensor) for tensor in tensors))
        with torch.no_grad():
            gradients = _gradients(ctx, tensors, cotangents)
        guarded = first_derivatives_only(gradients, (*tensors, *cotangents), "stopping index")
        return (None, None, None, None, *guarded)


def _gradients(
    ctx: Any, tensors: tuple[Tensor, ...], cotangents: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """Gradients to (x0, t0, *targets, *leaves); None for x0 where the route does not reach it."""
    problems: tuple[IndexProblem, ...] = ctx.problems
    problem, count = problems[0], len(problems)
    x0, t0, targets, leaves = tensors[0], tensors[1], tensors[2 : 2 + count], tensors[2 + count :]
    calls, known = problem.update.calls, problem.leaves
    steps, state, own = _last_step(problems, ctx.definition)
    known.require_known([*steps, state], inputs=own, where="in the last step")
    lam, by_start, *others = torch.autograd.grad(
        [*steps, state],
        [*own, *known.tensors],
        cotangents,
        allow_unused=True,
        materialize_grads=True,
        retain_graph=True,  # it may run through older nodes (a hyper-network's)
    )
    by_targets, direct = others[:count], others[count:]
    pulled = ctx.route.pull_back(problem, lam)
    problem.stats.nfe_backward = problem.update.calls - calls
    by_leaves = [a + b for a, b in zip(pulled.leaves, direct, strict=True)]
    return [
        None if pulled.start is None else pulled.start.reshape(x0.shape),
        (pulled.start_time + by_start).to(t0.dtype),
        *[g.to(p.dtype) for g, p in zip(by_targets, targets, strict=True)],
        *[g.to(p.dtype) for g, p in zip(by_leaves, leaves, strict=True)],
    ]


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
