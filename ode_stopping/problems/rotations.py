"""Orthogonal bases for quadratics, dense and as products of few reflections.

A quadratic in its own eigenbasis hides what happens in a general one (the instability of a state
integrated backward, for instance), so test problems are rotated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def random_rotation(
    dim: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """An orthogonal matrix drawn from the Haar measure, shape (dim, dim).

    The Q factor of a standard normal matrix, its columns multiplied by the signs of R's diagonal;
    without the signs Q is not uniformly distributed. Drawn in float64 on the CPU, so that a seed
    means the same matrix, up to rounding, in every dtype and on every device.

    Raises:
        ValueError: dim < 1.
    """
    _check_dim(dim)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    diagonal = torch.diagonal(r)
    signs = torch.where(diagonal < 0, -torch.ones_like(diagonal), torch.ones_like(diagonal))
    return (q * signs).to(dtype=dtype, device=device)


class HouseholderRotation(nn.Module):
    """R = H_1 ... H_k with reflections H_j = I - 2 v_j v_j^T, |v_j| = 1, applied in O(k d).

    For dimensions where a dense basis does not fit (d = 1e4 is 800 MB in float64). The product is
    applied in its compact form R = I - V^T S V, V the vectors as rows and S upper triangular
    (k, k), which is two thin products rather than k dependent ones.

    Args:
        vectors: Shape (k, d), no row zero; they are normalised.

    Raises:
        TypeError: `vectors` is not floating point.
        ValueError: Not of shape (k, d) with k >= 1, or a row that is zero or not finite.
    """

    vectors: Tensor
    factor: Tensor

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        if not vectors.is_floating_point():
            raise TypeError("vectors must be a floating-point tensor of shape (k, d)")
        if vectors.ndim != 2 or vectors.shape[0] < 1:
            raise ValueError(f"vectors must have shape (k, d), got {tuple(vectors.shape)}")
        vectors = vectors.detach()
        lengths = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
        if not bool(((lengths > 0) & torch.isfinite(lengths)).all()):
            raise ValueError("vectors must be finite and have no zero row")
        self.register_buffer("vectors", vectors / lengths)
        self.register_buffer("factor", _compact_factor(self.vectors))

    @classmethod
    def random(
        cls,
        dim: int,
        *,
        reflections: int = 4,
        seed: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> HouseholderRotation:
        """Reflections in uniformly distributed directions, drawn in float64 on the CPU.

        Raises:
            ValueError: dim < 1 or reflections < 1.
        """
        _check_dim(dim)
        if reflections < 1:
            raise ValueError(f"reflections must be at least 1, got {reflections}")
        generator = torch.Generator().manual_seed(seed)
        vectors = torch.randn(reflections, dim, generator=generator, dtype=torch.float64)
        return cls(vectors.to(dtype=dtype, device=device))

    @property
    def dim(self) -> int:
        """The dimension d of the space."""
        return self.vectors.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        """R x for x of shape (..., d)."""
        return x - (x @ self.vectors.mT) @ self.factor.mT @ self.vectors

    def inverse(self, x: Tensor) -> Tensor:
        """R^T x for x of shape (..., d)."""
        return x - (x @ self.vectors.mT) @ self.factor @ self.vectors

    def dense(self) -> Tensor:
        """The matrix R, shape (d, d); for small d."""
        identity = torch.eye(self.dim, dtype=self.vectors.dtype, device=self.vectors.device)
        return self.forward(identity).mT


def geometric_spectrum(
    dim: int,
    condition: float,
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Eigenvalues spaced evenly on a logarithmic axis from 1 to `condition`, shape (dim,).

    Raises:
        ValueError: dim < 1, condition < 1, or dim = 1 with a condition other than 1.
    """
    _check_dim(dim)
    if not 1 <= condition < math.inf:
        raise ValueError(f"condition must be finite and at least 1, got {condition}")
    if dim == 1 and condition != 1:
        raise ValueError(f"condition must be 1 where dim is 1, got {condition}")
    exponents = torch.linspace(0.0, math.log(condition), dim, dtype=torch.float64)
    spectrum = torch.exp(exponents)
    spectrum[-1] = condition  # exact, where exp(log(.)) may be off in the last digit
    return spectrum.to(dtype=dtype, device=device)


def _check_dim(dim: int) -> None:
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")


def _compact_factor(vectors: Tensor) -> Tensor:
    # One more reflection: (I - V^T S V)(I - 2 v v^T) = I - V^T S V - 2 v v^T + 2 V^T S (V v) v^T,
    # so S grows by the column (-2 S V v, 2).
    count = vectors.shape[0]
    gram = vectors @ vectors.mT
    factor = torch.zeros(count, count, dtype=vectors.dtype, device=vectors.device)
    for j in range(count):
        factor[:j, j] = -2.0 * (factor[:j, :j] @ gram[:j, j])
        factor[j, j] = 2.0
    return factor
