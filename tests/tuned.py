"""Tasks that the tests of tuning share: x' = -theta x, whose T is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ode_stopping import StoppingTask, Torchdiffeq, minimise_stopping_time

EPS = 0.02
FAST = Torchdiffeq(rtol=1e-6)


def half_square(t: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


def decay(theta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """x' = -theta x."""
    return lambda t, x: -theta * x


def log_ratio(start: float) -> float:
    """theta T of `decay` with `half_square`: ln(x0^2/(2 eps))/2."""
    return math.log(start**2 / (2 * EPS)) / 2


def decay_task(theta: Tensor, start: float = 2.0, **options: Any) -> StoppingTask:
    x0 = torch.tensor([start], dtype=torch.float64)
    return StoppingTask(decay(theta), x0, half_square, EPS, **options)


def sgd(rate: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def tune(tasks: Any, parameters: Any, **options: Any) -> Any:
    return minimise_stopping_time(tasks, parameters, **{"solver": FAST, **options})


def one_step(tasks: Any, theta: Tensor, **options: Any) -> tuple[Any, float]:
    """The history, and the gradient that SGD saw."""
    before = theta.item()
    history = tune(tasks, theta, optimizer=sgd(1.0), iterations=1, restore_best=False, **options)
    return history, before - theta.item()


def batch_tasks(theta: Tensor) -> list[StoppingTask]:
    return [decay_task(theta, start) for start in (1.0, 2.0, 3.0, 4.0, 5.0)]
