"""When is a step good enough? The error measures of the adaptive steps.

Two things have to hold. The state has to be right to the tolerance, as everywhere. And the
*velocity* has to be right: explicit steps at their limit of stability leave noise of the size of
the tolerance in the fast modes, which the state (and J, and so T) hardly shows, while every
derivative of T is made of velocities and gradients, which weigh that noise by the curvature. So a
step is rejected, too, where the error estimate of the state, pushed through the flow, changes the
velocity by more than a few tolerances. That costs one evaluation of the flow a step where it
decides anything, and is looked at now and then elsewhere.

A measure reads all of its numbers from the device at once.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite

import torch
from torch import Tensor

from ..core.states import StateLayout
from .solver import Tolerances
from .step import Step

__all__ = ["StateError", "VelocityError"]

# Allowed change of the velocity, in units of rtol.
_VELOCITY_PER_RTOL = 10.0
# Steps between two looks at the velocity where the state decides.
_LONGEST_PAUSE = 7
_ROUNDING = 32.0


class StateError:
    """Error of the state in units of the tolerance, <= 1 where a step is good enough.

        max over pieces of rms_i( error_i / (atol + rtol max(|y0_i|, |y1_i|)) )

    Args:
        layout: The pieces; none hides behind a longer one.
        tolerances: Of the solve.
    """

    def __init__(self, layout: StateLayout, tolerances: Tolerances) -> None:
        self._layout = layout
        self._tolerances = tolerances
        # |y1| of the step before is |y0| of the next.
        self._latest: tuple[Tensor, Tensor] | None = None

    def __call__(self, step: Step) -> Tensor:
        """The ratio, shape ()."""
        latest = self._latest
        before = latest[1] if latest is not None and latest[0] is step.y0 else step.y0.abs()
        after = step.y1.abs()
        self._latest = (step.y1, after)
        size = torch.maximum(before, after)
        # A piece that is zero and stays zero has no error: 0/0.
        tiny = torch.finfo(size.dtype).tiny
        rtol = self._tolerances.rtol
        if len(self._layout.shapes) == 1:
            # The root of the mean stands in the scale: that takes the fewest operations.
            root = size.numel() ** 0.5
            if self._tolerances.atol is None:
                floor = tiny + self._tolerances.floor(torch.linalg.vector_norm(size))
                scale = torch.add(floor, size, alpha=rtol * root)
            else:
                scale = size.mul_(rtol * root).add_(self._tolerances.atol * root + tiny)
            return torch.linalg.vector_norm(step.error / scale)
        scale = rtol * size + self._tolerances.floor(self._layout.piecewise_rms(size))
        return self._layout.norm(step.error / scale.clamp_min(tiny))


class VelocityError:
    """The error of the state, and of the velocity as far as it follows from that.

        |F(t1, y1 - error) - F(t1, y1)| / (10 rtol max(|F0|, |F1|)),

    the largest over the pieces of the state, in root mean squares.

    Args:
        flow: (t, y) -> y' without graph.
        state: The measure of the state's error.
        layout: The pieces.
        tolerances: Of the solve.

    Attributes:
        evaluations: Evaluations of the flow that this took.
        largest: Largest relative change of the velocity in an accepted step that was looked at.
        size: Root mean square of y1 of the latest step, of its largest piece.
    """

    def __init__(
        self,
        flow: Callable[[float, Tensor], Tensor],
        state: StateError,
        layout: StateLayout,
        tolerances: Tolerances,
    ) -> None:
        self._flow = flow
        self._state = state
        self._layout = layout
        self._tolerances = tolerances
        self._eps = 0.0
        # Sizes of one piece are compared with each other only: its 2-norm will do.
        self._root = layout.sizes[0] ** 0.5 if len(layout.shapes) == 1 else 1.0
        self._pause = 0
        self._skip = 0
        # Sizes of the velocity at the end of the latest step, where the next one starts.
        self._speeds: tuple[Tensor, list[float]] | None = None
        self.evaluations = 0
        self.largest = 0.0
        self.size = 0.0

    def __call__(self, step: Step) -> float:
        """The ratio, <= 1 where a step is good enough; inf where it is not finite."""
        rms = self._sizes
        self._eps = torch.finfo(step.y1.dtype).eps
        figures = [self._state(step).reshape(1), rms(step.y1), rms(step.f1)]
        known = self._speeds is not None and self._speeds[0] is step.f0
        look = self._skip == 0
        if look:
            # Before the error of the state is known: some numbers more to read, not one more wait.
            change = self._flow(step.t1, step.y1 - step.error) - step.f1
            figures += [rms(change), rms(step.error)]
            figures += [] if known else [rms(step.f0)]
            self.evaluations += 1
        by_state, *rest = torch.cat(figures).tolist()
        count = figures[1].numel()
        sizes, speeds, *looked = [rest[i : i + count] for i in range(0, len(rest), count)]
        self.size = max(sizes, default=0.0) / self._root
        before = self._speeds[1] if self._speeds is not None and known else None
        self._speeds = (step.f1, speeds)
        # An infinite state may divide its own error away.
        if not all(map(isfinite, (*sizes, *speeds))):
            return inf
        if not by_state <= 1.0:
            return by_state
        if not look:
            self._skip -= 1
            return by_state
        by_velocity = self._ratio(sizes, speeds, before or looked.pop(), *looked)
        self._pause = (
            0 if by_velocity > 0.5 * by_state else min(2 * self._pause + 1, _LONGEST_PAUSE)
        )
        self._skip = self._pause
        return max(by_state, by_velocity)

    def _sizes(self, flat: Tensor) -> Tensor:
        """The size of each piece, shape (pieces,)."""
        if len(self._layout.shapes) == 1:
            return torch.linalg.vector_norm(flat).view(1)
        return self._layout.rms(flat)

    def _ratio(
        self,
        sizes: list[float],
        speeds: list[float],
        before: list[float],
        changes: list[float],
        errors: list[float],
    ) -> float:
        """Largest change of the velocity over what is allowed; all lists are by piece."""
        # Where the error of the state is down to its absolute tolerance, or to rounding, no
        # shorter step would make the velocity better.
        root = self._root
        floors = [
            max(self._tolerances.floor(size / root) * root, _ROUNDING * self._eps * size)
            for size in sizes
        ]
        if all(error <= floor for error, floor in zip(errors, floors, strict=True)):
            return 0.0
        limit = _VELOCITY_PER_RTOL * self._tolerances.rtol
        worst = 0.0
        for change, first, second in zip(changes, before, speeds, strict=True):
            allowed = limit * max(first, second)
            ratio = change / allowed if allowed > 0 else inf if change > 0 else 0.0
            worst = max(worst, ratio if ratio == ratio else inf)
        if worst <= 1.0:
            self.largest = max(self.largest, worst * limit)
        return worst
