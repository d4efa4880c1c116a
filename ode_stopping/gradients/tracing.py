"""Before a gradient is promised: where does it go, and do the functions know their own?"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ..core.consistency import check_derivatives, check_reproducible, check_time
from ..core.functions import CriterionMap
from ..core.leaves import LeafSet
from ..core.status import MissingGradientError
from ..crossing.run import Search
from ..solving.flow_map import FlowMap
from .problem import StoppingProblem

__all__ = ["check_criterion", "check_functions", "check_start", "trace_leaves"]

_TRACE_POINTS = 8


def check_start(flow: FlowMap, x0: Tensor) -> None:
    """Two evaluations of the flow at the start agree.

    Before the run, and not after it: steps of a flow that draws at random shrink without end.
    """
    start = flow.times[0]
    check_reproducible(flow.plain(start, x0), flow.plain(start, x0), name=flow.name)


def trace_leaves(flow: FlowMap, criterion: CriterionMap, leaves: LeafSet, search: Search) -> None:
    """Find every tensor that flow and criterion depend on, at both ends and along the path.

    Two evaluations at the start tell nodes that are older than the evaluation (a hyper-network's
    history) from its own; the further points catch a parameter that is used on another branch only.
    """
    path = search.trajectory
    ends = ((path.start, path.flat(path.start)), (search.time, search.state))
    for function, (first, x) in zip((flow, criterion), ends, strict=True):
        nodes = []
        values = []
        for _ in range(2):
            time, point = function.inputs(first, x)
            value = function.traced(time, point)
            nodes.append(leaves.add_from([value], inputs=(time, point)))
            values.append(value.detach())
        check_reproducible(*values, name=function.name)
        leaves.note_history(*nodes)
    stride = max(len(path.steps) // _TRACE_POINTS, 1)
    middles = [
        (0.5 * (step.t0 + step.t1), step.at_fraction(0.5))
        for step in path.steps[::stride][:_TRACE_POINTS]
    ]
    # A parameter that acts between two jumps of the flow only.
    bounds = [t for t in flow.times if t < search.time] + [search.time]
    pieces = [0.5 * (a + b) for a, b in pairwise(bounds)]
    if path.steps:
        middles += [(t, path.flat(t)) for t in pieces]
    for t, x in (ends[1], *middles):
        time, point = flow.inputs(t, x)
        leaves.add_from([flow.traced(time, point)], inputs=(time, point))


def check_functions(problem: StoppingProblem) -> None:
    """Compare the derivatives of flow and criterion with differences (see `consistency`)."""
    flow, criterion = problem.flow, problem.criterion
    steps = problem.trajectory.steps
    middle = steps[len(steps) // 2] if steps else None
    t = 0.5 * (middle.t0 + middle.t1) if middle else problem.start
    x = middle.at_fraction(0.5) if middle else problem.x0
    check_derivatives(
        lambda y: flow.plain(t, y),
        lambda y: flow.traced(flow.time_tensor(t), y),
        x,
        problem.leaves,
        name="flow",
        layout=problem.layout,
    )
    if middle:
        flow.reads_clock_blindly = not _knows_time(flow, t, x, (middle.t0, middle.t1))
    check_criterion(criterion, problem.leaves, problem.end, problem.crossing.state)
    end, x_end = problem.end, problem.crossing.state
    check_time(
        lambda s: criterion.plain(s, x_end),
        lambda s: criterion.traced(s, x_end),
        end,
        bounds=(steps[-1].t0 if steps else problem.start, end),
        like=x_end,
        name="criterion",
    )


def _knows_time(flow: FlowMap, t: float, x: Tensor, bounds: tuple[float, float]) -> bool:
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


def check_criterion(criterion: CriterionMap, leaves: LeafSet, t: float, x: Tensor) -> None:
    """Compare the derivatives of the criterion with differences at one point."""
    check_derivatives(
        lambda y: criterion.plain(t, y),
        lambda y: criterion.traced(criterion.time_tensor(t), y),
        x,
        leaves,
        name="criterion",
    )
