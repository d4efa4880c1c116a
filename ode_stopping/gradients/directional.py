"""One difference of the result along a direction in everything that it depends on.

The derivatives of flow and criterion are compared with differences at one point before a gradient
is promised. One that is lost elsewhere (detached on a branch, changed by a hook, wrong in a custom
function) shows in the result itself: the same steps are taken again with all tensors moved a
little, to either side, and the two results have to differ by what the gradient says. On the steps
that the gradient belongs to the difference has no error but rounding, at any tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.consistency import Thresholds, disagreement, natural_size, noise_like
from ..core.memo import Memo, sharing
from ..core.substitution import Substitution
from ..solving.flow_map import FlowPiece
from ..solving.step import Step
from .backward import Cotangents, Gradients
from .problem import StoppingProblem

__all__ = ["contradictions"]

# Of the float64 result; what is lost is worth a thousand times as much.
_MISMATCH = 1e-5
# An entry that contributes more than the least of the tensors is moved less, down to this share.
_LEAST_SHARE = 1e-3
# So many tensors are looked at by themselves where one of them is wrong.
_SINGLE = 64


def contradictions(
    problem: StoppingProblem, gradients: Gradients, given: Cotangents
) -> list[float]:
    """Relative error of every part of a gradient that a difference contradicts, 0 of the others.

    Costs the steps twice, and more only where something is wrong.

    Args:
        problem: The problem on the steps that the gradient belongs to.
        gradients: The transpose of those steps.
        given: What was pulled back.

    Returns:
        One number for each of `Gradients.parts`.
    """
    return _Difference(problem, gradients, given).errors()


class _Difference:
    """The result as a function of all tensors that can be moved."""

    def __init__(self, problem: StoppingProblem, gradients: Gradients, given: Cotangents) -> None:
        self._problem = problem
        self._given = given
        self._parts = gradients.parts
        # What a value of J above its target at T counts for.
        self._by_values = [-float(target) for target in gradients.targets]
        leaves = problem.leaves
        places = {id(leaf): index for index, leaf in enumerate(leaves.tensors)}
        first = len(self._parts) - len(leaves.tensors)
        # (What lies behind a hyper-network's history moves nothing here.)
        self._leaves = leaves.detached_from_history()
        self._tensors = [problem.x0, *self._leaves]
        self._indices = [0, *(first + places[id(leaf)] for leaf in self._leaves)]
        limits = Thresholds.of(*self._tensors)
        in_double = Thresholds.of(torch.zeros((), dtype=torch.float64)).mismatch
        self._limits = replace(limits, mismatch=limits.mismatch * _MISMATCH / in_double)
        self._directions = self._spread()
        self._met: set[int] = {0}
        self._known: dict[tuple[tuple[int, ...], float], float] = {}

    def _spread(self) -> list[Tensor]:
        """A random direction in which the entries contribute alike."""
        noise = noise_like(seed=2)
        sizes = [natural_size(tensor) for tensor in self._tensors]
        shares = [
            (self._parts[index].to(size.dtype) * size).abs()
            for index, size in zip(self._indices, sizes, strict=True)
        ]
        largest = [float(share.max()) if share.numel() else 0.0 for share in shares]
        least = max(
            min((one for one in largest if one > 0), default=0.0),
            _LEAST_SHARE * max(largest, default=0.0),
        )
        tiny = torch.finfo(torch.float32).tiny
        return [
            noise(size) * size * (least / share.clamp_min(tiny)).clamp(_LEAST_SHARE, 1.0)
            for size, share in zip(sizes, shares, strict=True)
        ]

    def errors(self) -> list[float]:
        """See `contradictions`."""
        found = [0.0] * len(self._parts)
        every = range(len(self._tensors))
        with torch.no_grad():
            together = self._gap(every)
            if together == 0.0:
                return found
            # Which of them it is; all, where it is none by itself.
            for k in every[:_SINGLE]:
                found[self._indices[k]] = self._gap([k])
        return found if max(found) > 0.0 else [together] * len(found)

    def _gap(self, moved: Sequence[int]) -> float:
        """By how much the gradient is contradicted along some of the tensors; 0 where it is not."""
        self._value(moved, 0.5 * self._limits.perturbation)
        # (A compiled function does not show its own to torch.)
        moved = [k for k in moved if k in self._met]
        contributions = [self._contribution(k) for k in moved]
        exact, size = sum(contributions), sum(c * c for c in contributions) ** 0.5
        found = disagreement(
            lambda h: self._value(moved, h), exact, self._limits, self._rounded(), least=size
        )
        if found is None:
            return 0.0
        return abs(found - exact) / max(abs(found), abs(exact), size)

    def _contribution(self, k: int) -> float:
        """The derivative along tensor k, as the gradient has it."""
        low, high = self._at(k, -0.5), self._at(k, 0.5)
        # What a coarse type cannot hold was not moved.
        change = (high.double() - low.double()) / self._limits.perturbation
        return float((self._parts[self._indices[k]].double().reshape(change.shape) * change).sum())

    def _at(self, k: int, share: float) -> Tensor:
        tensor = self._tensors[k].detach()
        moved = tensor + share * self._limits.perturbation * self._directions[k]
        return moved.to(tensor.dtype)

    def _value(self, moved: Sequence[int], length: float) -> float:
        """The result with some tensors moved by a length along their directions."""
        key = (tuple(moved), length)
        if key not in self._known:
            self._known[key] = self._computed(moved, length)
        return self._known[key]

    def _computed(self, moved: Sequence[int], length: float) -> float:
        """See `_value`.

        A time moves by -(J - eps)/J' at its old value, which is how the quotient has it: so the
        length of the last step stays as it is, too.
        """
        share = length / self._limits.perturbation
        values = [
            self._at(k, share) if k in moved else tensor for k, tensor in enumerate(self._tensors)
        ]
        with Substitution(self._leaves, values[1:]) as seen, sharing(Memo()):
            ends = self._ends(values[0].detach())
            total = 0.0
            for hit, x, by_value, by_state in zip(
                self._problem.hits, ends, self._by_values, self._given.states, strict=True
            ):
                total += float(by_state @ x)
                if by_value != 0.0:
                    assert hit.point is not None
                    aside = hit.point.aside
                    value = self._problem.criterion.value(
                        hit.time - aside, x - aside * hit.point.velocity
                    )
                    total += by_value * (value - hit.watch.target)
        self._met |= {k for k, met in enumerate(seen.met, 1) if met}
        return total

    def _ends(self, start: Tensor) -> list[Tensor]:
        """x at every hit, on the same steps from another start."""
        problem = self._problem
        states = [start]
        for number, begin, end in problem.segments:
            flow = problem.flow.on(number)
            inner = [step for step in problem.steps if begin <= step.t0 < end]
            states += self._walked(flow, states[-1], inner)
        ends = []
        for hit in problem.hits[:-1]:
            number = sum(t <= hit.steps[0].t0 for t in problem.call.times[1:-1])
            walked = self._walked(problem.flow.on(number), states[hit.node], hit.steps)
            ends.append(walked[-1])
        return [*ends, states[-1]]

    def _walked(self, flow: FlowPiece, y: Tensor, steps: Sequence[Step]) -> list[Tensor]:
        states: list[Tensor] = []
        f = flow(steps[0].t0, y) if steps else y
        for step in steps:
            again = self._problem.method.trial(flow, step.t0, y, f, step.t1)
            y, f = again.y1, again.f1
            states.append(y)
        return states

    def _rounded(self) -> float:
        """The size of the numbers that the result is made of."""
        total = 0.0
        for hit, by_value, by_state in zip(
            self._problem.hits, self._by_values, self._given.states, strict=True
        ):
            assert hit.point is not None
            eps = torch.finfo(hit.state.dtype).eps
            total += abs(by_value) * hit.point.rounding / eps
            total += float((by_state * hit.state).abs().sum())
        return total
