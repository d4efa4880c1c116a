"""The loop of tuning: evaluate, step, record. It is the same for flows and iterations."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..core.status import GradientError, Status
from ..core.validation import described
from .batch import Batch, Evaluation
from .history import TuningError, TuningHistory, TuningRecord, copy_into
from .options import TuningOptions
from .parameters import OptimizerLike, checked_optimizer, checked_parameters, needs_closure
from .progress import progress_bar
from .tasks import TuningTask

__all__ = ["minimise"]

_FEW = 32


def minimise(
    tasks: Sequence[TuningTask],
    parameters: Any,
    *,
    settings: dict[str, Any],
    optimizer: OptimizerLike,
    options: TuningOptions,
) -> TuningHistory:
    """Minimise the mean of tasks of any kind; `minimise_stopping_time` documents it.

    Args:
        tasks: All of one kind.
        parameters: What is tuned.
        settings: What every run is called with, `gradient` among them.
        optimizer: Over the parameters.
        options: All else.
    """
    chosen = checked_parameters(parameters)
    moved = checked_optimizer(optimizer, chosen)
    if settings.get("gradient") is None:
        raise ValueError("gradient must be a route: tuning goes along a gradient; got None")
    loop = _Loop(_checked_tasks(tasks), chosen, moved, settings, options)
    try:
        with torch.enable_grad(), progress_bar(options.iterations, wanted=options.progress) as show:
            return loop.run(show)
    except TuningError:
        raise
    except GradientError as error:
        raise TuningError(
            f"iteration {loop.iteration}: {error} {' '.join(getattr(error, '__notes__', ()))} "
            '(on_error="skip" goes on without the gradient of that task)',
            history=loop.history,
        ) from error
    except Exception as error:
        error.add_note(f"Tuning was at iteration {loop.iteration}.")
        raise
    finally:
        # The gradients of the last step are nobody's business, and another loss would add to them.
        for parameter in chosen:
            parameter.grad = None


@dataclass
class _Loop:
    """A run of the loop."""

    tasks: list[TuningTask]
    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer
    settings: dict[str, Any]
    options: TuningOptions
    iteration: int = 0
    barren: int = 0
    history: TuningHistory = field(init=False)
    batch: Batch = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        self.history = TuningHistory(self.tasks[0].quantity)
        self.batch = Batch(self.parameters, self.settings, options)
        size = options.batch_size
        self.whole = size is None or size >= len(self.tasks)
        self.size = len(self.tasks) if self.whole or size is None else size
        self.in_a_pass = -(-len(self.tasks) // self.size)
        self.closure = needs_closure(self.optimizer)
        if self.closure and not self.whole:
            raise ValueError(
                f"batch_size must be None with {type(self.optimizer).__name__}: it combines "
                "gradients of several evaluations, which have to be of the same tasks"
            )

    def run(self, show: Callable[[TuningRecord], None]) -> TuningHistory:
        """All iterations, and the evaluation after the last."""
        options, history = self.options, self.history
        batches = self._batches()
        history.stopped = ""
        for self.iteration in range(options.iterations):
            begin = time.perf_counter()
            if self.iteration % self.in_a_pass == 0:
                self.barren = 0
            numbers = next(batches)
            full = None
            if not self.whole and options.restore_best and self.iteration % self.in_a_pass == 0:
                full = self._evaluate(range(len(self.tasks)), gradient=False).objective
            evaluation = self._evaluate(numbers, gradient=True)
            record = self._record(evaluation, numbers, full)
            self._step(evaluation, numbers)
            history.records[-1] = replace(record, seconds=time.perf_counter() - begin)
            show(history.records[-1])
            if options.callback is not None and options.callback(history.records[-1]) is True:
                history.stopped = "callback"
                break
        self.iteration += 1
        self._finish()
        history.stopped = history.stopped or "iterations"
        return history

    def _finish(self) -> None:
        """Look at the parameters after the last step, and put the best ones back."""
        begin = time.perf_counter()
        numbers = range(len(self.tasks))
        evaluation = self._evaluate(numbers, gradient=False)
        record = self._record(evaluation, numbers, evaluation.objective)
        self.history.records[-1] = replace(record, seconds=time.perf_counter() - begin)
        if self.options.restore_best:
            copy_into(self.parameters, self.history.best_parameters)

    def _batches(self) -> Any:
        """Numbers of tasks, without end: all, or in passes through all in random order."""
        if self.whole:
            while True:
                yield range(len(self.tasks))
        generator = torch.Generator().manual_seed(self.options.seed)
        while True:
            order = torch.randperm(len(self.tasks), generator=generator).tolist()
            for first in range(0, len(order), self.size):
                yield order[first : first + self.size]

    def _evaluate(self, numbers: Sequence[int], *, gradient: bool) -> Evaluation:
        return self.batch.evaluate([(n, self.tasks[n]) for n in numbers], gradient=gradient)

    def _record(
        self, evaluation: Evaluation, numbers: Sequence[int], full: float | None
    ) -> TuningRecord:
        """Put an evaluation on record, and keep a copy of the parameters if they are the best."""
        if self.whole:
            full = evaluation.objective
        known = [r.full_objective for r in self.history.records if r.full_objective is not None]
        if full is not None and full < min(known, default=inf):
            self.history.best_parameters = tuple(p.detach().clone() for p in self.parameters)
        count = sum(p.numel() for p in self.parameters)
        row = torch.cat([p.detach().reshape(-1).double().cpu() for p in self.parameters])
        record = TuningRecord(
            iteration=self.iteration,
            objective=evaluation.objective,
            full_objective=full,
            mean=evaluation.mean,
            penalty=evaluation.penalty,
            reached=evaluation.reached,
            missed=evaluation.missed,
            gradient_norm=evaluation.norm,
            tasks=tuple(numbers),
            errors=evaluation.errors,
            parameters=tuple(row.tolist()) if count <= _FEW else None,
        )
        self.history.records.append(record)
        return record

    def _step(self, evaluation: Evaluation, numbers: Sequence[int]) -> None:
        """One step of the optimiser from an evaluation; none where it gives no direction."""
        if not self._hand_over(evaluation):
            return
        if self.closure:
            pending = [evaluation]

            def closure() -> Tensor:
                if pending:  # the first look is at the parameters that were just evaluated
                    return torch.tensor(pending.pop().objective, dtype=torch.float64)
                again = self._evaluate(numbers, gradient=True)
                self._hand_over(again)
                return torch.tensor(again.objective, dtype=torch.float64)

            self.optimizer.step(closure)  # type: ignore[arg-type]
        else:
            self.optimizer.step()
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters):
            raise TuningError(
                f"the parameters became NaN or infinite in the step of iteration {self.iteration}: "
                "choose a smaller rate of the optimiser, or clip=. The best parameters until then "
                "are in .history",
                history=self.history,
            )

    def _hand_over(self, evaluation: Evaluation) -> bool:
        """Give the gradient to the parameters, clipped; False where there is none to give.

        Raises:
            TuningError: A whole pass through the tasks gave none.
        """
        if not evaluation.dependent:
            self.barren += 1
            if self.barren >= self.in_a_pass:
                raise TuningError(self._nothing(evaluation), history=self.history)
            return False
        assert evaluation.gradients is not None
        norm, clip = evaluation.norm, self.options.clip
        scale = clip / norm if clip is not None and norm > clip else 1.0
        for parameter, gradient in zip(self.parameters, evaluation.gradients, strict=True):
            parameter.grad = None if gradient is None else (scale * gradient).to(parameter)
        return True

    def _nothing(self, evaluation: Evaluation) -> str:
        """Why there is no gradient to follow, and what to do."""
        counts = {status: evaluation.statuses.count(status) for status in evaluation.statuses}
        listed = ", ".join(f"{count} {status.name}" for status, count in counts.items())
        where = f"iteration {self.iteration}: no task has a gradient ({listed})"
        if evaluation.errors:
            return f"{where}; the first error was: {evaluation.errors[0]}"
        if evaluation.missed == len(evaluation.statuses):
            return (
                f"{where}: nothing was reached. Raise the horizon (max_time, max_steps), choose an "
                "easier target, or start from parameters that reach it"
                + (". Smaller steps of the optimiser may help" if self.iteration else "")
            )
        if Status.REACHED in counts:
            return (
                f"{where}: the stopping times do not depend on the parameters. Are those used in "
                "flow, criterion or start, and not only what was computed from them once?"
            )
        return (
            f"{where}: the runs that met their target were there at the start, or touched it only. "
            "Choose smaller targets"
        )


def _checked_tasks(tasks: Any) -> list[TuningTask]:
    if isinstance(tasks, TuningTask):
        tasks = [tasks]
    try:
        given = list(tasks)
    except TypeError:
        raise TypeError(f"tasks must be tasks, one or many; got {described(tasks)}") from None
    if not given:
        raise ValueError("tasks must hold at least one task; got none")
    for position, task in enumerate(given):
        if not isinstance(task, TuningTask):
            raise TypeError(
                f"tasks must hold tasks, as in StoppingTask(flow, x0, criterion, target); entry "
                f"{position} is {described(task)}"
            )
        task.check(f"task {position}")
    return given
