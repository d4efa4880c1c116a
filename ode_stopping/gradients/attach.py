"""Where T and x_T get their graph: one custom backward around the implicit quotient and a route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.describe import scalar
from ..core.guards import MissedValue, ZeroWithGraph, first_derivatives_only
from ..core.leaves import LeafSet
from ..core.validation import refuse_batched_cotangent
from ..crossing.run import Search
from . import GradientRoute
from .direct import DirectAdjoint
from .judge import Cotangents, differentiate, judge
from .problem import StoppingProblem

__all__ = ["attach_constant", "attach_crossing", "attach_miss"]

Inputs = tuple[Tensor, Tensor, Tensor]  # x0 (n,), t0 (), target ()


def attach_crossing(
    problem: StoppingProblem, route: GradientRoute, inputs: Inputs
) -> tuple[Tensor, Tensor, Tensor]:
    """T, shape (), x_T and x at the fixed time T, shape (n,), differentiable.

    To the inputs and to the problem's leaves. The last is for a run that goes on from there: the
    derivative of x_T has the moving T in it, which is not its start.
    """
    if isinstance(route, DirectAdjoint):
        x0, t0, target = inputs
        time, state, fixed = route.graph(problem, x0, t0, target)
        hook = _judged_once(problem, route)
        for output in (time, state):
            if output.requires_grad:
                output.register_hook(hook)
        return time, state, fixed
    time, state, fixed = _Crossing.apply(problem, route, *inputs, *problem.leaves.tensors)
    return time, state, fixed


def attach_constant(search: Search, inputs: Inputs, leaves: LeafSet) -> tuple[Tensor, Tensor]:
    """AT_START: T = t0 and x_T = x0, with zero gradients to everything else."""
    x0, t0, target = inputs
    zero = ZeroWithGraph.apply(target, *leaves.tensors)
    return t0.to(torch.float64) + zero, x0 + zero.to(x0.dtype)


def attach_miss(
    search: Search, inputs: Inputs, leaves: LeafSet, censored: float | None
) -> tuple[Tensor, Tensor]:
    """No gradient: infinity that raises when it is differentiated, or a censored constant.

    A DEGENERATE crossing has its time, but no derivative, so it raises as well.
    """
    x0, _, _ = inputs
    if search.crossing is not None:
        value = search.time
    else:
        value = float("inf") if censored is None else censored
    time, state = scalar(value, x0), search.state
    tensors = (*inputs, *leaves.tensors)
    if not (torch.is_grad_enabled() and any(p.requires_grad for p in tensors)):
        return time, state
    if censored is not None and search.crossing is None:
        zero = ZeroWithGraph.apply(*tensors)
        return time + zero, state
    where = f"{search.status.name}: {search.status.value}"
    missed_time, missed_state = MissedValue.apply(where, time, state, *tensors)
    return missed_time, missed_state


class _Crossing(torch.autograd.Function):
    """(T, x_T, x at the fixed T) as a function of (x0, t0, target, *leaves), by Theorem 1."""

    @staticmethod
    def forward(ctx: Any, problem: StoppingProblem, route: GradientRoute, *tensors: Tensor) -> Any:
        ctx.problem, ctx.route = problem, route
        # Saved so that autograd notices a parameter that was changed in place before backward.
        ctx.save_for_backward(*tensors)
        state = problem.crossing.state
        return scalar(problem.end, problem.x0), state.clone(), state.clone()

    @staticmethod
    def backward(ctx: Any, on_time: Tensor, on_state: Tensor, on_fixed: Tensor) -> Any:
        refuse_batched_cotangent(on_time)
        tensors = ctx.saved_tensors
        x0, t0, target, *leaves = tensors
        given = Cotangents(on_time, on_state, on_fixed)
        if not given.arrives:
            ctx.problem.stats.vjps = ctx.problem.stats.nfe_backward = 0
            return (None, None, *(torch.zeros_like(tensor) for tensor in tensors))
        with torch.no_grad():
            found = differentiate(ctx.problem, ctx.route, given)
            judge(ctx.problem, ctx.route, found, given)
        gradients = [
            found.x0.reshape(x0.shape),
            found.t0.to(t0.dtype),
            found.target.to(target.dtype),
            *[g.to(p.dtype) for g, p in zip(found.leaves, leaves, strict=True)],
        ]
        dependencies = (*tensors, on_time, on_state, on_fixed)
        guarded = first_derivatives_only(gradients, dependencies, "stopping time")
        return (None, None, *guarded)


def _judged_once(problem: StoppingProblem, route: DirectAdjoint) -> Callable[[Tensor], None]:
    """A hook for outputs that have an ordinary graph: at the first backward pass, the evidence."""
    done: list[bool] = []

    def hook(_: Tensor) -> None:
        if done:
            return
        done.append(True)
        with torch.no_grad():
            zero = torch.zeros_like(problem.x0)
            given = Cotangents(scalar(1.0, problem.x0), zero, zero)
            judge(problem, route, differentiate(problem, route, given), given)

    return hook
