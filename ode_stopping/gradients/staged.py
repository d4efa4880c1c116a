"""Fewer products in a step of the adjoint and in the transpose of a step: recorded and batched.

    F_x(t_i, Y_i)^T lam_i one after the other,   F_theta(t_i, Y_i)^T lam_i all at once

at the stages i of a step: the next stage waits for F_x^T lam alone, which does not need F and comes
from a recording without what only F needs. F_theta^T lam, and F with it, is made for all stages in
one batched call. Where F is a large matrix times x, a stage takes one product with a vector in
place of two, and a step one with a few columns.

Beside what `recording` refuses, F has to be the kept one at every accepted step, and the products
those of autograd in the first, the last and every few steps, at random; else `Disagreement`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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

# The recording (5 ms) is paid back by some 100 evaluations.
_MANY_STEPS = 32
# Of what autograd reads and writes, so much or less has to remain.
_LARGEST_SHARE = 0.75
# Of so many steps in a row, a random one is compared with autograd.
_ONE_IN = 4
_ROUNDINGS = 1000

# (flow, t, x, lam) -> (F_x^T lam, F_t^T lam, F_theta^T lam), shape (n + 1 + P,).
Eager = Callable[[FlowPiece, float, Tensor, Tensor], Tensor]


class Disagreement(Exception):
    """A recording is not the function that it was made of."""


@dataclass(frozen=True)
class _Point:
    """One evaluation: where, and (F_x^T lam, F_t^T lam) as they were found there."""

    flow: FlowPiece
    time: float
    x: Tensor
    lam: Tensor
    found: Tensor


class Products:
    """Vector-Jacobian products of the flow on a path, by recordings.

    Args:
        path: The path, of a Runge-Kutta method.
        eager: The products by autograd.

    Attributes:
        sizes: Numbers in x, t and the leaves.
        stages: Evaluations in one step.

    Raises:
        Unrecordable: The flow does what a recording cannot hold, or a recording saves too little.
        Disagreement: The recorded flow is not that of the forward run.
    """

    def __init__(self, path: Piece, eager: Eager) -> None:
        method, steps = path.method, path.steps
        assert isinstance(method, RungeKutta)
        self._path, self._eager, self._method = path, eager, method
        self.sizes = [path.x0.numel(), 1, *(leaf.numel() for leaf in path.leaves.tensors)]
        self.stages = len(method.weights) - method.ends_on_last_stage
        self._tableau = _tableau(method, self.stages, path.x0)
        self._random = random.Random(0)
        self._latest: tuple[_Point, list[Tensor]] | None = None
        self._steps = self._chosen = 0
        self._worst = path.x0.new_zeros(())
        # Rows of their own: a recording tells tensors apart by their memory.
        rows = self._starts(steps[: self.stages])
        whole = Recording.of(self._joint, *(part[-1].clone() for part in rows))
        self._of_state = whole.giving(1, 2)
        rest = whole.giving(0, *range(3, len(whole.outputs)))
        self._of_rest = Recording.of(torch.vmap(rest.run), *rows)
        mean = self._of_state.traffic + self._of_rest.traffic / self.stages
        if mean > _LARGEST_SHARE * whole.traffic:
            raise Unrecordable("too little of autograd's work is saved")
        for i in range(0, len(steps), self.stages):
            begin = min(i, len(steps) - self.stages)
            some = steps[begin : begin + self.stages]
            times, states, velocities = self._starts(some)
            lengths = times.new_tensor([step.length for step in some])[:, None]
            values = self._of_rest.run(times, states, velocities)[0]
            self._note(lengths * (values - velocities), states, lengths * velocities)
        _require(self._worst)

    @classmethod
    def of(cls, path: Piece, eager: Eager, *, least: int) -> Products | None:
        """The products where they pay (`least` numbers in x) and can be recorded; else None."""
        kind = (path.x0.dtype, path.x0.device)
        if (
            path.x0.numel() < least
            # A class that derives from it may have other data in its steps.
            or type(path.method) is not RungeKutta
            or len(path.steps) < max(_MANY_STEPS, len(path.method.weights))
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

    def _joint(self, t: Tensor, x: Tensor, lam: Tensor) -> list[Tensor]:
        """F, F_x^T lam, F_t^T lam and F_theta^T lam."""
        time, state = (one.detach().requires_grad_(True) for one in (t, x))
        value = self._path.flow.traced(time, state)
        _, nodes = walk([value])
        if any(isinstance(node, BackwardCFunction) for node in nodes):
            raise Unrecordable("a backward pass in Python, which may read numbers unseen")
        inputs = [state, time, *self._path.leaves.tensors]
        return [value.detach(), *products([value], inputs, [lam])]

    def _starts(self, steps: Sequence[Step]) -> tuple[Tensor, Tensor, Tensor]:
        """t, x and F at the starts of some steps, of shapes (s,), (s, n), (s, n)."""
        times = [self._flow_at(step).time_tensor(step.t0) for step in steps]
        states, velocities = [step.y0 for step in steps], [step.f0 for step in steps]
        return torch.stack(times), torch.stack(states), torch.stack(velocities)

    def _flow_at(self, step: Step) -> FlowPiece:
        return self._path.flow.on(self._path.number_at(step.t0))

    def method_over(self, state: Callable[[float], Tensor]) -> Callable[[FlowPiece], Method]:
        """The path's method for the continuous adjoint over x(t), given the flow on a piece."""
        return partial(Staged, self._method, self, self._path.end, state)

    def at(self, flow: FlowPiece, t: float, x: Tensor, lam: Tensor) -> _Point:
        """F_x^T lam and F_t^T lam at a stage."""
        self._path.flow.count_product()
        state, time = self._of_state.run(flow.time_tensor(t), x, lam)
        return _Point(flow, t, x, lam, torch.cat([state, time.reshape(1)]))

    def rest(self, points: Sequence[_Point]) -> tuple[Tensor, list[Tensor]]:
        """F and F_theta^T lam at all stages of a step, of shapes (s, n) and (s, *leaf.shape).

        Raises:
            Disagreement: A product is not that of autograd, where this is looked at.
        """
        times = torch.stack([point.flow.time_tensor(point.time) for point in points])
        states, lams = (torch.stack([getattr(p, name) for p in points]) for name in ("x", "lam"))
        values, *leaves = self._of_rest.run(times, states, lams)
        if self._steps > 0 and self._steps % _ONE_IN == 0:
            self._chosen = self._steps + self._random.randrange(_ONE_IN)
        if self._steps == self._chosen:
            some = self._random.randrange(len(points))
            self._compare(points[some], [part[some] for part in leaves])
        self._steps += 1
        self._latest = points[-1], [part[-1] for part in leaves]
        return values, leaves

    def transposed(self, step: Step, lam: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """lam at the start of a step, and what int lam^T F_t and the leaves gain.

        With Y_i = y0 + h sum_j a_ij k_j and mu_i = h (b_i lam + sum_j a_ji F_x(Y_j)^T mu_j), lam
        becomes lam + sum_i F_x(Y_i)^T mu_i, and a leaf gains sum_i F_theta(Y_i)^T mu_i.
        """
        nodes, matrix, columns = self._tableau
        h, n, flow = step.length, len(lam), self._flow_at(step)
        velocities = step.data[: self.stages]
        states = torch.addmm(step.y0, matrix, velocities, alpha=h)
        rows = torch.cat([lam[None], torch.zeros_like(states)])
        points = []
        for i in reversed(range(self.stages)):
            t = step.t1 if nodes[i] == 1.0 else step.t0 + nodes[i] * h
            mu = torch.mv(rows.t(), columns[i]).mul_(h)
            points.append(self.at(flow, t, states[i], mu))
            rows[i + 1] = points[-1].found[:n]
        values, leaves = self.rest(points)
        self._note(h * (values.flip(0) - velocities), step.y0[None], h * velocities)
        by_time = torch.stack([point.found[n] for point in points]).sum()
        return rows.sum(0), by_time, [part.sum(0) for part in leaves]

    def _note(self, gaps: Tensor, states: Tensor, moves: Tensor) -> None:
        """By how much recorded velocities move the ends of steps, as `StepAdjoint` looks at it."""
        sizes = states.abs().amax(1) + moves.abs().amax(1)
        self._worst = torch.maximum(self._worst, (gaps.abs().amax(1) / sizes).max())

    def finish(self) -> None:
        """Look at the latest evaluation, and at all that was noted.

        Raises:
            Disagreement: The products are not those of the flow.
        """
        _require(self._worst)
        if self._latest is not None:
            self._compare(*self._latest)

    def _compare(self, at: _Point, leaves: Sequence[Tensor]) -> None:
        """Compare the products at a point with those of autograd."""
        true = self._eager(at.flow, at.time, at.x, at.lam)
        found = torch.cat([at.found, *(part.reshape(-1) for part in leaves)])
        gaps, sizes = (torch.split(one, self.sizes) for one in (found - true, true))
        for gap, size in zip(gaps, sizes, strict=True):
            largest = size.abs().amax()
            _require(torch.where(largest > 0, gap.abs().amax() / largest, gap.abs().amax()))


def _require(relative: Tensor) -> None:
    """Raise where a difference is more than rounding, or no number."""
    if not bool(relative <= _ROUNDINGS * torch.finfo(relative.dtype).eps):
        raise Disagreement


def _tableau(method: RungeKutta, count: int, like: Tensor) -> tuple[list[float], Tensor, Tensor]:
    """Nodes and a_ij of some stages i, and their weights (b_i, a_0i, a_1i, ...) in a transpose."""
    rows = [[], *method.matrix][:count]
    matrix = like.new_tensor([[*row, *[0.0] * (count - len(row))] for row in rows])
    weights = like.new_tensor(method.weights[:count])
    return [0.0, *method.nodes][:count], matrix, torch.cat([weights[:, None], matrix.T], dim=1)


@dataclass(frozen=True)
class Staged(Method):
    """A Runge-Kutta method for (lam, int lam^T F_t, int F_theta^T lam) in backward time.

    Args:
        method: The method.
        products: The products.
        end: T, in flow time.
        state: t -> x(t).
        flow: The flow on a smooth piece.
    """

    method: RungeKutta
    products: Products
    end: float
    state: Callable[[float], Tensor]
    flow: FlowPiece

    @property
    def order(self) -> int:  # type: ignore[override]
        """See `Method`."""
        return self.method.order

    def trial(self, f: Function, t0: float, y0: Tensor, f0: Tensor, t1: float) -> Step:
        """See `Method.trial`; the data are those of (lam, int lam^T F_t) alone."""
        short = sum(self.products.sizes[:2])
        points: list[_Point] = []

        def derivative(s: float, y: Tensor) -> Tensor:
            t = self.end - s
            points.append(self.products.at(self.flow, t, self.state(t), y[: short - 1]))
            return points[-1].found

        step = self.method.trial(derivative, t0, y0[:short], f0[:short], t1)
        leaves = [part.reshape(len(points), -1) for part in self.products.rest(points)[1]]
        rows = torch.cat([f0[None, short:], torch.cat(leaves, dim=1)])
        unused = [0.0] * (len(rows) - len(self.method.weights))
        gained, error = (
            torch.mv(rows.t(), rows.new_tensor([*weights, *unused])).mul_(t1 - t0)
            for weights in (self.method.weights, self.method.error)
        )
        y1 = torch.cat([step.y1, y0[short:] + gained])
        f1 = torch.cat([step.f1, rows[-1]])
        return Step(t0, t1, y0, f0, y1, f1, torch.cat([step.error, error]), step.data)

    def replay(self, f: Function, step: Step, y0: Tensor, t0: Any, h: Any) -> Tensor:
        """Nobody differentiates the adjoint's steps."""
        raise NotImplementedError
