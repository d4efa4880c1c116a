"""Closed form 7 in NumPy: the heavy ball on two modes, whose criterion oscillates.

x_i'' + a x_i' + l_i x_i = 0 from rest, curvatures l = (1, 60), x0 = (1, 0.3), J = sum l_i x_i^2/2,
target 0.08. Each mode is known in closed form, so the first crossing is a root of a known function,
and whether it is the first one is a matter of looking at every dip. Nothing here is the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

CURVATURES = (1.0, 60.0)
START = (1.0, 0.3)
TARGET = 0.08
# The fast mode turns in 0.8; the first crossings of all dampings looked at lie before 2.5.
_END = 4.0
_SAMPLES = 16001
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Crossing:
    """Where J first meets the target.

    Attributes:
        time: T.
        minima: How many minima J has gone through before T.
    """

    time: float
    minima: int


def criterion(t: float | Vector, damping: float) -> tuple[Vector, Vector]:
    """J and J' at times of any shape.

    x = x0 e^{-at/2} (cos wt + a/(2w) sin wt) and x' = -x0 (l/w) e^{-at/2} sin wt, with
    w = sqrt(l - a^2/4), for dampings below 2.
    """
    time = np.asarray(t, dtype=np.float64)[..., None]
    curvature, start = np.array(CURVATURES), np.array(START)
    w = np.sqrt(curvature - 0.25 * damping**2)
    decay = start * np.exp(-0.5 * damping * time)
    x = decay * (np.cos(w * time) + 0.5 * damping / w * np.sin(w * time))
    v = -decay * curvature / w * np.sin(w * time)
    return 0.5 * (curvature * x * x).sum(-1), (curvature * x * v).sum(-1)


def first_crossing(damping: float) -> Crossing:
    """The first T with J(T) <= 0.08, and the minima before it.

    Raises:
        ValueError: A damping outside of (0, 2), or no crossing within the time looked at.
    """
    if not 0.0 < damping < 2.0:
        raise ValueError(f"damping must be in (0, 2), where both modes oscillate; got {damping:g}")
    times = np.linspace(0.0, _END, _SAMPLES)
    _, slopes = criterion(times, damping)
    # Where J' turns from minus to plus, to rounding; from t = 0 on J falls (J' = 0 there).
    dips = np.flatnonzero((slopes[1:-1] < 0.0) & (slopes[2:] >= 0.0)) + 1
    last = 0.0
    for minima, i in enumerate(dips):
        lowest = brentq(lambda t: float(criterion(t, damping)[1]), times[i], times[i + 1])
        if float(criterion(lowest, damping)[0]) <= TARGET:
            # From the maximum before the dip J only falls, so that the last point above will do.
            points = np.array([last, *times[(times > last) & (times < lowest)]])
            above = points[criterion(points, damping)[0] > TARGET][-1]
            root = brentq(lambda t: float(criterion(t, damping)[0]) - TARGET, above, lowest)
            return Crossing(float(root), minima)
        last = float(lowest)
    raise ValueError(f"J does not come down to {TARGET} before t = {_END:g}")


def jump(count: Callable[[float], int], low: float, high: float, width: float) -> float:
    """The damping at which a count changes, by bisection.

    Args:
        count: damping -> the oscillation that the crossing is on.
        low: A damping below the jump.
        high: One above it.
        width: Of the interval that is left.

    Raises:
        ValueError: The count is the same at both ends.
    """
    below = count(low)
    if count(high) == below:
        raise ValueError(f"no jump between the dampings {low:g} and {high:g}: {below} at both")
    while high - low > width:
        middle = 0.5 * (low + high)
        if count(middle) == below:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)
