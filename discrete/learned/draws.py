"""Random numbers of one seed, the same ones on every device and in every type."""

from __future__ import annotations

import torch
from torch import Tensor

from ode_stopping.core.validation import described, require_count, require_whole

__all__ = ["Draws", "mixed_seed", "rows_of_step"]


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


def mixed_seed(*numbers: int) -> int:
    """One seed of several numbers, in 63 bits."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (number & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def rows_of_step(total: int, minibatch: int, seed: int, k: int, device: torch.device) -> Tensor:
    """The numbers of the rows that step k sees, drawn anew every step."""
    generator = torch.Generator().manual_seed(mixed_seed(seed, k))
    return torch.randperm(total, generator=generator)[:minibatch].to(device)
