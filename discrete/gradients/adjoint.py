"""Routes for the discrete derivative: Algorithm 1 by chunks, the unrolled loop, and truncation.

Algorithm 1 of arXiv 2505.22509: lam <- grad J(x_N); for k = N-1 .. 0: S += (dG_k/dtheta)^T lam,
then lam <- (dG_k/dx)^T lam. One call of autograd a step would be slow for small problems, so a
chunk of steps is replayed with a graph and one call takes lam through all of them (`core.sweep`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ode_stopping.core.status import GradientError
from ode_stopping.core.sweep import Sweep
from ode_stopping.core.validation import require_count

from ..iterating.recording import CHUNK, Chunk
from ..iterating.store import CheckpointStore, RecentStore, StateStore
from .problem import IndexProblem

__all__ = [
    "DiscreteAdjoint",
    "DiscretePullBack",
    "IndexRoute",
    "Replays",
    "Truncated",
    "Unrolled",
    "stored_state",
]

_UNROLLED_MEMORY = 2**30


@dataclass(frozen=True)
class DiscretePullBack:
    """A cotangent on x_{N-1}, pulled back through the iteration.

    Attributes:
        start: Cotangent on x_0, shape (n,); None where the route does not reach the start.
        start_time: Cotangent on t0, shape ().
        leaves: sum_k (dG_k/dtheta)^T lam_{k+1}, one tensor a leaf.
        steps: How many steps were differentiated; None: not counted.
    """

    start: Tensor | None
    start_time: Tensor
    leaves: list[Tensor]
    steps: int | None = None


class Replays(Protocol):
    """A sweep that replays steps from stored states."""

    def through(self, begin: int, end: int, first: Tensor, last: Tensor) -> None:
        """Take lam from x_end to x_begin through a replay that has to arrive at `last`."""

    def replayed(
        self, begin: int, first: Tensor, end: int, last: Tensor, store: CheckpointStore
    ) -> list[tuple[int, Tensor]]:
        """The path from x_begin to x_end anew, with states in between as the store allows."""


class IndexRoute(ABC):
    """A way to differentiate x_{N-1}; what the index is, is none of its business."""

    @property
    def graph_memory(self) -> int:
        """Bytes of its graph that the forward run may keep, for `Run.recording`; 0: none."""
        return 0

    @abstractmethod
    def store(self, targets: int = 1) -> StateStore:
        """Where a forward run puts its states.

        Args:
            targets: How many hits there may be: targets, and steps of `at`.
        """

    @abstractmethod
    def pull_back(self, problem: IndexProblem, cotangent: Tensor) -> DiscretePullBack:
        """Pull a cotangent on x_{N-1}, shape (n,), back to `problem.x0`, t0 and the leaves.

        With several targets or with `at` it is called once for each part of the run between two
        hits.
        """


@dataclass(frozen=True)
class DiscreteAdjoint(IndexRoute):
    """Algorithm 1 with a memory budget: all states, or checkpoints with replay in between.

    Exact for: the iteration as it ran (a replay that does not reproduce a stored state raises).
    Memory: the budget for stored states, and as much again for graphs: of the whole run where that
    fits, else on the way back of a chunk, beside the states of a replayed stretch (more only where
    a stretch does not fit either). Cost: one backward pass; where the run's graph does not fit, one
    replay with a graph; where that of the steps between two checkpoints does not, one more replay.

    Args:
        memory: Budget for stored states, in bytes.
        chunk: Number of steps in one graph, which is always made by replay. None: as the budget
            allows, so that nothing is replayed, or nothing twice.

    Raises:
        TypeError: `chunk` or `memory` is not a number.
        ValueError: Either is not positive.
    """

    memory: int = 2**26
    chunk: int | None = None

    def __post_init__(self) -> None:
        require_count(self.memory, name="memory")
        if self.chunk is not None:
            require_count(self.chunk, name="chunk")

    @property
    def graph_memory(self) -> int:
        """Half the budget, since less is known of it beforehand; a user's chunk asks for replay."""
        return self.memory // 2 if self.chunk is None else 0

    def store(self, targets: int = 1) -> StateStore:
        """Where the forward run puts its states."""
        return CheckpointStore(self.memory)

    def pull_back(self, problem: IndexProblem, cotangent: Tensor) -> DiscretePullBack:
        """Pull a cotangent on x_{N-1} back to x_0, t0 and the leaves."""
        first, last = problem.first, problem.index - 1
        backward = _Backward(problem, cotangent)
        recording = problem.run.recording
        if recording is not None:
            for recorded in reversed(recording.chunks):
                if first <= recorded.begin and recorded.end <= last:
                    backward.through_chunk(recorded)
            return backward.result()
        assert problem.store is not None
        path = [(first, problem.x0)]
        path += [
            (k, stored_state(problem.store, k)) for k in problem.store.indices() if first < k < last
        ]
        if last > first:
            path.append((last, problem.previous))
        self.through_path(backward, path, problem.run.step_bytes)
        return backward.result()

    def through_path(
        self, backward: Replays, path: list[tuple[int, Tensor]], step_bytes: int | None
    ) -> None:
        """Take lam from the last state (k, x_k) of a path of stored states to the first.

        Args:
            backward: Who takes lam through some steps.
            path: In order of the steps.
            step_bytes: What the graph of one step keeps alive; None: not known.
        """
        gap = max((n - k for (k, _), (n, _) in pairwise(path)), default=1)
        state = path[0][1].numel() * path[0][1].element_size()
        chunk, memory = self._shares(4 * state if step_bytes is None else step_bytes, gap)
        self._through(backward, path, chunk, memory)

    def _shares(self, step: int, gap: int) -> tuple[int, int]:
        """Steps in one graph, and bytes for a replayed stretch; `gap` is between checkpoints."""
        if self.chunk is not None:
            return self.chunk, self.memory
        step = max(step, 1)
        fit = self.memory // step
        if gap <= fit:
            return min(max(CHUNK, gap), fit), self.memory
        chunk = max(min(CHUNK, fit // 2), 1)
        return chunk, max(self.memory - chunk * step, 1)

    def _through(
        self, backward: Replays, path: list[tuple[int, Tensor]], chunk: int, memory: int
    ) -> None:
        end = len(path) - 1
        while end > 0:
            begin = end - 1
            while begin > 0 and path[end][0] - path[begin - 1][0] <= chunk:
                begin -= 1
            (k, first), (n, last) = path[begin], path[end]
            if n - k <= chunk:
                backward.through(k, n, first, last)
            else:
                store = CheckpointStore(memory, stride=chunk)
                stretch = backward.replayed(k, first, n, last, store)
                self._through(backward, stretch, chunk, memory)
            end = begin


@dataclass(frozen=True)
class Unrolled(IndexRoute):
    """Reverse-mode differentiation of the whole loop in one graph.

    Equal to Algorithm 1 (Proposition 1).

    Exact for: the iteration as it ran. Memory: the graph of N steps. Cost: one replay, one backward
    pass.
    """

    def store(self, targets: int = 1) -> StateStore:
        """Where the forward run puts its states."""
        # Little beside the graph; parameters are looked for along the path.
        return CheckpointStore(_UNROLLED_MEMORY)

    def pull_back(self, problem: IndexProblem, cotangent: Tensor) -> DiscretePullBack:
        """Pull a cotangent on x_{N-1} back to x_0, t0 and the leaves."""
        backward = _Backward(problem, cotangent)
        backward.through(problem.first, problem.index - 1, problem.x0, problem.previous)
        return backward.result()


@dataclass(frozen=True)
class Truncated(IndexRoute):
    """Only the last `steps` terms of the sum; `steps = 1` is the one-step form (eq. 13).

    Biased on purpose: what earlier steps contribute is left out. `steps >= N` is the full sum. It
    does not reach x0, so a gradient to x0 raises unless the sum is full.

    Args:
        steps: K, the number of steps whose direct dependence counts.
    """

    steps: int

    def __post_init__(self) -> None:
        require_count(self.steps, name="steps")

    def store(self, targets: int = 1) -> StateStore:
        """Where the forward run puts its states.

        Raises:
            ValueError: Several targets, or `at`: the last steps before one hit are not the last
                before another.
        """
        if targets > 1:
            raise ValueError(
                "Truncated takes one target and no at=: the sum of each of several hits would end "
                "elsewhere. Call stopping_index once a target, or use DiscreteAdjoint"
            )
        # x_{N-K} .. x_N
        return RecentStore(self.steps + 1)

    def pull_back(self, problem: IndexProblem, cotangent: Tensor) -> DiscretePullBack:
        """Pull a cotangent on x_{N-1} back to x_0, t0 and the leaves."""
        assert problem.store is not None
        last = problem.index - 1
        # The step N-1 -> N is in the definition of the index already.
        first = max(last - (self.steps - 1), 0)
        backward = _Backward(problem, cotangent)
        for end in range(last, first, -CHUNK):
            begin = max(end - CHUNK, first)
            states = stored_state(problem.store, begin), stored_state(problem.store, end)
            backward.through(begin, end, *states)
        return backward.result(reaches_start=first == 0)


class _Backward:
    """The sweep through replayed chunks.

    Args:
        problem: The solved problem.
        cotangent: On x_{N-1}, shape (n,).
    """

    def __init__(self, problem: IndexProblem, cotangent: Tensor) -> None:
        self.problem = problem
        t0, recording = problem.clock.start, problem.run.recording
        self._start = (
            t0.detach().clone().requires_grad_(t0.requires_grad)
            if recording is None
            else recording.time
        )
        moving = [self._start] if t0.requires_grad else []
        self._leaves = [*moving, *problem.leaves.tensors]
        self.sweep = Sweep([cotangent], self._leaves)
        self._steps = 0

    def through(self, begin: int, end: int, first: Tensor, last: Tensor) -> None:
        """Take lam from x_end to x_begin through a replay that has to arrive at `last`.

        Raises:
            NotReproducibleError: It does not.
            UntrackedTensorError: The replay uses a tensor that no traced evaluation used.
        """
        if begin == end:
            return
        problem = self.problem
        time = problem.clock.traced(self._start)
        x = first.detach().clone().requires_grad_(True)
        y = x
        with torch.enable_grad():
            for k in range(begin, end):
                y = problem.update.step_traced(k, y, time(k))
        problem.update.require_same(y.detach(), last, end)
        where = f"by the update between steps {begin} and {end}"
        problem.leaves.require_known([y], inputs=[x, self._start], where=where)
        # What a replay made is freed on the way, but for older nodes (a hyper-network's).
        self.through_chunk(Chunk(begin, end, x, y), keep=problem.leaves.has_history)

    def through_chunk(self, chunk: Chunk, *, keep: bool = True) -> None:
        """Take lam through steps that have their graph, which may be needed again."""
        self.sweep.through([chunk.state], [chunk.start], keep=keep)
        self._steps += chunk.end - chunk.begin

    def replayed(
        self, begin: int, first: Tensor, end: int, last: Tensor, store: CheckpointStore
    ) -> list[tuple[int, Tensor]]:
        """The path from x_begin to x_end anew, with states in between as the store allows."""
        update, x = self.problem.update, first
        for k in range(begin, end):
            store.add(k - begin, x)
            x = update.step(k, x)
        update.require_same(x, last, end)
        return [*((begin + k, stored_state(store, k)) for k in store.indices()), (end, last)]

    def result(self, *, reaches_start: bool = True) -> DiscretePullBack:
        """What was summed up; a truncated sum has no cotangent on x_0."""
        sums = self.sweep.sums
        moving = len(sums) - len(self.problem.leaves.tensors)
        by_start = sums[0] if moving else torch.zeros_like(self._start)
        start = self.sweep.lam[0] if reaches_start else None
        return DiscretePullBack(start, by_start, sums[moving:], self._steps)


def stored_state(store: StateStore, k: int) -> Tensor:
    """x_k; raises GradientError where it was not kept."""
    state = store.get(k)
    if state is None:
        raise GradientError(f"x_{k} was not kept")
    return state
