"""Warnings about results that the arithmetic, not the method, makes inaccurate."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Watch
from ..core.functions import ResetMap
from ..core.leaves import LeafSet
from ..core.level import Rounding
from ..core.status import (
    GradientAccuracyWarning,
    KinkWarning,
    MissingGradientError,
    Status,
    StoppingWarning,
)
from ..core.warn import warn_user
from ..crossing.point import Crossing
from ..crossing.transitions import Transition
from ..crossing.watch import Hit
from ..solving.flow_map import FlowMap
from .chain import Chain
from .problem import StoppingProblem
from .route import GradientRoute

__all__ = [
    "warn_about_clock",
    "warn_about_learned_times",
    "warn_about_order",
    "warn_about_rounding",
]

_NEAR_JUMP_PER_RTOL = 50.0
# Times that are so many roundings apart are one, and derivatives this near to each other.
_TOGETHER = 16.0
_ANOTHER = 1e-6
# Of the time in which x changes.
_EARLIER = 1e-5


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


def warn_about_order(chain: Chain) -> None:
    """Warn where events are met at one time, and another order would have another derivative."""
    flow, rules = chain.call.flow, chain.call.rules
    for link in chain.links:
        if not link.closing:
            continue
        event, hit = link.closing[0], link.hits[-1]
        if rules[event.watch.event].status is Status.FINISHED:
            continue
        near = _TOGETHER * torch.finfo(torch.float64).eps * max(abs(hit.time), abs(link.time))
        before = [one.watch for one in link.hits[:-1] if hit.time - one.time <= near]
        others = [w for w in before if w.time is None] if event.reset is not None else []
        for other in (*others, *link.together):
            own = rules[other.event]
            if event.reset is None and own.count is None and own.reset is None:
                continue
            if _order_matters(flow, event, hit, other) or _ends_differ(flow, event, own.reset):
                warn_user(
                    f"two events are met together at t = {hit.time:.6g}, and what follows is "
                    "another thing if they come one after the other: they are taken in the order "
                    "of events=, and the gradient is that of this order.",
                    KinkWarning,
                )


def _order_matters(flow: FlowMap, event: Transition, hit: Hit, other: Watch) -> bool:
    """Whether the time of an event changes where it comes behind a reset and not before it.

    dT/dx- of the other event, before the reset and behind it: T = T_A + d there, with
    J(T_A + d, R(T_A, x-) + d F+) = eps.
    """
    point, reset = hit.point, event.reset
    assert point is not None
    t, before, after = event.time, event.before, event.after
    number = flow.number_at(t)
    ahead = Crossing.at(other.criterion, t, before, point.velocity)
    if not ahead.rate < 0:
        return True
    first = -ahead.gradient / ahead.rate
    if reset is None:
        # The end is at the first of the two.
        second = -point.gradient / point.rate
        return _differ(first, second)
    behind = Crossing.at(other.criterion, t, after, flow.on(number)(t, after))
    band = Rounding.at(other.criterion, t, after).around(other.target)
    band += _TOGETHER * torch.finfo(torch.float64).eps * abs(t) * abs(behind.rate)
    if not behind.rate < 0 or abs(behind.value - other.target) > band:
        return True
    pulled = reset.vjp(t, before, behind.gradient, LeafSet.collect(), look=False)
    of_time = -point.gradient / point.rate
    along = float(pulled.state @ point.velocity + pulled.time) + behind.explicit_rate
    second = of_time - (pulled.state + along * of_time) / behind.rate
    return _differ(first, second)


def _differ(first: Tensor, second: Tensor) -> bool:
    size = max(float(first.norm()), float(second.norm()))
    return float((first - second).norm()) > _ANOTHER * size


def _ends_differ(flow: FlowMap, event: Transition, other: ResetMap | None) -> bool:
    """Whether two resets at one time end elsewhere in the other order, or if one comes earlier."""
    reset, t, x = event.reset, event.time, event.before
    if reset is None or other is None:
        return False
    velocity = flow.on(flow.number_at(t))

    def end(*steps: tuple[ResetMap, float]) -> Tensor:
        """x at t, through resets at times that are so much later, in this order; to first order."""
        y, now = x, 0.0
        for one, late in steps:
            y = one.plain(t + late, y + (late - now) * velocity(t, y))
            now = late
        return y - now * velocity(t, y)

    size = float(x.abs().max()) + float(end((reset, 0.0), (other, 0.0)).abs().max())
    speed = float(velocity(t, x).abs().max())
    early = _EARLIER * (size / speed if speed > 0 else max(abs(t), 1.0))
    # As it is, and with the one in front of the other.
    gaps = [
        float((end((reset, -by), (other, 0.0)) - end((other, 0.0), (reset, -by))).abs().max())
        for by in (0.0, early)
    ]
    return gaps[0] > 100 * _EARLIER**2 * size or gaps[1] > _EARLIER**1.5 * size


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
