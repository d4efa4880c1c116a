"""Forward sensitivities: tangents s of x integrated along with it, one column a direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from ..core.status import GradientError
from ..solving.flow_map import FlowPiece
from ..solving.solver import StepFailed
from ..solving.stepper import Stepper
from .backward_solve import Blocks
from .problem import Jump, Piece
from .route import GradientRoute, PullBack

__all__ = ["Column", "ForwardSensitivity", "push_forward"]


@dataclass(frozen=True)
class Column:
    """One direction in the space of everything that x(T) at fixed T depends on.

    Its tangent obeys s' = F_x s + F_theta d + F_t c, s(t0) = start.

    Attributes:
        start: s(t0), shape (n,); None: zero.
        leaf: Index of the leaf that moves; None: none does.
        tangent: d, of that leaf's shape.
        time: c, how much the flow's own clock is shifted.
    """

    start: Tensor | None = None
    leaf: int | None = None
    tangent: Tensor | None = None
    time: float = 0.0


@dataclass(frozen=True)
class ForwardSensitivity(GradientRoute):
    """S' = F_x S + F_p, S(t0) = dx0/dp, integrated forward next to x: no adjoint in it.

    The columns are all elements of x0 and of every leaf, and one for the flow's clock, so it is for
    few parameters. It shares neither the dense output nor a backward solve with the adjoint routes,
    which makes it a good judge of them.

    Exact for: any smooth flow. Memory: n (columns + 1) numbers. Cost: one Jacobian-vector product a
    column and an evaluation.

    Args:
        rtol: Relative tolerance of the joint solve; None: that of the forward solve.
        max_columns: Limit on the number of columns for x0 and the leaves.
    """

    rtol: float | None = None
    max_columns: int = 512

    keeps_trajectory = False
    figures: ClassVar[tuple[str, ...]] = ("identity",)

    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        """See `GradientRoute.pull_back`."""
        return self._solve(piece, [piece.at_end(cotangent)])

    def pull_back_path(self, path: Piece, jumps: Sequence[Jump]) -> PullBack:
        """See `GradientRoute.pull_back_path`."""
        return self._solve(path, jumps)

    def _solve(self, path: Piece, jumps: Sequence[Jump]) -> PullBack:
        n, leaves = path.x0.numel(), path.leaves.tensors
        sizes = [leaf.numel() for leaf in leaves]
        columns = n + sum(sizes)
        if columns > self.max_columns:
            raise GradientError(
                f"ForwardSensitivity would need {columns} columns ({n} for x0, {sum(sizes)} for "
                f"parameters), more than max_columns = {self.max_columns}; use StepAdjoint"
            )
        times = [jump.time for jump in jumps]
        calls = path.flow.calls
        tangents = _pushed(path, _unit_columns(path), times, rtol=self.rtol)
        found = zip(tangents, jumps, strict=True)
        pulled = sum((s.T @ jump.cotangent for s, jump in found), path.x0.new_zeros(columns + 1))
        pieces = torch.split(pulled[n:-1], sizes)
        return PullBack(
            start=pulled[:n],
            leaves=[piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)],
            # s' = F_x s + F_t from s(t0) = 0, so lam(T)^T s(T) = int F_t^T lam dt.
            time=float(pulled[-1]),
            vjps=(path.flow.calls - calls) * (columns + 1),
        )


def push_forward(path: Piece, columns: Sequence[Column], *, rtol: float | None = None) -> Tensor:
    """Tangents of x(T) at fixed T along given directions, shape (n, columns).

    Solves s' = F_x s + F_theta d + F_t c for every column, jointly with x' = F. No adjoint and no
    dense output takes part.

    Args:
        path: The path; its steps are not used.
        columns: The directions.
        rtol: Relative tolerance of the joint solve, by columns; None: that of the forward solve.

    Raises:
        GradientError: The joint solve failed.
    """
    return _pushed(path, columns, [path.end], rtol=rtol)[0]


def _pushed(
    path: Piece, columns: Sequence[Column], times: Sequence[float], *, rtol: float | None
) -> list[Tensor]:
    """The tangents of x at several times, in order, each of shape (n, columns)."""
    n, count = path.x0.numel(), len(columns)
    accuracy = rtol if rtol is not None else path.tolerances.rtol
    starts = [path.x0.new_zeros(n) if c.start is None else c.start for c in columns]
    # A column that starts at zero grows from what is added to it, like a quadrature.
    blocks = Blocks(
        [n] * (count + 1),
        quadrature=[False, *(column.start is None for column in columns)],
        like=path.x0,
    )
    z = torch.cat([path.x0, *starts])
    size: float | None = None
    left, found = path.solver.max_steps, []
    for index, begin, until in path.segments:
        if begin > path.start:
            z = _over_the_jump(path, index, begin, z, columns)
        flow = path.flow.on(index)

        def derivative(t: float, y: Tensor, flow: FlowPiece = flow) -> Tensor:
            value, matrix = _tangents(path, flow, t, y[:n], y[n:].view(count, n), columns)
            return torch.cat([value, matrix.reshape(-1)])

        inner = [t for t in times if begin < t <= until]
        for bottom, top in pairwise([begin, *inner, *([until] if until not in inner else [])]):
            stepper = Stepper(
                path.method,
                derivative,
                bottom,
                top,
                z,
                measure=blocks.measure(accuracy),
                max_step=path.solver.max_step,
                first_step=size,
            )
            try:
                z = stepper.integrate(left)
            except StepFailed as failure:
                raise GradientError(f"the forward sensitivity solve failed: {failure}") from failure
            left -= stepper.tried
            size = stepper.next_step
            if top in times:
                found.append(z[n:].view(count, n).T)
    return found


def _unit_columns(path: Piece) -> list[Column]:
    """A column for every element of x0 and of the leaves, in this order, and one for the clock."""
    n = path.x0.numel()
    identity = torch.eye(n, dtype=path.x0.dtype, device=path.x0.device)
    columns = [Column(start=row) for row in identity]
    for index, leaf in enumerate(path.leaves.tensors):
        units = torch.eye(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
        columns += [Column(leaf=index, tangent=unit.reshape(leaf.shape)) for unit in units]
    return [*columns, Column(time=1.0)]


def _over_the_jump(
    path: Piece, index: int, t: float, z: Tensor, columns: Sequence[Column]
) -> Tensor:
    """z behind times[index], where the flow jumps: F_t has a point mass there."""
    n = path.x0.numel()
    before, after = (path.flow.on(segment)(t, z[:n]) for segment in (index - 1, index))
    shifts = torch.tensor([column.time for column in columns], dtype=z.dtype, device=z.device)
    mass = torch.outer(shifts, after - before)
    return torch.cat([z[:n], z[n:] + mass.reshape(-1)])


def _tangents(
    path: Piece,
    flow: FlowPiece,
    t: float,
    x: Tensor,
    tangents: Tensor,
    columns: Sequence[Column],
) -> tuple[Tensor, Tensor]:
    """F, shape (n,), and F_x s + F_theta d + F_t c for every column, shape (columns, n).

    u -> F_z^T u is linear, so its derivative with respect to u in the direction s is F_z s. That
    works with every flow that is twice differentiable by autograd, also where forward mode is not
    implemented.
    """
    time, state = flow.inputs(t, x)
    value = flow.flow.traced(time, state)
    if not value.requires_grad:
        return value.detach(), torch.zeros_like(tangents)
    where = f"by the flow at t = {t:.6g}"
    path.leaves.require_known([value], inputs=(time, state), where=where)
    dummy = torch.zeros_like(value, requires_grad=True)
    by_state, by_time, *by_leaves = torch.autograd.grad(
        value,
        [state, time, *path.leaves.tensors],
        dummy,
        create_graph=True,
        allow_unused=True,
    )
    rows = []
    for tangent, column in zip(tangents, columns, strict=True):
        terms = [(by_state, tangent)]
        if column.leaf is not None:
            terms.append((by_leaves[column.leaf], column.tangent))
        if column.time:
            terms.append((by_time, torch.full_like(time, column.time)))
        rows.append(_push(terms, dummy))
    return value.detach(), torch.stack(rows)


def _push(terms: Sequence[tuple[Tensor | None, Tensor | None]], dummy: Tensor) -> Tensor:
    """The sum of F_z d over the terms (u -> F_z^T u, d)."""
    kept = [(g, d) for g, d in terms if g is not None and d is not None and g.requires_grad]
    if not kept:
        return torch.zeros_like(dummy)
    (product,) = torch.autograd.grad(
        [g for g, _ in kept], dummy, [d for _, d in kept], retain_graph=True, allow_unused=True
    )
    return torch.zeros_like(dummy) if product is None else product.detach()
