"""Where the index and x_N get their graph: one backward around an index definition and a route."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ode_stopping.attach import first_derivatives_only
from ode_stopping.status import GradientError
from ode_stopping.validation import refuse_batched_cotangent

from .adjoint import IndexRoute
from .index import IndexDefinition, LastStep
from .solved import IndexProblem

__all__ = ["Inputs", "attach_index", "evaluate_index"]

Inputs = tuple[Tensor, Tensor, Tensor]  # x0 (n,), t0 (), target ()


def attach_index(
    problem: IndexProblem,
    definition: IndexDefinition,
    route: IndexRoute,
    value: float,
    inputs: Inputs,
) -> tuple[Tensor, Tensor]:
    """The index, shape (), and x_N, shape (n,), differentiable to the inputs and the leaves."""
    x0, t0, target = inputs
    tensors = (_Reached.apply(x0), t0, target, *problem.leaves.tensors)
    steps, state = _Index.apply(problem, definition, route, value, *tensors)
    return steps, state


def evaluate_index(problem: IndexProblem, definition: IndexDefinition) -> float:
    """The index as a number: N or N*."""
    if definition.whole:
        return float(problem.index)
    steps, _, _ = _last_step(problem, definition)
    return float(steps.detach())


def _last_step(
    problem: IndexProblem, definition: IndexDefinition
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The index and x_N with a graph to the parameters and to fresh (x_{N-1}, t0, target)."""
    start = problem.clock.start.detach().clone().requires_grad_(True)
    target = torch.tensor(
        problem.target, dtype=torch.float64, device=start.device, requires_grad=True
    )
    previous = problem.previous.detach().clone().requires_grad_(True)
    time = problem.clock.traced(start)
    with torch.enable_grad():
        state = problem.update.step_traced(problem.index - 1, previous, time(problem.index - 1))
        problem.update.require_same(state.detach(), problem.state, problem.index)
        steps = definition.build(LastStep(problem, time, previous, state, target))
    return steps, state, (previous, start, target)


class _Index(torch.autograd.Function):
    """(steps, x_N) as a function of (x0, t0, target, *leaves)."""

    @staticmethod
    def forward(
        ctx: Any,
        problem: IndexProblem,
        definition: IndexDefinition,
        route: IndexRoute,
        value: float,
        *tensors: Tensor,
    ) -> Any:
        ctx.problem, ctx.definition, ctx.route = problem, definition, route
        # Saved so that autograd notices a parameter that was changed in place before backward.
        ctx.save_for_backward(*tensors)
        steps = torch.tensor(value, dtype=torch.float64, device=problem.x0.device)
        return steps, problem.state.clone()

    @staticmethod
    def backward(ctx: Any, on_steps: Tensor, on_state: Tensor) -> Any:
        refuse_batched_cotangent(on_steps)
        tensors = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(ctx, tensors, on_steps, on_state)
        dependencies = (*tensors, on_steps, on_state)
        guarded = first_derivatives_only(gradients, dependencies, "stopping index")
        return (None, None, None, None, *guarded)


def _gradients(
    ctx: Any, tensors: tuple[Tensor, ...], on_steps: Tensor, on_state: Tensor
) -> list[Tensor | None]:
    """Gradients to (x0, t0, target, *leaves); None for x0 where the route does not reach it."""
    x0, t0, target, *leaves = tensors
    problem: IndexProblem = ctx.problem
    calls, known = problem.update.calls, problem.leaves
    steps, state, own = _last_step(problem, ctx.definition)
    known.require_known([steps, state], inputs=own, where="in the last step")
    lam, by_start, by_target, *direct = torch.autograd.grad(
        [steps, state],
        [*own, *known.tensors],
        [on_steps, on_state],
        allow_unused=True,
        materialize_grads=True,
        retain_graph=True,  # it may run through older nodes (a hyper-network's)
    )
    pulled = ctx.route.pull_back(problem, lam)
    problem.stats.nfe_backward = problem.update.calls - calls
    by_leaves = [a + b for a, b in zip(pulled.leaves, direct, strict=True)]
    return [
        None if pulled.start is None else pulled.start.reshape(x0.shape),
        (pulled.start_time + by_start).to(t0.dtype),
        by_target.to(target.dtype),
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
