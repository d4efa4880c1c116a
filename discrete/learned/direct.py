"""Learned optimisers without a network: rates by step, and a matrix in front of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ode_stopping.core.validation import require_count

from .base import LearnedOptimizer, Memory

__all__ = ["LearnedPreconditioner", "LearnedSchedule"]


class LearnedSchedule(LearnedOptimizer):
    """Gradient descent with momentum and rates by step.

        m_{k+1} = momentum m_k + g_k,   u_k = -r_i m_{k+1},   i = min(floor(k / every), last)

    Args:
        rates: The r_i at the start, > 0; what is learned is their logarithm.
        every: Steps that each rate lasts.
        momentum: In [0, 1).

    Raises:
        TypeError, ValueError: Bad rates, `every` or momentum.
    """

    def __init__(self, rates: Sequence[float], *, every: int = 1, momentum: float = 0.0) -> None:
        require_count(every, name="every")
        given = [float(rate) for rate in rates]
        if not given or not all(0.0 < rate < float("inf") for rate in given):
            raise ValueError(f"rates must be positive numbers, at least one; got {given}")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1); got {momentum:g}")
        super().__init__(rates=given, every=every, momentum=momentum)
        self.every, self.momentum = every, momentum
        self.log_rates = nn.Parameter(torch.tensor(given, dtype=torch.float64).log())

    @property
    def rates(self) -> Tensor:
        """r, shape (number of rates,)."""
        return self.log_rates.exp()

    def initial_memory(self, x: Tensor) -> Memory:
        """m, zeros, where there is momentum."""
        return (torch.zeros_like(x),) if self.momentum else ()

    def step(self, k: int, gradient: Tensor, memory: Memory, norm: Tensor) -> tuple[Tensor, Memory]:
        """See `LearnedOptimizer.step`."""
        rate = self.log_rates[min(k // self.every, len(self.log_rates) - 1)].exp()
        if not self.momentum:
            return -rate.to(gradient.dtype) * gradient, ()
        moved = self.momentum * memory[0] + gradient
        return -rate.to(gradient.dtype) * moved, (moved,)


class LearnedPreconditioner(LearnedOptimizer):
    """Gradient descent with a positive definite matrix that is learned for one dimension.

        u_k = -P g_k,   P = diag(exp a) + V V^T

    Args:
        dim: d.
        rate: exp(a) at the start, > 0.
        rank: Columns of V, (d, rank), zero at the start but for a little noise.

    Raises:
        TypeError, ValueError: Bad sizes or rate.
    """

    coordinatewise: ClassVar[bool] = False

    def __init__(self, dim: int, *, rate: float = 0.1, rank: int = 0) -> None:
        require_count(dim, name="dim")
        if rank != 0:
            require_count(rank, name="rank")
        if not 0.0 < rate < float("inf"):
            raise ValueError(f"rate must be a positive number; got {rate:g}")
        super().__init__(dim=dim, rate=rate, rank=rank)
        self.log_diagonal = nn.Parameter(torch.full((dim,), rate, dtype=torch.float64).log())
        # (At V = 0 the derivative to V is 0.)
        factor = 1e-2 * rate**0.5 * torch.randn(dim, rank, dtype=torch.float64)
        self.factor = nn.Parameter(factor) if rank else None

    def step(self, k: int, gradient: Tensor, memory: Memory, norm: Tensor) -> tuple[Tensor, Memory]:
        """See `LearnedOptimizer.step`."""
        dtype = gradient.dtype
        moved = self.log_diagonal.exp().to(dtype) * gradient
        if self.factor is not None:
            factor = self.factor.to(dtype)
            moved = moved + (gradient @ factor) @ factor.mT
        return -moved, ()
