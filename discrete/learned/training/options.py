"""The settings of a meta-training, checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any, Literal

import torch

from ode_stopping.core.validation import described, require_count

from .loss import MetaLoss
from .rollout import Inputs

__all__ = ["MetaOptions"]


@dataclass(frozen=True)
class MetaOptions:
    """See `meta_train`."""

    _: KW_ONLY
    loss: MetaLoss = field(default_factory=MetaLoss)
    steps: int = 500
    batch: int = 64
    shards: int = 8
    horizon: int | tuple[int, int] | Callable[[int], int] = 100
    segment: int = 20
    truncated: bool = True
    update: Literal["segment", "horizon"] = "segment"
    inputs: Inputs = "detached"
    rate: float = 3e-3
    decay: float = 0.1
    clip: float = 1.0
    validate_every: int = 20
    seed: int = 0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not isinstance(self.loss, MetaLoss):
            raise TypeError(f"loss must be a MetaLoss; got {described(self.loss)}")
        if not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point type; got {self.dtype!r}")
        for name in ("steps", "batch", "shards", "segment", "validate_every"):
            require_count(getattr(self, name), name=name)
        if self.batch % self.shards:
            raise ValueError(
                f"batch must be a multiple of shards = {self.shards}; got {self.batch}"
            )
        for name in ("rate", "decay", "clip"):
            value = getattr(self, name)
            if not 0.0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number; got {value!r}")
        if self.update not in ("segment", "horizon"):
            raise ValueError(f'update must be "segment" or "horizon"; got {self.update!r}')
        if self.inputs not in ("detached", "through"):
            raise ValueError(f'inputs must be "detached" or "through"; got {self.inputs!r}')
        weights = self.loss.weights
        if weights is not None and not callable(self.horizon) and len(weights) < self.longest:
            raise ValueError(
                "loss.weights must hold a number for every step of the horizon, "
                f"{self.longest}; got {len(weights)}"
            )
        if not self.truncated and self.update != "horizon":
            raise ValueError(
                'truncated=False needs update="horizon": the whole discrete adjoint goes back '
                "through all segments, which have to have one theta"
            )
        if isinstance(self.horizon, tuple):
            low, high = self.horizon
            require_count(low, name="horizon[0]")
            require_count(high, name="horizon[1]")
            if low > high:
                raise ValueError(f"horizon must be (least, largest); got {self.horizon}")
        elif not callable(self.horizon):
            require_count(self.horizon, name="horizon")

    @property
    def longest(self) -> int:
        """The longest horizon; of a curriculum the last one."""
        if callable(self.horizon):
            return self.horizon_of(self.steps - 1, 0)
        return self.horizon[1] if isinstance(self.horizon, tuple) else self.horizon

    def horizon_of(self, step: int, draw: int) -> int:
        """K of a meta-step; `draw` is a random number >= 0."""
        if callable(self.horizon):
            length = self.horizon(step)
            require_count(length, name=f"horizon({step})")
            return length
        if isinstance(self.horizon, tuple):
            low, high = self.horizon
            return low + draw % (high - low + 1)
        return self.horizon

    def rate_of(self, step: int) -> float:
        """The learning rate of a meta-step: it falls by `decay` in all, geometrically."""
        return self.rate * self.decay ** (step / self.steps)

    def to_dict(self) -> dict[str, Any]:
        """By name, for a file: numbers, strings and lists."""
        plain = {name: value for name, value in self.__dict__.items() if name != "loss"}
        plain["dtype"] = str(self.dtype)
        if callable(self.horizon):
            plain["horizon"] = getattr(self.horizon, "__qualname__", type(self.horizon).__name__)
        return {**plain, "loss": asdict(self.loss)}
