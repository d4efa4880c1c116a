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
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..problems.differentiation import value_and_gradient
from ..problems.tensors import Number, attach, scalar

Hyperparameter: TypeAlias = Tensor | Number | Callable[[Tensor], Tensor | float]


@dataclass(frozen=True)
class Range:
    """An interval of admissible values, open at the ends unless `closed`."""

    low: float = -inf
    high: float = inf
    closed: bool = False

    def require(self, value: Tensor | Number, name: str) -> None:
        """Raise an error that names the hyperparameter unless the value is in the interval."""
        if isinstance(value, bool) or not isinstance(value, Tensor | int | float):
            raise TypeError(f"{name} must be a number; got {type(value).__name__}")
        scalar(value, name)
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

    Where that leaves the range of the dtype, value stays at its end, with the derivative 0.

    Args:
        value: The start, > 0.

    Raises:
        TypeError: Not a number.
        ValueError: Not positive and finite.
    """

    def __init__(self, value: Number) -> None:
        super().__init__()
        POSITIVE.require(value, "value")
        self.raw = nn.Parameter(torch.tensor(log(value), dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        """The constant, 0-d."""
        # Clamped before and not after: the derivative of an exponential that is inf would be NaN.
        range_of = torch.finfo(self.raw.dtype)
        return self.raw.clamp(log(range_of.tiny) + 1, log(range_of.max) - 1).exp()

    def forward(self, t: Tensor | None = None) -> Tensor:
        """The constant, whatever t is."""
        return self.value

    def extra_repr(self) -> str:
        """The value, for printing."""
        return f"value={float(self.value.detach()):g}"


class AtLeast(Positive):
    """A learnable constant above a bound: value = bound + exp(raw).

    Args:
        bound: The bound, never reached, not even by rounding (a damping coefficient alpha > 3,
            say).
        value: The start, > bound.

    Raises:
        TypeError: Not a number.
        ValueError: Not above the bound.
    """

    def __init__(self, bound: Number, *, value: Number) -> None:
        Range(float(bound)).require(value, "value")
        super().__init__(float(value) - float(bound))
        self.bound = float(bound)

    @property
    def value(self) -> Tensor:
        """The constant, 0-d."""
        return _inside(self.bound + super().value, self.bound, inf)


class Bounded(nn.Module):
    """A learnable constant between bounds: value = low + (high - low) / (1 + exp(-raw)).

    The default bounds are those of the betas of Adam.

    Args:
        value: The start, in (low, high).
        low: Lower bound, never reached, not even by rounding.
        high: Upper bound, never reached.

    Raises:
        TypeError: Not a number.
        ValueError: Not between the bounds; bounds infinite or in the wrong order.
    """

    def __init__(self, value: Number, *, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        if not (isfinite(low) and isfinite(high) and low < high):
            raise ValueError(f"low and high must be finite and low < high; got {low}, {high}")
        Range(low, high).require(value, "value")
        self.low, self.high = float(low), float(high)
        odds = (value - low) / (high - value)
        self.raw = nn.Parameter(torch.tensor(log(odds), dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        """The constant, 0-d."""
        value = self.low + (self.high - self.low) * torch.sigmoid(self.raw)
        return _inside(value, self.low, self.high)

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
        ValueError: `alpha` is not positive; at a call, t <= 0 (choose t0 > 0).
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
                f"{float(t.detach()):g}"
            )
        return at_time(self.alpha, t, t) / t


def hold(module: nn.Module, name: str, value: Hyperparameter, admitted: Range) -> None:
    """Store a hyperparameter on a module, after a look at its range where it has a value.

    Raises:
        TypeError: Neither a number, a floating-point tensor nor a callable; a class.
        ValueError: Outside of its range, not finite, or not one number.
    """
    if isinstance(value, type):
        raise TypeError(f"{name} must be an object; got the class {value.__name__}: make one first")
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
    """The hyperparameter at time t, 0-d, in the dtype and on the device of `like`.

    Raises:
        TypeError: A schedule gives neither a number nor a tensor.
        ValueError: It gives more than one number.
    """
    given = value(t) if callable(value) and not isinstance(value, Tensor) else value
    if isinstance(given, Tensor):
        if given.numel() != 1:
            raise ValueError(
                f"a hyperparameter is one number; {_named(value)} gave shape {tuple(given.shape)}"
            )
        return given.reshape(()).to(like)
    if not isinstance(given, Real):
        raise TypeError(
            f"a hyperparameter is a number or a 0-d tensor; {_named(value)} gave "
            f"{type(given).__name__}"
        )
    return torch.tensor(float(given), dtype=like.dtype, device=like.device)


def rate_at_time(value: Hyperparameter, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """The hyperparameter and its derivative to t, both in the dtype of `like`.

    Raises:
        TypeError, ValueError: What `at_time` raises.
        ValueError: The schedule changes with t, but autograd does not see it.
    """
    if is_constant(value):
        now = at_time(value, t, like)
        return now, torch.zeros_like(now)
    now, rate = value_and_gradient(lambda s: at_time(value, s, like), t)
    if rate is None:
        _refuse_blind(value, t, now)
        return now, torch.zeros_like(now)
    return now, rate.to(like)


def is_constant(value: Hyperparameter) -> bool:
    """Whether it is known not to depend on time: no callable, or a learnable constant."""
    return isinstance(value, Tensor | Positive | Bounded) or not callable(value)


def number(value: Hyperparameter, name: str) -> Tensor | float:
    """A hyperparameter that has to be a constant: a learnable module gives its present value.

    Raises:
        TypeError: A schedule, which has no one value.
    """
    if isinstance(value, Positive | Bounded):
        return value.value
    if callable(value) and not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a constant here; got the schedule {_named(value)}")
    return value


def _inside(value: Tensor, low: float, high: float) -> Tensor:
    """The value, off the ends of an open interval where rounding has put it on one."""
    ends = torch.tensor([low, high], dtype=value.dtype)
    first, last = torch.nextafter(ends, ends.flip(0)).tolist()
    return value.clamp(first, last)


def _refuse_blind(value: Hyperparameter, t: Tensor, now: Tensor) -> None:
    """Raise where a schedule changes around t though its graph does not lead to t.

    On both sides of t: next to a jump of a piecewise constant schedule one of them is like t.
    """
    with torch.no_grad():
        shift = torch.finfo(t.dtype).eps ** 0.5 * t.abs().clamp_min(1.0)
        sides = [(at_time(value, t + sign * shift, now) - now).abs() for sign in (-1, 1)]
        if all(bool(change > 0) for change in sides):
            raise ValueError(
                f"{_named(value)} changes with t, but not as far as autograd can see: compute it "
                "from t by torch operations (no float(t), .item(), .detach() or no_grad)"
            )


def _named(value: object) -> str:
    return str(getattr(value, "__name__", type(value).__name__))
