"""A damped rotation, whose first coordinate crosses every level many times, with its derivatives.

    x' = A x,  A = [[-a, -w], [w, -a]],   J = x_1 = e^{-a s} (x_1(t0) cos w s - x_2(t0) sin w s),

s = t - t0. Crossings come from the formula by bisection, their derivatives by the implicit function
theorem on the formula: nothing of the library is in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor

from ode_stopping import StoppingResult, Torchdiffeq, stopping_time

F64 = torch.float64
TIGHT = Torchdiffeq("dopri8", rtol=1e-10)


def leaf(value: float | list[float]) -> Tensor:
    """A float64 leaf."""
    return torch.tensor(value, dtype=F64, requires_grad=True)


class Turning:
    """The flow with all its leaves.

    Args:
        x0: Start.
        eps: The target.
        t0: Start time.
    """

    def __init__(self, x0: list[float], eps: float, t0: float = 0.3) -> None:
        self.a, self.w = leaf(0.1), leaf(2.0)
        self.x0, self.eps, self.t0 = leaf(x0), leaf(eps), leaf(t0)

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that T depends on."""
        return [self.a, self.w, self.x0, self.eps, self.t0]

    def flow(self, t: Tensor, x: Tensor) -> Tensor:
        """A x."""
        a, w = self.a.to(x.dtype), self.w.to(x.dtype)
        return torch.stack([-a * x[0] - w * x[1], w * x[0] - a * x[1]])

    @staticmethod
    def first(t: Tensor, x: Tensor) -> Tensor:
        """J = x_1."""
        return x[0].clone()

    @staticmethod
    def minus(t: Tensor, x: Tensor) -> Tensor:
        """-J."""
        return -x[0]

    def level(self, time: Tensor) -> Tensor:
        """J at a time, by the formula."""
        s = time - self.t0
        turned = self.x0[0] * torch.cos(self.w * s) - self.x0[1] * torch.sin(self.w * s)
        return torch.exp(-self.a * s) * turned

    def crossings(self, eps: float, direction: str, until: float = 12.0) -> list[float]:
        """The times after t0 at which J goes through eps in a direction."""
        sign = 1.0 if direction == "falling" else -1.0
        start = float(self.t0.detach())

        def excess(t: float) -> float:
            with torch.no_grad():
                return sign * (float(self.level(torch.tensor(t, dtype=F64))) - eps)

        # A start on the target is no crossing.
        grid = [start + 1e-6 + 0.02 * k for k in range(int((until - start) / 0.02))]
        values = list(map(excess, grid))
        pairs = zip(zip(grid, values, strict=True), zip(grid[1:], values[1:], strict=True), strict=False)  # fmt: skip # noqa: E501
        return [
            float(brentq(excess, a, b, xtol=1e-15, rtol=1e-15))
            for (a, va), (b, vb) in pairs
            if va > 0 >= vb
        ]

    def derivatives(self, time: float) -> list[Tensor]:
        """Of a crossing at that time, to the leaves: -d(J - eps) / J'."""
        t = leaf(time)
        excess = self.level(t) - self.eps
        rate, *parts = torch.autograd.grad(excess, [t, *self.leaves])
        return [-part / rate for part in parts]


def growth(theta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """x' = theta x."""
    return lambda t, x: theta.to(x.dtype) * x


def first(t: Tensor, x: Tensor) -> Tensor:
    """J = x_1."""
    return x[0].clone()


def run(turning: Turning, target: Any = None, **options: Any) -> StoppingResult:
    """The stopping time of a turning, with leave_first=True and a tight tolerance."""
    arguments = {"t0": turning.t0, "solver": TIGHT, "leave_first": True, **options}
    target = turning.eps if target is None else target
    return stopping_time(turning.flow, turning.x0, turning.first, target, **arguments)


def hand_loop(
    update: Callable[[int, Tensor], Tensor],
    x0: Tensor,
    criterion: Callable[[Tensor], Tensor],
    eps: Tensor,
    *,
    sign: float = 1.0,
    leave: bool = False,
    margin: float = 1e-9,
) -> tuple[int, Tensor]:
    """N, and N with the derivative of Definition 3, by a loop with a graph.

    Args:
        sign: 1 for a J that falls to eps, -1 for one that rises.
        leave: Whether J has to be beyond eps by the margin first.
    """
    x, k, before = x0, 0, None
    counts = not leave
    while k < 10_000:
        value = criterion(x)
        excess = sign * float((value - eps).detach())
        if counts and excess <= 0:
            assert before is not None
            slope = float((value - before).detach())
            smooth = -(value - eps) / slope
            return k, k + smooth - smooth.detach()
        counts = counts or excess > margin
        x, k, before = update(k, x), k + 1, value
    raise AssertionError("no crossing")


def largest_gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest of the expected ones."""
    size = max(float(e.abs().max()) for e in expected)
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)) / size
