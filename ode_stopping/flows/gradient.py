"""Gradient flows: plain, with a learning-rate schedule, with a diagonal preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from ..problems.base import Objective, check_objective, objective_gradient
from ..problems.tensors import attach
from .base import Flow

Schedule: TypeAlias = Callable[[Tensor], Tensor | float]
Preconditioner: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor | float]


class GradientFlow(Flow):
    """x' = -grad f(x).

    Args:
        objective: A `Problem` or any callable x -> f(x), one value a sample; an `nn.Module` is
            registered, so that its parameters are the flow's.

    Raises:
        TypeError: `objective` is not callable. Calls raise what `objective_gradient` raises.
    """

    objective: Objective

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        check_objective(objective)
        self.objective = objective

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient of f at x, shape of x."""
        return objective_gradient(self.objective, x)

    def forward(self, t: Tensor, x: Any) -> Any:
        """-grad f(x), shape of x."""
        return -self.gradient(x)

    def excess(self, x: Tensor, minimum: float | None = None) -> Tensor:
        """f(x) - f*, one number a sample; f* is the objective's own unless given, or else 0."""
        known = getattr(self.objective, "minimum", None) if minimum is None else minimum
        return self.objective(x) - (0.0 if known is None else known)

    def known_minimizer(self, minimizer: Tensor | None, like: Tensor) -> Tensor:
        """x*, given or the objective's own.

        Raises:
            ValueError: Neither is there.
        """
        known = getattr(self.objective, "minimizer", None) if minimizer is None else minimizer
        if known is None:
            raise ValueError("this energy needs x*: give minimizer=, the objective has none")
        return known.to(like)

    def energy(
        self,
        t: Tensor | float,
        state: Any,
        *,
        minimum: float | None = None,
        minimizer: Tensor | None = None,
    ) -> Tensor:
        """An energy that does not rise along the flow; here f(x) - f*, with E' = -<A, grad f>.

        Non-increasing where <A, grad f> >= 0: always for the gradient flow, where alpha(t) >= 0 or
        p >= 0 for a schedule or a diagonal preconditioner, and for `RMSPropFlow`.

        Args:
            t: Flow time.
            state: The state; x of shape (..., d).
            minimum: f*; default the objective's own, or 0 where it has none.
            minimizer: x*, for energies that need it; default the objective's own.

        Returns:
            One number a sample.
        """
        return self.excess(self.position(state), minimum)


class RescaledGradientFlow(GradientFlow):
    """x' = -alpha(t) grad f(x) (eq. 3).

    Args:
        objective: As for `GradientFlow`.
        schedule: Callable t -> alpha, one number (or a tensor with as many dimensions as x, for a
            rate a sample, say). For a plain number write `ConstantSchedule(number)`.

    Raises:
        TypeError: `objective` or `schedule` is not callable; alpha is not a tensor or number.
        ValueError: alpha has a shape that does not fit x.
    """

    schedule: Schedule

    def __init__(self, objective: Objective, *, schedule: Schedule) -> None:
        super().__init__(objective)
        if not callable(schedule):
            raise TypeError(
                f"schedule must be callable, t -> alpha, got {type(schedule).__name__}; "
                "ConstantSchedule makes one of a number"
            )
        self.schedule = schedule

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """-alpha(t) grad f(x), shape of x."""
        alpha = self.schedule(t)
        # A vector against a batch could mean samples or coordinates: nobody is to guess.
        if isinstance(alpha, Tensor) and alpha.numel() != 1 and alpha.ndim != x.ndim:
            raise ValueError(
                f"schedule must return one number, or {x.ndim} dimensions as x has, "
                f"got shape {tuple(alpha.shape)}"
            )
        return -_scaled(alpha, self.gradient(x), "schedule")


class PreconditionedFlow(GradientFlow):
    """x' = -p * grad f(x), p = p(x, grad f(x), t; theta) a diagonal (eq. 4).

    Args:
        objective: As for `GradientFlow`.
        preconditioner: Callable (x, grad, t) -> p that broadcasts to the shape of x, or a tensor
            p of shape (d,), kept as the object it is (the same leaf where it requires grad).

    Raises:
        TypeError: `objective` not callable; preconditioner neither callable nor a tensor.
        ValueError: p does not broadcast to the shape of x.
    """

    preconditioner: Preconditioner | Tensor

    def __init__(self, objective: Objective, *, preconditioner: Preconditioner | Tensor) -> None:
        super().__init__(objective)
        if isinstance(preconditioner, Tensor):
            attach(self, "preconditioner", preconditioner)
        elif callable(preconditioner):
            self.preconditioner = preconditioner
        else:
            raise TypeError(
                "preconditioner must be callable, (x, grad, t) -> p, or a tensor, "
                f"got {type(preconditioner).__name__}"
            )

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """-p grad f(x), shape of x."""
        gradient = self.gradient(x)
        given = self.preconditioner
        diagonal = given if isinstance(given, Tensor) else given(x, gradient, t)
        return -_scaled(diagonal, gradient, "preconditioner")


def _scaled(factor: Tensor | float, gradient: Tensor, name: str) -> Tensor:
    """Factor times gradient, in the gradient's shape and dtype."""
    if type(factor) is Tensor and factor.shape == gradient.shape and factor.dtype is gradient.dtype:
        return factor * gradient
    if isinstance(factor, Tensor):
        if not factor.is_floating_point():
            raise TypeError(f"{name} must give floating point, got dtype {factor.dtype}")
        if factor.numel() == 1:
            factor = factor.reshape(())
        if not _fits(factor, gradient):
            raise ValueError(
                f"{name} gives shape {tuple(factor.shape)}, which does not broadcast to the shape "
                f"of x, {tuple(gradient.shape)}"
            )
        factor = factor.to(gradient.dtype)
    elif not isinstance(factor, (int, float)):
        raise TypeError(f"{name} must give a tensor or a number, got {type(factor).__name__}")
    return factor * gradient


def _fits(factor: Tensor, gradient: Tensor) -> bool:
    """Whether a factor broadcasts to exactly the gradient's shape."""
    trailing = gradient.shape[gradient.ndim - factor.ndim :]
    return factor.ndim <= gradient.ndim and all(
        own in (1, size) for own, size in zip(factor.shape, trailing, strict=True)
    )
