"""Random flows of optimisers: gradient flows, rescaled or with momentum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator

from .operations import Flow, Values, definite, log_uniform, start

DESCENTS: dict[str, Callable[[Generator], Flow]] = {}


def _flow(make: Callable[[Generator], Flow]) -> Callable[[Generator], Flow]:
    DESCENTS[make.__name__] = make
    return make


@_flow
def quadratic(rng: Generator) -> Flow:
    """Gradient flow of a random quadratic with a preconditioner."""
    n = int(rng.integers(2, 7))
    leaves = {"p": rng.uniform(0.5, 2.0, n), "centre": 0.3 * rng.standard_normal(n)}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return -p["p"] * xp.matvec(p["Q"], x - p["centre"])

    matrix = definite(rng, n, log_uniform(rng, 1.0, 100.0))
    return Flow(f, leaves, start(rng, n), 4.0, {"Q": matrix})


@_flow
def rosenbrock(rng: Generator) -> Flow:
    """Gradient flow of (a - x)^2 + b (y - x^2)^2."""
    leaves = {"a": float(rng.uniform(0.7, 1.3)), "b": log_uniform(rng, 5.0, 100.0)}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        bent = x[1] - x[0] * x[0]
        return xp.stack([2 * (p["a"] - x[0]) + 4 * p["b"] * x[0] * bent, -2 * p["b"] * bent])

    return Flow(f, leaves, start(rng, 2), 4.0)


@_flow
def logistic(rng: Generator) -> Flow:
    """Gradient flow of a regularised logistic loss, twelve rows."""
    n, rows = int(rng.integers(2, 5)), 12
    signed = rng.standard_normal((rows, n)) * rng.choice([-1.0, 1.0], (rows, 1))
    leaves = {"p": rng.uniform(0.5, 2.0, n), "mu": float(rng.uniform(0.02, 0.3))}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        share = 1 / (1 + xp.exp(xp.matvec(p["A"], x)))
        return p["p"] * (xp.matvec(p["At"], share) / rows - p["mu"] * x)

    constants = {"A": signed, "At": np.ascontiguousarray(signed.T)}
    return Flow(f, leaves, 1.5 * start(rng, n), 12.0, constants)


@_flow
def rescaled(rng: Generator) -> Flow:
    """x' = -(a exp(-b t) + c) Q x."""
    n = int(rng.integers(2, 6))
    leaves = {name: float(rng.uniform(0.3, 1.5)) for name in ("a", "b", "c")}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return -(p["a"] * xp.exp(-p["b"] * t) + p["c"]) * xp.matvec(p["Q"], x)

    matrix = definite(rng, n, log_uniform(rng, 1.0, 50.0))
    return Flow(f, leaves, start(rng, n), 4.0, {"Q": matrix})


@_flow
def heavy_ball(rng: Generator) -> Flow:
    """Momentum: x' = v, v' = -c v - Q x - k x^3."""
    n = int(rng.integers(1, 4))
    leaves = {"c": float(rng.uniform(0.3, 3.0)), "k": float(rng.uniform(0.0, 1.0))}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        q, v = x[:n], x[n:]
        pull = -p["c"] * v - xp.matvec(p["Q"], q) - p["k"] * q * q * q
        return xp.stack([*(v[i] for i in range(n)), *(pull[i] for i in range(n))])

    begin = np.concatenate([start(rng, n), 0.1 * start(rng, n)])
    matrix = definite(rng, n, log_uniform(rng, 1.0, 50.0))
    return Flow(f, leaves, begin, 8.0, {"Q": matrix})


@_flow
def nesterov(rng: Generator) -> Flow:
    """x'' + a / (t + 2) x' + Q x = 0; t >= -1."""
    n = int(rng.integers(1, 4))
    leaves = {"a": float(rng.uniform(2.0, 5.0)), "p": rng.uniform(0.5, 2.0, n)}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        q, v = x[:n], x[n:]
        pull = -p["a"] / (t + 2) * v - p["p"] * xp.matvec(p["Q"], q)
        return xp.stack([*(v[i] for i in range(n)), *(pull[i] for i in range(n))])

    begin = np.concatenate([start(rng, n), 0.1 * start(rng, n)])
    matrix = definite(rng, n, log_uniform(rng, 1.0, 20.0))
    return Flow(f, leaves, begin, 8.0, {"Q": matrix})
