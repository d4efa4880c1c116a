"""Where the times of a run, and the states there, get their graph.

One custom backward goes through all of it: the quotient at each hit, one pass of a route over each
arc, and the resets between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.describe import scalar
from ..core.guards import CENSORED, MissedValue, ZeroWithGraph, first_derivatives_only
from ..core.leaves import LeafSet
from ..core.stats import Costs, Stats
from ..core.status import Status
from ..core.validation import is_batched, refuse_batched_cotangent, refuse_lost_views
from ..crossing.run import Run
from ..crossing.watch import Hit
from .caveats import (
    warn_about_clock,
    warn_about_learned_times,
    warn_about_order,
    warn_about_rounding,
)
from .chain import Arriving, Chain, ChainGradients, Link, pulled_back
from .evidence import Evidence, warn_about_grazing
from .graph import graph_of
from .judge import judge
from .jumps import warn_about_moved_times
from .kinks import with_kinks
from .problem import StoppingProblem
from .route import GradientRoute
from .tracing import check_criterion, check_functions, check_reset, trace_leaves

__all__ = ["Attached", "Differentiation", "Inputs", "attach", "attached", "looked_at"]


@dataclass(frozen=True)
class Inputs:
    """What the times depend on besides the leaves, with graphs.

    Attributes:
        x0: Shape (n,).
        t0: Shape ().
        targets: One for each watch, by its index, each of shape ().
        breakpoints: Those that require grad, each of shape ().
    """

    x0: Tensor
    t0: Tensor
    targets: tuple[Tensor, ...]
    breakpoints: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (self.x0, self.t0, *self.targets, *self.breakpoints)


class Differentiation:
    """A solved chain, its route, and what the latest backward pass found out.

    Args:
        chain: The chain.
        route: Of its derivatives.
        costs: Of the run, and from now on of the backward passes.
    """

    def __init__(self, chain: Chain, route: GradientRoute, costs: Costs) -> None:
        self.chain = chain
        self.route = route
        self._costs = costs
        self.evidence = self._unjudged()

    def _unjudged(self) -> list[Evidence]:
        """What is known of the hits before a gradient was taken."""
        return [
            Evidence.of(self.chain.call, hit, problem.run.velocity_error)
            for problem in self.chain.problems
            for hit in problem.hits
        ]

    def backward(self, given: Arriving) -> ChainGradients | None:
        """The gradients, judged; None where nothing arrives."""
        rows = given.rows
        if rows == 0:
            self._costs.note(Stats(vjps=0, nfe_backward=0))
            return None
        chain = self.chain.up_to(rows)
        given = given.up_to(len(chain.rows))
        with torch.no_grad():
            found = pulled_back(chain, self.route, given)
            returned, judged, checks = judge(chain, self.route, found, given)
        self.evidence = judged + self._unjudged()[len(judged) :]
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
    """The times and states of a run with the graph that each target allows."""
    call = run.call
    route = call.gradient
    assert route is None or isinstance(route, GradientRoute)
    if route is None or not torch.is_grad_enabled():
        return _plain(run, inputs)
    calls = call.flow.calls
    leaves = trace_leaves(call, [run])
    needed = is_needed(route, leaves, inputs)
    if needed:
        for hit in run.hits:
            if hit.status is Status.DEGENERATE:
                # A criterion without its derivative has J' = 0, too: that is no touch, but an
                # error.
                check_criterion(call, leaves, hit)
    chain = None
    if any(hit.status is Status.REACHED for hit in run.hits):
        chain = looked_at(
            Chain.of(StoppingProblem.of(run, leaves)),
            route,
            needed=needed,
            t0_wanted=inputs.t0.requires_grad,
        )
    # Before the graph is attached: a route may evaluate the flow for it.
    costs = Costs(run.stats + Stats(checks=call.flow.calls - calls))
    times: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}
    differentiation = None
    if chain is not None:
        differentiation = Differentiation(chain, route, costs)
        on_rows = attach(differentiation, inputs)
        for row, time, state in zip(chain.rows, *on_rows[:2], strict=True):
            times[row.watch.index], states[row.watch.index] = time, state
    for index, target in enumerate(inputs.targets):
        if index not in times:
            times[index], states[index] = _without_quotient(run, index, target, inputs, leaves)
    order = range(len(inputs.targets))
    return Attached([times[i] for i in order], [states[i] for i in order], costs, differentiation)


def is_needed(route: GradientRoute, leaves: LeafSet, inputs: Inputs) -> bool:
    """Whether anything can be differentiated to."""
    if not route.own_graph:
        refuse_lost_views(has_history=leaves.has_history)
    # An evaluation without a graph hides its leaves: then nobody knows what is needed.
    wanted = any(p.requires_grad for p in inputs.tensors)
    return bool(leaves.tensors) or leaves.has_gap or wanted


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


def looked_at(chain: Chain, route: GradientRoute, *, needed: bool, t0_wanted: bool) -> Chain:
    """The chain, looked at from all sides before a gradient is promised."""
    links: list[Link] = []
    seen: set[int] = set()
    knows_time = True
    for number, link in enumerate(chain.links):
        problem = link.problem
        if problem is None:
            links.append(link)
            continue
        for hit in problem.hits:
            assert hit.point is not None
            warn_about_rounding(problem, hit.point)
            warn_about_grazing(hit.near_miss, problem.tolerances)
        if needed:
            criteria = {id(hit.watch.criterion) for hit in problem.hits}
            # (Arcs alike are looked at once.)
            if not seen or not criteria <= seen or number == len(chain.links) - 1:
                knows_time = check_functions(problem) and knows_time
            seen |= criteria
            problem = with_kinks(problem.knowing(time=knows_time))
            warn_about_clock(problem, route, t0_wanted=t0_wanted or bool(links))
            warn_about_moved_times(problem)
        links.append(link if problem is link.problem else replace(link, problem=problem))
    found = chain.with_links(links)
    if needed:
        for transition in {id(one.reset): one for one in chain.resets}.values():
            check_reset(chain.call, chain.leaves, transition)
        warn_about_learned_times(found)
        warn_about_order(found)
    return found


def attach(
    differentiation: Differentiation, inputs: Inputs
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]]:
    """Times and states of the rows of a chain, differentiable to the inputs and to its leaves.

    Returns:
        The times, the states before, and those behind the resets (None where there is none).
    """
    chain, route = differentiation.chain, differentiation.route
    targets = [inputs.targets[index] for index in chain.watched]
    tensors = (inputs.x0, inputs.t0, *targets, *inputs.breakpoints, *chain.leaves.tensors)
    resets = [index for index, row in enumerate(chain.rows) if row.after is not None]
    if not route.own_graph:
        times, before, *after = _Rows.apply(differentiation, *tensors)
        behind = after[0].unbind() if resets else ()
        found = (times.unbind(), before.unbind(), behind)
    else:
        found = graph_of(chain, route, inputs.x0, inputs.t0, targets, inputs.breakpoints)
        outputs = (*found[0], *found[1], *found[2])
        if any(output.requires_grad for output in outputs):
            wanted = tuple(p.requires_grad for p in tensors)
            judged = _Judged.apply(differentiation, wanted, *outputs)
            rows = len(chain.rows)
            found = (judged[:rows], judged[rows : 2 * rows], judged[2 * rows :])
    by_row = dict(zip(resets, found[2], strict=True))
    return found[0], found[1], [by_row.get(index) for index in range(len(chain.rows))]


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
    where = f"{status.name}: {status.value} {CENSORED}"
    missed_time, missed_state = MissedValue.apply(where, time, state, *tensors)
    return missed_time, missed_state


class _Rows(torch.autograd.Function):
    """Times and states as functions of (x0, t0, *targets, *breakpoints, *leaves), by Theorem 1."""

    @staticmethod
    def forward(ctx: Any, differentiation: Differentiation, *tensors: Tensor) -> Any:
        ctx.differentiation = differentiation
        # Saved so that autograd notices a parameter that was changed in place before backward.
        ctx.save_for_backward(*tensors)
        chain = differentiation.chain
        rows, like = chain.rows, chain.call.x0
        times = torch.tensor([row.time for row in rows], dtype=torch.float64, device=like.device)
        behind = [row.after for row in rows if row.after is not None]
        states = torch.stack([row.before for row in rows])
        return (times, states, *([torch.stack(behind)] if behind else []))

    @staticmethod
    def backward(ctx: Any, on_times: Tensor, on_states: Tensor, *on_behind: Tensor) -> Any:
        refuse_batched_cotangent(on_times)
        tensors = ctx.saved_tensors
        x0, t0, *rest = tensors
        chain = ctx.differentiation.chain
        after = _spread(chain, on_states, on_behind[0].unbind()) if on_behind else None
        wanted = tuple(ctx.needs_input_grad[1:])
        found = ctx.differentiation.backward(Arriving(on_times, on_states, after, wanted))
        if found is None:
            return (None, *(torch.zeros_like(tensor) for tensor in tensors))
        to_rest = [*found.targets.unbind(), *found.breakpoints.unbind(), *found.leaves]
        gradients = [
            found.x0.reshape(x0.shape),
            found.t0.to(t0.dtype),
            *[g.to(p.dtype) for g, p in zip(to_rest, rest, strict=True)],
        ]
        dependencies = (*tensors, on_times, on_states, *on_behind)
        return (None, *first_derivatives_only(gradients, dependencies, "stopping time"))


def _spread(chain: Chain, like: Tensor, behind: Sequence[Tensor]) -> Tensor:
    """Cotangents on the states behind resets, one for each row."""
    waiting = iter(behind)
    zero = torch.zeros_like(like[0])
    return torch.stack([zero if row.after is None else next(waiting) for row in chain.rows])


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
            chain = ctx.differentiation.chain
            rows = len(chain.rows)
            times, before = torch.stack(cotangents[:rows]), torch.stack(cotangents[rows : 2 * rows])
            behind = [one.detach() for one in cotangents[2 * rows :]]
            after = _spread(chain, before.detach(), behind) if behind else None
            ctx.differentiation.backward(
                Arriving(times.detach(), before.detach(), after, ctx.wanted)
            )
        return (None, None, *cotangents)
