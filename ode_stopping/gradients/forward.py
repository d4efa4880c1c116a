"""Forward sensitivities: tangents s of x integrated along with it, one column a direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.status import GradientError
from ..solving.stepper import StepFailed, Stepper
from .backward_solve import Blocks
from .problem import StoppingProblem
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

    def pull_back(self, problem: StoppingProblem, cotangent: Tensor) -> PullBack:
        """See `GradientRoute.pull_back`."""
        n = cotangent.numel()
        leaves = problem.leaves.tensors
        sizes = [leaf.numel() for leaf in leaves]
        columns = n + sum(sizes)
        if columns > self.max_columns:
            raise GradientError(
                f"ForwardSensitivity would need {columns} columns ({n} for x0, {sum(sizes)} for "
                "parameters), "
                f"more than max_columns = {self.max_columns}; use InterpolatingAdjoint"
            )
        sensitivity = push_forward(problem, _unit_columns(problem), rtol=self.rtol)
        pulled = sensitivity.T @ cotangent
        pieces = torch.split(pulled[n:-1], sizes)
        return PullBack(
            start=pulled[:n],
            leaves=[piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)],
            # s' = F_x s + F_t from s(t0) = 0, so lam(T)^T s(T) = int F_t^T lam dt.
            time=float(pulled[-1]),
        )


def push_forward(
    problem: StoppingProblem, columns: Sequence[Column], *, rtol: float | None = None
) -> Tensor:
    """Tangents of x(T) at fixed T along given directions, shape (n, columns).

    Solves s' = F_x s + F_theta d + F_t c for every column, jointly with x' = F. No adjoint and no
    dense output takes part.

    Args:
        problem: The solved problem; its trajectory is not used.
        columns: The directions.
        rtol: Relative tolerance of the joint solve, by columns; None: that of the forward solve.

    Raises:
        GradientError: The joint solve failed.
    """
    n, count = problem.x0.numel(), len(columns)
    accuracy = rtol if rtol is not None else problem.tolerances.rtol
    products = 0

    def derivative(t: Tensor, z: Tensor) -> Tensor:
        nonlocal products
        products += count
        value, matrix = _tangents(problem, t, z[:n], z[n:].view(count, n), columns)
        return torch.cat([value, matrix.reshape(-1)])

    starts = [problem.x0.new_zeros(n) if c.start is None else c.start for c in columns]
    # A column that starts at zero grows from what is added to it, like a quadrature.
    blocks = Blocks(
        [n] * (count + 1),
        quadrature=[False, *(column.start is None for column in columns)],
        like=problem.x0,
    )
    z, size = torch.cat([problem.x0, *starts]), _first_step(problem)
    left = problem.settings.max_steps
    try:
        for index, begin, until in problem.segments:
            if index > 0:
                z = _over_the_jump(problem, index, begin, z, columns)
            problem.flow.enter(index)
            stepper = Stepper(
                problem.settings,
                derivative,
                begin,
                until,
                z,
                measure=blocks.measure(accuracy),
                first_step=size,
            )
            z = stepper.integrate(left)
            left -= stepper.accepted + stepper.rejected
            size = stepper.next_step
    except StepFailed as failure:
        raise GradientError(f"the forward sensitivity solve failed: {failure}") from failure
    finally:
        problem.flow.leave()
    problem.stats.vjps = products
    problem.stats.nfe_backward = products // max(count, 1)
    return z[n:].view(count, n).T


def _unit_columns(problem: StoppingProblem) -> list[Column]:
    """A column for every element of x0 and of the leaves, in this order, and one for the clock."""
    n = problem.x0.numel()
    identity = torch.eye(n, dtype=problem.x0.dtype, device=problem.x0.device)
    columns = [Column(start=row) for row in identity]
    for index, leaf in enumerate(problem.leaves.tensors):
        units = torch.eye(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
        columns += [Column(leaf=index, tangent=unit.reshape(leaf.shape)) for unit in units]
    return [*columns, Column(time=1.0)]


def _first_step(problem: StoppingProblem) -> float:
    grid = problem.trajectory.times
    return float(grid[1] - grid[0])


def _over_the_jump(
    problem: StoppingProblem, index: int, t: float, z: Tensor, columns: Sequence[Column]
) -> Tensor:
    """z behind times[index], where the flow jumps: F_t has a point mass there."""
    n = problem.x0.numel()
    sides = []
    for segment in (index - 1, index):
        problem.flow.enter(segment)
        sides.append(problem.flow.plain(t, z[:n]))
    shifts = torch.tensor([column.time for column in columns], dtype=z.dtype, device=z.device)
    mass = torch.outer(shifts, sides[1] - sides[0])
    return torch.cat([z[:n], z[n:] + mass.reshape(-1)])


def _tangents(
    problem: StoppingProblem, t: Tensor, x: Tensor, tangents: Tensor, columns: Sequence[Column]
) -> tuple[Tensor, Tensor]:
    """F, shape (n,), and F_x s + F_theta d + F_t c for every column, shape (columns, n).

    u -> F_z^T u is linear, so its derivative with respect to u in the direction s is F_z s. That
    works with every flow that is twice differentiable by autograd, also where forward mode is not
    implemented.
    """
    time, state = problem.flow.inputs(float(t), x)
    value = problem.flow.traced(time, state)
    if not value.requires_grad:
        return value.detach(), torch.zeros_like(tangents)
    where = f"by the flow at t = {float(t):.6g}"
    problem.leaves.require_known([value], inputs=(time, state), where=where)
    dummy = torch.zeros_like(value, requires_grad=True)
    by_state, by_time, *by_leaves = torch.autograd.grad(
        value,
        [state, time, *problem.leaves.tensors],
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
