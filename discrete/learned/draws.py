"""Random numbers of one seed, the same ones on every device and in every type."""

from __future__ import annotations

import torch
from torch import Tensor

from ode_stopping.core.validation import described, require_count, require_whole

__all__ = ["Draws"]


class Draws:
    """Random numbers of one seed, drawn on the CPU in float64."""

    def __init__(
        self, count: int, seed: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        require_count(count, name="count")
        require_whole(seed, name="seed")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating type of torch; got {described(dtype)}")
        self._generator = torch.Generator().manual_seed(seed)
        self.device, self._dtype = device, dtype

    def normal(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform on [0, 1)."""
        return torch.rand(*shape, generator=self._generator, dtype=torch.float64)

    def chosen(self, total: int, count: int) -> Tensor:
        """So many different numbers from 0 to total - 1, in random order."""
        return torch.randperm(total, generator=self._generator)[:count]

    def placed(self, tensor: Tensor) -> Tensor:
        """Where they go, and in which type."""
        return tensor.to(device=self.device, dtype=self._dtype)
