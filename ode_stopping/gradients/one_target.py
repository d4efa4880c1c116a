"""A run to one target: the search, and the graph of what it found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.describe import scalar
from ..core.functions import CriterionMap
from ..core.leaves import LeafSet
from ..core.stats import Stats
from ..core.status import Status
from ..core.validation import refuse_lost_views
from ..crossing.run import Search, find_crossing
from ..solving.flow_map import FlowMap
from ..solving.tolerances import Tolerances
from ..solving.torchdiffeq import Torchdiffeq
from . import DirectAdjoint, GradientRoute
from .attach import Inputs, attach_constant, attach_crossing, attach_miss
from .caveats import warn_about_clock, warn_about_rounding
from .evidence import Evidence, warn_about_grazing
from .problem import StoppingProblem
from .tracing import check_criterion, check_functions, check_start, trace_leaves

__all__ = ["Outcome", "Setup", "attached"]


@dataclass(frozen=True)
class Setup:
    """A checked call with one target; or its part up to one of several.

    Attributes:
        flow: dx/dt on flat vectors.
        criterion: J on flat vectors.
        leaves: Tensors that receive gradients, besides x0, t0 and the target.
        settings: Solver.
        tolerances: Of the solve.
        times: Start, breakpoints and horizon.
        x0: Start, shape (n,), without graph.
        target: eps.
        stats: Counts, filled in.
        censored: What a miss counts as, in flow time; None: infinity.
        thorough: Whether gradients are compared with those of a second run.
        origin: The time from which T is counted, where the run goes on with another.
        steps_before: Steps that were tried before, where the run goes on with another.
        first_step: Size of the first step; None: the solver's choice.
    """

    flow: FlowMap
    criterion: CriterionMap
    leaves: LeafSet
    settings: Torchdiffeq
    tolerances: Tolerances
    times: tuple[float, ...]
    x0: Tensor
    target: float
    stats: Stats
    censored: float | None
    thorough: bool
    origin: float | None = None
    steps_before: int = 0
    first_step: float | None = None

    def search(self, gradient: GradientRoute | None) -> Search:
        """The forward run."""
        if gradient is not None:
            check_start(self.flow, self.x0)
        return find_crossing(
            self.flow,
            self.criterion,
            self.x0,
            self.target,
            times=self.times,
            settings=self.settings,
            tolerances=self.tolerances,
            keep=gradient is not None and gradient.keeps_trajectory,
            stats=self.stats,
            steps_before=self.steps_before,
            first_step=self.first_step,
        )

    def solved(self, search: Search) -> StoppingProblem:
        """The problem as the routes see it, after a transversal crossing."""
        assert search.crossing is not None
        assert search.state_error is not None
        return StoppingProblem(
            flow=self.flow,
            criterion=self.criterion,
            leaves=self.leaves,
            layout=self.flow.layout,
            settings=self.settings,
            tolerances=self.tolerances,
            trajectory=search.trajectory,
            crossing=search.crossing,
            x0=self.x0,
            stats=self.stats,
            target=self.target,
            times=self.times,
            state_error=search.state_error,
            evidence=Evidence(
                rtol=self.tolerances.rtol,
                dtype=self.x0.dtype,
                rate=search.crossing.rate,
                rate_scale=search.crossing.rate_scale,
                near_miss=search.near_miss,
                velocity_error=search.velocity_error,
            ),
            thorough=self.thorough,
            origin=self.origin,
        )


@dataclass(frozen=True)
class Outcome:
    """A run and what it hands out.

    Attributes:
        search: The forward run.
        time: T with its graph, shape (), float64.
        state: The state at the end with its graph, shape (n,).
        fixed: The state at the fixed time T with its graph, shape (n,), to go on from; None where
            the crossing was not solved for a gradient.
        problem: The solved problem, likewise.
        setup: The call.
    """

    search: Search
    time: Tensor
    state: Tensor
    fixed: Tensor | None
    problem: StoppingProblem | None
    setup: Setup


def attached(
    setup: Setup,
    search: Search,
    gradient: GradientRoute | None,
    inputs: Inputs,
    *,
    check: bool = True,
) -> Outcome:
    """T and the state with the graph that the outcome of the search allows.

    Args:
        setup: The call.
        search: Its forward run.
        gradient: Route.
        inputs: x0, t0 and the target with their graphs.
        check: Compare the derivatives of flow and criterion with differences.
    """
    flow, criterion, leaves, stats = setup.flow, setup.criterion, setup.leaves, setup.stats
    status = search.status
    problem: StoppingProblem | None = None
    differentiated = gradient is not None and torch.is_grad_enabled()
    time, state = scalar(search.time, setup.x0), search.state
    if differentiated:
        trace_leaves(flow, criterion, leaves, search)
        if not isinstance(gradient, DirectAdjoint):
            refuse_lost_views(has_history=leaves.has_history)
    needed = differentiated and _needs_grad(inputs, leaves)
    if needed and status is Status.DEGENERATE:
        # A criterion without its derivative has J' = 0, too: that is no touch, but an error.
        check_criterion(criterion, leaves, search.time, search.state)
    if differentiated and status is Status.REACHED:
        assert gradient is not None
        assert search.crossing is not None
        origin = setup.times[0] if setup.origin is None else setup.origin
        warn_about_rounding(search.crossing, origin, setup.tolerances)
        warn_about_grazing(search.near_miss, setup.tolerances)
        problem = setup.solved(search)
        if needed:
            if check:
                check_functions(problem)
            warn_about_clock(problem, gradient, t0_wanted=inputs[1].requires_grad)
    # Before the graph is attached: a route may evaluate the flow for it.
    stats.checks = flow.calls - stats.nfe_forward
    if problem is not None:
        assert gradient is not None
        time, state, fixed = attach_crossing(problem, gradient, inputs)
        return Outcome(search, time, state, fixed, problem, setup)
    if status is Status.AT_START and differentiated:
        time, state = attach_constant(search, inputs, leaves)
    elif status not in (Status.REACHED, Status.AT_START, Status.DEGENERATE) or (
        status is Status.DEGENERATE and gradient is not None
    ):
        time, state = attach_miss(search, inputs, leaves, setup.censored)
    return Outcome(search, time, state, None, None, setup)


def _needs_grad(inputs: Iterable[Tensor], leaves: LeafSet) -> bool:
    # An evaluation without a graph hides its leaves: then nobody knows what is needed.
    return bool(leaves.tensors) or leaves.has_gap or any(tensor.requires_grad for tensor in inputs)
