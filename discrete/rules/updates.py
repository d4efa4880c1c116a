"""Update rules: a flow and a step size make an iteration x_{k+1} = G_k(x_k, theta) (eq. 2).

A rule is a one-step method with its step as an argument, so that a shortened last step is the same
code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from ode_stopping.core.states import State
from ode_stopping.core.validation import ordinary

__all__ = ["Euler", "Heun", "RungeKutta4", "SemiImplicitEuler", "UpdateRule", "combine"]

Terms: TypeAlias = Sequence[tuple[float, State]]


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
        if isinstance(flow, type | UpdateRule) or not callable(flow):
            what = f"the class {flow.__name__}" if isinstance(flow, type) else type(flow).__name__
            raise TypeError(f"flow must be callable (t, x) -> dx/dt; got {what}")
        if isinstance(step, bool) or not isinstance(step, int | float | Tensor):
            raise TypeError(f"step must be a float or a 0-d tensor; got {type(step).__name__}")
        if isinstance(step, Tensor) and not step.is_floating_point():
            raise TypeError(f"step must be floating-point; got dtype {step.dtype}")
        if isinstance(step, Tensor) and step.shape != ():
            raise ValueError(f"step must be a 0-d tensor; got shape {tuple(step.shape)}")
        size = float(step.detach()) if isinstance(step, Tensor) else float(step)
        if not (isfinite(size) and size > 0):
            raise ValueError(f"step must be positive and finite; got {size:g}")
        self.flow = flow
        self.step = step if isinstance(step, Tensor) else float(step)

    def forward(self, k: int, x: State, t: Tensor) -> State:
        """x_{k+1} from x_k at t = t0 + k h."""
        return self.advance(t, x, self.sized(1.0, t))

    @abstractmethod
    def advance(self, t: Tensor, x: State, step: float | Tensor) -> State:
        """The state after a step of this size from (t, x); differentiable to the size."""

    def increment(self, t: Tensor, x: State, step: float | Tensor) -> State:
        """What a step of this size adds to x.

        The difference of two states, here; a rule that computes what it adds overrides this, since
        in low precision a small increment does not survive the sum.
        """
        after = self.advance(t, x, step)
        if isinstance(x, tuple):
            return tuple(new - old for new, old in zip(after, x, strict=True))
        return cast("Tensor", after) - x

    def sized(self, fraction: float | Tensor, t: Tensor) -> float | Tensor:
        """A fraction of h; a tensor comes in the dtype of t, so that t + h keeps it."""
        # Autograd saves it, and cannot save tensors of inference mode.
        step = fraction * ordinary(self.step)
        return step.to(dtype=t.dtype, device=t.device) if isinstance(step, Tensor) else step


class _SlopeRule(UpdateRule):
    """A rule that adds h times a weighted sum of slopes."""

    @abstractmethod
    def slopes(self, t: Tensor, x: State, step: float | Tensor) -> Terms:
        """The weights and slopes."""

    def advance(self, t: Tensor, x: State, step: float | Tensor) -> State:
        """The state after a step of this size."""
        return combine(x, step, self.slopes(t, x, step))

    def increment(self, t: Tensor, x: State, step: float | Tensor) -> State:
        """What a step of this size adds to x, free of the rounding of a sum."""
        return _weighted(x, step, self.slopes(t, x, step))


class Euler(_SlopeRule):
    """x_{k+1} = x_k + h F(t_k, x_k): the algorithm that the flow is the limit of (order 1)."""

    order = 1

    def slopes(self, t: Tensor, x: State, step: float | Tensor) -> Terms:
        """The weights and slopes."""
        return [(1.0, self.flow(t, x))]


class Heun(_SlopeRule):
    """The explicit trapezoidal rule: the mean slope of the ends of an Euler step (order 2)."""

    order = 2

    def slopes(self, t: Tensor, x: State, step: float | Tensor) -> Terms:
        """The weights and slopes."""
        first = self.flow(t, x)
        second = self.flow(t + step, combine(x, step, [(1.0, first)]))
        return [(0.5, first), (0.5, second)]


class RungeKutta4(_SlopeRule):
    """The classical method with four stages (order 4)."""

    order = 4

    def slopes(self, t: Tensor, x: State, step: float | Tensor) -> Terms:
        """The weights and slopes."""
        half = t + 0.5 * step
        a = self.flow(t, x)
        b = self.flow(half, combine(x, step, [(0.5, a)]))
        c = self.flow(half, combine(x, step, [(0.5, b)]))
        d = self.flow(t + step, combine(x, step, [(1.0, c)]))
        return [(1 / 6, a), (1 / 3, b), (1 / 3, c), (1 / 6, d)]


class SemiImplicitEuler(UpdateRule):
    """Symplectic Euler: all other states first, the position last (order 1).

        z_{k+1} = z_k + h F_z(t_k, x_k, z_k),   x_{k+1} = x_k + h F_x(t_k, x_k, z_{k+1})

    for a state (x, *z) with the position first. The other states move explicitly, and the position
    with their new values: this order makes the momentum methods of the flows of second order. A
    state that is one tensor moves as with `Euler`. Costs a second look at x' a step, which flows
    with a `position_velocity` have without an evaluation of the gradient where it needs none.
    """

    order = 1

    def advance(self, t: Tensor, x: State, step: float | Tensor) -> State:
        """The state after a step of this size."""
        return _added(x, self.increment(t, x, step))

    def increment(self, t: Tensor, x: State, step: float | Tensor) -> State:
        """What a step of this size adds to x, free of the rounding of a sum."""
        if not (isinstance(x, tuple) and len(x) > 1):
            return _weighted(x, step, [(1.0, self.flow(t, x))])
        position, *others = x
        changes = [
            _scaled_sum(piece, step, [(1.0, slope)])
            for piece, slope in zip(others, self.flow(t, x)[1:], strict=True)
        ]
        moved = (position, *(piece + change for piece, change in zip(others, changes, strict=True)))
        own = getattr(self.flow, "position_velocity", None)
        velocity = self.flow(t, moved)[0] if own is None else own(t, moved)
        return (_scaled_sum(position, step, [(1.0, velocity)]), *changes)


def combine(x: State, step: float | Tensor, terms: Terms) -> State:
    """x + step * sum_i weight_i slope_i, for a tensor or a tuple of tensors."""
    if isinstance(x, Tensor):
        return x + _scaled_sum(x, step, cast("Sequence[tuple[float, Tensor]]", terms))
    return _added(x, _weighted(x, step, terms))


def _added(x: State, change: State) -> State:
    """The sum, for a tensor or a tuple of tensors."""
    if isinstance(x, tuple):
        return tuple(piece + part for piece, part in zip(x, change, strict=True))
    return x + cast("Tensor", change)


def _weighted(x: State, step: float | Tensor, terms: Terms) -> State:
    """step * sum_i weight_i slope_i, with the structure and dtype of x."""
    if isinstance(x, tuple):
        columns = [[(weight, slope[i]) for weight, slope in terms] for i in range(len(x))]
        return tuple(
            _scaled_sum(piece, step, column) for piece, column in zip(x, columns, strict=True)
        )
    return _scaled_sum(x, step, cast("Sequence[tuple[float, Tensor]]", terms))


def _scaled_sum(x: Tensor, step: float | Tensor, terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    # A float64 step must not turn a 0-d float32 state into float64.
    size = step.to(dtype=x.dtype, device=x.device) if isinstance(step, Tensor) else step
    weight, slope = terms[0]
    total = slope if weight == 1.0 else weight * slope
    for weight, slope in terms[1:]:
        total = total + weight * slope
    return size * total
