"""Learned optimisers whose step is a recurrent network, the same one at every coordinate."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional

from ode_stopping.core.validation import checked_number, described, require_count

from .base import LearnedOptimizer, Memory
from .cell import lstm_cell

__all__ = ["CoordinateLSTM", "RNNprop"]

# So that an untrained network takes small steps.
_FIRST_OUTPUT = 0.1
_EPS = 1e-8
# e^-p has to be a number in float32.
_LARGEST_RANGE = 80.0


class LSTMStack(nn.Module):
    """Layers of LSTM cells; the first axes of the input are rows.

    Args:
        inputs: Numbers a row.
        hidden: Width h.
        layers: How many.
    """

    halves: Tensor

    def __init__(self, inputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.hidden = hidden
        # One product a cell: of (input, h) with both weights side by side.
        widths = [inputs, *[hidden] * (layers - 1)]
        self.weights = nn.ParameterList(
            nn.Parameter(_uniform(4 * hidden, width + hidden, 1 / sqrt(hidden))) for width in widths
        )
        self.biases = nn.ParameterList(nn.Parameter(_bias(hidden)) for _ in widths)
        # Of the arguments of the gates that keep, write, hold the new value, and show.
        halves = torch.tensor([0.5, 0.5, 1.0, 0.5]).repeat_interleave(hidden)
        self.register_buffer("halves", halves, persistent=False)

    def initial(self, x: Tensor) -> Memory:
        """(h, c) of every layer at points of shape (...), zeros of shape (..., hidden)."""
        return tuple(x.new_zeros((*x.shape, self.hidden)) for _ in range(2 * len(self.weights)))

    def forward(self, rows: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """The output of the last layer, shape (..., hidden), and the memory after it."""
        after: list[Tensor] = []
        halves = self.halves.to(rows.dtype)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h, c = memory[2 * layer : 2 * layer + 2]
            scaled = halves.unsqueeze(-1) * weight.to(rows.dtype), halves * bias.to(rows.dtype)
            rows, c = lstm_cell(rows, h, c, *scaled)
            after += [rows, c]
        return rows, tuple(after)


def _uniform(rows: int, columns: int, bound: float) -> Tensor:
    return torch.empty(rows, columns).uniform_(-bound, bound)


def _bias(hidden: int) -> Tensor:
    """Zeros, and one for the gate that keeps: a memory that lasts from the start."""
    bias = torch.zeros(4 * hidden)
    bias[:hidden] = 1.0
    return bias


class _Output(nn.Linear):
    """One number a row, small at first."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 1)
        with torch.no_grad():
            self.weight.mul_(_FIRST_OUTPUT)
            self.bias.zero_()

    def forward(self, rows: Tensor) -> Tensor:
        """Shape (...)."""
        dtype = rows.dtype
        return functional.linear(rows, self.weight.to(dtype), self.bias.to(dtype)).squeeze(-1)


class CoordinateLSTM(LearnedOptimizer):
    """L2O-DM: the step is the output of an LSTM that is fed the gradient (arXiv 1606.04474).

        u_k = scale (W h_k + b),   h_k = LSTM(a, s),
        (a, s) = (log|g_k| / p, sign g_k), or (-1, e^p g_k) where |g_k| < e^-p

    Args:
        hidden: Width of the layers.
        layers: How many.
        scale: Of the step, in units of x, > 0.
        log_range: p, in (0, 80): gradients down to e^-p are told apart by their logarithm.

    Raises:
        TypeError, ValueError: A width or number of layers that is no positive integer; another
            argument out of its range.
    """

    def __init__(
        self, hidden: int = 20, *, layers: int = 2, scale: float = 0.1, log_range: float = 10.0
    ) -> None:
        require_count(hidden, name="hidden")
        require_count(layers, name="layers")
        scale = checked_number(scale, name="scale", low=0.0)
        log_range = checked_number(log_range, name="log_range", low=0.0, high=_LARGEST_RANGE)
        super().__init__(hidden=hidden, layers=layers, scale=scale, log_range=log_range)
        self.scale, self.log_range = scale, log_range
        self.lstm = LSTMStack(2, hidden, layers)
        self.output = _Output(hidden)

    def initial_memory(self, x: Tensor) -> Memory:
        """(h, c) of every layer, zeros."""
        return self.lstm.initial(x)

    def step(self, k: int, gradient: Tensor, memory: Memory, norm: Tensor) -> tuple[Tensor, Memory]:
        """See `LearnedOptimizer.step`."""
        rows, after = self.lstm(self._features(gradient), memory)
        return self.scale * self.output(rows), after

    def _features(self, gradient: Tensor) -> Tensor:
        p, size = self.log_range, gradient.abs()
        least = torch.exp(torch.tensor(-p, dtype=size.dtype, device=size.device))
        large = size >= least
        # (Where it is not looked at, the logarithm is kept off zero: its derivative counts too.)
        log = torch.where(large, size, torch.ones_like(size)).log() / p
        first = torch.where(large, log, -torch.ones_like(size))
        second = torch.where(large, gradient.sign(), gradient / least)
        return torch.stack([first, second], dim=-1)


class RNNprop(LearnedOptimizer):
    """An LSTM behind Adam's preprocessing, with a bounded step (arXiv 1703.03633).

        u_k = alpha tanh(W h_k + b) (|g_k| / max_{j <= k} |g_j|)^damping
        h_k = LSTM(ELU(V (g_k, mhat_k) / sqrt(vhat_k + eps^2) + c))

    with Adam's bias-corrected averages mhat, vhat and |g| the norm over the problem. Undamped
    (damping = 0, as in the paper) the step has one size to the end, and jitters there.

    Args:
        hidden: Width of the layers.
        layers: How many.
        alpha: Largest step of a coordinate, in units of x, > 0.
        damping: Power of the gradient's norm, relative to the largest so far, >= 0; 0: none.
        betas: Of the averages, in [0, 1).

    Raises:
        TypeError, ValueError: A width or number of layers that is no positive integer; another
            argument out of its range.
    """

    def __init__(
        self,
        hidden: int = 20,
        *,
        layers: int = 2,
        alpha: float = 0.5,
        damping: float = 0.5,
        betas: tuple[float, float] = (0.95, 0.95),
    ) -> None:
        require_count(hidden, name="hidden")
        require_count(layers, name="layers")
        alpha = checked_number(alpha, name="alpha", low=0.0)
        damping = checked_number(damping, name="damping", low=0.0, closed=True)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise TypeError(f"betas must be two numbers; got {described(betas)}")
        b1, b2 = (
            checked_number(beta, name=f"betas[{place}]", low=0.0, high=1.0, closed=True)
            for place, beta in enumerate(betas)
        )
        super().__init__(hidden=hidden, layers=layers, alpha=alpha, damping=damping, betas=[b1, b2])
        self.alpha, self.damping = alpha, damping
        self.betas = (b1, b2)
        self.inputs = nn.Linear(2, hidden)
        self.lstm = LSTMStack(hidden, hidden, layers)
        self.output = _Output(hidden)

    def initial_memory(self, x: Tensor) -> Memory:
        """The averages m, v and the largest norm so far, zeros; then (h, c) of every layer."""
        return (
            torch.zeros_like(x),
            torch.zeros_like(x),
            torch.zeros_like(x),
            *self.lstm.initial(x),
        )

    def step(self, k: int, gradient: Tensor, memory: Memory, norm: Tensor) -> tuple[Tensor, Memory]:
        """See `LearnedOptimizer.step`."""
        m, v, largest, *cells = memory
        b1, b2 = self.betas
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient.square()
        root = (v / (1 - b2 ** (k + 1)) + _EPS**2).sqrt()
        inputs = torch.stack([gradient / root, m / (1 - b1 ** (k + 1)) / root], dim=-1)
        dtype = gradient.dtype
        rows = functional.linear(inputs, self.inputs.weight.to(dtype), self.inputs.bias.to(dtype))
        rows, cells_after = self.lstm(functional.elu(rows), tuple(cells))
        step = self.alpha * self.output(rows).tanh()
        largest = torch.maximum(largest, norm)
        if self.damping:
            # At rest there is no step at all: the least one would be the largest gradient so far.
            moving = norm > 0
            ratio = torch.where(moving, norm / torch.where(moving, largest, 1.0), 1.0)
            step = step * torch.where(moving, ratio**self.damping, 0.0)
        return step, (m, v, largest, *cells_after)
