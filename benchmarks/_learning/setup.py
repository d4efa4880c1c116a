"""The one configuration of the study. It was fixed before the test problems were drawn.

(Chosen by exploring with other problems: starts of several sizes in training are what makes a rule
general. At d = 32 a start of standard deviation 2 has the margins of d = 128.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from discrete.learned import CoordinateLSTM, LearnedOptimizer, RNNprop
from discrete.learned.families import (
    LeastSquaresFamily,
    LogisticFamily,
    MixedFamily,
    TaskFamily,
)
from discrete.learned.tasks import MetaTask
from discrete.learned.training import MetaLoss

# (Five times the longest horizon of the training.)
DIM, HORIZON = 32, 1_000
# Seeds of problems: of training 0, 1, ...; to tune the rivals; to test.
TUNING, TESTING = 5_000, 11_000
PROBLEMS = 100
RIDGE = LogisticFamily(DIM, DIM // 2, ridge=0.01)
PRINTED = LogisticFamily(DIM, DIM // 2)
STARTS = (0.5, 1.0, 2.0, 4.0)


def _of_starts(**options: Any) -> TaskFamily:
    """The ridge family, every start as often."""
    return MixedFamily(
        [LogisticFamily(DIM, DIM // 2, ridge=0.01, start=start, **options) for start in STARTS]
    )


TRAINED = _of_starts()

TRAINING: dict[str, Any] = {
    "steps": 300,
    "batch": 16,
    "shards": 1,
    "horizon": (50, 200),
    "segment": 20,
    "rate": 3e-3,
}


def _rnnprop() -> LearnedOptimizer:
    return RNNprop(20, alpha=0.5, damping=0.5)


def _l2o() -> LearnedOptimizer:
    return CoordinateLSTM(20)


def _undamped() -> LearnedOptimizer:
    return RNNprop(20, alpha=0.1, damping=0.0)


Variant = tuple[Callable[[], LearnedOptimizer], Any, dict[str, Any]]
ONE = (1e-3,)


def _ridge(**loss: Any) -> tuple[TaskFamily, dict[str, Any]]:
    return TRAINED, {"loss": MetaLoss(**loss)}


# What is trained, by name: the optimiser, the problems, and what differs from TRAINING.
VARIANTS: dict[str, Variant] = {
    "lambda 0": (_rnnprop, *_ridge(stopping=0.0)),
    "lambda 1": (_rnnprop, *_ridge()),
    "log f": (_rnnprop, *_ridge(stopping=0.0, values="log")),
    "lambda 0.1": (_rnnprop, *_ridge(stopping=0.1)),
    "lambda 10": (_rnnprop, *_ridge(stopping=10.0)),
    "one target": (_rnnprop, _of_starts(targets=ONE), {}),
    "fractional": (_rnnprop, *_ridge(interpolation="log")),
    "undamped": (_undamped, *_ridge()),
    "K = 100": (_rnnprop, TRAINED, {"horizon": 100}),
    "one start": (_rnnprop, RIDGE, {}),
    "L2O-DM": (_l2o, *_ridge()),
}


def printed(family: LogisticFamily, stopping: float) -> tuple[Any, dict[str, Any]]:
    """Figure 3's own criterion: f(x_{k-1}) - f(x_k) <= 1e-5, K = 100, no damping."""

    def tasks(count: int, seed: int) -> MetaTask:
        task = family.draw(count, seed=seed)
        targets = torch.tensor([1e-5], dtype=torch.float64)
        return MetaTask(task.objective, task.x0, "decrease", targets)

    return tasks, {"loss": MetaLoss(stopping=stopping), "horizon": 100}


PRINTED_VARIANTS: dict[str, Variant] = {
    "printed, lambda 0": (_undamped, *printed(PRINTED, 0.0)),
    "printed, lambda 1": (_undamped, *printed(PRINTED, 1.0)),
}


def tests() -> dict[str, TaskFamily]:
    """Where everything is tried: the trained size, 2, 4 and 8 times it, and another family."""
    found: dict[str, TaskFamily] = {
        f"d = {times * DIM}": LogisticFamily(times * DIM, times * DIM // 2, ridge=0.01)
        for times in (1, 2, 4, 8)
    }
    found["least squares"] = LeastSquaresFamily(DIM, 2 * DIM, ridge=0.01)
    return found
