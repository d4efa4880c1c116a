"""The first downward crossing of the target inside one accepted step, and its refinement.

Solvers look at step ends only. A criterion that dips below the target and comes back inside one
step would be missed, so J is sampled on the dense output and followed by a local cubic. Where the
cubic, less twice its error, stays above the target, the interval is cleared; else it is split, at
the cubic's lowest point. A step over which the samples do not look like a cubic at all (a trivial
flow with an oscillating criterion: the solver's steps grow without limit) is taken again, shorter,
and the growth of steps is held to what J allows.
"""

from __future__ import annotations

from ..core.functions import CriterionMap
from ..solving.step import Step
from ..solving.stepper import Stepper

__all__ = ["refine"]


def refine(
    stepper: Stepper, step: Step, criterion: CriterionMap, target: float, guess: float
) -> Step:
    """The last step again, ending at the crossing.

    Dense output is one order less accurate than the step itself, and much less after a long step.
    So the step is taken again with the length T - t_a, and T is corrected by Newton's method until
    J meets the target.

    Args:
        stepper: The stepper that took the step.
        step: The step with the crossing in it.
        criterion: J.
        target: eps.
        guess: T on the dense output.

    Returns:
        The step from step.t0 to T.
    """
    derivative = step.coefficients[1] / (step.t1 - step.t0)
    best: tuple[float, Step] | None = None
    t = guess
    for _ in range(8):
        shorter, velocity = stepper.shortened(step, derivative, t)
        value, g, explicit = criterion.gradient(t, shorter.y1)
        residual = value - target
        if best is not None and not abs(residual) < best[0]:
            break
        best = (abs(residual), shorter)
        rate = float(g @ velocity) + explicit
        if residual == 0.0 or rate == 0.0:
            break
        proposal = t - residual / rate
        # At a grazing crossing Newton runs away: the point on the dense output stays.
        proposal = min(proposal, step.t1)
        if not step.t0 < proposal:
            break
        if abs(proposal - t) <= 2.0**-52 * abs(t):
            break
        t = proposal
    assert best is not None
    return best[1]
