"""Differentiate through the solver: the accepted steps replayed under autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..solving.step import Step
from .problem import Piece, StoppingProblem
from .quotient import differentiable_crossing
from .route import GradientRoute, PullBack

__all__ = ["DirectAdjoint"]


@dataclass(frozen=True)
class DirectAdjoint(GradientRoute):
    """The accepted steps of the forward run, replayed with a graph; second derivatives are right.

    The step sizes are taken as constants, which is the derivative of the discretised flow on its
    own grid.

    Exact for: the discretised flow (it tends to the flow's as rtol does; on a stiff flow at a loose
    tolerance, and at kinks, the two differ). Memory: the graph of every evaluation. Cost: one
    backward pass through the solver; at the first one also a backward solve of
    `InterpolatingAdjoint` and a second replay, which are the evidence.
    """

    own_graph: ClassVar[bool] = True

    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        """First derivatives, as the other routes give them (the result itself uses `graph`)."""
        x0 = piece.x0.detach().clone().requires_grad_(True)
        calls = piece.flow.calls
        with torch.enable_grad():
            states = _replay(piece, x0, _Grid(piece), piece.steps)
        inputs = [x0, *piece.leaves.tensors]
        grads = torch.autograd.grad(
            states[-1], inputs, cotangent, allow_unused=True, retain_graph=True
        )
        filled = [
            torch.zeros_like(p) if g is None else g for g, p in zip(grads, inputs, strict=True)
        ]
        return PullBack(filled[0], filled[1:], vjps=piece.flow.calls - calls)

    def graph(
        self, problem: StoppingProblem, x0: Tensor, t0: Tensor, targets: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """T and x_T of every hit, with an ordinary graph to x0, t0, the targets and every leaf."""
        times, states = [], []
        grid = _Grid(problem, t0)
        with torch.enable_grad():
            path = [x0, *_replay(problem, x0, grid, problem.steps)]
            for hit, target in zip(problem.hits, targets, strict=True):
                jump = problem.jump(hit, x0)
                state = path[jump.node]
                if jump.steps:
                    state = _replay(problem, state, grid, jump.steps)[-1]
                at_hit = torch.as_tensor(grid(hit.time), dtype=torch.float64, device=x0.device)
                time, moved = differentiable_crossing(problem.call, at_hit, state, target)
                times.append(time)
                states.append(moved)
        return times, states


class _Grid:
    """The times of the steps, stretched with t0.

    The end, and every jump of the flow, stays where it is: the derivative at fixed T.
    """

    def __init__(self, piece: Piece, t0: Tensor | None = None) -> None:
        _, self._first, self._fixed = piece.segments[0]
        self._offset = None if t0 is None else t0.to(torch.float64) - self._first

    def __call__(self, t: float) -> Any:
        """The time, with a graph to t0."""
        if self._offset is None:
            return t
        share = (self._fixed - t) / (self._fixed - self._first)
        return t + self._offset * max(share, 0.0)


def _replay(piece: Piece, y: Tensor, grid: _Grid, steps: Sequence[Step]) -> list[Tensor]:
    """The states at the ends of the steps, differentiable to y, t0 and the leaves."""
    bounds = [end for _, _, end in piece.segments]
    found = []
    for step in steps:
        index = next(i for i, end in enumerate(bounds) if step.t0 < end)
        flow = piece.flow.on(piece.segments[index][0])
        begin, end = grid(step.t0), grid(step.t1)
        length = end - begin if isinstance(begin, Tensor) else step.length
        y = piece.method.replay(flow.traced, step, y, begin, length)
        found.append(y)
    return found
