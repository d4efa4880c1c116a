"""A learned rule as an optimiser of torch's, for the parameters of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from .base import LearnedOptimizer

__all__ = ["LearnedTorchOptimizer"]


class LearnedTorchOptimizer(Optimizer):
    """Trains parameters by a learned rule, of which nothing is differentiated here.

    All parameters with a gradient are the coordinates of one problem: |g| is the norm over all of
    them. Each keeps its own memory, of its own dtype and on its own device.

    Args:
        parameters: As for any optimiser of torch's.
        learned: The rule; it is used as it is at the time of the step.

    Raises:
        ValueError: The rule is one for whole vectors, and there are several parameters.
    """

    def __init__(self, parameters: Any, *, learned: LearnedOptimizer) -> None:
        super().__init__(parameters, {})
        self.learned = learned
        tensors = [p for group in self.param_groups for p in group["params"]]
        if not learned.coordinatewise and (len(tensors) > 1 or tensors[0].ndim != 1):
            raise ValueError(
                f"{type(learned).__name__} takes whole vectors: give it one parameter of shape "
                f"(d,); got {len(tensors)} parameters"
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not tensors:
            return loss
        norm = _total_norm([p.grad for p in tensors])
        for p in tensors:
            state = self.state[p]
            if not state:
                memory = self.learned.initial_memory(p)
                state["step"] = 0
            else:
                memory = tuple(state[f"memory_{i}"] for i in range(len(state) - 1))
            norms = norm.to(p).expand(p.shape) if self.learned.coordinatewise else norm.to(p)
            change, memory = self.learned.step(state["step"], p.grad, memory, norms)
            p.add_(change)
            state["step"] += 1
            state.update({f"memory_{i}": tensor for i, tensor in enumerate(memory)})
        return loss


def _total_norm(gradients: list[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    home = norms[0].device
    return torch.linalg.vector_norm(torch.stack([norm.to(home) for norm in norms]))
