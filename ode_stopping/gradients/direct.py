"""Differentiate through the solver: the accepted steps replayed under autograd."""

from __future__ import annotations

from bisect import bisect_right
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
        self,
        problem: StoppingProblem,
        x0: Tensor,
        t0: Tensor,
        targets: Sequence[Tensor],
        breakpoints: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `GradientRoute.graph`."""
        times, states = [], []
        grid = _Grid(problem, t0, breakpoints)
        with torch.enable_grad():
            path = [x0, *_replay(problem, x0, grid, problem.steps)]
            for hit, target in zip(problem.hits, targets, strict=True):
                jump = problem.jump(hit, x0)
                state = path[jump.node]
                if jump.steps:
                    state = _replay(problem, state, grid, jump.steps)[-1]
                at_hit = torch.as_tensor(grid(hit.time), dtype=torch.float64, device=x0.device)
                time, moved = differentiable_crossing(
                    problem.flow,
                    hit.watch.criterion,
                    at_hit,
                    state,
                    target,
                    aside=hit.point.aside if hit.point else 0.0,
                )
                # A breakpoint that does not matter has a derivative of zero, not none.
                time = sum((0.0 * b.to(time) for b in breakpoints), time)
                times.append(time)
                states.append(moved)
        return times, states


class _Grid:
    """The times of the steps, stretched with t0 and with the breakpoints that require grad.

    The end, and every other jump of the flow, stays where it is: the derivative at fixed T.
    """

    def __init__(
        self, piece: Piece, t0: Tensor | None = None, breakpoints: Sequence[Tensor] = ()
    ) -> None:
        self._offsets: dict[float, Tensor] = {}
        self._bounds = piece.times
        if t0 is not None:
            self._offsets[piece.start] = t0.to(torch.float64) - piece.start
        for time, tensor in zip(piece.call.learned, breakpoints, strict=bool(breakpoints)):
            if piece.start < time < piece.end:
                self._offsets[time] = tensor.to(torch.float64) - time

    def __call__(self, t: float) -> Any:
        """The time, with a graph to what moves it."""
        index = max(bisect_right(self._bounds, t) - 1, 0)
        if index == len(self._bounds) - 1:
            return t
        begin, end = self._bounds[index : index + 2]
        found: Any = t
        share = (t - begin) / (end - begin)
        for bound, part in ((begin, 1.0 - share), (end, share)):
            if bound in self._offsets and part > 0.0:
                found = found + self._offsets[bound] * part
        return found


def _replay(piece: Piece, y: Tensor, grid: _Grid, steps: Sequence[Step]) -> list[Tensor]:
    """The states at the ends of the steps, differentiable to y, t0 and the leaves."""
    bounds = [end for _, _, end in piece.segments]
    found = []
    for step in steps:
        index = next(i for i, end in enumerate(bounds) if step.t0 < end)
        flow = piece.flow.on(piece.segments[index][0])
        begin, end = grid(step.t0), grid(step.t1)
        moves = isinstance(begin, Tensor) or isinstance(end, Tensor)
        length = end - begin if moves else step.length
        y = piece.method.replay(flow.traced, step, y, begin, length)
        found.append(y)
    return found
