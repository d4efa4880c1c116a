"""Warnings about results that the arithmetic, not the method, makes inaccurate."""

from __future__ import annotations

import warnings

import torch

from ..core.status import GradientAccuracyWarning, MissingGradientError, StoppingWarning
from ..crossing.point import Crossing
from ..solving.tolerances import Tolerances
from . import DirectAdjoint, GradientRoute
from .problem import StoppingProblem

__all__ = ["warn_about_clock", "warn_about_rounding"]

_NEAR_JUMP_PER_RTOL = 50.0


def warn_about_clock(problem: StoppingProblem, route: GradientRoute, *, t0_wanted: bool) -> None:
    """Warn where T falls on a jump of the flow, and where the flow reads t as a number.

    Raises:
        MissingGradientError: The route needs the derivative to t that the flow loses.
    """
    near = _NEAR_JUMP_PER_RTOL * problem.tolerances.rtol * problem.span
    for jump in problem.times[1:-1]:
        if abs(problem.end - jump) <= near:
            warnings.warn(
                f"the stopping time falls on the breakpoint {jump:g}, where it has one derivative "
                "on each side: this is one of them. Move the target a little.",
                GradientAccuracyWarning,
                stacklevel=5,
            )
    if not problem.flow.reads_clock_blindly:
        return
    what = (
        "the flow reads t as a number (t.item(), float(t), NumPy), so its derivative with respect "
        "to t is lost"
    )
    if isinstance(route, DirectAdjoint) and t0_wanted:
        raise MissingGradientError(
            f"{what}, which DirectAdjoint needs for dT/dt0: compute with t itself, or use "
            "InterpolatingAdjoint"
        )
    warnings.warn(
        f"{what}: gradients do not need it, but the identity that checks them does, and is left "
        "out of the evidence. Compute with t itself (torch.sin(t)).",
        StoppingWarning,
        stacklevel=5,
    )


def warn_about_rounding(crossing: Crossing, start: float, tolerances: Tolerances) -> None:
    """Warn where the rounding noise of J, divided by |J'|, is above the tolerance on T.

    The noise is estimated as eps_machine (|J| + sum_i |g_i x_i|): J itself is rounded, and so is x.
    """
    state = crossing.state
    eps = torch.finfo(state.dtype).eps
    noise = eps * (abs(crossing.value) + float((crossing.gradient * state).abs().sum()))
    in_time = noise / abs(crossing.rate)
    allowed = tolerances.rtol * max(abs(crossing.time - start), abs(crossing.time))
    if in_time > allowed:
        warnings.warn(
            f"rounding in {state.dtype} moves the stopping time by about {in_time:.2g}, more than "
            "the tolerance "
            f"{allowed:.2g}: the criterion is too flat at the target for this dtype. Use float64, "
            "a larger target, "
            "or a larger rtol.",
            StoppingWarning,
            stacklevel=4,
        )
