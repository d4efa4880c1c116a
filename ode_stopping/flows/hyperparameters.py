"""Hyperparameters of flows: numbers, tensors or functions of time, and learnable admissible ones.

Wherever a flow takes a hyperparameter (a damping, a time constant, ...), it takes

- a number, which is fixed;
- a 0-d tensor, kept as the object it is: learnable exactly if it requires grad;
- a callable t -> value: a schedule, or one of the modules below, which are learnable and stay
  admissible whatever a step of learning does to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, isfinite, log
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ode_stopping.problems.differentiation import value_and_gradient
from ode_stopping.problems.tensors import Number, attach, scalar

Hyperparameter: TypeAlias = Tensor | Number | Callable[[Tensor], Tensor | float]


@dataclass(frozen=True)
class Range:
    """An interval of admissible values, open at the ends unless `closed`."""

    low: float = -inf
    high: float = inf
    closed: bool = False

    def require(self, value: Tensor | Number, name: str) -> None:
        """Raise a ValueError that names the hyperparameter unless the value is in the interval."""
        number = float(value.detach() if isinstance(value, Tensor) else value)
        inside = self.low <= number if self.closed else self.low < number
        if not (inside and number < self.high and isfinite(number)):
            sign = ">=" if self.closed else ">"
            upper = "" if self.high == inf else f" and < {self.high:g}"
            raise ValueError(f"{name} must be {sign} {self.low:g}{upper}; got {number:g}")


POSITIVE = Range(0.0)
NONNEGATIVE = Range(0.0, closed=True)


class Positive(nn.Module):
    """A learnable positive constant: value = exp(raw).

    Args:
        value: the start, > 0.

    Raises:
        ValueError: not positive and finite.
    """

    def __init__(self, value: Number) -> None:
        super().__init__()
        POSITIVE.require(value, "value")
        self.raw = nn.Parameter(torch.tensor(log(value), dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        """The constant, 0-d."""
        return self.raw.exp()

    def forward(self, t: Tensor | None = None) -> Tensor:
        """The constant, whatever t is."""
        return self.value

    def extra_repr(self) -> str:
        """The value, for printing."""
        return f"value={float(self.value.detach()):g}"


class AtLeast(Positive):
    """A learnable constant above a bound: value = bound + exp(raw).

    Args:
        bound: the bound, never reached (a damping coefficient alpha > 3, say).
        value: the start, > bound.

    Raises:
        ValueError: not above the bound.
    """

    def __init__(self, bound: Number, *, value: Number) -> None:
        Range(float(bound)).require(value, "value")
        super().__init__(float(value) - float(bound))
        self.bound = float(bound)

    @property
    def value(self) -> Tensor:
        """The constant, 0-d."""
        return self.bound + self.raw.exp()


class Bounded(nn.Module):
    """A learnable constant between bounds: value = low + (high - low) / (1 + exp(-raw)).

    The default bounds are those of the betas of Adam.

    Args:
        value: the start, in (low, high).
        low: lower bound, never reached.
        high: upper bound, never reached.

    Raises:
        ValueError: not between the bounds.
    """

    def __init__(self, value: Number, *, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        Range(low, high).require(value, "value")
        self.low, self.high = float(low), float(high)
        odds = (value - low) / (high - value)
        self.raw = nn.Parameter(torch.tensor(log(odds), dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        """The constant, 0-d."""
        return self.low + (self.high - self.low) * torch.sigmoid(self.raw)

    def forward(self, t: Tensor | None = None) -> Tensor:
        """The constant, whatever t is."""
        return self.value

    def extra_repr(self) -> str:
        """The value, for printing."""
        return f"value={float(self.value.detach()):g}"


class VanishingDamping(nn.Module):
    """alpha / t, the damping of Nesterov's flow; singular at t = 0.

    Args:
        alpha: > 0; see `Hyperparameter` for what it may be.

    Raises:
        ValueError: alpha is not positive; at a call, t <= 0 (choose t0 > 0).
    """

    alpha: Any

    def __init__(self, alpha: Hyperparameter) -> None:
        super().__init__()
        hold(self, "alpha", alpha, POSITIVE)

    def forward(self, t: Tensor) -> Tensor:
        """alpha / t, 0-d."""
        if not bool(t > 0):
            raise ValueError(
                "the damping alpha/t is singular at t = 0: t0 must be positive; got t = "
                f"{float(t):g}"
            )
        return at_time(self.alpha, t, t) / t


def hold(module: nn.Module, name: str, value: Hyperparameter, admitted: Range) -> None:
    """Store a hyperparameter on a module, after a look at its range where it has a value.

    Raises:
        TypeError: neither a number, a floating-point tensor nor a callable.
        ValueError: outside of its range, not finite, or not one number.
    """
    if callable(value) and not isinstance(value, Tensor):
        setattr(module, name, value)
        return
    if isinstance(value, bool) or not isinstance(value, Tensor | int | float):
        raise TypeError(
            f"{name} must be a number, a 0-d tensor or a callable of t; got {type(value).__name__}"
        )
    attach(module, name, scalar(value, name))
    admitted.require(value, name)


def at_time(value: Hyperparameter, t: Tensor, like: Tensor) -> Tensor:
    """The hyperparameter at time t, a tensor in the dtype and on the device of `like`."""
    given = value(t) if callable(value) and not isinstance(value, Tensor) else value
    if not isinstance(given, Tensor):
        return torch.tensor(float(given), dtype=like.dtype, device=like.device)
    return given.to(like)


def rate_at_time(value: Hyperparameter, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The hyperparameter and its derivative to t, both in the dtype of `like`."""
    if isinstance(value, Tensor) or not callable(value):
        now = at_time(value, t, like)
        return now, torch.zeros_like(now)
    now, rate = value_and_gradient(lambda s: at_time(value, s, like), t)
    return now, torch.zeros_like(now) if rate is None else rate.to(like)


def number(value: Hyperparameter) -> Tensor | float:
    """A hyperparameter that has to be a constant: a learnable module gives its present value.

    Raises:
        TypeError: a schedule, which has no one value.
    """
    if isinstance(value, Positive | Bounded):
        return value.value
    if callable(value) and not isinstance(value, Tensor):
        raise TypeError(f"a constant is needed here; got the schedule {type(value).__name__}")
    return value
