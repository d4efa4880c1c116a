"""Rosenbrock's valley."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Problem


class Rosenbrock(Problem):
    """f(x) = sum_{i<d} 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2, not convex, f* = 0 at (1, ..., 1).

    Its gradient has no global Lipschitz constant; from d = 4 on there is a second local minimum
    near (-1, 1, ..., 1).

    Args:
        dim: d >= 2.

    Raises:
        ValueError: dim < 2.
    """

    takes_rows = True
    _ones: Tensor

    def __init__(self, *, dim: int) -> None:
        super().__init__()
        if dim < 2:
            raise ValueError(f"dim must be at least 2, got {dim}")
        self.dim = dim
        self.register_buffer("_ones", torch.ones(dim, dtype=torch.float64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """f(x), shape (...,)."""
        self._check_point(x)
        here, following = x[..., :-1], x[..., 1:]
        valley, slope = following - here * here, 1.0 - here
        return (100.0 * valley * valley + slope * slope).sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """-400 x_i (x_{i+1} - x_i^2) - 2 (1 - x_i) + 200 (x_i - x_{i-1}^2), shape (..., d)."""
        self._check_point(x)
        here, following = x[..., :-1], x[..., 1:]
        valley = following - here * here
        zero = torch.zeros_like(x[..., :1])
        as_first = -400.0 * here * valley - 2.0 * (1.0 - here)
        as_second = 200.0 * valley
        return torch.cat((as_first, zero), dim=-1) + torch.cat((zero, as_second), dim=-1)

    @property
    def minimum(self) -> float:
        """f* = 0."""
        return 0.0

    @property
    def minimizer(self) -> Tensor:
        """x* = (1, ..., 1); float64 until the module is converted."""
        return self._ones.clone()
