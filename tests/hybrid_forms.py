"""Hybrid problems with closed forms, and a road to their derivatives that is not the library's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from torch import Tensor

from ode_stopping import Event

F64 = torch.float64


def leaf(value: Any) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


def grads(value: Tensor, *leaves: Tensor) -> list[float]:
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
    return [0.0 if g is None else float(g) for g in found]


def first(t: Tensor, x: Tensor) -> Tensor:
    return x[0]


class Ball:
    """Falls from h0 with gravity g; v+ = -e v- on the floor."""

    def __init__(self, restitution: float = 0.8) -> None:
        self.h0, self.g, self.e = leaf(2.0), leaf(9.81), leaf(restitution)
        self.leaves = [self.h0, self.g, self.e]

    def flow(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.stack([x[1], -self.g])

    @property
    def start(self) -> Tensor:
        return torch.stack([self.h0, torch.zeros((), dtype=F64)])

    def impact(self, **options: Any) -> Event:
        return Event(
            lambda t, x: x[0],
            reset=lambda t, x: torch.stack([torch.zeros_like(x[0]), -self.e * x[1]]),
            **options,
        )

    def time(self, n: int) -> Tensor:
        """T_n = sqrt(2 h0/g) (1 + 2 sum_{k=1}^{n-1} e^k)."""
        return (2 * self.h0 / self.g).sqrt() * (1 + 2 * sum(self.e**k for k in range(1, n)))

    def speed(self, n: int) -> Tensor:
        """Behind impact n."""
        return self.e**n * (2 * self.g * self.h0).sqrt()

    def height(self, t: Tensor | float, n: int) -> Tensor:
        """Between impacts n and n + 1."""
        s = t - self.time(n)
        return self.speed(n) * s - self.g * s**2 / 2


def reached(
    fun: Callable[[float, np.ndarray], Sequence[float]],
    surface: Callable[[float, np.ndarray], float],
    t0: float,
    x0: Sequence[float],
    *,
    rising: bool = True,
    longest: float = 1e3,
    first_after: float = 1e-6,
) -> tuple[float, np.ndarray]:
    """Time and state of the next crossing, by DOP853 at 1e-12 and brentq on fine samples."""
    sign = 1.0 if rising else -1.0
    t, x, span = t0, np.asarray(x0, dtype=float), 0.5
    while t < t0 + longest:
        run = solve_ivp(fun, (t, t + span), x, method="DOP853", rtol=1e-12, atol=1e-13,
                        dense_output=True)  # fmt: skip
        grid = np.linspace(t, t + span, 200)
        values = [sign * surface(s, run.sol(s)) for s in grid]
        for a, b, va, vb in zip(grid, grid[1:], values, values[1:], strict=False):
            if va < 0 <= vb and b > t0 + first_after:
                path = run.sol
                at = brentq(lambda s, path=path: surface(s, path(s)), a, b, xtol=1e-15, rtol=1e-14)
                again = solve_ivp(fun, (t, at), x, method="DOP853", rtol=1e-12, atol=1e-13)
                return float(at), again.y[:, -1]
        t, x = t + span, run.y[:, -1]
    raise AssertionError("the surface is not reached")


def slopes(value: Callable[[np.ndarray], np.ndarray], at: Sequence[float]) -> np.ndarray:
    """Jacobian of a vector by central differences with two lengths, extrapolated."""
    point = np.asarray(at, dtype=float)
    columns = []
    for i in range(len(point)):
        found = []
        for h in (2e-4, 1e-4):
            step = np.zeros_like(point)
            step[i] = h * max(abs(point[i]), 1.0)
            found.append((value(point + step) - value(point - step)) / (2 * step[i]))
        columns.append((4 * found[1] - found[0]) / 3)
    return np.stack(columns, axis=-1)
