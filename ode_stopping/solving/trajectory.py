"""x(t) as the forward solve left it: the accepted steps, each with its dense output."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.optional import pictures
from ..core.states import State, StateLayout
from .step import Step

__all__ = ["Trajectory"]


class Trajectory:
    """The path of a solve, at its accepted steps and in between.

    Attributes:
        times: Accepted times, shape (K + 1,), float64, from t0 to the end (the crossing, if there
            is one).
        largest: Largest 2-norm of the states there.
        values: The criterion there, shape (K + 1,), float64.
        states: The states there; each piece has shape (K + 1, ...). Raises if they were not kept.

    Call it with a time (float or tensor of any shape) inside [t0, end] for the state there, by the
    solver's dense output. Memory: six states an accepted step.
    """

    def __init__(
        self,
        layout: StateLayout,
        start: float,
        x0: Tensor,
        steps: Sequence[Step],
        grid: Sequence[float],
        values: Sequence[float],
        *,
        largest: float = 0.0,
    ) -> None:
        self._layout = layout
        self._x0 = x0
        self._steps = list(steps)
        self._starts = [step.t0 for step in self._steps]
        self._grid = list(grid)
        self.start = start
        self.end = self._grid[-1]
        self._values = list(values)
        self.largest = largest

    @classmethod
    def joined(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """One path from consecutive ones, each of which starts where the one before ends."""
        first = parts[0]
        return cls(
            first._layout,
            first.start,
            first._x0,
            [step for part in parts for step in part._steps],
            first._grid + [t for part in parts[1:] for t in part._grid[1:]],
            first._values + [v for part in parts[1:] for v in part._values[1:]],
            largest=max(part.largest for part in parts),
        )

    @property
    def times(self) -> Tensor:
        """Accepted times, shape (K + 1,)."""
        return torch.tensor(self._grid, dtype=torch.float64)

    @property
    def values(self) -> Tensor:
        """The criterion at `times`, shape (K + 1,)."""
        return torch.tensor(self._values, dtype=torch.float64)

    @property
    def steps(self) -> list[Step]:
        """The accepted steps; empty if they were not kept."""
        return self._steps

    @cached_property
    def _stacked(self) -> Tensor:
        self._require_kept()
        return torch.stack([self._x0, *(step.y1 for step in self._steps)])

    @property
    def states(self) -> State:
        """The states at `times`; each piece has shape (K + 1, ...)."""
        return self._layout.unpack(self._stacked)

    def _require_kept(self) -> None:
        if not self._steps and len(self._grid) > 1:
            raise RuntimeError(
                "the states were not kept: call stopping_time with a gradient route, not None"
            )

    def flat(self, t: float) -> Tensor:
        """The state at t, shape (n,). Times outside [start, end] are clamped to it."""
        if not self._steps:
            return self._x0
        index = max(bisect_right(self._starts, t) - 1, 0)
        return self._steps[index].at(t)

    def __call__(self, t: float | Tensor) -> State:
        """The state at time t; a tensor of times puts its shape in front of the state's.

        Raises:
            ValueError: A time outside [t0, end].
        """
        self._require_kept()
        times = torch.as_tensor(t, dtype=torch.float64)
        slack = 1e-12 * max(abs(self.start), abs(self.end), 1e-300)
        if bool(((times < self.start - slack) | (times > self.end + slack)).any()):
            raise ValueError(f"t must lie in [{self.start:g}, {self.end:g}]; got {t}")
        flat = torch.stack([self.flat(s) for s in times.reshape(-1).tolist()])
        return self._layout.unpack(flat.reshape((*times.shape, flat.shape[-1])))

    def plot(self, axes: Any = None) -> Any:
        """The entries of x(t) over flow time (matplotlib; needs the extra `checks`).

        Raises:
            RuntimeError: The states were not kept.
        """
        return pictures().plot_states(self, axes=axes)

    def __len__(self) -> int:
        return len(self._grid)

    def __repr__(self) -> str:
        kept = "kept" if self._steps else "not kept"
        return (
            f"Trajectory({len(self._grid)} points on [{self.start:g}, {self.end:g}], states {kept})"
        )
