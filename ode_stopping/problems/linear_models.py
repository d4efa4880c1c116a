"""Linear classification: logistic regression and the smooth support vector machine.

Both are sums of a convex loss of the margins m_i = y_i (a_i . x), labels y_i in {-1, +1}. The
state x holds the weights and, where there is an intercept, b as its last entry with
a_i = (row_i, -1), so that m_i = y_i (row_i . w - b).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..core.memo import shared
from .base import Problem
from .tensors import ArrayLike, Number, as_floating, attach, scalar

# log(1 + e^z) - z is below one unit of rounding in float64 from z = 37 on. The default threshold of
# softplus is 20, where it would make a jump of 2e-9.
_SOFTPLUS_THRESHOLD = 40.0


class LinearModel(Problem):
    """f(x) = c sum_i loss(y_i (a_i . x)) + reg/2 |x|^2, with c = 1/n ("mean") or 1 ("sum").

    The penalty is on the whole of x, the intercept included. The gradient is
    c sum_i loss'(m_i) y_i a_i + reg x, with Lipschitz constant c max(loss'') s^2 + reg, where s is
    the largest singular value of the matrix of the a_i.

    A subclass gives the loss of a margin, its derivative and the bound on its second derivative.

    Args:
        X: Dense data, shape (n, features), array or tensor; kept as the object it is (a tensor that
            requires grad gets its gradient), without a copy for the intercept.
        y: n labels, exactly -1 and +1.
        regularization: reg >= 0, a number or a 0-d tensor (kept as the object it is).
        intercept: Whether a column of -1 is appended.
        reduction: "mean" or "sum".

    Raises:
        TypeError: X, y or regularization of the wrong kind (sparse data, say).
        ValueError: Shapes, labels, reduction or the sign of regularization; X not finite.
    """

    takes_rows = True
    curvature: ClassVar[float]
    features: Tensor
    labels: Tensor
    regularization: Tensor

    def __init__(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        regularization: Tensor | Number = 0.0,
        intercept: bool = False,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        features = as_floating(X, "X")
        if features.ndim != 2 or 0 in features.shape:
            raise ValueError(f"X must have shape (samples, features), got {tuple(features.shape)}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
        attach(self, "features", features)
        self.register_buffer("labels", _labels(y, features))
        attach(self, "regularization", scalar(regularization, "regularization"))
        if float(self.regularization.detach()) < 0:
            raise ValueError(
                f"regularization must not be negative, got {float(self.regularization.detach())}"
            )
        self.intercept = bool(intercept)
        self.reduction = reduction
        self.samples = features.shape[0]
        self.dim = features.shape[1] + int(self.intercept)
        self._scale = 1.0 / self.samples if reduction == "mean" else 1.0

    @staticmethod
    @abstractmethod
    def loss(margins: Tensor) -> Tensor:
        """The loss of each margin, same shape."""

    @staticmethod
    @abstractmethod
    def loss_derivative(margins: Tensor) -> Tensor:
        """The derivative of the loss at each margin, same shape."""

    @property
    def dtype(self) -> torch.dtype:
        """The type of the data."""
        return self.features.dtype

    def margins(self, x: Tensor) -> Tensor:
        """m_i = y_i (a_i . x), shape (..., n)."""
        self._check_point(x)
        return shared(self, "margins", x, lambda: self._margins(x))

    def _margins(self, x: Tensor) -> Tensor:
        if self.intercept:
            scores = x[..., :-1] @ self.features.mT - x[..., -1:]
        else:
            scores = x @ self.features.mT
        return self.labels * scores

    def forward(self, x: Tensor) -> Tensor:
        """f(x), shape (...,)."""
        losses = self._scale * self.loss(self.margins(x)).sum(-1)
        # reg multiplies before the sum, so that the type stays that of x (0-d rule of promotion).
        return losses + 0.5 * (self.regularization * x * x).sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """The gradient, shape (..., d)."""
        slopes = self._scale * self.labels * self.loss_derivative(self.margins(x))
        gradient = slopes @ self.features
        if self.intercept:
            gradient = torch.cat((gradient, -slopes.sum(-1, keepdim=True)), dim=-1)
        return gradient + self.regularization * x

    def lipschitz(self) -> float:
        """L = c max(loss'') s^2 + reg, the norm of the Hessian at x = 0 (see `LinearModel`)."""
        with torch.no_grad():
            rows = self.features
            if self.intercept:
                rows = torch.cat((rows, -torch.ones_like(rows[:, :1])), dim=-1)
            gram = rows @ rows.mT if rows.shape[0] < rows.shape[1] else rows.mT @ rows
            largest = float(torch.linalg.eigvalsh(gram)[-1])
            return self._scale * self.curvature * largest + float(self.regularization.detach())

    @property
    def lower_bound(self) -> float:
        """0: losses and penalty are never negative. The minimum itself is not known."""
        return 0.0

    def extra_repr(self) -> str:
        """The sizes and options, for printing."""
        return (
            f"samples={self.samples}, dim={self.dim}, intercept={self.intercept}, "
            f"regularization={float(self.regularization.detach()):g}, "
            f"reduction={self.reduction!r}"
        )


class LogisticRegression(LinearModel):
    """f(x) = c sum_i log(1 + exp(-m_i)) + reg/2 |x|^2, m_i = y_i (a_i . x).

    Evaluated without overflow for any margin; grad = -c sum_i y_i a_i / (1 + exp(m_i)) + reg x,
    Lipschitz constant c s^2/4 + reg. Arguments and errors: see `LinearModel`.
    """

    curvature = 0.25

    @staticmethod
    def loss(margins: Tensor) -> Tensor:
        """log(1 + exp(-m))."""
        return functional.softplus(-margins, threshold=_SOFTPLUS_THRESHOLD)

    @staticmethod
    def loss_derivative(margins: Tensor) -> Tensor:
        """-1/(1 + exp(m))."""
        return -torch.sigmoid(-margins)


class SmoothSVM(LinearModel):
    """f(x) = c sum_i max(0, 1 - m_i)^2 / 2 + reg/2 |x|^2, m_i = y_i (row_i . w - b).

    The squared hinge loss, by default with intercept and as a SUM over the samples.
    grad = -c sum_i max(0, 1 - m_i) y_i a_i + reg x is continuous, with Lipschitz constant
    c s^2 + reg, but has kinks where a margin passes 1: f is C1 and not C2, so |grad f|^2 is only
    Lipschitz and a stopping criterion that must be smooth is f itself.
    Arguments and errors: see `LinearModel`.
    """

    curvature = 1.0

    def __init__(
        self,
        X: ArrayLike,
        y: ArrayLike,
        *,
        regularization: Tensor | Number = 0.0,
        intercept: bool = True,
        reduction: Literal["mean", "sum"] = "sum",
    ) -> None:
        super().__init__(
            X, y, regularization=regularization, intercept=intercept, reduction=reduction
        )

    @staticmethod
    def loss(margins: Tensor) -> Tensor:
        """max(0, 1 - m)^2 / 2."""
        slack = torch.relu(1.0 - margins)
        return 0.5 * slack * slack

    @staticmethod
    def loss_derivative(margins: Tensor) -> Tensor:
        """-max(0, 1 - m)."""
        return -torch.relu(1.0 - margins)


def _labels(y: ArrayLike, features: Tensor) -> Tensor:
    values = y.detach() if isinstance(y, Tensor) else torch.as_tensor(np.array(y))
    if values.shape != (features.shape[0],):
        raise ValueError(
            f"y must have shape ({features.shape[0]},), one label a row of X, "
            f"got {tuple(values.shape)}"
        )
    if values.dtype == torch.bool or not bool(((values == 1) | (values == -1)).all()):
        found = sorted(set(values.tolist()))
        shown = ", ".join(str(v) for v in found[:5]) + (", ..." if len(found) > 5 else "")
        raise ValueError(
            f"y must hold exactly the labels -1 and +1, got {shown}; labels 0 and 1 become "
            "2 * y - 1"
        )
    return values.to(dtype=features.dtype, device=features.device)
