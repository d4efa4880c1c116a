"""The verdict on a gradient that was just computed: what speaks for it, and what against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..core.stats import Stats
from ..crossing.point import Crossing, delay_changes, lam_change
from ..crossing.watch import Hit
from .backward import Cotangents, Gradients, differentiate
from .chain import Arriving, Chain, ChainGradients
from .evidence import Evidence, identity_residual, relative_size
from .interpolating import InterpolatingAdjoint
from .problem import StoppingProblem
from .refinement import FLOOR, arc_differences, arc_sizes, refined
from .route import GradientRoute, PullBack
from .steps import StepAdjoint

__all__ = ["judge"]

# J' may change by some times as much as T, over the length of the last steps.
_FELT = 1e-2


def judge(
    chain: Chain, route: GradientRoute, found: ChainGradients, given: Arriving
) -> tuple[ChainGradients, list[Evidence], Stats]:
    """The evidence for gradients that were just computed, one a hit; a warning where it is poor.

    Costs two evaluations of flow and criterion a hit; without `light` what `refined` costs; for a
    route that vouches for nothing, one backward pass of another, against which it is held.

    Returns:
        The gradients that are to be returned, the evidence, and what it cost, as checks.
    """
    call = chain.call
    calls = call.flow.calls
    better = None
    if any(problem.steps for problem in chain.problems) and not call.light:
        better = refined(chain, route, found, given)
    rows = [] if better is None else better.gradients.arcs
    parts = {
        id(hit): Evidence.of(call, hit, problem.run.velocity_error)
        for problem in chain.problems
        for hit in problem.hits
    }
    common: dict[str, Any] = {} if better is None else {"leaves": better.leaves}
    for index, (problem, on_arc, of_arc) in enumerate(found.arcs):
        other = rows[index][2] if better is not None and index < len(rows) else None
        between = None if better is None else better.between
        figures = _of_the_path(
            problem, route, of_arc, on_arc, other, between, alone=len(chain.links) == 1
        )
        for name, figure in figures.items():
            common[name] = max(common.get(name, 0.0), figure)
    for problem, on_arc, _ in found.arcs:
        asked = on_arc.wanted[2 : 2 + len(problem.hits)]
        to_leaves = any(on_arc.wanted[2 + len(problem.hits) :])
        rows_of_arc = zip(problem.hits, on_arc.arriving, asked, strict=True)
        for hit, arrives, to_target in rows_of_arc:
            if arrives:
                figures = _at_hit(problem, hit, to_target=to_target, to_leaves=to_leaves)
                parts[id(hit)] = replace(parts[id(hit)], **(common | figures))
    ordered = list(parts.values())
    judged = [one for one in ordered if one.estimate is not None]
    if judged:
        max(judged, key=lambda evidence: evidence.estimate or 0.0).warn()
    returned = found if better is None else better.gradients
    return returned, ordered, Stats(checks=call.flow.calls - calls)


def _at_hit(
    problem: StoppingProblem, hit: Hit, *, to_target: bool, to_leaves: bool
) -> dict[str, float]:
    """The figures of one hit: what lam becomes by the error of x_T, and by rounding."""
    call, point = problem.call, hit.point
    assert point is not None
    assert hit.state_error is not None
    # (lam does not change at a known time; on a kink a small move changes the side, as was said.)
    if point.aside > 0.0 or hit.watch.time is not None:
        return {}
    rounding = lam_change(call.flow, point, _rounding(hit.state))
    if _is_flat(problem, point):
        of_lam, of_rate, of_time = delay_changes(call.flow, point, problem.start)
        # (A quadrature over the path gains as much as the path does.)
        further = (of_rate if to_target else 0.0, of_time if to_leaves else 0.0)
        rounding = max(rounding, of_lam, *further)
    return {"noise": lam_change(call.flow, point, hit.state_error), "rounding": rounding}


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
    better: Gradients | None,
    between: float | None,
    *,
    alone: bool,
) -> dict[str, float]:
    """The figures that the hits of an arc share: they are made along the path.

    Args:
        problem: The arc.
        route: What was asked for.
        found: What it gave.
        given: What arrived.
        better: What is returned in its place; None where it was held against nothing.
        between: How far it is from the transpose of the same steps, where that speaks for it.
        alone: Whether it is the only arc, so that what arrives at its times is the user's.
    """
    figures: dict[str, float] = {}
    vouched = route.vouches_for(problem)
    if better is not None and type(route) is StepAdjoint:
        # Whatever the order of the method: it was held against other steps.
        found, vouched = better, StepAdjoint.figures
    witness = found.pulled
    if witness.fallback is not None:
        vouched = InterpolatingAdjoint.figures
    if not vouched and between is not None:
        figures["second_route"] = between
    elif not vouched:
        other = differentiate(problem, InterpolatingAdjoint(), given)
        figures["second_route"] = max(arc_differences(problem, given, found, other))
        witness, vouched = other.pulled, InterpolatingAdjoint.figures
    at_end = sum(float(jump.cotangent @ jump.velocity) for jump in found.jumps)
    # Without a cotangent on a time lam^T F is 0 throughout, and its rounding has no scale.
    meaningful = better is None or bool(given.times.any())
    if "identity" in vouched and problem.knows_time and meaningful:
        received = [float((j.cotangent * j.velocity).abs().sum()) for j in found.jumps]
        figures["identity"] = _identity(problem, witness, at_end, sum(received))
    if "quadrature" in vouched:
        figures["quadrature"] = _quadrature(witness, arc_sizes(problem, given, found))
    figures["clock"] = _clock(problem, depends_on_time=bool(witness.time))
    if alone and "time_term" in vouched and not bool((given.states != 0).any()):
        # lam^T F has the unit of the cotangents on the times.
        times = float(given.times.sum()) if len(found.jumps) == 1 else at_end
        if times != 0:
            error = float("inf") if witness.defect is None else abs(witness.defect / times)
            figures["time_error"] = error
            figures["time_term"] = error / (problem.end - problem.start)
    return figures


def _identity(problem: StoppingProblem, witness: PullBack, at_end: float, received: float) -> float:
    """Residual of the identity; a figure that was promised and is missing is the worst of all."""
    if witness.departure is not None:
        return witness.departure
    if witness.time is None:
        return float("inf")
    start_velocity = problem.flow.plain(problem.start, problem.x0)
    return identity_residual(witness.start * start_velocity, at_end, witness.time, received)


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
