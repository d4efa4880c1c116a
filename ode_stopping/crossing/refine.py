"""The step with a crossing in it, taken again to end there."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..call import Call, Watch
from ..solving.solver import Function
from ..solving.step import Step
from .point import Crossing

__all__ = ["refine"]

_ITERATIONS = 8
# J meets its target to this, relative to it, or to its rounding.
_CLOSE = 1e-13
# An end that would differ from a step's own by this many roundings need not be computed again.
_ROUNDINGS = 10


def refine(
    call: Call, flow: Function, step: Step, watch: Watch, guess: float, end: float
) -> tuple[Step, Crossing]:
    """A partial step, from the start of a step to the crossing inside of it.

    Dense output is one order less accurate than the step itself, and much less after a long step.
    So the step is taken again with the length T - t_a, and T is corrected by Newton's method until
    J meets the target to its rounding.

    Args:
        call: The call.
        flow: (t, y) -> y' on this piece.
        step: A step from t_a, with the crossing in it or at its end.
        watch: What is met.
        guess: T on the dense output.
        end: T does not lie beyond this time.

    Returns:
        The step from step.t0 to T, and what is known there.
    """
    found: tuple[Step, Crossing] | None = None
    t = guess
    for _ in range(_ITERATIONS):
        shorter = _ending(call, flow, step if found is None else found[0], t)
        point = Crossing.at(watch.criterion, t, shorter.y1, shorter.f1)
        residual = point.value - watch.target
        if found is not None and not abs(residual) < abs(found[1].value - watch.target):
            break
        found = (shorter, point)
        rate = point.rate
        if abs(residual) <= max(point.rounding, _CLOSE * abs(watch.target)) or rate == 0.0:
            break
        # At a grazing crossing Newton runs away: the point on the dense output stays.
        proposal = min(t - residual / rate, end)
        if not step.t0 < proposal:
            break
        if abs(proposal - t) <= 2.0**-52 * abs(t):
            break
        t = proposal
    assert found is not None
    return found


def _ending(call: Call, flow: Function, step: Step, t: float) -> Step:
    """The step, ending at t: as it is, with its end moved, or taken again."""
    if t == step.t1:
        return step
    shift = t - step.t1
    rounding = torch.finfo(step.y1.dtype).eps * float(step.y1.abs().max())
    # d y1 / d t1 is y1', but for a few times error / length.
    if abs(shift) * float(step.error.abs().max()) <= rounding * step.length:
        y1 = torch.add(step.y1, step.f1, alpha=shift)
        f1 = flow(t, y1)
        # Twice what the straight line misses.
        if abs(shift) * float((f1 - step.f1).abs().max()) <= _ROUNDINGS * rounding:
            return replace(step, t1=t, y1=y1, f1=f1)
    return call.method.trial(flow, step.t0, step.y0, step.f0, t)
