"""Runs with closed forms for the tests of the pictures, and what reads a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from discrete import Euler, stopping_index
from ode_stopping import Quadratic, stopping_time

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
pyplot = pytest.importorskip("matplotlib.pyplot")

F64 = torch.float64
START = (1.0, 1.5)
TARGET = 0.1
LOSS = Quadratic(torch.tensor([1.0, 1.0], dtype=F64))


def drawn_and_closed() -> Iterator[None]:
    """Draw every figure after the test, since much goes wrong only then, and close it."""
    yield
    for number in pyplot.get_fignums():
        pyplot.figure(number).canvas.draw()
    pyplot.close("all")


def square(t: Tensor, x: Tensor) -> Tensor:
    return (x * x).sum()


def start(**options: Any) -> Tensor:
    return torch.tensor(START, dtype=F64, **options)


def theta(value: float = 1.0) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


def decay(rate: Any = 1.0, target: float = TARGET, **options: Any) -> Any:
    """x' = -rate x: J = |x0|^2 exp(-2 rate t)."""
    return stopping_time(lambda t, x: -rate * x, start(), square, target, **options)


def decay_time(rate: float = 1.0, target: float = TARGET) -> float:
    return math.log((START[0] ** 2 + START[1] ** 2) / target) / (2.0 * rate)


def euler(step: float = 0.1, rate: Any = 1.0, target: float = TARGET, **options: Any) -> Any:
    update = Euler(lambda t, x: -rate * x, step=step)
    return stopping_index(update, start(), square, target, **options)


def circle(side: Callable[..., Any] = stopping_time, until: float = 3.0, **options: Any) -> Any:
    """x' = v, v' = -x from x = (1, 1.5) at rest, for `until`: circles in the phase planes."""

    def flow(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return state[1], -state[0]

    def clock(t: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        return until - t + 0.0 * state[0].sum()

    state = (start(), torch.zeros(2, dtype=F64))
    rule = flow if side is stopping_time else Euler(flow, step=0.1)
    return side(rule, state, clock, 0.0, **options)


def energy(t: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * sum((piece * piece).sum() for piece in state)  # type: ignore[return-value]


def data(line: Any) -> np.ndarray:
    return np.asarray(line.get_xydata(), dtype=np.float64)


def with_marker(axes: Any, marker: str) -> list[Any]:
    return [
        line
        for line in axes.get_lines()
        if line.get_marker() == marker and line.get_linestyle() == "None"
    ]


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]
