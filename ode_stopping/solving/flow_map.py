"""The user's flow and criterion, evaluated so that no gradient is lost.

A `FlowMap` and a `CriterionMap` sit between the solvers, which see flat vectors without gradients,
and the user's functions, which see states and may call `torch.autograd.grad` themselves. They count
evaluations, keep t inside [t0, max_time], check shapes, and build a graph only on request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.functions import UserFunction
from ..core.states import StateLayout

__all__ = ["FlowMap"]


class FlowMap(UserFunction):
    """dx/dt = F(t, x) on flat vectors, evaluated at times inside [t0, horizon] only.

    Args:
        function: The flow.
        layout: Layout of the state.
        like: A state, for dtype and device.
        times: The start, the times at which the flow jumps, and the horizon, increasing.
        jumps_at_start: Whether the flow jumps at the start, too.

    Attributes:
        times: The times as given.
        jumps_at_start: As given.
        reads_clock_blindly: Whether the flow was seen to lose its derivative to t (`t.item()`).
    """

    name = "flow"

    def __init__(
        self,
        function: Callable[..., Any],
        layout: StateLayout,
        like: Tensor,
        *,
        times: Sequence[float],
        jumps_at_start: bool = False,
    ) -> None:
        super().__init__(function, layout, like)
        # The bounds in the dtype that the user sees: float32 rounds, and a 3/t flow must not see t
        # < t0.
        self.times = tuple(times)
        self.reads_clock_blindly = False
        self._times = [UserFunction.time_tensor(self, t) for t in times]
        low, high = self._times[0], self._times[-1]
        if jumps_at_start:
            low = torch.nextafter(low, high)
        self.jumps_at_start = jumps_at_start
        self._low, self._high = self._bounds = (low, high)

    def enter(self, index: int) -> None:
        """From now on, evaluate between times[index] and times[index + 1] only.

        At a jump the flow is evaluated one rounding inside of the segment: nobody knows whether it
        takes its left or its right limit there.
        """
        low, high = self._times[index], self._times[index + 1]
        self._low = self._bounds[0] if index == 0 else torch.nextafter(low, high)
        last = index + 2 == len(self._times)
        self._high = high if last else torch.nextafter(high, low)

    def leave(self) -> None:
        """Evaluate anywhere between the start and the horizon again."""
        self._low, self._high = self._bounds

    def _checked(self, output: Any) -> Tensor:
        return self.layout.pack(self.layout.check_like(output, name="flow", dtype=self.dtype))

    def time_tensor(self, t: float | Tensor) -> Tensor:
        """The time, clamped to the interval on which the flow may be evaluated."""
        time = super().time_tensor(t)
        clamped = torch.minimum(torch.maximum(time.detach(), self._low), self._high)
        # A time that is differentiated keeps its derivative.
        return time + (clamped - time.detach()) if time.requires_grad else clamped
