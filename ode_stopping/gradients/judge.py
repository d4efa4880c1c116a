"""The backward pass of the stopping times: the quotient, a route, and the evidence for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.consistency import check_same_value
from ..core.stats import Stats
from ..crossing.point import lam_change
from ..crossing.watch import Hit
from .evidence import Evidence, identity_residual, relative_difference, relative_size
from .interpolating import InterpolatingAdjoint
from .problem import Jump, StoppingProblem
from .quotient import cotangent_at_crossing
from .rerun import solved_again
from .route import GradientRoute, PullBack

__all__ = ["Cotangents", "Gradients", "differentiate", "judge"]

_SECOND_RUN = 0.1


@dataclass(frozen=True)
class Cotangents:
    """What arrives at the hits of a problem.

    Attributes:
        times: c on the stopping times, shape (hits,).
        states: w on the states there, shape (hits, n).
    """

    times: Tensor
    states: Tensor

    @property
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
        leaves: One tensor a leaf.
        jumps: What lam received at the hits, in order of time.
        pulled: What the route gave.
        stats: What it cost.
    """

    x0: Tensor
    t0: Tensor
    targets: Tensor
    leaves: list[Tensor]
    jumps: list[Jump]
    pulled: PullBack
    stats: Stats


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
        jumps.append(problem.jump(hit, lam))
        targets[k] = -scale
        explicit = [
            a + b for a, b in zip(explicit, _of_criterion(problem, hit, scale), strict=True)
        ]
    evaluations, products = call.flow.calls, call.flow.products
    if route.own_graph:
        x0, t0, targets, totals = _by_graph(problem, route, given)
        pulled = PullBack(x0, totals, vjps=call.flow.calls - evaluations)
    else:
        pulled = route.pull_back_path(problem, jumps)
        x0, totals = pulled.start, [a + b for a, b in zip(pulled.leaves, explicit, strict=True)]
    stats = Stats(
        nfe_backward=call.flow.calls - evaluations,
        vjps=call.flow.products - products if pulled.vjps is None else pulled.vjps,
        route=pulled.route or type(route).__name__,
        fallback=pulled.fallback,
    )
    if not route.own_graph:
        t0 = -(x0 @ call.flow.plain(problem.start, problem.x0))
    return Gradients(
        x0=x0, t0=t0, targets=targets, leaves=totals, jumps=jumps, pulled=pulled, stats=stats
    )


def _by_graph(
    problem: StoppingProblem, route: GradientRoute, given: Cotangents
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients to x0, t0, the targets and the leaves of a route that has its own graph.

    The graph is made anew, and its gradients taken as autograd takes those of the result's own.
    """
    x0 = problem.x0.detach().clone().requires_grad_(True)
    clock = {"dtype": torch.float64, "device": x0.device, "requires_grad": True}
    t0 = torch.tensor(problem.start, **clock)  # type: ignore[arg-type]
    targets = [torch.tensor(hit.watch.target, **clock) for hit in problem.hits]  # type: ignore[arg-type]
    with torch.enable_grad():
        times, states = route.graph(problem, x0, t0, targets)
        total = (given.times * torch.stack(times)).sum()
        total = total + (given.states * torch.stack(states)).sum()
    inputs = [x0, t0, *targets, *problem.leaves.tensors]
    grads = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, inputs, strict=True)]
    count = len(targets)
    return filled[0], filled[1], torch.stack(filled[2 : 2 + count]), filled[2 + count :]


def _of_criterion(problem: StoppingProblem, hit: Hit, scale: Tensor) -> list[Tensor]:
    """The explicit term of a hit: J depends on the parameters of the criterion at x_T.

    One that flow and criterion share receives both terms.
    """
    point, criterion = hit.point, problem.criterion
    assert point is not None
    explicit = criterion.vjp(point.time, point.state, scale, problem.leaves, look=True)
    rounding = torch.finfo(point.state.dtype).eps / torch.finfo(torch.float64).eps
    size = float((point.gradient * point.state).abs().sum()) + abs(hit.watch.target)
    check_same_value(float(explicit.value), point.value, rounding * size, name="criterion")
    return explicit.leaves


def judge(
    problem: StoppingProblem,
    route: GradientRoute,
    found: Gradients,
    given: Cotangents,
) -> tuple[list[Evidence], Stats]:
    """The evidence for gradients that were just computed, one a hit; a warning where it is poor.

    Costs two evaluations of flow and criterion a hit beside what the backward pass knows anyway; in
    a problem that is `thorough` a second run at a tenth of the tolerance with its backward pass;
    for a route that vouches for nothing, one backward solve of `InterpolatingAdjoint`, against
    which it is held.

    Returns:
        The evidence, and what it cost, as checks.
    """
    call = problem.call
    calls = call.flow.calls
    common = _of_the_path(problem, route, found, given)
    parts = []
    for hit, arrives in zip(problem.hits, given.arriving, strict=True):
        evidence = Evidence.of(problem, hit)
        if arrives:
            assert hit.point is not None
            assert hit.state_error is not None
            evidence = replace(
                evidence,
                noise=lam_change(call, hit.point, hit.state_error),
                rounding=lam_change(call, hit.point, _rounding(hit.state)),
                **common,
            )
        parts.append(evidence)
    worst = max(parts, key=lambda evidence: evidence.estimate or 0.0)
    worst.warn()
    return parts, Stats(checks=call.flow.calls - calls)


def _of_the_path(
    problem: StoppingProblem, route: GradientRoute, found: Gradients, given: Cotangents
) -> dict[str, Any]:
    """The figures that all hits share: they are made along the path."""
    figures: dict[str, Any] = {}
    witness, vouched = found.pulled, route.vouches_for(problem)
    if found.pulled.fallback is not None:
        vouched = InterpolatingAdjoint.figures
    if not vouched:
        other = differentiate(problem, InterpolatingAdjoint(), given)
        figures["second_route"] = _difference(found, other)
        witness, vouched = other.pulled, InterpolatingAdjoint.figures
    at_end = sum(float(jump.cotangent @ jump.velocity) for jump in found.jumps)
    if "identity" in vouched and problem.knows_time:
        figures["identity"] = _identity(problem, witness, at_end)
    if "quadrature" in vouched:
        figures["quadrature"] = _quadrature(witness)
    figures["clock"] = _clock(problem, depends_on_time=bool(witness.time))
    if "time_term" in vouched and not bool((given.states != 0).any()):
        # lam^T F has the unit of the cotangents on the times.
        times = float(given.times.sum()) if len(found.jumps) == 1 else at_end
        if times != 0:
            error = float("inf") if witness.defect is None else abs(witness.defect / times)
            figures["time_error"] = error
            figures["time_term"] = error / (problem.end - problem.start)
    if problem.call.thorough:
        again = solved_again(problem, _SECOND_RUN)
        figures["second_run"] = float("inf")
        if again is not None:
            figures["second_run"] = _difference(found, differentiate(again, route, given))
    return figures


def _identity(problem: StoppingProblem, witness: PullBack, at_end: float) -> float:
    """Residual of the identity; a figure that was promised and is missing is the worst of all."""
    if witness.departure is not None:
        return witness.departure
    if witness.time is None:
        return float("inf")
    start_velocity = problem.flow.plain(problem.start, problem.x0)
    return identity_residual(witness.start * start_velocity, at_end, witness.time)


def _quadrature(witness: PullBack) -> float:
    if witness.quadrature_errors is None:
        return float("inf")
    norms = [float(gradient.norm()) for gradient in witness.leaves]
    return max(map(relative_size, witness.quadrature_errors, norms), default=0.0)


def _difference(found: Gradients, other: Gradients) -> float:
    """Largest relative difference over x0, the targets and the leaves."""
    first: Sequence[Tensor] = [found.x0, found.targets, *found.leaves]
    return relative_difference(first, [other.x0, other.targets, *other.leaves])


def _clock(problem: StoppingProblem, *, depends_on_time: bool) -> float:
    """One rounding of the clock, relative to T - t0; a flow sees t in the dtype of the state."""
    dtype = problem.x0.dtype if depends_on_time else torch.float64
    latest = max(abs(problem.start), abs(problem.end))
    return torch.finfo(dtype).eps * latest / (problem.end - problem.start)


def _rounding(state: Tensor) -> Tensor:
    """One rounding of every element, with signs that do not conspire."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, state.shape, generator=generator) * 2 - 1
    return torch.finfo(state.dtype).eps * state.abs() * signs.to(state)
