"""A solved problem solved again, at other tolerances: the plainest witness there is."""

from __future__ import annotations

from dataclasses import replace

from ..crossing.run import find_crossings
from .problem import StoppingProblem

__all__ = ["solved_again"]


def solved_again(problem: StoppingProblem, fraction: float) -> StoppingProblem | None:
    """The same problem with all tolerances `fraction` as large; None where a T is not found there.

    The tolerances stay above what the dtype can hold.
    """
    call = problem.call
    tolerances = call.tolerances.finer(fraction, call.x0.dtype)
    run = find_crossings(
        replace(
            call,
            tolerances=tolerances,
            targets=tuple(hit.watch.target for hit in problem.hits),
        )
    )
    if len([hit for hit in run.hits if hit.status.name == "REACHED"]) < len(problem.hits):
        return None
    return StoppingProblem.of(run, problem.leaves)
