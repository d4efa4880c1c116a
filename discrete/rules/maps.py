"""The user's update on flat vectors, with its clock: the twin of the continuous flow map."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor

from ode_stopping.core.functions import UserFunction
from ode_stopping.core.states import StateLayout
from ode_stopping.core.status import NotReproducibleError
from ode_stopping.core.validation import ordinary

from .updates import UpdateRule

__all__ = ["Clock", "UpdateMap"]

_IN_PLACE = (
    "update changed x in place; it must return a new tensor, since x_k is needed again "
    "(write x - h * g, not x.sub_(h * g))"
)


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
        """The clock of an update: an `UpdateRule` brings its step.

        Raises:
            ValueError: The step, which may have been trained since, is not positive and finite.
        """
        clock = cls(start, ordinary(update.step) if isinstance(update, UpdateRule) else 1.0)
        if not (isfinite(clock.step_value) and clock.step_value > 0):
            raise ValueError(f"step must be positive and finite; got {clock.step_value:g}")
        return clock

    @cached_property
    def start_value(self) -> float:
        """t0 as a number."""
        return float(self.start.detach())

    @cached_property
    def step_value(self) -> float:
        """h as a number."""
        return float(self.step.detach()) if isinstance(self.step, Tensor) else self.step

    def time(self, k: float) -> float:
        """t_k as a number."""
        return self.start_value + k * self.step_value

    def traced(self, start: Tensor) -> Callable[[float | Tensor], Tensor]:
        """k -> t_k with a graph to `start` (a stand-in for t0) and to h."""
        # In float64, as `time` has it: k h in float32 would be the clock of another run.
        # With grad whatever the caller's mode: a step of another dtype is converted, and without a
        # graph the conversion would lose the derivative of t_k to h.
        with torch.enable_grad():
            step = self.step.to(start) if isinstance(self.step, Tensor) else self.step
        moves = start.requires_grad or (isinstance(step, Tensor) and step.requires_grad)

        def time(k: float | Tensor) -> Tensor:
            if not isinstance(k, Tensor) and not moves:
                return torch.scalar_tensor(self.time(k), dtype=torch.float64, device=start.device)
            return start + k * step

        return time


class _Indexed:
    """An update as a function (t, x) at the index that it was given last."""

    def __init__(self, update: Callable[..., Any]) -> None:
        self.update = update
        self.index = 0

    def __call__(self, t: Tensor, state: Any) -> Any:
        if isinstance(self.update, UpdateRule):
            return self.update(self.index, state, t)
        return self.update(self.index, state)


class UpdateMap(UserFunction):
    """x_{k+1} = G_k(x_k) on flat vectors, from an `UpdateRule` or a bare callable (k, x)."""

    name = "update"

    def __init__(
        self, update: Callable[..., Any], layout: StateLayout, like: Tensor, clock: Clock
    ) -> None:
        # Not a method of this object, which would make a cycle that holds graphs until it is
        # collected.
        self._indexed = _Indexed(update)
        self.given = update
        super().__init__(self._indexed, layout, like)
        self.rule = update if isinstance(update, UpdateRule) else None
        self.clock = clock

    def _checked(self, output: Any) -> Tensor:
        return self.layout.pack(self.layout.check_like(output, name="update", dtype=self.dtype))

    def step(self, k: int, flat: Tensor, t: float | Tensor | None = None) -> Tensor:
        """x_{k+1}, shape (n,), without graph; t is t_k unless given.

        Raises:
            ValueError: The update changed its argument in place, so x_k is lost.
        """
        return self._guarded(self.plain, k, flat, self.clock.time(k) if t is None else t)

    def step_traced(self, k: int, flat: Tensor, t: Tensor) -> Tensor:
        """x_{k+1} with graph to x_k, which requires grad; t is t_k."""
        self._indexed.index = k
        return _depending(ordinary(self.traced(self.time_tensor(t), flat)), flat)

    def step_recorded(self, k: int, flat: Tensor, t: Tensor) -> Tensor:
        """`step_traced` for the forward run, with what `step` sees to."""
        return _depending(self._guarded(self.traced, k, flat, self.time_tensor(t)), flat)

    def _guarded(
        self, evaluate: Callable[[Any, Tensor], Tensor], k: int, flat: Tensor, t: float | Tensor
    ) -> Tensor:
        """An evaluation that must leave x_k as it is."""
        self._indexed.index = k
        # A version counter does not see everything (`x.data`, NumPy); the first step is looked at
        # twice.
        version, copy = flat._version, flat.detach().clone() if k == 0 else None
        try:
            following = evaluate(t, flat)
        except (RuntimeError, TypeError) as error:
            self._require_untouched(flat, version, copy)
            if "in-place operation" in str(error):
                raise ValueError(_IN_PLACE) from error
            raise
        if copy is not None or flat._version != version:
            self._require_untouched(flat, version, copy)
        # What was made in inference mode has no version counter, and nothing is traced on it.
        return cast("Tensor", ordinary(following))

    def increment(self, k: int, flat: Tensor, t: Tensor) -> Tensor:
        """x_{k+1} - x_k with graph, without the rounding of a sum where the rule knows it."""
        if self.rule is None or not self.adds:
            return self.step_traced(k, flat, t) - flat
        self.calls += 1
        time = self.time_tensor(t)
        with torch.enable_grad():
            state = self.layout.unpack(_differentiable(flat))
            return self._checked(self.rule.increment(time, state, self.rule.sized(1.0, time)))

    @property
    def adds(self) -> bool:
        """Whether the update is its rule's `advance`, so that `increment` is the same step."""
        return self.rule is not None and type(self.rule).forward is UpdateRule.forward

    def advance(self, flat: Tensor, t: Tensor, fraction: float | Tensor) -> Tensor:
        """The state after a fraction of a step, with graph; for an `UpdateRule` only."""
        assert self.rule is not None
        self.calls += 1
        time = self.time_tensor(t)
        with torch.enable_grad():
            state = self.layout.unpack(_differentiable(flat))
            return self._checked(self.rule.advance(time, state, self.rule.sized(fraction, time)))

    def require_same(self, replayed: Tensor, stored: Tensor, k: int) -> None:
        """A replay must give x_k again: bit for bit, or up to kernels that round in another order.

        Raises:
            NotReproducibleError: It does not.
        """
        if torch.equal(replayed, stored):
            return
        eps = torch.finfo(stored.dtype).eps
        gap, size = (replayed - stored).abs(), stored.abs()
        for piece in self.layout.slices():
            # By the piece: a small one must not hide behind a large one, beyond one rounding of
            # that.
            allowed = eps * (100 * size[piece].amax() + size.amax()) if gap[piece].numel() else 0.0
            if not bool((gap[piece] <= allowed).all()):
                raise NotReproducibleError(self._differs(k))

    @staticmethod
    def _differs(k: int) -> str:
        """What to say where a replay does not give x_k again."""
        return (
            f"replaying the update does not give x_{k} again, so its derivative would "
            "belong to another run. A stochastic update must draw from a generator that is "
            "seeded by the step k; state (a counter, a momentum buffer) must be part of x; "
            "nothing that the update uses may change before the backward pass."
        )

    @staticmethod
    def _require_untouched(flat: Tensor, version: int, copy: Tensor | None) -> None:
        if flat._version == version and (copy is None or torch.equal(flat, copy)):
            return
        raise ValueError(_IN_PLACE)


def _differentiable(flat: Tensor) -> Tensor:
    """The state as a flow that differentiates inside has to see it: it requires grad."""
    return flat if flat.requires_grad else flat.detach().requires_grad_(True)


def _depending(following: Tensor, flat: Tensor) -> Tensor:
    """A step to a constant (a restart) depends on x_k too, with derivative zero."""
    return following if following.requires_grad else following + 0.0 * flat
