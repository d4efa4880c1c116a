"""The cubic through four samples of J: what J does between them, as far as they tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

__all__ = ["DEEPER", "SAFETY", "Cubic", "cleared"]

# The cubic may be wrong by so many times its misfit.
SAFETY = 2.0
# A dip that the cubic shows is looked at where one so many times as deep would meet the target.
DEEPER = 30.0


@dataclass(frozen=True)
class Cubic:
    """The cubic through four points, as a polynomial in s - origin."""

    origin: float
    coefficients: tuple[float, float, float, float]

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> Cubic:
        """Through four points (s, J)."""
        (s0, v0), (s1, v1), (s2, v2), (s3, v3) = points
        a, b, c = (v1 - v0) / (s1 - s0), (v2 - v1) / (s2 - s1), (v3 - v2) / (s3 - s2)
        d, e = (b - a) / (s2 - s0), (c - b) / (s3 - s1)
        third = (e - d) / (s3 - s0)
        u1, u2 = s1 - s0, s2 - s0
        return cls(s0, (v0, a - d * u1 + third * u1 * u2, d - third * (u1 + u2), third))

    def __call__(self, s: float) -> float:
        """J at s."""
        u = s - self.origin
        c0, c1, c2, c3 = self.coefficients
        return c0 + u * (c1 + u * (c2 + u * c3))

    def turn(self) -> float | None:
        """Where it has its local minimum: the root of its derivative with positive curvature."""
        _, c1, c2, c3 = self.coefficients
        root = c2 * c2 - 3 * c1 * c3
        if root >= 0:
            denominator = c2 + sqrt(root) if c2 >= 0 else None
            if denominator:
                return self.origin - c1 / denominator
            if denominator is None and c3 != 0:
                return self.origin + (sqrt(root) - c2) / (3 * c3)
        return None

    def lowest(self, a: float, b: float) -> float:
        """Where in [a, b] the cubic is smallest."""
        turn = self.turn()
        candidates = [a, b] if turn is None or not a <= turn <= b else [a, b, turn]
        return min(candidates, key=self)

    def mirrored(self) -> Cubic:
        """The cubic of -J."""
        c0, c1, c2, c3 = self.coefficients
        return Cubic(self.origin, (-c0, -c1, -c2, -c3))


def cleared(
    cubic: Cubic, points: Sequence[tuple[float, float]], target: float, misfit: float, touch: float
) -> bool:
    """Whether J stays above a target between four samples, by their cubic.

    Args:
        cubic: The cubic through them.
        points: The samples, in order.
        target: eps.
        misfit: By how much the cubic may be wrong.
        touch: How near a sample may come that is no touch.
    """
    lowest = min(value for _, value in points)
    turn = cubic.turn()
    if turn is not None and 0.0 < turn < 1.0:
        low = cubic(turn)
        beside = next(min(v0, v1) for (_, v0), (s1, v1) in pairwise(points) if turn <= s1)
        if not low - target > DEEPER * (beside - low):
            return False
        lowest = min(lowest, low)
    return lowest - target > max(SAFETY * misfit, touch)
