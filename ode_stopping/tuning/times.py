"""`minimise_stopping_time`: tuning on the continuous side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from torch import Tensor, nn

from ..core.validation import require_instance
from ..gradients import GradientRoute, StepAdjoint
from ..result import StoppingResult
from ..solving.solver import Solver
from .history import TuningHistory, TuningRecord
from .loop import minimise
from .options import TuningOptions
from .parameters import OptimizerLike
from .tasks import Censored, StoppingTask

__all__ = ["minimise_stopping_time"]


def minimise_stopping_time(
    tasks: StoppingTask | Iterable[StoppingTask],
    parameters: Tensor | nn.Module | Iterable[Tensor | nn.Module],
    *,
    optimizer: OptimizerLike = None,
    iterations: int = 100,
    batch_size: int | None = None,
    censored: Censored = "horizon",
    penalty: Callable[[StoppingTask, StoppingResult], Tensor] | None = None,
    weight: float = 1.0,
    solver: Solver | None = None,
    gradient: GradientRoute = StepAdjoint(),  # noqa: B008 - immutable
    clip: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
    callback: Callable[[TuningRecord], bool | None] | None = None,
    restore_best: bool = True,
    on_error: Literal["raise", "skip"] = "raise",
) -> TuningHistory:
    """Tune parameters by gradient descent on the mean stopping time.

        min over theta of mean_i [ T_i(theta) + weight * penalty_i(theta) ]

    with one task i for every problem and start. How a run counts goes by its status:

    ============  =====================================  ==============================
    status        value                                  gradient
    ============  =====================================  ==============================
    REACHED       T                                      that of T
    AT_START      t0                                     0 (1 to t0)
    DEGENERATE    T                                      none: a constant
    NOT_REACHED   `censored`                             none: a constant
    DIVERGED,     `censored`, and no penalty             none: a constant
    STALLED
    ============  =====================================  ==============================

    The penalty of a run without gradient still counts with its value, and with its gradient as far
    as it depends on the parameters themselves and not on the path: the state of such a run is a
    constant. Sums are divided by the number of all runs, so that a miss weighs as much as a hit.

    Every iteration runs its tasks, takes one step of the optimiser and leaves a record; after the
    last step all tasks are run once more. The parameters are moved in place. Interrupted (Ctrl-C),
    or ended by an error, the run leaves them where they are.

    Args:
        tasks: One task or many.
        parameters: Tensors that require grad, modules, or both.
        optimizer: A `torch.optim.Optimizer` over exactly these parameters, or a function parameters
            -> optimiser; None: Adam with the rate 1e-2. LBFGS works, without minibatches; all that
            it evaluates within a step is one iteration here.
        iterations: Steps of the optimiser.
        batch_size: Tasks an iteration, taken in passes through all of them in random order; None:
            all tasks.
        censored: What a miss counts as: a flow time, or "horizon", each task's own `max_time`.
        penalty: (task, result) -> 0-d tensor, such as an integral along the path:
            ``lambda task, result: sum(task.flow.integrals(result.state))`` for a `WithIntegrals`.
        weight: Of the penalty, >= 0.
        solver: For all runs; None: `Torchdiffeq()`.
        gradient: Route of the derivatives.
        clip: Largest norm of the gradient that the optimiser sees; longer ones are scaled down.
        seed: Of the order of minibatches, on a generator of its own.
        progress: Whether a bar is shown on stderr; None: if rich is installed and stderr is a
            terminal.
        callback: Called with the record of an iteration after its step (a learning-rate scheduler's
            step can go here). Returning True ends the run.
        restore_best: Put the parameters with the smallest objective over all tasks back at the end.
            With minibatches all tasks are therefore run, without gradients, before every pass
            through them: an objective over a few tasks says little about the rest.
        on_error: What a `GradientError` or a gradient of NaN does. "raise": it ends the run, as the
            cause of a TuningError that names task and iteration. "skip": the task counts with its
            value, without a gradient, and the record says why.

    Returns:
        The history: one record an iteration, `.best`, `.best_parameters`, `.plot()`.

    Raises:
        TypeError, ValueError: Bad input, naming the argument.
        TuningError: In a whole pass through the tasks none had a gradient (nothing was reached, or
            nothing depends on the parameters); a gradient failed (see `on_error`); the parameters
            became NaN. `.history` has the records and the best parameters until then.

    Warns:
        What `stopping_time` and its backward pass warn about.
    """
    options = TuningOptions.among(locals())
    require_instance(solver, Solver, name="solver", example="Torchdiffeq(rtol=1e-5)")
    require_instance(gradient, GradientRoute, name="gradient", example="StepAdjoint()")
    return minimise(
        tasks,  # type: ignore[arg-type]
        parameters,
        settings={"gradient": gradient, "solver": solver},
        optimizer=optimizer,
        options=options,
    )
