"""Stopping criteria J(t, x); the flow stops the first time that J falls to the target.

A criterion is called with the flow's time and its whole state, and gives one number: 0-d, or one
value a sample where the objective does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..core.states import State, first_entry


class Criterion(nn.Module, ABC):
    """J(t, state), with the position taken out of the state.

    Works in every autograd mode, and is differentiable to the state and to every tensor inside
    that requires grad, where grad is enabled.

    Args:
        position: Callable state -> x. By default the first entry of a tuple (x, v, ...), which is
            the convention of the library's flows, else the state itself.

    Attributes:
        nonnegative: J is known never to be negative, so that a negative target is a mistake.
        takes_rows: Whether J of several states, whatever their time, is one call: one number for
            each first index of the state.

    Raises:
        TypeError: `position` is not callable.
    """

    nonnegative: bool = False
    takes_rows: bool = False

    def __init__(self, *, position: Callable[[Any], Tensor] | None = None) -> None:
        super().__init__()
        if position is not None and not callable(position):
            raise TypeError(f"position must be callable, state -> x, got {type(position).__name__}")
        self.position: Callable[[Any], Tensor] = first_entry if position is None else position

    @abstractmethod
    def forward(self, t: Tensor, state: State) -> Tensor:
        """J, 0-d or one value a sample."""
