"""Diagonal preconditioners p(x, grad f(x), t; theta) for eq. 4.

Every one is a module (x, grad, t) -> p, x and grad of shape (..., d), t 0-d, p broadcasting to
(..., d). The dtype is that of x: parameters of another floating type are converted on the way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..problems.tensors import ArrayLike, as_floating, attach

# softplus(_UNIT) = log(1 + (e - 1)) = 1.
_UNIT = math.log(math.e - 1.0)
# Beyond it softplus is the identity to rounding in float64; torch's 20 makes a jump of 2e-9.
_SOFTPLUS_THRESHOLD = 40.0


class DiagonalPreconditioner(nn.Module):
    """p = values, or p = exp(values) with `log`, whatever x, grad and t are.

    Args:
        values: Shape (d,). Numbers (a list, an array) become a learnable parameter; a tensor is
            kept as the object it is, learnable exactly if it requires grad.
        log: The values are logarithms, so that p stays positive whatever a step of learning does.

    Raises:
        TypeError: Not real numbers.
        ValueError: Not of shape (d,), or not finite.
    """

    values: Tensor

    def __init__(self, values: ArrayLike, *, log: bool = False) -> None:
        super().__init__()
        tensor = as_floating(values, "values")
        if tensor.ndim != 1 or tensor.shape[0] == 0:
            raise ValueError(f"values must have shape (d,), got {tuple(tensor.shape)}")
        attach(self, "values", tensor if isinstance(values, Tensor) else nn.Parameter(tensor))
        self.log = bool(log)

    def forward(self, x: Tensor, grad: Tensor, t: Tensor) -> Tensor:
        """p, shape (d,)."""
        values = self.values.to(x.dtype)
        return torch.exp(values) if self.log else values


class NetworkPreconditioner(nn.Module):
    """p_i = softplus(net(x_i, g_i, t)): one small tanh network shared by all coordinates.

    It has no dimension of its own, so what is learned on one problem runs on another. The last
    layer starts small, so that p is close to 1 everywhere.

    Args:
        hidden: Widths of the hidden layers, at least one.
        seed: Of a generator of its own.
        spread: Standard deviation of the last layer's weights, times sqrt(fan-in).
        dtype: Of the parameters.
        device: Of the parameters.

    Raises:
        ValueError: No hidden layer, or a width below 1.
    """

    def __init__(
        self,
        hidden: int | Sequence[int] = (16,),
        *,
        seed: int = 0,
        spread: float = 0.1,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        hidden = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden must name at least one width, each >= 1, got {hidden}")
        generator = torch.Generator().manual_seed(seed)
        weights: list[nn.Parameter] = []
        biases: list[nn.Parameter] = []
        widths = (3, *hidden, 1)
        for fan_in, fan_out in pairwise(widths):
            last = len(weights) == len(hidden)
            size = (spread if last else 1.0) / math.sqrt(fan_in)
            weight = size * torch.randn(fan_out, fan_in, generator=generator, dtype=torch.float64)
            bias = torch.full((fan_out,), _UNIT if last else 0.0, dtype=torch.float64)
            weights.append(nn.Parameter(weight.to(dtype=dtype, device=device)))
            biases.append(nn.Parameter(bias.to(dtype=dtype, device=device)))
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(biases)

    def forward(self, x: Tensor, grad: Tensor, t: Tensor) -> Tensor:
        """p, shape (..., d)."""
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(x.shape)
        value = torch.stack((x, grad, time), dim=-1)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            value = functional.linear(value, weight.to(x.dtype), bias.to(x.dtype))
            if layer < last:
                value = torch.tanh(value)
        return functional.softplus(value.squeeze(-1), threshold=_SOFTPLUS_THRESHOLD)


class CoordinatewisePreconditioner(nn.Module):
    """A network of ten parameters for every coordinate (our reading of Figure 2's "10 d").

    p_i = softplus(b_i + sum_{j=1..3} v_ij tanh(w_ij1 x_i + w_ij2 g_i)): two inputs, three hidden
    units without bias, three output weights and a bias. All ten start as `spread` times standard
    normal numbers, the bias around softplus^{-1}(1), so that p is near 1 for any x.

    Args:
        dim: Number of coordinates d.
        seed: Of a generator of its own, drawing in float64 on the CPU: a seed means the same
            network in every dtype and on every device.
        spread: Standard deviation of the start; 0 gives p = 1.
        dtype: Of the parameters.
        device: Of the parameters.

    Raises:
        ValueError: dim < 1 or spread negative.
    """

    def __init__(
        self,
        dim: int,
        *,
        seed: int,
        spread: float = 0.1,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if not 0 <= spread < math.inf:
            raise ValueError(f"spread must be finite and not negative, got {spread}")
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, centre: float = 0.0) -> nn.Parameter:
            normal = torch.randn(*shape, dim, generator=generator, dtype=torch.float64)
            return nn.Parameter((centre + spread * normal).to(dtype=dtype, device=device))

        # Coordinates are the last, contiguous axis: (input, hidden unit, coordinate).
        self.input_weights = draw(2, 3)
        self.output_weights = draw(3)
        self.bias = draw(centre=_UNIT)

    def forward(self, x: Tensor, grad: Tensor, t: Tensor) -> Tensor:
        """p, shape (..., d); t is not used."""
        if x.shape[-1] != self.bias.shape[0]:
            raise ValueError(
                f"x has {x.shape[-1]} coordinates, the preconditioner {self.bias.shape[0]}"
            )
        from_x, from_grad = self.input_weights.to(x.dtype)
        hidden = torch.tanh(from_x * x.unsqueeze(-2) + from_grad * grad.unsqueeze(-2))
        value = self.bias.to(x.dtype) + (self.output_weights.to(x.dtype) * hidden).sum(-2)
        return functional.softplus(value, threshold=_SOFTPLUS_THRESHOLD)
