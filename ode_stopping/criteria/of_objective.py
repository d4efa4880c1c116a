"""Stopping criteria J(t, x); the flow stops the first time that J falls to the target.

A criterion is called with the flow's time and its whole state, and gives one number: 0-d, or one
value a sample where the objective does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.states import State, first_entry
from ..problems.base import Objective, check_objective, gradient_and_batch_dims
from ..problems.tensors import Number, attach, scalar
from .base import Criterion


class LossValue(Criterion):
    """J = f(x).

    Declared nonnegative where the objective says that f is bounded below by a number >= 0 (its
    `minimum`, or `lower_bound`).

    Args:
        objective: A `Problem` or any callable x -> f(x).
        position: See `Criterion`.

    Raises:
        TypeError: `objective` is not callable.
    """

    def __init__(
        self, objective: Objective, *, position: Callable[[Any], Tensor] | None = None
    ) -> None:
        super().__init__(position=position)
        check_objective(objective)
        self.objective = objective
        self.takes_rows = _takes_rows(self, LossValue)
        self.nonnegative = _bounded_below_by(objective, 0.0)

    def forward(self, t: Tensor, state: State) -> Tensor:
        """f(x)."""
        return self.objective(self.position(state))


class GradientNorm(Criterion):
    """J = |grad f(x)|^2, or |grad f(x)| without `squared`; nonnegative.

    The norm is over the last axis (over every axis that f sums up, for an f that makes one number
    of a matrix). Where the gradient is exactly zero the norm without the square is not
    differentiable; its derivative is then 0 rather than NaN.

    Args:
        objective: A `Problem` or any callable x -> f(x); see `objective_gradient`.
        squared: Whether to square the norm; the square of the 2-norm is smooth.
        ord: The order of the norm, >= 1; `math.inf` for the largest entry.
        position: See `Criterion`.

    Raises:
        TypeError: `objective` is not callable.
        ValueError: ord < 1 or NaN.
    """

    nonnegative = True

    def __init__(
        self,
        objective: Objective,
        *,
        squared: bool = True,
        ord: float = 2,
        position: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(position=position)
        check_objective(objective)
        if not ord >= 1:
            raise ValueError(f"ord must be at least 1, got {ord}")
        self.objective = objective
        self.takes_rows = _takes_rows(self, GradientNorm)
        self.squared = bool(squared)
        self.ord = float(ord)

    def forward(self, t: Tensor, state: State) -> Tensor:
        """The norm of the gradient, or its square."""
        gradient, batch_dims = gradient_and_batch_dims(self.objective, self.position(state))
        gradient = gradient.reshape(*gradient.shape[:batch_dims], -1)
        if self.squared and self.ord == 2:
            return (gradient * gradient).sum(-1)
        norm: Tensor = torch.linalg.vector_norm(gradient, self.ord, dim=-1)
        return norm * norm if self.squared else norm

    def extra_repr(self) -> str:
        """The options, for printing."""
        return f"squared={self.squared}, ord={self.ord:g}"


class RelativeDecrease(Criterion):
    """J = (f(x) - f*) / (f_ref - f*): 1 at the reference, 0 at the minimum.

    The reference is a fixed object of the criterion's own and not "wherever the flow started": were
    it tied to x0, J would depend on x0 explicitly, and the derivative of the stopping time to x0
    would have a further term that Theorem 1's adjoint does not carry. Moving x0 here leaves J as
    it is. A reference state without grad is therefore copied; one that requires grad is kept, and
    gets its own derivative as a parameter of the criterion.

    f_ref is evaluated with every call, since f may have parameters that it depends on.

    Args:
        objective: A `Problem` or any callable x -> f(x).
        reference: A state x_ref (tensor with at least one dimension), or the number f_ref (a 0-d
            tensor counts as one).
        minimum: f*; default the objective's own `minimum`, or 0 where it has none.
        position: See `Criterion`.

    Raises:
        TypeError: `objective` not callable; reference or minimum of the wrong kind.
        ValueError: f_ref <= f*, at construction or, where parameters have moved, at a call.
    """

    reference: Tensor
    minimum: Tensor

    def __init__(
        self,
        objective: Objective,
        *,
        reference: Tensor | Number,
        minimum: Tensor | Number | None = None,
        position: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__(position=position)
        check_objective(objective)
        self.objective = objective
        self.takes_rows = _takes_rows(self, RelativeDecrease)
        if isinstance(reference, Tensor) and not reference.requires_grad:
            reference = reference.detach().clone()
        attach(self, "reference", reference)
        known = getattr(objective, "minimum", None)
        if minimum is not None:
            attach(self, "minimum", scalar(minimum, "minimum"))
        else:
            attach(self, "minimum", 0.0 if known is None else scalar(known, "minimum"))
        given = minimum is not None or known is not None
        self.nonnegative = given or _bounded_below_by(objective, 0.0)
        with torch.no_grad():
            self._scale()

    def _scale(self) -> Tensor:
        """f_ref - f*, checked."""
        at_reference = (
            self.reference if self.reference.ndim == 0 else self.objective(self.reference)
        )
        scale = at_reference - self.minimum.to(at_reference.dtype)
        if not bool((scale > 0).all()):
            raise ValueError(
                "reference must have a value above the minimum, got f_ref = "
                f"{at_reference.detach().tolist()} and f* = {float(self.minimum.detach())}"
            )
        return scale

    def forward(self, t: Tensor, state: State) -> Tensor:
        """(f(x) - f*) / (f_ref - f*)."""
        value = self.objective(self.position(state))
        return (value - self.minimum.to(value.dtype)) / self._scale().to(value.dtype)


def _bounded_below_by(objective: Objective, bound: float) -> bool:
    """Whether an objective declares that it never falls below a bound."""
    for name in ("lower_bound", "minimum"):
        declared = getattr(objective, name, None)
        if declared is not None:
            value = declared.detach() if isinstance(declared, Tensor) else declared
            return float(value) >= bound  # False for NaN, too
    return False


def _takes_rows(criterion: Any, kind: type[Criterion]) -> bool:
    """Whether J is one call for several states.

    The objective says it of itself; and neither a subclass nor a position of the user's may have
    made another function of it.
    """
    own = type(criterion).forward is kind.forward and criterion.position is first_entry
    return own and getattr(criterion.objective, "takes_rows", False) is True
