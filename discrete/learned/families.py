"""Families of problems: batches are drawn from a seed, the same ones on every device."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ode_stopping.core.validation import (
    checked_number,
    described,
    require_whole,
)

from .arguments import (
    check_counts,
    check_minibatch,
    check_shares,
    check_targets,
    check_weights,
    require_floats,
)
from .draws import Draws, mixed_seed
from .networks import NetworkBatch
from .tasks import (
    LinearBatch,
    MetaTask,
    RosenbrockBatch,
    check_labels,
)

__all__ = [
    "LeastSquaresFamily",
    "LinearDataFamily",
    "LogisticFamily",
    "MixedFamily",
    "NetworkFamily",
    "RosenbrockFamily",
    "TaskFamily",
]

_LADDER = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)


class TaskFamily(ABC):
    """Problems of one kind, drawn at random."""

    @abstractmethod
    def draw(
        self,
        count: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> MetaTask:
        """So many problems; the same for the same seed, whatever the device.

        Args:
            count: B.
            seed: Of everything that is drawn.
            device: Where they go; they are drawn on the CPU.
            dtype: Of data and starts; drawn in float64.

        Raises:
            TypeError, ValueError: `count` is no positive integer, `seed` no integer, `dtype` no
                floating type.
        """


class _DrawnFamily(TaskFamily):
    """A family of the library's: every number of a batch comes from one `Draws`."""

    def draw(
        self,
        count: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> MetaTask:
        """See `TaskFamily.draw`."""
        return self._problems(count, seed, Draws(count, seed, device, dtype))

    @abstractmethod
    def _problems(self, count: int, seed: int, draw: Draws) -> MetaTask:
        """So many problems, from these draws."""


@dataclass(frozen=True)
class LogisticFamily(_DrawnFamily):
    """Logistic regression by the generator of arXiv 2505.22509, section 6.

    Rows are standard normal, labels the sign of W x* for a sparse x*, a share of them flipped; f is
    the mean logistic loss. Without a ridge and for d > n the data are separable: f* = 0 lies at
    infinity, and larger steps always win.

    Args:
        dim: d.
        rows: n.
        nonzeros: Share of x* that is not zero.
        flipped: Share of labels that are flipped.
        ridge: >= 0.
        start: Standard deviation of x0.
        targets: Of the norm of the gradient, a ladder.
        minibatch: Rows of each step's gradient; None: all.
        loss: As for `LinearBatch`.
        l1: As for `LinearBatch`.

    Raises:
        TypeError, ValueError: An argument out of its range, by its name.
    """

    dim: int = 32
    rows: int = 16
    _: KW_ONLY
    nonzeros: float = 0.25
    flipped: float = 0.05
    ridge: float = 0.0
    start: float = 1.0
    targets: Sequence[float] = _LADDER
    minibatch: int | None = None
    loss: str = "logistic"
    l1: float = 0.0

    def __post_init__(self) -> None:
        check_labels(torch.ones(1), self.loss)
        check_counts(dim=self.dim, rows=self.rows)
        check_weights(ridge=self.ridge, l1=self.l1, start=self.start)
        check_shares(nonzeros=self.nonzeros, flipped=self.flipped)
        check_targets(self.targets)
        check_minibatch(self.minibatch, self.rows)

    def _problems(self, count: int, seed: int, draw: Draws) -> MetaTask:
        features = draw.normal(count, self.rows, self.dim)
        truth = draw.normal(count, self.dim) * (draw.uniform(count, self.dim) < self.nonzeros)
        labels = torch.where((features @ truth.unsqueeze(-1)).squeeze(-1) >= 0, 1.0, -1.0)
        labels = torch.where(draw.uniform(count, self.rows) < self.flipped, -labels, labels)
        objective = LinearBatch(
            draw.placed(features),
            draw.placed(labels),
            loss=self.loss,
            ridge=self.ridge,
            l1=self.l1,
            minibatch=self.minibatch,
            seed=seed,
        )
        x0 = draw.placed(self.start * draw.normal(count, self.dim))
        return MetaTask(objective, x0, targets=_ladder(self.targets))


@dataclass(frozen=True)
class LeastSquaresFamily(_DrawnFamily):
    """f = |W x - y|^2 / (2 n) + ridge/2 |x|^2 + l1 |x| (smoothed), y = W x* + noise.

    l1 > 0 is the lasso by its smooth form.

    Args:
        dim: d.
        rows: n.
        noise: Standard deviation of that of y.
        condition: Of the columns' sizes, geometric from 1 down to its inverse root.
        nonzeros: Share of x* that is not zero.
        ridge: >= 0.
        l1: >= 0.
        targets: Of the norm of the gradient, a ladder.
        minibatch: Rows of each step's gradient; None: all.

    Raises:
        TypeError, ValueError: An argument out of its range, by its name.
    """

    dim: int = 32
    rows: int = 64
    _: KW_ONLY
    noise: float = 0.1
    condition: float = 10.0
    nonzeros: float = 1.0
    ridge: float = 0.0
    l1: float = 0.0
    targets: Sequence[float] = _LADDER
    minibatch: int | None = None

    def __post_init__(self) -> None:
        check_counts(dim=self.dim, rows=self.rows)
        check_weights(noise=self.noise, ridge=self.ridge, l1=self.l1)
        checked_number(self.condition, name="condition", low=1.0, closed=True)
        check_shares(nonzeros=self.nonzeros)
        check_targets(self.targets)
        check_minibatch(self.minibatch, self.rows)

    def _problems(self, count: int, seed: int, draw: Draws) -> MetaTask:
        sizes = self.condition ** (-0.5 * torch.linspace(0.0, 1.0, self.dim, dtype=torch.float64))
        features = draw.normal(count, self.rows, self.dim) * sizes
        truth = draw.normal(count, self.dim) * (draw.uniform(count, self.dim) < self.nonzeros)
        labels = (features @ truth.unsqueeze(-1)).squeeze(-1)
        labels = labels + self.noise * draw.normal(count, self.rows)
        objective = LinearBatch(
            draw.placed(features),
            draw.placed(labels),
            loss="squares",
            ridge=self.ridge,
            l1=self.l1,
            minibatch=self.minibatch,
            seed=seed,
        )
        return MetaTask(
            objective, draw.placed(draw.normal(count, self.dim)), targets=_ladder(self.targets)
        )


@dataclass(frozen=True)
class RosenbrockFamily(_DrawnFamily):
    """Curved valleys of different steepness, not convex.

    Args:
        dim: d >= 2.
        steepest: The steepness is log-uniform from 1 to this, >= 1.
        targets: Of the norm of the gradient, a ladder.

    Raises:
        TypeError, ValueError: An argument out of its range, by its name.
    """

    dim: int = 8
    _: KW_ONLY
    steepest: float = 100.0
    targets: Sequence[float] = _LADDER

    def __post_init__(self) -> None:
        check_counts(dim=self.dim)
        if self.dim < 2:
            raise ValueError(f"dim must be at least 2; got {self.dim}")
        checked_number(self.steepest, name="steepest", low=1.0, closed=True)
        check_targets(self.targets)

    def _problems(self, count: int, seed: int, draw: Draws) -> MetaTask:
        steepness = self.steepest ** draw.uniform(count)
        x0 = 0.5 * draw.normal(count, self.dim)
        objective = RosenbrockBatch(draw.placed(steepness))
        return MetaTask(objective, draw.placed(x0), targets=_ladder(self.targets))


@dataclass(frozen=True)
class LinearDataFamily(_DrawnFamily):
    """Linear models on random rows of a given data set.

    Args:
        features: Shape (samples, d).
        labels: Shape (samples,), as for `LinearBatch`.
        rows: Of each problem, drawn without replacement.
        loss: As for `LinearBatch`.
        ridge: >= 0.
        start: Standard deviation of x0.
        targets: Of the norm of the gradient, a ladder.
        minibatch: Rows of each step's gradient; None: all.

    Raises:
        TypeError, ValueError: An argument out of its range, by its name.
    """

    features: Tensor
    labels: Tensor
    rows: int
    _: KW_ONLY
    loss: str = "logistic"
    ridge: float = 0.0
    start: float = 1.0
    targets: Sequence[float] = _LADDER
    minibatch: int | None = None

    def __post_init__(self) -> None:
        require_floats(self.features, ("samples", "d"), name="features")
        require_floats(self.labels, ("samples",), name="labels")
        if len(self.labels) != len(self.features):
            raise ValueError(
                f"labels must be as many as the rows of features, {len(self.features)}; got "
                f"{len(self.labels)}"
            )
        check_labels(self.labels, self.loss)
        check_counts(rows=self.rows)
        if self.rows > len(self.features):
            raise ValueError(
                f"rows must be at most the number of samples, {len(self.features)}; got {self.rows}"
            )
        check_weights(ridge=self.ridge, start=self.start)
        check_targets(self.targets)
        check_minibatch(self.minibatch, self.rows)

    def _problems(self, count: int, seed: int, draw: Draws) -> MetaTask:
        chosen = torch.stack([draw.chosen(len(self.features), self.rows) for _ in range(count)])
        objective = LinearBatch(
            draw.placed(self.features.cpu()[chosen]),
            draw.placed(self.labels.cpu()[chosen]),
            loss=self.loss,
            ridge=self.ridge,
            minibatch=self.minibatch,
            seed=seed,
        )
        x0 = draw.placed(self.start * draw.normal(count, self.features.shape[1]))
        return MetaTask(objective, x0, targets=_ladder(self.targets))


@dataclass(frozen=True)
class NetworkFamily(_DrawnFamily):
    """A network with one hidden layer on a set of scikit-learn's (needs the extra `checks`).

    Args:
        data: "digits", "wine" or "breast_cancer".
        hidden: Width.
        rows: Samples of each problem; None, or where the set has fewer: all.
        ridge: >= 0, on all parameters.
        targets: Of the norm of the gradient, a ladder.
        minibatch: Rows of each step's gradient; None: all.

    Raises:
        TypeError, ValueError: An argument out of its range, by its name.
    """

    data: str = "digits"
    _: KW_ONLY
    hidden: int = 16
    rows: int | None = 256
    ridge: float = 0.0
    targets: Sequence[float] = _LADDER
    minibatch: int | None = None

    def __post_init__(self) -> None:
        if self.data not in _SETS:
            raise ValueError(f"data must be one of {list(_SETS)}; got {self.data!r}")
        check_counts(hidden=self.hidden, rows=1 if self.rows is None else self.rows)
        # (Without `rows` the set has to be read first.)
        check_minibatch(self.minibatch, sys.maxsize if self.rows is None else self.rows)
        check_weights(ridge=self.ridge)
        check_targets(self.targets)

    def _problems(self, count: int, seed: int, draw: Draws) -> MetaTask:
        inputs, labels = _classification(self.data)
        rows = len(inputs) if self.rows is None else min(self.rows, len(inputs))
        chosen = torch.stack([draw.chosen(len(inputs), rows) for _ in range(count)])
        objective = NetworkBatch(
            draw.placed(inputs[chosen]),
            labels[chosen].to(draw.device),
            hidden=self.hidden,
            ridge=self.ridge,
            classes=int(labels.max()) + 1,
            minibatch=self.minibatch,
            seed=seed,
        )
        x0 = draw.placed(draw.normal(count, objective.dim) * objective.initial_sizes)
        return MetaTask(objective, x0, targets=_ladder(self.targets))


@dataclass(frozen=True)
class MixedFamily(TaskFamily):
    """Each batch of one of several families, chosen at random.

    Args:
        families: At least one.

    Raises:
        TypeError, ValueError: Something else in the list, or nothing.
    """

    families: Sequence[TaskFamily]

    def __post_init__(self) -> None:
        if not self.families:
            raise ValueError("families must hold at least one; got none")
        for place, family in enumerate(self.families):
            if not isinstance(family, TaskFamily):
                raise TypeError(f"families[{place}] must be a TaskFamily; got {described(family)}")

    def draw(
        self,
        count: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> MetaTask:
        """See `TaskFamily.draw`."""
        require_whole(seed, name="seed")
        family = self.families[mixed_seed(seed, 1) % len(self.families)]
        return family.draw(count, seed=seed, device=device, dtype=dtype)


def _ladder(targets: Sequence[float]) -> Tensor:
    return torch.tensor(list(targets), dtype=torch.float64)


_SETS = ("digits", "wine", "breast_cancer")


# (Every shard of every meta-step draws from it; what is drawn is a copy.)
@cache
def _classification(data: str) -> tuple[Tensor, Tensor]:
    """Standardised inputs, shape (samples, features), and classes, shape (samples,)."""
    from ode_stopping.problems.datasets import sklearn_datasets

    load: Any = getattr(sklearn_datasets(), f"load_{data}")
    inputs, labels = load(return_X_y=True)
    values = torch.as_tensor(inputs, dtype=torch.float64)
    spread = values.std(0)
    scaled = (values - values.mean(0)) / torch.where(spread > 0, spread, torch.ones_like(spread))
    return scaled, torch.as_tensor(labels, dtype=torch.int64)
