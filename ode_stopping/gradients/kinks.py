"""Kinks of the criterion at a crossing: which derivative it is, and a word of warning.

The larger of two residuals where they are equal, a combination of criteria at a tie, |x| at zero:
J has a derivative on each side, and so has T. The answer is the one of the side from which the run
came. Where x_T is nearer to the kink than the solver can tell, it is one of the two as well.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..call import Call
from ..core.consistency import natural_size, noise_like
from ..core.status import KinkWarning
from ..core.warn import warn_user
from ..crossing.point import Crossing
from ..crossing.watch import Hit
from .problem import StoppingProblem

__all__ = ["one_sided", "with_kinks"]

# Slopes of two sides that differ by more than this share are those of a kink, if ...
_KINK = 0.02
# ... their difference does not fall with the distance, as that of a curved J does.
_NEARER = 0.25
_CURVED = 0.3
# How long before T the derivatives are taken, relative to T - t0: so many rtol, within bounds.
_ASIDE = 10.0
_LEAST, _MOST = 1e-7, 1e-3


def with_kinks(problem: StoppingProblem) -> StoppingProblem:
    """The problem with one-sided derivatives at the crossings that are on a kink of J.

    Costs two evaluations of the criterion a hit, and some more where there is one.

    Warns:
        KinkWarning: Such a crossing was met.
    """
    with torch.no_grad():
        hits = tuple(_looked_at(problem.call, hit) for hit in problem.hits)
    unchanged = all(new is old for new, old in zip(hits, problem.hits, strict=True))
    return problem if unchanged else replace(problem, hits=hits)


def one_sided(call: Call, point: Crossing) -> Crossing:
    """A crossing on a kink, with the derivatives of the side from which the run came.

    They are taken a little before T, at which the kink is behind the error of x_T: so all routes,
    and the same path on other steps, are on one side of it.
    """
    share = min(max(_ASIDE * call.tolerances.rtol, _LEAST), _MOST)
    aside = share * (point.time - call.start)
    _, gradient, rate = point.criterion.gradient(
        point.time - aside, point.state - aside * point.velocity
    )
    return replace(point, gradient=gradient, explicit_rate=rate, aside=aside)


def _looked_at(call: Call, hit: Hit) -> Hit:
    point = hit.point
    assert point is not None
    if hit.watch.time is not None or not _is_kink(call, point):
        return hit
    warn_user(
        f"the criterion has a kink at t = {point.time:.6g} (the larger of two residuals, criteria "
        "that are met at once, an absolute value at zero?), nearer to it than the solver can tell: "
        "the stopping time has one derivative on each side, and the gradient is the one of the "
        "side from which the run came.",
        KinkWarning,
    )
    return replace(hit, point=one_sided(call, point))


def _is_kink(call: Call, point: Crossing) -> bool:
    """Whether one-sided differences at x_T, no longer than its error, disagree."""
    eps = torch.finfo(point.state.dtype).eps
    length = max(2 * call.tolerances.rtol, 10 * eps**0.5)
    move = noise_like(seed=3)(point.state) * natural_size(point.state)
    noise = 100 * point.rounding

    def gap(h: float) -> tuple[float, float]:
        ahead, behind = (point.criterion.value(point.time, point.state + s * move) for s in (h, -h))
        rise, fall = (ahead - point.value) / h, (point.value - behind) / h
        return rise - fall, max(abs(rise), abs(fall)) * _KINK + noise / h

    far, allowed = gap(length)
    if not abs(far) > allowed:
        return False
    # A kink at some distance may look like a curve on one pair of lengths, but not on two.
    for other, share in ((_NEARER * length, _NEARER), (length / _NEARER, 1 / _NEARER)):
        near, rounded = gap(other)
        if abs(near - share * far) > max(_CURVED * max(1.0, share) * abs(far), rounded):
            return True
    return False
