"""Differentiate through the solver: the accepted steps replayed under autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..solving.method import replay_step
from .problem import StoppingProblem
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

    def pull_back(self, problem: StoppingProblem, cotangent: Tensor) -> PullBack:
        """First derivatives, as the other routes give them (the result itself uses `graph`)."""
        x0 = problem.x0.detach().clone().requires_grad_(True)
        t0 = torch.tensor(problem.start, dtype=torch.float64, device=x0.device)
        with torch.enable_grad():
            end, calls = self._replay(problem, x0, t0)
        inputs = [x0, *problem.leaves.tensors]
        self._count(problem, calls)
        grads = torch.autograd.grad(end, inputs, cotangent, allow_unused=True, retain_graph=True)
        filled = [
            torch.zeros_like(p) if g is None else g for g, p in zip(grads, inputs, strict=True)
        ]
        return PullBack(start=filled[0], leaves=filled[1:])

    def graph(
        self, problem: StoppingProblem, x0: Tensor, t0: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """T, x_T and x at the fixed T, with an ordinary graph to x0, t0, target and every leaf."""
        with torch.enable_grad():
            end, calls = self._replay(problem, x0, t0)
            time, state = differentiable_crossing(
                problem.flow, problem.criterion, problem.end, end, target
            )
        for output in (time, state):
            if output.requires_grad:
                output.register_hook(lambda _: self._count(problem, calls))
        return time, state, end

    @staticmethod
    def _count(problem: StoppingProblem, calls: int) -> None:
        problem.stats.nfe_backward = problem.stats.vjps = calls

    def _replay(self, problem: StoppingProblem, x0: Tensor, t0: Tensor) -> tuple[Tensor, int]:
        """x at the fixed T, differentiable to x0, t0 and the leaves, and the evaluations taken."""
        flow = problem.flow
        calls = flow.calls
        grid = [problem.start, *(step.t1 for step in problem.trajectory.steps)]
        # The grid is stretched with t0 while T, and every jump of the flow, stays where it is: the
        # derivative at fixed T.
        _, first, fixed = problem.segments[0]
        offset = t0.to(torch.float64) - problem.start

        def at(t: float) -> Tensor:
            return t + offset * max((fixed - t) / (fixed - first), 0.0)

        def function(t: Tensor, y: Tensor) -> Tensor:
            return flow.traced(flow.time_tensor(t), y)

        y = x0
        try:
            for index, begin, until in problem.segments:
                flow.enter(index)
                t = at(begin)
                f = function(t, y)
                for end in [end for end in grid if begin < end <= until]:
                    following = at(end)
                    y, f = replay_step(problem.settings.method, function, t, following, y, f)
                    t = following
        finally:
            flow.leave()
        return y, flow.calls - calls
