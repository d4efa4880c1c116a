"""What is tuned, and the optimiser that moves it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..core.validation import described

__all__ = ["OptimizerLike", "checked_optimizer", "checked_parameters", "needs_closure"]

OptimizerLike: TypeAlias = (
    torch.optim.Optimizer | Callable[[list[Tensor]], torch.optim.Optimizer] | None
)

_DEFAULT_RATE = 1e-2


def checked_parameters(parameters: Any) -> list[Tensor]:
    """Tensors, of modules and by themselves, as a list without repeats.

    Args:
        parameters: A tensor, a module, or an iterable of both. Of a module, those that require
            grad.

    Raises:
        TypeError: Something else; not floating-point.
        ValueError: None; a tensor that does not require grad, or is no leaf.
    """
    if not isinstance(parameters, Tensor | nn.Module | Iterable):
        raise TypeError(
            "parameters must be tensors that require grad, or a module; got "
            f"{described(parameters)}"
        )
    given = [parameters] if isinstance(parameters, Tensor | nn.Module) else list(parameters)
    found: dict[int, Tensor] = {}
    for position, entry in enumerate(given):
        if isinstance(entry, nn.Module):
            found.update({id(p): p for p in entry.parameters() if p.requires_grad})
            continue
        if not isinstance(entry, Tensor) or not entry.is_floating_point():
            raise TypeError(
                "parameters must hold floating-point tensors or modules; entry "
                f"{position} is {described(entry)}"
            )
        if not entry.requires_grad:
            raise ValueError(f"parameters must require grad; entry {position} does not")
        if not entry.is_leaf:
            raise ValueError(
                f"parameters must be leaves; entry {position} was computed from others. Tune those"
            )
        found[id(entry)] = entry
    if not found:
        raise ValueError("parameters must hold at least one tensor that requires grad; got none")
    return list(found.values())


def checked_optimizer(
    optimizer: OptimizerLike, parameters: Sequence[Tensor]
) -> torch.optim.Optimizer:
    """The optimiser, over exactly these parameters.

    Args:
        optimizer: One that exists, a factory parameters -> optimiser, or None: Adam with the rate
            1e-2.
        parameters: What is tuned.

    Raises:
        TypeError: Neither.
        ValueError: It moves other parameters, or not all of these.
    """
    if optimizer is None:
        return torch.optim.Adam(parameters, lr=_DEFAULT_RATE)
    made = optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        made = optimizer(list(parameters)) if callable(optimizer) else optimizer
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, or make one of the parameters, as in "
            f"lambda p: torch.optim.SGD(p, lr=0.1); got {described(made)}"
        )
    moved = {id(p) for group in made.param_groups for p in group["params"]}
    wanted = {id(p) for p in parameters}
    if moved != wanted:
        raise ValueError(
            "optimizer must be over the parameters that are tuned; "
            f"{len(wanted - moved)} of them are not in it, and {len(moved - wanted)} others are"
        )
    return made


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step has to evaluate the objective by itself (LBFGS)."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
