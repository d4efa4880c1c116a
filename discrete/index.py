"""What "the stopping index" is, as a number with a derivative: the discrete quotient, written once.

Each definition is a scalar that is built, with a graph, from x_{N-1} and the last step alone: its value is N
(Definition 3) or the fractional N*, and one vector-Jacobian product of it starts the adjoint at x_{N-1}.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from scipy.optimize import brentq
from torch import Tensor

from .problem import IndexProblem

__all__ = ["INTERPOLATIONS", "IndexDefinition", "LastStep"]


@dataclass(frozen=True)
class LastStep:
    """The step from x_{N-1} to x_N, with a graph.

    Attributes:
        problem: The solved problem.
        time: j -> t_j, differentiable to t0, h and j.
        previous: x_{N-1}, shape (n,).
        state: x_N, shape (n,).
        target: eps, shape ().
    """

    problem: IndexProblem
    time: Callable[[float | Tensor], Tensor]
    previous: Tensor
    state: Tensor
    target: Tensor

    def loss(self, k: float | Tensor, state: Tensor) -> Tensor:
        """J at step k, in float64 from here on."""
        criterion = self.problem.criterion
        return criterion.traced(criterion.time_tensor(self.time(k)), state).to(torch.float64)


class IndexDefinition(ABC):
    """The index as a differentiable number."""

    needs_flow: bool = False

    @abstractmethod
    def build(self, last: LastStep) -> Tensor:
        """The index with its graph, shape (), float64."""


class Definition3(IndexDefinition):
    """N, with dN = -(dJ(x_N) - d eps) / (J(x_N) - J(x_{N-1})) (Definition 3, eq. 8 of arXiv 2505.22509).

    In low precision the difference of two nearly equal losses cancels; there the decrease is computed as
    (grad J_N + grad J_{N-1})^T (x_N - x_{N-1}) / 2, which does not.
    """

    def build(self, last: LastStep) -> Tensor:
        problem = last.problem
        excess = last.loss(problem.index, last.state) - last.target
        # Only the derivative of the excess counts: by definition the value is the whole number N.
        return problem.index - (excess - excess.detach()) / accurate_decrease(problem)


class LogLinear(IndexDefinition):
    """N* = N - 1 + s where log J, linear between the last two steps, meets log eps.

    s = (log J_{N-1} - log eps) / (log J_{N-1} - log J_N), in (0, 1]
    """

    def build(self, last: LastStep) -> Tensor:
        n = last.problem.index
        if not last.problem.loss > 0:
            raise ValueError(
                f'interpolation="log" needs a criterion that stays positive; got J = {last.problem.loss:g} '
                f"at step {n}"
            )
        before, after = last.loss(n - 1, last.previous).log(), last.loss(n, last.state).log()
        return n - 1 + (before - last.target.log()) / (before - after)


class Hermite(IndexDefinition):
    """N* where the cubic Hermite interpolant of (J, J') over the last step meets eps.

    J' = grad J^T F + J_t comes from the flow. The value has order 4 in h, the gradient order 3.
    """

    needs_flow = True

    def build(self, last: LastStep) -> Tensor:
        n, h = last.problem.index, last.problem.clock.step
        rows = []
        for k, state in ((n - 1, last.previous), (n, last.state)):
            value, rate = _loss_and_rate(last, k, state)
            rows.append((value, h * rate))
        (a, da), (b, db) = rows

        def polynomial(s: float, v: tuple[Tensor, Tensor, Tensor, Tensor] | list[float]) -> Tensor:
            p, dp, q, dq = v
            r = 1 - s
            return (  # type: ignore[return-value]
                r * r * (1 + 2 * s) * p + r * r * s * dp + s * s * (3 - 2 * s) * q - s * s * r * dq
            )

        numbers = [float(v.detach()) for v in (a, da, b, db)]
        target = float(last.target.detach())
        s = _root(lambda u: float(polynomial(u, numbers)) - target)
        residual = polynomial(s, (a, da, b, db)) - last.target
        return n - 1 + s - (residual - residual.detach()) / _slope(numbers, s)


class PartialStep(IndexDefinition):
    """N* = N - 1 + s where a last step shortened to s h ends on the target: J(G^{s h}(x_{N-1})) = eps.

    Keeps the order of the method for the value and for the gradient.
    """

    needs_flow = True

    def build(self, last: LastStep) -> Tensor:
        problem = last.problem
        rule = problem.update.rule
        assert rule is not None
        n, clock, layout = problem.index, problem.clock, problem.update.layout
        target = float(last.target.detach())
        frozen = problem.previous

        def loss_after(s: float) -> float:
            if s <= 0.0:
                return problem.previous_loss
            if s >= 1.0:
                return problem.loss
            moved = _advance_plain(problem, frozen, s)
            return problem.criterion.value(clock.time(n - 1 + s), moved)

        root = _root(lambda s: loss_after(s) - target)
        start = problem.update.time_tensor(last.time(n - 1))

        def shortened(s: float | Tensor) -> Tensor:
            moved = rule.advance(start, layout.unpack(last.previous), s * clock.step)
            return last.loss(n - 1 + s, layout.pack(moved))

        fraction = torch.tensor(root, dtype=torch.float64, device=frozen.device, requires_grad=True)
        (slope,) = torch.autograd.grad(shortened(fraction), fraction)
        residual = shortened(root) - last.target
        return n - 1 + root - (residual - residual.detach()) / slope


INTERPOLATIONS: dict[str | None, IndexDefinition] = {
    None: Definition3(),
    "log": LogLinear(),
    "hermite": Hermite(),
    "partial_step": PartialStep(),
}


def accurate_decrease(problem: IndexProblem) -> float:
    """J(x_N) - J(x_{N-1}), by the trapezoidal form in dtypes in which the difference cancels."""
    if problem.state.dtype == torch.float64:
        return problem.decrease
    clock, n = problem.clock, problem.index
    _, g_after, t_after = problem.criterion.gradient(clock.time(n), problem.state)
    _, g_before, t_before = problem.criterion.gradient(clock.time(n - 1), problem.previous)
    increment = problem.state.double() - problem.previous.double()
    by_state = 0.5 * float((g_after.double() + g_before.double()) @ increment)
    decrease = by_state + 0.5 * (t_after + t_before) * clock.step_value
    return decrease if decrease < 0 else problem.decrease


def _loss_and_rate(last: LastStep, k: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """J and J' = grad J^T F + J_t at step k, both with a graph."""
    problem = last.problem
    rule, layout = problem.update.rule, problem.update.layout
    assert rule is not None
    x = state if state.requires_grad else state.detach().requires_grad_(True)
    t = problem.criterion.time_tensor(last.time(k))
    t = t if t.requires_grad else t.detach().requires_grad_(True)
    value = problem.criterion.traced(t, x)
    g, explicit = torch.autograd.grad(value, [x, t], create_graph=True, allow_unused=True)
    velocity = layout.pack(rule.flow(t, layout.unpack(x)))
    rate = (g * velocity).sum() if g is not None else torch.zeros_like(value)
    if explicit is not None:
        rate = rate + explicit
    return value.to(torch.float64), rate.to(torch.float64)


def _advance_plain(problem: IndexProblem, x: Tensor, s: float) -> Tensor:
    rule, layout, clock = problem.update.rule, problem.update.layout, problem.clock
    assert rule is not None
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        t = problem.update.time_tensor(clock.time(problem.index - 1))
        moved = rule.advance(t, layout.unpack(leaf), s * clock.step_value)
        return layout.pack(moved).detach()


def _slope(numbers: list[float], s: float) -> float:
    """Derivative of the Hermite cubic."""
    p, dp, q, dq = numbers
    r = 1 - s
    return 6 * s * r * (q - p) + r * (1 - 3 * s) * dp + s * (3 * s - 2) * dq


def _root(function: Callable[[float], float]) -> float:
    """The crossing in (0, 1]; the ends bracket it by the definition of N."""
    if function(1.0) == 0.0:
        return 1.0
    return cast("float", brentq(function, 0.0, 1.0, xtol=1e-15, rtol=1e-14))
