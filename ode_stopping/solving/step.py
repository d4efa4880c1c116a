"""One step of a method: where it began, where it ended, and what it takes to look inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was tried, from (t0, y0), where y' = f0, to (t1, y1), where y' = f1.

    Attributes:
        t0: Start, in flow time.
        t1: End, in flow time.
        y0: y(t0), shape (n,).
        f0: y'(t0), shape (n,).
        y1: y(t1), shape (n,).
        f1: y'(t1), shape (n,).
        error: Estimate of the error of y1, shape (n,); y1 - error is the method's second solution.
        data: What the method's dense output or its replay needs; None of anybody else's business.
    """

    t0: float
    t1: float
    y0: Tensor
    f0: Tensor
    y1: Tensor
    f1: Tensor
    error: Tensor
    data: Any = None

    @property
    def length(self) -> float:
        """t1 - t0."""
        return self.t1 - self.t0

    def first(self, count: int) -> Step:
        """The first entries of y alone; without what only the method knows."""
        parts = (self.y0, self.f0, self.y1, self.f1, self.error)
        return Step(self.t0, self.t1, *(part[:count] for part in parts))
