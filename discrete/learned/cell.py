"""One cell of an LSTM with its derivative written out: half the passes over memory of autograd's.

With sigmoid(z) = (1 + tanh(z/2))/2 one tanh over all gates does. Of the tanhs f, i, g, o

    c+ = ((1 + f) c + (1 + i) g)/2,   h+ = (1 + o) tanh(c+)/2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["lstm_cell"]


def lstm_cell(
    rows: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """(h+, c+), each of the shape of h.

    Args:
        rows: Inputs, shape (..., inputs).
        h: Output before, shape (..., hidden).
        c: Cell before, shape (..., hidden).
        weight: Of (rows, h), shape (4 hidden, inputs + hidden): gates that keep, write, hold the
            new value and show; but for the third they are halved already.
        bias: The same of the biases, shape (4 hidden,).
    """
    if not torch.is_grad_enabled() or rows.ndim != 2:
        return _plain(rows, h, c, weight, bias)
    found: tuple[Tensor, Tensor] = _Cell.apply(rows, h, c, weight, bias)
    return found


def _plain(
    rows: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    gates = functional.linear(torch.cat([rows, h], dim=-1), weight, bias).tanh()
    f, i, g, o = gates.chunk(4, dim=-1)
    c = 0.5 * (torch.addcmul(c, f, c) + torch.addcmul(g, i, g))
    size = c.tanh()
    return 0.5 * torch.addcmul(size, o, size), c


class _Cell(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        joined = torch.cat([rows, h], dim=-1)
        gates = functional.linear(joined, weight, bias).tanh_()
        f, i, g, o = gates.chunk(4, dim=-1)
        after = torch.addcmul(c, f, c).add_(torch.addcmul(g, i, g)).mul_(0.5)
        size = after.tanh()
        # (Without `joined`, which is a copy of what is kept anyway.)
        ctx.save_for_backward(rows, h, c, weight, bias, gates, size)
        return torch.addcmul(size, o, size).mul_(0.5), after

    @staticmethod
    def backward(ctx: Any, on_h: Tensor, on_c: Tensor) -> Any:
        rows, h, c, weight, bias, gates, size = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Differentiated once more: autograd's own derivative of the same cell.
            inputs = (rows, h, c, weight, bias)
            wanted = [p for p, asked in zip(inputs, ctx.needs_input_grad, strict=True) if asked]
            found = iter(
                torch.autograd.grad(_plain(*inputs), wanted, (on_h, on_c), create_graph=True)
            )
            return tuple(next(found) if asked else None for asked in ctx.needs_input_grad)
        f, i, g, o = gates.chunk(4, dim=-1)
        on_gates = torch.empty_like(gates)
        on_f, on_i, on_g, on_o = on_gates.chunk(4, dim=-1)
        half = 0.5 * on_h
        torch.mul(half, size, out=on_o)
        half = torch.addcmul(half, half, o)
        # What arrives at c+, halved.
        through = torch.addcmul(half, half, size.square(), value=-1).add_(on_c).mul_(0.5)
        torch.mul(through, c, out=on_f)
        torch.mul(through, g, out=on_i)
        torch.addcmul(through, through, i, out=on_g)
        on_gates.addcmul_(on_gates * gates, gates, value=-1)
        on_joined = on_gates @ weight if any(ctx.needs_input_grad[:2]) else None
        width = rows.shape[-1]
        return (
            None if on_joined is None else on_joined[:, :width],
            None if on_joined is None else on_joined[:, width:],
            torch.addcmul(through, through, f) if ctx.needs_input_grad[2] else None,
            on_gates.mT @ torch.cat([rows, h], dim=-1) if ctx.needs_input_grad[3] else None,
            on_gates.sum(0) if ctx.needs_input_grad[4] else None,
        )
