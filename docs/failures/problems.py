"""What flows and criteria are built from: double precision, leaves, |x|^2/2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

F64 = torch.float64
Function = Callable[[Tensor, Tensor], Tensor]


def parameter(value: Any) -> nn.Parameter:
    """A leaf in double precision."""
    return nn.Parameter(torch.as_tensor(value, dtype=F64))


def half_square(t: Tensor, x: Tensor) -> Tensor:
    """J = |x|^2/2."""
    return 0.5 * x.square().sum()
