"""A chain with an ordinary graph, for routes that attach theirs themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..crossing.transitions import Transition
from .chain import Chain, Link
from .quotient import differentiable_crossing
from .route import GradientRoute

__all__ = ["graph_of"]

Rows = tuple[list[Tensor], list[Tensor], list[Tensor]]


def graph_of(
    chain: Chain,
    route: GradientRoute,
    x0: Tensor,
    t0: Tensor,
    targets: Sequence[Tensor],
    breakpoints: Sequence[Tensor],
) -> Rows:
    """Times, states before, and states behind resets, as functions of everything.

    Args:
        chain: The chain.
        route: One with `own_graph`.
        x0: The start, shape (n,).
        t0: The start time, shape ().
        targets: One for each of `Chain.watched`, each of shape ().
        breakpoints: Those that require grad, each of shape ().
    """
    with torch.enable_grad():
        return _Graph(chain, route, targets, breakpoints).through(x0, t0.to(torch.float64))


class _Graph:
    """The state and the time with their graph, arc by arc."""

    def __init__(
        self,
        chain: Chain,
        route: GradientRoute,
        targets: Sequence[Tensor],
        breakpoints: Sequence[Tensor],
    ) -> None:
        self._chain, self._route, self._breakpoints = chain, route, breakpoints
        self._targets = dict(zip(chain.watched, targets, strict=True))
        self._rows: Rows = ([], [], [])

    def through(self, state: Tensor, time: Tensor) -> Rows:
        """From the start to the end."""
        state = self._events(self._chain.first, time, state)
        for link in self._chain.links:
            time, state = self._link(link, time, state)
        return self._rows

    def _link(self, link: Link, time: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        begin, start = time, state
        flow = self._chain.call.flow
        for hit in link.opening:
            target = self._targets[hit.watch.index]
            time, state = differentiable_crossing(flow, hit.watch.criterion, begin, start, target)
            self._add(time, state)
        if link.problem is not None:
            problem = link.problem
            targets = [self._targets[hit.watch.index] for hit in problem.hits]
            learned = [self._breakpoints] if self._breakpoints else []
            times, states = self._route.graph(problem, start, begin, targets, *learned)
            for at, x in zip(times, states, strict=True):
                self._add(at, x)
            time, state = times[-1], states[-1]
        if link.closing:
            state = self._reset(link.closing[0], time, state)
            state = self._events(link.closing[1:], time, state)
        return time, state

    def _add(self, time: Tensor, before: Tensor) -> None:
        self._rows[0].append(time)
        self._rows[1].append(before)

    def _events(self, events: Sequence[Transition], time: Tensor, state: Tensor) -> Tensor:
        for event in events:
            self._add(time, state)
            state = self._reset(event, time, state)
        return state

    def _reset(self, event: Transition, time: Tensor, state: Tensor) -> Tensor:
        if event.reset is None:
            return state
        after = event.reset.traced(event.reset.time_tensor(time), state)
        self._rows[2].append(after)
        return after
