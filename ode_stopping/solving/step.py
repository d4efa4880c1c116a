"""One step of an adaptive Runge-Kutta method of torchdiffeq, with its dense output.

All of torchdiffeq's internals that this library touches are in this file, and their presence is
tested by feature, never by version.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Step"]


@dataclass(frozen=True)
class Step:
    """One accepted step with its dense output.

    The state at t0 + s (t1 - t0), s in [0, 1], is the polynomial sum_i coefficients[i] s^i; `error`
    is the estimate of the error that this step made, shape (n,).
    """

    t0: float
    t1: float
    y0: Tensor
    y1: Tensor
    coefficients: tuple[Tensor, ...] = field(repr=False)
    error: Tensor = field(repr=False)

    def at(self, t: float) -> Tensor:
        """Dense output at time t in [t0, t1], shape (n,)."""
        if t <= self.t0:
            return self.y0
        if t >= self.t1:
            return self.y1
        return self.at_fraction((t - self.t0) / (self.t1 - self.t0))

    def at_fraction(self, s: float, part: slice = slice(None)) -> Tensor:
        """Dense output at the fraction s of the step, or a part of its elements."""
        value = self.coefficients[-1][part]
        for coefficient in reversed(self.coefficients[:-1]):
            value = torch.add(coefficient[part], value, alpha=s)
        return value

    def velocity(self, s: float) -> Tensor:
        """Derivative of the dense output at the fraction s, in flow time."""
        value = (len(self.coefficients) - 1) * self.coefficients[-1]
        for i in range(len(self.coefficients) - 2, 0, -1):
            value = torch.add(i * self.coefficients[i], value, alpha=s)
        return value / (self.t1 - self.t0)
