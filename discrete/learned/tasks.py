"""What a learned optimiser is trained on: batches of problems with starts, criteria and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ode_stopping.core.validation import (
    checked_number,
    described,
    require_callable,
    require_whole,
)
from ode_stopping.criteria import GradientNorm
from ode_stopping.problems import LogisticRegression, SmoothSVM
from ode_stopping.problems.base import check_objective, objective_gradient

from .arguments import check_minibatch, require_floats
from .draws import rows_of_step

__all__ = ["LinearBatch", "MetaTask", "RosenbrockBatch"]


@dataclass(frozen=True)
class MetaTask:
    """B independent problems of one kind.

    Attributes:
        objective: x of shape (B, d) to f, shape (B,); its method `value_and_gradient(x)`, where it
            has one, gives both at once, and `gradient_at(k, x)` the gradient that step k is given
            (None: that of f).
        x0: Starts, shape (B, d).
        criterion: (t, x) -> J, shape (B,); None: the norm of the gradient; "decrease": the plain
            difference f(x_{k-1}) - f(x_k), as the paper prints it, which a rise of f meets as well.
        targets: eps, shape (K,): N is the mean over a ladder of them.

    Raises:
        TypeError: An objective or criterion that cannot be called; x0 or targets that are no
            floating-point tensors.
        ValueError: Shapes that do not fit; a target that is not finite, or not positive where the
            criterion is known to be never negative.
    """

    objective: Callable[[Tensor], Tensor]
    x0: Tensor
    criterion: Callable[[Tensor, Tensor], Tensor] | Literal["decrease"] | None = None
    targets: Tensor = field(default_factory=lambda: torch.tensor([1e-3], dtype=torch.float64))

    def __post_init__(self) -> None:
        check_objective(self.objective)
        require_floats(self.x0, ("B", "d"), name="x0")
        require_floats(self.targets, ("K",), name="targets")
        criterion = self.criterion
        if isinstance(criterion, str) and criterion != "decrease":
            raise ValueError(f'criterion must be callable, "decrease" or None; got {criterion!r}')
        if criterion is not None and not isinstance(criterion, str):
            require_callable(criterion, name="criterion", call="(t, x) -> J")
        bounded = criterion is None or getattr(criterion, "nonnegative", False) is True
        good = self.targets > 0 if bounded else self.targets == self.targets
        if not bool((good & self.targets.isfinite()).all()):
            kind = "finite and positive" if bounded else "finite"
            raise ValueError(f"targets must be {kind}; got {self.targets.tolist()}")

    def __len__(self) -> int:
        return len(self.x0)

    @property
    def measured(self) -> Any:
        """The criterion: a callable, or "decrease"."""
        if self.criterion is not None:
            return self.criterion
        return GradientNorm(self.objective, squared=False)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f, shape (B,), and its gradient, shape (B, d), without graph.

        Raises:
            ValueError: The objective returns other shapes: a number for all problems together
                would be spread over them without a word.
        """
        own: Any = getattr(self.objective, "value_and_gradient", None)
        with torch.no_grad():
            if own is not None:
                value, gradient = own(x)
            else:
                value, gradient = self.objective(x), objective_gradient(self.objective, x)
        if value.shape != x.shape[:1] or gradient.shape != x.shape:
            raise ValueError(
                f"the objective must return one value a problem, {tuple(x.shape[:1])}, and a "
                f"gradient of the shape of x, {tuple(x.shape)}; got {tuple(value.shape)} and "
                f"{tuple(gradient.shape)}"
            )
        return value, gradient


def check_labels(labels: Tensor, loss: object) -> None:
    """Raise unless the loss is known, and the labels are such that it can take them.

    Raises:
        ValueError: Naming the argument.
    """
    if not isinstance(loss, str) or loss not in _LOSSES:
        raise ValueError(f"loss must be one of {sorted(_LOSSES)}; got {loss!r}")
    if loss != "squares" and not bool((labels.abs() == 1).all()):
        raise ValueError(
            f"labels must be -1 or +1 for the loss {loss!r}; got numbers from "
            f"{float(labels.min()):g} to {float(labels.max()):g}"
        )


class LinearBatch(nn.Module):
    """B linear models with data of their own.

        f_b(x) = (1/n) sum_i loss(a_bi . x; y_bi) + ridge/2 |x|^2 + l1 sum_j (sqrt(x_j^2 + s^2) - s)

    Args:
        features: a, shape (B, n, d).
        labels: y, shape (B, n): -1 and +1 for "logistic" and "svm" (the squared hinge, halved);
            numbers for "squares" (half the squared residual).
        loss: Which.
        ridge: >= 0.
        l1: Weight of the smoothed absolute values, >= 0.
        smoothing: s > 0.
        minibatch: Rows that step k sees; None: all. They are drawn anew every step, of all problems
            alike, from `seed` and k.
        seed: For the rows.

    Raises:
        TypeError: Data that are no floating-point tensors; no numbers.
        ValueError: Unknown loss; shapes or labels that do not fit; a weight that is negative, a
            smoothing that is not positive; a minibatch of more than n rows.
    """

    features: Tensor
    labels: Tensor
    transposed: Tensor

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        loss: str = "logistic",
        ridge: float = 0.0,
        l1: float = 0.0,
        smoothing: float = 1e-2,
        minibatch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_floats(features, ("B", "n", "d"), name="features")
        require_floats(labels, ("B", "n"), name="labels")
        if labels.shape != features.shape[:2] or labels.dtype != features.dtype:
            raise ValueError(
                "labels must have the shape (B, n) and the type of features; got "
                f"{described(features)} and {described(labels)}"
            )
        check_labels(labels, loss)
        ridge = checked_number(ridge, name="ridge", low=0.0, closed=True)
        l1 = checked_number(l1, name="l1", low=0.0, closed=True)
        smoothing = checked_number(smoothing, name="smoothing", low=0.0)
        require_whole(seed, name="seed")
        check_minibatch(minibatch, features.shape[1])
        self.register_buffer("features", features)
        self.register_buffer("labels", labels)
        # A vector times a matrix that lies by rows is twice as fast as the other way round.
        self.register_buffer("transposed", features.mT.contiguous())
        self.loss, self.ridge, self.l1, self.smoothing = loss, ridge, l1, smoothing
        self.minibatch, self.seed = minibatch, seed

    def forward(self, x: Tensor) -> Tensor:
        """f, shape (B,)."""
        values = _LOSSES[self.loss][0](self._scores(x, self.transposed), self.labels).mean(-1)
        return values + self._penalty(x)

    def gradient(self, x: Tensor) -> Tensor:
        """Its gradient, shape (B, d)."""
        scores = self._scores(x, self.transposed)
        return self._gradient(x, scores, self.features, self.labels)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both, from one product with the data."""
        scores = self._scores(x, self.transposed)
        value = _LOSSES[self.loss][0](scores, self.labels).mean(-1) + self._penalty(x)
        return value, self._gradient(x, scores, self.features, self.labels)

    def gradient_at(self, k: int, x: Tensor) -> Tensor | None:
        """The gradient that step k is given: of its minibatch; None: that of f."""
        if self.minibatch is None:
            return None
        chosen = rows_of_step(self.features.shape[1], self.minibatch, self.seed, k, x.device)
        features, labels = self.features[:, chosen], self.labels[:, chosen]
        return self._gradient(x, self._scores(x, features.mT), features, labels)

    def _scores(self, x: Tensor, transposed: Tensor) -> Tensor:
        return torch.bmm(x.unsqueeze(1), transposed).squeeze(1)

    def _gradient(self, x: Tensor, scores: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        slopes = _LOSSES[self.loss][1](scores, labels) / labels.shape[1]
        gradient = torch.bmm(slopes.unsqueeze(1), features).squeeze(1)
        if self.ridge:
            gradient = gradient + self.ridge * x
        if self.l1:
            gradient = gradient + self.l1 * x / (x.square() + self.smoothing**2).sqrt()
        return gradient

    def _penalty(self, x: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[:-1])
        if self.ridge:
            total = total + 0.5 * self.ridge * x.square().sum(-1)
        if self.l1:
            smooth = (x.square() + self.smoothing**2).sqrt() - self.smoothing
            total = total + self.l1 * smooth.sum(-1)
        return total


Pointwise = Callable[[Tensor, Tensor], Tensor]
# Of scores and labels: the loss, and its derivative to the scores.
_LOSSES: dict[str, tuple[Pointwise, Pointwise]] = {
    "logistic": (
        lambda z, y: LogisticRegression.loss(y * z),
        lambda z, y: y * LogisticRegression.loss_derivative(y * z),
    ),
    "svm": (
        lambda z, y: SmoothSVM.loss(y * z),
        lambda z, y: y * SmoothSVM.loss_derivative(y * z),
    ),
    "squares": (lambda z, y: 0.5 * (z - y).square(), lambda z, y: z - y),
}


class RosenbrockBatch(nn.Module):
    """B valleys of their own steepness: f_b(x) = sum_i c_b (x_{i+1} - x_i^2)^2 + (1 - x_i)^2.

    Args:
        steepness: c > 0, shape (B,).

    Raises:
        TypeError: No floating-point tensor.
        ValueError: Another shape, or a steepness that is not positive and finite.
    """

    steepness: Tensor

    def __init__(self, steepness: Tensor) -> None:
        super().__init__()
        require_floats(steepness, ("B",), name="steepness")
        if not bool(((steepness > 0) & steepness.isfinite()).all()):
            raise ValueError("steepness must be positive and finite in all problems")
        self.register_buffer("steepness", steepness)

    def forward(self, x: Tensor) -> Tensor:
        """f, shape (B,).

        Raises:
            ValueError: x has fewer than 2 coordinates.
        """
        if x.shape[-1] < 2:
            raise ValueError(f"x must have shape (B, d) with d >= 2; got {tuple(x.shape)}")
        here, following = x[..., :-1], x[..., 1:]
        valley = (following - here * here).square().sum(-1)
        return self.steepness * valley + (1.0 - here).square().sum(-1)
