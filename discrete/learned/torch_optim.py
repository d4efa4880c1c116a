"""A learned rule as an optimiser of torch's, for the parameters of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ode_stopping.core.validation import checked_number, described

if TYPE_CHECKING:
    from .base import LearnedOptimizer

__all__ = ["LearnedTorchOptimizer", "require_whole_digits"]


class LearnedTorchOptimizer(Optimizer):
    """Trains parameters by a learned rule, of which nothing is differentiated here.

        p <- p + lr u_k

    All parameters with a gradient are the coordinates of one problem: |g| is the norm over all of
    them. Each keeps its own memory, of its own type and on its own device, and counts its own
    steps, those in which it had a gradient.

    `lr` = 1 takes the steps as they were learned. It is a factor, there for the schedulers of
    torch, which look for it in the groups; the memory does not know of it.

    `state_dict` has the memories, not the rule: save that by `learned.save`.

    Args:
        parameters: As for any optimiser of torch's; float32 or float64, of any shape.
        learned: The rule, on the device of the parameters; it is used as it is at the time of the
            step.
        lr: The factor, >= 0; a group may have its own.

    Raises:
        TypeError: No numbers of float32 or float64, or no number for `lr`.
        ValueError: The rule is one for whole vectors, and there is anything else than one of them;
            a bad `lr`.
    """

    def __init__(self, parameters: Any, *, learned: LearnedOptimizer, lr: float = 1.0) -> None:
        # First, since groups are looked at as they come.
        self.learned = learned
        super().__init__(parameters, {"lr": lr})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """A further group.

        Raises:
            TypeError, ValueError: See the class.
        """
        super().add_param_group(param_group)
        try:
            self._check()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check(self) -> None:
        group = self.param_groups[-1]
        checked_number(group["lr"], name="lr", low=0.0, closed=True)
        for p in group["params"]:
            require_whole_digits(p, name="parameters")
        tensors = [p for one in self.param_groups for p in one["params"]]
        if not self.learned.coordinatewise and (len(tensors) > 1 or tensors[0].ndim != 1):
            raise ValueError(
                f"{type(self.learned).__name__} takes whole vectors: give it one parameter of "
                f"shape (d,); got shapes {[tuple(p.shape) for p in tensors]}"
            )

    def __getstate__(self) -> dict[str, Any]:
        # Torch's leaves out what it does not know.
        return {**super().__getstate__(), "learned": self.learned}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: Evaluates the loss anew and leaves the gradients.

        Returns:
            What the closure returns.

        Raises:
            TypeError: A sparse gradient.
            ValueError: The rule returns a step of another shape than that of the gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        pairs = [(p, g["lr"]) for g in self.param_groups for p in g["params"] if p.grad is not None]
        if not pairs:
            return loss
        norm = _total_norm([p.grad for p, _ in pairs])
        for p, lr in pairs:
            state = self.state[p]
            k = state.get("step", 0)
            # (By name: `load_state_dict` brings single tensors to the device of p.)
            memory = (
                tuple(state[f"memory_{i}"] for i in range(len(state) - 1))
                if state
                else self.learned.initial_memory(p.detach())
            )
            norms = norm.to(p).expand(p.shape) if self.learned.coordinatewise else norm.to(p)
            change, memory = self.learned.step(k, p.grad, memory, norms)
            if change.shape != p.shape:
                raise ValueError(
                    f"{type(self.learned).__name__}.step must return a step of the shape of the "
                    f"gradient, {tuple(p.shape)}; got {tuple(change.shape)}"
                )
            p.add_(change * lr)
            state.update(step=k + 1, **{f"memory_{i}": piece for i, piece in enumerate(memory)})
        return loss


def require_whole_digits(value: object, *, name: str) -> None:
    """Raise unless `value` is a dense tensor of float32 or float64.

    Half precision has no digits for averages over many steps, and eps = 1e-8 is 0 in it.

    Raises:
        TypeError: Naming the argument.
    """
    right = (
        isinstance(value, Tensor)
        and value.dtype in (torch.float32, torch.float64)
        and value.layout is torch.strided
    )
    if not right:
        raise TypeError(
            f"{name} must be dense and of float32 or float64 for a learned optimiser; got "
            f"{described(value)}"
        )


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """|g| over all of them, in the widest of their types."""
    for gradient in gradients:
        if gradient.layout is not torch.strided:
            raise TypeError(
                f"a learned optimiser takes dense gradients; got layout {gradient.layout}. Make "
                "the layer with sparse=False"
            )
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    home, dtype = norms[0].device, torch.float32
    for norm in norms:
        dtype = torch.promote_types(dtype, norm.dtype)
    return torch.linalg.vector_norm(torch.stack([n.to(home, dtype) for n in norms]))
