"""The error of every leaf by itself, from the gradient on other steps.

On the accepted steps merged in pairs the gradient has 2^p times the error, p the order of the
method, so that the difference is 2^p - 1 errors. Where that comes near the promise, the steps are
halved: the gradient there is the better one, it is returned, and the difference bounds its error
with room to spare. Every leaf is looked at by itself, for one that has a small share in lam^T F can
be wrong as a whole while every figure of the path is small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite

from .backward import Cotangents, Gradients, differentiate
from .problem import StoppingProblem
from .regridded import halved, merged
from .route import GradientRoute
from .steps import StepAdjoint, Transpose

__all__ = ["FLOOR", "LeafError", "Refined", "refined"]

# Where the error on merged steps is below this share of the promise, it is believed.
_BELIEVED = 0.3
# A difference to halved steps is at least so many errors of the gradient there.
_AT_LEAST = 5.0
_HALVINGS = 3
# A gradient that has cancelled below this share of its parts is judged by that share.
FLOOR = 1e-3


@dataclass(frozen=True)
class LeafError:
    """What is known of the gradient to one tensor.

    Attributes:
        name: Of the tensor.
        norm: |dL/dtensor|.
        error: Estimate of its relative error.
    """

    name: str
    norm: float
    error: float


@dataclass(frozen=True)
class Refined:
    """A gradient with the error of every part.

    Attributes:
        gradients: What is to be returned.
        leaves: One entry a tensor that is differentiated to.
        between: Largest relative difference of the route to the transpose of the same steps, where
            that can speak for it.
    """

    gradients: Gradients
    leaves: tuple[LeafError, ...]
    between: float | None = None

    @property
    def worst(self) -> float:
        """The largest error."""
        return max((leaf.error for leaf in self.leaves), default=0.0)


def refined(
    problem: StoppingProblem, route: GradientRoute, found: Gradients, given: Cotangents
) -> Refined:
    """Hold a gradient against those on other steps.

    Costs a forward and a backward pass on half as many steps; where those do not settle it, also
    on twice as many.
    """
    judge = _Comparison(problem, given, found)
    own = type(route) is StepAdjoint
    if problem.call.thorough:
        return judge.until_settled(replaces=own)
    if own and found.pulled.fallback is not None:
        return judge.on_halves(replaces=True, share=_AT_LEAST)
    transposed = found if own else differentiate(problem, Transpose(), given)
    departs = not own and (transposed.pulled.departure or 0.0) > problem.call.promise
    between = judge.errors(found, transposed) if not own and not departs else None
    coarse = None if departs else merged(problem)
    if coarse is not None:
        factor = 2.0**problem.method.order - 1.0
        errors = judge.errors(transposed, differentiate(coarse, Transpose(), given), factor)
        if between is not None:
            errors = [a + b for a, b in zip(errors, between, strict=True)]
        if max(errors, default=0.0) <= _BELIEVED * problem.call.promise:
            return judge.result(found, errors, between)
    share = min(_AT_LEAST, 2.0**problem.method.order - 1.0) if own else 1.0
    return judge.on_halves(replaces=own, share=share, between=between)


class _Comparison:
    """Gradients of one problem on several sets of steps."""

    def __init__(self, problem: StoppingProblem, given: Cotangents, found: Gradients) -> None:
        self._problem = problem
        self._given = given
        self._found = found

    def on_halves(
        self, *, replaces: bool, share: float, between: list[float] | None = None
    ) -> Refined:
        """The steps in halves: the gradient there, or the one that was found."""
        fine = halved(self._problem)
        if fine is None:
            return self.result(self._found, [inf] * len(self._names()), between)
        other = differentiate(fine, StepAdjoint(), self._given)
        # A continuous adjoint has an error of its own, which finer steps do not take away.
        errors = self.errors(self._found, other, share if other.pulled.fallback is None else 1.0)
        return self.result(other if replaces else self._found, errors, between)

    def until_settled(self, *, replaces: bool) -> Refined:
        """Halves of halves until two gradients in a row agree."""
        problem: StoppingProblem | None = self._problem
        before, errors = self._found, [inf] * len(self._names())
        for _ in range(_HALVINGS):
            assert problem is not None
            problem = halved(problem)
            if problem is None:
                errors = [inf] * len(errors)
                break
            other = differentiate(problem, StepAdjoint(), self._given)
            errors = self.errors(before if replaces else self._found, other)
            settled = self.errors(before, other)
            before = other
            if max(settled, default=0.0) <= self._problem.call.promise:
                break
        return self.result(before if replaces else self._found, errors, None)

    def _names(self) -> list[str]:
        hits = self._problem.hits
        targets = ["target"] if len(hits) == 1 else [f"target[{h.watch.index}]" for h in hits]
        learned = range(len(self._problem.call.learned))
        breakpoints = [f"breakpoints[{index}]" for index in learned]
        return ["x0", "t0", *targets, *breakpoints, *self._problem.names]

    def errors(self, first: Gradients, second: Gradients, factor: float = 1.0) -> list[float]:
        """|a - b| / factor of every tensor, relative to b, or to what b is without cancellation.

        Zero for what is not asked for.
        """
        found = []
        sizes, asked = self._natural(second), self._given.wanted
        rows = zip(first.parts, second.parts, sizes, asked, strict=True)
        for a, b, natural, wanted in rows:
            gap, size = float((a - b).norm()), max(float(b.norm()), FLOOR * natural)
            error = 0.0 if gap == 0.0 else gap / size / factor if size > 0.0 else inf
            found.append((error if isfinite(error) else inf) if wanted else 0.0)
        return found

    def _natural(self, gradients: Gradients) -> list[float]:
        """How large each gradient would be if nothing cancelled; 0 where that is not known."""
        sizes = gradients.pulled.sizes
        targets = [0.0] * (len(self._problem.hits) + len(self._problem.call.learned))
        leaves = self._problem.leaves.tensors
        if sizes is None:
            return [0.0, 0.0, *targets, *[0.0] * len(leaves)]
        lam, rate, *parts = sizes
        if not bool(self._given.times.any()):
            # lam^T F is 0 on the whole path then: a leaf that acts along F cancels at every point.
            span = self._problem.end - self._problem.start
            moved = [rate * span / max(float(p.detach().norm()), 1e-300) for p in leaves]
            parts = [max(a, b) for a, b in zip(parts, moved, strict=True)]
        return [lam, rate, *targets, *parts]

    def result(
        self, gradients: Gradients, errors: Sequence[float], between: Sequence[float] | None
    ) -> Refined:
        """With names, of the tensors that are asked for."""
        wanted = self._given.wanted
        rows = [
            LeafError(name, float(part.norm()), error)
            for name, part, error, asked in zip(
                self._names(), gradients.parts, errors, wanted, strict=True
            )
            if asked
        ]
        asked_for = [e for e, asked in zip(between or [], wanted, strict=False) if asked]
        return Refined(gradients, tuple(rows), max(asked_for, default=None) if between else None)
