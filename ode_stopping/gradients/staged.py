"""The continuous adjoint's steps with fewer products: recorded, the leaves' part for all stages.

    lam' = F_x^T lam,   (int lam^T F_t)' = F_t^T lam,   (int F_theta^T lam)' = F_theta^T lam

F_x^T lam does not need F, and no stage of a step depends on F_theta^T lam. So the stages are those
of the first two alone, by a recording without what only F needs; the third is made for all stages
of a step in one batched call, and added with the method's weights. Where F is a large matrix times
x, a stage takes one product with a vector in place of two, and a step one with a few columns.

Beside what `recording` refuses, the recorded F has to be the kept one at every accepted step, and
the products those of autograd at the first, the last and seeded random evaluations.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..core.leaves import walk
from ..core.sweep import products
from ..solving.flow_map import FlowPiece
from ..solving.runge_kutta import RungeKutta
from ..solving.solver import Function, Method
from ..solving.step import Step
from .problem import Piece
from .recording import Recording, Unrecordable

__all__ = ["Disagreement", "Products", "Staged"]

# The recording (5 ms) is paid back by some 100 evaluations; small states are quick either way.
_LARGE_STATE = 64
_MANY_STEPS = 32
# Of the steps, one in so many is compared with autograd.
_ONE_IN = 8
_ROUNDINGS = 1000


class Disagreement(Exception):
    """A recording is not the function that it was made of."""


@dataclass(frozen=True)
class _Point:
    """One evaluation: where, and (F_x^T lam, F_t^T lam) as they were found there."""

    time: float
    x: Tensor
    lam: Tensor
    found: Tensor


class Products:
    """Vector-Jacobian products of the flow on a path, by recordings.

    Args:
        path: The path, of a Runge-Kutta method.
        eager: (flow, t, x, lam) -> (F_x^T lam, F_t^T lam, F_theta^T lam) by autograd, shape
            (n + 1 + P,).

    Attributes:
        leaf_numbers: P, numbers in all leaves.

    Raises:
        Unrecordable: The flow does what a recording cannot hold.
        Disagreement: The recorded flow is not that of the forward run.
    """

    def __init__(self, path: Piece, eager: Callable[..., Tensor]) -> None:
        self._flow, self._eager = path.flow, eager
        self._tensors = path.leaves.tensors
        self._sizes = [path.x0.numel(), 1, *(leaf.numel() for leaf in self._tensors)]
        self.leaf_numbers = sum(self._sizes[2:])
        self._random = random.Random(0)
        self._latest: tuple[FlowPiece, _Point, Tensor] | None = None
        steps, method = path.steps, path.method
        assert isinstance(method, RungeKutta)
        self._method, self._end = method, path.end
        count = len(method.nodes) + (not method.ends_on_last_stage)
        # Rows of their own: a recording tells tensors apart by their memory.
        inputs = _rows(path, steps[:count])
        whole = Recording.of(self._joint, *(rows[-1].clone() for rows in inputs))
        self._of_state = whole.giving(1, 2)
        self._of_leaves = Recording.of(
            torch.vmap(whole.giving(*range(3, len(whole.outputs))).run), *inputs
        )
        value = Recording.of(torch.vmap(whole.giving(0).run), *inputs)
        for i in range(0, len(steps), count):
            # The last rows end with the last step.
            begin = min(i, len(steps) - count)
            _check_values(value, steps[begin : begin + count], path)

    @classmethod
    def of(cls, path: Piece, eager: Callable[..., Tensor]) -> Products | None:
        """The products where they pay and can be recorded; None elsewhere."""
        kind = (path.x0.dtype, path.x0.device)
        if (
            path.x0.numel() < _LARGE_STATE
            or len(path.steps) < _MANY_STEPS
            or not isinstance(path.method, RungeKutta)
            or not path.leaves.tensors
            or path.leaves.has_history
            or any((p.dtype, p.device) != kind or p._backward_hooks for p in path.leaves.tensors)
        ):
            return None
        try:
            return cls(path, eager)
        except Exception:
            # Whatever a flow does that cannot be recorded, autograd takes it or says why not.
            return None

    def method(self, state: Callable[[float], Tensor], flow: FlowPiece) -> Staged:
        """The path's method by these products, over x(t) and the flow on a smooth piece."""
        return Staged(self._method, self, flow, self._end, state)

    def _joint(self, t: Tensor, x: Tensor, lam: Tensor) -> list[Tensor]:
        time, state = (one.detach().requires_grad_(True) for one in (t, x))
        value = self._flow.traced(time, state)
        _, nodes = walk([value])
        if any(isinstance(node, BackwardCFunction) for node in nodes):
            raise Unrecordable("a backward pass in Python, which may read numbers unseen")
        return [value.detach(), *products([value], [state, time, *self._tensors], [lam])]

    def of_state(self, t: Tensor, x: Tensor, lam: Tensor) -> Tensor:
        """(F_x^T lam, F_t^T lam), shape (n + 1,)."""
        self._flow.count_product()
        state, time = self._of_state.run(t, x, lam)
        return torch.cat([state, time.reshape(1)])

    def of_leaves(self, flow: FlowPiece, points: list[_Point]) -> Tensor:
        """F_theta^T lam at the stages of one step, shape (s, P).

        Raises:
            Disagreement: A product is not that of autograd, where this is looked at.
        """
        times = torch.stack([flow.time_tensor(point.time) for point in points])
        states, lams = (torch.stack([getattr(p, name) for p in points]) for name in ("x", "lam"))
        parts = self._of_leaves.run(times, states, lams)
        rows = torch.cat([part.reshape(len(points), -1) for part in parts], dim=1)
        if self._latest is None or self._random.randrange(_ONE_IN) == 0:
            some = self._random.randrange(len(points))
            self._compare(flow, points[some], rows[some])
        self._latest = flow, points[-1], rows[-1]
        return rows

    def compare_latest(self) -> None:
        """Compare the products of the latest evaluation with those of autograd.

        Raises:
            Disagreement: They differ.
        """
        if self._latest is not None:
            self._compare(*self._latest)

    def _compare(self, flow: FlowPiece, at: _Point, leaves: Tensor) -> None:
        true = self._eager(flow, at.time, at.x, at.lam)
        gaps = torch.split(torch.cat([at.found, leaves]) - true, self._sizes)
        sizes = torch.split(true, self._sizes)
        _require(*(torch.stack([p.abs().amax() for p in parts]) for parts in (gaps, sizes)))


def _rows(path: Piece, steps: Sequence[Step]) -> tuple[Tensor, Tensor, Tensor]:
    """t, x and F at the starts of some steps, of shapes (s,), (s, n), (s, n)."""
    pieces = [path.flow.on(path.number_at(step.t0)) for step in steps]
    times = [piece.time_tensor(step.t0) for piece, step in zip(pieces, steps, strict=True)]
    states, velocities = [step.y0 for step in steps], [step.f0 for step in steps]
    return torch.stack(times), torch.stack(states), torch.stack(velocities)


def _check_values(value: Recording, steps: Sequence[Step], path: Piece) -> None:
    """F is the kept one at the starts of some steps, as far as it moves their ends."""
    times, states, velocities = _rows(path, steps)
    (found,) = value.run(times, states, velocities)
    lengths = times.new_tensor([step.length for step in steps])
    moved = lengths * velocities.abs().amax(1)
    _require(lengths * (found - velocities).abs().amax(1), states.abs().amax(1) + moved)


def _require(gaps: Tensor, sizes: Tensor) -> None:
    """Raise where a gap is more than rounding."""
    if not bool((gaps <= _ROUNDINGS * torch.finfo(gaps.dtype).eps * sizes).all()):
        raise Disagreement


@dataclass(frozen=True)
class Staged(Method):
    """A Runge-Kutta method for (lam, int lam^T F_t, int F_theta^T lam) in backward time.

    Args:
        method: The method.
        products: The products.
        flow: The flow on a smooth piece.
        end: T, in flow time.
        state: t -> x(t).
    """

    method: RungeKutta
    products: Products
    flow: FlowPiece
    end: float
    state: Callable[[float], Tensor]

    @property
    def order(self) -> int:  # type: ignore[override]
        """See `Method`."""
        return self.method.order

    def trial(self, f: Function, t0: float, y0: Tensor, f0: Tensor, t1: float) -> Step:
        """See `Method.trial`; the data are those of (lam, int lam^T F_t) alone."""
        short = len(y0) - self.products.leaf_numbers
        points: list[_Point] = []

        def derivative(s: float, y: Tensor) -> Tensor:
            t, lam = self.end - s, y[: short - 1]
            x = self.state(t)
            found = self.products.of_state(self.flow.time_tensor(t), x, lam)
            points.append(_Point(t, x, lam, found))
            return found

        step = self.method.trial(derivative, t0, y0[:short], f0[:short], t1)
        rows = torch.cat([f0[None, short:], self.products.of_leaves(self.flow, points)])
        unused = [0.0] * (len(rows) - len(self.method.weights))
        added, error = (
            torch.mv(rows.t(), rows.new_tensor([*weights, *unused])).mul_(t1 - t0)
            for weights in (self.method.weights, self.method.error)
        )
        return Step(
            t0,
            t1,
            y0,
            f0,
            torch.cat([step.y1, y0[short:] + added]),
            torch.cat([step.f1, rows[-1]]),
            torch.cat([step.error, error]),
            step.data,
        )

    def replay(self, f: Function, step: Step, y0: Tensor, t0: Any, h: Any) -> Tensor:
        """Nobody replays a step of the adjoint."""
        raise NotImplementedError
