"""From what a run found to the result that the caller gets, or the error."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .core.describe import scalar
from .core.states import StateLayout
from .core.stats import Stats, TotalStats
from .core.status import ERROR_OF_STATUS, Status
from .crossing.run import Search
from .gradients.one_target import Outcome
from .result import StoppingResult
from .solving.trajectory import Trajectory

__all__ = ["finished", "finished_many"]

_HITS = (Status.REACHED, Status.AT_START, Status.DEGENERATE)


def finished(outcome: Outcome, layout: StateLayout, *, throw: bool) -> StoppingResult:
    """The result for one target.

    Raises:
        StoppingError: The run ended DEGENERATE, DIVERGED or STALLED, and `throw` is True.
    """
    search, problem, state = outcome.search, outcome.problem, outcome.state
    result = StoppingResult(
        time=outcome.time,
        state=layout.unpack(state),
        status=search.status,
        reached=torch.tensor(search.status in _HITS, device=state.device),
        rate=scalar(_rate(search), state),
        trajectory=search.trajectory,
        stats=outcome.setup.stats,
        best=search.best[0],
        best_time=search.best[1],
        note=search.note,
        near_miss=search.near_miss,
        evidence=None if problem is None else problem.evidence,
        problem=problem,
    )
    if throw:
        _raise_failure(search, result, result.stats, "")
    return result


def finished_many(
    outcomes: Sequence[Outcome], layout: StateLayout, *, throw: bool
) -> StoppingResult:
    """The result for several targets, in their order.

    Raises:
        StoppingError: The run to one of them ended DEGENERATE, DIVERGED or STALLED, and `throw` is
            True; all are solved before.
    """
    searches = [outcome.search for outcome in outcomes]
    state = torch.stack([outcome.state for outcome in outcomes])
    rates = [_rate(search) for search in searches]
    # In order of time: the runs that went on where others ended, and those that failed once.
    in_order = sorted(outcomes, key=lambda outcome: -outcome.setup.target)
    parts: list[Trajectory] = []
    for outcome in in_order:
        if not any(outcome.search.trajectory is part for part in parts):
            parts.append(outcome.search.trajectory)
    best = min(search.best for search in searches)
    misses = [search.near_miss for search in searches if search.near_miss is not None]
    result = StoppingResult(
        time=torch.stack([outcome.time for outcome in outcomes]),
        state=layout.unpack(state),
        status=[search.status for search in searches],
        reached=torch.tensor([s.status in _HITS for s in searches], device=state.device),
        rate=torch.tensor(rates, dtype=torch.float64, device=state.device),
        trajectory=Trajectory.joined(parts),
        stats=TotalStats([outcome.setup.stats for outcome in in_order]),
        best=best[0],
        best_time=best[1],
        note=in_order[-1].search.note,
        near_miss=min(misses, key=lambda miss: miss.margin, default=None),
        evidence=[o.problem.evidence if o.problem is not None else None for o in outcomes],
    )
    if throw:
        for outcome in in_order:
            where = f"target {outcome.setup.target:g}: "
            _raise_failure(outcome.search, result, result.stats, where)
    return result


def _rate(search: Search) -> float:
    return search.crossing.rate if search.crossing else float("nan")


def _raise_failure(search: Search, result: StoppingResult, stats: Stats, where: str) -> None:
    error = ERROR_OF_STATUS.get(search.status)
    if error is None:
        return
    raise error(
        f"{where}{search.status.name}: {search.status.value} [{search.note}; t = "
        f"{search.time:.9g}, {stats.accepted} steps, best J = {search.best[0]:.6g} at t = "
        f"{search.best[1]:.6g}]",
        time=search.time,
        step=stats.accepted,
        best=search.best[0],
        result=result,
    )
