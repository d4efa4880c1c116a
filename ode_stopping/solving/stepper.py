"""Adaptive steps of any method, one at a time: accept, reject, next size.

The usual `odeint` hides what a stopping time needs: each accepted step with its dense output, a
stop in the middle, a bound on the times at which the flow is evaluated, and an end other than an
assertion when the step size underflows.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite

import torch
from torch import Tensor

from .solver import Method, StepFailed
from .step import Step

__all__ = ["Stepper"]

# Step sizes follow the last two error ratios (a proportional-integral controller): at the limit of
# stability it rejects far fewer steps than one that looks at the last ratio alone.
_SAFETY = 0.9
_INTEGRAL = 0.04
# A tamer growth than torchdiffeq's 10: the criterion is watched between steps.
_LARGEST_FACTOR = 5.0
_SMALLEST_FACTOR = 0.2


class Stepper:
    """Adaptive steps of y' = f(s, y) from s0 up to s_end, one call a step.

    Args:
        method: Makes the steps.
        function: (s, y) -> y', s a float, y of shape (n,).
        start: s0.
        end: s_end; the function is never stepped beyond it.
        y0: Initial value, shape (n,).
        measure: The error of a trial step; it is accepted where that is <= 1. Not finite where the
            step is not.
        max_step: Largest step.
        first_step: Size that is tried first; None: one by scale.

    Attributes:
        accepted: Number of accepted steps.
        rejected: Number of rejected steps.
        time: Where the integration stands.
        value: y there.
        derivative: y' there.
        next_step: The size that is tried next.
        ratio: Error of the latest trial, in units of what is allowed.
    """

    def __init__(
        self,
        method: Method,
        function: Callable[[float, Tensor], Tensor],
        start: float,
        end: float,
        y0: Tensor,
        *,
        measure: Callable[[Step], float],
        max_step: float = inf,
        first_step: float | None = None,
    ) -> None:
        self.end = end
        self.accepted = 0
        self.rejected = 0
        self.time = start
        self.value = y0
        self._method = method
        self._function = function
        self._measure = measure
        self._max_step = min(max_step, max(end - start, 0.0) or inf)
        self.ratio = 1.0
        self._nonfinite = False
        self._previous_ratio = 1e-4
        self._before: tuple[float, Tensor, Tensor] | None = None
        self.derivative = function(start, y0)
        first = first_step if first_step is not None else self._first_step()
        self.next_step = min(first, end - start)
        if not (isfinite(self.next_step) and self.next_step > 0):
            self.next_step = 1e-6 * max(abs(end - start), 1e-300)

    def _first_step(self) -> float:
        """A first guess that scales with the state and with time, as the flow does.

        The state changes by its own size in |y|/|f|, the velocity by its own in |f|/|f'|; a method
        of order p takes about rtol^(1/p) of that, and errs on the small side.
        """
        y, f, length = self.value, self.derivative, self.end - self.time
        size, speed = torch.stack([y.norm(), f.norm()]).tolist()
        if not (isfinite(speed) and speed > 0):
            return 1e-6 * min(length, 1.0)
        probe = min(1e-4 * size / speed if size > 0 else 1e-6, 0.1 * length)
        moved = self._function(self.time + probe, torch.add(y, f, alpha=probe))
        change = float((moved - f).norm()) / probe
        guesses = [speed / change] if change > 0 and isfinite(change) else []
        if size > 0:
            guesses.append(size / speed)
        return 1e-2 * min(guesses, default=probe)

    @property
    def done(self) -> bool:
        """Whether the end has been reached, to rounding."""
        return self.time >= self.end - 4 * _spacing(self.end)

    @property
    def tried(self) -> int:
        """Number of all steps."""
        return self.accepted + self.rejected

    def attempt(self) -> Step | None:
        """Try one step: the step if it was accepted, None if it was rejected (call again).

        Raises:
            StepFailed: The step size underflowed.
        """
        t = self.time
        size = min(self.next_step, self._max_step)
        # The last step may be short because the end is near; a step that was *reduced* to this is a
        # failure.
        if min(size, self.end - t) <= 2 * _spacing(t):
            reason = "non-finite values" if self._nonfinite else "the error estimate"
            raise StepFailed(
                f"step size underflow at t = {t:.9g} ({reason})", nonfinite=self._nonfinite
            )
        end = self.end if t + size >= self.end else t + size
        step = self._method.trial(self._function, t, self.value, self.derivative, end)
        ratio = self.ratio = self._measure(step)
        if not isfinite(ratio):
            self.next_step = 0.1 * (end - t)
            self._nonfinite = True
            self.rejected += 1
            return None
        self.next_step = (end - t) * self._factor(ratio)
        if ratio > 1.0:
            self.rejected += 1
            return None
        self._previous_ratio = max(ratio, 1e-4)
        self._nonfinite = False
        self.accepted += 1
        self._before = (t, self.value, self.derivative)
        self.time, self.value, self.derivative = end, step.y1, step.f1
        return step

    def _factor(self, ratio: float) -> float:
        """By how much the next step is longer, from this error ratio and the one before."""
        order = self._method.order
        if ratio > 1.0:
            return max(_SAFETY * ratio ** (-1 / order), _SMALLEST_FACTOR)
        if ratio == 0.0:
            return _LARGEST_FACTOR
        exponent = 1 / order - 0.75 * _INTEGRAL
        factor = _SAFETY * ratio**-exponent * self._previous_ratio**_INTEGRAL
        return min(max(factor, 0.5), _LARGEST_FACTOR)

    def take_back(self, fraction: float) -> None:
        """Undo the latest accepted step; the next attempt is `fraction` of its length."""
        assert self._before is not None
        length = self.time - self._before[0]
        self.time, self.value, self.derivative = self._before
        self.next_step = fraction * length
        self.accepted -= 1
        self.rejected += 1

    def limit_next_step(self, size: float) -> None:
        """Make the next attempt no longer than `size`."""
        self.next_step = min(self.next_step, size)

    def integrate(
        self, max_steps: int, *, after_step: Callable[[Step], None] | None = None
    ) -> Tensor:
        """Step to the end and return y there.

        Raises:
            StepFailed: The step size underflowed, or `max_steps` was used up.
        """
        while not self.done:
            if self.tried >= max_steps:
                raise StepFailed(
                    f"no end after {max_steps} steps, at {self.time:.6g}", nonfinite=False
                )
            step = self.attempt()
            if step is not None and after_step is not None:
                after_step(step)
        return self.value


def _spacing(t: float) -> float:
    """Distance from |t| to the next float64."""
    return 2.0**-52 * max(abs(t), 1e-300)
