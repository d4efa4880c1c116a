"""Warnings about results that the arithmetic, not the method, makes inaccurate."""

from __future__ import annotations

from ..core.status import (
    GradientAccuracyWarning,
    KinkWarning,
    MissingGradientError,
    StoppingWarning,
)
from ..core.warn import warn_user
from ..crossing.point import Crossing
from .chain import Chain
from .problem import StoppingProblem
from .route import GradientRoute

__all__ = ["warn_about_clock", "warn_about_learned_times", "warn_about_rounding"]

_NEAR_JUMP_PER_RTOL = 50.0


def warn_about_clock(problem: StoppingProblem, route: GradientRoute, *, t0_wanted: bool) -> None:
    """Warn where a T falls on a jump of the flow, and where the flow reads t as a number.

    Raises:
        MissingGradientError: The route needs the derivative to t that the flow loses.
    """
    for hit in problem.hits:
        if hit.watch.time is not None:
            continue
        near = _NEAR_JUMP_PER_RTOL * problem.tolerances.rtol * (hit.time - problem.start)
        for jump in problem.call.times[1:-1]:
            if abs(hit.time - jump) <= near:
                warn_user(
                    f"the stopping time falls on the breakpoint {jump:g}, where it has one "
                    "derivative on each side: this is one of them. Move the target a little.",
                    GradientAccuracyWarning,
                )
    if problem.knows_time:
        return
    what = (
        "the flow reads t as a number (t.item(), float(t), NumPy), so its derivative with respect "
        "to t is lost"
    )
    if route.own_graph and t0_wanted:
        raise MissingGradientError(
            f"{what}, which {type(route).__name__} needs for dT/dt0: compute with t itself, or use "
            "StepAdjoint or InterpolatingAdjoint"
        )
    warn_user(
        f"{what}: gradients do not need it, but the identity that checks them does, and is left "
        "out of the evidence. Compute with t itself (torch.sin(t)).",
        StoppingWarning,
    )


def warn_about_learned_times(chain: Chain) -> None:
    """Warn where a breakpoint that requires grad falls on t0 or on a T."""
    places = {hit.time: "a stopping time" for hit in chain.hits if hit.watch.time is None}
    places[chain.start] = "the start"
    for time in chain.call.learned:
        if time in places:
            warn_user(
                f"the breakpoint {time:g} falls on {places[time]}, where the derivative to it is "
                "another on each side: this is the one of the side on which it does not matter.",
                KinkWarning,
            )


def warn_about_rounding(problem: StoppingProblem, crossing: Crossing) -> None:
    """Warn where the rounding noise of J, divided by |J'|, is above the tolerance on T."""
    in_time = crossing.rounding / abs(crossing.rate)
    start, rtol = problem.start, problem.tolerances.rtol
    allowed = rtol * max(abs(crossing.time - start), abs(crossing.time))
    if in_time > allowed:
        warn_user(
            f"rounding in {crossing.state.dtype} moves the stopping time by about {in_time:.2g}, "
            f"more than the tolerance {allowed:.2g}: the criterion is too flat at the target for "
            "this dtype. Use float64, a target that is met earlier, or a larger rtol.",
            StoppingWarning,
        )
