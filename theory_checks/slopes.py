"""Orders of convergence: straight lines through log-log data, with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

_FEWEST = 3


@dataclass(frozen=True)
class SlopeFit:
    """The least-squares line log(error) = intercept + slope log(h).

    Attributes:
        slope: The measured order.
        intercept: The natural logarithm of the error constant.
        low: Lower end of the confidence interval of the slope.
        high: Upper end of it.
        r_squared: The part of the variance that the line explains; 1 where there is none.
        n: How many points were fitted.
    """

    slope: float
    intercept: float
    low: float
    high: float
    r_squared: float
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """The confidence interval of the slope, (low, high)."""
        return (self.low, self.high)

    def predict(self, h: ArrayLike) -> NDArray[np.float64]:
        """The fitted errors exp(intercept) h^slope, in the shape of `h`."""
        steps = np.asarray(h, dtype=np.float64)
        return np.asarray(np.exp(self.intercept + self.slope * np.log(steps)))

    def __str__(self) -> str:
        return f"{self.slope:.3f} [{self.low:.3f}, {self.high:.3f}]"


def fit_slope(h: Any, error: Any, *, confidence: float = 0.95) -> SlopeFit:
    """Fit error = C h^p by least squares in log-log coordinates.

    With residuals r_i of n points, the slope has the standard error
    s = sqrt(sum r_i^2 / (n - 2) / sum (log h_i - mean)^2), and its interval is p -+ t s, t the
    Student quantile with n - 2 degrees of freedom. Valid when the logarithms of the errors scatter
    independently about a line; higher-order terms in h bend the line, and the interval knows
    nothing of bias. Negligible residuals (exact powers) give an interval of width about zero.

    Args:
        h: (n,) step sizes, positive and not all equal; arrays, tensors or sequences.
        error: (n,) errors, positive.
        confidence: The coverage of the interval, in (0, 1).

    Raises:
        ValueError: Fewer than 3 points, unequal lengths, a value that is not positive or not
            finite, or equal step sizes; the message names the argument.
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    x, y = _logarithms(h, error, fewest=_FEWEST)
    n = len(x)
    centred = x - x.mean()
    spread = float(centred @ centred)
    if spread == 0.0:
        raise ValueError(f"h must hold different step sizes, got {n} times {np.exp(x[0]):g}")
    slope = float(centred @ (y - y.mean())) / spread
    intercept = float(y.mean() - slope * x.mean())
    residual = y - (intercept + slope * x)
    unexplained = float(residual @ residual)
    total = float((y - y.mean()) @ (y - y.mean()))
    quantile = float(stats.t.ppf(0.5 + 0.5 * confidence, n - 2))
    margin = quantile * float(np.sqrt(unexplained / (n - 2) / spread))
    r_squared = 1.0 - unexplained / total if total > 0.0 else 1.0
    return SlopeFit(slope, intercept, slope - margin, slope + margin, r_squared, n)


def local_slopes(h: Any, error: Any) -> NDArray[np.float64]:
    """The slope between neighbours, log(e_i / e_{i+1}) / log(h_i / h_{i+1}), in the given order.

    They show what a fit averages away: an order that is reached only for small h, or rounding noise
    at the end.

    Args:
        h: (n,) step sizes, positive, neighbours different, n at least 2.
        error: (n,) errors, positive.

    Returns:
        (n - 1,) slopes.

    Raises:
        ValueError: Fewer than 2 points, unequal lengths, a value that is not positive or not
            finite, or equal neighbours in h; the message names the argument.
    """
    x, y = _logarithms(h, error, fewest=2)
    steps = np.diff(x)
    if np.any(steps == 0.0):
        raise ValueError(f"h[{int(np.argmin(np.abs(steps)))}] equals its neighbour")
    return np.asarray(np.diff(y) / steps)


def _logarithms(
    h: Any, error: Any, *, fewest: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Check both arguments and return their logarithms."""
    x, y = _positive("h", h, fewest), _positive("error", error, fewest)
    if len(x) != len(y):
        raise ValueError(f"error must be as long as h ({len(x)}), got {len(y)} values")
    return np.log(x), np.log(y)


def _positive(name: str, values: Any, fewest: int) -> NDArray[np.float64]:
    """Turn `values` into a vector of positive numbers, or raise a ValueError that names them."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    elif isinstance(values, Sequence):
        values = [float(value) for value in values]
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < fewest:
        raise ValueError(
            f"{name} must be a vector of at least {fewest} values, got shape {tuple(array.shape)}"
        )
    wrong = np.flatnonzero(~(np.isfinite(array) & (array > 0.0)))
    if len(wrong):
        raise ValueError(
            f"{name} must be positive and finite, got {name}[{wrong[0]}] = {array[wrong[0]]}"
        )
    return array
