"""A run to several targets, from one solve and with one backward pass.

Sorted from the highest, the targets are met in order of time. So the run to each goes on where the
one before ended, at the state x(T_k) at the *fixed* time T_k. The parts are joined by that state in
the autograd graph: on the way back lam arrives at T_k from the later targets, and jumps there by
-(w^T F + c) grad J / J' + w, the quotient of the cotangents on T_k and x_{T_k}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..core.functions import CriterionMap
from ..core.stats import Stats
from ..core.status import Status
from ..crossing.run import Search
from ..solving.breakpoints import smooth_pieces
from ..solving.flow_map import FlowMap
from . import GradientRoute
from .attach import Inputs, attach_crossing, attach_miss
from .one_target import Outcome, Setup, attached

__all__ = ["solve_targets"]

_PASSED = (Status.REACHED, Status.DEGENERATE)


def solve_targets(
    setup: Setup,
    gradient: GradientRoute | None,
    inputs: Inputs,
    targets: Sequence[Tensor],
) -> list[Outcome]:
    """One outcome a target, in the order given.

    Args:
        setup: The call as it would be for one target.
        gradient: Route.
        inputs: x0, t0 (with their graphs) and any target.
        targets: eps_k, each 0-d, no value twice.
    """
    order = sorted(range(len(targets)), key=lambda k: -float(targets[k].detach()))
    run = _Run(setup, gradient, inputs[0], inputs[1])
    found = {k: run.to(targets[k], last=k == order[-1]) for k in order}
    return [found[k] for k in range(len(targets))]


class _Run:
    """Where the run stands between two targets."""

    def __init__(
        self,
        setup: Setup,
        gradient: GradientRoute | None,
        x0: Tensor,
        t0: Tensor,
    ) -> None:
        self.setup = setup
        self.gradient = gradient
        self.start = x0
        self.time = t0
        self.leaves = setup.leaves.copy()
        self.checked = False
        self.ended: Search | None = None
        self.reached: Search | None = None

    def to(self, target: Tensor, *, last: bool) -> Outcome:
        """Go on to this target, lower than those before."""
        inputs = (self.start, self.time, target)
        if self.ended is not None:
            return self._without_run(self.ended, inputs)
        setup = self._fresh(float(target.detach()))
        search = setup.search(self.gradient)
        if search.status is Status.AT_START and self.reached is not None:
            # J is below this target where the one before was met: it jumped over both.
            note = f"J is down to {setup.target:g} where the target before it is met"
            met = replace(self.reached, status=Status.DEGENERATE, note=note)
            return self._without_run(met, inputs)
        self.setup = setup
        outcome = attached(setup, search, self.gradient, inputs, check=not self.checked or last)
        self.checked = self.checked or outcome.problem is not None
        if search.status in _PASSED:
            self._move(setup, search, outcome.fixed, inputs)
        elif search.status is not Status.AT_START:
            self.ended = search
        return outcome

    def _fresh(self, target: float) -> Setup:
        """The call from where the run stands, with counts and leaves of its own."""
        last, x0 = self.setup, self.start.detach().clone()
        start = last.times[0] if self.reached is None else self.reached.time
        jumps_at_start = last.flow.jumps_at_start if self.reached is None else False
        times, jumps = smooth_pieces(start, last.times[-1], last.times[1:-1], x0)
        flow, criterion = last.flow.function, last.criterion.function
        tried = last.stats.accepted + last.stats.rejected
        return replace(
            last,
            flow=FlowMap(
                flow, last.flow.layout, x0, times=times, jumps_at_start=jumps or jumps_at_start
            ),
            criterion=CriterionMap(criterion, last.criterion.layout, x0),
            leaves=self.leaves.copy(),
            times=times,
            x0=x0,
            target=target,
            stats=Stats(),
            origin=last.times[0] if last.origin is None else last.origin,
            steps_before=last.steps_before + tried,
            first_step=None if self.reached is None else self.reached.next_step,
        )

    def _move(self, setup: Setup, search: Search, fixed: Tensor | None, inputs: Inputs) -> None:
        """Stand at the crossing from now on."""
        self.reached = search
        differentiated = self.gradient is not None and torch.is_grad_enabled()
        if fixed is None and differentiated and search.crossing is not None:
            # A crossing without a derivative is passed by one that has it.
            assert self.gradient is not None
            *_, fixed = attach_crossing(setup.solved(search), self.gradient, inputs)
        self.start = search.state if fixed is None else fixed
        self.time = torch.tensor(search.time, dtype=torch.float64, device=search.state.device)

    def _without_run(self, search: Search, inputs: Inputs) -> Outcome:
        """No time of its own: the outcome of the latest run, whose leaves have been traced."""
        setup = replace(self.setup, target=float(inputs[2].detach()), stats=Stats())
        time, state = attach_miss(search, inputs, setup.leaves, setup.censored)
        return Outcome(search, time, state, None, None, setup)
