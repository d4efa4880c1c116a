"""Functions that are written once and run in torch and in numpy, and what they are made of.

A flow or criterion is written over a small set of operations (`Operations`), on numbers without
dimension. Arrays of numpy have one axis more than those of torch, the last: there the oracle puts
its columns (directions of differentiation, or points of time). So x[0] is a component in both, and
both see one expression: no error of transcription can be taken for one of the library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.random import Generator

Values = Mapping[str, Any]


class Operations(Protocol):
    """What flows and criteria are made of."""

    exp: Callable[[Any], Any]
    log: Callable[[Any], Any]
    sin: Callable[[Any], Any]
    cos: Callable[[Any], Any]
    tanh: Callable[[Any], Any]
    sqrt: Callable[[Any], Any]

    def stack(self, parts: list[Any]) -> Any:
        """Components to a vector."""

    def matvec(self, matrix: Any, x: Any) -> Any:
        """Matrix of shape (m, n) times vector of shape (n,)."""

    def dot(self, a: Any, b: Any) -> Any:
        """Sum over the components of a product."""


class _Numpy:
    """Operations on arrays whose last axis counts columns, real or complex."""

    exp, log, sin, cos, tanh, sqrt = np.exp, np.log, np.sin, np.cos, np.tanh, np.sqrt

    def stack(self, parts: list[Any]) -> Any:
        return np.stack(np.broadcast_arrays(*parts))

    def matvec(self, matrix: Any, x: Any) -> Any:
        return (matrix * x[None]).sum(1)

    def dot(self, a: Any, b: Any) -> Any:
        return (a * b).sum(0)


class _Torch:
    """Operations on tensors."""

    exp, log, sin, cos, tanh, sqrt = (
        torch.exp,
        torch.log,
        torch.sin,
        torch.cos,
        torch.tanh,
        torch.sqrt,
    )

    def stack(self, parts: list[Any]) -> Any:
        return torch.stack(parts)

    def matvec(self, matrix: Any, x: Any) -> Any:
        return matrix @ x

    def dot(self, a: Any, b: Any) -> Any:
        return (a * b).sum(0)


NUMPY, TORCH = _Numpy(), _Torch()


@dataclass(frozen=True)
class Flow:
    """One random flow x' = f(t, x, p), in numbers without dimension.

    Attributes:
        f: (operations, t, x, p, side) -> x'; side is +1 or -1, the sign of `switch`.
        leaves: What is differentiated to, by name.
        constants: What else p holds.
        x0: Start, shape (n,).
        span: How long the path may be.
        switch: (operations, t, x, p) -> number; None: f does not use `side`. Analytic on each side.
    """

    f: Callable[[Any, Any, Any, Values, Any], Any]
    leaves: dict[str, Any]
    x0: Any
    span: float
    constants: dict[str, Any] = field(default_factory=dict)
    switch: Callable[[Any, Any, Any, Values], Any] | None = None


@dataclass(frozen=True)
class Criterion:
    """One random criterion J(t, x, p), in numbers without dimension.

    Attributes:
        j: (operations, t, x, p, velocity) -> number; velocity is a function of no arguments.
        leaves: What is differentiated to, by name.
    """

    j: Callable[[Any, Any, Any, Values, Callable[[], Any]], Any]
    leaves: dict[str, Any]


def log_uniform(rng: Generator, low: float, high: float, *shape: int) -> Any:
    found = np.exp(rng.uniform(math.log(low), math.log(high), shape))
    return found if shape else float(found)


def start(rng: Generator, n: int) -> Any:
    """Components of either sign, none of them near 0."""
    return rng.choice([-1.0, 1.0], n) * rng.uniform(0.3, 1.5, n)


def rotation(rng: Generator, n: int) -> Any:
    q, r = np.linalg.qr(rng.standard_normal((n, n)))
    return q * np.sign(np.diag(r))


def definite(rng: Generator, n: int, condition: float) -> Any:
    q = rotation(rng, n)
    matrix = (q * np.geomspace(1.0, condition, n)) @ q.T
    return (matrix + matrix.T) / 2
