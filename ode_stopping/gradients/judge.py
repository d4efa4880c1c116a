"""The verdict on a gradient that was just computed: what speaks for it, and what against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.stats import Stats
from ..crossing.point import Crossing, delay_changes, lam_change
from .backward import Cotangents, Gradients, differentiate
from .evidence import Evidence, identity_residual, relative_size
from .interpolating import InterpolatingAdjoint
from .problem import StoppingProblem
from .refinement import FLOOR, Refined, differences, natural_sizes, refined
from .route import GradientRoute, PullBack
from .steps import StepAdjoint

__all__ = ["judge"]

# J' may change by some times as much as T, over the length of the last steps.
_FELT = 1e-2


def judge(
    problem: StoppingProblem,
    route: GradientRoute,
    found: Gradients,
    given: Cotangents,
) -> tuple[Gradients, list[Evidence], Stats]:
    """The evidence for gradients that were just computed, one a hit; a warning where it is poor.

    Costs two evaluations of flow and criterion a hit; without `light` what `refined` costs; for a
    route that vouches for nothing, one backward pass of another, against which it is held.

    Returns:
        The gradients that are to be returned, the evidence, and what it cost, as checks.
    """
    call = problem.call
    calls = call.flow.calls
    better = None
    if problem.steps and not call.light:
        better = refined(problem, route, found, given)
    common = _of_the_path(problem, route, found, given, better)
    parts = []
    asked = given.wanted[2 : 2 + len(problem.hits)]
    for hit, arrives, to_target in zip(problem.hits, given.arriving, asked, strict=True):
        evidence = Evidence.of(problem, hit)
        if arrives:
            assert hit.point is not None
            assert hit.state_error is not None
            evidence = replace(evidence, **common)
            if hit.point.aside == 0.0:  # (On a kink a small move changes the side, as was said.)
                rounding = lam_change(call.flow, hit.point, _rounding(hit.state))
                if _is_flat(problem, hit.point):
                    of_lam, of_rate, of_time = delay_changes(call.flow, hit.point, problem.start)
                    rounding = max(
                        rounding,
                        of_lam,
                        of_rate if to_target else 0.0,
                        # (A quadrature over the path gains as much as the path does.)
                        of_time if any(given.wanted[2 + len(problem.hits) :]) else 0.0,
                    )
                evidence = replace(
                    evidence,
                    noise=lam_change(call.flow, hit.point, hit.state_error),
                    rounding=rounding,
                )
        parts.append(evidence)
    worst = max(parts, key=lambda evidence: evidence.estimate or 0.0)
    worst.warn()
    returned = found if better is None else better.gradients
    return returned, parts, Stats(checks=call.flow.calls - calls)


def _is_flat(problem: StoppingProblem, point: Crossing) -> bool:
    """Whether J changes so slowly that its rounding moves T by what J' may feel."""
    lengths = [step.length for step in problem.steps[-2:]]
    length = max(lengths, default=problem.end - problem.start)
    return point.rounding > _FELT * problem.call.promise * length * abs(point.rate)


def _of_the_path(
    problem: StoppingProblem,
    route: GradientRoute,
    found: Gradients,
    given: Cotangents,
    better: Refined | None,
) -> dict[str, Any]:
    """The figures that all hits share: they are made along the path."""
    figures: dict[str, Any] = {} if better is None else {"leaves": better.leaves}
    vouched = route.vouches_for(problem)
    if better is not None and type(route) is StepAdjoint:
        # Whatever the order of the method: it was held against other steps.
        found, vouched = better.gradients, StepAdjoint.figures
    witness = found.pulled
    if witness.fallback is not None:
        vouched = InterpolatingAdjoint.figures
    if not vouched and better is not None and better.between is not None:
        figures["second_route"] = better.between
    elif not vouched:
        other = differentiate(problem, InterpolatingAdjoint(), given)
        figures["second_route"] = max(differences(problem, given, found, other))
        witness, vouched = other.pulled, InterpolatingAdjoint.figures
    at_end = sum(float(jump.cotangent @ jump.velocity) for jump in found.jumps)
    # Without a cotangent on a time lam^T F is 0 throughout, and its rounding has no scale.
    meaningful = better is None or bool(given.times.any())
    if "identity" in vouched and problem.knows_time and meaningful:
        figures["identity"] = _identity(problem, witness, at_end)
    if "quadrature" in vouched:
        figures["quadrature"] = _quadrature(witness, natural_sizes(problem, given, found))
    figures["clock"] = _clock(problem, depends_on_time=bool(witness.time))
    if "time_term" in vouched and not bool((given.states != 0).any()):
        # lam^T F has the unit of the cotangents on the times.
        times = float(given.times.sum()) if len(found.jumps) == 1 else at_end
        if times != 0:
            error = float("inf") if witness.defect is None else abs(witness.defect / times)
            figures["time_error"] = error
            figures["time_term"] = error / (problem.end - problem.start)
    return figures


def _identity(problem: StoppingProblem, witness: PullBack, at_end: float) -> float:
    """Residual of the identity; a figure that was promised and is missing is the worst of all."""
    if witness.departure is not None:
        return witness.departure
    if witness.time is None:
        return float("inf")
    start_velocity = problem.flow.plain(problem.start, problem.x0)
    return identity_residual(witness.start * start_velocity, at_end, witness.time)


def _quadrature(witness: PullBack, natural: Sequence[float]) -> float:
    if witness.quadrature_errors is None:
        return float("inf")
    # What cancels, cancels to rounding only.
    sizes = natural[len(natural) - len(witness.leaves) :]
    pairs = zip(witness.leaves, sizes, strict=True)
    norms = [max(float(gradient.norm()), FLOOR * size) for gradient, size in pairs]
    return max(map(relative_size, witness.quadrature_errors, norms), default=0.0)


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
