"""What an objective is, and its gradient by whichever road it offers.

Conventions. A point is `x` of shape (..., d); an objective returns one value a sample, of shape
(...,). For a single point that is x of shape (d,) and a 0-d value.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .differentiation import value_and_gradient

Objective: TypeAlias = Callable[[Tensor], Tensor]


class Problem(nn.Module, ABC):
    """An objective f that knows its dimension and, where there are any, its constants.

    A subclass sets `dim`, defines `forward`, and overrides whatever else it knows. Everything is
    written in differentiable torch operations, so `gradient` can be differentiated again, to x and
    to any tensor of the problem that requires grad.

    Attributes:
        dim: The number of unknowns d.
        takes_rows: Whether several points may be given at once, x of shape (k, d), faster than one
            by one: criteria are then looked at inside of a step in one call.
    """

    dim: int
    takes_rows: bool = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """f(x), shape (...,), for x of shape (..., d)."""

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient, shape (..., d); by autograd unless a subclass knows better."""
        return _autograd_gradient(self, x)[0]

    def lipschitz(self) -> float | None:
        """A Lipschitz constant of the gradient on all of R^d; None where none is known."""
        return None

    @property
    def minimum(self) -> float | None:
        """The least value f*, or None where it is not known."""
        return None

    @property
    def minimizer(self) -> Tensor | None:
        """A point x* with f(x*) = f*, shape (d,), or None where none is known."""
        return None

    @property
    def lower_bound(self) -> float | None:
        """A number that f never falls below: f* where known, else a cruder bound or None."""
        return self.minimum

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the problem's data, which x has to share; None where there are no data."""
        return None

    def _check_point(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(
                f"x must have shape (..., {self.dim}) for this {type(self).__name__}, "
                f"got {tuple(x.shape)}"
            )
        if self.dtype is not None and x.dtype != self.dtype:
            raise ValueError(
                f"x has dtype {x.dtype} but the data of this {type(self).__name__} are "
                f"{self.dtype}; convert one of them"
            )


def objective_gradient(objective: Objective, x: Tensor) -> Tensor:
    """The gradient of an objective, in every autograd mode.

    `objective.gradient(x)` where the objective has such a method, else reverse-mode
    differentiation of f summed over the samples. With grad enabled the result carries the graph
    (`create_graph=True`): it is differentiable, more than once, to x and to every tensor inside f
    that requires grad. Under `torch.no_grad()` grad is enabled inside and the result is detached.

    Args:
        objective: A `Problem`, or any callable x -> f(x), one value a sample.
        x: Shape (..., d), floating point; need not require grad.

    Returns:
        grad f(x), shape and dtype of x.

    Raises:
        TypeError: `objective` not callable, x or f(x) not a floating-point tensor.
        ValueError: f(x) is not one value a sample, or does not depend on x.
    """
    return gradient_and_batch_dims(objective, x)[0]


def gradient_and_batch_dims(objective: Objective, x: Tensor) -> tuple[Tensor, int]:
    """The gradient, and how many leading dimensions of x count samples (x.ndim - 1 for Problems).

    A plain callable says so by its value: f(x) of shape () for x of shape (m, n) makes the whole
    matrix one sample. See `objective_gradient` for arguments and errors.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got dtype {x.dtype}")
    own: Any = getattr(objective, "gradient", None)
    if not callable(own):
        return _autograd_gradient(objective, x)
    gradient = own(x)
    if type(gradient) is Tensor and gradient.shape == x.shape:
        return gradient, max(x.ndim - 1, 0)
    if not isinstance(gradient, Tensor):
        raise TypeError(f"objective.gradient must return a tensor, got {type(gradient).__name__}")
    if gradient.shape != x.shape:
        raise ValueError(
            f"objective.gradient must return the shape of x, {tuple(x.shape)}, "
            f"got {tuple(gradient.shape)}"
        )
    return gradient, max(x.ndim - 1, 0)


def check_objective(objective: object) -> None:
    """Raise a TypeError that names `objective` where it cannot be called."""
    if not callable(objective):
        raise TypeError(f"objective must be callable, x -> f(x), got {type(objective).__name__}")


def _autograd_gradient(objective: Objective, x: Tensor) -> tuple[Tensor, int]:
    check_objective(objective)

    def checked(point: Tensor) -> Tensor:
        value = objective(point)
        _check_value(value, x)
        return value

    value, gradient = value_and_gradient(checked, x)
    if gradient is None:
        raise ValueError(
            "objective does not depend on x as far as autograd can see: its value must be computed "
            "from x by torch operations (no .item(), .detach(), numpy or no_grad on the way)"
        )
    return gradient, value.ndim


def _check_value(value: object, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"objective must return a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"objective must return floating point, got dtype {value.dtype}")
    leading = value.shape == x.shape[: value.ndim]
    if not leading or (value.ndim == x.ndim and x.ndim > 0):
        expected = f"{tuple(x.shape[:-1])}" if x.ndim < 2 else f"{tuple(x.shape[:-1])} or ()"
        raise ValueError(
            f"objective must return one value a sample, shape {expected} for x of shape "
            f"{tuple(x.shape)}, got shape {tuple(value.shape)}"
        )
