"""The flow on flat vectors, evaluated only at times at which it may be."""

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
        self.times = tuple(times)
        self.jumps_at_start = jumps_at_start
        # The bounds in the dtype that the user sees: float32 rounds, and a 3/t flow must not see t
        # < t0.
        seen = [torch.tensor(t, dtype=self.dtype) for t in times]
        start = torch.nextafter(seen[0], seen[-1]) if jumps_at_start else seen[0]
        # At a jump the flow is evaluated one rounding inside of the piece: nobody knows whether it
        # takes its left or its right limit there.
        lows = [start, *(torch.nextafter(b, seen[-1]) for b in seen[1:-1])]
        highs = [*(torch.nextafter(b, seen[0]) for b in seen[1:-1]), seen[-1]]
        self._bounds = [(a.item(), b.item()) for a, b in zip(lows, highs, strict=True)]
        self._whole = (start.item(), seen[-1].item())

    def number_at(self, time: float) -> int:
        """The number of the smooth piece that a step from this time lies on."""
        return sum(t <= time for t in self.times[1:-1])

    def on(self, piece: int | None) -> FlowPiece:
        """The flow between times[piece] and times[piece + 1] only; None: as a whole."""
        low, high = self._whole if piece is None else self._bounds[piece]
        return FlowPiece(self, low, high)

    def time_tensor(self, t: float | Tensor) -> Tensor:
        """The time, clamped to the interval on which the flow may be evaluated."""
        return self._clamped(t, *self._whole)

    def _clamped(self, t: float | Tensor, low: float, high: float) -> Tensor:
        if not isinstance(t, Tensor):
            return super().time_tensor(min(max(t, low), high))
        time = super().time_tensor(t)
        # A time that is differentiated keeps its derivative.
        if time.requires_grad:
            return time + (time.detach().clamp(low, high) - time.detach())
        return time.clamp(low, high)

    def _checked(self, output: Any) -> Tensor:
        return self.layout.pack(self.layout.check_like(output, name="flow", dtype=self.dtype))


class FlowPiece:
    """A flow on one smooth piece of time; evaluations are counted by the flow.

    Args:
        flow: The flow.
        low: Earliest time of evaluation.
        high: Latest one.
    """

    def __init__(self, flow: FlowMap, low: float, high: float) -> None:
        self.flow = flow
        self.low = low
        self.high = high

    def time_tensor(self, t: float | Tensor) -> Tensor:
        """The time, clamped to this piece."""
        return self.flow._clamped(t, self.low, self.high)

    def __call__(self, t: float, flat: Tensor) -> Tensor:
        """Value without graph."""
        flow = self.flow
        t = self.low if t < self.low else self.high if t > self.high else t
        return flow.plain_at(torch.scalar_tensor(t, dtype=flow.dtype, device=flow.device), flat)

    def traced(self, t: float | Tensor, flat: Tensor) -> Tensor:
        """Value with graph; a time that requires grad keeps its derivative."""
        with torch.enable_grad():
            return self.flow.traced(self.time_tensor(t), flat)

    def traced_between(self, t0: float, t1: float) -> Callable[[Any, Tensor], Tensor]:
        """`traced` for times from t0 to t1, without a clamp where they are clear of the bounds."""
        margin = 8 * torch.finfo(self.flow.dtype).eps * max(abs(t0), abs(t1))
        clear = self.low <= t0 and t1 + margin < self.high
        return self.flow.traced if clear else self.traced

    def inputs(self, t: float, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh leaves (t, flat) that require grad."""
        return self.flow.inputs(min(max(t, self.low), self.high), flat)
