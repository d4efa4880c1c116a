"""The slope of a function of one number by differences on a ladder of step sizes.

Central differences err by c h^2, so with h falling by the factor 4 the combination
(16 D(h/4) - D(h))/15 errs by c h^4, until the noise of the function, divided by h, takes over. The
value that is reported is that of the plateau in between: where neighbouring combinations agree
best. The two one-sided slopes S+(h) and S-(h) come closer as h does where the function is
differentiable; where they do not, the function has a kink, and both are reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Slope", "measure_slope"]

_FACTOR = 4.0
_LEVELS = 8
# A kink has to stand this far above what noise and curvature can make of a difference of slopes.
_CLEAR = 20.0


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
    """

    value: float
    uncertainty: float
    step: float
    sides: tuple[float, float] | None = None
    note: str = ""


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
) -> Slope | None:
    """Slope at 0 of a function of one number; None where it could not be measured.

    Args:
        function: Step h to f(h); None where f has no value there.
        at: f(0).
        noise: Absolute error of one value of f.
        goal: Relative uncertainty that is small enough to stop at; up to 8 step sizes are tried.
        largest: Largest step size.
    """
    ladder = _Ladder(at, noise)
    step = largest
    for _ in range(_LEVELS):
        ladder.add(step, function(step), function(-step))
        if ladder.is_settled(goal):
            break
        step /= _FACTOR
    return ladder.slope()


class _Ladder:
    """The values of f on both sides, from the largest step to the smallest."""

    def __init__(self, at: float, noise: float) -> None:
        self._at = at
        self._noise = noise
        self._above: list[tuple[float, float]] = []  # (h, S+(h))
        self._below: list[tuple[float, float]] = []
        self._central: list[tuple[float, float]] = []
        self._gaps: list[tuple[float, float]] = []

    def add(self, step: float, above: float | None, below: float | None) -> None:
        """Values at +step and -step."""
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

        The gap of a smooth f is f'' h, which the extrapolation takes out, up to its cube.
        """
        found = _extrapolated(self._gaps, _FACTOR)[-2:]
        if len(found) < 2:
            return None
        (_, before), (step, last) = found
        spread = abs(last - before) + 4 * self._noise / step
        if abs(last) > _CLEAR * spread and abs(self._gaps[-1][1]) > 0.5 * abs(last):
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
