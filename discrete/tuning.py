"""Tuning by descending the stopping index: twin of `ode_stopping.tuning`, with the same loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from ode_stopping.core.validation import (
    Direction,
    checked_direction,
    require_callable,
    require_flag,
    require_instance,
)
from ode_stopping.tuning import TuningHistory, TuningOptions, TuningRecord, TuningTask, minimise
from ode_stopping.tuning.parameters import OptimizerLike
from ode_stopping.tuning.tasks import Censored, Start

from .gradients.adjoint import DiscreteAdjoint, IndexRoute
from .result import StoppingIndexResult
from .stopping import Interpolation, stopping_index

__all__ = ["StoppingIndexTask", "minimise_stopping_index"]


@dataclass(frozen=True, eq=False)
class StoppingIndexTask(TuningTask):
    """One iteration with one start, criterion and target: what `stopping_index` is called with.

    Args:
        update: An `UpdateRule`, or any callable (k, x) -> x_next. The step of a rule is tuned as
            the leaf it is and may become negative, which is an error; ``lambda k, x: x -
            log_h.exp() * f.gradient(x)`` stays admissible.
        x0: Start: a tensor, a tuple of tensors, or a callable () -> state, for a start that depends
            on parameters that are tuned.
        criterion: Module or callable (t, x) -> J.
        target: eps, one number.
        t0: Start time, in flow time.
        direction: As for `stopping_index`.
        leave_first: As for `stopping_index`.
        max_steps: Limit on the number of steps.
        interpolation: As for `stopping_index`. None: the objective is the whole number N and the
            gradient Definition 3's, of a smooth curve through the steps of N: it descends, but the
            objective is flat between its jumps. "log" (for J > 0) makes the objective continuous,
            with its own gradient; a line search (LBFGS) needs that.
        params: As for `stopping_index`; seldom needed.
        evidence: As for `stopping_index`; "light" saves two runs a step.
        name: For messages.

    Raises:
        TypeError: Update or criterion cannot be called; leave_first is no flag.
        ValueError: An unknown direction.
    """

    quantity: ClassVar[str] = "steps"

    update: Callable[..., Any]
    x0: Start
    criterion: Callable[..., Any]
    target: float | Tensor
    _: KW_ONLY
    t0: float | Tensor = 0.0
    direction: Direction = "falling"
    leave_first: bool = False
    max_steps: int = 1_000_000
    interpolation: Interpolation | None = None
    params: Sequence[Tensor] | None = None
    evidence: Literal["light", "standard"] = "standard"
    name: str = ""

    def __post_init__(self) -> None:
        require_callable(self.update, name="update", call="(k, x) -> x_next")
        require_callable(self.criterion, name="criterion")
        checked_direction(self.direction)
        require_flag(self.leave_first, name="leave_first")

    def run(
        self,
        *,
        gradient: IndexRoute | None = DiscreteAdjoint(),  # noqa: B008 - immutable
        censored: Censored = "horizon",
        **unknown: Any,
    ) -> StoppingIndexResult:
        """The stopping index from here.

        Args:
            gradient: Route; None: the index only.
            censored: What a miss counts as: a number of steps, or "horizon" (max_steps).
            **unknown: None.

        Raises:
            TypeError: Settings of another kind of task.
            Others: What `stopping_index` raises, without StoppingErrors.
        """
        if unknown:
            raise TypeError(f"a StoppingIndexTask has no setting {', '.join(unknown)}")
        return stopping_index(
            self.update,
            self.start(),
            self.criterion,
            self.target,
            t0=self.t0,
            direction=self.direction,
            leave_first=self.leave_first,
            max_steps=self.max_steps,
            interpolation=self.interpolation,
            params=self.params,
            gradient=gradient,
            censored=censored,
            throw=False,
            evidence=self.evidence,
        )


def minimise_stopping_index(
    tasks: StoppingIndexTask | Iterable[StoppingIndexTask],
    parameters: Tensor | nn.Module | Iterable[Tensor | nn.Module],
    *,
    optimizer: OptimizerLike = None,
    iterations: int = 100,
    batch_size: int | None = None,
    censored: Censored = "horizon",
    penalty: Callable[[StoppingIndexTask, StoppingIndexResult], Tensor] | None = None,
    weight: float = 1.0,
    gradient: IndexRoute = DiscreteAdjoint(),  # noqa: B008 - immutable
    clip: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
    callback: Callable[[TuningRecord], bool | None] | None = None,
    restore_best: bool = True,
    on_error: Literal["raise", "skip"] = "raise",
) -> TuningHistory:
    """Tune parameters by gradient descent on the mean stopping index.

        min over theta of mean_i [ N_i(theta) + weight * penalty_i(theta) ]

    The twin of `ode_stopping.minimise_stopping_time`, which says how the outcomes count, and what
    the arguments, errors and the history are: read steps for times, and `max_steps` for `max_time`.
    With fractional indices N is N* (see `StoppingIndexTask`).

    Args:
        tasks: One task or many.
        parameters: Tensors that require grad, modules, or both.
        optimizer: Over the parameters, or a function that makes one; None: Adam with rate 1e-2.
        iterations: Steps of the optimiser.
        batch_size: Tasks an iteration; None: all.
        censored: What a miss counts as: a number of steps, or "horizon".
        penalty: (task, result) -> 0-d tensor.
        weight: Of the penalty, >= 0.
        gradient: Route of the derivatives.
        clip: Largest norm of the gradient that the optimiser sees.
        seed: Of the order of minibatches.
        progress: Whether a bar is shown; None: on a terminal.
        callback: Called with the record of an iteration after its step; True ends the run.
        restore_best: Put the parameters with the smallest objective over all tasks back at the end.
        on_error: "raise" or "skip", for a task whose gradient fails.

    Raises:
        TypeError, ValueError, TuningError: As `minimise_stopping_time`.
    """
    options = TuningOptions.among(locals())
    require_instance(gradient, IndexRoute, name="gradient", example="DiscreteAdjoint()")
    return minimise(
        tasks,  # type: ignore[arg-type]
        parameters,
        settings={"gradient": gradient},
        optimizer=optimizer,
        options=options,
    )
