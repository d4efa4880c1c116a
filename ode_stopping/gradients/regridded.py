"""A solved problem on other steps: the accepted ones merged in pairs, or each taken in two halves.

Nothing is controlled and nothing is looked for again: the sizes are given, but for the step that
ends at a target, whose length is solved for J = eps. The gradient there differs from the one on the
accepted steps by an error that is known from the order of the method, so the difference says how
large the error is, for every leaf by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from ..core.memo import Memo, sharing
from ..crossing.point import Crossing
from ..crossing.transitions import Transition
from ..crossing.watch import Hit
from ..solving.flow_map import FlowPiece
from ..solving.step import Step
from .chain import Chain, Link
from .kinks import one_sided
from .problem import StoppingProblem

__all__ = ["halved", "merged"]

# The target is met to this share of rtol, in last steps of the path, or to some roundings of J.
_MET = 1e-3
_ROUNDINGS = 100.0
_OF_THE_CLOCK = 4.0
# A path that blows up is given up after so many steps.
_LOOK = 16
_ITERATIONS = 10
# Where a target is met before the last steps begin, so many more of them move with it.
_FURTHER = (0, 4, 16)

Grid = Callable[[Sequence[float]], list[float]]


def merged(chain: Chain) -> Chain | None:
    """The chain with its steps merged in pairs; None where no gradient can be taken there."""
    return _on(chain, lambda times: [*times[:-1:2], times[-1]], stride=2)


def halved(chain: Chain) -> Chain | None:
    """The chain with every step in two halves; None where no gradient can be taken there."""
    return _on(chain, _with_middles, stride=1)


def _with_middles(times: Sequence[float]) -> list[float]:
    return [t for a, b in pairwise(times) for t in (a, 0.5 * (a + b))] + [times[-1]]


class _Lost(Exception):
    """The path blew up, or J does not come down to a target on it."""


def _on(chain: Chain, grid: Grid, *, stride: int) -> Chain | None:
    """The chain on other steps; every `stride`-th node of a smooth stretch stays one."""
    links: list[Link] = []
    time, state = chain.links[0].time, chain.links[0].state
    with torch.no_grad(), sharing(Memo()):
        try:
            for link in chain.links:
                opening = tuple(_reopened(chain, hit, time, state) for hit in link.opening)
                new = Link(time, state, opening, link.problem)
                if link.problem is not None:
                    problem = _Regridded(link.problem, grid, stride, time, state).problem()
                    new = replace(new, problem=problem)
                    time, state = problem.end, problem.x_end
                closing, state = _closed(link.closing, time, state)
                links.append(replace(new, closing=closing))
        except (_Lost, RuntimeError, ValueError, ArithmeticError):
            # A flow may refuse a state that the accepted steps never came to.
            return None
    return chain.with_links(links)


def _reopened(chain: Chain, hit: Hit, time: float, state: Tensor) -> Hit:
    """A hit at the start of an arc, which starts somewhere else."""
    assert hit.point is not None
    flow = chain.call.flow
    # A time that was given stays where it is; an event is met with the one before.
    at = hit.time if hit.watch.time is not None else time
    velocity = flow.on(flow.number_at(time))(time, state)
    x = state + (at - time) * velocity
    point = Crossing.at(hit.watch.criterion, at, x, velocity)
    return replace(hit, time=at, state=x, point=point)


def _closed(
    events: Sequence[Transition], time: float, state: Tensor
) -> tuple[tuple[Transition, ...], Tensor]:
    """The events at the end of an arc, which ends somewhere else; and the state behind them."""
    found = []
    for event in events:
        after = state if event.reset is None else event.reset.plain(time, state)
        found.append(replace(event, time=time, before=state, after=after))
        state = after
    return tuple(found), state


class _Regridded:
    """The new path of an arc as it grows, stretch by stretch."""

    def __init__(
        self, problem: StoppingProblem, grid: Grid, stride: int, start: float, state: Tensor
    ) -> None:
        self._old = problem
        self._start, self._state = start, state
        self._grid = grid
        self._stride = stride
        self._method = problem.method
        self._steps: list[Step] = []
        self._hits: list[Hit] = []

    def problem(self) -> StoppingProblem:
        """The whole of it."""
        old = self._old
        y, first = self._state, 0
        for number, _, end in old.segments:
            flow, last = old.flow.on(number), len(old.steps) - 1
            if end < old.end:
                last = next((i for i, s in enumerate(old.steps) if s.t1 >= end), last)
            if last < first:
                continue  # a stretch of some roundings, before a crossing next to a breakpoint
            y = self._stretch(flow, y, first, last + 1)
            first = last + 1
        crossing = self._hits[-1]
        assert crossing.point is not None
        start = self._start
        return replace(
            old,
            call=replace(old.call, x0=self._state, times=(start, *old.call.times[1:])),
            times=(start, *old.times[1:-1], crossing.time),
            x0=self._state,
            x_end=crossing.state,
            velocity=crossing.point.velocity,
            steps=tuple(self._steps),
            hits=tuple(self._hits),
        )

    def _stretch(self, flow: FlowPiece, y: Tensor, first: int, last: int) -> Tensor:
        """The steps `first` to `last - 1`, which are one smooth stretch, with the hits in it."""
        old, final = self._old, last == len(self._old.steps)
        times = [old.steps[first].t0, *(step.t1 for step in old.steps[first:last])]
        times = [self._moved(t) for t in times]
        begin, start = len(self._steps), y
        # The step that ends at the last target is solved for; with it goes what is merged to it.
        kept = (len(times) - 2 if final else len(times) - 1) // self._stride * self._stride
        body = times[: kept + 1] if final else times
        if len(body) > 1:
            y = self._walk(flow, y, self._grid(body))
        states = {times[0]: start, **{step.t1: step.y1 for step in self._steps[begin:]}}
        held = begin
        for hit in old.hits[:-1]:
            if first <= hit.node < last:
                ends = (self._moved(step.t1) for step in hit.steps)
                inner = [*times[: hit.node - first + 1], *ends]
                found = self._aside(flow, hit, inner, hit.node - first, states, begin)
                held = max(held, found.node)
                self._hits.append(found)
        if final:
            self._finish(flow, y, self._grid(times[kept:]), held)
        return y

    def _moved(self, t: float) -> float:
        """A time of the old path: the first smooth stretch is drawn along by its start."""
        begin, end = self._old.times[:2]
        if self._start == begin or t >= end:
            return t
        return self._start + (t - begin) * (end - self._start) / (end - begin)

    def _walk(self, flow: FlowPiece, y: Tensor, times: Sequence[float]) -> Tensor:
        """Steps between the times become part of the path; the state at the end."""
        self._steps += self._taken(flow, y, times, flow(times[0], y))
        return self._steps[-1].y1

    def _taken(self, flow: FlowPiece, y: Tensor, times: Sequence[float], f: Tensor) -> list[Step]:
        """Steps between the times, from y and y' = f."""
        steps: list[Step] = []
        for i, (a, b) in enumerate(pairwise(times), 1):
            steps.append(self._method.trial(flow, a, y, f, b))
            y, f = steps[-1].y1, steps[-1].f1
            if (i % _LOOK == 0 or i == len(times) - 1) and not bool(torch.isfinite(y).all()):
                raise _Lost
        return steps

    def _aside(
        self,
        flow: FlowPiece,
        hit: Hit,
        times: Sequence[float],
        at: int,
        states: dict[float, Tensor],
        begin: int,
    ) -> Hit:
        """A target that was passed: its steps branch off from a node that both paths have."""
        at = at // self._stride * self._stride
        while times[at] not in states:
            at -= self._stride
        for back in _FURTHER:
            node = max(at - back * self._stride, 0)
            start = states[times[node]]
            try:
                steps, point = self._ending(flow, start, self._grid(times[node:]), hit)
            except _Lost:
                continue
            number = begin + list(states).index(times[node])
            return self._met(hit, point, number, tuple(steps))
        raise _Lost

    def _finish(self, flow: FlowPiece, y: Tensor, times: Sequence[float], held: int) -> None:
        """The last target; steps up to the node `held` stay, for something begins there."""
        for back in _FURTHER:
            kept = max(len(self._steps) - back, held)
            moving = self._steps[kept:]
            start = moving[0].y0 if moving else y
            try:
                steps, point = self._ending(
                    flow, start, [*(step.t0 for step in moving), *times], self._old.hits[-1]
                )
            except _Lost:
                continue
            self._steps[kept:] = steps
            self._hits.append(self._met(self._old.hits[-1], point, len(self._steps), ()))
            return
        raise _Lost

    @staticmethod
    def _met(hit: Hit, point: Crossing, node: int, steps: tuple[Step, ...]) -> Hit:
        return replace(hit, time=point.time, state=point.state, point=point, node=node, steps=steps)

    def _ending(
        self, flow: FlowPiece, y: Tensor, times: Sequence[float], hit: Hit
    ) -> tuple[list[Step], Crossing]:
        """Steps from times[0] whose ends all move with the last, which moves to where J = eps."""
        call, start, watch = self._old.call, times[0], hit.watch
        f, length = flow(start, y), times[-1] - start
        longest, stretch = min(2 * length, flow.high - start), 1.0
        for _ in range(_ITERATIONS):
            ends = [start + stretch * (t - start) for t in times]
            steps = self._taken(flow, y, ends, f)
            point = Crossing.at(watch.criterion, ends[-1], steps[-1].y1, steps[-1].f1)
            if not (point.is_finite() and point.rate < 0):
                break
            residual = point.value - watch.target
            late = abs(residual / point.rate)
            # (Nor can T be told from its neighbours.)
            clock = _OF_THE_CLOCK * torch.finfo(torch.float64).eps * abs(point.time)
            exact = late <= max(_MET * call.tolerances.rtol * steps[-1].length, clock)
            if exact or abs(residual) <= _ROUNDINGS * point.rounding:
                # The same side of a kink as on the accepted steps.
                known = hit.point is not None and hit.point.aside > 0.0
                return steps, one_sided(call, point) if known else point
            moved = ends[-1] - start - residual / point.rate
            stretch = min(moved, longest) / length
            if not stretch > 0.0:
                break
        raise _Lost
