"""Batches of small networks as objectives of all their parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["NetworkBatch"]


class NetworkBatch(nn.Module):
    """B classifiers with one hidden layer (tanh) on data of their own.

    f_b(x) is the mean cross-entropy + ridge/2 |x|^2, x = (W1, b1, W2, b2) in one vector.

    Args:
        inputs: Shape (B, n, features).
        labels: Classes, integers, shape (B, n).
        hidden: Width.
        ridge: >= 0.

    Attributes:
        dim: d.
        initial_sizes: Standard deviation of every parameter at a usual start, shape (d,).
    """

    inputs: Tensor
    labels: Tensor
    initial_sizes: Tensor

    def __init__(
        self, inputs: Tensor, labels: Tensor, *, hidden: int = 16, ridge: float = 0.0
    ) -> None:
        super().__init__()
        self.register_buffer("inputs", inputs)
        self.register_buffer("labels", labels)
        features, classes = inputs.shape[-1], int(labels.max()) + 1
        self._shapes = [(features, hidden), (1, hidden), (hidden, classes), (1, classes)]
        self._counts = [rows * columns for rows, columns in self._shapes]
        self.dim = sum(self._counts)
        self.ridge = ridge
        sizes = [features**-0.5, 0.0, hidden**-0.5, 0.0]
        parts = [inputs.new_full((n,), size) for n, size in zip(self._counts, sizes, strict=True)]
        self.register_buffer("initial_sizes", torch.cat(parts))

    def forward(self, x: Tensor) -> Tensor:
        """f, shape (B,)."""
        parts = torch.split(x, self._counts, dim=-1)
        w1, b1, w2, b2 = (
            part.reshape(len(x), *shape) for part, shape in zip(parts, self._shapes, strict=True)
        )
        hidden = (torch.baddbmm(b1, self.inputs, w1)).tanh()
        scores = torch.baddbmm(b2, hidden, w2)
        chosen = scores.gather(-1, self.labels.unsqueeze(-1)).squeeze(-1)
        value = (scores.logsumexp(-1) - chosen).mean(-1)
        return value + 0.5 * self.ridge * x.square().sum(-1) if self.ridge else value
