"""The backward pass of T and x_T: the quotient, a route, and the evidence for what they give."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.consistency import check_same_value
from . import DirectAdjoint, GradientRoute, InterpolatingAdjoint, PullBack
from .evidence import identity_residual, lam_change, relative_difference, relative_size
from .problem import StoppingProblem
from .quotient import cotangent_at_crossing
from .rerun import solved_again

__all__ = ["Cotangents", "CrossingGradients", "differentiate", "judge"]

_SECOND_RUN = 0.1


@dataclass(frozen=True)
class Cotangents:
    """What arrives at a crossing.

    Attributes:
        time: c on T, shape ().
        state: w on x_T, shape (n,).
        fixed: On the state at the fixed time T, shape (n,), from a run that goes on there to
            further targets: it adds to lam(T) and does not move the crossing.
    """

    time: Tensor
    state: Tensor
    fixed: Tensor

    @property
    def moves_crossing(self) -> bool:
        """Whether anything arrives at the crossing itself, and not only what passes it by."""
        return bool((self.time != 0).any()) or bool((self.state != 0).any())

    @property
    def arrives(self) -> bool:
        """Whether anything arrives at all: not where an earlier target alone is differentiated."""
        return self.moves_crossing or bool((self.fixed != 0).any())

    @property
    def only_time(self) -> bool:
        """Whether T alone is differentiated."""
        others = bool((self.state != 0).any()) or bool((self.fixed != 0).any())
        return bool(self.time != 0) and not others


@dataclass(frozen=True)
class CrossingGradients:
    """Gradients of c T + w^T x_T, and of what comes after.

    Attributes:
        x0: Shape (n,).
        t0: Shape ().
        target: Shape ().
        leaves: One tensor a leaf.
        lam: lam(T), shape (n,).
        pulled: What the route gave.
    """

    x0: Tensor
    t0: Tensor
    target: Tensor
    leaves: list[Tensor]
    lam: Tensor
    pulled: PullBack


def differentiate(
    problem: StoppingProblem, route: GradientRoute, given: Cotangents
) -> CrossingGradients:
    """Pull the cotangents of a crossing back to everything that it depends on.

    Args:
        problem: The solved problem.
        route: How to pull lam(T) back through the flow map.
        given: The cotangents.
    """
    require = getattr(problem.flow.function, "require_differentiable", None)
    if require is not None:
        require(problem.layout.unpack(problem.x0))
    crossing = problem.crossing
    lam, scale = given.fixed, torch.zeros_like(given.fixed[0])
    if given.moves_crossing:
        time = given.time.to(given.state.dtype)
        jump, scale = cotangent_at_crossing(crossing, time, given.state)
        lam = lam + jump
    pulled = route.pull_back(problem, lam)
    # J depends on the parameters of the criterion at x_T, with the same scale; one that flow
    # and criterion share receives both terms.
    explicit = problem.criterion.vjp(
        crossing.time, crossing.state, scale, problem.leaves, look=True
    )
    rounding = torch.finfo(lam.dtype).eps / torch.finfo(torch.float64).eps
    size = float((crossing.gradient * crossing.state).abs().sum()) + abs(problem.target)
    check_same_value(float(explicit.value), crossing.value, rounding * size, name="criterion")
    start_velocity = problem.flow.plain(problem.start, problem.x0)
    return CrossingGradients(
        x0=pulled.start,
        t0=-(pulled.start @ start_velocity),
        target=-scale,
        leaves=[a + b for a, b in zip(pulled.leaves, explicit.leaves, strict=True)],
        lam=lam,
        pulled=pulled,
    )


def judge(
    problem: StoppingProblem,
    route: GradientRoute,
    found: CrossingGradients,
    given: Cotangents,
) -> None:
    """Fill in the evidence for gradients that were just computed, and warn where it is poor.

    Costs two evaluations of flow and criterion beside what the backward solve knows anyway; with
    `problem.thorough` a second run at a tenth of the tolerance with its backward pass; for
    `DirectAdjoint`, whose graph tells nothing, one backward solve of `InterpolatingAdjoint`.
    """
    evidence, crossing, stats = problem.evidence, problem.crossing, problem.stats
    calls, counted = problem.flow.calls, (stats.vjps, stats.nfe_backward)
    witness = found.pulled
    if isinstance(route, DirectAdjoint):
        other = differentiate(problem, InterpolatingAdjoint(), given)
        evidence.second_route = _difference(found, other)
        witness = other.pulled
    at_end = float(found.lam @ crossing.velocity)
    evidence.identity = None
    if problem.flow.reads_clock_blindly:
        pass  # its integral of lam^T F_t is missing
    elif witness.departure is not None:
        evidence.identity = witness.departure
    elif witness.time is not None:
        start_velocity = problem.flow.plain(problem.start, problem.x0)
        evidence.identity = identity_residual(found.x0 * start_velocity, at_end, witness.time)
    if witness.quadrature_errors is not None:
        norms = [float(gradient.norm()) for gradient in witness.leaves]
        sizes = map(relative_size, witness.quadrature_errors, norms)
        evidence.quadrature = max(sizes, default=0.0)
    evidence.clock = _clock(problem, depends_on_time=bool(witness.time))
    evidence.time_error = evidence.time_term = None
    # lam^T F has the unit of the cotangents on times, those of later targets among them.
    times = float(given.time) if given.only_time else at_end
    if witness.defect is not None and times != 0 and not bool((given.state != 0).any()):
        evidence.time_error = abs(witness.defect / times)
        evidence.time_term = evidence.time_error / problem.span
    evidence.noise = evidence.rounding = None
    if given.moves_crossing:
        evidence.noise = _change(problem, problem.state_error)
        evidence.rounding = _change(problem, _rounding(crossing.state))
    if problem.thorough:
        again = solved_again(problem, _SECOND_RUN)
        evidence.second_run = float("inf")
        if again is not None:
            evidence.second_run = _difference(found, differentiate(again, route, given))
    # What the evidence took is no cost of the route.
    stats.vjps, stats.nfe_backward = counted
    stats.checks += problem.flow.calls - calls
    evidence.warn()


def _change(problem: StoppingProblem, state_error: Tensor) -> float:
    return lam_change(problem.flow, problem.criterion, problem.crossing, state_error)


def _difference(found: CrossingGradients, other: CrossingGradients) -> float:
    """Largest relative difference over x0, the target and the leaves."""
    first = [found.x0, found.target, *found.leaves]
    return relative_difference(first, [other.x0, other.target, *other.leaves])


def _clock(problem: StoppingProblem, *, depends_on_time: bool) -> float:
    """One rounding of the clock, relative to T - t0; a flow sees t in the dtype of the state."""
    dtype = problem.x0.dtype if depends_on_time else torch.float64
    latest = max(abs(problem.start), abs(problem.end))
    return torch.finfo(dtype).eps * latest / problem.span


def _rounding(state: Tensor) -> Tensor:
    """One rounding of every element, with signs that do not conspire."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, state.shape, generator=generator) * 2 - 1
    return torch.finfo(state.dtype).eps * state.abs() * signs.to(state)
