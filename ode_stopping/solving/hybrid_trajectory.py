"""x(t) with jumps: the trajectories between resets, one behind the other."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..core.states import State, StateLayout
from .trajectory import Trajectory

__all__ = ["HybridTrajectory"]


class HybridTrajectory:
    """The path of an execution; it may jump at the times of resets.

    Call it with a time (float or tensor of any shape) inside [t0, end]; at a jump it gives the
    state behind it, or with side="left" the one before.

    Args:
        layout: Layout of the state.
        arcs: The trajectories between the resets, in order of time.
        end: The last time, and the state there, behind the last reset, shape (n,).

    Attributes:
        arcs: As given.
        jumps: The times at which the state may jump, shape (arcs - 1,), float64.
        start: t0, in flow time.
        end: The last time.
    """

    def __init__(
        self, layout: StateLayout, arcs: Sequence[Trajectory], end: tuple[float, Tensor]
    ) -> None:
        self._layout = layout
        self._last = end[1]
        self._starts = [arc.start for arc in arcs]
        self.arcs = tuple(arcs)
        self.start = self._starts[0] if arcs else end[0]
        self.end = end[0]

    @property
    def jumps(self) -> Tensor:
        """The times at which the state may jump, shape (arcs - 1,)."""
        return torch.tensor(self._starts[1:], dtype=torch.float64)

    @property
    def times(self) -> Tensor:
        """Times of the accepted steps, shape (K,); a jump has two of them."""
        if not self.arcs:
            return torch.tensor([self.end], dtype=torch.float64)
        return torch.cat([arc.times for arc in self.arcs])

    @property
    def states(self) -> State:
        """The states there; each piece has shape (K, ...)."""
        if not self.arcs:
            return self._layout.unpack(self._last.unsqueeze(0))
        rows = [torch.stack([arc.flat(t) for t in arc.times.tolist()]) for arc in self.arcs]
        return self._layout.unpack(torch.cat(rows))

    def flat(self, t: float, side: Literal["left", "right"] = "right") -> Tensor:
        """The state at time t, shape (n,)."""
        if t >= self.end and side == "right":
            return self._last
        place = bisect_right(self._starts, t) if side == "right" else bisect_left(self._starts, t)
        return self.arcs[max(place - 1, 0)].flat(t)

    def __call__(self, t: float | Tensor, side: Literal["left", "right"] = "right") -> State:
        """The state at time t; a tensor of times puts its shape in front of the state's.

        Raises:
            ValueError: A time outside [t0, end], or another side.
            RuntimeError: The states were not kept.
        """
        if side not in ("left", "right"):
            raise ValueError(f'side must be "left" or "right"; got {side!r}')
        times = torch.as_tensor(t, dtype=torch.float64)
        slack = 1e-12 * max(abs(self.start), abs(self.end), 1e-300)
        if bool(((times < self.start - slack) | (times > self.end + slack)).any()):
            raise ValueError(f"t must lie in [{self.start:g}, {self.end:g}]; got {t}")
        flat = torch.stack([self.flat(s, side) for s in times.reshape(-1).tolist()])
        return self._layout.unpack(flat.reshape((*times.shape, flat.shape[-1])))

    def __len__(self) -> int:
        return sum(len(arc) for arc in self.arcs)

    def __repr__(self) -> str:
        return (
            f"HybridTrajectory({len(self)} points on [{self.start:g}, {self.end:g}], "
            f"{len(self.arcs)} arcs)"
        )
