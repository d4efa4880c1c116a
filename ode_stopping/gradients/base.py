"""What a route is: one method that pulls a cotangent back through the flow map at fixed T."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..solved import StoppingProblem
from ..solver import StepFailed, Stepper
from ..status import GradientError

__all__ = ["Blocks", "GradientRoute", "PullBack", "integrate_backward"]


@dataclass(frozen=True)
class PullBack:
    """A cotangent lam(T) on x_T, pulled back through x_T = flow map (theta, x0, t0) at fixed T.

    Attributes:
        start: lam(t0), shape (n,): the cotangent on x0.
        leaves: int_{t0}^{T} F_theta^T lam dt, one tensor a leaf.
        time: int_{t0}^{T} F_t^T lam dt, or None where the route does not compute it. It is
            redundant: lam(t0)^T F(t0, x0) = lam(T)^T F(T, x_T) - time, and so it checks lam.
        samples: lam at the times that were asked for, shape (len(times), n); None if none were.
    """

    start: Tensor
    leaves: list[Tensor]
    time: float | None = None
    samples: Tensor | None = None


class GradientRoute(ABC):
    """A way to differentiate the state at a fixed time; the quotient is none of its business.

    Attributes:
        keeps_trajectory: Whether the forward run has to keep its dense output for this route.
    """

    keeps_trajectory: bool = True

    @abstractmethod
    def pull_back(self, problem: StoppingProblem, cotangent: Tensor) -> PullBack:
        """Pull `cotangent` = lam(T), shape (n,), back to x0 and to the leaves.

        Raises:
            GradientError: The route cannot give this derivative to its accuracy.
        """


class Blocks:
    """Blocks of a flat vector, each measured in its own size.

    An adjoint and its quadratures have no common scale: lam shrinks or grows by orders of magnitude
    on the way, every parameter has its own units, and a quadrature starts at zero, where a relative
    tolerance means nothing and a tiny absolute one means underflow. So the error of a step is
    measured block by block, relative to the block's present size, or to what this step adds to it
    where that is more.
    """

    def __init__(self, sizes: Sequence[int], *, quadrature: Sequence[bool], like: Tensor) -> None:
        kept = [(size, flag) for size, flag in zip(sizes, quadrature, strict=True) if size > 0]
        self._sizes = torch.tensor([size for size, _ in kept], dtype=like.dtype, device=like.device)
        repeats = torch.tensor([size for size, _ in kept], device=like.device)
        self._index = torch.repeat_interleave(torch.arange(len(kept), device=like.device), repeats)
        self._is_quadrature = torch.tensor([flag for _, flag in kept], device=like.device)

    def rms(self, flat: Tensor) -> Tensor:
        """Root mean square of each block, shape (blocks,)."""
        sums = torch.zeros_like(self._sizes).index_add_(0, self._index, flat.square())
        return (sums / self._sizes).sqrt()

    def norm_for(
        self, rtol: float, stepper: Callable[[], Stepper | None]
    ) -> Callable[[Tensor], Tensor]:
        """A norm of a step's error: <= 1 where every block's is within `rtol` of its size."""

        def norm(error: Tensor) -> Tensor:
            current = stepper()
            if current is None:
                # The solver chooses its first step before it stands anywhere: plain size will do.
                return self.rms(error).max()
            size = self.rms(current.value)
            gain = self.rms(current.derivative) * current.next_step
            size = torch.where(self._is_quadrature, torch.maximum(size, gain), size)
            # A block far below the others (a parameter that hardly matters) is not worth a tiny
            # step.
            floor = 1e-8 * torch.maximum(size.max(), gain.max())
            scale = torch.maximum(size, floor).clamp_min(torch.finfo(size.dtype).tiny)
            return (self.rms(error) / (rtol * scale)).max()

        return norm


def integrate_backward(
    problem: StoppingProblem,
    derivative: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    blocks: Blocks,
    rtol: float,
    *,
    max_steps: int | None = None,
    after_step: Callable[[object], None] | None = None,
) -> Tensor:
    """Integrate z' = derivative(s, z) over the backward time s = T - t from 0 to T - t0.

    Raises:
        GradientError: The step size underflowed or the step limit was used up.
    """
    length = problem.end - problem.start
    holder: list[Stepper] = []
    norm = blocks.norm_for(rtol, lambda: holder[0] if holder else None)
    stepper = Stepper(
        problem.settings,
        derivative,
        0.0,
        length,
        start,
        # The tolerances are in the norm: relative to blocks, not to elements.
        rtol=0.0,
        atol=1.0,
        norm=norm,
        first_step=_first_step(problem, length),
    )
    holder.append(stepper)
    try:
        return stepper.integrate(max_steps or problem.settings.max_steps, after_step=after_step)
    except StepFailed as failure:
        raise GradientError(f"the backward solve failed: {failure}") from failure


def _first_step(problem: StoppingProblem, length: float) -> float:
    """Last step of the forward run: what was right for x near T is about right for lam."""
    steps = problem.trajectory.steps
    if not steps:
        return 1e-3 * length
    sizes = [step.t1 - step.t0 for step in steps[-2:]]
    return min(max(sizes), length)
