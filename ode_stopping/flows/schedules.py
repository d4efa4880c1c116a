"""Learning-rate schedules t -> alpha(t) for the rescaled gradient flow (eq. 3).

What is learnable. A positional argument given as a number becomes a parameter (0-d, float64);
given as a tensor it is kept as the object it is: learnable exactly if it requires grad, and then
the gradient arrives at the caller's own tensor. `start` and `scale` given as numbers are fixed.
`start` is the schedule's own: were it the t0 of the solve, a derivative to t0 would have a further
term.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..problems.tensors import Number, attach, scalar


class ConstantSchedule(nn.Module):
    """alpha(t) = value.

    Args:
        value: The rate; a number or a 0-d tensor.

    Raises:
        TypeError, ValueError: Not a finite real number.
    """

    value: Tensor

    def __init__(self, value: Tensor | Number) -> None:
        super().__init__()
        attach(self, "value", scalar(value, "value"), learnable=True)

    def forward(self, t: Tensor) -> Tensor:
        """alpha(t), 0-d."""
        return self.value

    def extra_repr(self) -> str:
        """The values, for printing."""
        return _values(self, "value")


class ExponentialSchedule(nn.Module):
    """alpha(t) = rate exp(-decay (t - start)).

    Its integral over [start, inf) is rate/decay: with decay > 0 a flow may come to rest before it
    reaches its target (theory, closed form 3).

    Args:
        rate: alpha(start); a number or a 0-d tensor.
        decay: Per unit of flow time; a number or a 0-d tensor.
        start: Flow time.

    Raises:
        TypeError, ValueError: Not finite real numbers.
    """

    rate: Tensor
    decay: Tensor
    start: Tensor

    def __init__(
        self, rate: Tensor | Number, decay: Tensor | Number, *, start: Tensor | Number = 0.0
    ) -> None:
        super().__init__()
        attach(self, "rate", scalar(rate, "rate"), learnable=True)
        attach(self, "decay", scalar(decay, "decay"), learnable=True)
        attach(self, "start", scalar(start, "start"))

    def forward(self, t: Tensor) -> Tensor:
        """alpha(t), 0-d."""
        return self.rate * torch.exp(-self.decay * (t - self.start))

    def extra_repr(self) -> str:
        """The values, for printing."""
        return _values(self, "rate", "decay", "start")


class PolynomialSchedule(nn.Module):
    """alpha(t) = rate (1 + (t - start)/scale)^(-power), valid for t > start - scale.

    Args:
        rate: alpha(start); a number or a 0-d tensor.
        power: Exponent of the decay; a number or a 0-d tensor.
        start: Flow time.
        scale: Flow time after which the base has doubled, > 0.

    Raises:
        TypeError, ValueError: Not finite real numbers; scale not positive.
    """

    rate: Tensor
    power: Tensor
    start: Tensor
    scale: Tensor

    def __init__(
        self,
        rate: Tensor | Number,
        power: Tensor | Number,
        *,
        start: Tensor | Number = 0.0,
        scale: Tensor | Number = 1.0,
    ) -> None:
        super().__init__()
        attach(self, "rate", scalar(rate, "rate"), learnable=True)
        attach(self, "power", scalar(power, "power"), learnable=True)
        attach(self, "start", scalar(start, "start"))
        attach(self, "scale", scalar(scale, "scale"))
        if float(self.scale.detach()) <= 0:
            raise ValueError(f"scale must be positive, got {float(self.scale.detach())}")

    def forward(self, t: Tensor) -> Tensor:
        """alpha(t), 0-d."""
        # exp(-p log1p(.)) rather than pow: accurate near the start, where 1 + s would round.
        return self.rate * torch.exp(-self.power * torch.log1p((t - self.start) / self.scale))

    def extra_repr(self) -> str:
        """The values, for printing."""
        return _values(self, "rate", "power", "start", "scale")


class NetworkSchedule(nn.Module):
    """value(t) = softplus(b + sum_j v_j tanh(w_j log(1 + t - start) + u_j)): learnable, positive.

    Smooth, so that its derivative in time is one by autograd. It starts as the constant `value` up
    to `spread`.

    Args:
        value: Where it starts, > 0.
        hidden: Number of units.
        start: Flow time from which it is used; valid for t > start - 1.
        seed: Of a generator of its own.
        spread: Standard deviation of the output weights, times sqrt(hidden).

    Raises:
        ValueError: `value` not positive, or `hidden` < 1.
    """

    start: Tensor

    def __init__(
        self,
        value: Number,
        *,
        hidden: int = 8,
        start: Tensor | Number = 0.0,
        seed: int = 0,
        spread: float = 0.1,
    ) -> None:
        super().__init__()
        if not 0 < value < math.inf:
            raise ValueError(f"value must be positive and finite, got {value}")
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        attach(self, "start", scalar(start, "start"))
        generator = torch.Generator().manual_seed(seed)

        def draw(scale: float) -> nn.Parameter:
            return nn.Parameter(
                scale * torch.randn(hidden, generator=generator, dtype=torch.float64)
            )

        self.weight, self.shift = draw(1.0), draw(1.0)
        self.output = draw(spread / math.sqrt(hidden))
        # softplus^{-1}(value) = value + log(1 - exp(-value))
        inverse = value + math.log(-math.expm1(-float(value)))
        self.bias = nn.Parameter(torch.tensor(inverse, dtype=torch.float64))

    def forward(self, t: Tensor) -> Tensor:
        """value(t), 0-d, float64."""
        age = torch.log1p(t.to(self.bias.dtype) - self.start)
        units = torch.tanh(self.weight * age + self.shift)
        return functional.softplus(self.bias + (self.output * units).sum(), threshold=40.0)


def _values(module: nn.Module, *names: str) -> str:
    return ", ".join(f"{name}={float(getattr(module, name).detach()):g}" for name in names)
