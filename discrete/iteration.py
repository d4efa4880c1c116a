"""The user's update and its clock, on flat vectors: the discrete twin of a `FlowMap`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ode_stopping.evaluation import UserFunction
from ode_stopping.states import StateLayout

from .updates import UpdateRule

__all__ = ["Clock", "UpdateMap"]


@dataclass(frozen=True)
class Clock:
    """t_k = t0 + k h.

    Attributes:
        start: t0, shape (), float64, possibly with a graph.
        step: h as the rule has it; 1 for a bare callable.
    """

    start: Tensor
    step: float | Tensor

    @classmethod
    def of(cls, update: object, start: Tensor) -> Clock:
        """The clock of an update: an `UpdateRule` brings its step."""
        return cls(start, update.step if isinstance(update, UpdateRule) else 1.0)

    @property
    def start_value(self) -> float:
        """t0 as a number."""
        return float(self.start.detach())

    @property
    def step_value(self) -> float:
        """h as a number."""
        return float(self.step.detach()) if isinstance(self.step, Tensor) else self.step

    def time(self, k: float) -> float:
        """t_k as a number."""
        return self.start_value + k * self.step_value

    @property
    def has_graph(self) -> bool:
        """Whether t0 or h require grad."""
        return self.start.requires_grad or (isinstance(self.step, Tensor) and self.step.requires_grad)

    def traced(self, start: Tensor) -> Callable[[float | Tensor], Tensor]:
        """k -> t_k with a graph to `start` (a stand-in for t0) and to h."""

        def time(k: float | Tensor) -> Tensor:
            if not isinstance(k, Tensor) and not self.has_graph:
                return torch.tensor(self.time(k), dtype=torch.float64, device=start.device)
            return start + k * self.step

        return time


class UpdateMap(UserFunction):
    """x_{k+1} = G_k(x_k) on flat vectors, from an `UpdateRule` (k, x, t) or a bare callable (k, x)."""

    name = "update"

    def __init__(self, update: Callable[..., Any], layout: StateLayout, like: Tensor, clock: Clock) -> None:
        super().__init__(self._at_index, layout, like)
        self.update = update
        self.rule = update if isinstance(update, UpdateRule) else None
        self.clock = clock
        self._index = 0

    def _at_index(self, t: Tensor, state: Any) -> Any:
        if self.rule is not None:
            return self.rule(self._index, state, t)
        return self.update(self._index, state)

    def _checked(self, output: Any) -> Tensor:
        return self.layout.pack(self.layout.check_like(output, name="update", dtype=self.dtype))

    def step(self, k: int, flat: Tensor) -> Tensor:
        """x_{k+1}, shape (n,), without graph.

        Raises:
            ValueError: The update changed its argument in place, so x_k is lost.
        """
        self._index = k
        version = flat._version
        following = self.plain(self.clock.time(k), flat)
        if flat._version != version:
            raise ValueError(
                "update changed x in place; it must return a new tensor, since x_k is needed again "
                "(write x - h * g, not x.sub_(h * g))"
            )
        return following

    def step_traced(self, k: int, flat: Tensor, t: Tensor) -> Tensor:
        """x_{k+1} with graph; t is t_k."""
        self._index = k
        return self.traced(self.time_tensor(t), flat)
