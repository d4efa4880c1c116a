"""What a tuning run leaves behind: a record an iteration, and the best parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import inf, isnan, nan
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.optional import optional_module
from .parameters import checked_parameters

__all__ = ["Best", "TuningError", "TuningHistory", "TuningRecord"]


class Best(NamedTuple):
    """The iteration with the smallest objective over all tasks."""

    iteration: int
    objective: float


@dataclass(frozen=True)
class TuningRecord:
    """One iteration: the parameters before its step, and what they gave.

    Attributes:
        iteration: From 0; the last record is the evaluation after the last step.
        objective: mean + weight * penalty, over the tasks of this iteration.
        full_objective: The same over all tasks; None where only a minibatch was run.
        mean: Mean stopping time (or index), misses with what they count as.
        penalty: Mean penalty, without its weight.
        reached: Runs that met their target.
        missed: Runs that did not (NOT_REACHED, DIVERGED, STALLED).
        gradient_norm: Before clipping; NaN where no gradient was taken.
        seconds: Wall time.
        tasks: The numbers of the tasks that were run.
        errors: Why the gradient of a task is missing (with `on_error="skip"`).
        parameters: All parameters in one row, where they are 32 numbers at most; else None.
    """

    iteration: int
    objective: float
    full_objective: float | None
    mean: float
    penalty: float
    reached: int
    missed: int
    gradient_norm: float = nan
    seconds: float = 0.0
    tasks: tuple[int, ...] = ()
    errors: tuple[str, ...] = ()
    parameters: tuple[float, ...] | None = None


@dataclass(repr=False)
class TuningHistory:
    """The records of a tuning run.

    Attributes:
        quantity: What was minimised: "time" or "steps".
        records: One an iteration, and one after the last step.
        stopped: Why it ended: "iterations", "callback", or "" while it runs.
        best_parameters: Copies of the parameters with the smallest objective over all tasks; empty
            before there was one.
    """

    quantity: str
    records: list[TuningRecord] = field(default_factory=list)
    stopped: str = ""
    best_parameters: tuple[Tensor, ...] = ()

    @property
    def best(self) -> Best:
        """The iteration with the smallest objective over all tasks, and that objective.

        Iterations that ran a minibatch only do not count: their objectives are of other tasks.

        Raises:
            ValueError: All tasks were never run together.
        """
        best = Best(-1, inf)
        for record in self.records:
            if record.full_objective is not None and record.full_objective < best.objective:
                best = Best(record.iteration, record.full_objective)
        if best.iteration < 0:
            raise ValueError(
                "no iteration ran all tasks: with batch_size= they are run together where "
                "restore_best is True"
            )
        return best

    @property
    def objectives(self) -> list[float]:
        """The objective of every record."""
        return [record.objective for record in self.records]

    def load_best(self, parameters: Any) -> None:
        """Copy the best parameters into these, in the order in which they were given.

        Args:
            parameters: As for the run.

        Raises:
            ValueError: There are none, or they do not fit.
        """
        targets = checked_parameters(parameters)
        if [p.shape for p in targets] != [p.shape for p in self.best_parameters]:
            raise ValueError(
                f"the best parameters have shapes {[tuple(p.shape) for p in self.best_parameters]};"
                f" got {[tuple(p.shape) for p in targets]}"
            )
        copy_into(targets, self.best_parameters)

    def to_dataframe(self) -> Any:
        """One row a record as a pandas DataFrame (needs the extra `checks`)."""
        pandas = optional_module("pandas", "to_dataframe")
        rows = []
        for record in self.records:
            row = asdict(record)
            for position, value in enumerate(row.pop("parameters") or ()):
                row[f"parameter_{position}"] = value
            rows.append(row)
        return pandas.DataFrame(rows)

    def plot(self, axes: Any = None) -> Any:
        """Objective and share of runs that met their target, over iterations (matplotlib).

        Args:
            axes: Matplotlib axes; None makes a figure. The share has an axis of its own on the
                right, and is left out where nothing was missed.

        Returns:
            The axes.

        Raises:
            ImportError: Matplotlib is missing; the message says what to install.
        """
        from ..plots.style import GREY, INK, canvas, legend

        axes = canvas(axes, "plot")
        full = [r for r in self.records if r.full_objective is not None]
        batches = [r for r in self.records if len(full) < len(self.records)]
        if batches:
            shown = [r for r in batches if r.gradient_norm == r.gradient_norm]
            axes.plot(
                [r.iteration for r in shown],
                [r.objective for r in shown],
                color=GREY,
                linewidth=0.8,
                label="minibatch",
            )
        axes.plot(
            [r.iteration for r in full],
            [r.full_objective for r in full],
            marker="." if len(full) < 60 else "",
            label="all tasks",
        )
        if full:
            best = self.best
            label = f"best: {best.objective:.5g} at {best.iteration}"
            axes.plot(best.iteration, best.objective, "o", color=INK, label=label)
        if any(record.missed for record in self.records):
            share = axes.twinx()
            reached = [r.reached / (r.reached + r.missed) for r in self.records]
            numbers = [r.iteration for r in self.records]
            share.plot(numbers, reached, color=GREY, linestyle=":")
            share.set(ylim=(-0.02, 1.02), ylabel="share of runs that met their target (dotted)")
        axes.set_xlabel("iteration")
        axes.set_ylabel("objective" if self.quantity == "time" else f"objective ({self.quantity})")
        legend(axes)
        return axes

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        if not self.records:
            return "TuningHistory(no records)"
        first, last = self.records[0], self.records[-1]
        runs = last.reached + last.missed
        noun = "time" if self.quantity == "time" else "index"
        lines = [
            f"TuningHistory of a stopping {noun}",
            f"  iterations  {last.iteration} ({self.stopped or 'not ended'}), "
            f"{sum(r.seconds for r in self.records):.3g} s",
            f"  objective   {first.objective:.6g} -> {last.objective:.6g}",
            f"  mean {noun:6s} {first.mean:.6g} -> {last.mean:.6g}",
        ]
        if any(r.full_objective is not None for r in self.records):
            best = self.best
            lines.append(f"  best        {best.objective:.6g} at iteration {best.iteration}")
        if any(r.penalty for r in self.records):
            lines.append(f"  penalty     {first.penalty:.6g} -> {last.penalty:.6g}")
        lines.append(f"  reached     {last.reached} of {runs} in the last record")
        skipped = sum(len(r.errors) for r in self.records)
        if skipped:
            lines.append(f"  errors      {skipped} gradients were missing; see .records[i].errors")
        return "\n".join(lines)


class TuningError(RuntimeError):
    """Tuning cannot go on.

    Attributes:
        history: The records until then, with the best parameters.
    """

    def __init__(self, message: str, *, history: TuningHistory) -> None:
        super().__init__(message)
        self.history = history


def copy_into(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Values of the sources into the targets, in place."""
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def shown(value: float) -> str:
    """A number for a short line; empty where there is none."""
    return "" if isnan(value) else f"{value:.5g}"
