"""A solved problem as a chain: arcs without resets, and what the events between them do.

A stopping time is a chain of one arc. On the way back each arc is pulled back by a route, as it
would be by itself, and what arrives at its start goes through the reset before it: with lam and tau
the cotangents on (x+, T) there, w+ and w those on x+ and x- from outside, c that on T,

    on x-:  w + R_x^T (lam + w+),     on T:  c + tau + R_t^T (lam + w+),     R_theta^T (lam + w+)

and the quotient of the event does the rest. With tau = -lam^T F+ this is the saltation formula

    s = -(w^T F- + (lam + w+)^T (R_x F- + R_t) - lam^T F+ + c) / J'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..call import Call, Watch
from ..core.leaves import LeafSet
from ..core.names import names_of
from ..core.stats import Stats
from ..crossing.transitions import Execution, Transition
from ..crossing.watch import Hit
from .backward import Cotangents, Gradients, differentiate, of_criterion
from .problem import StoppingProblem
from .quotient import cotangent_at_crossing
from .route import GradientRoute

__all__ = ["Arriving", "Chain", "ChainGradients", "Link", "Row", "pulled_back", "target_size"]


@dataclass(frozen=True)
class Row:
    """An event or a known time, as the user sees it.

    Attributes:
        watch: What was met.
        time: T.
        before: x-, shape (n,).
        after: x+, shape (n,); None where nothing resets the state.
    """

    watch: Watch
    time: float
    before: Tensor
    after: Tensor | None = None


@dataclass(frozen=True)
class Link:
    """An arc.

    Attributes:
        time: Its start, in flow time.
        state: x there, shape (n,).
        opening: What is met at its start.
        problem: The solved problem; None where nothing on it has a derivative.
        closing: The events that end it; the first is the last hit.
        together: Other events that are at their targets there.
    """

    time: float
    state: Tensor
    opening: tuple[Hit, ...] = ()
    problem: StoppingProblem | None = None
    closing: tuple[Transition, ...] = ()
    together: tuple[Watch, ...] = ()

    @property
    def hits(self) -> tuple[Hit, ...]:
        """All hits, in order of time."""
        return self.opening + (() if self.problem is None else self.problem.hits)


@dataclass(frozen=True)
class Chain:
    """The whole.

    Attributes:
        call: What was asked.
        leaves: Tensors that receive gradients, besides x0, t0 and the targets.
        links: The arcs, in order of time.
        watched: The watches whose targets matter, by their index, each once.
        first: The events at t0.
    """

    call: Call
    leaves: LeafSet
    links: tuple[Link, ...]
    watched: tuple[int, ...]
    first: tuple[Transition, ...] = ()

    @classmethod
    def of(cls, problem: StoppingProblem) -> Chain:
        """One arc."""
        link = Link(problem.start, problem.x0, problem=problem)
        watched = tuple(hit.watch.index for hit in problem.hits)
        return cls(problem.call, problem.leaves, (link,), watched)

    @classmethod
    def of_execution(cls, execution: Execution, leaves: LeafSet) -> Chain:
        """The arcs of an execution."""
        links = []
        for arc in execution.arcs:
            known = arc.run is not None and any(h.status.name == "REACHED" for h in arc.run.hits)
            problem = StoppingProblem.of(arc.run, leaves) if arc.run and known else None
            link = Link(arc.time, arc.state, arc.opening, problem, arc.closing, arc.together)
            links.append(link)
        # (What never came has a derivative of zero, not none.)
        watched = tuple(watch.index for watch in execution.call.watches)
        return cls(execution.call, leaves, tuple(links), watched, execution.first)

    def up_to(self, rows: int) -> Chain:
        """The arcs that the first so many rows lie on; what comes after does not matter to them."""
        total, count = len(self.first), 0
        while total < rows:
            link = self.links[count]
            total += len(link.hits) + len(link.closing[1:])
            count += 1
        return self if count == len(self.links) else self.with_links(self.links[:count])

    def with_links(self, links: Sequence[Link]) -> Chain:
        """The same, of other arcs."""
        return replace(self, links=tuple(links))

    @property
    def problems(self) -> list[StoppingProblem]:
        """The arcs that have one."""
        return [link.problem for link in self.links if link.problem is not None]

    @property
    def hits(self) -> list[Hit]:
        """All hits that have a quotient, in order of time."""
        return [hit for link in self.links for hit in link.hits]

    @property
    def start(self) -> float:
        """t0."""
        return self.call.start

    @property
    def end(self) -> float:
        """The time of the last hit."""
        return self.hits[-1].time if self.hits else self.start

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """What the user sees, in order of time."""
        found = [_row(one) for one in self.first]
        for link in self.links:
            found += [Row(hit.watch, hit.time, hit.state) for hit in link.hits]
            if link.closing:
                found[-1] = _row(link.closing[0], found[-1].before)
                found += [_row(one) for one in link.closing[1:]]
        return tuple(found)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What the leaves are called."""
        return tuple(names_of(self.leaves.tensors, self.call.functions))

    @property
    def resets(self) -> list[Transition]:
        """The transitions with a reset."""
        every = [*self.first, *(one for link in self.links for one in link.closing)]
        return [one for one in every if one.reset is not None]


def _row(transition: Transition, before: Tensor | None = None) -> Row:
    after = transition.after if transition.reset is not None else None
    before = transition.before if before is None else before
    return Row(transition.watch, transition.time, before, after)


@dataclass(frozen=True)
class Arriving:
    """What arrives at the rows of a chain.

    Attributes:
        times: c on the times, shape (rows,).
        before: On the states before, shape (rows, n).
        after: On those behind the resets, shape (rows, n); None: nothing.
        wanted: Which gradients are asked for: to x0, t0, the targets of `Chain.watched`, the
            breakpoints that require grad, and the leaves.
    """

    times: Tensor
    before: Tensor
    after: Tensor | None
    wanted: tuple[bool, ...]

    @property
    def rows(self) -> int:
        """The number of the first rows at which it is anything at all."""
        found = (self.times != 0) | (self.before != 0).any(dim=1)
        if self.after is not None:
            found = found | (self.after != 0).any(dim=1)
        return max((index + 1 for index, one in enumerate(found.tolist()) if one), default=0)

    def up_to(self, rows: int) -> Arriving:
        """At the first so many rows only."""
        if rows == len(self.times):
            return self
        after = None if self.after is None else self.after[:rows]
        return replace(self, times=self.times[:rows], before=self.before[:rows], after=after)


@dataclass(frozen=True)
class ChainGradients:
    """Gradients of the sum of all that was given times its cotangents.

    Attributes:
        x0: Shape (n,).
        t0: Shape ().
        targets: One for each of `Chain.watched`.
        breakpoints: To those that require grad, shape (breakpoints,).
        leaves: One tensor a leaf.
        arcs: The problems at which anything arrives, what that is, and what they make of it; from
            the first to the last.
        scales: dL/dJ at every hit of the chain, in their order.
        given: What arrived at hits: the place of their target, they themselves, the size of the
            cotangent on their time, and that on their state.
        stats: What it cost.
    """

    x0: Tensor
    t0: Tensor
    targets: Tensor
    breakpoints: Tensor
    leaves: list[Tensor]
    arcs: list[tuple[StoppingProblem, Cotangents, Gradients]]
    scales: list[float]
    given: list[tuple[int, Hit, float, Tensor]]
    stats: Stats

    @cached_property
    def sizes(self) -> list[float]:
        """What `targets` would be without cancellation."""
        found = [0.0] * len(self.targets)
        for place, hit, on_time, on_state in self.given:
            found[place] += target_size(hit, on_time, on_state)
        return found

    @property
    def parts(self) -> list[Tensor]:
        """One tensor for each of x0, t0, the targets, the breakpoints and the leaves."""
        numbers = [*self.targets.unbind(), *self.breakpoints.unbind()]
        return [self.x0, self.t0, *numbers, *self.leaves]

    @property
    def fell_back(self) -> bool:
        """Whether another route has taken the place of the one that was asked for."""
        return any(found.pulled.fallback is not None for _, _, found in self.arcs)

    @property
    def departure(self) -> float:
        """The largest departure from the identity along the path, as far as it is known."""
        return max((found.pulled.departure or 0.0 for _, _, found in self.arcs), default=0.0)


def target_size(hit: Hit, on_time: float, on_state: Tensor) -> float:
    """The gradient to the target of a hit, (w^T F + c)/J', if nothing in it cancelled.

    Args:
        hit: The hit.
        on_time: The size of c, or what it would be without cancellation.
        on_state: w, shape (n,).
    """
    point = hit.point
    assert point is not None
    parts = float(on_state.norm() * point.velocity.norm()) + abs(on_time)
    return parts / abs(point.rate)


def pulled_back(
    chain: Chain, route: GradientRoute | Sequence[GradientRoute], given: Arriving
) -> ChainGradients:
    """Pull what arrives back through the arcs and the events between them.

    Args:
        chain: The chain.
        route: How to pull lam back through the flow map; or one for each link.
        given: What arrives.
    """
    back = _Back(chain, given)
    routes = [route] * len(chain.links) if isinstance(route, GradientRoute) else route
    for number in reversed(range(len(chain.links))):
        back.through(chain.links[number], routes[number])
    return back.result()


class _Back:
    """The cotangents on x and t on their way back, and the sums that they leave."""

    def __init__(self, chain: Chain, given: Arriving) -> None:
        self._chain, self._given = chain, given
        self._row = len(chain.rows)
        self._places = {index: place for place, index in enumerate(chain.watched)}
        x0 = chain.call.x0
        self._lam = torch.zeros_like(x0)
        self._tau = x0.new_zeros((), dtype=torch.float64)
        self._targets = given.times.new_zeros(len(chain.watched))
        self._breakpoints = given.times.new_zeros(len(chain.call.learned))
        self._leaves = chain.leaves.zeros()
        self._arcs: list[tuple[StoppingProblem, Cotangents, Gradients]] = []
        self._scales: list[float] = []
        self._at_hits: list[tuple[int, Hit, float, Tensor]] = []
        # What tau would be if nothing cancelled in it.
        self._natural = 0.0
        self._stats = Stats(nfe_backward=0, vjps=0)

    def through(self, link: Link, route: GradientRoute) -> None:
        """From behind the events at the end of an arc to its start."""
        self._through_events(link.closing[1:])
        at_end = link.hits[-1] if link.closing and link.hits else None
        if link.closing:
            self._row -= 1
            self._through_reset(link.closing[0])
        extra = (self._tau, self._lam) if at_end is not None else None
        natural, self._natural = self._natural, 0.0
        self._tau, self._lam = torch.zeros_like(self._tau), torch.zeros_like(self._lam)
        # The row of the last hit counts with the hits.
        self._row += 1 if link.closing else 0
        if link.problem is not None:
            self._through_problem(link.problem, route, extra, natural)
            extra = None
        self._through_opening(link, extra, natural)

    def _rows(self, count: int) -> slice:
        self._row -= count
        return slice(self._row, self._row + count)

    def _after(self, row: int) -> Tensor:
        given = self._given.after
        return torch.zeros_like(self._lam) if given is None else given[row]

    def _through_events(self, events: Sequence[Transition]) -> None:
        """Events that are met at the time of another one."""
        for event in reversed(events):
            self._row -= 1
            self._through_reset(event)
            self._lam = self._lam + self._given.before[self._row]
            self._tau = self._tau + self._given.times[self._row]

    def _through_reset(self, event: Transition) -> None:
        """From (x+, T) to (x-, T)."""
        lam = self._lam + self._after(self._row)
        self._lam = lam
        if event.reset is None or not bool((lam != 0).any()):
            return
        pulled = event.reset.vjp(event.time, event.before, lam, self._chain.leaves, look=True)
        self._lam = pulled.state
        self._tau = self._tau + pulled.time.to(self._tau.dtype)
        self._natural += float(pulled.time.abs())
        self._add(pulled.leaves)

    def _add(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = [a + b for a, b in zip(self._leaves, leaves, strict=True)]

    def _through_problem(
        self,
        problem: StoppingProblem,
        route: GradientRoute,
        extra: tuple[Tensor, Tensor] | None,
        natural: float,
    ) -> None:
        rows = self._rows(len(problem.hits))
        times, states = self._given.times[rows].clone(), self._given.before[rows].clone()
        if extra is not None:
            times[-1] += extra[0].to(times.dtype)
            states[-1] += extra[1]
        fixed = len(self._given.wanted) - len(self._breakpoints) - len(self._leaves)
        by_index = dict(zip(self._chain.watched, self._given.wanted[2:fixed], strict=True))
        targets = tuple(by_index[hit.watch.index] for hit in problem.hits)
        asked = (*self._given.wanted[:2], *targets, *self._given.wanted[fixed:])
        given = Cotangents(times, states, asked)
        if not any(given.arriving):
            self._scales = [0.0] * len(problem.hits) + self._scales
            return
        found = differentiate(problem, route, given)
        self._arcs.insert(0, (problem, given, found))
        self._stats = self._stats + found.stats
        self._lam, self._tau = found.x0, found.t0.to(self._tau.dtype)
        if self._row:
            steps = problem.steps
            velocity = steps[0].f0 if steps else problem.flow.plain(problem.start, problem.x0)
            self._natural = float(self._lam.norm() * velocity.norm())
        on_times = times.abs().tolist()
        on_times[-1] += natural if extra is not None else 0.0
        for hit, c, w in zip(problem.hits, on_times, states, strict=True):
            self._at_hits.append((self._places[hit.watch.index], hit, c, w))
        for hit, by_target in zip(problem.hits, found.targets.unbind(), strict=True):
            self._targets[self._places[hit.watch.index]] += by_target
        self._scales = [-by_target for by_target in found.targets.tolist()] + self._scales
        self._breakpoints = self._breakpoints + found.breakpoints
        self._add(found.leaves)

    def _through_opening(
        self, link: Link, extra: tuple[Tensor, Tensor] | None, natural: float
    ) -> None:
        """Hits at the start: x(T) = x + (T - t) F there."""
        for hit in reversed(link.opening):
            self._row -= 1
            on_time, on_state = self._given.times[self._row], self._given.before[self._row]
            size = float(on_time.abs())
            if extra is not None:
                on_time, on_state = on_time + extra[0].to(on_time.dtype), on_state + extra[1]
                size, extra = size + natural, None
            point = hit.point
            assert point is not None
            lam, scale = cotangent_at_crossing(point, on_time.to(on_state.dtype), on_state)
            self._scales.insert(0, float(scale))
            self._at_hits.append((self._places[hit.watch.index], hit, size, on_state))
            if not bool((lam != 0).any()) and float(scale) == 0.0:
                continue
            self._lam = self._lam + lam
            self._tau = self._tau - (lam @ point.velocity).to(self._tau.dtype)
            self._natural += float(lam.norm() * point.velocity.norm())
            self._targets[self._places[hit.watch.index]] -= scale
            self._add(of_criterion(hit, scale, self._chain.leaves))

    def result(self) -> ChainGradients:
        """What has come back to t0."""
        self._through_events(self._chain.first)
        assert self._row == 0
        return ChainGradients(
            x0=self._lam,
            t0=self._tau,
            targets=self._targets,
            breakpoints=self._breakpoints,
            leaves=self._leaves,
            arcs=self._arcs,
            scales=self._scales,
            given=self._at_hits,
            stats=self._stats,
        )
