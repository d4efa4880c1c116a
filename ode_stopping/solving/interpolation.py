"""x(t) between the accepted steps, as accurately as the steps themselves.

torchdiffeq's dense output is a quartic for every method. After the long steps of an order-8 method
it is less accurate than the steps by orders of magnitude, and an adjoint that is integrated over it
pays for its kinks with tiny steps. There every step is taken again to its middle, which makes
states and velocities half a step apart, and four neighbouring ones make a polynomial of degree 7.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .method import needs_wide_interpolation, replay_step
from .step import Step
from .torchdiffeq import Torchdiffeq
from .trajectory import Trajectory

__all__ = ["HermitePath", "accurate_path"]

_NODES = 4

# Nodes closer than this, relative to the interval, would turn rounding into divided differences.
_CLOSE = 0.1


def accurate_path(
    trajectory: Trajectory,
    settings: Torchdiffeq,
    function: Callable[[Tensor, Tensor], Tensor],
    breakpoints: Sequence[float] = (),
) -> Callable[[float], Tensor]:
    """t -> x(t), shape (n,), to the accuracy of the method's own steps.

    Args:
        trajectory: A trajectory whose steps were kept.
        settings: The solver that made it.
        function: (t, x) -> dx/dt, for the middles of the steps where they are needed.
        breakpoints: Times at which the velocity jumps: no polynomial reaches across.
    """
    if not needs_wide_interpolation(settings.method) or not trajectory.steps:
        return trajectory.flat
    inner = [t for t in breakpoints if trajectory.start < t < trajectory.end]
    bounds = [trajectory.start, *inner, trajectory.end]
    pieces = [
        HermitePath([s for s in trajectory.steps if a <= s.t0 < b], settings, function)
        for a, b in pairwise(bounds)
    ]
    return lambda t: pieces[bisect_right(inner, t)](t)


class HermitePath:
    """x(t) through states and velocities at the ends and the middles of the accepted steps."""

    def __init__(
        self,
        steps: Sequence[Step],
        settings: Torchdiffeq,
        function: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self._times: list[float] = []
        self._states: list[Tensor] = []
        self._velocities: list[Tensor] = []
        for step in steps:
            velocity = step.velocity(0.0)
            self._add(step.t0, step.y0, velocity)
            start = torch.tensor(step.t0, dtype=torch.float64, device=step.y0.device)
            middle = torch.tensor(
                0.5 * (step.t0 + step.t1), dtype=torch.float64, device=step.y0.device
            )
            self._add(
                middle.item(),
                *replay_step(settings.method, function, start, middle, step.y0, velocity),
            )
        self._add(steps[-1].t1, steps[-1].y1, steps[-1].velocity(1.0))
        self._cached: tuple[int, list[float], list[Tensor]] | None = None

    def _add(self, t: float, state: Tensor, velocity: Tensor) -> None:
        self._times.append(t)
        self._states.append(state)
        self._velocities.append(velocity)

    def __call__(self, t: float) -> Tensor:
        """The state at t, shape (n,); times outside are clamped."""
        t = min(max(t, self._times[0]), self._times[-1])
        index = min(bisect_right(self._times, t), len(self._times) - 1) - 1
        if self._cached is None or self._cached[0] != index:
            self._cached = (index, *self._coefficients(self._stencil(index)))
        _, z, coefficients = self._cached
        value = coefficients[-1]
        for node, coefficient in zip(reversed(z[:-1]), reversed(coefficients[:-1]), strict=True):
            value = torch.add(coefficient, value, alpha=t - node)
        return value

    def _stencil(self, index: int) -> list[int]:
        """Nodes around an interval, none of them much closer together than the interval is long."""
        times = self._times
        chosen = [index, index + 1]
        gap = _CLOSE * (times[index + 1] - times[index])
        left, right = index - 1, index + 2
        while len(chosen) < _NODES and (left >= 0 or right < len(times)):
            # Alternate, so that the interval is in the middle where it can be.
            take_left = left >= 0 and (right >= len(times) or index - left <= right - index - 1)
            if take_left:
                if times[chosen[0]] - times[left] > gap:
                    chosen.insert(0, left)
                left -= 1
            else:
                if times[right] - times[chosen[-1]] > gap:
                    chosen.append(right)
                right += 1
        return chosen

    def _coefficients(self, nodes: list[int]) -> tuple[list[float], list[Tensor]]:
        """Newton's divided differences with every node taken twice."""
        z = [self._times[i] for i in nodes for _ in range(2)]
        values = [self._states[i] for i in nodes for _ in range(2)]
        slopes = [self._velocities[i] for i in nodes]
        coefficients = [values[0]]
        column = values
        for order in range(1, len(z)):
            following = []
            for i in range(len(z) - order):
                if order == 1 and z[i] == z[i + 1]:
                    following.append(slopes[i // 2])
                else:
                    following.append((column[i + 1] - column[i]) / (z[i + order] - z[i]))
            column = following
            coefficients.append(column[0])
        return z, coefficients
