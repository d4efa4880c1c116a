"""The accepted part of a forward run, as it grows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from ..core.states import StateLayout
from ..solving.step import Step
from ..solving.trajectory import Trajectory
from .near_miss import NearMiss
from .scan import Scan

__all__ = ["Path"]

_RECENT = 3


class Path:
    """Steps, times and values of J so far, and what J did between them.

    Attributes:
        grid: Accepted times, from t0.
        values: J there.
        steps: The steps, where they are kept.
        best: Smallest J that was seen, and where.
        recent: The last few steps.
        near_miss: The interior minimum of J that came closest to the target, if there was one.
    """

    def __init__(
        self, layout: StateLayout, start: float, x0: Tensor, keep: bool, target: float
    ) -> None:
        self.layout = layout
        self.start = start
        self.x0 = x0
        self.state = x0
        self.steps: list[Step] = []
        self.grid = [start]
        self.values: list[float] = []
        self.best = (float("inf"), float("nan"))
        self.recent: deque[Step] = deque(maxlen=_RECENT)
        self._keep = keep
        self._largest = float(x0.norm())
        self._dips = _Dips(target)

    def begin(self, value: float) -> None:
        """Note J at the start."""
        self.values.append(value)
        self.best = (value, self.start)
        self._dips.add([(self.start, value)])

    def look(self, scan: Scan) -> None:
        """Note what was seen of J inside a step."""
        self.best = min(self.best, (scan.best_value, scan.best_time))
        self._dips.add(
            point for point in scan.points if scan.crossing is None or point[0] < scan.crossing
        )

    def add(self, step: Step, value: float) -> None:
        """Append an accepted step, with J at its end."""
        self.recent.append(step)
        if self._keep:
            self.steps.append(step)
        self._largest = max(self._largest, float(step.y1.norm()))
        self.grid.append(step.t1)
        self.values.append(value)
        self.state = step.y1

    def replace_recent(self, steps: Sequence[tuple[Step, float]]) -> None:
        """Put other steps, with the values of J at their ends, in the place of the recent ones."""
        kept = (self.steps, self.grid, self.values) if self._keep else (self.grid, self.values)
        for entries in kept:
            del entries[len(entries) - len(self.recent) :]
        self.recent.clear()
        for step, value in steps:
            self.add(step, value)

    def state_error(self) -> Tensor:
        """Root of the summed squares of the last steps' error estimates, by element, shape (n,)."""
        squares = [step.error.square() for step in self.recent]
        return sum(squares, self.x0.new_zeros(self.x0.shape)).sqrt()

    @property
    def near_miss(self) -> NearMiss | None:
        """The dip of J that came closest to the target without reaching it."""
        return self._dips.closest

    def trajectory(self) -> Trajectory:
        """The path as a trajectory."""
        return Trajectory(
            self.layout,
            self.start,
            self.x0,
            self.steps,
            self.grid,
            self.values,
            largest=self._largest,
        )


class _Dips:
    """Interior minima of J, from its values in order of time."""

    def __init__(self, target: float) -> None:
        self._target = target
        self._points: deque[tuple[float, float]] = deque(maxlen=3)
        self.closest: NearMiss | None = None

    def add(self, points: Iterable[tuple[float, float]]) -> None:
        """Go on with further points (t, J)."""
        for point in points:
            if self._points and not point[0] > self._points[-1][0]:
                continue  # a step so short that the clock does not tell its samples apart
            self._points.append(point)
            if len(self._points) == 3:
                (_, before), (_, middle), (_, after) = self._points
                if before > middle < after:
                    self._dip(_vertex(list(self._points)))
            if self.closest is not None:
                # The height to which J rises again after the closest dip: what it is small against.
                lowest = self._target + self.closest.margin
                height = max(self.closest.rebound, point[1] - lowest)
                self.closest = replace(self.closest, rebound=height)

    def _dip(self, vertex: tuple[float, float]) -> None:
        margin = vertex[1] - self._target
        if self.closest is None or margin < self.closest.margin:
            self.closest = NearMiss(vertex[0], margin, 0.0)


def _vertex(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The lowest point of the parabola through three points whose middle one is the lowest."""
    (t0, v0), (t1, v1), (t2, v2) = points
    a, b = (v1 - v0) / (t1 - t0), (v2 - v1) / (t2 - t1)
    curvature = (b - a) / (t2 - t0)
    if not curvature > 0:
        return t1, v1
    t = 0.5 * (t0 + t1) - 0.5 * a / curvature
    return t, min(v1, v0 + (t - t0) * (a + curvature * (t - t1)))
