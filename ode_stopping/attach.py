"""Where T and x_T get their graph: one custom backward around the implicit quotient and a route."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backward import Cotangents, differentiate, judge
from .gradients import GradientRoute
from .gradients.direct import DirectAdjoint
from .leaves import LeafSet
from .result import scalar
from .search import Search
from .solved import StoppingProblem
from .status import NotReachedError
from .validation import refuse_batched_cotangent

__all__ = [
    "MissedValue",
    "ZeroWithGraph",
    "attach_constant",
    "attach_crossing",
    "attach_miss",
    "first_derivatives_only",
]

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


def first_derivatives_only(
    gradients: Sequence[Tensor | None], dependencies: Sequence[Tensor], what: str
) -> list[Tensor | None]:
    """The gradients of a custom backward, made to raise if they are differentiated again.

    PyTorch's own `once_differentiable` hands out a constant under `create_graph=True` where the
    cotangent requires no grad, and a second derivative of zero is then silently wrong.

    Args:
        gradients: What the backward computed; None where there is none.
        dependencies: The tensors that the gradients depend on.
        what: The quantity, for the message.
    """
    anchors = [tensor for tensor in dependencies if tensor.requires_grad]
    if not (torch.is_grad_enabled() and anchors):
        return list(gradients)
    given = [gradient for gradient in gradients if gradient is not None]
    guarded = iter(_OnceOnly.apply(what, len(anchors), *anchors, *given))
    return [None if gradient is None else next(guarded) for gradient in gradients]


class _OnceOnly(torch.autograd.Function):
    """The identity on gradients, whose own backward raises."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        return tuple(gradient.clone() for gradient in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(
            f"this {ctx.what} has first derivatives only: its gradient cannot be differentiated "
            "again (DirectAdjoint of stopping_time has second derivatives)"
        )


class ZeroWithGraph(torch.autograd.Function):
    """0.0 with a graph to its inputs, so that they get a gradient of zero and not None."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        """Zero, as a float64 scalar."""
        ctx.shapes = [(p.shape, p.dtype, p.device) for p in tensors]
        return torch.zeros((), dtype=torch.float64, device=tensors[0].device)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        """Zeros for every input."""
        return tuple(torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.shapes)


class MissedValue(torch.autograd.Function):
    """A missed stopping time: any value forward, an error when a non-zero cotangent arrives."""

    @staticmethod
    def forward(ctx: Any, where: str, time: Tensor, state: Tensor, *tensors: Tensor) -> Any:
        """The values, unchanged."""
        ctx.where = where
        ctx.shapes = [(p.shape, p.dtype, p.device) for p in tensors]
        return time.clone(), state.clone()

    @staticmethod
    def backward(ctx: Any, on_time: Tensor, on_state: Tensor) -> Any:
        """Zeros for a zero cotangent; raises NotReachedError for any other."""
        if bool((on_time != 0).any()) or bool((on_state != 0).any()):
            raise NotReachedError(
                f"a gradient was asked of a run without a stopping time. {ctx.where} Use "
                "censored= to say what "
                "a miss counts as, or select by .reached before taking a mean."
            )
        zeros = [torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.shapes]
        return (None, None, None, *zeros)
