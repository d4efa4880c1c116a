"""A solved problem solved again, at other tolerances: the plainest witness there is."""

from __future__ import annotations

from dataclasses import replace

from ..core.stats import Stats
from ..core.status import Status
from ..crossing.run import find_crossing, finer
from ..solving.tolerances import Tolerances
from .problem import StoppingProblem

__all__ = ["solved_again"]


def solved_again(problem: StoppingProblem, fraction: float) -> StoppingProblem | None:
    """The same problem with all tolerances `fraction` as large; None where T is not found there.

    The tolerances stay above what the dtype can hold.
    """
    tolerances: Tolerances = finer(problem.tolerances, fraction, problem.x0.dtype)
    stats = Stats()
    search = find_crossing(
        problem.flow,
        problem.criterion,
        problem.x0,
        problem.target,
        times=problem.times,
        settings=problem.settings,
        tolerances=tolerances,
        keep=True,
        stats=stats,
    )
    if search.status is not Status.REACHED or search.crossing is None or search.state_error is None:
        return None
    return replace(
        problem,
        tolerances=tolerances,
        trajectory=search.trajectory,
        crossing=search.crossing,
        state_error=search.state_error,
        stats=stats,
    )
