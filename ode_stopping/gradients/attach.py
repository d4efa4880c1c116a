"""Where the stopping times and the states there get their graph.

One custom backward goes through all targets: the quotient at each, and one pass of a route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.describe import scalar
from ..core.guards import MissedValue, ZeroWithGraph, first_derivatives_only
from ..core.leaves import LeafSet
from ..core.stats import Costs, Stats
from ..core.status import Status
from ..core.validation import is_batched, refuse_batched_cotangent, refuse_lost_views
from ..crossing.run import Run
from ..crossing.watch import Hit
from .backward import Cotangents, Gradients, differentiate
from .caveats import warn_about_clock, warn_about_learned_times, warn_about_rounding
from .evidence import Evidence, warn_about_grazing
from .judge import judge
from .jumps import warn_about_moved_times
from .kinks import with_kinks
from .problem import StoppingProblem
from .route import GradientRoute
from .tracing import check_criterion, check_functions, trace_leaves

__all__ = ["Attached", "Inputs", "attached"]


@dataclass(frozen=True)
class Inputs:
    """What a stopping time depends on besides the leaves, with graphs.

    Attributes:
        x0: Shape (n,).
        t0: Shape ().
        targets: Each of shape ().
        breakpoints: Those that require grad, each of shape ().
    """

    x0: Tensor
    t0: Tensor
    targets: tuple[Tensor, ...]
    breakpoints: tuple[Tensor, ...] = ()


class Differentiation:
    """A solved problem, its route, and what the latest backward pass found out.

    Args:
        problem: The solved problem.
        route: Of its derivatives.
        costs: Of the run, and from now on of the backward passes.
    """

    def __init__(self, problem: StoppingProblem, route: GradientRoute, costs: Costs) -> None:
        self.problem = problem
        self.route = route
        self.evidence = [Evidence.of(problem, hit) for hit in problem.hits]
        self._costs = costs

    def backward(self, given: Cotangents) -> Gradients | None:
        """The gradients, judged; None where nothing arrives."""
        if not any(given.arriving):
            self._costs.note(Stats(vjps=0, nfe_backward=0))
            return None
        with torch.no_grad():
            found = differentiate(self.problem, self.route, given)
            returned, self.evidence, checks = judge(self.problem, self.route, found, given)
        # Of whose steps the gradient is, in the end.
        route, fallback = returned.stats.route, returned.stats.fallback
        self._costs.note(replace(found.stats + checks, route=route, fallback=fallback))
        return returned


@dataclass(frozen=True)
class Attached:
    """What a run hands out, in the order of the targets.

    Attributes:
        times: T with its graph, each of shape (), float64.
        states: The state there, or at the end of a miss, each of shape (n,).
        costs: Of the run and of its backward passes.
        differentiation: The solved problem; None where there is nothing to differentiate.
    """

    times: list[Tensor]
    states: list[Tensor]
    costs: Costs
    differentiation: Differentiation | None = None


def attached(run: Run, inputs: Inputs) -> Attached:
    """The times and states with the graph that each target allows."""
    call = run.call
    route = call.gradient
    assert route is None or isinstance(route, GradientRoute)
    if route is None or not torch.is_grad_enabled():
        return _plain(run, inputs)
    calls = call.flow.calls
    leaves = trace_leaves(run)
    if not route.own_graph:
        refuse_lost_views(has_history=leaves.has_history)
    # An evaluation without a graph hides its leaves: then nobody knows what is needed.
    tensors = (inputs.x0, inputs.t0, *inputs.targets, *inputs.breakpoints)
    needed = bool(leaves.tensors) or leaves.has_gap or any(p.requires_grad for p in tensors)
    if needed:
        for hit in run.hits:
            if hit.status is Status.DEGENERATE:
                # A criterion without its derivative has J' = 0, too: that is no touch, but an
                # error.
                check_criterion(call, leaves, hit)
    t0_wanted = inputs.t0.requires_grad
    problem = _solved(run, route, leaves, needed=needed, t0_wanted=t0_wanted)
    # Before the graph is attached: a route may evaluate the flow for it.
    costs = Costs(run.stats + Stats(checks=call.flow.calls - calls))
    times: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}
    differentiation = None
    if problem is not None:
        differentiation = Differentiation(problem, route, costs)
        targets = [inputs.targets[hit.watch.index] for hit in problem.hits]
        found = _attach(differentiation, inputs, targets)
        for hit, time, state in zip(problem.hits, *found, strict=True):
            times[hit.watch.index], states[hit.watch.index] = time, state
    for index, target in enumerate(inputs.targets):
        if index not in times:
            times[index], states[index] = _without_quotient(run, index, target, inputs, leaves)
    order = range(len(inputs.targets))
    return Attached([times[i] for i in order], [states[i] for i in order], costs, differentiation)


def _plain(run: Run, inputs: Inputs) -> Attached:
    """Without gradients; a miss is infinite, or what it counts as."""
    times, states = [], []
    for index in range(len(inputs.targets)):
        hit = run.hit(index)
        times.append(scalar(_missed(run) if hit is None else hit.time, run.call.x0))
        states.append(run.state if hit is None else hit.state)
    return Attached(times, states, Costs(run.stats))


def _missed(run: Run) -> float:
    return float("inf") if run.call.censored is None else run.call.censored


def _solved(
    run: Run, route: GradientRoute, leaves: LeafSet, *, needed: bool, t0_wanted: bool
) -> StoppingProblem | None:
    """The problem of the targets that have a derivative, looked at from all sides."""
    if not any(hit.status is Status.REACHED for hit in run.hits):
        return None
    problem = StoppingProblem.of(run, leaves)
    for hit in problem.hits:
        assert hit.point is not None
        warn_about_rounding(problem, hit.point)
        warn_about_grazing(hit.near_miss, problem.tolerances)
    if needed:
        problem = with_kinks(problem.knowing(time=check_functions(problem)))
        warn_about_clock(problem, route, t0_wanted=t0_wanted)
        warn_about_learned_times(problem)
        warn_about_moved_times(problem)
    return problem


def _attach(
    differentiation: Differentiation, inputs: Inputs, targets: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Times and states of the hits, differentiable to the inputs and to the problem's leaves."""
    problem, route = differentiation.problem, differentiation.route
    learned = inputs.breakpoints
    tensors = (inputs.x0, inputs.t0, *targets, *learned, *problem.leaves.tensors)
    if not route.own_graph:
        times, states = _Crossings.apply(differentiation, *tensors)
        return times.unbind(), states.unbind()
    found = route.graph(problem, inputs.x0, inputs.t0, targets, *([learned] if learned else []))
    outputs = (*found[0], *found[1])
    if not any(output.requires_grad for output in outputs):
        return found
    wanted = tuple(p.requires_grad for p in tensors)
    judged = _Judged.apply(differentiation, wanted, *outputs)
    return judged[: len(found[0])], judged[len(found[0]) :]


def _without_quotient(
    run: Run, index: int, target: Tensor, inputs: Inputs, leaves: LeafSet
) -> tuple[Tensor, Tensor]:
    """A target that was met at the start, touched, or missed."""
    hit = run.hit(index)
    if hit is not None and hit.status is Status.AT_START:
        # T = t0 and x_T = x0, with zero gradients to everything else.
        zero = ZeroWithGraph.apply(target, *inputs.breakpoints, *leaves.tensors)
        return inputs.t0.to(torch.float64) + zero, inputs.x0 + zero.to(inputs.x0.dtype)
    tensors = (inputs.x0, inputs.t0, target, *inputs.breakpoints, *leaves.tensors)
    return _attach_miss(run, hit, tensors)


def _attach_miss(run: Run, hit: Hit | None, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """No gradient: infinity that raises when it is differentiated, or a censored constant.

    A DEGENERATE crossing has its time, but no derivative, so it raises as well.
    """
    like = run.call.x0
    time, state = scalar(_missed(run) if hit is None else hit.time, like), run.state
    status = run.status
    if hit is not None:
        state, status = hit.state, hit.status
    if not any(p.requires_grad for p in tensors):
        return time, state
    if hit is None and run.call.censored is not None:
        return time + ZeroWithGraph.apply(*tensors), state
    where = f"{status.name}: {status.value}"
    missed_time, missed_state = MissedValue.apply(where, time, state, *tensors)
    return missed_time, missed_state


class _Crossings(torch.autograd.Function):
    """(T_k, x_k) as functions of (x0, t0, *targets, *breakpoints, *leaves), by Theorem 1."""

    @staticmethod
    def forward(ctx: Any, differentiation: Differentiation, *tensors: Tensor) -> Any:
        ctx.differentiation = differentiation
        # Saved so that autograd notices a parameter that was changed in place before backward.
        ctx.save_for_backward(*tensors)
        hits, like = differentiation.problem.hits, differentiation.problem.x0
        times = torch.tensor([hit.time for hit in hits], dtype=torch.float64, device=like.device)
        return times, torch.stack([hit.state for hit in hits])

    @staticmethod
    def backward(ctx: Any, on_times: Tensor, on_states: Tensor) -> Any:
        refuse_batched_cotangent(on_times)
        tensors = ctx.saved_tensors
        x0, t0, *rest = tensors
        wanted = tuple(ctx.needs_input_grad[1:])
        found = ctx.differentiation.backward(Cotangents(on_times, on_states, wanted))
        if found is None:
            return (None, *(torch.zeros_like(tensor) for tensor in tensors))
        to_rest = [*found.targets.unbind(), *found.breakpoints.unbind(), *found.leaves]
        gradients = [
            found.x0.reshape(x0.shape),
            found.t0.to(t0.dtype),
            *[g.to(p.dtype) for g, p in zip(to_rest, rest, strict=True)],
        ]
        dependencies = (*tensors, on_times, on_states)
        return (None, *first_derivatives_only(gradients, dependencies, "stopping time"))


class _Judged(torch.autograd.Function):
    """Times and states that have an ordinary graph, as they are; backward leaves the evidence."""

    @staticmethod
    def forward(
        ctx: Any, differentiation: Differentiation, wanted: tuple[bool, ...], *outputs: Tensor
    ) -> Any:
        ctx.differentiation, ctx.wanted = differentiation, wanted
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        # (Several at once, by vmap, are not judged.)
        if not is_batched(cotangents[0]):
            hits = len(cotangents) // 2
            times, states = cotangents[:hits], cotangents[hits:]
            given = Cotangents(
                torch.stack(times).detach(), torch.stack(states).detach(), ctx.wanted
            )
            ctx.differentiation.backward(given)
        return (None, None, *cotangents)
