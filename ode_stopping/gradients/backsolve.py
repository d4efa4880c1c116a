"""The plain adjoint with a conscience: x goes backward with lam, and has to come back to x0."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.status import BacksolveMismatchError, GradientError
from ..solving.step import Step
from .backward_solve import Blocks, Ledger, integrate_backward
from .problem import StoppingProblem
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

    def pull_back(self, problem: StoppingProblem, cotangent: Tensor) -> PullBack:
        """See `GradientRoute.pull_back`."""
        n = cotangent.numel()
        leaves = problem.leaves
        sizes = [leaf.numel() for leaf in leaves.tensors]
        vjps = 0

        def derivative(s: Tensor, z: Tensor) -> Tensor:
            nonlocal vjps
            vjps += 1
            t = problem.end - float(s)
            product = problem.flow.vjp(t, z[:n], z[n : 2 * n], leaves, look=True)
            parts = [
                -product.value,
                product.state,
                *(g.reshape(-1) for g in product.leaves),
                product.time.reshape(1),
            ]
            return torch.cat(parts)

        start = torch.cat([problem.crossing.state, cotangent, cotangent.new_zeros(sum(sizes) + 1)])
        pieces = problem.layout.sizes
        blocks = Blocks(
            [*pieces, *pieces, *sizes, 1],
            quadrature=[False] * (2 * len(pieces)) + [True] * (len(sizes) + 1),
            like=cotangent,
        )
        rtol = self.rtol if self.rtol is not None else problem.tolerances.rtol
        adjoint = slice(n, 2 * n)
        ledger = Ledger(problem, cotangent, adjoint, sizes)
        largest = _FAR * problem.trajectory.largest

        def watch(step: Step) -> None:
            size = float(step.y1[:n].norm())
            if not size <= largest:
                raise GradientError(
                    f"x has left its path at t = {problem.end - step.t1:.6g}: it grew to {size:.3g}"
                )

        try:
            # An unstable backward solve needs more and more steps before it overflows: give up long
            # before.
            forward = problem.stats.accepted + problem.stats.rejected
            end = integrate_backward(
                problem,
                derivative,
                start,
                blocks,
                rtol,
                adjoint=adjoint,
                state=lambda _, z: z[:n],
                max_steps=10 * forward + 100,
                after_step=(watch, ledger),
            )
        except GradientError as error:
            raise BacksolveMismatchError(
                f"integrating x backward from x_T failed ({error}). The flow is too contracting "
                "for "
                "BacksolveAdjoint; use InterpolatingAdjoint."
            ) from error
        finally:
            problem.stats.vjps = vjps
            problem.stats.nfe_backward = vjps
        self._check_return(problem, end[:n], rtol)
        quadratures = torch.split(end[2 * n : -1], sizes)
        return PullBack(
            start=end[n : 2 * n],
            leaves=[
                q.reshape(leaf.shape) for q, leaf in zip(quadratures, leaves.tensors, strict=True)
            ],
            time=float(end[-1]),
            quadrature_errors=ledger.quadrature_errors,
        )

    def _check_return(self, problem: StoppingProblem, returned: Tensor, rtol: float) -> None:
        scale = float(problem.x0.norm()) or problem.trajectory.largest
        mismatch = float((returned - problem.x0).norm()) / scale
        # Not `mismatch > limit`: NaN must raise, too.
        if not mismatch <= self.tolerance * rtol:
            raise BacksolveMismatchError(
                f"x re-integrated backward from T = {problem.end:.6g} misses x0 by {mismatch:.3g} "
                f"(relative; allowed: {self.tolerance * rtol:.3g}), so the gradient along it "
                "would be wrong. "
                "Use InterpolatingAdjoint."
            )
