"""Random criteria."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.random import Generator

from .operations import Criterion, Values, log_uniform

CRITERIA: dict[str, Callable[[Generator, int], Criterion]] = {}


def _criterion(
    make: Callable[[Generator, int], Criterion],
) -> Callable[[Generator, int], Criterion]:
    CRITERIA[make.__name__] = make
    return make


@_criterion
def squares(rng: Generator, n: int) -> Criterion:
    """sum phi x^2 / 2, as a loss."""
    return Criterion(
        lambda xp, t, x, p, velocity: 0.5 * xp.dot(p["phi"] * x, x),
        {"phi": rng.uniform(0.3, 2.0, n)},
    )


@_criterion
def norm(rng: Generator, n: int) -> Criterion:
    """|x - phi|."""
    phi = 0.2 * rng.standard_normal(n)

    def j(xp: Any, t: Any, x: Any, p: Values, velocity: Any) -> Any:
        return xp.sqrt(xp.dot(x - p["phi"], x - p["phi"]))

    return Criterion(j, {"phi": phi})


@_criterion
def linear(rng: Generator, n: int) -> Criterion:
    """phi^T x."""
    return Criterion(
        lambda xp, t, x, p, velocity: xp.dot(p["phi"], x), {"phi": rng.standard_normal(n)}
    )


@_criterion
def logarithm(rng: Generator, n: int) -> Criterion:
    """log(sum x^2 + phi)."""
    return Criterion(
        lambda xp, t, x, p, velocity: xp.log(xp.dot(x, x) + p["phi"]),
        {"phi": log_uniform(rng, 1e-4, 1e-1)},
    )


@_criterion
def discounted(rng: Generator, n: int) -> Criterion:
    """sum x^2 exp(-phi t) + a t: depends on time."""
    leaves = {"phi": float(rng.uniform(-0.3, 0.5)), "slope": float(rng.uniform(-0.1, 0.1))}

    def j(xp: Any, t: Any, x: Any, p: Values, velocity: Any) -> Any:
        return xp.dot(x, x) * xp.exp(-p["phi"] * t) + p["slope"] * t

    return Criterion(j, leaves)


@_criterion
def smooth_maximum(rng: Generator, n: int) -> Criterion:
    """log sum exp(2 phi x) / phi."""

    def j(xp: Any, t: Any, x: Any, p: Values, velocity: Any) -> Any:
        parts = xp.exp(p["phi"] * x)
        return xp.log(xp.dot(parts, parts)) / p["phi"]

    return Criterion(j, {"phi": float(rng.uniform(0.5, 3.0))})


@_criterion
def product(rng: Generator, n: int) -> Criterion:
    """(phi_1 + x_1^2) ... (phi_n + x_n^2)."""

    def j(xp: Any, t: Any, x: Any, p: Values, velocity: Any) -> Any:
        found = p["phi"][0] + x[0] * x[0]
        for i in range(1, n):
            found = found * (p["phi"][i] + x[i] * x[i])
        return found

    return Criterion(j, {"phi": rng.uniform(0.1, 1.0, n)})


@_criterion
def speed(rng: Generator, n: int) -> Criterion:
    """phi |F|^2, as the norm of a gradient: shares the parameters of the flow."""

    def j(xp: Any, t: Any, x: Any, p: Values, velocity: Any) -> Any:
        rate = velocity()
        return p["phi"] * xp.dot(rate, rate)

    return Criterion(j, {"phi": float(rng.uniform(0.5, 2.0))})


@_criterion
def saturated(rng: Generator, n: int) -> Criterion:
    """tanh(phi^T x)."""
    return Criterion(
        lambda xp, t, x, p, velocity: xp.tanh(xp.dot(p["phi"], x)),
        {"phi": 0.7 * rng.standard_normal(n)},
    )


@_criterion
def quotient(rng: Generator, n: int) -> Criterion:
    """sum x^2 / (phi + x_1^2)."""
    return Criterion(
        lambda xp, t, x, p, velocity: xp.dot(x, x) / (p["phi"] + x[0] * x[0]),
        {"phi": float(rng.uniform(0.3, 2.0))},
    )
