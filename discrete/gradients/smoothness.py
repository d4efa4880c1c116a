"""Does the criterion have a derivative where the run met its target?

Three things leave none, and autograd mentions none of them: J goes in jumps between x_{N-1} and
x_N (an accuracy, a counter, a rounding), so that grad J knows nothing of the decrease; x_N lies on
a flat piece of J; x_N lies on a kink of J (the larger of two residuals, where they are equal).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ode_stopping.core.status import KinkWarning, StoppingWarning
from ode_stopping.core.warn import warn_user

from .problem import IndexProblem

__all__ = ["Smoothness", "look_at_criterion"]

# The decrease and the trapezoidal rule agree to this share where J is smooth and the step short.
AGREEMENT = 1e-2
# A jump is what remains of the decrease on the smallest piece of the step.
JUMP = 1e-4
# Part of the last step, and of the size of the state, over which one-sided slopes are taken.
REACH = 1e-3
# Share of the slope by which one-sided slopes differ at a kink.
KINK = 1e-2


@dataclass(frozen=True)
class Smoothness:
    """What was seen of J over the last step.

    Attributes:
        jumps: J changes at once somewhere between x_{N-1} and x_N.
        flat: The gradient of J at x_N (to x, t and all leaves) is zero, although J_N != J_{N-1}.
        kink: The one-sided slopes of J at x_N differ.
    """

    jumps: bool = False
    flat: bool = False
    kink: bool = False

    @property
    def refusal(self) -> str:
        """Why the index has no derivative; empty where it may have one."""
        if not (self.jumps and self.flat):
            return ""
        return (
            "the criterion is piecewise constant: it changes in jumps, and its gradient is zero in "
            "between (an accuracy, a counter, a rounding), so the gradient of the index would be "
            "zero whatever the parameters do. Use a smooth criterion in its place (the loss "
            "instead of the accuracy), or gradient=None where N alone is wanted"
        )

    def warn(self, n: int, whose: str = "") -> None:
        """Say what leaves the derivative of the index N = n in doubt; of which sample, in front."""
        if self.refusal:
            return  # said in the backward pass, where it matters
        if self.jumps:
            message = (
                f"the criterion jumps between steps {n - 1} and {n}: the jump is in J_N - J_(N-1), "
                "but not in its gradient, so the gradient of the index is too small or wrong. "
                "Use a criterion that is continuous"
            )
            warn_user(whose + message, StoppingWarning)
        elif self.flat:
            message = (
                f"the gradient of the criterion at step {n} is zero, although J changed in this "
                "step: the run ended on a flat piece of J, or at its extremum, where Definition 3 "
                'is zero. Choose a target that is met earlier, or interpolation="log" or '
                '"partial_step"'
            )
            warn_user(whose + message, StoppingWarning)
        elif self.kink:
            message = (
                f"the criterion has a kink at x_{n} (the larger of two residuals, where they are "
                "equal?): the index has one-sided derivatives only, and the gradient is the one "
                "that torch's own functions choose there"
            )
            warn_user(whose + message, KinkWarning)


def look_at_criterion(problem: IndexProblem) -> Smoothness:
    """Look for jumps, flat pieces and kinks of J; some five evaluations where there are none.

    The end of the step is compared with the trapezoidal rule. Where they disagree the step is
    halved again and again towards the larger change of J: of a continuous J nothing is left.
    """
    criterion, clock, n = problem.criterion, problem.clock, problem.index
    step = problem.state - problem.previous
    after, flat = _slope(problem, n, problem.state, step)
    before, _ = _slope(problem, n - 1, problem.previous, step)
    eps = torch.finfo(problem.state.dtype).eps
    size = abs(problem.previous_loss) + abs(problem.loss)
    decrease = problem.decrease
    noise = 1e3 * eps * size
    jumps = False
    if abs(0.5 * (before + after) - decrease) > AGREEMENT * abs(decrease) + noise:

        def loss(s: float) -> float:
            return criterion.value(clock.time(n - 1 + s), problem.previous + s * step)

        change, width = _concentrated(loss, problem)
        jumps = abs(change) > max(JUMP, 100 * width) * abs(decrease) + noise
    flat = flat and decrease != 0.0
    kink = not (jumps or flat) and _has_kink(problem, step)
    return Smoothness(jumps, flat, kink)


def _slope(problem: IndexProblem, k: int, x: Tensor, step: Tensor) -> tuple[float, bool]:
    """dJ/ds along the last step, s in [0, 1], at step k; and whether all of grad J is zero."""
    criterion, clock = problem.criterion, problem.clock
    time, state = criterion.inputs(clock.time(k), x)
    value = criterion.traced(time, state)
    if not value.requires_grad:
        return 0.0, True
    leaves = problem.leaves
    grads = torch.autograd.grad(
        value, [state, time, *leaves.tensors], allow_unused=True, retain_graph=True
    )
    by_state = 0.0 if grads[0] is None else float((grads[0].double() * step.double()).sum())
    by_time = 0.0 if grads[1] is None else float(grads[1]) * clock.step_value
    zero = all(gradient is None or not bool(gradient.any()) for gradient in grads)
    return by_state + by_time, zero


def _concentrated(loss: Callable[[float], float], problem: IndexProblem) -> tuple[float, float]:
    """The change of J over the smallest piece of the last step with most of it, and its width."""
    low, high = 0.0, 1.0
    at_low, at_high = problem.previous_loss, problem.loss
    # Down to what the dtype can tell apart in the state, with room for rounding.
    smallest = 1e4 * torch.finfo(problem.state.dtype).eps
    while high - low > max(smallest, 1e-9):
        middle = 0.5 * (low + high)
        at_middle = loss(middle)
        if abs(at_middle - at_low) >= abs(at_high - at_middle):
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
    return at_high - at_low, high - low


def _has_kink(problem: IndexProblem, step: Tensor) -> bool:
    """Whether the one-sided slopes at x_N differ, along a random mixture of what moves.

    Coordinates that the run does not move (a weight that a threshold holds at zero) do not count:
    a kink in them is none for the index. Of a smooth J the difference falls with the distance.
    """
    criterion, t = problem.criterion, problem.clock.time(problem.index)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(step.shape, generator=generator, dtype=torch.float64).to(step)
    direction = step * noise
    here = problem.loss

    def sides(size: float) -> tuple[float, float]:
        ahead = criterion.value(t, problem.state + size * direction)
        behind = criterion.value(t, problem.state - size * direction)
        return (ahead - here) / size, (here - behind) / size

    reach = REACH
    gaps = []
    for _ in range(2):
        ahead, behind = sides(reach)
        scale = max(abs(ahead), abs(behind))
        rounding = 100 * torch.finfo(problem.state.dtype).eps * abs(here) / reach
        gaps.append(abs(ahead - behind))
        if not gaps[-1] > KINK * scale + rounding:
            return False
        reach /= 16
    return gaps[1] > 0.5 * gaps[0]
