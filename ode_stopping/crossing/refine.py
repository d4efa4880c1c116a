"""The step with a crossing in it, taken again to end there."""

from __future__ import annotations

from ..call import Call
from ..solving.solver import Function
from ..solving.step import Step
from .point import Crossing

__all__ = ["refine"]

_ITERATIONS = 8
# J meets its target to this, relative to it, or to its rounding.
_CLOSE = 1e-13


def refine(
    call: Call, flow: Function, step: Step, target: float, guess: float
) -> tuple[Step, Crossing]:
    """A partial step, from the start of a step to the crossing inside of it.

    Dense output is one order less accurate than the step itself, and much less after a long step.
    So the step is taken again with the length T - t_a, and T is corrected by Newton's method until
    J meets the target to its rounding.

    Args:
        call: The call.
        flow: (t, y) -> y' on this piece.
        step: The step with the crossing in it.
        target: eps.
        guess: T on the dense output.

    Returns:
        The step from step.t0 to T, and what is known there.
    """
    found: tuple[Step, Crossing] | None = None
    t = guess
    for _ in range(_ITERATIONS):
        shorter = call.method.trial(flow, step.t0, step.y0, step.f0, t)
        point = Crossing.at(call, t, shorter.y1, shorter.f1)
        residual = point.value - target
        if found is not None and not abs(residual) < abs(found[1].value - target):
            break
        found = (shorter, point)
        rate = point.rate
        if abs(residual) <= max(point.rounding, _CLOSE * abs(target)) or rate == 0.0:
            break
        # At a grazing crossing Newton runs away: the point on the dense output stays.
        proposal = min(t - residual / rate, step.t1)
        if not step.t0 < proposal:
            break
        if abs(proposal - t) <= 2.0**-52 * abs(t):
            break
        t = proposal
    assert found is not None
    return found
