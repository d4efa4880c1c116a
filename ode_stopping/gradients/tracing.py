"""Before a gradient is promised: where does it go, and do the functions know their own?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor

from ..call import Call
from ..core.consistency import check_derivatives, check_reproducible, check_time
from ..core.functions import Clock, UserFunction
from ..core.leaves import LeafSet
from ..core.status import MissingGradientError
from ..crossing.run import Run
from ..crossing.transitions import Transition
from ..crossing.watch import Hit
from .problem import StoppingProblem

__all__ = [
    "check_criterion",
    "check_functions",
    "check_reset",
    "check_start",
    "trace_leaves",
]

_TRACE_POINTS = 7
# Of the time so far, at which J is looked at before and after a crossing.
_SHARE_OF_TIME = 1e-3


def check_start(call: Call) -> None:
    """Two evaluations of the flow at the start agree.

    Before the run, and not after it: steps of a flow that draws at random shrink without end.
    """
    flow, start = call.flow, call.start
    check_reproducible(flow.plain(start, call.x0), flow.plain(start, call.x0), name=flow.name)


def trace_leaves(
    call: Call, runs: Sequence[Run], transitions: Sequence[Transition] = ()
) -> LeafSet:
    """Every tensor that the user's functions depend on, at both ends and along the path.

    Two evaluations at the start tell nodes that are older than the evaluation (a hyper-network's
    history) from its own; the further points catch a parameter that is used on another branch only.
    """
    flow, leaves = call.flow, call.leaves.copy()
    first = end = (call.start, call.x0)
    if runs:
        end = runs[-1].time, runs[-1].state
    criteria = [one for one in call.criteria if not isinstance(one, Clock)]
    places: list[tuple[UserFunction, tuple[float, Tensor]]] = [(flow, first)]
    places += [(one, end) for one in criteria]
    resets = {id(one.reset): one for one in transitions if one.reset is not None}
    places += [(one.reset, (one.time, one.before)) for one in resets.values() if one.reset]
    for function, (t, x) in places:
        nodes = []
        values = []
        for _ in range(2):
            time, point = function.inputs(t, x)
            value = function.traced(time, point)
            nodes.append(leaves.add_from([value], inputs=(time, point)))
            values.append(value.detach())
        check_reproducible(*values, name=function.name)
        leaves.note_history(*nodes)
    for run in runs:
        for t, x in ((run.time, run.state), *_points(run, _TRACE_POINTS // len(runs) + 1)):
            time, point = flow.inputs(t, x)
            leaves.add_from([flow.traced(time, point)], inputs=(time, point))
    return leaves


def _points(run: Run, count: int) -> list[tuple[float, Tensor]]:
    """Times and states along the path, where it was kept."""
    path, steps = run.trajectory, run.trajectory.steps
    if not steps:
        return []
    stride = max(len(steps) // count, 1)
    times = [0.5 * (step.t0 + step.t1) for step in steps[::stride][:count]]
    bounds = [t for t in run.call.times if t < run.time] + [run.time]
    if len(bounds) > 2:
        # A parameter that acts between two jumps of the flow only.
        times += [0.5 * (a + b) for a, b in pairwise(bounds)]
    return [(t, path.flat(t)) for t in times]


def check_functions(problem: StoppingProblem) -> bool:
    """Compare the derivatives of flow and criterion with differences (see `consistency`).

    Returns:
        Whether the flow knows its derivative to t.
    """
    call, steps = problem.call, problem.steps
    flow = call.flow
    middle = steps[len(steps) // 2] if steps else None
    t, x = problem.start, problem.x0
    if middle is not None:
        t = 0.5 * (middle.t0 + middle.t1)
        x = call.method.dense(middle)(t)
    check_derivatives(
        lambda y: flow.plain(t, y),
        lambda y: flow.traced(flow.time_tensor(t), y),
        x,
        problem.leaves,
        name="flow",
        layout=call.layout,
    )
    knows_time = middle is None or _knows_time(problem, t, x, (middle.t0, middle.t1))
    for hit in {id(hit): hit for hit in (problem.hits[0], problem.hits[-1])}.values():
        end, x_end, criterion = hit.time, hit.state, hit.watch.criterion
        if hit.watch.time is not None:
            continue
        check_criterion(call, problem.leaves, hit)
        before = [step.t0 for step in (*steps, *hit.steps) if step.t0 < end]
        check_time(
            partial(_at, criterion.plain, x_end),
            partial(_at, criterion.traced, x_end),
            end,
            bounds=(max(before, default=problem.start), end),
            like=x_end,
            name="criterion",
        )
    return knows_time


def _at(function: Callable[..., Tensor], x: Tensor, t: float | Tensor) -> Tensor:
    return function(t, x)


def _knows_time(problem: StoppingProblem, t: float, x: Tensor, bounds: tuple[float, float]) -> bool:
    flow = problem.flow
    try:
        check_time(
            lambda s: flow.plain(s, x),
            lambda s: flow.traced(s, x),
            t,
            bounds=bounds,
            like=x,
            name=flow.name,
            layout=flow.layout,
        )
    except MissingGradientError:
        return False
    return True


def check_criterion(call: Call, leaves: LeafSet, hit: Hit) -> None:
    """Compare the derivatives of the criterion with differences at a crossing.

    Raises:
        MissingGradientError: A derivative is missing or partly missing, or there is none: J is
            piecewise constant.
    """
    criterion, t, x = hit.watch.criterion, hit.time, hit.state
    _refuse_steps(call, hit)
    check_derivatives(
        lambda y: criterion.plain(t, y),
        lambda y: criterion.traced(criterion.time_tensor(t), y),
        x,
        leaves,
        name="criterion",
    )


def check_reset(call: Call, leaves: LeafSet, transition: Transition) -> None:
    """Compare the derivatives of a reset with differences at a place where it was applied.

    Raises:
        MissingGradientError: A derivative is missing or partly missing.
    """
    reset, t, x = transition.reset, transition.time, transition.before
    assert reset is not None
    check_derivatives(
        lambda y: reset.plain(t, y),
        lambda y: reset.traced(reset.time_tensor(t), y),
        x,
        leaves,
        name=reset.name,
        layout=call.layout,
    )
    before = max((time for time in call.times[:-1] if time < t), default=call.start)
    if before < t:
        check_time(
            partial(_at, reset.plain, x),
            partial(_at, reset.traced, x),
            t,
            bounds=(before, t),
            like=x,
            name=reset.name,
            layout=call.layout,
        )


def _refuse_steps(call: Call, hit: Hit) -> None:
    """Raise where J comes down through its target although its gradient is zero.

    (A J that rises is turned round here.) A criterion that touches its target has J' = 0 there as
    well, and comes up again: the difference
    of J before and after falls with the cube of the time. That of an accuracy is a jump.
    """
    criterion, t, x, point = hit.watch.criterion, hit.time, hit.state, hit.point
    if point is None or point.explicit_rate != 0.0 or bool(point.gradient.any()):
        return
    velocity = point.velocity

    def fall(span: float) -> float:
        after = min(t + span, call.times[-1])
        return criterion.value(t - span, x - span * velocity) - criterion.value(
            after, x + (after - t) * velocity
        )

    span = _SHARE_OF_TIME * (t - call.start)
    far, near = fall(span), fall(span / 16)
    if far > 0 and near > far / 64:
        raise MissingGradientError(
            f"the criterion is piecewise constant: it changes by {near:.3g} at t = {t:.6g}, and "
            "its gradient is zero there (an accuracy, a counter, a rounding), so the stopping time "
            "has no derivative. Use a smooth criterion in its place (the loss instead of the "
            "accuracy), or gradient=None where the time alone is wanted"
        )
