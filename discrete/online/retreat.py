"""Going back from a step that blew up."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, isfinite, isinf

import torch
from torch import Tensor

from .bundles import Bundle, Moved, flat, length, unflattened
from .rules import Observation

__all__ = ["Retreat"]


class Retreat:
    """What it takes to go back to x_k, and to see that one should.

    x_k is copied: x - lr d + lr d is not x, and nothing of it is left after a step to infinity. So
    is |grad f(x_k)|, for a closure may write the next gradient over the present one.

    Args:
        bundles: Before the step.
        max_rise: See `AdaptationOptions`.
        gradient_like: Whether the directions have the unit of a gradient.
    """

    def __init__(self, bundles: Sequence[Bundle], max_rise: float, *, gradient_like: bool) -> None:
        self._bundles = bundles
        self._positions = [flat(bundle.parameters) for bundle in bundles]
        self._max_rise = max_rise
        self._gradient_like = gradient_like
        self._gradients: list[Tensor] = []
        if not isinf(max_rise):
            self._gradients = [length(bundle.gradients) for bundle in bundles]

    def blew_up(self, moved: Sequence[Moved], seen: Observation) -> bool:
        """Whether f is not finite, or rose by more than max_rise * |g| lr |d|.

        By smoothness it rises by at most |g| lr |d| + L (lr |d|)^2/2, so that the second term is
        then max_rise - 1 times the first. |g| is |grad f(x_k)|, and where d has the same unit at
        least |d|: then L lr > 2 (max_rise - 1), also next to a minimum that momentum runs through.
        """
        if not isfinite(seen.after):
            return True
        if isinf(self._max_rise) or not seen.change > seen.rounding:
            return False
        directions = [float(length(step.directions)) for step in moved]
        rates = [bundle.group["lr"] for bundle in self._bundles]
        way = hypot(*(rate * far for rate, far in zip(rates, directions, strict=True)))
        slope = hypot(*map(float, self._gradients))
        if self._gradient_like:
            slope = max(slope, hypot(*directions))
        return bool(seen.change > self._max_rise * slope * way)

    @staticmethod
    def led_anywhere(moved: Sequence[Moved]) -> bool:
        """Whether the directions are finite, so that a shorter step is another one."""
        return all(bool(torch.isfinite(flat(step.directions)).all()) for step in moved)

    def go_back(self) -> None:
        """Put the parameters where they were, bit by bit."""
        for bundle, position in zip(self._bundles, self._positions, strict=True):
            torch._foreach_copy_(bundle.parameters, unflattened(position, bundle.parameters))
