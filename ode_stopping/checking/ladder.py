"""The slope of a function of one number by differences on a ladder of step sizes.

Central differences err by c h^2, so with h falling by the factor 4 the combination
(16 D(h/4) - D(h))/15 errs by c h^4, until the noise of the function, divided by h, takes over. The
value that is reported is that of the plateau in between: where neighbouring combinations agree
best. The two one-sided slopes S+(h) and S-(h) come closer as h does where the function is
differentiable; where they do not, the function has a kink, and both are reported.

A gradient g that is held against the slope leaves the Taylor remainder |f(h) - f(0) - h g|. It
falls as h^2 where g is right, and as h where it is wrong or f has a kink: the observed order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from math import comb, inf, isfinite, log, sqrt

__all__ = ["Slope", "measure_noise", "measure_slope"]

_FACTOR = 4.0
_LEVELS = 8
# A kink has to stand this far above what noise and curvature can make of a difference of slopes.
_CLEAR = 20.0
# A remainder counts where it stands this far above the noise of one value.
_RESOLVED = 5.0
# Values on each side from which the noise is measured, and the orders of their differences.
_MESH = 10
_ORDERS = range(3, 7)
# Largest error over its root mean square: sqrt(3) for rounding, and as much for what the smallest
# of several estimates is too low by.
_AMPLITUDE = 3.0


@dataclass(frozen=True)
class Slope:
    """A measured slope.

    Attributes:
        value: The slope; for a kink the mean of both sides.
        uncertainty: What neighbouring step sizes disagree by, or the noise over h where that is
            more.
        step: The step size of the plateau, in units of the direction.
        sides: The slopes below and above, where they differ (a kink); None elsewhere.
        note: What was special; may be empty.
        order: Observed order of the Taylor remainder of the gradient that was given: about 2 where
            it is right; None where there was none, or the remainder is not above the noise.
    """

    value: float
    uncertainty: float
    step: float
    sides: tuple[float, float] | None = None
    note: str = ""
    order: float | None = None

    def of_direction(self, factor: float) -> Slope:
        """In units of a direction, where this is the slope along `factor` times it."""
        if factor == 1.0:
            return self
        sides = None if self.sides is None else (self.sides[0] / factor, self.sides[1] / factor)
        return replace(
            self,
            value=self.value / factor,
            uncertainty=self.uncertainty / factor,
            step=self.step * factor,
            sides=sides,
        )


@dataclass(frozen=True)
class _Estimate:
    value: float
    uncertainty: float
    step: float


def measure_slope(
    function: Callable[[float], float | None],
    at: float,
    *,
    noise: float,
    goal: float,
    largest: float,
    gradient: float | None = None,
) -> Slope | None:
    """Slope at 0 of a function of one number; None where it could not be measured.

    Args:
        function: Step h to f(h); None where f has no value there.
        at: f(0).
        noise: Absolute error of one value of f.
        goal: Relative uncertainty that is small enough to stop at; up to 8 step sizes are tried.
        largest: Largest step size.
        gradient: The slope that is claimed. Where the differences contradict it, smaller steps
            are tried although the slope is settled, for the order of its remainder.
    """
    ladder = _Ladder(at, noise)
    step = largest
    for _ in range(_LEVELS):
        ladder.add(step, function(step), function(-step))
        if ladder.is_settled(goal) and not ladder.contradicts(gradient, goal):
            break
        step /= _FACTOR
    slope = ladder.slope()
    if slope is None or gradient is None:
        return slope
    return replace(slope, order=ladder.order(gradient))


def measure_noise(
    function: Callable[[float], float | None], length: float, *, distinct: bool = False
) -> float:
    """Error of one value of f near 0, from its values at +-length/10, ..., +-length.

    Differences of order k of a smooth f fall as the k-th power of the spacing, those of independent
    errors of size sigma grow as sqrt(binomial(2k, k)) sigma (the difference table of Hamming). Each
    side is looked at by itself, since 0 may be a kink, and the quieter one counts. With too few
    values it is 0, or infinite with `distinct`.

    Args:
        function: Step h to f(h); None where f has no value there.
        length: The farthest step.
        distinct: Whether a side on which neighbours are equal tells nothing (between the jumps of a
            rounded function there is no noise), and the noisier side counts.
    """
    found = []
    for sign in (1.0, -1.0):
        values = [function(sign * length * (i + 1) / _MESH) for i in range(_MESH)]
        found.append(_noise_of(values, distinct))
    known = (noise for noise in found if noise is not None)
    return max(known, default=inf) if distinct else min(known, default=0.0)


def _noise_of(values: list[float | None], distinct: bool) -> float | None:
    row = [value for value in values if value is not None and isfinite(value)]
    if len(row) < len(values):
        return None
    jumps = [abs(after - before) for before, after in pairwise(row)]
    if min(jumps) == 0.0:
        # Flat in places: the error of a step function is a step; flat throughout, nothing is known.
        return None if distinct else max(jumps) or None
    sizes = []
    for order in range(1, _ORDERS.stop):
        row = [after - before for before, after in pairwise(row)]
        if order in _ORDERS:
            mean = sum(change * change for change in row) / len(row)
            sizes.append(sqrt(mean / comb(2 * order, order)))
    return _AMPLITUDE * min(sizes)


class _Ladder:
    """The values of f on both sides, from the largest step to the smallest."""

    def __init__(self, at: float, noise: float) -> None:
        self._at = at
        self._noise = noise
        self._above: list[tuple[float, float]] = []  # (h, S+(h))
        self._below: list[tuple[float, float]] = []
        self._central: list[tuple[float, float]] = []
        self._gaps: list[tuple[float, float]] = []
        self._changes: list[list[tuple[float, float]]] = []  # (+-h, f(+-h) - f(0)) of each step

    def add(self, step: float, above: float | None, below: float | None) -> None:
        """Values at +step and -step."""
        self._changes.append(
            [(h, f - self._at) for h, f in ((step, above), (-step, below)) if f is not None]
        )
        if above is not None:
            self._above.append((step, (above - self._at) / step))
        if below is not None:
            self._below.append((step, (self._at - below) / step))
        if above is not None and below is not None:
            self._central.append((step, (above - below) / (2 * step)))
            self._gaps.append((step, (above - 2 * self._at + below) / step))

    def plateau(self) -> _Estimate | None:
        """Central differences, where neighbours agree best; needs three step sizes."""
        return _best(_extrapolated(self._central, _FACTOR**2), self._noise)

    def kink(self) -> _Estimate | None:
        """S+ - S- as h -> 0, if it stands clear of zero on the three smallest step sizes in a row.

        Of the steps, that is, on which the noise leaves it to be seen.
        The gap of a smooth f is f'' h, which the extrapolation takes out, up to its cube.
        """
        largest = max((abs(gap) for _, gap in self._gaps), default=0.0)
        gaps = [(h, gap) for h, gap in self._gaps if 12 * _CLEAR * self._noise < h * largest]
        found = _extrapolated(gaps, _FACTOR)[-2:]
        if len(found) < 2:
            return None
        (_, before), (step, last) = found
        spread = abs(last - before) + 4 * self._noise / step
        if abs(last) > _CLEAR * spread and abs(gaps[-1][1]) > 0.5 * abs(last):
            return _Estimate(last, abs(last), step)
        return None

    def is_settled(self, goal: float) -> bool:
        """Whether smaller steps would tell no more: the slope is as certain as it has to be.

        Or as the noise lets it be, or f does not change at all. A kink has to be looked at more
        closely: it may lie beside the point.
        """
        plateau = self.plateau()
        if plateau is None:
            return False
        if not any(slope for _, slope in (*self._above, *self._below)):
            return True
        enough = max(goal * abs(plateau.value), 1.5 * self._noise / plateau.step)
        kink = self.kink()
        return plateau.uncertainty <= enough and (kink is None or abs(kink.value) <= enough)

    def contradicts(self, gradient: float | None, goal: float) -> bool:
        """Whether the gradient is not the plateau's, beyond ten goals, or its remainder of order 1.

        The order tells kinks whose two slopes have the gradient as their mean.
        """
        plateau = self.plateau()
        if gradient is None or plateau is None or not isfinite(gradient):
            return False
        allowed = 3 * plateau.uncertainty + 10 * goal * abs(plateau.value)
        order = self.order(gradient)
        return abs(gradient - plateau.value) > allowed or (order is not None and order < 1.5)

    def order(self, gradient: float) -> float | None:
        """Slope of log |f(h) - f(0) - h g| over log h, on the three smallest resolved steps.

        The larger remainder of both sides counts, so that a one-sided slope has order 1 at a kink.
        """
        remainders = [
            (abs(changes[0][0]), max(abs(change - h * gradient) for h, change in changes))
            for changes in self._changes
            if changes
        ]
        points = [(log(h), log(r)) for h, r in remainders if _RESOLVED * self._noise < r < inf][-3:]
        if len(points) < 2:
            return None
        center = sum(x for x, _ in points) / len(points)
        spread = sum((x - center) ** 2 for x, _ in points)
        return sum((x - center) * y for x, y in points) / spread

    def slope(self) -> Slope | None:
        """What the ladder says."""
        plateau = self.plateau()
        if plateau is None:
            return self._one_sided()
        kink = self.kink()
        below, above = self._side(self._below), self._side(self._above)
        noise = 4 * self._noise / plateau.step
        resolved = kink is not None and abs(kink.value) > max(3 * plateau.uncertainty, noise)
        if kink is not None and resolved and below is not None and above is not None:
            mean = 0.5 * (below.value + above.value)
            uncertainty = max(below.uncertainty, above.uncertainty)
            sides = (below.value, above.value)
            return Slope(mean, uncertainty, kink.step, sides, "a kink: two slopes")
        return Slope(plateau.value, plateau.uncertainty, plateau.step)

    def _one_sided(self) -> Slope | None:
        for points, name, other in (
            (self._above, "above", "below"),
            (self._below, "below", "above"),
        ):
            side = self._side(points)
            if side is not None:
                note = f"slope from {name} only: no value {other}"
                return Slope(side.value, side.uncertainty, side.step, note=note)
        return None

    def _side(self, points: list[tuple[float, float]]) -> _Estimate | None:
        """A one-sided slope; it errs by b h + c h^2, and both are taken out."""
        return _best(_extrapolated(_extrapolated(points, _FACTOR), _FACTOR**2), 2 * self._noise)


def _extrapolated(points: list[tuple[float, float]], gain: float) -> list[tuple[float, float]]:
    """(gain S(h/4) - S(h))/(gain - 1) from neighbours on the ladder, at the smaller step."""
    return [
        (h, (gain * fine - coarse) / (gain - 1))
        for (before, coarse), (h, fine) in pairwise(points)
        if before < 1.5 * _FACTOR * h
    ]


def _best(points: list[tuple[float, float]], noise: float) -> _Estimate | None:
    """The value whose neighbour on the ladder agrees with it best."""
    estimates = [
        _Estimate(value, max(abs(value - before), noise / step), step)
        for (_, before), (step, value) in pairwise(points)
    ]
    return min(estimates, key=lambda estimate: estimate.uncertainty, default=None)
