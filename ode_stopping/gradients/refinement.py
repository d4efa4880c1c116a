"""The error of every leaf by itself, from the gradient on other steps.

On the accepted steps merged in pairs the gradient has 2^p times the error, p the order of the
method, so that the difference is 2^p - 1 errors. Where that comes near the promise, the steps are
halved: the gradient there is the better one, it is returned, and the difference bounds its error
with room to spare. Every leaf is looked at by itself, for one that has a small share in lam^T F can
be wrong as a whole while every figure of the path is small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

import torch
from torch import Tensor

from ..core.consistency import noise_like
from .backward import Cotangents, Gradients
from .backward_solve import Augmented
from .chain import Arriving, Chain, ChainGradients, pulled_back, target_size
from .directional import contradictions
from .jumps import shares_of_jumps, warn_about_moved_jumps
from .problem import StoppingProblem
from .regridded import halved, merged
from .route import GradientRoute
from .steps import OverJumps, StepAdjoint, Transpose

__all__ = [
    "FLOOR",
    "LeafError",
    "Refined",
    "arc_differences",
    "arc_sizes",
    "natural_sizes",
    "refined",
]

# Where the error on merged steps is below this share of the promise, it is believed.
_BELIEVED = 0.3
# A difference to halved steps is at least so many errors of the gradient there.
_AT_LEAST = 5.0
_HALVINGS = 3
# A gradient is off by so many roundings of the result for nothing.
_FEW_ROUNDINGS = 100.0
# Of the path, at which it is looked at what a leaf moves.
_POINTS = 4
# A gradient that has cancelled below this share of its parts is judged by that share: with a
# promise of 50 rtol, what is off by less than rtol of the parts is right.
FLOOR = 1 / 50

Cause = Literal["steps", "lost", "jump"]


@dataclass(frozen=True)
class LeafError:
    """What is known of the gradient to one tensor.

    Attributes:
        name: Of the tensor.
        norm: |dL/dtensor|.
        error: Estimate of its relative error.
        cause: Where it comes from: "steps" that are too long, a "lost" derivative (a difference of
            the result contradicts it), or a "jump" of the flow in the state.
    """

    name: str
    norm: float
    error: float
    cause: Cause = "steps"


@dataclass(frozen=True)
class Refined:
    """A gradient with the error of every part.

    Attributes:
        gradients: What is to be returned.
        leaves: One entry a tensor that is differentiated to.
        between: Largest relative difference of the route to the transpose of the same steps, where
            that can speak for it.
    """

    gradients: ChainGradients
    leaves: tuple[LeafError, ...]
    between: float | None = None

    @property
    def worst(self) -> float:
        """The largest error."""
        return max((leaf.error for leaf in self.leaves), default=0.0)


def refined(chain: Chain, route: GradientRoute, found: ChainGradients, given: Arriving) -> Refined:
    """Hold a gradient against those on other steps, and against a difference of the result.

    Costs a forward and a backward pass on half as many steps, and two more forward; where those do
    not settle it, also a forward and a backward pass on twice as many, and so on up to eight times.
    """
    judge = _Comparison(chain, given, found)
    own, promise = type(route) is StepAdjoint, chain.call.promise
    if chain.call.thorough:
        return judge.until_settled(replaces=own)
    if own and found.fell_back:
        return judge.on_halves(replaces=True, share=_AT_LEAST)
    transposed = found if own else pulled_back(chain, Transpose(), given)
    departs = not own and transposed.departure > promise
    between = judge.errors(found, transposed) if not own and not departs else None
    coarse = None if departs else merged(chain)
    order = chain.call.method.order
    if coarse is not None:
        factor = 2.0**order - 1.0
        on_coarse = pulled_back(coarse, Transpose(), given)
        errors = judge.errors(transposed, on_coarse, factor)
        if between is not None:
            errors = [a + b for a, b in zip(errors, between, strict=True)]
        if max(errors, default=0.0) <= _BELIEVED * promise:
            lost = contradictions(coarse, on_coarse, given)
            over = judge.over_jumps(transposed, coarse)
            return judge.result(found, errors, between=between, lost=lost, over=over)
    share = min(_AT_LEAST, 2.0**order - 1.0) if own else 1.0
    return judge.on_halves(replaces=own, share=share, between=between)


class _Comparison:
    """Gradients of one chain on several sets of steps."""

    def __init__(self, chain: Chain, given: Arriving, found: ChainGradients) -> None:
        self._chain = chain
        self._given = given
        self._found = found

    def on_halves(
        self, *, replaces: bool, share: float, between: list[float] | None = None
    ) -> Refined:
        """The steps in halves: the gradient there, or the one that was found.

        Where the one on halves is to be returned and is not settled either, they are halved again:
        what was wrong by much on the accepted steps may be right on these.
        """
        fine = halved(self._chain)
        if fine is None:
            return self.result(self._found, [inf] * len(self._names()), between=between)
        other = pulled_back(fine, StepAdjoint(), self._given)
        # A continuous adjoint has an error of its own, which finer steps do not take away.
        errors = self.errors(self._found, other, share if not other.fell_back else 1.0)
        lost, over = self._lost(fine, other), self.over_jumps(None, None)
        for _ in range(_HALVINGS - 1):
            settled = max(errors, default=0.0) <= self._chain.call.promise
            hopeless = over is not None or max(lost) > 0.0 or other.fell_back
            if settled or hopeless or not replaces:
                break
            finer = halved(fine)
            if finer is None:
                break
            before, fine, other = other, finer, pulled_back(finer, StepAdjoint(), self._given)
            errors = self.errors(before, other, share if not other.fell_back else 1.0)
        returned = other if replaces else self._found
        return self.result(returned, errors, between=between, lost=lost, over=over)

    def until_settled(self, *, replaces: bool) -> Refined:
        """Halves of halves until two gradients in a row agree."""
        chain: Chain | None = self._chain
        before, errors = self._found, [inf] * len(self._names())
        lost: list[float] | None = None
        for _ in range(_HALVINGS):
            assert chain is not None
            chain = halved(chain)
            if chain is None:
                errors = [inf] * len(errors)
                break
            other = pulled_back(chain, StepAdjoint(), self._given)
            lost = self._lost(chain, other) if lost is None else lost
            errors = self.errors(before if replaces else self._found, other)
            settled = self.errors(before, other)
            before = other
            if max(settled, default=0.0) <= self._chain.call.promise:
                break
        over = self.over_jumps(None, None)
        return self.result(before if replaces else self._found, errors, lost=lost, over=over)

    def _lost(self, chain: Chain, gradients: ChainGradients) -> list[float]:
        """What a difference says against the transpose of the steps."""
        if gradients.fell_back:
            gradients = pulled_back(chain, Transpose(), self._given)
        return contradictions(chain, gradients, self._given)

    def over_jumps(
        self, transposed: ChainGradients | None, coarse: Chain | None
    ) -> list[float] | None:
        """By how much the transpose is wrong for going over jumps of the flow in the state."""
        chain = self._chain
        shares: list[Mapping[int, Tensor]] = []
        for number, link in enumerate(chain.links):
            other = None if coarse is None else coarse.links[number].problem
            shares.append({} if link.problem is None else shares_of_jumps(link.problem, other))
            if link.problem is not None and shares[-1]:
                warn_about_moved_jumps(link.problem, shares[-1])
        if not any(shares):
            return None
        if transposed is None:
            transposed = pulled_back(chain, Transpose(), self._given)
        over = pulled_back(chain, [OverJumps(shares=one) for one in shares], self._given)
        departure, left = transposed.departure, over.departure
        if departure > chain.call.promise and not left < 0.5 * departure:
            return None  # the identity departs for something else
        return self.errors(transposed, over)

    def _names(self) -> list[str]:
        chain = self._chain
        known = {watch.index: watch.name for watch in chain.call.watches}
        targets = [known[index] for index in chain.watched]
        learned = range(len(chain.call.learned))
        breakpoints = [f"breakpoints[{index}]" for index in learned]
        return ["x0", "t0", *targets, *breakpoints, *chain.names]

    def errors(
        self, first: ChainGradients, second: ChainGradients, factor: float = 1.0
    ) -> list[float]:
        """`differences` of this chain, over a factor."""
        found = differences(self._chain, self._given, first, second)
        return [error / factor for error in found]

    def result(
        self,
        gradients: ChainGradients,
        errors: Sequence[float],
        *,
        between: Sequence[float] | None = None,
        lost: Sequence[float] | None = None,
        over: Sequence[float] | None = None,
    ) -> Refined:
        """With names, of the tensors that are asked for."""
        wanted = self._given.wanted
        nothing = [0.0] * len(errors)
        rows = [
            LeafError(name, float(part.norm()), *_largest(error, gap, jump))
            for name, part, error, gap, jump, asked in zip(
                self._names(),
                gradients.parts,
                errors,
                lost or nothing,
                over or nothing,
                wanted,
                strict=True,
            )
            if asked
        ]
        asked_for = [e for e, asked in zip(between or [], wanted, strict=False) if asked]
        return Refined(gradients, tuple(rows), max(asked_for, default=None) if between else None)


def _largest(steps: float, lost: float, jump: float) -> tuple[float, Cause]:
    """The error of a leaf, and where it comes from."""
    if lost > 0.0:
        return max(steps, lost, jump), "lost"
    # (A jump shows on finer steps as well.)
    return max(steps, jump), "jump" if jump > 0.5 * steps else "steps"


def differences(
    chain: Chain, given: Arriving, first: ChainGradients, second: ChainGradients
) -> list[float]:
    """|a - b| of every tensor, relative to b, or to a share of what b is without cancellation.

    Zero for what is not asked for.
    """
    naturals = natural_sizes(chain, first, second)
    roundings = _roundings(chain, given)
    return _gaps(first.parts, second.parts, naturals, roundings, given.wanted)


def arc_differences(
    problem: StoppingProblem, given: Cotangents, first: Gradients, second: Gradients
) -> list[float]:
    """`differences` of one arc."""
    chain = Chain.of(problem)
    arriving = Arriving(given.times, given.states, None, given.wanted)
    naturals = arc_sizes(problem, given, first, second)
    roundings = _roundings(chain, arriving)
    return _gaps(first.parts, second.parts, naturals, roundings, given.wanted)


def _gaps(
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    naturals: Sequence[float],
    roundings: Sequence[tuple[float, float]],
    wanted: Sequence[bool],
) -> list[float]:
    found = []
    for a, b, natural, (relative, least), asked in zip(
        first, second, naturals, roundings, wanted, strict=True
    ):
        size = float(b.norm())
        gap = max(float((a - b).norm()) - relative * max(size, natural) - least, 0.0)
        size = max(size, FLOOR * natural)
        error = 0.0 if gap == 0.0 else gap / size if size > 0.0 else inf
        found.append((error if isfinite(error) else inf) if asked else 0.0)
    return found


def _roundings(chain: Chain, given: Arriving) -> list[tuple[float, float]]:
    """What each gradient is rounded by, relative to its parts and absolutely.

    A change of a leaf by itself, or by 1 where it is smaller, that moves the result by some
    roundings is none.
    """
    own, leaves = torch.finfo(chain.call.x0.dtype).eps, chain.leaves.tensors
    rows = chain.rows
    spans = torch.tensor([row.time - chain.start for row in rows], dtype=torch.float64)
    result = float((given.times.cpu() * spans).abs().sum())
    result += float((given.before * torch.stack([row.before for row in rows])).abs().sum())
    least = _FEW_ROUNDINGS * own * result
    coarse = [torch.finfo(leaf.dtype).eps for leaf in leaves]
    return [
        *[(0.0, 0.0)] * (len(given.wanted) - len(leaves)),
        *(
            (2 * eps if eps > own else 0.0, least / max(float(leaf.detach().norm()), 1.0))
            for eps, leaf in zip(coarse, leaves, strict=True)
        ),
    ]


def natural_sizes(chain: Chain, *gradients: ChainGradients) -> list[float]:
    """How large each gradient would be if nothing cancelled; 0 where that is not known.

    Costs some products where nothing arrives at a time.

    Args:
        chain: The chain.
        gradients: What has come back, by one or several routes: the largest counts.
    """
    columns: list[list[float]] = []
    for rows in zip(*(one.arcs for one in gradients), strict=False):
        problem, given, _ = rows[-1]
        columns.append(arc_sizes(problem, given, *(found for _, _, found in rows)))
    targets = [max(sizes) for sizes in zip(*(one.sizes for one in gradients), strict=True)]
    learned = [0.0] * len(chain.call.learned)
    lam = rate = 0.0
    parts = [0.0] * len(chain.leaves.tensors)
    for column in columns:
        lam, rate = max(lam, column[0]), max(rate, column[1])
        parts = [a + b for a, b in zip(parts, column[-len(parts) :], strict=True)] if parts else []
    return [lam, rate, *targets, *(max(one, rate) for one in learned), *parts]


def arc_sizes(problem: StoppingProblem, given: Cotangents, *gradients: Gradients) -> list[float]:
    """`natural_sizes` of one arc."""
    rows = [_parts_of(problem, one) for one in gradients]
    lam, rate, *parts = (max(sizes) for sizes in zip(*rows, strict=True))
    if not bool(given.times.any()):
        # lam^T F is 0 on the whole path then: a leaf that acts along F cancels at every point.
        others = _uncancelled(problem, gradients[-1])
        parts = [max(sizes) for sizes in zip(parts, others, strict=True)]
    rows_of_hits = zip(problem.hits, given.times, given.states, strict=True)
    targets = [target_size(hit, float(c), w) for hit, c, w in rows_of_hits]
    learned = [rate] * len(problem.call.learned)
    return [lam, rate, *targets, *learned, *parts]


def _parts_of(problem: StoppingProblem, found: Gradients) -> tuple[float, ...]:
    if found.pulled.sizes is not None:
        return found.pulled.sizes
    # What lam receives at the hits is known of every route.
    jumps = found.jumps
    lam = max((jump.size for jump in jumps), default=0.0)
    rates = [jump.size * float(jump.velocity.norm()) for jump in jumps]
    return (lam, max(rates, default=0.0), *[0.0] * len(problem.leaves.tensors))


def _uncancelled(problem: StoppingProblem, gradients: Gradients) -> list[float]:
    """Of each leaf about int |lam| |F_p| dt: F_p at a few points, |lam| between its two ends."""
    z, draw = Augmented(problem), noise_like(seed=5)
    first = float(gradients.pulled.start.norm())
    last = max((jump.size for jump in gradients.jumps), default=0.0)
    points = [(step.t0, step.y0) for step in problem.steps]
    stride = max(-(-len(points) // _POINTS), 1)
    points = points[::stride] or [(problem.start, problem.x0)]
    totals = [0.0] * len(problem.leaves.tensors)
    for (t, x), until in zip(points, [*(t for t, _ in points[1:]), problem.end], strict=True):
        share = (t - problem.start) / (problem.end - problem.start)
        lam = first ** (1.0 - share) * last**share
        # |F_p|, by a random direction.
        flow = problem.flow.on(problem.number_at(t))
        found = z.leaves_of(z.derivative(flow, t, x, draw(x)))
        totals = [
            total + (until - t) * lam * float(part.norm())
            for total, part in zip(totals, found, strict=True)
        ]
    return totals
