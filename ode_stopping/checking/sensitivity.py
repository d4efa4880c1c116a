"""Directional derivatives of T by forward sensitivity: no adjoint, no dense output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients.forward import Column, push_forward
from ..gradients.problem import StoppingProblem
from .ladder import Slope
from .subjects import Directions, Subject

__all__ = ["sensitivity_slopes"]


def sensitivity_slopes(
    problem: StoppingProblem, chosen: Directions, promise_per_rtol: float
) -> list[list[Slope | None]]:
    """dT along every direction of every subject, from one joint forward solve.

        dT = -(g^T dx(T) + dJ(T, x_T) - d eps)/J'(T),   dx(T) at fixed T by s' = F_x s + F_theta d

    and for the start time, with s' = F_x s + F_t from s(t0) = 0,

        dT/dt0 = g^T (F(T, x_T) - s(T))/J'(T).

    Args:
        problem: The problem, solved at the tolerance of the reference.
        chosen: The subjects with their directions.
        promise_per_rtol: Relative uncertainty in units of the tolerance.

    Raises:
        GradientError: The joint solve failed.
    """
    crossing = problem.crossing
    moves = [(subject, move) for subject, directions in chosen for move in directions]
    positions = {id(leaf): index for index, leaf in enumerate(problem.leaves.tensors)}
    columns = [_column(problem, positions, subject, move) for subject, move in moves]
    pushed = push_forward(problem, columns) if columns else problem.x0.new_zeros(0, 0)
    by_state = (pushed.T @ crossing.gradient).tolist()
    one = torch.ones((), dtype=problem.x0.dtype, device=problem.x0.device)
    explicit = problem.criterion.vjp(
        crossing.time, crossing.state, one, problem.leaves, look=False
    ).leaves
    rtol, span = problem.tolerances.rtol, problem.end - problem.start
    along = float(crossing.gradient @ crossing.velocity)
    slopes: list[list[Slope | None]] = []
    flat = iter(by_state)
    for subject, directions in chosen:
        found: list[Slope | None] = []
        for move in directions:
            change = next(flat)
            if subject.kind == "leaf":
                change += float((explicit[positions[id(subject.tensor)]] * move).sum())
            elif subject.kind == "target":
                change = -float(problem.criterion.oriented(move))
            elif subject.kind == "t0":
                change -= float(move) * along
            value = -change / crossing.rate
            found.append(Slope(value, promise_per_rtol * rtol * abs(value) + rtol * span, 0.0))
        slopes.append(found)
    return slopes


def _column(
    problem: StoppingProblem, positions: dict[int, int], subject: Subject, move: Tensor
) -> Column:
    if subject.kind == "leaf":
        return Column(leaf=positions[id(subject.tensor)], tangent=move)
    if subject.kind == "x0":
        start = torch.zeros_like(problem.x0)
        start[problem.layout.slices()[subject.index]] = move.reshape(-1)
        return Column(start=start)
    # The target moves nothing but the crossing.
    return Column(time=float(move) if subject.kind == "t0" else 0.0)
