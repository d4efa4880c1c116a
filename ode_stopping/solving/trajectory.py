"""x(t) as the forward solve left it: the accepted steps, each with its dense output."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..core.optional import pictures
from ..core.states import State, StateLayout
from .solver import Method
from .step import Step

__all__ = ["Trajectory"]


class Trajectory:
    """The path of a solve, at its accepted steps and in between.

    Attributes:
        times: Times of the accepted steps, shape (K + 1,), float64, from t0 to the end (the
            crossing, if there is one).
        values: The criterion there, shape (K + 1,), float64.
        states: The states there; each piece has shape (K + 1, ...). Raises if they were not kept.
        steps: The accepted steps; empty if they were not kept.
        method: What made them.
        largest: Largest root mean square of a piece of the state on the way.

    Call it with a time (float or tensor of any shape) inside [t0, end] for the state there, by the
    solver's dense output. Points inside a step that are known better (`marks`: a time with J and
    the state there, as where one of several targets was met) are among the times. Memory: an
    accepted step keeps the velocities of its stages and two states (nine states for dopri5).
    """

    def __init__(
        self,
        layout: StateLayout,
        method: Method,
        x0: Tensor,
        steps: Sequence[Step],
        grid: Sequence[float],
        values: Sequence[float],
        *,
        largest: float,
        marks: Mapping[float, tuple[float, Tensor]] = MappingProxyType({}),
    ) -> None:
        self._layout = layout
        self._x0 = x0
        self._starts = [step.t0 for step in steps]
        self._marks = dict(marks)
        between = [(t, value) for t, (value, _) in self._marks.items() if t not in grid]
        nodes = sorted([*zip(grid, values, strict=True), *between])
        self._grid = [t for t, _ in nodes]
        self._values = [value for _, value in nodes]
        self._latest: tuple[int, Callable[[float], Tensor]] | None = None
        self.steps = list(steps)
        self.method = method
        self.start = self._grid[0]
        self.end = self._grid[-1]
        self.largest = largest

    @property
    def times(self) -> Tensor:
        """Accepted times, shape (K + 1,)."""
        return torch.tensor(self._grid, dtype=torch.float64)

    @property
    def values(self) -> Tensor:
        """The criterion at `times`, shape (K + 1,)."""
        return torch.tensor(self._values, dtype=torch.float64)

    @cached_property
    def _stacked(self) -> Tensor:
        self._require_kept()
        return torch.stack([self.flat(t) for t in self._grid])

    @property
    def states(self) -> State:
        """The states at `times`; each piece has shape (K + 1, ...)."""
        return self._layout.unpack(self._stacked)

    def _require_kept(self) -> None:
        if not self.steps and len(self._grid) > 1:
            raise RuntimeError(
                "the states were not kept: solve with a gradient route that keeps them "
                "(keeps_trajectory = True), not with gradient=None"
            )

    def flat(self, t: float) -> Tensor:
        """The state at t, shape (n,). Times outside [start, end] are clamped to it.

        Raises:
            RuntimeError: The states were not kept.
        """
        self._require_kept()
        if t in self._marks:
            return self._marks[t][1]
        if not self.steps:
            return self._x0
        index = max(bisect_right(self._starts, t) - 1, 0)
        latest = self._latest
        if latest is None or latest[0] != index:
            latest = self._latest = (index, self.method.dense(self.steps[index]))
        return latest[1](t)

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
        kept = "kept" if self.steps else "not kept"
        return (
            f"Trajectory({len(self._grid)} points on [{self.start:g}, {self.end:g}], states {kept})"
        )
