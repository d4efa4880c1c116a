"""Routes for the discrete derivative: Algorithm 1 by chunks, the unrolled loop, and truncation.

Algorithm 1 of arXiv 2505.22509: lam <- grad J(x_N); for k = N-1 .. 0: S += (dG_k/dtheta)^T lam,
then lam <- (dG_k/dx)^T lam. One call of autograd a step would be slow for small problems, so a
chunk of steps is replayed with a graph and one call takes lam through all of them: the same sums in
the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ode_stopping.core.status import GradientError
from ode_stopping.core.validation import require_count

from ..iterating.store import CheckpointStore, RecentStore, StateStore
from .problem import IndexProblem

__all__ = ["DiscreteAdjoint", "DiscretePullBack", "IndexRoute", "Truncated", "Unrolled"]

_TRUNCATED_CHUNK = 32

_UNROLLED_MEMORY = 2**30


@dataclass(frozen=True)
class DiscretePullBack:
    """A cotangent on x_{N-1}, pulled back through the iteration.

    Attributes:
        start: Cotangent on x_0, shape (n,); None where the route does not reach the start.
        start_time: Cotangent on t0, shape ().
        leaves: sum_k (dG_k/dtheta)^T lam_{k+1}, one tensor a leaf.
    """

    start: Tensor | None
    start_time: Tensor
    leaves: list[Tensor]


class IndexRoute(ABC):
    """A way to differentiate x_{N-1}; what the index is, is none of its business."""

    @abstractmethod
    def store(self, parts: int = 1) -> StateStore:
        """Where the forward run, or one of so many parts of it, puts its states."""

    @abstractmethod
    def pull_back(self, problem: IndexProblem, cotangent: Tensor) -> DiscretePullBack:
        """Pull a cotangent on x_{N-1}, shape (n,), back to x_0, t0 and the leaves."""


@dataclass(frozen=True)
class DiscreteAdjoint(IndexRoute):
    """Algorithm 1 with a memory budget: all states, or checkpoints with replay in between.

    Exact for: the iteration as it ran (a replay that does not reproduce a stored state raises).
    Memory: the budget, as much again where stretches between checkpoints are replayed, and the
    graph of `chunk` steps. Cost: one replay with a graph and one backward pass; where checkpoints
    are further apart than `chunk` one more replay, and more only where a stretch does not fit into
    the budget either.

    Args:
        memory: Budget for stored states, in bytes.
        chunk: Number of steps in one graph.

    Raises:
        TypeError: `chunk` or `memory` is not a number.
        ValueError: Either is not positive.
    """

    memory: int = 2**30
    chunk: int = 32

    def __post_init__(self) -> None:
        require_count(self.memory, name="memory")
        require_count(self.chunk, name="chunk")

    def store(self, parts: int = 1) -> StateStore:
        """Where the forward run puts its states; parts share the budget."""
        return CheckpointStore(max(self.memory // parts, 1))

    def pull_back(self, problem: IndexProblem, cotangent: Tensor) -> DiscretePullBack:
        """Pull a cotangent on x_{N-1} back to x_0, t0 and the leaves."""
        assert problem.store is not None
        backward = _Backward(problem, cotangent)
        last = problem.index - 1
        kept = [(k, _stored(problem.store, k)) for k in problem.store.indices() if k < last]
        self._through(backward, [*kept, (last, problem.previous)])
        return backward.result()

    def _through(self, backward: _Backward, path: list[tuple[int, Tensor]]) -> None:
        """Take lam from the last state (k, x_k) of the path to the first."""
        end = len(path) - 1
        while end > 0:
            begin = end - 1
            while begin > 0 and path[end][0] - path[begin - 1][0] <= self.chunk:
                begin -= 1
            (k, first), (n, last) = path[begin], path[end]
            if n - k <= self.chunk:
                backward.through(k, n, first, last)
            else:
                self._through(backward, self._replayed(backward.problem, k, first, n, last))
            end = begin

    def _replayed(
        self, problem: IndexProblem, begin: int, first: Tensor, end: int, last: Tensor
    ) -> list[tuple[int, Tensor]]:
        """The path from x_begin to x_end anew, with states in between as the budget allows."""
        store, x = CheckpointStore(self.memory, stride=self.chunk), first
        for k in range(begin, end):
            store.add(k - begin, x)
            x = problem.update.step(k, x)
        problem.update.require_same(x, last, end)
        return [*((begin + k, _stored(store, k)) for k in store.indices()), (end, last)]


@dataclass(frozen=True)
class Unrolled(IndexRoute):
    """Reverse-mode differentiation of the whole loop in one graph.

    Equal to Algorithm 1 (Proposition 1).

    Exact for: the iteration as it ran. Memory: the graph of N steps. Cost: one replay, one backward
    pass.
    """

    def store(self, parts: int = 1) -> StateStore:
        """Where the forward run puts its states."""
        # Little beside the graph; parameters are looked for along the path.
        return CheckpointStore(_UNROLLED_MEMORY // parts)

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

    def store(self, parts: int = 1) -> StateStore:
        """Where the forward run puts its states.

        Raises:
            ValueError: Several targets: the last steps before one are not the last before another.
        """
        if parts > 1:
            raise ValueError(
                "Truncated takes one target: the sum of each of several would end elsewhere. Call "
                "stopping_index once a target, or use DiscreteAdjoint"
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
        for end in range(last, first, -_TRUNCATED_CHUNK):
            begin = max(end - _TRUNCATED_CHUNK, first)
            states = _stored(problem.store, begin), _stored(problem.store, end)
            backward.through(begin, end, *states)
        return backward.result(reaches_start=first == 0)


class _Backward:
    """lam on its way back, and the sums that it leaves in the parameters."""

    def __init__(self, problem: IndexProblem, cotangent: Tensor) -> None:
        self.problem = problem
        self._lam = cotangent
        self._start_time = torch.zeros_like(problem.clock.start.detach())
        self._leaves = problem.leaves.zeros()
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
        start = (
            problem.clock.start.detach().clone().requires_grad_(problem.clock.start.requires_grad)
        )
        time = problem.clock.traced(start)
        x = first.detach().clone().requires_grad_(True)
        y = x
        with torch.enable_grad():
            for k in range(begin, end):
                y = problem.update.step_traced(k, y, time(k))
        problem.update.require_same(y.detach(), last, end)
        self._steps += end - begin
        leaves = problem.leaves
        inputs = [x, *([start] if start.requires_grad else []), *leaves.tensors]
        where = f"by the update between steps {begin} and {end}"
        leaves.require_known([y], inputs=inputs, where=where)
        # Retained, since it may run through nodes older than this chunk (a hyper-network's); its
        # own go with y.
        grads = list(
            torch.autograd.grad(y, inputs, self._lam, allow_unused=True, retain_graph=True)
        )
        lam = grads.pop(0)
        self._lam = torch.zeros_like(self._lam) if lam is None else lam
        if start.requires_grad:
            by_start = grads.pop(0)
            if by_start is not None:
                self._start_time += by_start
        for total, gradient in zip(self._leaves, grads, strict=True):
            if gradient is not None:
                total += gradient

    def result(self, *, reaches_start: bool = True) -> DiscretePullBack:
        """What was summed up; a truncated sum has no cotangent on x_0."""
        # With the last step, which is in the definition of the index.
        self.problem.stats.vjps = self._steps + 1
        return DiscretePullBack(
            self._lam if reaches_start else None, self._start_time, self._leaves
        )


def _stored(store: StateStore, k: int) -> Tensor:
    state = store.get(k)
    if state is None:
        raise GradientError(f"x_{k} was not kept")
    return state
