"""x(t) between the accepted steps, as accurately as the steps themselves.

A quartic, after the long steps of an order-8 method, is less accurate than the steps by orders of
magnitude, and an adjoint that is integrated over it pays for its kinks with tiny steps. There every
step is taken again to its middle, which makes states and velocities half a step apart, and four
neighbouring ones make a polynomial of degree 7.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .flow_map import FlowMap, FlowPiece
from .solver import Method
from .step import Step
from .trajectory import Trajectory

__all__ = ["HermitePath", "accurate_path"]

_NODES = 4
# Nodes closer than this, relative to the interval, would turn rounding into divided differences.
_CLOSE = 0.1


def accurate_path(
    trajectory: Trajectory, flow: FlowMap, segments: Sequence[tuple[int, float, float]]
) -> Callable[[float], Tensor]:
    """t -> x(t), shape (n,), to the accuracy of the method's own steps.

    Args:
        trajectory: A trajectory whose steps were kept.
        flow: For the middles of the steps, where they are needed.
        segments: (number of the flow's piece, begin, end) between the times at which it jumps: no
            polynomial reaches across.
    """
    method = trajectory.method
    if method.order <= method.dense_order + 1 or not trajectory.steps:
        return trajectory.flat
    inner = [begin for _, begin, _ in segments[1:]]
    pieces = [
        HermitePath([s for s in trajectory.steps if a <= s.t0 < b], method, flow.on(index))
        for index, a, b in segments
    ]
    return lambda t: pieces[bisect_right(inner, t)](t)


class HermitePath:
    """x(t) through states and velocities at the ends and the middles of the accepted steps."""

    def __init__(self, steps: Sequence[Step], method: Method, flow: FlowPiece) -> None:
        self._times: list[float] = []
        self._states: list[Tensor] = []
        self._velocities: list[Tensor] = []
        for step in steps:
            self._add(step.t0, step.y0, step.f0)
            middle = method.trial(flow, step.t0, step.y0, step.f0, 0.5 * (step.t0 + step.t1))
            self._add(middle.t1, middle.y1, middle.f1)
        self._add(steps[-1].t1, steps[-1].y1, steps[-1].f1)
        self._cached: tuple[int, list[float], list[Tensor]] | None = None

    def _add(self, t: float, state: Tensor, velocity: Tensor) -> None:
        self._times.append(t)
        self._states.append(state)
        self._velocities.append(velocity)

    def __call__(self, t: float) -> Tensor:
        """The state at t, shape (n,); times outside are clamped."""
        t = min(max(t, self._times[0]), self._times[-1])
        index = min(bisect_right(self._times, t), len(self._times) - 1) - 1
        cached = self._cached
        if cached is None or cached[0] != index:
            cached = self._cached = (index, *self._coefficients(self._stencil(index)))
        _, z, coefficients = cached
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
