"""The gradients of a solved problem: the quotient at every hit, and one pass of a route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..core.consistency import check_same_value
from ..core.leaves import LeafSet
from ..core.stats import Stats
from ..crossing.watch import Hit
from .problem import Jump, StoppingProblem
from .quotient import cotangent_at_crossing
from .route import GradientRoute, PullBack
from .steps import Transpose

__all__ = ["Cotangents", "Gradients", "differentiate", "of_criterion"]


@dataclass(frozen=True)
class Cotangents:
    """What arrives at the hits of a problem.

    Attributes:
        times: c on the stopping times, shape (hits,).
        states: w on the states there, shape (hits, n).
        wanted: Which gradients are asked for: to x0, t0, the targets, the breakpoints that require
            grad, and the leaves.
    """

    times: Tensor
    states: Tensor
    wanted: tuple[bool, ...]

    @cached_property
    def arriving(self) -> list[bool]:
        """At which of the hits anything arrives."""
        found = (self.times != 0) | (self.states != 0).any(dim=1)
        return [bool(one) for one in found.tolist()]


@dataclass(frozen=True)
class Gradients:
    """Gradients of sum_k (c_k T_k + w_k^T x_k).

    Attributes:
        x0: Shape (n,).
        t0: Shape ().
        targets: Shape (hits,).
        breakpoints: To those that require grad, shape (breakpoints,).
        leaves: One tensor a leaf.
        jumps: What lam received at the hits, in order of time.
        pulled: What the route gave.
        stats: What it cost.
    """

    x0: Tensor
    t0: Tensor
    targets: Tensor
    breakpoints: Tensor
    leaves: list[Tensor]
    jumps: list[Jump]
    pulled: PullBack
    stats: Stats

    @property
    def parts(self) -> list[Tensor]:
        """One tensor for each of x0, t0, the targets, the breakpoints and the leaves."""
        numbers = [*self.targets.unbind(), *self.breakpoints.unbind()]
        return [self.x0, self.t0, *numbers, *self.leaves]


def differentiate(problem: StoppingProblem, route: GradientRoute, given: Cotangents) -> Gradients:
    """Pull the cotangents of the hits back to everything that they depend on.

    Args:
        problem: The solved problem.
        route: How to pull lam back through the flow map.
        given: The cotangents; something has to arrive.
    """
    call, leaves = problem.call, problem.leaves
    require = getattr(call.flow.function, "require_differentiable", None)
    if require is not None:
        require(call.layout.unpack(problem.x0))
    jumps, explicit = [], leaves.zeros()
    targets = torch.zeros_like(given.times)
    for k, (hit, arrives) in enumerate(zip(problem.hits, given.arriving, strict=True)):
        if not arrives:
            continue
        assert hit.point is not None
        on_time = given.times[k].to(given.states.dtype)
        lam, scale = cotangent_at_crossing(hit.point, on_time, given.states[k])
        parts = given.states[k].norm() + scale.abs() * hit.point.gradient.norm()
        jumps.append(problem.jump(hit, lam, float(parts)))
        targets[k] = -scale
        explicit = [a + b for a, b in zip(explicit, of_criterion(hit, scale, leaves), strict=True)]
    evaluations, products = call.flow.calls, call.flow.products
    if route.own_graph:
        x0, t0, targets, breakpoints, totals = _by_graph(problem, route, given)
        pulled = PullBack(x0, totals, vjps=call.flow.calls - evaluations)
    else:
        pulled = _pulled_back(problem, route, jumps)
        x0, totals = pulled.start, [a + b for a, b in zip(pulled.leaves, explicit, strict=True)]
    stats = Stats(
        nfe_backward=call.flow.calls - evaluations,
        vjps=call.flow.products - products if pulled.vjps is None else pulled.vjps,
        route=pulled.route or type(route).__name__,
        fallback=pulled.fallback,
    )
    if not route.own_graph:
        t0 = -_start_rate(problem, jumps, pulled)
        masses = pulled.masses or {}
        breakpoints = targets.new_tensor([-masses.get(b, 0.0) for b in call.learned])
    return Gradients(
        x0=x0,
        t0=t0,
        targets=targets,
        breakpoints=breakpoints,
        leaves=totals,
        jumps=jumps,
        pulled=pulled,
        stats=stats,
    )


def _pulled_back(problem: StoppingProblem, route: GradientRoute, jumps: Sequence[Jump]) -> PullBack:
    """The pull-back, with lam^T (F(b+) - F(b-)) where it is asked for."""
    if problem.call.learned and not isinstance(route, Transpose):
        # Piece by piece, so that lam is known where the flow jumps.
        return GradientRoute.pull_back_path(route, problem, jumps)
    pulled = route.pull_back_path(problem, jumps)
    if problem.call.learned and pulled.masses is None:
        return GradientRoute.pull_back_path(route, problem, jumps)
    return pulled


def _start_rate(problem: StoppingProblem, jumps: Sequence[Jump], pulled: PullBack) -> Tensor:
    """lam(t0)^T F(t0, x0), shape (): from the end of the first smooth stretch where that is known.

    Where lam is large and F small, or the other way round, the product itself cancels, and what it
    has to be does not: on an autonomous flow it is lam^T F at the crossing, exactly.
    """
    if problem.knows_time:
        if pulled.start_rate is not None:
            return problem.x0.new_tensor(pulled.start_rate)
        if pulled.time is not None and len(jumps) == 1 and len(problem.times) == 2:
            return jumps[0].cotangent @ jumps[0].velocity - pulled.time
    return pulled.start @ problem.flow.plain(problem.start, problem.x0)


def _by_graph(
    problem: StoppingProblem, route: GradientRoute, given: Cotangents
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients to x0, t0, targets, breakpoints and leaves of a route that has its own graph.

    The graph is made anew, and its gradients taken as autograd takes those of the result's own.
    """
    x0 = problem.x0.detach().clone().requires_grad_(True)
    clock = {"dtype": torch.float64, "device": x0.device, "requires_grad": True}
    t0 = torch.tensor(problem.start, **clock)  # type: ignore[arg-type]
    targets = [torch.tensor(hit.watch.target, **clock) for hit in problem.hits]  # type: ignore[arg-type]
    learned = [torch.tensor(b, **clock) for b in problem.call.learned]  # type: ignore[arg-type]
    with torch.enable_grad():
        times, states = route.graph(problem, x0, t0, targets, *([learned] if learned else []))
        total = (given.times * torch.stack(times)).sum()
        total = total + (given.states * torch.stack(states)).sum()
    inputs = [x0, t0, *targets, *learned, *problem.leaves.tensors]
    grads = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, inputs, strict=True)]
    first, second = 2 + len(targets), 2 + len(targets) + len(learned)
    by_times = torch.stack(filled[first:second]) if learned else t0.new_zeros(0)
    return filled[0], filled[1], torch.stack(filled[2:first]), by_times, filled[second:]


def of_criterion(hit: Hit, scale: Tensor, leaves: LeafSet) -> list[Tensor]:
    """The explicit term of a hit: J depends on the parameters of the criterion at x_T.

    One that flow and criterion share receives both terms.
    """
    point, criterion = hit.point, hit.watch.criterion
    assert point is not None
    explicit = criterion.vjp(*point.seen_at, scale, leaves, look=True)
    if point.aside > 0.0:
        return explicit.leaves
    rounding = torch.finfo(point.state.dtype).eps / torch.finfo(torch.float64).eps
    size = float((point.gradient * point.state).abs().sum()) + abs(hit.watch.target)
    check_same_value(float(explicit.value), point.value, rounding * size, name="criterion")
    return explicit.leaves
