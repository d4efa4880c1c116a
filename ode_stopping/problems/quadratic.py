"""Quadratics of a given spectrum, plain and with a quartic term."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.memo import shared
from .base import Problem
from .rotations import HouseholderRotation
from .tensors import ArrayLike, Number, as_floating, attach, scalar

_LONG = 256


class Quadratic(Problem):
    """f(x) = x^T Q x / 2 with a symmetric, positive semidefinite Q.

    Q is one of

    * diag(l), for a spectrum l of shape (d,) and no rotation;
    * R diag(l) R^T, for a spectrum and a rotation R;
    * the matrix itself, for a (d, d) tensor.

    f* = 0 at x* = 0. The smallest Lipschitz constant of the gradient is the largest eigenvalue.

    Where nothing of it requires grad, R diag(l) R^T is multiplied out once; where the spectrum or
    the rotation does, it is applied factor by factor, so that each evaluation has a graph of its
    own. A matrix that requires grad acts through its symmetric part (Q + Q^T)/2: that is the
    gradient of x^T Q x / 2 with independent entries, hence consistent with differentiating f.

    Args:
        matrix_or_spectrum: Shape (d,) or (d, d). A tensor is kept as the object it is.
        rotation: None, an orthogonal (d, d) tensor, or a `HouseholderRotation` (O(d) memory).

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Not square, not symmetric, not positive semidefinite (beyond rounding), not
            orthogonal, shapes that do not match, or a rotation beside a matrix.
    """

    takes_rows = True
    spectrum: Tensor | None
    matrix: Tensor | None
    rotation: Tensor | HouseholderRotation | None
    _product: Tensor | None

    def __init__(
        self,
        matrix_or_spectrum: ArrayLike,
        *,
        rotation: Tensor | HouseholderRotation | None = None,
    ) -> None:
        super().__init__()
        given = as_floating(matrix_or_spectrum, "matrix_or_spectrum")
        if given.ndim == 2:
            if rotation is not None:
                raise ValueError("rotation goes with a spectrum; a matrix is used as it is")
            _check_matrix(given)
            self.spectrum = None
            attach(self, "matrix", given)
        else:
            _check_spectrum(given)
            self.matrix = None
            attach(self, "spectrum", given)
        self.dim = given.shape[0]
        self._set_rotation(rotation, given)

    def _set_rotation(self, rotation: Tensor | HouseholderRotation | None, given: Tensor) -> None:
        product = None
        if isinstance(rotation, Tensor):
            _check_rotation(rotation, given)
            attach(self, "rotation", rotation)
            if not (given.requires_grad or rotation.requires_grad):
                product = (rotation * given) @ rotation.mT
                product = 0.5 * (product + product.mT)
        elif isinstance(rotation, HouseholderRotation):
            if rotation.dim != self.dim or rotation.vectors.dtype != given.dtype:
                raise ValueError(
                    f"rotation is of dimension {rotation.dim} and {rotation.vectors.dtype}, "
                    f"the spectrum of dimension {self.dim} and {given.dtype}"
                )
            self.rotation = rotation
        elif rotation is None:
            self.rotation = None
        else:
            raise TypeError(
                "rotation must be None, a tensor or a HouseholderRotation, "
                f"got {type(rotation).__name__}"
            )
        self.register_buffer("_product", product, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the spectrum or matrix."""
        return self._data().dtype

    def _data(self) -> Tensor:
        data = self.matrix if self.spectrum is None else self.spectrum
        assert data is not None  # one of the two is always set
        return data

    def product(self, x: Tensor) -> Tensor:
        """Q x, shape (..., d)."""
        self._check_point(x)
        return shared(self, "product", x, lambda: self._multiplied(x))

    def _multiplied(self, x: Tensor) -> Tensor:
        spectrum, rotation = self.spectrum, self.rotation
        if spectrum is None:
            matrix = self._data()
            if matrix.requires_grad:
                return 0.5 * (x @ matrix + x @ matrix.mT)
            return _symmetric(matrix, x)
        if rotation is None:
            return spectrum * x
        if isinstance(rotation, HouseholderRotation):
            return rotation.forward(spectrum * rotation.inverse(x))
        # Asked at every call: requires_grad may have been switched on after construction.
        if self._product is not None and not (spectrum.requires_grad or rotation.requires_grad):
            return _symmetric(self._product, x)
        return (spectrum * (x @ rotation)) @ rotation.mT

    def dense(self) -> Tensor:
        """The matrix Q, shape (d, d)."""
        data = self._data()
        return self.product(torch.eye(self.dim, dtype=data.dtype, device=data.device)).mT

    def forward(self, x: Tensor) -> Tensor:
        """x^T Q x / 2, shape (...,)."""
        return 0.5 * (x * Quadratic.product(self, x)).sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """Q x, shape (..., d)."""
        return self.product(x)

    def lipschitz(self) -> float | None:
        """The largest eigenvalue of Q (O(d^3) where a matrix was given)."""
        with torch.no_grad():
            if self.spectrum is not None:
                return float(self.spectrum.max())
            return float(torch.linalg.eigvalsh(self.dense())[-1])

    @property
    def minimum(self) -> float:
        """f* = 0."""
        return 0.0

    @property
    def minimizer(self) -> Tensor:
        """x* = 0 (one of many where Q is singular)."""
        data = self._data()
        return torch.zeros(self.dim, dtype=data.dtype, device=data.device)


class QuarticQuadratic(Quadratic):
    """f(x) = x^T Q x / 2 + c sum_i x_i^4 / 4: a flow without a closed form (theory, form 8).

    Convex, f* = 0 at x* = 0; the gradient Q x + c x^3 has no global Lipschitz constant for c > 0.

    Args:
        matrix_or_spectrum: As in `Quadratic`.
        rotation: As in `Quadratic`.
        quartic: The number c >= 0, or a 0-d tensor, kept as the object it is.

    Raises:
        TypeError, ValueError: As `Quadratic`; `quartic` negative or not 0-d.
    """

    quartic: Tensor

    def __init__(
        self,
        matrix_or_spectrum: ArrayLike,
        *,
        rotation: Tensor | HouseholderRotation | None = None,
        quartic: Tensor | Number = 1.0,
    ) -> None:
        super().__init__(matrix_or_spectrum, rotation=rotation)
        attach(self, "quartic", scalar(quartic, "quartic"))
        if float(self.quartic.detach()) < 0:
            raise ValueError(f"quartic must not be negative, got {float(self.quartic.detach())}")

    def forward(self, x: Tensor) -> Tensor:
        """x^T Q x / 2 + c sum x^4 / 4, shape (...,)."""
        quadratic = super().forward(x)  # first: it checks x
        squares = x * x
        # c multiplies before the sum: two 0-d factors of different types would be promoted, while
        # a 0-d factor and a vector keep the vector's type.
        return quadratic + 0.25 * (self.quartic * squares * squares).sum(-1)

    def gradient(self, x: Tensor) -> Tensor:
        """Q x + c x^3, shape (..., d)."""
        return self.product(x) + self.quartic * (x * x * x)

    def lipschitz(self) -> float | None:
        """None for c > 0; the quadratic's constant for c = 0."""
        return None if float(self.quartic.detach()) > 0 else super().lipschitz()


def _symmetric(matrix: Tensor, x: Tensor) -> Tensor:
    """Q x for each row of x; for one long vector by rows of the matrix, as it lies in memory."""
    return torch.mv(matrix, x) if x.ndim == 1 and len(x) >= _LONG else x @ matrix


def _check_spectrum(spectrum: Tensor) -> None:
    if spectrum.ndim != 1 or spectrum.shape[0] == 0:
        raise ValueError(
            "matrix_or_spectrum must have shape (d,) or (d, d), d >= 1, "
            f"got {tuple(spectrum.shape)}"
        )
    least = float(spectrum.detach().min())
    if least < 0:
        raise ValueError(
            f"matrix_or_spectrum: a spectrum must not be negative, its least is {least}"
        )


def _check_matrix(matrix: Tensor) -> None:
    rows, columns = matrix.shape
    if rows != columns or rows == 0:
        raise ValueError(f"matrix_or_spectrum must be square, got shape {(rows, columns)}")
    matrix = matrix.detach()
    # A product R diag(l) R^T is symmetric and positive semidefinite up to rounding only.
    rounding = torch.finfo(matrix.dtype).eps * float(matrix.abs().max())
    asymmetry = float((matrix - matrix.mT).abs().max())
    if asymmetry > 1e3 * rounding:
        raise ValueError(
            f"matrix_or_spectrum must be symmetric, got max |Q - Q^T| = {asymmetry:.3g}"
        )
    shift = max(10.0 * rows * rounding, torch.finfo(matrix.dtype).tiny)
    shifted = matrix + shift * torch.eye(rows, dtype=matrix.dtype, device=matrix.device)
    if int(torch.linalg.cholesky_ex(shifted).info) != 0:
        least = float(torch.linalg.eigvalsh(matrix)[0])
        raise ValueError(
            "matrix_or_spectrum must be positive semidefinite, "
            f"its smallest eigenvalue is {least:.3g}"
        )


def _check_rotation(rotation: Tensor, spectrum: Tensor) -> None:
    dim = spectrum.shape[0]
    if rotation.shape != (dim, dim):
        raise ValueError(f"rotation must have shape {(dim, dim)}, got {tuple(rotation.shape)}")
    if rotation.dtype != spectrum.dtype:
        raise ValueError(f"rotation is {rotation.dtype}, the spectrum {spectrum.dtype}")
    # Four random probes see a departure from R^T R = I in O(d^2).
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(dim, 4, generator=generator, dtype=torch.float64).to(rotation)
    fixed = rotation.detach()
    defect = float((fixed.mT @ (fixed @ probes) - probes).norm() / probes.norm())
    if not defect <= 1e3 * torch.finfo(rotation.dtype).eps:
        raise ValueError(f"rotation must be orthogonal, R^T R misses the identity by {defect:.3g}")
