"""A run to several targets, from one iteration and with one backward pass.

Sorted from the highest, the targets are met in order of k. So the run to each goes on where the one
before ended, at x_N with N held fixed, and the parts are joined by that state in the autograd
graph: on the way back lam arrives at x_N from the later targets, and jumps there by what N and x_N
themselves received. Targets that are met in one step share that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ode_stopping.core.functions import CriterionMap
from ode_stopping.core.stats import Stats
from ode_stopping.core.status import Status

from ..iterating.iteration import UpdateMap
from ..iterating.store import ShiftedStore
from .adjoint import IndexRoute
from .one_target import Outcome, Setup, attached

__all__ = ["solve_targets"]


def solve_targets(
    setup: Setup,
    gradient: IndexRoute | None,
    inputs: tuple[Tensor, Tensor],
    targets: Sequence[Tensor],
) -> list[Outcome]:
    """One outcome a target, in the order given.

    Args:
        setup: The call as it would be for one target.
        gradient: Route.
        inputs: x0 and t0 with their graphs.
        targets: eps_k, each 0-d, no value twice.
    """
    left = sorted(range(len(targets)), key=lambda k: -float(targets[k].detach()))
    start, t0 = inputs
    blank, checked = setup.leaves.copy(), False
    found: dict[int, Outcome] = {}
    while left:
        setup = replace(
            _fresh(setup, gradient, len(targets)),
            target=float(targets[left[0]].detach()),
            leaves=blank.copy(),
        )
        search = setup.search()
        met = search.status in (Status.REACHED, Status.AT_START)
        # What the last step met with it; of a run that failed, everything that was left.
        group = [k for k in left if not met or search.losses[-1] <= float(targets[k].detach())]
        left = left[len(group) :]
        outcomes = attached(
            setup,
            search,
            gradient,
            (start, t0),
            [targets[k] for k in group],
            check=not checked or not left,
        )
        found |= dict(zip(group, outcomes, strict=True))
        if search.status is Status.REACHED:
            checked, start = True, outcomes[0].state
            setup = replace(setup, x0=search.state, first=search.index)
    return [found[k] for k in range(len(targets))]


def _fresh(setup: Setup, gradient: IndexRoute | None, parts: int) -> Setup:
    """The call from where it stands, with counts and a store of its own."""
    update, criterion, x0 = setup.update, setup.criterion, setup.x0
    return replace(
        setup,
        update=UpdateMap(update.given, update.layout, x0, update.clock),
        criterion=CriterionMap(criterion.function, criterion.layout, x0),
        store=None if gradient is None else ShiftedStore(gradient.store(parts), setup.first),
        stats=Stats(),
    )
