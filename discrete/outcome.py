"""From what a run found to the result that the caller gets, or the error."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ode_stopping.core.describe import scalar
from ode_stopping.core.states import StateLayout
from ode_stopping.core.stats import TotalStats
from ode_stopping.core.status import ERROR_OF_STATUS, Status

from .gradients.one_target import Outcome
from .iterating.iteration import Clock
from .iterating.store import JoinedStore
from .result import IndexTrajectory, StoppingIndexResult

__all__ = ["finished", "finished_many"]


def finished(outcome: Outcome, layout: StateLayout, *, throw: bool) -> StoppingIndexResult:
    """The result for one target.

    Raises:
        StoppingError: The run diverged, and `throw` is True.
    """
    setup, search, problem = outcome.setup, outcome.search, outcome.problem
    state, reached = outcome.state, _reached(outcome)
    best, best_index = search.best
    result = StoppingIndexResult(
        index=search.index if reached else -1,
        steps=outcome.steps,
        time=_time(outcome, outcome.steps),
        state=layout.unpack(state),
        status=search.status,
        reached=torch.tensor(reached, device=state.device),
        decrease=scalar(_decrease(outcome), state),
        trajectory=IndexTrajectory(layout, search.losses, setup.store, clock=_clock(outcome)),
        stats=setup.stats,
        best=best,
        best_index=best_index,
        note=search.note,
        problem=problem,
    )
    if throw:
        _raise_failure(outcome, result, "")
    return result


def finished_many(
    outcomes: Sequence[Outcome], layout: StateLayout, *, throw: bool
) -> StoppingIndexResult:
    """The result for several targets, in their order.

    Raises:
        StoppingError: The run diverged, and `throw` is True.
    """
    state = torch.stack([outcome.state for outcome in outcomes])
    steps = torch.stack([outcome.steps for outcome in outcomes])
    in_order = sorted(outcomes, key=lambda outcome: -outcome.target)
    # Those that were met in one step, or missed together, are of one run.
    runs = list({id(outcome.search): outcome for outcome in in_order}.values())
    losses = runs[0].search.losses + [v for run in runs[1:] for v in run.search.losses[1:]]
    stores = [run.setup.store for run in runs if run.setup.store is not None]
    best, best_index = min(run.search.best for run in runs)
    times = [t for t in (_time(outcome, outcome.steps) for outcome in outcomes) if t is not None]
    result = StoppingIndexResult(
        index=torch.tensor([o.search.index if _reached(o) else -1 for o in outcomes]),
        steps=steps,
        time=torch.stack(times) if times else None,
        state=layout.unpack(state),
        status=[outcome.search.status for outcome in outcomes],
        reached=torch.tensor([_reached(o) for o in outcomes], device=state.device),
        decrease=torch.tensor(
            [_decrease(o) for o in outcomes], dtype=torch.float64, device=state.device
        ),
        trajectory=IndexTrajectory(
            layout, losses, JoinedStore(stores) if stores else None, clock=_clock(outcomes[0])
        ),
        stats=TotalStats([run.setup.stats for run in runs]),
        best=best,
        best_index=best_index,
        note=in_order[-1].search.note,
    )
    if throw:
        for outcome in in_order:
            _raise_failure(outcome, result, f"target {outcome.target:g}: ")
    return result


def _reached(outcome: Outcome) -> bool:
    return outcome.search.status in (Status.REACHED, Status.AT_START)


def _decrease(outcome: Outcome) -> float:
    return float("nan") if outcome.problem is None else outcome.problem.decrease


def _clock(outcome: Outcome) -> tuple[float, float] | None:
    update = outcome.setup.update
    return None if update.rule is None else (update.clock.start_value, update.clock.step_value)


def _time(outcome: Outcome, steps: Tensor) -> Tensor | None:
    """t0 + h steps; a miss by way of the steps alone, since 0 * inf on the way back is NaN."""
    clock: Clock = outcome.setup.update.clock
    if outcome.setup.update.rule is None:
        return None
    return clock.start + clock.step * steps if bool(torch.isfinite(steps)) else steps


def _raise_failure(outcome: Outcome, result: StoppingIndexResult, where: str) -> None:
    search = outcome.search
    error = ERROR_OF_STATUS.get(search.status)
    if error is None:
        return
    best, best_index = search.best
    raise error(
        f"{where}{search.status.name}: {search.status.value} [{search.note}; best J = {best:.6g} "
        f"at step {best_index}]",
        time=outcome.setup.update.clock.time(search.index),
        step=search.index,
        best=best,
        result=result,
    )
