"""Gradient descent with momentum that tunes its learning rate, momentum and weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import OnlineAdaptation
from .bundles import Bundle, Moved
from .coordinates import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY
from .options import AdaptationOptions, Variant, names, of_variant

__all__ = ["SGDOLA"]

_MAX_RISE = 2.0  # cannot be met while L lr <= 2: the largest rate of gradient descent


class SGDOLA(OnlineAdaptation):
    """`torch.optim.SGD` with momentum, with the adaptation of `AdamOLA`.

        b <- momentum b + g,   d = b   (nesterov: d = g + momentum b),   x <- x - lr d

    Args:
        params: Tensors or parameter groups.
        lr: First learning rate.
        momentum: As in torch. 0 can be adapted to (the rate) with a deterministic closure only: on
            fresh batches nothing is left of the direction without the present gradient.
        nesterov: As in torch.
        weight_decay: As in torch, added to the gradient.
        adapt_rate, descent_threshold, variant: As for `AdamOLA`.
        adapt: "lr", "momentum", "weight_decay".
        **options: See `AdaptationOptions`; `max_rise` is 2 here.

    Raises:
        TypeError, ValueError: A value that is not admissible, by name.
    """

    coordinates = (LEARNING_RATE, MOMENTUM, WEIGHT_DECAY)
    buffers = ("momentum_buffer",)
    gradient_like = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        *,
        adapt_rate: float | None = None,
        descent_threshold: float | None = None,
        variant: Variant = "guarded",
        nesterov: bool = False,
        weight_decay: float = 0.0,
        adapt: Sequence[str] = ("lr",),
        **options: Any,
    ) -> None:
        adapt_rate, descent_threshold = of_variant(variant, adapt_rate, descent_threshold)
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "adapt_rate": adapt_rate,
        }
        options.setdefault("max_rise", _MAX_RISE)
        chosen = AdaptationOptions.of(
            type(self).__name__,
            adapt=names(adapt),
            variant=variant,
            descent_threshold=descent_threshold,
            **options,
        )
        super().__init__(params, defaults, chosen)

    @staticmethod
    def check_group(group: Mapping[str, Any]) -> None:
        """Raise where an option is not admissible."""
        OnlineAdaptation.check_group(group)
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum must be in [0, 1); got {group['momentum']}")
        if not group["weight_decay"] >= 0:
            raise ValueError(f"weight_decay must not be negative; got {group['weight_decay']}")

    def move(self, bundle: Bundle, *, held_out: bool) -> Moved:
        """One step."""
        group = bundle.group
        momentum, gradients = group["momentum"], bundle.decayed()
        for state in bundle.states:
            state["step"] += 1
        velocity = bundle.buffer("momentum_buffer")
        torch._foreach_mul_(velocity, momentum)
        torch._foreach_add_(velocity, gradients)
        if group["nesterov"]:
            directions = list(torch._foreach_add(gradients, velocity, alpha=momentum))
        else:
            directions = [v.clone() for v in velocity]
        torch._foreach_add_(bundle.parameters, directions, alpha=-group["lr"])
        decay = group["weight_decay"] or None
        if not held_out:
            return Moved(directions, decay=decay)
        own = 1 + momentum if group["nesterov"] else 1.0
        rest = list(torch._foreach_sub(directions, bundle.gradients, alpha=own))
        return Moved(directions, rest, decay)

    @staticmethod
    def step_map(
        x: Tensor,
        gradient: Tensor,
        buffers: tuple[Tensor, ...],
        values: Mapping[str, Any],
        steps: float | Tensor,
        group: Mapping[str, Any],
        *,
        held_out: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step on flat tensors."""
        momentum = values["momentum"]
        total = gradient + values["weight_decay"] * x if group["weight_decay"] else gradient
        velocity = momentum * buffers[0] + total
        direction = total + momentum * velocity if group["nesterov"] else velocity
        if held_out:
            direction = direction - (1 + momentum if group["nesterov"] else 1) * gradient
        return x - values["lr"] * direction, (velocity,)

    @staticmethod
    def remembers(group: Mapping[str, Any]) -> bool:
        """Whether there is momentum."""
        return bool(group["momentum"] > 0)
