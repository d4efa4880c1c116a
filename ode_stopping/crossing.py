"""The first downward crossing of the target inside one accepted step, and its refinement.

Solvers look at step ends only. A criterion that dips below the target and comes back inside one step would
be missed, so interior points of the dense output are looked at, and an interval is cleared only when the
curvature seen in J leaves no room for a dip.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import cast

from scipy.optimize import brentq

from .evaluation import CriterionMap
from .solver import Step, Stepper

__all__ = ["NonFiniteCriterion", "Scan", "refine", "scan_step"]

# Two interior points, not symmetric and not at simple fractions, so that a periodic J is not aliased.
_INTERIOR = (0.36, 0.71)
_MAX_DEPTH = 7
# A parabola dips below its chord's ends by at most the deviation at the middle; twice that is looked at.
_SAFETY = 2.0


class NonFiniteCriterion(Exception):
    """J became NaN or infinite at `time`."""

    def __init__(self, time: float) -> None:
        super().__init__(f"non-finite criterion at t = {time:.9g}")
        self.time = time


@dataclass(frozen=True)
class Scan:
    """What was seen of J in one step.

    Attributes:
        end_value: J at the end of the step.
        best_value: Smallest J seen.
        best_time: Where.
        crossing: Time of the first crossing on the dense output, or None.
    """

    end_value: float
    best_value: float
    best_time: float
    crossing: float | None


@dataclass
class _Samples:
    step: Step
    criterion: CriterionMap
    target: float
    best: tuple[float, float]

    def time(self, s: float) -> float:
        return self.step.t1 if s == 1.0 else self.step.t0 + s * (self.step.t1 - self.step.t0)

    def at(self, s: float) -> float:
        state = self.step.y1 if s == 1.0 else self.step.at_fraction(s)
        value = self.criterion.value(self.time(s), state)
        if not isfinite(value):
            raise NonFiniteCriterion(self.time(s))
        self.best = min(self.best, (value, self.time(s)))
        return value

    def excess(self, s: float) -> float:
        return self.at(s) - self.target


def scan_step(step: Step, criterion: CriterionMap, start_value: float, target: float) -> Scan:
    """Look for the first crossing in a step whose start is above the target.

    Args:
        step: The accepted step.
        criterion: J.
        start_value: J at the start of the step, > target.
        target: eps.

    Raises:
        NonFiniteCriterion: J is NaN or infinite at a point that was looked at.
    """
    samples = _Samples(step, criterion, target, (start_value, step.t0))
    nodes = (0.0, *_INTERIOR, 1.0)
    values = [start_value, *(samples.at(s) for s in nodes[1:])]
    bend = _bend(nodes, values)
    for a, b, va, vb in zip(nodes[:-1], nodes[1:], values[:-1], values[1:], strict=True):
        bracket = _first_bracket(samples, a, va, b, vb, bend, 0)
        if bracket is not None:
            s = cast("float", brentq(samples.excess, *bracket, xtol=1e-15, rtol=1e-14))
            return Scan(values[-1], *samples.best, crossing=samples.time(s))
    return Scan(values[-1], *samples.best, crossing=None)


def _bend(nodes: tuple[float, ...], values: list[float]) -> float:
    """Largest deviation of an interior value from the chord of its neighbours."""
    deviations = []
    for i in range(1, len(nodes) - 1):
        weight = (nodes[i] - nodes[i - 1]) / (nodes[i + 1] - nodes[i - 1])
        chord = (1 - weight) * values[i - 1] + weight * values[i + 1]
        deviations.append(abs(values[i] - chord))
    return max(deviations)


def _first_bracket(
    samples: _Samples, a: float, va: float, b: float, vb: float, bend: float, depth: int
) -> tuple[float, float] | None:
    """The first subinterval [a, b] with J(a) > target >= J(b), or None if there is no room for one."""
    above = min(va, vb) - samples.target
    if vb <= samples.target and (depth >= _MAX_DEPTH or abs(va - vb) > _SAFETY * bend):
        return a, b
    if above > _SAFETY * bend or depth >= _MAX_DEPTH:
        return None
    m = 0.5 * (a + b)
    vm = samples.at(m)
    # The bend of a half is a quarter of the whole's for a parabola; what is seen counts if it is more.
    inner = max(abs(vm - 0.5 * (va + vb)), 0.25 * bend) if depth == 0 else abs(vm - 0.5 * (va + vb))
    left = _first_bracket(samples, a, va, m, vm, 0.5 * inner, depth + 1)
    if left is not None or vm <= samples.target:
        return left if left is not None else (a, m)
    return _first_bracket(samples, m, vm, b, vb, 0.5 * inner, depth + 1)


def refine(stepper: Stepper, step: Step, criterion: CriterionMap, target: float, guess: float) -> Step:
    """The last step again, ending at the crossing.

    Dense output is one order less accurate than the step itself, and much less after a long step. So the step
    is taken again with the length T - t_a, and T is corrected by Newton's method until J meets the target.

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
        if not step.t0 < proposal <= step.t1 + 0.1 * (step.t1 - step.t0):
            break
        if abs(proposal - t) <= 2.0**-52 * abs(t):
            break
        t = proposal
    assert best is not None
    return best[1]
