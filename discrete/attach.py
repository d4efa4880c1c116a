"""Where the index and x_N get their graph: one custom backward around an index definition and a route."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ode_stopping.status import GradientError

from .adjoint import IndexRoute
from .index import IndexDefinition, LastStep
from .problem import IndexProblem

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
    steps, state = _Index.apply(problem, definition, route, value, *inputs, *problem.leaves.tensors)
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
    """The index and x_N with a graph to fresh leaves (x_{N-1}, t0, target) and to the parameters."""
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
    @once_differentiable
    def backward(ctx: Any, on_steps: Tensor, on_state: Tensor) -> Any:
        x0, t0, target, *leaves = ctx.saved_tensors
        problem: IndexProblem = ctx.problem
        calls = problem.update.calls
        steps, state, (previous, start, goal) = _last_step(problem, ctx.definition)
        known = problem.leaves
        known.require_known(
            [steps, state], inputs=(previous, start, goal), where="in the last step"
        )
        grads = torch.autograd.grad(
            [steps, state],
            [previous, start, goal, *known.tensors],
            [on_steps, on_state],
            allow_unused=True,
            retain_graph=True,  # it may run through older nodes (a hyper-network's)
        )
        lam = torch.zeros_like(problem.previous) if grads[0] is None else grads[0]
        pulled = ctx.route.pull_back(problem, lam)
        problem.stats.nfe_backward = problem.update.calls - calls
        if pulled.start is None and ctx.needs_input_grad[4]:
            raise GradientError(
                "a truncated sum does not reach x0: use DiscreteAdjoint for its gradient, or detach x0"
            )
        by_t0 = pulled.start_time + (0 if grads[1] is None else grads[1])
        by_target = torch.zeros_like(goal) if grads[2] is None else grads[2]
        by_leaves = [
            total if gradient is None else total + gradient
            for total, gradient in zip(pulled.leaves, grads[3:], strict=True)
        ]
        return (
            None,
            None,
            None,
            None,
            None if pulled.start is None else pulled.start.reshape(x0.shape),
            by_t0.to(t0.dtype),
            by_target.to(target.dtype),
            *[g.to(p.dtype) for g, p in zip(by_leaves, leaves, strict=True)],
        )
