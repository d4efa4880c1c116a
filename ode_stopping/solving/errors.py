"""When is a step of the forward run good enough? The error measures of the adaptive steps.

Two things have to hold. The state has to be right to the tolerance, as everywhere. And the
*velocity* has to be right: explicit steps at their limit of stability leave noise of the size of
the tolerance in the fast modes, which the state (and J, and so T) hardly shows, while every
derivative of T is made of velocities and gradients, which weigh that noise by the curvature. So a
step is rejected, too, where the error estimate of the state, pushed through the flow, changes the
velocity by more than a few tolerances. That costs one evaluation of the flow a step where it
decides anything, and is looked at now and then elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.states import StateLayout
from .tolerances import Tolerances

__all__ = ["StateError", "Trial", "VelocityError"]

# Allowed change of the velocity, in units of rtol.
_VELOCITY_PER_RTOL = 10.0

# Steps between two looks at the velocity where the state decides.
_LONGEST_PAUSE = 7

_ROUNDING = 32.0


@dataclass(frozen=True)
class Trial:
    """A step that was tried: from (t0, y0), where y' = f0, to (t1, y1), where y' = f1.

    Attributes:
        error: Estimate of the error of y1; y1 - error is the method's second solution.
    """

    t0: float
    t1: float
    y0: Tensor
    f0: Tensor
    y1: Tensor
    f1: Tensor
    error: Tensor


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

    def __call__(self, trial: Trial) -> float:
        """The ratio."""
        size = torch.maximum(trial.y0.abs(), trial.y1.abs())
        scale = self._tolerances.rtol * size + self._absolute(size)
        # A piece that is zero and stays zero has no error: 0/0.
        scale = scale.clamp_min(torch.finfo(scale.dtype).tiny)
        return float(self._layout.norm(trial.error / scale))

    def _absolute(self, size: Tensor) -> Tensor | float:
        if len(self._layout.shapes) == 1:
            return self._tolerances.floor(size.square().mean().sqrt())
        return self._tolerances.floor(self._layout.piecewise_rms(size))


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
        self._pause = 0
        self._skip = 0
        self.evaluations = 0
        self.largest = 0.0

    def __call__(self, trial: Trial) -> float:
        """The ratio, <= 1 where a step is good enough."""
        by_state = self._state(trial)
        if not by_state <= 1.0:
            return by_state
        if self._skip > 0:
            self._skip -= 1
            return by_state
        by_velocity = self._velocity(trial)
        if by_velocity > 0.5 * by_state:
            self._pause = 0
        else:
            self._pause = min(2 * self._pause + 1, _LONGEST_PAUSE)
        self._skip = self._pause
        return max(by_state, by_velocity)

    def _velocity(self, trial: Trial) -> float:
        self.evaluations += 1
        limit = _VELOCITY_PER_RTOL * self._tolerances.rtol
        change = self._layout.rms(self._flow(trial.t1, trial.y1 - trial.error) - trial.f1)
        speed = torch.maximum(self._layout.rms(trial.f0), self._layout.rms(trial.f1))
        # Where the error of the state is down to its absolute tolerance, or to rounding, no
        # shorter step would make the velocity better.
        size = self._layout.rms(trial.y1)
        eps = torch.finfo(size.dtype).eps
        absolute = torch.zeros_like(size) + self._tolerances.floor(size)
        floor = torch.maximum(absolute, _ROUNDING * eps * size)
        if bool((self._layout.rms(trial.error) <= floor).all()):
            return 0.0
        ratio = change / (limit * speed).clamp_min(torch.finfo(size.dtype).tiny)
        worst = float(torch.nan_to_num(ratio, nan=float("inf")).max())
        if worst <= 1.0:
            self.largest = max(self.largest, worst * limit)
        return worst
