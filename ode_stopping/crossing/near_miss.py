"""x(t) as the forward solve left it: the accepted steps, each with its dense output."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NearMiss"]


@dataclass(frozen=True)
class NearMiss:
    """An interior minimum of J before the crossing: had it been lower, T would have been there.

    T jumps where the margin goes through zero (a grazing crossing), so a small one says that the
    derivative of T holds for small changes only.

    Attributes:
        time: Where, in flow time.
        margin: J - eps there, > 0.
        rebound: By how much J rose again afterwards: what the margin is to be compared with.
    """

    time: float
    margin: float
    rebound: float
