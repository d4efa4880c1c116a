"""Algorithm 2 of arXiv 2505.22509 in NumPy, written from the paper alone, to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Course", "algorithm_2"]

Array = NDArray[np.float64]


class Course(NamedTuple):
    """A run: iterates x_1, x_2, ..., shape (steps, d), and the rate after each step."""

    iterates: Array
    rates: Array


def algorithm_2(
    objective: Callable[[Array], tuple[float, Array]],
    x0: Array,
    *,
    rate: float,
    eta: float,
    threshold: float,
    steps: int,
) -> Course:
    """Adam whose rate moves by -eta (g . d_k)/Df where f_ref - f exceeds threshold * updates.

    Args:
        objective: x -> (f(x), grad f(x)).
        x0: The start, shape (d,).
        rate: alpha_0.
        eta: Step on the rate.
        threshold: eps_desc.
        steps: How many.
    """
    x, mean, square = x0.copy(), np.zeros_like(x0), np.zeros_like(x0)
    f, gradient = objective(x)
    reference, updates = f, 0
    iterates, rates = [], []
    for k in range(1, steps + 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        direction = (mean / (1 - 0.9**k)) / (np.sqrt(square / (1 - 0.999**k)) + 1e-8)
        x = x - rate * direction
        following, gradient = objective(x)
        if reference - following > threshold * updates:
            change = following - f
            if change != 0:
                rate = rate - eta * float(gradient @ direction) / change
            reference = following
            updates += 1
        f = following
        iterates.append(x)
        rates.append(rate)
    return Course(np.array(iterates), np.array(rates))
