"""Batches of small networks as objectives of all their parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ode_stopping.core.validation import checked_number, described, require_count, require_whole
from ode_stopping.problems.base import objective_gradient

from .arguments import check_minibatch
from .draws import rows_of_step

__all__ = ["NetworkBatch"]


class NetworkBatch(nn.Module):
    """B classifiers with one hidden layer (tanh) on data of their own.

    f_b(x) is the mean cross-entropy + ridge/2 |x|^2, x = (W1, b1, W2, b2) in one vector.

    Args:
        inputs: Shape (B, n, features).
        labels: Classes, integers, shape (B, n).
        hidden: Width.
        ridge: >= 0.
        classes: How many; None: the largest of the labels and one. Batches of few samples may lack
            a class, and would then have fewer parameters than others.
        minibatch: Rows that step k sees; None: all. They are drawn anew every step, of all problems
            alike, from `seed` and k.
        seed: For the rows.

    Raises:
        TypeError: Inputs that are no floating-point tensor, labels that are no int64; no numbers.
        ValueError: Shapes that do not fit; labels outside 0 .. classes - 1; a negative ridge;
            a minibatch of more than n rows.

    Attributes:
        dim: d.
        initial_sizes: Standard deviation of every parameter at a usual start, shape (d,), float64
            on the CPU, where starts are drawn.
    """

    inputs: Tensor
    labels: Tensor

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        *,
        hidden: int = 16,
        ridge: float = 0.0,
        classes: int | None = None,
        minibatch: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise TypeError(f"inputs must be a floating-point tensor; got {described(inputs)}")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            raise TypeError(f"labels must be a tensor of int64; got {described(labels)}")
        if inputs.ndim != 3 or labels.shape != inputs.shape[:2] or 0 in inputs.shape:
            raise ValueError(
                "inputs must have shape (B, n, features) and labels (B, n); got "
                f"{tuple(inputs.shape)} and {tuple(labels.shape)}"
            )
        require_count(hidden, name="hidden")
        ridge = checked_number(ridge, name="ridge", low=0.0, closed=True)
        classes = int(labels.max()) + 1 if classes is None else classes
        require_count(classes, name="classes")
        if bool(((labels < 0) | (labels >= classes)).any()):
            raise ValueError(f"labels must be from 0 to classes - 1 = {classes - 1}")
        check_minibatch(minibatch, inputs.shape[1])
        require_whole(seed, name="seed")
        self.minibatch, self.seed = minibatch, seed
        self.register_buffer("inputs", inputs)
        self.register_buffer("labels", labels)
        features = inputs.shape[-1]
        self._shapes = [(features, hidden), (1, hidden), (hidden, classes), (1, classes)]
        self._counts = [rows * columns for rows, columns in self._shapes]
        self.dim = sum(self._counts)
        self.ridge = ridge
        sizes = [features**-0.5, 0.0, hidden**-0.5, 0.0]
        self.initial_sizes = torch.tensor(sizes, dtype=torch.float64).repeat_interleave(
            torch.tensor(self._counts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """f, shape (B,)."""
        return self._value(x, self.inputs, self.labels)

    def gradient_at(self, k: int, x: Tensor) -> Tensor | None:
        """The gradient that step k is given: of its minibatch; None: that of f."""
        if self.minibatch is None:
            return None
        chosen = rows_of_step(self.labels.shape[1], self.minibatch, self.seed, k, x.device)
        inputs, labels = self.inputs[:, chosen], self.labels[:, chosen]
        return objective_gradient(lambda y: self._value(y, inputs, labels), x)

    def _value(self, x: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        parts = torch.split(x, self._counts, dim=-1)
        w1, b1, w2, b2 = (
            part.reshape(len(x), *shape) for part, shape in zip(parts, self._shapes, strict=True)
        )
        hidden = (torch.baddbmm(b1, inputs, w1)).tanh()
        scores = torch.baddbmm(b2, hidden, w2)
        chosen = scores.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        value = (scores.logsumexp(-1) - chosen).mean(-1)
        return value + 0.5 * self.ridge * x.square().sum(-1) if self.ridge else value
