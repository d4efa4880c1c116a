"""The last steps before a crossing, taken again: finer, so that the noise in them is damped.

The control of the velocity keeps the noise of explicit steps at their limit of stability down to a
few tolerances of the flow. grad J may weigh it once more by the curvature (J = |grad f|^2 does),
and J'(T) and lam(T) are made of it. Over a few finer steps the flow itself damps that noise,
whatever the criterion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from ..call import Call, Watch
from ..solving.errors import StateError, VelocityError
from ..solving.flow_map import FlowPiece
from ..solving.solver import StepFailed
from ..solving.step import Step
from ..solving.stepper import Stepper
from .path import Path
from .scan import Met, NonFiniteCriterion, scan_step

__all__ = ["Approach", "approach", "polished"]

_POLISH = 1e-2
_POLISH_LIMIT = 500
# Noise at the limit of stability (a few units of 1/h) is damped at this rate and more, per h, by
# steps of this share of h and less (dopri5: by a factor of 5 a step between 0.5 and 0.7).
_DAMPING = 3.0
_FASTEST = 0.5
_SHARE = 0.7
_MOST = 4
# The steps have errors of their own besides.
_ALLOWED = 0.9


def polished(
    call: Call, flow: FlowPiece, path: Path, coarse: Step, end: float, watch: Watch
) -> tuple[list[tuple[Step, float]], Step, Met] | None:
    """The last few steps again, at a hundredth of the tolerance.

    Args:
        call: The call.
        flow: The flow on this piece of time.
        path: The path; its recent steps are the ones that are taken again.
        coarse: The step with the crossing in it.
        end: End of the piece.
        watch: The target, as it was where those steps begin.

    Returns:
        The finer steps with the shown J at their ends, the one with the crossing, and that; or None
        where they have no crossing (a touch within the tolerance).
    """
    recent = path.recent()
    # Right after a jump, or after another target, the step with the crossing alone.
    first = recent[0] if recent else coarse
    tolerances = call.tolerances.finer(_POLISH, call.x0.dtype)
    state = StateError(call.layout, tolerances)
    fine = Stepper(
        call.method,
        flow,
        first.t0,
        min(coarse.t1 + coarse.length, end),
        first.y0,
        measure=VelocityError(flow, state, call.layout, tolerances),
        max_step=call.solver.max_step,
        first_step=0.25 * first.length,
    )
    shown = path.criterion is watch.criterion
    value = path.values[-1 - len(recent)]
    if not shown:
        value = watch.criterion.value(first.t0, first.y0)
    steps: list[tuple[Step, float]] = []
    while not fine.done and fine.tried < _POLISH_LIMIT:
        try:
            step = fine.attempt()
            if step is None:
                continue
            dense = call.method.dense(step)
            rtol = call.tolerances.rtol
            scan = scan_step(step, dense, watch.criterion, value, [watch], rtol=rtol)
        except (StepFailed, NonFiniteCriterion):
            return None
        if scan.met:
            return steps, step, scan.met[0]
        if scan.left:
            watch = watch.counting()
        value = scan.end_value
        steps.append((step, value if shown else path.value_at(step.t1, step.y1)))
    return None


@dataclass(frozen=True)
class Approach:
    """A few steps of equal length to a time inside of a step.

    Attributes:
        first: They begin where this step does.
        count: How many.
        damping: By which factor they damp noise in the fast modes.
    """

    first: Step
    count: int
    damping: float

    def steps(self, call: Call, flow: FlowPiece, time: float) -> list[Step]:
        """The steps; the last is left as it is given where there is one only."""
        first, taken = self.first, []
        t, y, f = first.t0, first.y0, first.f0
        bounds = [t + i * (time - t) / self.count for i in range(1, self.count)] + [time]
        for end in bounds if self.count > 1 else ():
            taken.append(call.method.trial(flow, t, y, f, end))
            t, y, f = end, taken[-1].y1, taken[-1].f1
        return taken or [first]


def approach(recent: Sequence[Step], coarse: Step, time: float, noise: float) -> Approach | None:
    """The fewest steps to a time inside of a step that damp the noise as far as is needed.

    Args:
        recent: The steps before, which may be taken again.
        coarse: The step.
        time: A time inside of it.
        noise: What is to be damped, over what is allowed.
    """
    if noise <= _ALLOWED:
        return Approach(coarse, 1, 1.0)
    found: list[Approach] = []
    for first in (coarse, *recent[-1:]):
        length, longest = time - first.t0, max(first.length, coarse.length)
        for count in range(1, _MOST + 1):
            share = length / count / longest
            damping = exp(-_DAMPING * min(share, _FASTEST)) ** count
            if share <= _SHARE and noise * damping <= _ALLOWED:
                found.append(Approach(first, count, damping))
                break
    return min(found, key=lambda one: one.count, default=None)
