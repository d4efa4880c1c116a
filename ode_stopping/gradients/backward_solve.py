"""The continuous adjoint's backward solve: lam and its quadratures, over the time s = T - t.

    z  = ([x,]  lam,       int lam^T F_t, int F_theta^T lam)
    z' = ([-F,] F_x^T lam, F_t^T lam,     F_theta^T lam)

x stands in z only where it is integrated backward as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.status import GradientError
from ..solving.flow_map import FlowPiece
from ..solving.solver import Method, StepFailed, first_entries
from ..solving.step import Step
from ..solving.stepper import Stepper
from .problem import Jump, Piece

__all__ = ["Augmented", "Blocks", "Residuals", "integrate_backward"]

_NEGLIGIBLE = 1e-8
_ASLEEP = 1e-4
# So many blocks are summed one by one.
_FEW = 16


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
        self._lengths = [size for size, _ in kept]
        self._sizes = torch.tensor([size for size, _ in kept], dtype=like.dtype, device=like.device)
        # As long as the vector itself: made only where many blocks are summed by it.
        self._index: Tensor | None = None
        if len(kept) > _FEW:
            numbers = torch.arange(len(kept), device=like.device)
            repeats = torch.tensor(self._lengths, device=like.device)
            self._index = torch.repeat_interleave(numbers, repeats)
        self._is_quadrature = torch.tensor([flag for _, flag in kept], device=like.device)

    def rms(self, rows: Tensor) -> Tensor:
        """Root mean square of each block of each row (..., n), shape (..., blocks)."""
        if self._index is None:
            parts = torch.split(rows, self._lengths, dim=-1)
            norms = [torch.linalg.vector_norm(part, dim=-1) for part in parts]
            return torch.stack(norms, dim=-1) / self._sizes.sqrt()
        sums = rows.new_zeros((*rows.shape[:-1], len(self._sizes)))
        return (sums.index_add_(-1, self._index, rows.square()) / self._sizes).sqrt()

    def measure(self, rtol: float) -> Callable[[Step], float]:
        """The error of a trial step: <= 1 where every block's is within `rtol` of its size."""

        def ratio(step: Step) -> float:
            size, gain, error = (self.rms(flat) for flat in (step.y0, step.f0, step.error))
            gain = gain * step.length
            size = torch.where(self._is_quadrature, torch.maximum(size, gain), size)
            # A block far below the others (a parameter that hardly matters) is not worth a tiny
            # step; one that wakes up within this step (a ReLU) has no size yet.
            fraction = torch.where(size > 0, _NEGLIGIBLE, _ASLEEP)
            floor = fraction * torch.maximum(size.max(), gain.max())
            scale = torch.maximum(size, floor).clamp_min(torch.finfo(size.dtype).tiny)
            worst = (error / (rtol * scale)).max()
            # NaN and inf of the new values show, too.
            return float(worst + 0.0 * (step.y1 + step.f1).sum())

        return ratio


@dataclass(frozen=True)
class Augmented:
    """Layout of z.

    Attributes:
        path: The path.
        with_state: Whether x is in it.
    """

    path: Piece
    with_state: bool = False

    @property
    def adjoint(self) -> slice:
        """Where lam stands."""
        n = self.path.x0.numel()
        return slice(n, 2 * n) if self.with_state else slice(0, n)

    @property
    def time(self) -> int:
        """Where int lam^T F_t stands; the quadratures of the leaves follow."""
        return self.adjoint.stop

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each leaf."""
        return [leaf.numel() for leaf in self.path.leaves.tensors]

    def start(self) -> Tensor:
        """z at T, before lam has received anything."""
        zeros = self.path.x0.new_zeros(self.path.x0.numel() + sum(self.sizes) + 1)
        return torch.cat([self.path.x_end, zeros]) if self.with_state else zeros

    def blocks(self) -> Blocks:
        """What an error is measured by."""
        pieces = self.path.layout.sizes * (2 if self.with_state else 1)
        quadratures = [1, *self.sizes]
        flags = [False] * len(pieces) + [True] * len(quadratures)
        return Blocks([*pieces, *quadratures], quadrature=flags, like=self.path.x0)

    def derivative(self, flow: FlowPiece, t: float, x: Tensor, lam: Tensor) -> Tensor:
        """z' at time t."""
        leaves = self.path.leaves
        time, state = flow.inputs(t, x)
        value = flow.flow.traced(time, state)
        product = flow.flow.pull(value, time, state, lam, leaves, look=True)
        parts = [product.state, product.time.reshape(1), *(g.reshape(-1) for g in product.leaves)]
        return torch.cat([-product.value, *parts] if self.with_state else parts)

    def leaves_of(self, z: Tensor) -> list[Tensor]:
        """The quadratures of the leaves, each in its shape."""
        pieces = torch.split(z[self.time + 1 :], self.sizes)
        return [
            piece.reshape(leaf.shape)
            for piece, leaf in zip(pieces, self.path.leaves.tensors, strict=True)
        ]


class Residuals:
    """Adds up, over the steps of a backward solve, what they tell about errors.

    Args:
        z: Layout of the state of the backward solve.
        velocity: t -> F(t, x(t)), for methods whose dense output is far less accurate than their
            steps: the identity is then looked at where the backward steps end.
    """

    def __init__(self, z: Augmented, velocity: Callable[[float], Tensor] | None = None) -> None:
        path = z.path
        self._z = z
        self._end = path.end
        self._method = path.method
        self._velocity = velocity
        # The forward steps whose ends, and whose starts, were not passed yet.
        self._ends = list(path.steps)
        self._starts = list(path.steps)
        self._kept = bool(self._ends)
        self._difference: Tensor | None = None
        self._at_end = path.x0.new_zeros(())
        self._defect = torch.zeros_like(self._at_end)
        # The largest gap, and what it is to be compared with.
        self._gap = self._scale = torch.zeros_like(self._at_end)

    def jump(self, jump: Jump) -> None:
        """lam gains something, and lam^T F with it."""
        products = jump.cotangent * jump.velocity
        self._at_end = self._at_end + products.sum()
        self._scale = torch.maximum(self._scale, products.abs().sum())

    def step(self, step: Step) -> None:
        """Note one accepted backward step."""
        adjoint = self._z.adjoint
        difference = step.error[self._z.time + 1 :]
        # A second quadrature: the embedded formula, whose differences add up with their signs.
        self._difference = difference if self._difference is None else self._difference + difference
        dense = first_entries(self._method.dense(step), self._z.time + 1)
        while self._ends and self._end - self._ends[-1].t1 <= step.t1:
            forward = self._ends.pop()
            self._defect = self._defect + dense(self._end - forward.t1)[adjoint] @ forward.error
        if self._velocity is not None:
            self._check(step.y1, self._velocity(self._end - step.t1))
            return
        # At a jump of the flow a forward step starts on its right, as the backward solve ends.
        while self._starts and self._end - self._starts[-1].t0 <= step.t1:
            forward = self._starts.pop()
            self._check(dense(self._end - forward.t0), forward.f0)

    def _check(self, z: Tensor, velocity: Tensor) -> None:
        """The identity at one point: lam^T F changes by the integral of lam^T F_t."""
        products, integral = z[self._z.adjoint] * velocity, z[self._z.time]
        scale = torch.maximum(products.abs().sum(), self._at_end.abs()) + integral.abs()
        self._scale = torch.maximum(self._scale, scale)
        gap = (products.sum() + integral - self._at_end).abs().nan_to_num(torch.inf)
        self._gap = torch.maximum(self._gap, gap)

    @property
    def quadrature_errors(self) -> list[float]:
        """Norm of the difference of the two quadratures, one a leaf."""
        sizes = self._z.sizes
        if self._difference is None or not sizes:
            return [0.0] * len(sizes)
        pieces = torch.split(self._difference, sizes)
        return torch.stack([piece.norm() for piece in pieces]).tolist()

    @property
    def departure(self) -> float | None:
        """Largest relative departure from the identity, where the steps were kept."""
        if not self._kept:
            return None
        gap, scale = torch.stack([self._gap, self._scale]).tolist()
        return 0.0 if gap == 0.0 else gap / scale if scale > 0 else gap

    @property
    def defect(self) -> float | None:
        """Sum of lam^T (error estimate) over the forward steps, where they were kept."""
        return float(self._defect) if self._kept else None


def integrate_backward(
    z: Augmented,
    jumps: Sequence[Jump],
    state: Callable[[float, Tensor], Tensor],
    residuals: Residuals,
    rtol: float,
    *,
    method: Callable[[FlowPiece], Method] | None = None,
    max_steps: int | None = None,
    after_step: Sequence[Callable[[Step], None]] = (),
) -> Tensor:
    """Integrate z over the backward time s = T - t from 0 to T - t0.

    Where the flow jumps in t, the solve ends and begins anew: lam is continuous there, and F_t has
    a point mass, which goes into int lam^T F_t dt. So it does at a hit, where
    lam itself jumps.

    Args:
        z: Layout of the state of the solve.
        jumps: What lam gains at the hits.
        state: (t, z) -> x(t).
        residuals: Told of every step and jump.
        rtol: Relative tolerance, by blocks.
        method: Makes the steps, given the flow on its smooth piece; None: that of the path.
        max_steps: Limit on all steps; None: that of the solver.
        after_step: Called with every accepted step, too.

    Returns:
        z at t0.

    Raises:
        GradientError: The step size underflowed or the step limit was used up.
    """
    path = z.path
    end, value, measure = path.end, z.start(), z.blocks().measure(rtol)
    size: float | None = _first_step(path)
    left = max_steps or path.solver.max_steps
    pending = sorted(jumps, key=lambda jump: jump.time)

    def note(step: Step) -> None:
        residuals.step(step)
        for listener in after_step:
            listener(step)

    for index, begin, until in reversed(path.segments):
        flow = path.flow.on(index)

        def derivative(s: float, y: Tensor, flow: FlowPiece = flow) -> Tensor:
            t = end - s
            return z.derivative(flow, t, state(t, y), y[z.adjoint])

        top = until
        while True:
            while pending and pending[-1].time >= top:
                jump = pending.pop()
                residuals.jump(jump)
                value = value.clone()
                value[z.adjoint] += jump.cotangent
            bottom = max(begin, pending[-1].time) if pending else begin
            if bottom == top:
                break
            stepper = Stepper(
                path.method if method is None else method(flow),
                derivative,
                end - top,
                end - bottom,
                value,
                measure=measure,
                max_step=path.solver.max_step,
                first_step=size,
            )
            try:
                value = stepper.integrate(left, after_step=note)
            except StepFailed as failure:
                raise GradientError(f"the backward solve failed: {failure}") from failure
            left -= stepper.tried
            top = bottom
        if begin > path.start:
            x = state(begin, value)
            mass = value[z.adjoint] @ (flow(begin, x) - path.flow.on(index - 1)(begin, x))
            value = value.clone()
            value[z.time] += mass
    return value


def _first_step(path: Piece) -> float:
    """Last step of the forward run: what was right for x near T is about right for lam."""
    length = path.end - path.start
    if not path.steps:
        return 1e-3 * length
    return min(max(step.length for step in path.steps[-2:]), length)
