"""The default route: keep x(t) from the forward run, integrate lam and the quadrature backward.

    lam' = - F_x^T lam,   lam(T) given;      dL/dx0 = lam(t0),   dL/dtheta = int F_theta^T lam dt

A gradient flow contracts forward, so integrating x backward with lam (the plain adjoint) amplifies
its error by exp(L (T - t0)), while the equation for lam backward is stable. Here x(t) is never
integrated backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..solving.interpolation import accurate_path
from ..solving.method import needs_wide_interpolation
from ..solving.step import Step
from .backward_solve import Blocks, Ledger, integrate_backward
from .problem import StoppingProblem
from .route import GradientRoute, PullBack

__all__ = ["InterpolatingAdjoint"]


@dataclass(frozen=True)
class InterpolatingAdjoint(GradientRoute):
    """Adjoint over the kept trajectory: lam' = -F_x^T lam, dL/dtheta = int F_theta^T lam dt.

    Exact for: flows that are smooth between the accepted steps. Memory: six states an accepted
    step. Cost: about as many vector-Jacobian products as the forward run had evaluations.

    Args:
        rtol: Relative tolerance of the backward solve, by blocks; None: that of the forward solve.
    """

    rtol: float | None = None

    def pull_back(self, problem: StoppingProblem, cotangent: Tensor) -> PullBack:
        """See `GradientRoute.pull_back`."""
        return self.solve(problem, cotangent)

    def solve(
        self, problem: StoppingProblem, cotangent: Tensor, *, times: Sequence[float] = ()
    ) -> PullBack:
        """As `pull_back`, and lam at `times` besides."""
        n = cotangent.numel()
        leaves = problem.leaves
        sizes = [leaf.numel() for leaf in leaves.tensors]
        vjps = 0
        evaluations = problem.flow.calls
        path = accurate_path(
            problem.trajectory, problem.settings, problem.flow.plain, problem.times[1:-1]
        )

        def derivative(s: Tensor, z: Tensor) -> Tensor:
            nonlocal vjps
            vjps += 1
            t = problem.end - float(s)
            product = problem.flow.vjp(t, path(t), z[:n], leaves, look=True)
            parts = [
                product.state,
                *(g.reshape(-1) for g in product.leaves),
                product.time.reshape(1),
            ]
            return torch.cat(parts)

        start = torch.cat([cotangent, cotangent.new_zeros(sum(sizes) + 1)])
        blocks = Blocks(
            [*problem.layout.sizes, *sizes, 1],
            quadrature=[False] * len(problem.layout.sizes) + [True] * (len(sizes) + 1),
            like=cotangent,
        )
        rtol = self.rtol if self.rtol is not None else problem.tolerances.rtol
        sampler = _Sampler(problem.end, cotangent, times, n)
        wide = needs_wide_interpolation(problem.settings.method)
        ledger = Ledger(
            problem,
            cotangent,
            slice(0, n),
            sizes,
            velocity=(lambda t: problem.flow.plain(t, path(t))) if wide else None,
        )
        end = integrate_backward(
            problem,
            derivative,
            start,
            blocks,
            rtol,
            adjoint=slice(0, n),
            state=lambda t, _: path(t),
            after_step=(sampler, ledger),
        )
        problem.stats.vjps = vjps
        problem.stats.nfe_backward = problem.flow.calls - evaluations
        pieces = torch.split(end[n:-1], sizes)
        return PullBack(
            start=end[:n],
            leaves=[
                piece.reshape(leaf.shape)
                for piece, leaf in zip(pieces, leaves.tensors, strict=True)
            ],
            time=float(end[-1]),
            samples=sampler.stacked(end[:n]) if len(times) else None,
            quadrature_errors=ledger.quadrature_errors,
            defect=ledger.defect,
            departure=ledger.departure,
        )


class _Sampler:
    """Reads lam off the backward steps at given forward times."""

    def __init__(self, end: float, first: Tensor, times: Sequence[float], n: int) -> None:
        self._end = end
        self._times = list(times)
        self._found: dict[int, Tensor] = {i: first for i, t in enumerate(self._times) if t >= end}
        self._n = n

    def __call__(self, step: Step) -> None:
        for i, t in enumerate(self._times):
            if step.t0 < self._end - t <= step.t1:
                self._found[i] = step.at(self._end - t)[: self._n]

    def stacked(self, last: Tensor) -> Tensor:
        return torch.stack([self._found.get(i, last) for i in range(len(self._times))])
