"""What "the stopping index" is, as a number with a derivative: the discrete quotient, written once.

Each definition is a scalar that is built, with a graph, from x_{N-1} and the last step alone: its
value is N (Definition 3) or the fractional N*, and one vector-Jacobian product of it starts the
adjoint at x_{N-1}.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import log, log1p
from typing import TypeVar, cast

import torch
from scipy.optimize import brentq
from torch import Tensor

from ode_stopping.core.consistency import check_same_value
from ode_stopping.core.status import GradientError

from .problem import IndexProblem

__all__ = ["INTERPOLATIONS", "IndexDefinition", "LastStep"]

_T = TypeVar("_T", float, Tensor)


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
        problem, criterion = self.problem, self.problem.criterion
        value = criterion.traced(criterion.time_tensor(self.time(k)), state).to(torch.float64)
        known = {problem.index: problem.loss, problem.index - 1: problem.previous_loss}
        if isinstance(k, int) and k in known:
            size = float(state.detach().abs().sum()) + abs(known[k])
            scale = torch.finfo(state.dtype).eps / torch.finfo(torch.float64).eps * size
            check_same_value(float(value.detach()), known[k], scale, name="criterion")
        return value


class IndexDefinition(ABC):
    """The index as a differentiable number."""

    needs_flow: bool = False
    whole: bool = False
    """Whether the value is N itself, whatever the last step looks like."""

    @abstractmethod
    def build(self, last: LastStep) -> Tensor:
        """The index with its graph, shape (), float64."""


class Definition3(IndexDefinition):
    """N, with dN = -(dJ(x_N) - d eps) / (J(x_N) - J(x_{N-1})).

    Definition 3, eq. 8 of arXiv 2505.22509.

    In low precision the difference of two nearly equal losses cancels; there the decrease is
    computed as (grad J_N + grad J_{N-1})^T (x_N - x_{N-1}) / 2, which does not.
    """

    whole = True

    def build(self, last: LastStep) -> Tensor:
        """N, carrying the derivative of Definition 3."""
        problem = last.problem
        excess = last.loss(problem.index, last.state) - last.target
        # Only the derivative of the excess counts: by definition the value is the whole number N.
        return _implicit(problem.index, excess, accurate_decrease(problem))


class LogLinear(IndexDefinition):
    """N* = N - 1 + s where log J, linear between the last two steps, meets log eps.

    s = (log J_{N-1} - log eps) / (log J_{N-1} - log J_N), in (0, 1]
    """

    def build(self, last: LastStep) -> Tensor:
        """N* with its graph; raises ValueError where J is not positive."""
        problem, n = last.problem, last.problem.index
        # Of the user's J: the logarithm does not turn with the sign, but quotients do not mind it.
        shown = problem.criterion.shown
        value, k = min((shown(problem.loss), n), (shown(problem.previous_loss), n - 1))
        if not value > 0:
            raise ValueError(
                'interpolation="log" needs a criterion that stays positive; got '
                f"J = {value:g} at step {k}"
            )
        before = shown(last.loss(n - 1, last.previous)).log()
        after = shown(last.loss(n, last.state)).log()
        s = log(problem.previous_loss / problem.target) / log(problem.previous_loss / problem.loss)
        excess = (1 - s) * before + s * after - shown(last.target).log()
        # log J_N - log J_{N-1}, from a change that has not cancelled
        return _implicit(
            n - 1 + s, excess, log1p(accurate_decrease(problem) / problem.previous_loss)
        )


class Hermite(IndexDefinition):
    """N* where the cubic Hermite interpolant of (J, J') over the last step meets eps.

    J' = grad J^T F + J_t comes from the flow. The value has order 4 in h, the gradient order 3.
    """

    needs_flow = True

    def build(self, last: LastStep) -> Tensor:
        """N* with its graph, by one implicit step at the root of the cubic."""
        problem, n = last.problem, last.problem.index
        h = problem.clock.step
        a, da = _loss_and_rate(last, n - 1, last.previous)
        b, db = _loss_and_rate(last, n, last.state)
        # The losses of the run: those bracket the target, whatever a second evaluation rounds to.
        p, q = problem.previous_loss, problem.loss
        dp, dq = float((h * da).detach()), float((h * db).detach())
        s = _root(lambda u: _cubic(u, (p, dp, q, dq)) - problem.target)
        excess = _cubic(s, (a, h * da, b, h * db)) - last.target
        return _implicit(n - 1 + s, excess, _cubic_slope(s, accurate_decrease(problem), dp, dq))


class PartialStep(IndexDefinition):
    """N* = N - 1 + s where a last step shortened to s h ends on the target.

    J(G^{s h}(x_{N-1})) = eps

    Keeps the order of the method for the value and for the gradient.
    """

    needs_flow = True

    def build(self, last: LastStep) -> Tensor:
        """N* with its graph, by one implicit step at the root in the step's length."""
        problem, n = last.problem, last.problem.index
        update, criterion, clock = problem.update, problem.criterion, problem.clock
        start = last.time(n - 1)

        def loss_after(s: float) -> float:
            # The losses of the run at the ends, which bracket the target.
            if s <= 0.0:
                return problem.previous_loss
            if s >= 1.0:
                return problem.loss
            moved = update.advance(problem.previous, start.detach(), s).detach()
            return criterion.value(clock.time(n - 1 + s), moved)

        def shortened(s: float | Tensor) -> Tensor:
            return last.loss(n - 1 + s, update.advance(last.previous, start, s))

        s = _root(lambda u: loss_after(u) - problem.target)
        fraction = torch.tensor(s, dtype=torch.float64, device=start.device, requires_grad=True)
        end, slope = shortened(fraction), None
        if end.requires_grad:
            (slope,) = torch.autograd.grad(end, fraction, retain_graph=True, allow_unused=True)
        rate = 0.0 if slope is None else float(slope)
        return _implicit(n - 1 + s, shortened(s) - last.target, rate)


INTERPOLATIONS: dict[str | None, IndexDefinition] = {
    None: Definition3(),
    "log": LogLinear(),
    "hermite": Hermite(),
    "partial_step": PartialStep(),
}


def accurate_decrease(problem: IndexProblem) -> float:
    """J(x_N) - J(x_{N-1}), where it cancels in low precision by the trapezoidal form.

    The trapezoidal form leaves out the third derivative of J along the step, the difference drowns
    in rounding: the form is taken where rounding can explain by how much they differ.
    """
    if problem.state.dtype == torch.float64:
        return problem.decrease
    clock, n = problem.clock, problem.index
    _, g_after, t_after = problem.criterion.gradient(clock.time(n), problem.state)
    _, g_before, t_before = problem.criterion.gradient(clock.time(n - 1), problem.previous)
    time = problem.update.time_tensor(clock.time(n - 1))
    increment = problem.update.increment(n - 1, problem.previous, time).detach().double()
    by_state = 0.5 * float((g_after.double() + g_before.double()) @ increment)
    trapezoidal = by_state + 0.5 * (t_after + t_before) * clock.step_value
    size = (
        abs(problem.previous_loss)
        + abs(problem.loss)
        + float((g_after * problem.state).abs().sum())
    )
    rounding = 4 * torch.finfo(problem.state.dtype).eps * size
    explained = trapezoidal < 0 and abs(trapezoidal - problem.decrease) <= rounding
    return trapezoidal if explained else problem.decrease


def _implicit(value: float, excess: Tensor, slope: float) -> Tensor:
    """A root of the excess with the value found, and d(root) = -d(excess) / slope.

    The implicit quotient; there is no epsilon in it. Where the slope is zero the value stands and
    the derivative raises.
    """
    if slope == 0.0:
        free = excess - excess.detach()
        if free.requires_grad:
            free.register_hook(_refuse_zero_slope)
        return value + free
    return value - (excess - excess.detach()) / slope


def _refuse_zero_slope(cotangent: Tensor) -> None:
    if bool(cotangent != 0):
        raise GradientError(
            "the criterion does not change along the last step where it meets the target (its "
            "slope is exactly zero), so the index has no derivative there: a criterion that is "
            "piecewise constant, or a flat piece of it. Use a smooth criterion, or another target"
        )


def _loss_and_rate(last: LastStep, k: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """J and J' = grad J^T F + J_t at step k, both with a graph."""
    problem = last.problem
    rule, layout = problem.update.rule, problem.update.layout
    assert rule is not None
    t = problem.criterion.time_tensor(last.time(k))
    value = problem.criterion.traced(t, state)
    if not value.requires_grad:
        return value.to(torch.float64), torch.zeros_like(value, dtype=torch.float64)
    g, explicit = torch.autograd.grad(value, [state, t], create_graph=True, allow_unused=True)
    velocity = layout.pack(rule.flow(t, layout.unpack(state)))
    rate = (g * velocity).sum() if g is not None else torch.zeros_like(value)
    if explicit is not None:
        rate = rate + explicit
    return value.to(torch.float64), rate.to(torch.float64)


def _cubic(s: float, data: tuple[_T, _T, _T, _T]) -> _T:
    """Cubic with values p, q and slopes dp, dq at the ends of [0, 1]."""
    p, dp, q, dq = data
    r = 1 - s
    return r * r * (1 + 2 * s) * p + r * r * s * dp + s * s * (3 - 2 * s) * q - s * s * r * dq


def _cubic_slope(s: float, rise: float, dp: float, dq: float) -> float:
    """Its derivative; `rise` is q - p."""
    r = 1 - s
    return 6 * s * r * rise + r * (1 - 3 * s) * dp + s * (3 * s - 2) * dq


def _root(function: Callable[[float], float]) -> float:
    """The crossing in (0, 1]; the ends bracket it by the definition of N."""
    if function(1.0) == 0.0:
        return 1.0
    # SciPy leaves a reference cycle around its argument; through the cell it holds nothing of size.
    cell = [function]
    try:
        return cast("float", brentq(lambda s: cell[0](s), 0.0, 1.0, xtol=1e-15, rtol=1e-15))
    finally:
        cell.clear()
