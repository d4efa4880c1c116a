"""The plain adjoint, held to its start: x goes backward with lam, and has to come back to x0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..core.status import BacksolveMismatchError, GradientError
from ..solving.step import Step
from .backward_solve import Augmented, Residuals, integrate_backward
from .problem import Jump, Piece
from .route import GradientRoute, PullBack

__all__ = ["BacksolveAdjoint"]

# An x that is this much larger than it ever was on the way forward will not come back to x0.
_FAR = 10.0


@dataclass(frozen=True)
class BacksolveAdjoint(GradientRoute):
    """x re-integrated backward with lam (Chen et al. 2018): constant memory, often unstable.

    Backward, a contracting flow expands errors by exp(L (T - t0)). The x(t0) that comes back is
    compared with x0, and a relative mismatch above `tolerance` times rtol raises instead of
    returning a number.

    Exact for: flows that are not stiff over [t0, T]. Memory: one state. When wrong: it raises.

    Args:
        rtol: Relative tolerance of the backward solve; None: that of the forward solve.
        tolerance: Largest accepted mismatch at t0, in units of rtol.
    """

    rtol: float | None = None
    tolerance: float = 100.0

    keeps_trajectory = False
    figures: ClassVar[tuple[str, ...]] = ("identity", "quadrature")

    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        """See `GradientRoute.pull_back`."""
        return self._solve(piece, [piece.at_end(cotangent)])

    def pull_back_path(self, path: Piece, jumps: Sequence[Jump]) -> PullBack:
        """See `GradientRoute.pull_back_path`."""
        return self._solve(path, jumps)

    def _solve(self, path: Piece, jumps: Sequence[Jump]) -> PullBack:
        z, n = Augmented(path, with_state=True), path.x0.numel()
        rtol = self.rtol if self.rtol is not None else path.tolerances.rtol
        residuals = Residuals(z)
        largest = _FAR * path.trajectory.largest

        def watch(step: Step) -> None:
            size = float(path.layout.norm(step.y1[:n]))
            if not size <= largest:
                raise GradientError(
                    f"x has left its path at t = {path.end - step.t1:.6g}: it grew to {size:.3g}"
                )

        try:
            # An unstable backward solve needs more and more steps before it overflows: give up long
            # before.
            end = integrate_backward(
                z,
                jumps,
                lambda _, y: y[:n],
                residuals,
                rtol,
                max_steps=10 * len(path.trajectory) + 100,
                after_step=[watch],
            )
        except GradientError as error:
            raise BacksolveMismatchError(
                f"integrating x backward from x_T failed ({error}). The flow is too contracting "
                "for BacksolveAdjoint; use StepAdjoint or InterpolatingAdjoint."
            ) from error
        self._check_return(path, end[:n], rtol)
        return PullBack(
            start=end[z.adjoint],
            leaves=z.leaves_of(end),
            time=float(end[z.time]),
            quadrature_errors=residuals.quadrature_errors,
        )

    def _check_return(self, path: Piece, returned: Tensor, rtol: float) -> None:
        scale = float(path.x0.norm()) or path.trajectory.largest * path.x0.numel() ** 0.5
        missed = float((returned - path.x0).norm())
        mismatch = 0.0 if missed == 0.0 else missed / scale if scale > 0 else float("inf")
        # Not `mismatch > limit`: NaN must raise, too.
        if not mismatch <= self.tolerance * rtol:
            raise BacksolveMismatchError(
                f"x re-integrated backward from T = {path.end:.6g} misses x0 by {mismatch:.3g} "
                f"(relative; allowed: {self.tolerance * rtol:.3g}), so the gradient along it "
                "would be wrong. Use StepAdjoint or InterpolatingAdjoint."
            )
