"""What a route is: one method that pulls a cotangent back through the flow map at fixed T."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.status import GradientError
from ..solving.errors import Trial
from ..solving.step import Step
from ..solving.stepper import StepFailed, Stepper
from .problem import StoppingProblem

__all__ = ["Blocks", "Ledger", "integrate_backward"]

_NEGLIGIBLE = 1e-8

_ASLEEP = 1e-4


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

    def measure(self, rtol: float) -> Callable[[Trial], float]:
        """The error of a trial step: <= 1 where every block's is within `rtol` of its size."""

        def ratio(trial: Trial) -> float:
            size = self.rms(trial.y0)
            gain = self.rms(trial.f0) * (trial.t1 - trial.t0)
            size = torch.where(self._is_quadrature, torch.maximum(size, gain), size)
            # A block far below the others (a parameter that hardly matters) is not worth a tiny
            # step; one that wakes up within this step (a ReLU) has no size yet.
            fraction = torch.where(size > 0, _NEGLIGIBLE, _ASLEEP)
            floor = fraction * torch.maximum(size.max(), gain.max())
            scale = torch.maximum(size, floor).clamp_min(torch.finfo(size.dtype).tiny)
            return float((self.rms(trial.error) / (rtol * scale)).max())

        return ratio


class Ledger:
    """Adds up, over the steps of a backward solve, what they tell about errors.

    The state of the backward solve begins with (x and) lam and ends with the quadratures: the
    leaves', and one for t.

    Args:
        problem: The solved problem.
        cotangent: lam(T), shape (n,).
        adjoint: Where lam stands in the state of the backward solve.
        sizes: Sizes of the leaves.
        velocity: t -> F(t, x(t)), for methods whose dense output is far less accurate than their
            steps: the identity is then looked at where the backward steps end.
    """

    def __init__(
        self,
        problem: StoppingProblem,
        cotangent: Tensor,
        adjoint: slice,
        sizes: Sequence[int],
        velocity: Callable[[float], Tensor] | None = None,
    ) -> None:
        self._end = problem.end
        self._adjoint = adjoint
        self._sizes = list(sizes)
        self._velocity = velocity
        # The forward steps whose ends, and whose starts, were not passed yet.
        self._ends = list(problem.trajectory.steps)
        self._starts = list(problem.trajectory.steps)
        self._kept = bool(self._ends)
        self._difference: Tensor | None = None
        self._at_end = cotangent @ problem.crossing.velocity
        self._defect = torch.zeros_like(self._at_end)
        self._departure = torch.zeros_like(self._at_end)

    def __call__(self, step: Step) -> None:
        """Note one accepted backward step."""
        difference = step.error[self._adjoint.stop :]
        # A second quadrature: the embedded formula, whose differences add up with their signs.
        self._difference = difference if self._difference is None else self._difference + difference
        while self._ends and self._end - self._ends[-1].t1 <= step.t1:
            forward = self._ends.pop()
            lam = step.at_fraction(self._fraction(forward.t1, step), self._adjoint)
            self._defect = self._defect + lam @ forward.error
        if self._velocity is not None:
            lam, integral = step.y1[self._adjoint], step.y1[-1]
            self._check(lam, self._velocity(self._end - step.t1), integral)
            return
        # At a jump of the flow a forward step starts on its right, as the backward solve ends.
        while self._starts and self._end - self._starts[-1].t0 <= step.t1:
            forward = self._starts.pop()
            fraction = self._fraction(forward.t0, step)
            integral = step.at_fraction(fraction, slice(-1, None))[0]
            lam = step.at_fraction(fraction, self._adjoint)
            self._check(lam, forward.velocity(0.0), integral)

    def _fraction(self, t: float, step: Step) -> float:
        return min(max((self._end - t - step.t0) / (step.t1 - step.t0), 0.0), 1.0)

    def _check(self, lam: Tensor, velocity: Tensor, integral: Tensor) -> None:
        """The identity at one point: lam^T F changes by the integral of lam^T F_t."""
        products = lam * velocity
        scale = torch.maximum(products.abs().sum(), self._at_end.abs()) + integral.abs()
        gap = (products.sum() + integral - self._at_end).abs()
        relative = torch.where(gap > 0, gap / scale, gap)
        self._departure = torch.maximum(self._departure, relative)

    @property
    def quadrature_errors(self) -> list[float]:
        """Norm of the difference of the two quadratures, one a leaf."""
        if self._difference is None:
            return [0.0] * len(self._sizes)
        pieces = torch.split(self._difference[:-1], self._sizes)
        return [float(piece.norm()) for piece in pieces]

    @property
    def departure(self) -> float | None:
        """Largest relative departure from the identity, where the steps were kept."""
        return float(self._departure) if self._kept else None

    @property
    def defect(self) -> float | None:
        """Sum of lam^T (error estimate) over the forward steps, where they were kept."""
        return float(self._defect) if self._kept else None


def integrate_backward(
    problem: StoppingProblem,
    derivative: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    blocks: Blocks,
    rtol: float,
    *,
    adjoint: slice,
    state: Callable[[float, Tensor], Tensor],
    max_steps: int | None = None,
    after_step: Sequence[Callable[[Step], None]] = (),
) -> Tensor:
    """Integrate z' = derivative(s, z) over the backward time s = T - t from 0 to T - t0.

    Where the flow jumps in t, the solve ends and begins anew: lam is continuous there, and F_t has
    a point mass, which goes into the last entry of z, int lam^T F_t dt.

    Args:
        problem: The solved problem.
        derivative: (s, z) -> z'.
        start: z at T.
        blocks: Blocks of z.
        rtol: Relative tolerance, by blocks.
        adjoint: Where lam stands in z.
        state: (t, z) -> x(t).
        max_steps: Limit on all steps; None: that of the settings.
        after_step: Called with every accepted step.

    Raises:
        GradientError: The step size underflowed or the step limit was used up.
    """
    flow, end = problem.flow, problem.end
    z = start
    size = _first_step(problem, end - problem.start)
    left = max_steps or problem.settings.max_steps

    def note(step: Step) -> None:
        for listener in after_step:
            listener(step)

    try:
        for index, begin, until in reversed(problem.segments):
            flow.enter(index)
            stepper = Stepper(
                problem.settings,
                derivative,
                end - until,
                end - begin,
                z,
                measure=blocks.measure(rtol),
                first_step=size,
            )
            z = stepper.integrate(left, after_step=note)
            left -= stepper.accepted + stepper.rejected
            if index > 0:
                x = state(begin, z)
                right = flow.plain(begin, x)
                flow.enter(index - 1)
                mass = z[adjoint] @ (right - flow.plain(begin, x))
                z = torch.cat([z[:-1], z[-1:] + mass])
    except StepFailed as failure:
        raise GradientError(f"the backward solve failed: {failure}") from failure
    finally:
        flow.leave()
    return z


def _first_step(problem: StoppingProblem, length: float) -> float:
    """Last step of the forward run: what was right for x near T is about right for lam."""
    steps = problem.trajectory.steps
    if not steps:
        return 1e-3 * length
    sizes = [step.t1 - step.t0 for step in steps[-2:]]
    return min(max(sizes), length)
