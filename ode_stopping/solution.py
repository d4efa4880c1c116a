"""What `integrate` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .call import Rule
from .core.describe import detached_state, numbers, scalar
from .core.guards import MissedValue
from .core.optional import optional_module, pictures
from .core.states import State
from .core.stats import Costs, Stats
from .core.status import ERROR_OF_STATUS, Status
from .crossing.transitions import Execution
from .gradients.attach import Differentiation
from .gradients.chain import Row
from .solving.hybrid_trajectory import HybridTrajectory

__all__ = ["Hit", "Solution", "require_no_failure", "solution_of"]


@dataclass(frozen=True)
class Hit:
    """An event that was met.

    Attributes:
        event: Its place among the events of the call; None for the end where that is no event.
        time: T in flow time, shape (), float64; differentiable.
        state: x(T), before a reset, of x0's structure; differentiable.
        after: x behind the reset; the state itself where nothing resets it.
        count: The number of the hit of its event, from 1.
    """

    event: int | None
    time: Tensor
    state: State
    after: State
    count: int

    def detached(self) -> Hit:
        """Without graphs."""
        return replace(
            self,
            time=self.time.detach(),
            state=detached_state(self.state),
            after=detached_state(self.after),
        )


class _Latest:
    """The evidence of the latest backward pass, or as it was pickled."""

    def __init__(self, fixed: Any = None, differentiation: Differentiation | None = None) -> None:
        self._fixed = fixed
        self._differentiation = differentiation

    def latest(self) -> Any:
        """The one with the largest estimate; None before a backward pass."""
        if self._differentiation is None:
            return self._fixed
        found = self._differentiation.evidence
        judged = [one for one in found if one.estimate is not None]
        return max(judged, key=lambda one: one.estimate or 0.0, default=None)


@dataclass(frozen=True, repr=False)
class Solution:
    """Values at known times and at events, all of them differentiable, from one solve.

    Attributes:
        times: The times `at`, shape (len(at),), as they were given.
        states: The state there, each piece of shape (len(at), ...); at a jump the one behind it,
            NaN beyond the end.
        hits: The events that were met, in order of time.
        end: Where it ended.
        status: How: REACHED (a terminal event), FINISHED (`until`), AT_START, NOT_REACHED, ZENO,
            DEGENERATE, DIVERGED or STALLED.
        trajectory: The path, with its jumps.
        note: One more sentence on the end; may be empty.
        stats: Counts; those of the backward pass are None until a gradient was taken, then those of
            the latest.
        evidence: Figures for the error of the latest gradient, an `Evidence`; None before one.
        statuses: Of each event: REACHED, AT_START where it was met at t0, NOT_REACHED where it was
            never met.
    """

    times: Tensor
    states: State
    hits: tuple[Hit, ...]
    end: Hit
    status: Status
    trajectory: HybridTrajectory
    note: str = ""
    statuses: tuple[Status, ...] = ()
    _miss: Any = field(default=None, compare=False)
    _costs: Costs = field(default_factory=lambda: Costs(Stats()), compare=False)
    _evidence: _Latest = field(default_factory=_Latest, compare=False)

    @property
    def stats(self) -> Stats:
        """What it cost so far."""
        return self._costs.total

    @property
    def evidence(self) -> Any:
        """What speaks for the latest gradient."""
        return self._evidence.latest()

    def of(self, event: int) -> list[Hit]:
        """The hits of one event, in order of time.

        Args:
            event: Its place among the events of the call.
        """
        return [hit for hit in self.hits if hit.event == event]

    def first(self, event: int, n: int = 1) -> Tensor:
        """The time of hit n of an event, shape (); infinite where there is none.

        A time that is infinite raises `NotReachedError` where it is differentiated.

        Args:
            event: Its place among the events of the call.
            n: The number of the hit, from 1.
        """
        found = self.of(event)
        if len(found) >= n:
            return found[n - 1].time
        missed = scalar(float("inf"), self.end.time)
        return missed if self._miss is None else self._miss(missed)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings only; states as nested lists."""
        return {
            "status": self.status.name,
            "note": self.note,
            "times": self.times.tolist(),
            "states": _lists(self.states),
            "hits": [_row_of(hit) for hit in self.hits],
            "end": _row_of(self.end),
            "stats": self.stats.to_dict(),
        }

    def to_dataframe(self) -> Any:
        """The hits as a pandas DataFrame, one row each (needs the extra `checks`)."""
        pandas = optional_module("pandas", "to_dataframe")
        rows = []
        for hit in self.hits:
            row: dict[str, Any] = {"event": hit.event, "count": hit.count}
            row["time"] = hit.time.item()
            for name, state in (("before", hit.state), ("after", hit.after)):
                for index, value in enumerate(_flat(state).tolist()):
                    row[f"{name}[{index}]"] = value
            rows.append(row)
        return pandas.DataFrame(rows)

    def plot(self, axes: Any = None) -> Any:
        """The entries of x(t) with jumps and events (matplotlib; needs the extra `checks`)."""
        return pictures().plot_solution(self, axes=axes)

    def __getstate__(self) -> dict[str, Any]:
        plain = replace(
            self,
            times=self.times.detach(),
            states=detached_state(self.states),
            hits=tuple(hit.detached() for hit in self.hits),
            end=self.end.detached(),
            _miss=None,
            _costs=Costs(self.stats),
            _evidence=_Latest(self.evidence),
        )
        return dict(plain.__dict__)

    def __repr__(self) -> str:
        s = self.stats
        lines = [
            "Solution",
            f"  status      {self.status.name}" + (f" ({self.note})" if self.note else ""),
            f"  end         {numbers(self.end.time, 12)}",
        ]
        for event in sorted({hit.event for hit in self.hits if hit.event is not None}):
            times = torch.stack([hit.time for hit in self.of(event)])
            lines.append(f"  event {event}     {len(times)} x: {numbers(times, 8)}")
        lines += [
            f"  values      at {len(self.times)} times",
            f"  steps       {s.accepted} accepted, {s.rejected} rejected",
            f"  evaluations {s.nfe_forward} flow ({s.control} of them control the velocity), "
            f"{s.criterion_calls} criterion, {s.checks} checks",
        ]
        evidence = self.evidence
        if evidence is not None:
            lines.append(
                f"  gradient    estimated error {evidence.estimate:.1e} "
                f"(promise {evidence.promise:.0e})"
            )
        if s.vjps is not None:
            lines.append(
                f"  backward    {s.vjps} vector-Jacobian products, {s.nfe_backward} flow "
                "evaluations"
            )
        if s.fallback is not None:
            lines.append(f"  route       {s.route}: {s.fallback}")
        return "\n".join(lines)


def _flat(state: State) -> Tensor:
    pieces = state if isinstance(state, tuple) else (state,)
    return torch.cat([piece.detach().reshape(-1) for piece in pieces])


def _lists(state: State) -> Any:
    if isinstance(state, tuple):
        return [piece.tolist() for piece in state]
    return state.tolist()


def _row_of(hit: Hit) -> dict[str, Any]:
    return {
        "event": hit.event,
        "count": hit.count,
        "time": hit.time.item(),
        "state": _lists(hit.state),
        "after": _lists(hit.after),
    }


def solution_of(
    execution: Execution,
    rows: Sequence[Row],
    found: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]],
    times: Tensor,
    events: int,
    *,
    inputs: Sequence[Tensor],
    costs: Costs,
    differentiation: Differentiation | None,
) -> Solution:
    """The solution of an execution.

    Args:
        execution: What was found.
        rows: The same as rows of a chain.
        found: Times, states before and behind resets of the rows, with their graphs.
        times: The times at which values are asked for.
        events: How many events there are.
        inputs: All tensors that may require grad, for what was missed.
        costs: What it cost.
        differentiation: The solved chain; None where there is nothing to differentiate.
    """
    call = execution.call
    unpack = call.layout.unpack
    status = execution.status
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    where = (
        f"{status.name}: {status.value} It ended at t = {execution.time:.9g}: ask for what is "
        "there, or look at .status and .hits first."
    )

    def missed(value: Tensor) -> Tensor:
        if not wanted:
            return value
        nothing = value.new_zeros(())
        (time, _) = MissedValue.apply(where, value, nothing, *wanted)
        return time

    counts = [0] * (events + 1)
    hits: list[Hit] = []
    at: dict[int, Tensor] = {}
    end: Hit | None = None
    for row, time, before, after in zip(rows, *found, strict=True):
        number = row.watch.event
        if number > events:
            at[number - events - 1] = before
            continue
        counts[number] += 1
        behind = before if after is None else after
        hit = Hit(
            number if number < events else None,
            time,
            unpack(before),
            unpack(behind),
            counts[number],
        )
        if number < events:
            hits.append(hit)
        rule: Rule = call.rules[number]
        if rule.count is not None and counts[number] >= rule.count:
            end = hit
    if end is None:
        state = missed(execution.state)
        last = missed(scalar(execution.time, execution.state))
        end = Hit(None, last, unpack(state), unpack(state), 1)
    blank = torch.full_like(execution.state, float("nan"))
    values = [at[index] if index in at else missed(blank) for index in range(len(times))]
    stacked = torch.stack(values) if values else blank.new_zeros((0, blank.numel()))
    arcs = [arc.run.trajectory for arc in execution.arcs if arc.run is not None]
    return Solution(
        times=times,
        states=unpack(stacked),
        hits=tuple(hits),
        end=end,
        status=status,
        trajectory=HybridTrajectory(call.layout, arcs, (execution.time, execution.state)),
        note=execution.note,
        statuses=tuple(_status_of(number, hits, call.start) for number in range(events)),
        _miss=missed,
        _costs=costs,
        _evidence=_Latest(None, differentiation),
    )


def _status_of(event: int, hits: Sequence[Hit], start: float) -> Status:
    first = next((hit for hit in hits if hit.event == event), None)
    if first is None:
        return Status.NOT_REACHED
    return Status.AT_START if first.time.item() == start else Status.REACHED


def require_no_failure(execution: Execution, solution: Solution) -> None:
    """Raise what the status calls for.

    Raises:
        StoppingError: DEGENERATE, DIVERGED or STALLED.
    """
    error = ERROR_OF_STATUS.get(execution.status)
    if error is None:
        return
    status, steps = execution.status, execution.stats.accepted
    raise error(
        f"{status.name}: {status.value} [{execution.note}; t = {execution.time:.9g}, "
        f"{steps} steps, {len(solution.hits)} hits]",
        time=execution.time,
        step=steps,
        result=solution,
    )
