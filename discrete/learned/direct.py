"""Learned optimisers without a network: rates by step, and a matrix in front of the gradient."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from ode_stopping.core.validation import checked_number, described, require_count

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

    def __init__(self, rates: Iterable[float], *, every: int = 1, momentum: float = 0.0) -> None:
        require_count(every, name="every")
        if isinstance(rates, str | bytes | int | float) or not isinstance(rates, Iterable):
            raise TypeError(f"rates must be a list of numbers; got {described(rates)}")
        listed = rates.tolist() if isinstance(rates, Tensor) else rates
        given = [
            checked_number(rate, name=f"rates[{place}]", low=0.0)
            for place, rate in enumerate(listed)
        ]
        if not given:
            raise ValueError("rates must hold at least one number; got none")
        momentum = checked_number(momentum, name="momentum", low=0.0, high=1.0, closed=True)
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
        rate = checked_number(rate, name="rate", low=0.0)
        super().__init__(dim=dim, rate=rate, rank=rank)
        self.log_diagonal = nn.Parameter(torch.full((dim,), rate, dtype=torch.float64).log())
        # (At V = 0 the derivative to V is 0.)
        factor = 1e-2 * rate**0.5 * torch.randn(dim, rank, dtype=torch.float64)
        self.factor = nn.Parameter(factor) if rank else None

    def step(self, k: int, gradient: Tensor, memory: Memory, norm: Tensor) -> tuple[Tensor, Memory]:
        """See `LearnedOptimizer.step`.

        Raises:
            ValueError: Another number of coordinates than d.
        """
        dim = len(self.log_diagonal)
        if gradient.ndim == 0 or gradient.shape[-1] != dim:
            raise ValueError(
                f"this LearnedPreconditioner is for {dim} coordinates, the last axis of x; got a "
                f"gradient of shape {tuple(gradient.shape)}"
            )
        dtype = gradient.dtype
        moved = self.log_diagonal.exp().to(dtype) * gradient
        if self.factor is not None:
            factor = self.factor.to(dtype)
            moved = moved + (gradient @ factor) @ factor.mT
        return -moved, ()
