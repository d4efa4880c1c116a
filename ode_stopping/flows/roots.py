"""The square root where it may reach zero."""

from __future__ import annotations

import torch
from torch import Tensor


def root_without_derivative_at_zero(v: Tensor) -> Tensor:
    """sqrt(v), with the derivative 0 where v = 0 instead of infinity; 0 for negative v.

    An element of Adam whose gradient was zero all the time has v = 0 and m = 0; the infinite
    derivative would turn its 0 into NaN. An epsilon inside the root would be another algorithm.
    """
    positive = v > 0
    # 0 * v: rounding below zero counts as zero, NaN stays NaN.
    return torch.where(positive, torch.where(positive, v, torch.ones_like(v)).sqrt(), 0.0 * v)
