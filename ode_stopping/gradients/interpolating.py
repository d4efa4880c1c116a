"""The continuous adjoint: x(t) is kept from the forward run, lam integrated backward over it.

    lam' = - F_x^T lam,   lam(T) given;      dL/dx0 = lam(t0),   dL/dtheta = int F_theta^T lam dt

A gradient flow contracts forward, so integrating x backward with lam (the plain adjoint) amplifies
its error by exp(L (T - t0)), while the equation for lam backward is stable. Here x(t) is never
integrated backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.status import GradientError
from ..solving.interpolation import accurate_path
from ..solving.solver import first_entries
from ..solving.step import Step
from .backward_solve import Augmented, Residuals, integrate_backward
from .problem import Jump, Piece
from .route import GradientRoute, PullBack
from .staged import Disagreement, Products

__all__ = ["InterpolatingAdjoint"]

# Numbers in x from which on recorded products pay.
_LARGE_STATE = 64


@dataclass(frozen=True)
class InterpolatingAdjoint(GradientRoute):
    """Adjoint over the kept trajectory: lam' = -F_x^T lam, dL/dtheta = int F_theta^T lam dt.

    Exact for: flows that are smooth between the accepted steps. Memory: the kept steps. Cost: about
    as many vector-Jacobian products as the forward run had evaluations, recorded where that saves
    work (see `staged`).

    Args:
        rtol: Relative tolerance of the backward solve, by blocks; None: that of the forward solve.
    """

    rtol: float | None = None

    figures: ClassVar[tuple[str, ...]] = ("identity", "quadrature", "time_term")

    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        """See `GradientRoute.pull_back`; the flow may jump on the way."""
        return self.solve(piece, cotangent)

    def pull_back_path(self, path: Piece, jumps: Sequence[Jump]) -> PullBack:
        """See `GradientRoute.pull_back_path`."""
        return self._solve(path, jumps)

    def solve(self, path: Piece, cotangent: Tensor, *, times: Sequence[float] = ()) -> PullBack:
        """As `pull_back`, and lam at `times` besides."""
        return self._solve(path, [path.at_end(cotangent)], times)

    def _solve(self, path: Piece, jumps: Sequence[Jump], times: Sequence[float] = ()) -> PullBack:
        recorded = Products.of(path, Augmented(path).derivative, least=_LARGE_STATE)
        try:
            return self._attempt(path, jumps, times, recorded)
        except (Disagreement, GradientError):
            if recorded is None:
                raise
        return self._attempt(path, jumps, times)

    def _attempt(
        self,
        path: Piece,
        jumps: Sequence[Jump],
        times: Sequence[float],
        recorded: Products | None = None,
    ) -> PullBack:
        z = Augmented(path)
        x = accurate_path(path.trajectory, path.flow, path.segments)
        wide = path.method.order > path.method.dense_order + 1
        residuals = Residuals(z, (lambda t: path.flow.plain(t, x(t))) if wide else None)
        sampler = _Sampler(path, jumps[-1].cotangent, times)
        end = integrate_backward(
            z,
            jumps,
            lambda t, _: x(t),
            residuals,
            self.rtol if self.rtol is not None else path.tolerances.rtol,
            method=None if recorded is None else recorded.method_over(x),
            after_step=[sampler] if len(times) else [],
        )
        if recorded is not None:
            recorded.finish()
        return PullBack(
            start=end[z.adjoint],
            leaves=z.leaves_of(end),
            time=float(end[z.time]),
            samples=sampler.stacked(end[z.adjoint]) if len(times) else None,
            quadrature_errors=residuals.quadrature_errors,
            defect=residuals.defect,
            departure=residuals.departure,
        )


class _Sampler:
    """Reads lam off the backward steps at given forward times."""

    def __init__(self, path: Piece, first: Tensor, times: Sequence[float]) -> None:
        self._path = path
        self._times = list(times)
        self._found = {i: first for i, t in enumerate(self._times) if t >= path.end}

    def __call__(self, step: Step) -> None:
        end, n = self._path.end, self._path.x0.numel()
        for i, t in enumerate(self._times):
            if step.t0 < end - t <= step.t1:
                self._found[i] = first_entries(self._path.method.dense(step), n)(end - t)

    def stacked(self, last: Tensor) -> Tensor:
        return torch.stack([self._found.get(i, last) for i in range(len(self._times))])
