"""Explicit Runge-Kutta methods from their tableau.

    k_0 = f0,   k_i = f(t0 + c_i h, y0 + h sum_j a_ij k_j),   y1 = y0 + h sum_i b_i k_i,
    error = h sum_i e_i k_i,   y(t0 + s h) = y0 + h sum_i (sum_p d_pi s^(p+1)) k_i

The velocities of a step are the rows of one matrix, so that each sum is one product with a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .solver import Dense, Function, Method
from .step import Step

__all__ = ["RungeKutta"]

_SHORT = 4096


@dataclass(frozen=True)
class RungeKutta(Method):
    """An explicit method with an embedded error estimate.

    Args:
        order: Order of y1.
        nodes: c_1, ..., c_{s-1}, of the stages after the first.
        matrix: Rows a_1, ..., a_{s-1}; row i has i numbers.
        weights: b_0, ..., b_{s-1}.
        error: e_0, ..., e_{s-1}: b less the weights of the second solution.
        dense_weights: Rows d_1, d_2, ...; None: the cubic through both ends of a step.
        dense_order: Order of the dense output.

    Where the last stage is y1 itself (a_{s-1} = b, as for dopri5) its velocity is y'(t1); for other
    methods that costs an evaluation.
    """

    order: int
    nodes: Sequence[float]
    matrix: Sequence[Sequence[float]]
    weights: Sequence[float]
    error: Sequence[float]
    dense_weights: Sequence[Sequence[float]] | None = None
    dense_order: int = 3
    _kept: dict[Any, _Weights] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def ends_on_last_stage(self) -> bool:
        """Whether the last stage is y1."""
        *before, last = self.weights
        return last == 0 and list(before) == list(self.matrix[-1])

    def _weights(self, like: Tensor) -> _Weights:
        key = (like.dtype, like.device)
        found = self._kept.get(key)
        if found is None:
            found = self._kept[key] = _Weights.of(self, like)
        return found

    def trial(self, f: Function, t0: float, y0: Tensor, f0: Tensor, t1: float) -> Step:
        """A step, without graph; its data are the velocities, shape (s, n)."""
        weights, h, n = self._weights(y0), t1 - t0, y0.shape[0]
        shape = (len(weights.nodes) + 1, n)
        velocities = y0.new_zeros(shape) if n <= _SHORT else y0.new_empty(shape)
        columns = velocities.t()
        velocities[0] = f0
        y = y0
        for i, (node, row) in enumerate(zip(weights.nodes, weights.rows, strict=True), 1):
            # Of a short state, later velocities (zeros yet) cost less than a view of the others.
            if n <= _SHORT:
                y = torch.addmv(y0, columns, weights.full_rows[i - 1], alpha=h)
            else:
                y = torch.addmv(y0, columns.narrow(1, 0, i), row, alpha=h)
            # Exactly t1 at the end of the step, beyond which the flow may not be evaluated.
            velocities[i] = f(t1 if node == 1.0 else t0 + node * h, y)
        if weights.ends_on_last_stage:
            f1 = velocities[-1]
        else:
            y = torch.addmv(y0, columns, weights.solution, alpha=h)
            f1 = f(t1, y)
        error = torch.mv(columns, weights.error).mul_(h)
        return Step(t0, t1, y0, f0, y, f1, error, velocities)

    def dense(self, step: Step) -> Callable[[float], Tensor]:
        """The dense output, by its weights where there are any."""
        weights = self._weights(step.y0)
        return super().dense(step) if weights.dense is None else _Weighted(step, weights)

    def replay(self, f: Function, step: Step, y0: Tensor, t0: Any, h: Any) -> Tensor:
        """See `Method.replay`."""
        weights = self._weights(y0)
        velocities = [f(t0, y0)]
        for node, row in zip(weights.nodes, weights.rows, strict=True):
            y = _moved(y0, velocities, row, h)
            if weights.ends_on_last_stage and len(velocities) == len(weights.nodes):
                return y
            velocities.append(f(t0 + node * h, y))
        return _moved(y0, velocities, weights.solution, h)


def _moved(y0: Tensor, velocities: Sequence[Tensor], row: Tensor, h: Any) -> Tensor:
    """y0 + h sum_j row_j k_j, with a graph."""
    columns = torch.stack(list(velocities)).t()
    if isinstance(h, Tensor):
        return y0 + h.to(y0) * torch.mv(columns, row)
    return torch.addmv(y0, columns, row, alpha=h)


class _Weighted(Dense):
    """y(t0 + s h) = y0 + h sum_i w_i(s) k_i."""

    __slots__ = ("_weights",)

    def __init__(self, step: Step, weights: _Weights) -> None:
        super().__init__(step)
        self._weights = weights

    def at_fractions(self, fractions: tuple[float, ...]) -> Sequence[Tensor]:
        """See `Dense.at_fractions`."""
        step = self._step
        weights = self._weights.at(fractions)
        return torch.addmm(step.y0, weights, step.data, alpha=step.t1 - step.t0).unbind()

    def first(self, count: int) -> Dense:
        """See `Dense.first`."""
        part = replace(self._step.first(count), data=self._step.data[:, :count])
        return _Weighted(part, self._weights)


@dataclass(frozen=True)
class _Weights:
    """The tableau as tensors of one dtype on one device."""

    nodes: tuple[float, ...]
    rows: tuple[Tensor, ...]
    full_rows: tuple[Tensor, ...]
    solution: Tensor
    error: Tensor
    dense: Tensor | None
    ends_on_last_stage: bool
    # Of the dense output at fractions that come again.
    kept: dict[tuple[float, ...], Tensor]

    def at(self, fractions: tuple[float, ...]) -> Tensor:
        """Weights of the velocities at fractions of a step, shape (len(fractions), s)."""
        found = self.kept.get(fractions)
        if found is None:
            assert self.dense is not None
            powers = [[s ** (i + 1) for i in range(len(self.dense))] for s in fractions]
            found = self.dense.new_tensor(powers) @ self.dense
            if len(fractions) > 1:
                self.kept[fractions] = found
        return found

    @classmethod
    def of(cls, method: RungeKutta, like: Tensor) -> _Weights:
        def tensor(values: Any) -> Tensor:
            return torch.tensor(values, dtype=like.dtype, device=like.device)

        dense, stages = method.dense_weights, len(method.weights)
        padded = [[*row, *[0.0] * (stages - len(row))] for row in method.matrix]
        return cls(
            tuple(method.nodes),
            tuple(tensor(list(row)) for row in method.matrix),
            tuple(tensor(row) for row in padded),
            tensor(list(method.weights)),
            tensor(list(method.error)),
            None if dense is None else tensor([list(row) for row in dense]),
            method.ends_on_last_stage,
            {},
        )
