"""The problems of the race: the smooth SVM on real data, with starts, constants and minima.

    f(w) = 1/2 sum_i max(0, 1 - y_i (x_i . w' - w_0))^2

a sum over the samples, without penalty, the intercept as an appended column of -1. LIBSVM's data
are taken as they are; those that come with scikit-learn need no network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from ode_stopping.problems import SmoothSVM, available_libsvm, breast_cancer, digits, libsvm

__all__ = [
    "BUNDLED",
    "GIVEN_SEED",
    "LIBSVM",
    "REFERENCE",
    "Reference",
    "SVMProblem",
    "available",
    "load",
    "newton_minimum",
    "seeds_of",
    "start",
]

Array = NDArray[np.float64]
LIBSVM = ("a1a", "a2a", "a3a", "w3a")
BUNDLED = ("breast cancer", "digits")
GIVEN_SEED = 20250128  # of the start that reference figures are for


@dataclass(frozen=True)
class Reference:
    """What is known of a data set: minimum, L and f at the given start, to the digits given."""

    minimum: float
    lipschitz: float
    at_start: float


REFERENCE = {
    "a1a": Reference(313.128619460161, 11644.561488, 695.1990),
    "a2a": Reference(482.344921614634, 16480.128467, 993.5689),
    "a3a": Reference(655.484576352, 23102.249303, 2723.4118),
    "w3a": Reference(60.886055898346, 15578.039648, 2998.3087),
}


@dataclass(frozen=True, eq=False)
class SVMProblem:
    """f and its gradient on NumPy vectors, by two sparse products.

    Attributes:
        name: Of the data.
        rows: y_i (x_i, -1), shape (n, d), sparse: the columns are 0 or 1 and mostly 0.
        columns: Its transpose, kept in rows.
        lipschitz: L, the largest squared singular value of the rows.
        minimum: f*, by `newton_minimum`.
    """

    name: str
    rows: Any
    columns: Any
    lipschitz: float
    minimum: float

    @property
    def dim(self) -> int:
        """d, the intercept included."""
        return int(self.rows.shape[1])

    def __call__(self, w: Array) -> tuple[float, Array]:
        """(f(w), grad f(w)); the gradient is -sum max(0, 1 - m_i) y_i a_i."""
        slack = np.maximum(0.0, 1.0 - self.rows @ w)
        return 0.5 * float(slack @ slack), -(self.columns @ slack)

    def curvature(self, w: Array, vector: Array) -> Array:
        """The Hessian at w times a vector; w on a kink counts as on its flat side."""
        along = np.where(self.rows @ w < 1.0, self.rows @ vector, 0.0)
        return np.asarray(self.columns @ along)


def available(*, libsvm_too: bool = True) -> tuple[str, ...]:
    """The data sets that are here: LIBSVM's where ODE_STOPPING_DATA names a folder, and ours."""
    return (*(available_libsvm() if libsvm_too else ()), *BUNDLED)


@cache
def load(name: str) -> SVMProblem:
    """A problem by the name of its data.

    Raises:
        FileNotFoundError: A LIBSVM set that is not in the folder.
        ValueError: No such name.
    """
    if name in LIBSVM:
        X, y = libsvm(name)
    elif name == "breast cancer":
        X, y = breast_cancer()
    elif name == "digits":
        X, y = digits(classes=(3, 8))
    else:
        raise ValueError(f"no data set {name!r}; there are {[*LIBSVM, *BUNDLED]}")
    return from_data(name, X, y)


def from_data(name: str, X: Any, y: Any) -> SVMProblem:
    """The problem of data X, shape (n, features), with labels y."""
    lipschitz = SmoothSVM(X, y).lipschitz()
    signed = np.hstack([X.numpy(), -np.ones((len(X), 1))]) * y.numpy()[:, None]
    rows = sparse.csr_matrix(signed)
    return SVMProblem(name, rows, rows.T.tocsr(), lipschitz, newton_minimum(signed))


def start(dim: int, seed: int) -> Array:
    """x0 of length 1: the second standard normal vector of NumPy's RandomState(seed)."""
    random = np.random.RandomState(seed)
    random.standard_normal(dim)  # drawn and discarded, as in the study whose figures we compare
    x0 = random.randn(dim)
    return np.asarray(x0 / np.linalg.norm(x0))


def seeds_of(count: int) -> tuple[int, ...]:
    """The seeds of the study: the given one, then 1001, 1002, ...

    The constants of Adam-OLA's guards were chosen on the LIBSVM sets from the given start and seeds
    1 to 24, so these are not used again.
    """
    return (GIVEN_SEED, *range(1001, 1000 + count))


def newton_minimum(rows: Array, *, max_iterations: int = 200) -> float:
    """f* by a finite Newton method (Keerthi and DeCoste, JMLR 6, 2005), to rounding.

    f is a quadratic wherever the set of rows with m_i < 1 does not change, so that the step to the
    minimum of the present quadratic, shortened by an exact line search, ends in finitely many
    steps. The least-squares solution of least norm copes with columns that depend on each other.

    Args:
        rows: y_i (x_i, -1), dense, shape (n, d).
        max_iterations: On the number of steps.

    Raises:
        RuntimeError: They were not enough.
    """
    w = np.zeros(rows.shape[1])
    scale = float(np.abs(rows).sum(axis=0).max())
    for _ in range(max_iterations):
        margins = rows @ w
        active = margins < 1.0
        slack = 1.0 - margins[active]
        gradient = -rows[active].T @ slack
        if float(np.abs(gradient).max(initial=0.0)) <= 1e-13 * scale:
            return 0.5 * float(slack @ slack)
        step = np.linalg.lstsq(rows[active], slack, rcond=None)[0]
        w = w + _exact_line_search(margins, rows @ step) * step
    raise RuntimeError(f"no minimum within {max_iterations} Newton steps")


def _exact_line_search(margins: Array, along: Array) -> float:
    """The t >= 0 that minimises 1/2 sum max(0, 1 - m_i - t a_i)^2: where its slope is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        kinks = np.where(along != 0.0, (1.0 - margins) / along, np.inf)
    kinks = np.unique(kinks[np.isfinite(kinks) & (kinks > 0.0)])

    def slope(t: float) -> tuple[float, float]:
        slack = 1.0 - margins - t * along
        active = slack > 0.0
        return -float(slack[active] @ along[active]), float(along[active] @ along[active])

    low, high = 0, len(kinks)  # the slope rises with t: the first kink where it is not negative
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if slope(float(kinks[middle]))[0] >= 0 else (middle + 1, high)
    begin = 0.0 if low == 0 else float(kinks[low - 1])
    end = float(kinks[low]) if low < len(kinks) else begin + 1.0
    # Between two kinks the slope is linear; its value in the middle avoids the kinks themselves.
    inside = 0.5 * (begin + end)
    value, curvature = slope(inside)
    return inside if curvature == 0.0 else max(inside - value / curvature, 0.0)
