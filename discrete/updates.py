"""Update rules: a flow and a step size make an iteration x_{k+1} = G_k(x_k, theta) (eq. 2).

A rule is a one-step method with its step as an argument, so that a shortened last step is the same code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

from torch import Tensor, nn

from ode_stopping.states import State

__all__ = ["Euler", "Heun", "RungeKutta4", "UpdateRule"]


class UpdateRule(nn.Module, ABC):
    """One step of a method for x' = F(t, x), called as (k, x, t) -> x_next.

    Args:
        flow: (t, x) -> dx/dt; a module is registered, so that its parameters are the rule's.
        step: h, in flow time: a positive float or 0-d tensor, which may require grad.

    Attributes:
        flow: The flow.
        step: The step.
        order: Order of the method.

    Raises:
        TypeError: `flow` is not callable, or `step` is not a number.
        ValueError: `step` is not positive and finite.
    """

    order: int

    def __init__(self, flow: Callable[..., Any], *, step: float | Tensor) -> None:
        super().__init__()
        if not callable(flow):
            raise TypeError(f"flow must be callable (t, x) -> dx/dt; got {type(flow).__name__}")
        if isinstance(step, bool) or not isinstance(step, int | float | Tensor):
            raise TypeError(f"step must be a float or a 0-d tensor; got {type(step).__name__}")
        if isinstance(step, Tensor) and step.shape != ():
            raise ValueError(f"step must be a 0-d tensor; got shape {tuple(step.shape)}")
        size = float(step.detach()) if isinstance(step, Tensor) else float(step)
        if not (isfinite(size) and size > 0):
            raise ValueError(f"step must be positive and finite; got {size:g}")
        self.flow = flow
        self.step = step if isinstance(step, Tensor) else float(step)

    def forward(self, k: int, x: State, t: Tensor) -> State:
        """x_{k+1} from x_k at t = t0 + k h."""
        return self.advance(t, x, self.step)

    @abstractmethod
    def advance(self, t: Tensor, x: State, step: float | Tensor) -> State:
        """The state after a step of this size from (t, x); differentiable to the size."""


class Euler(UpdateRule):
    """x_{k+1} = x_k + h F(t_k, x_k): the algorithm that the flow is the limit of (order 1)."""

    order = 1

    def advance(self, t: Tensor, x: State, step: float | Tensor) -> State:
        return combine(x, step, [(1.0, self.flow(t, x))])


class Heun(UpdateRule):
    """The explicit trapezoidal rule: the mean of the slopes at both ends of an Euler step (order 2)."""

    order = 2

    def advance(self, t: Tensor, x: State, step: float | Tensor) -> State:
        first = self.flow(t, x)
        second = self.flow(t + step, combine(x, step, [(1.0, first)]))
        return combine(x, step, [(0.5, first), (0.5, second)])


class RungeKutta4(UpdateRule):
    """The classical method with four stages (order 4)."""

    order = 4

    def advance(self, t: Tensor, x: State, step: float | Tensor) -> State:
        half = t + 0.5 * step
        a = self.flow(t, x)
        b = self.flow(half, combine(x, step, [(0.5, a)]))
        c = self.flow(half, combine(x, step, [(0.5, b)]))
        d = self.flow(t + step, combine(x, step, [(1.0, c)]))
        return combine(x, step, [(1 / 6, a), (1 / 3, b), (1 / 3, c), (1 / 6, d)])


def combine(x: State, step: float | Tensor, terms: Sequence[tuple[float, State]]) -> State:
    """x + step * sum_i weight_i slope_i, for a tensor or a tuple of tensors."""
    if isinstance(x, tuple):
        return tuple(
            combine(piece, step, [(weight, slope[i]) for weight, slope in terms])  # type: ignore[misc]
            for i, piece in enumerate(x)
        )
    # A float64 step must not turn a 0-d float32 state into float64.
    size = step.to(x.dtype) if isinstance(step, Tensor) else step
    weight, slope = terms[0]
    total = slope if weight == 1.0 else weight * slope  # type: ignore[operator]
    for weight, slope in terms[1:]:
        total = total + weight * slope  # type: ignore[operator]
    return x + size * total  # type: ignore[return-value]
