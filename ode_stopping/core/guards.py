"""Where T and x_T get their graph: one custom backward around the implicit quotient and a route."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .status import NotReachedError

__all__ = ["CENSORED", "MissedValue", "ZeroWithGraph", "first_derivatives_only"]


# What to do about a missed stopping time.
CENSORED = "Use censored= to say what a miss counts as, or select by .reached before taking a mean."


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
                f"a gradient was asked of a value that the run did not come to. {ctx.where}"
            )
        zeros = [torch.zeros(s, dtype=dtype, device=device) for s, dtype, device in ctx.shapes]
        return (None, None, None, *zeros)
