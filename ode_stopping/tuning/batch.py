"""The objective of tuning over a batch of tasks, and its gradient, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ..core.describe import detached_state
from ..core.status import GradientError, Status
from .options import TuningOptions
from .tasks import TuningTask

__all__ = ["Batch", "Evaluation"]

_MISSES = (Status.NOT_REACHED, Status.DIVERGED, Status.STALLED)
_BROKEN = (Status.DIVERGED, Status.STALLED)


@dataclass(frozen=True)
class Evaluation:
    """The objective over some tasks, and its gradient.

    Attributes:
        objective: mean + weight * penalty.
        mean: Mean of the stopping times (indices), misses with what they count as.
        penalty: Mean penalty.
        statuses: How each run ended.
        gradients: Gradient of the objective, one a parameter, None for one that no task depends
            on; None where none was asked for.
        errors: Why the gradient of a task is missing, one sentence a task.
        dependent: Number of tasks that give a direction to go: REACHED with a gradient, or AT_START
            with one that is not zero (to t0).
    """

    objective: float
    mean: float
    penalty: float
    statuses: tuple[Status, ...]
    gradients: list[Tensor | None] | None
    errors: tuple[str, ...]
    dependent: int

    @property
    def missed(self) -> int:
        """Runs that did not meet their target."""
        return sum(status in _MISSES for status in self.statuses)

    @property
    def reached(self) -> int:
        """Runs that met it."""
        return len(self.statuses) - self.missed

    @property
    def norm(self) -> float:
        """Norm of the gradient; NaN where there is none."""
        given = [g for g in self.gradients or () if g is not None]
        if not given:
            return float("nan")
        return float(torch.stack([g.double().norm() for g in given]).norm())


@dataclass(frozen=True)
class Batch:
    """How tasks are evaluated.

    Attributes:
        parameters: What the gradient is taken to.
        settings: Of the runs with a gradient, `gradient` among them.
        options: Those of the loop; `censored`, `penalty`, `weight` and `on_error` are read here.
    """

    parameters: Sequence[Tensor]
    settings: dict[str, Any]
    options: TuningOptions

    def evaluate(self, tasks: Sequence[tuple[int, TuningTask]], *, gradient: bool) -> Evaluation:
        """The objective over numbered tasks."""
        done = [self._one(number, task, gradient=gradient) for number, task in tasks]
        count = len(done)
        mean = sum(one.value for one in done) / count
        penalty = sum(one.penalty for one in done) / count
        return Evaluation(
            objective=mean + self.options.weight * penalty,
            mean=mean,
            penalty=penalty,
            statuses=tuple(one.status for one in done),
            gradients=_mean([one.gradients for one in done]) if gradient else None,
            errors=tuple(one.error for one in done if one.error),
            dependent=sum(one.dependent for one in done),
        )

    def _one(self, number: int, task: TuningTask, *, gradient: bool) -> _One:
        label = describe(number, task)
        with _named(label), torch.set_grad_enabled(gradient):
            error = ""
            try:
                result = self._run(task, gradient=gradient)
            except GradientError as failure:
                error = self._missing(failure, label)
                # Its value still counts; without a gradient nothing is traced and checked.
                result = self._run(task, gradient=False)
            value = getattr(result, task.quantity)
            penalty = self._penalty(task, result)
            loss = value.to(torch.float64)
            if penalty is not None:
                loss = loss + self.options.weight * penalty.to(loss)
            gradients: Sequence[Tensor | None] = [None] * len(self.parameters)
            if gradient and not error and loss.requires_grad:
                try:
                    gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
                    _require_finite(gradients)
                except GradientError as failure:
                    error = self._missing(failure, label)
                    gradients = [None] * len(self.parameters)
            return _One(
                value=float(value.detach()),
                penalty=0.0 if penalty is None else float(penalty.detach()),
                status=result.status,
                gradients=gradients,
                error=error,
            )

    def _run(self, task: TuningTask, *, gradient: bool) -> Any:
        settings = self.settings if gradient else {**self.settings, "gradient": None}
        with torch.set_grad_enabled(gradient):
            result = task.run(censored=self.options.censored, **settings)
        if result.status is Status.DEGENERATE:
            # It has a time but no derivative: a constant, whose cotangent is not to raise.
            state = detached_state(result.state)
            result = replace(result, time=result.time.detach(), state=state)
        return result

    def _penalty(self, task: TuningTask, result: Any) -> Tensor | None:
        # The path of a run that broke off ended nowhere, perhaps with NaN: no integral along it.
        if self.options.penalty is None or result.status in _BROKEN:
            return None
        value = self.options.penalty(task, result)
        if not isinstance(value, Tensor):
            raise TypeError(f"penalty must return a 0-d tensor; got {type(value).__name__}")
        if value.shape != () or not value.is_floating_point():
            raise ValueError(
                "penalty must return a floating-point 0-d tensor; got shape "
                f"{tuple(value.shape)} and dtype {value.dtype}"
            )
        if not isfinite(float(value.detach())):
            raise ValueError(f"penalty must be finite; got {float(value.detach())}")
        return value

    def _missing(self, error: GradientError, label: str) -> str:
        if self.options.on_error == "raise":
            raise error
        return f"{label}: {type(error).__name__}: {error}"


@dataclass(frozen=True)
class _One:
    """What one task contributes."""

    value: float
    penalty: float
    status: Status
    gradients: Sequence[Tensor | None]
    error: str

    @property
    def dependent(self) -> bool:
        """Whether T gives a direction to go; the penalty of a run that missed does not count."""
        given = [gradient for gradient in self.gradients if gradient is not None]
        if self.status is Status.AT_START:
            return any(bool((gradient != 0).any()) for gradient in given)
        return self.status is Status.REACHED and bool(given)


def describe(number: int, task: TuningTask) -> str:
    """The task, for messages."""
    return f"task {number} ({task.name})" if task.name else f"task {number}"


@contextmanager
def _named(label: str) -> Any:
    """Say in which task an exception arose."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This happened in {label}.")
        raise


def _require_finite(gradients: Sequence[Tensor | None]) -> None:
    for position, gradient in enumerate(gradients):
        if gradient is not None and not bool(torch.isfinite(gradient).all()):
            raise GradientError(
                f"the gradient to parameter {position} holds NaN or inf, and is kept from the "
                "optimiser. Look for a root or a quotient that is singular in flow, criterion or "
                "penalty"
            )


def _mean(rows: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Sum over the tasks that depend on a parameter, over the number of all tasks."""
    means: list[Tensor | None] = []
    for column in zip(*rows, strict=True):
        given = [gradient for gradient in column if gradient is not None]
        means.append(torch.stack(given).sum(0) / len(rows) if given else None)
    return means
