"""Forward sensitivities: S = dx/dp integrated along with x, one column a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..solved import StoppingProblem
from ..solver import StepFailed, Stepper
from ..status import GradientError
from .base import Blocks, GradientRoute, PullBack

__all__ = ["ForwardSensitivity"]


@dataclass(frozen=True)
class ForwardSensitivity(GradientRoute):
    """S' = F_x S + F_p, S(t0) = dx0/dp, integrated forward next to x: no adjoint in it.

    The columns are all elements of x0 and of every leaf, so it is for few parameters. It shares
    neither the dense output nor a backward solve with the adjoint routes, which makes it a good
    judge of them.

    Exact for: any smooth flow. Memory: n (columns + 1) numbers. Cost: one Jacobian-vector product a
    column and an evaluation.

    Args:
        rtol: Relative tolerance of the joint solve; None: that of the forward solve.
        max_columns: Limit on the number of columns.
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
        sensitivity = self._integrate(problem, columns, sizes)
        pulled = sensitivity.T @ cotangent
        pieces = torch.split(pulled[n:], sizes)
        return PullBack(
            start=pulled[:n],
            leaves=[piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)],
        )

    def _integrate(self, problem: StoppingProblem, columns: int, sizes: Sequence[int]) -> Tensor:
        """dx(T)/d(x0, leaves) at fixed T, shape (n, columns)."""
        n = problem.x0.numel()
        rtol = self.rtol if self.rtol is not None else problem.tolerances.rtol
        products = 0

        def derivative(t: Tensor, z: Tensor) -> Tensor:
            nonlocal products
            products += columns
            value, matrix = _jacobian_products(problem, t, z[:n], z[n:].view(columns, n), sizes)
            return torch.cat([value, matrix.reshape(-1)])

        identity = torch.eye(columns, n, dtype=problem.x0.dtype, device=problem.x0.device)
        start = torch.cat([problem.x0, identity.reshape(-1)])
        flags = [False] + [False] * n + [True] * (columns - n)
        blocks = Blocks([n] * (columns + 1), quadrature=flags, like=problem.x0)
        holder: list[Stepper] = []
        stepper = Stepper(
            problem.settings,
            derivative,
            problem.start,
            problem.end,
            start,
            rtol=0.0,
            atol=1.0,
            norm=blocks.norm_for(rtol, lambda: holder[0] if holder else None),
            first_step=_first_step(problem),
        )
        holder.append(stepper)
        try:
            end = stepper.integrate(problem.settings.max_steps)
        except StepFailed as failure:
            raise GradientError(f"the forward sensitivity solve failed: {failure}") from failure
        problem.stats.vjps = products
        problem.stats.nfe_backward = products // max(columns, 1)
        return end[n:].view(columns, n).T


def _first_step(problem: StoppingProblem) -> float:
    grid = problem.trajectory.times
    return float(grid[1] - grid[0])


def _jacobian_products(
    problem: StoppingProblem, t: Tensor, x: Tensor, columns: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """F, shape (n,), and F_x S + F_p, shape (columns, n).

    u -> F_z^T u is linear, so its derivative with respect to u in the direction s is F_z s. That
    works with every flow that is twice differentiable by autograd, also where forward mode is not
    implemented.
    """
    leaves = problem.leaves.tensors
    time, state = problem.flow.inputs(float(t), x)
    value = problem.flow.traced(time, state)
    if not value.requires_grad:
        return value.detach(), torch.zeros_like(columns)
    where = f"by the flow at t = {float(t):.6g}"
    problem.leaves.require_known([value], inputs=(time, state), where=where)
    dummy = torch.zeros_like(value, requires_grad=True)
    pulled = torch.autograd.grad(
        value, [state, *leaves], dummy, create_graph=True, allow_unused=True
    )
    by_state, by_leaves = pulled[0], pulled[1:]
    n = x.numel()
    rows = []
    for index in range(columns.shape[0]):
        outputs, directions = [], []
        if by_state is not None and by_state.requires_grad:
            outputs.append(by_state)
            directions.append(columns[index])
        _add_direction(outputs, directions, by_leaves, sizes, index - n)
        rows.append(_push(outputs, directions, dummy))
    return value.detach(), torch.stack(rows)


def _add_direction(
    outputs: list[Tensor],
    directions: list[Tensor],
    by_leaves: Sequence[Tensor | None],
    sizes: Sequence[int],
    position: int,
) -> None:
    """Append the unit direction of the parameter at `position` (negative: of x0, none)."""
    for gradient, size in zip(by_leaves, sizes, strict=True):
        if 0 <= position < size:
            if gradient is not None and gradient.requires_grad:
                unit = torch.zeros_like(gradient).reshape(-1)
                unit[position] = 1.0
                outputs.append(gradient)
                directions.append(unit.reshape(gradient.shape))
            return
        position -= size


def _push(outputs: list[Tensor], directions: list[Tensor], dummy: Tensor) -> Tensor:
    if not outputs:
        return torch.zeros_like(dummy)
    (product,) = torch.autograd.grad(
        outputs, dummy, directions, retain_graph=True, allow_unused=True
    )
    return torch.zeros_like(dummy) if product is None else product.detach()
