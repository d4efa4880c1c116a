"""Dips of J that came close to a target without meeting it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Dips", "NearMiss", "closest"]


@dataclass(frozen=True)
class NearMiss:
    """An interior minimum of J before the crossing: had it been lower, T would have been there.

    T jumps where the margin goes through zero (a grazing crossing), so a small one says that the
    derivative of T holds for small changes only. The other way round (a maximum, a fall) for
    direction="rising", and where J turned back before it had left its target (leave_first=True).

    Attributes:
        time: Where, in flow time.
        margin: Distance of J from eps there, > 0.
        rebound: By how much J went back afterwards: what the margin is to be compared with.
    """

    time: float
    margin: float
    rebound: float


def closest(misses: Iterable[NearMiss | None]) -> NearMiss | None:
    """The one with the smallest margin."""
    found = (miss for miss in misses if miss is not None)
    return min(found, key=lambda miss: miss.margin, default=None)


class Dips:
    """The lowest interior minimum of J so far, from its values in order of time."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, float]] = deque(maxlen=3)
        # Time, J, and the largest J since.
        self._lowest: tuple[float, float, float] | None = None

    def add(self, points: Iterable[tuple[float, float]]) -> None:
        """Go on with further points (t, J)."""
        for point in points:
            if self._points and not point[0] > self._points[-1][0]:
                continue  # a step so short that the clock does not tell its samples apart
            self._points.append(point)
            if len(self._points) == 3:
                (_, before), (_, middle), (_, after) = self._points
                if before > middle < after:
                    time, value = _vertex(list(self._points))
                    if self._lowest is None or value < self._lowest[1]:
                        self._lowest = (time, value, value)
            if self._lowest is not None and point[1] > self._lowest[2]:
                self._lowest = (*self._lowest[:2], point[1])

    def near_miss(self, target: float) -> NearMiss | None:
        """The dip that came closest to a target which J has not met yet."""
        if self._lowest is None:
            return None
        time, value, height = self._lowest
        return NearMiss(time, value - target, height - value)


def _vertex(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The lowest point of the parabola through three points whose middle one is the lowest."""
    (t0, v0), (t1, v1), (t2, v2) = points
    a, b = (v1 - v0) / (t1 - t0), (v2 - v1) / (t2 - t1)
    curvature = (b - a) / (t2 - t0)
    if not curvature > 0:
        return t1, v1
    t = 0.5 * (t0 + t1) - 0.5 * a / curvature
    return t, min(v1, v0 + (t - t0) * (a + curvature * (t - t1)))
