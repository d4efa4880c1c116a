"""Stopping at f(x_{k-1}) - f(x_k) <= tol: a criterion that looks at two iterates.

A criterion is a function of one state, so the decrease becomes a part of the state, which makes it
an ordinary stopping index with an exact derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from ode_stopping.core.states import State
from ode_stopping.criteria import Criterion
from ode_stopping.problems.base import Objective, check_objective

from .updates import UpdateRule

__all__ = ["AugmentedRule", "StepDecrease"]

_REMEDY = (
    "StepDecrease needs its augmented state: call stopping_index(criterion.wrap(update), "
    "criterion.initial_state(x0), criterion, tol). In flow time there are no steps; use "
    "GradientNorm there"
)


class StepDecrease(Criterion):
    """J = f(x_{k-1}) - f(x_k), where that is a decrease.

        d_k = f(x_{k-1}) - f(x_k),   J = d_k where d_k >= 0,   J = max(initial, |d_k|) where d_k < 0

    The plain difference is also below a tolerance when f goes *up*, by whatever amount. Here an
    increase, however small, lies above every admissible target, and so does the start, which counts
    as an increase: J(x_0) = initial.

    Use: ``stopping_index(criterion.wrap(update), criterion.initial_state(x0), criterion, tol)``.
    The state becomes (x, d), or (x, v, ..., d) for a tuple, with d a 0-d tensor; `.state` of the
    result has it as its last entry. For a batch, ``initial_state(x0, batched=True)``: d and f have
    one value a sample.

    The derivative. Within a run of decreases dN is Definition 3 (or the fractional index "log") of
    J = d, with x_{N-1} differentiated as well. Right after an increase, and at N = 1, J_{N-1} is
    not a measured decrease but a mark, and J_N - J_{N-1} means nothing: there the index is
    right, and asking for its gradient raises GradientError. "hermite" and "partial_step" are
    refused, since J is not a function of flow time.

    In flow time the analogue of d/h is -df/dt = |grad f|^2 on a gradient flow, which is
    `GradientNorm`.

    Args:
        objective: a `Problem` or any callable x -> f(x), 0-d.
        initial: J at the start and the least J of an increase, in units of f; targets have to be
            below it.
        position: see `Criterion`; it receives the state without d.

    Attributes:
        initial: as given.

    Raises:
        TypeError: objective is not callable, or initial not a number.
        ValueError: initial is not positive and finite.
    """

    nonnegative = True

    def __init__(
        self,
        objective: Objective,
        *,
        initial: float = 1.0,
        position: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(position=position)
        check_objective(objective)
        if isinstance(initial, bool) or not isinstance(initial, int | float):
            raise TypeError(f"initial must be a float; got {type(initial).__name__}")
        if not (isfinite(initial) and initial > 0):
            raise ValueError(f"initial must be positive and finite; got {initial:g}")
        self.objective = objective
        self.initial = float(initial)

    def forward(self, t: Tensor, state: State) -> Tensor:
        """J at an augmented state; one value a sample, where d has one."""
        if not isinstance(state, tuple) or len(state) < 2 or not _is_mark(state[-1], state[0]):
            raise TypeError(_REMEDY)
        # In float64, so that no rounding takes a mark below it.
        decrease = state[-1].to(torch.float64)
        return torch.where(decrease < 0, (-decrease).clamp(min=self.initial), decrease)

    def measures(self, state: State) -> bool:
        """Whether J at this state is a decrease; else it is the mark of a start or an increase."""
        return isinstance(state, tuple) and bool(self.measured(state))

    @staticmethod
    def measured(state: State) -> Tensor:
        """`measures` of every sample, in the shape of d."""
        return state[-1] >= 0

    def check_target(self, target: float) -> None:
        """Raise unless the target is below every mark.

        Raises:
            ValueError: It is not.
        """
        if not target < self.initial:
            raise ValueError(
                f"target must be below initial = {self.initial:g} of the StepDecrease, J at the "
                f"start and the least J of an increase; got {target:g}. Raise initial="
            )

    def check_direction(self, *, rises: bool) -> None:
        """Raise unless J falls to the target: the marks lie above every one.

        Raises:
            ValueError: It rises.
        """
        if rises:
            raise ValueError(
                'direction must be "falling" for a StepDecrease, whose value at the start and '
                'after an increase is a mark above every target; got "rising"'
            )

    def initial_state(self, x0: State, *, batched: bool = False) -> tuple[Tensor, ...]:
        """(x0, d_0) with J = initial; the pieces of a tuple x0 come first.

        Args:
            x0: The start.
            batched: Whether dim 0 of x0 is a batch of B problems, as for
                ``stopping_index(..., batched=True)``: then d_0 has shape (B,).

        Raises:
            TypeError: x0 is not a tensor or a tuple of at least two tensors.
            ValueError: `batched`, and x0 has fewer than two dims.
        """
        pieces = x0 if isinstance(x0, tuple) else (x0,)
        if (isinstance(x0, tuple) and len(x0) < 2) or not all(
            isinstance(piece, Tensor) for piece in pieces
        ):
            raise TypeError("x0 must be a tensor, or a tuple of two or more; got " + _kind(x0))
        dtype, device = pieces[0].dtype, pieces[0].device
        if batched and pieces[0].ndim < 2:
            raise ValueError(
                "x0 must have shape (B, n, ...) for batched=True, the samples along dim 0; got "
                f"{_kind(pieces[0])}. Write x0[:, None] for states of one number"
            )
        shape = pieces[0].shape[:1] if batched else ()
        return (*pieces, torch.full(shape, -self.initial, dtype=dtype, device=device))

    def wrap(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """The update of the augmented state: an `UpdateRule` for a rule, else a callable (k, x).

        Raises:
            TypeError: update is not callable, or a class.
        """
        if isinstance(update, type) or not callable(update):
            raise TypeError(
                f"update must be an UpdateRule or a callable (k, x) -> x_next; got {_kind(update)}"
            )
        if isinstance(update, UpdateRule):
            return AugmentedRule(update, self)
        return _AugmentedUpdate(update, self)

    def augmented(self, state: tuple[Tensor, ...], following: State) -> tuple[Tensor, ...]:
        """(x_{k+1}, d_{k+1}) from (x_k, d_k) and x_{k+1}."""
        shape = state[-1].shape
        before = self._value(inner_state(state), shape)
        decrease = before - self._value(following, shape)
        pieces = following if isinstance(following, tuple) else (following,)
        return (*pieces, decrease.to(state[-1].dtype))

    def _value(self, state: State, shape: torch.Size) -> Tensor:
        value = self.objective(self.position(state))
        if not isinstance(value, Tensor) or value.shape != shape:
            what = f"one value a sample, shape {tuple(shape)}" if shape else "a 0-d tensor"
            raise ValueError(f"objective must return {what}; got {_kind(value)}")
        return value

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"initial={self.initial:g}"


class AugmentedRule(UpdateRule):
    """An update rule on (x, d); flow, step and order are those of the rule inside.

    Args:
        update: The rule for x.
        criterion: The criterion that d is for.
    """

    def __init__(self, update: UpdateRule, criterion: StepDecrease) -> None:
        # Not UpdateRule's own: flow and step have one place, the rule inside.
        nn.Module.__init__(self)
        self.update = update
        self.criterion = criterion
        self.order = update.order

    @property
    def flow(self) -> Callable[..., Any]:  # type: ignore[override]
        """The flow of the rule inside."""
        return self.update.flow

    @property
    def step(self) -> float | Tensor:  # type: ignore[override]
        """The step of the rule inside."""
        return self.update.step

    def forward(self, k: int, x: State, t: Tensor) -> State:
        """(x_{k+1}, d_{k+1})."""
        state = _require_augmented(x)
        return self.criterion.augmented(state, self.update(k, inner_state(state), t))

    def advance(self, t: Tensor, x: State, step: float | Tensor) -> State:
        """The state after a step of this size; d is the decrease over it."""
        state = _require_augmented(x)
        return self.criterion.augmented(state, self.update.advance(t, inner_state(state), step))


class _AugmentedUpdate(nn.Module):
    """A bare update (k, x) -> x_next on (x, d)."""

    def __init__(self, update: Callable[..., Any], criterion: StepDecrease) -> None:
        super().__init__()
        self.update = update
        self.criterion = criterion

    def forward(self, k: int, x: State) -> State:
        """(x_{k+1}, d_{k+1})."""
        state = _require_augmented(x)
        return self.criterion.augmented(state, self.update(k, inner_state(state)))


def inner_state(state: tuple[Tensor, ...]) -> State:
    """x of (x, d), and the tuple (x, v, ...) of (x, v, ..., d)."""
    return state[0] if len(state) == 2 else state[:-1]


def _is_mark(last: Tensor, first: Tensor) -> bool:
    """Whether the last entry of a state can be d: 0-d, or one number a sample of the first."""
    # A velocity of the shape of x is none: somebody has forgotten to wrap.
    return last.ndim == 0 or (last.ndim == 1 < first.ndim and len(last) == len(first))


def _require_augmented(state: State) -> tuple[Tensor, ...]:
    if not isinstance(state, tuple) or len(state) < 2:
        raise TypeError(_REMEDY)
    return state


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
