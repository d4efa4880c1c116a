"""Adam with online adaptation as a rival: one problem at a time, each with a rate of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from discrete import AdamOLA
from discrete.learned.tasks import LinearBatch, MetaTask

from .setup import HORIZON, PROBLEMS, RIDGE, TESTING, TUNING, tests

RATES = (0.01, 0.1, 0.3, 1.0)
TRIED = 16


def singles(task: MetaTask) -> Iterator[tuple[LinearBatch, Tensor]]:
    """Each problem of a task alone, with its start of shape (1, d)."""
    whole: Any = task.objective
    for place, start in enumerate(task.x0):
        rows = slice(place, place + 1)
        features, labels = whole.features[rows], whole.labels[rows]
        yield LinearBatch(features, labels, loss=whole.loss, ridge=whole.ridge), start[None]


def run(problem: LinearBatch, start: Tensor, rate: float, *, whole: bool) -> tuple[int, bool]:
    """N to |grad f| <= 1e-3, -1 for a miss, and whether f was above 10 times its lowest.

    Args:
        problem: f.
        start: x_0.
        rate: The first learning rate.
        whole: Whether to go on to the horizon where the target was met.
    """
    x = start.clone().requires_grad_(True)
    optimizer = AdamOLA([x], lr=rate, deterministic=True)
    index, lowest, blown = -1, float("inf"), False

    def closure() -> Tensor:
        value, x.grad = problem.value_and_gradient(x.detach())
        return value.sum()

    for k in range(HORIZON + 1):
        value, gradient = problem.value_and_gradient(x.detach())
        f = float(value)
        if index < 0 and float(gradient.norm()) <= 1e-3:
            index = k
            if not whole:
                break
        blown = blown or not f <= 10 * lowest
        lowest = min(lowest, f)
        if k < HORIZON:
            optimizer.step(closure)
    return index, blown


def adam_ola() -> tuple[float, dict[str, dict[str, list[Any]]]]:
    """Its best first rate on some tuning problems, and how it does with it on all test problems."""
    tuning = list(singles(RIDGE.draw(TRIED, seed=TUNING)))
    means = {}
    for rate in RATES:
        found = [run(problem, start, rate, whole=False)[0] for problem, start in tuning]
        means[rate] = sum(HORIZON + 1 if index < 0 else index for index in found)
    best = min(means, key=lambda rate: means[rate])
    places = {}
    for place, family in tests().items():
        task = family.draw(PROBLEMS, seed=TESTING)
        both = [run(problem, start, best, whole=True) for problem, start in singles(task)]
        places[place] = {"index": [one[0] for one in both], "blown": [one[1] for one in both]}
    return best, places
