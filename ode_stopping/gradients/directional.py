"""The gradient on given steps, held against one difference of the result on the same steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import directional
from ..crossing.transitions import Transition
from ..crossing.watch import Hit
from ..solving.flow_map import FlowPiece
from ..solving.step import Step
from .chain import Arriving, Chain, ChainGradients, Link
from .problem import StoppingProblem

__all__ = ["contradictions"]


def contradictions(chain: Chain, gradients: ChainGradients, given: Arriving) -> list[float]:
    """Relative error of every part of a gradient that a difference contradicts, 0 of the others.

    A time moves by -(J - eps)/J' at its old value, which is how the quotient has it: so the length
    of the last step stays as it is, too. Costs the steps twice, and more only where something is
    wrong.

    Args:
        chain: The chain on the steps that the gradient belongs to.
        gradients: The transpose of those steps.
        given: What was pulled back.

    Returns:
        One number for each of `ChainGradients.parts`.
    """

    def value(start: Tensor) -> float:
        return _Walk(chain, given).through(start)

    size = 0.0
    for hit, scale in zip(chain.hits, gradients.scales, strict=True):
        assert hit.point is not None
        size += abs(scale) * hit.point.rounding / torch.finfo(hit.state.dtype).eps
    for index, row in enumerate(chain.rows):
        size += float((given.before[index] * row.before).abs().sum())
        if given.after is not None and row.after is not None:
            size += float((given.after[index] * row.after).abs().sum())
    parts = gradients.parts
    first = len(parts) - len(chain.leaves.tensors)
    places = {id(leaf): first + index for index, leaf in enumerate(chain.leaves.tensors)}
    # (What lies behind a hyper-network's history moves nothing here.)
    leaves = chain.leaves.detached_from_history()
    indices = [0, *(places[id(leaf)] for leaf in leaves)]
    found = directional.contradictions(
        value, chain.call.x0, leaves, [parts[index] for index in indices], size
    )
    errors = [0.0] * len(parts)
    for index, error in zip(indices, found, strict=True):
        errors[index] = error
    return errors


class _Walk:
    """The result, as the chain has it on its own steps from another start, to first order.

    Every arc starts at its old time: a start that comes later by d is at x - d F there.
    """

    def __init__(self, chain: Chain, given: Arriving) -> None:
        self._chain, self._given = chain, given
        self._row, self._total = 0, 0.0

    def through(self, start: Tensor) -> float:
        """The sum of all that was given times its cotangents, less a constant."""
        late, state = 0.0, self._events(self._chain.first, 0.0, start)
        for link in self._chain.links:
            late, state = self._link(link, late, state)
        return self._total

    def _link(self, link: Link, late: float, state: Tensor) -> tuple[float, Tensor]:
        """How late the arc ends, and the state behind its end."""
        flow = self._chain.call.flow
        velocity = None
        for hit in link.opening:
            if velocity is None:
                velocity = flow.on(flow.number_at(link.time))(link.time, state)
            known = hit.watch.time is not None
            delay = self._delay(hit, state - late * velocity) if not known else 0.0
            self._pass(hit, delay, state + (delay - late) * velocity)
        if link.opening and link.closing and link.problem is None:
            assert velocity is not None
            state, late = state + (delay - late) * velocity, delay
        if link.problem is not None:
            if late != 0.0:
                velocity = flow.on(flow.number_at(link.time))(link.time, state)
                state = state - late * velocity
            for hit, x in zip(link.problem.hits, _ends(link.problem, state), strict=True):
                assert hit.point is not None
                delay = self._delay(hit, x)
                state, late = x + delay * hit.point.velocity, delay
                self._pass(hit, delay, state)
        if link.closing:
            self._row -= 1
            state = self._reset(link.closing[0], late, state)
            state = self._events(link.closing[1:], late, state)
        return late, state

    @staticmethod
    def _delay(hit: Hit, x: Tensor) -> float:
        """How late J meets its target, where x is the state at the old time."""
        point = hit.point
        assert point is not None
        seen = point.time - point.aside, x - point.aside * point.velocity
        return -(hit.watch.criterion.value(*seen) - hit.watch.target) / point.rate

    def _pass(self, hit: Hit, delay: float, before: Tensor) -> None:
        self._total += float(self._given.times[self._row]) * delay
        self._total += float(self._given.before[self._row] @ before)
        self._row += 1

    def _events(self, events: Sequence[Transition], late: float, state: Tensor) -> Tensor:
        """Events that are met at the time of another one."""
        for event in events:
            self._total += float(self._given.times[self._row]) * late
            self._total += float(self._given.before[self._row] @ state)
            state = self._reset(event, late, state)
        return state

    def _reset(self, event: Transition, late: float, state: Tensor) -> Tensor:
        if event.reset is not None:
            state = event.reset.plain(event.time + late, state)
        if self._given.after is not None:
            self._total += float(self._given.after[self._row] @ state)
        self._row += 1
        return state


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
