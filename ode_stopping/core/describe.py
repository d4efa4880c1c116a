"""What `stopping_time` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .states import State

__all__ = ["detached_state", "scalar"]


def detached_state(state: State) -> State:
    """The state without its graph."""
    if isinstance(state, tuple):
        return tuple(piece.detach() for piece in state)
    return state.detach()


def each(value: Any, function: Callable[[Any], Any]) -> Any:
    """The function of one value, or of each in a list, or in lists of lists."""
    return [each(one, function) for one in value] if isinstance(value, list) else function(value)


def joined(names: Any) -> str:
    """One name, or several with repeats counted, from a list or a list of lists."""
    if isinstance(names, str):
        return names
    if names and isinstance(names[0], list):
        names = [name for some in names for name in some]
    return ", ".join(f"{name} ({names.count(name)})" for name in dict.fromkeys(names))


def numbers(tensor: Tensor, digits: int) -> str:
    """One number, or the first and last of several, for printing."""
    found = [f"{value:.{digits}g}" for value in tensor.detach().reshape(-1).tolist()]
    return ", ".join(found if len(found) <= 4 else [*found[:2], "...", found[-1]])


def scalar(value: float, like: Tensor) -> Tensor:
    """A 0-d float64 tensor on the device of `like`: times are not rounded to the state's dtype."""
    return torch.tensor(value, dtype=torch.float64, device=like.device)
