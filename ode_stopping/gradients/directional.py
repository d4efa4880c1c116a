"""The gradient on given steps, held against one difference of the result on the same steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import directional
from ..solving.flow_map import FlowPiece
from ..solving.step import Step
from .backward import Cotangents, Gradients
from .problem import StoppingProblem

__all__ = ["contradictions"]


def contradictions(
    problem: StoppingProblem, gradients: Gradients, given: Cotangents
) -> list[float]:
    """Relative error of every part of a gradient that a difference contradicts, 0 of the others.

    A time moves by -(J - eps)/J' at its old value, which is how the quotient has it: so the length
    of the last step stays as it is, too. Costs the steps twice, and more only where something is
    wrong.

    Args:
        problem: The problem on the steps that the gradient belongs to.
        gradients: The transpose of those steps.
        given: What was pulled back.

    Returns:
        One number for each of `Gradients.parts`.
    """
    # What a value of J above its target at T counts for.
    by_values = [-float(target) for target in gradients.targets]

    def value(start: Tensor) -> float:
        total = 0.0
        rows = zip(problem.hits, _ends(problem, start), by_values, given.states, strict=True)
        for hit, x, by_value, by_state in rows:
            total += float(by_state @ x)
            if by_value != 0.0:
                assert hit.point is not None
                aside = hit.point.aside
                seen = hit.time - aside, x - aside * hit.point.velocity
                total += by_value * (hit.watch.criterion.value(*seen) - hit.watch.target)
        return total

    size = 0.0
    for hit, by_value, by_state in zip(problem.hits, by_values, given.states, strict=True):
        assert hit.point is not None
        size += abs(by_value) * hit.point.rounding / torch.finfo(hit.state.dtype).eps
        size += float((by_state * hit.state).abs().sum())
    parts = gradients.parts
    first = len(parts) - len(problem.leaves.tensors)
    places = {id(leaf): first + index for index, leaf in enumerate(problem.leaves.tensors)}
    # (What lies behind a hyper-network's history moves nothing here.)
    leaves = problem.leaves.detached_from_history()
    indices = [0, *(places[id(leaf)] for leaf in leaves)]
    found = directional.contradictions(
        value, problem.x0, leaves, [parts[index] for index in indices], size
    )
    errors = [0.0] * len(parts)
    for index, error in zip(indices, found, strict=True):
        errors[index] = error
    return errors


def _ends(problem: StoppingProblem, start: Tensor) -> list[Tensor]:
    """x at every hit, on the same steps from another start."""
    states = [start]
    for number, begin, end in problem.segments:
        flow = problem.flow.on(number)
        inner = [step for step in problem.steps if begin <= step.t0 < end]
        states += _walked(problem, flow, states[-1], inner)
    ends = []
    for hit in problem.hits[:-1]:
        flow = problem.flow.on(problem.number_at(hit.steps[0].t0))
        walked = _walked(problem, flow, states[hit.node], hit.steps)
        ends.append(walked[-1])
    return [*ends, states[-1]]


def _walked(
    problem: StoppingProblem, flow: FlowPiece, y: Tensor, steps: Sequence[Step]
) -> list[Tensor]:
    states: list[Tensor] = []
    f = flow(steps[0].t0, y) if steps else y
    for step in steps:
        again = problem.method.trial(flow, step.t0, y, f, step.t1)
        y, f = again.y1, again.f1
        states.append(y)
    return states
