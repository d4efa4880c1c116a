"""`integrate`: values at known times and at events, with resets, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .call import Call, Rule, Watch
from .core.functions import Clock, CriterionMap, ResetMap
from .core.leaves import LeafSet
from .core.states import State, StateLayout
from .core.stats import Costs, Stats
from .core.status import Status
from .core.validation import (
    checked_evidence,
    checked_horizon,
    checked_scalar,
    checked_state,
    checked_target,
    described,
    leaving_inference_mode,
    refuse_batches,
    refuse_transforms,
    require_callable,
    require_flag,
    require_instance,
)
from .crossing.transitions import Execution, follow
from .events import Event
from .gradients import GradientRoute, StepAdjoint
from .gradients.attach import Differentiation, Inputs, attach, is_needed, looked_at
from .gradients.chain import Chain
from .gradients.tracing import check_criterion, check_start, trace_leaves
from .solution import Solution, require_no_failure, solution_of
from .solving.breakpoints import as_list, learned_times, smooth_pieces
from .solving.flow_map import FlowMap
from .solving.solver import Solver
from .solving.torchdiffeq import Torchdiffeq

__all__ = ["integrate"]


@leaving_inference_mode
def integrate(
    flow: Callable[..., Any],
    x0: State,
    *,
    t0: float | Tensor = 0.0,
    until: float | Tensor | None = None,
    at: Iterable[float | Tensor] | Tensor = (),
    events: Iterable[Event] = (),
    leave_first: bool = False,
    max_time: float | None = None,
    solver: Solver | None = None,
    gradient: GradientRoute | None = StepAdjoint(),  # noqa: B008 - immutable
    params: Iterable[Tensor] | None = None,
    breakpoints: Iterable[float | Tensor] | None = None,
    batched: bool = False,
    throw: bool = True,
    evidence: Literal["light", "standard", "thorough", "cheap"] = "standard",
) -> Solution:
    """Integrate x' = F(t, x) from (t0, x0) through events; all that is found is differentiable.

    At a hit T_k of an event the state may be reset, x+ = R(T_k, x-). Every time and every state is
    differentiable to the parameters of flow, criteria and resets, to x0, t0, targets, and to known
    times (`at`, `until`, `Event.at`, breakpoints) that require grad, by one backward pass for all
    of them. With c the cotangent on T_k, w and w+ those on x- and x+, lam+ what comes back from
    behind, and J' = g^T F- + J_t,

        s = -(w^T F- + (lam+ + w+)^T (R_x F- + R_t) - lam+^T F+ + c) / J',
        lam- = R_x^T (lam+ + w+) + w + s g,

    (the saltation formula: Theorem 1 of arXiv 2505.22509 on each arc, and the chain rule through R
    between them). `stopping_time` is the special case of one terminal event.

    Args:
        flow: Module or callable (t, x) -> dx/dt; t is a 0-d tensor.
        x0: Start: a tensor of any shape, or a tuple of tensors.
        t0: Start time, in flow time.
        until: End time, in flow time; it may require grad.
        at: Times at which the state is asked for, in any order: numbers, 0-d tensors, or a tensor
            of shape (M,); they may require grad.
        events: What is looked for (`Event`), and what follows there.
        leave_first: No event is met at t0: each criterion has to be on the other side of its target
            first.
        max_time: Absolute horizon without `until`, in flow time; None: t0 + 1e6.
        solver: As for `stopping_time`.
        gradient: As for `stopping_time`.
        params: As for `stopping_time`.
        breakpoints: As for `stopping_time`.
        batched: Many independent problems on one clock (not available yet).
        throw: Raise for DEGENERATE, DIVERGED and STALLED instead of returning the status.
        evidence: As for `stopping_time`.

    The rules where events meet. *At the start*: an event whose criterion is at its target or past
    it is met at t0, unless `leave_first`; one of direction "either" never is. *After a hit* it
    counts again once the criterion has left the target by more than its rounding. *A reset that
    ends on its own event's target*, with the criterion still going through it, ends everything:
    ZENO; so do hits that come ever faster. *A reset past another event's target* meets that one at
    once, in the order of `events`. *At one time*, to rounding: in the order of `events`, each sees
    the state that the one before has left, and counts only if it is still met there; a
    `KinkWarning` says so where the order matters.

    Raises:
        TypeError, ValueError: Bad input, naming the argument; nothing that could end it.
        StoppingError: The run ended DEGENERATE, DIVERGED or STALLED, and `throw` is True.
        GradientError: A function loses part of its derivatives, or is not reproducible.
        NotImplementedError: `batched`.

    Warns:
        GradientAccuracyWarning, StoppingWarning, KinkWarning: As for `stopping_time`.
    """
    refuse_batches(batched=batched)
    level = checked_evidence(evidence)
    refuse_transforms(x0, t0, until)
    require_callable(flow, name="flow")
    require_instance(solver, Solver, name="solver", example='Torchdiffeq(method="dopri5")')
    require_instance(gradient, GradientRoute, name="gradient", example="StepAdjoint()")
    require_flag(throw, name="throw")
    require_flag(leave_first, name="leave_first")
    listed = _checked_events(events)
    state = checked_state(x0)
    layout = StateLayout.of(state)
    packed = layout.pack(state)
    start_time = checked_scalar(t0, name="t0", like=packed)
    start = float(start_time.detach())
    end_time = None if until is None else checked_scalar(until, name="until", like=packed)
    end = None if end_time is None else float(end_time.detach())
    if end is not None and not end > start:
        raise ValueError(f"until must be later than t0 = {start:g}; got {end:g}")
    if end is not None and max_time is not None:
        raise ValueError("until is the end already: give it or max_time, not both")
    if end is None and all(event.ends_after is None for event in listed):
        raise ValueError(
            "nothing ends the solve: give until=, or an event with terminal=True or count="
        )
    horizon = checked_horizon(max_time, start, packed) if end is None else end
    x_start = packed.detach().clone()  # an optimiser may move x0 before the backward pass
    asked = _Asked(layout, x_start, start, leave_first=leave_first)
    for index, event in enumerate(listed):
        asked.add_event(index, event)
    asked.add_end(end_time)
    times = _checked_times(at, packed, start)
    for index, time in enumerate(times.unbind()):
        asked.add_time(index, time)
    given = as_list(breakpoints)
    learned = learned_times(given)
    _, jumps_at_start = smooth_pieces(start, horizon, given, x_start)
    nodes = asked.with_resets(given)
    pieces, _ = smooth_pieces(start, horizon, nodes, x_start)
    chosen = solver if solver is not None else Torchdiffeq()
    functions = [one for event in listed for one in (event.criterion, event.reset) if one]
    call = Call(
        flow=FlowMap(flow, layout, x_start, times=pieces, jumps_at_start=jumps_at_start),
        leaves=LeafSet.collect(flow, *functions, params=params),
        solver=chosen,
        method=chosen.method(packed.dtype),
        tolerances=chosen.tolerances(packed.dtype),
        times=pieces,
        x0=x_start,
        watches=tuple(asked.watches),
        learned=tuple(float(one.detach()) for one in learned),
        gradient=gradient,
        evidence=level,
        rules=tuple(asked.rules),
    )
    if gradient is not None:
        check_start(call)
    execution = follow(call)
    inputs = Inputs(packed, start_time, tuple(asked.targets), learned)
    solution = _attached(execution, inputs, times, len(listed))
    if throw:
        require_no_failure(execution, solution)
    return solution


def _checked_events(events: object) -> list[Event]:
    if isinstance(events, Event):
        raise TypeError("events must be a list of them, as in events=[event]; got a single Event")
    if isinstance(events, str) or not isinstance(events, Iterable):
        raise TypeError(f"events must be a list of Event; got {described(events)}")
    listed = list(events)
    for index, event in enumerate(listed):
        if not isinstance(event, Event):
            raise TypeError(
                f"events must hold Event(criterion, target, ...); entry {index} is "
                f"{described(event)}"
            )
    return listed


def _checked_times(at: object, like: Tensor, start: float) -> Tensor:
    """The times of `at` as one tensor, shape (M,), with its graph.

    Raises:
        TypeError, ValueError: Not times; earlier than t0.
    """
    if isinstance(at, Tensor) and at.ndim != 1:
        raise ValueError(f"at must be a list of times or a 1-d tensor; got shape {tuple(at.shape)}")
    if isinstance(at, str) or not isinstance(at, Iterable):
        raise TypeError(f"at must be a list of times; got {described(at)}")
    given: Sequence[object] = at.unbind() if isinstance(at, Tensor) else list(at)
    times = [
        checked_scalar(time, name=f"at[{index}]", like=like) for index, time in enumerate(given)
    ]
    for index, time in enumerate(times):
        if float(time.detach()) < start:
            raise ValueError(
                f"at[{index}] must not be earlier than t0 = {start:g}; got {float(time.detach()):g}"
            )
    if not times:
        return torch.zeros(0, dtype=torch.float64, device=like.device)
    return torch.stack([time.to(torch.float64) for time in times])


class _Asked:
    """Watches, rules and targets, as they are collected from the arguments."""

    def __init__(self, layout: StateLayout, x0: Tensor, start: float, *, leave_first: bool) -> None:
        self._layout, self._x0, self._start = layout, x0, start
        self._leave_first = leave_first
        self._clock = Clock(layout, x0)
        self._maps: dict[tuple[int, bool], CriterionMap] = {}
        self._resets: list[float] = []
        self.watches: list[Watch] = []
        self.rules: list[Rule] = []
        self.targets: list[Tensor] = []

    def add_event(self, index: int, event: Event) -> None:
        """A criterion, or a known time."""
        name = f"events[{index}]"
        reset = None
        if event.reset is not None:
            reset = ResetMap(event.reset, self._layout, self._x0)
        if event.time is not None:
            time = checked_scalar(event.time, name=f"{name}.time", like=self._x0)
            value = float(time.detach())
            if value < self._start:
                raise ValueError(
                    f"{name}.time must not be earlier than t0 = {self._start:g}; got {value:g}"
                )
            if reset is not None or event.terminal:
                self._resets.append(value)
            ends = 1 if reset is not None or event.terminal else None
            self._watch_clock(time, f"{name}.time", event=index, count=ends)
            self.rules.append(Rule(name, reset, event.ends_after))
            return
        assert event.criterion is not None
        target = checked_target(event.target, like=self._x0, criterion=event.criterion)
        either = event.direction == "either"
        for rises in [False, True] if either else [event.direction == "rising"]:
            key = (id(event.criterion), rises)
            if key not in self._maps:
                self._maps[key] = CriterionMap(event.criterion, self._layout, self._x0, rises=rises)
            oriented = self._maps[key].oriented(target)
            self._watch(
                self._maps[key],
                oriented,
                f"{name}.target" + (f" ({'rising' if rises else 'falling'})" if either else ""),
                event=index,
                repeats=True,
                count=1 if reset is not None else event.ends_after,
            )
        late = either or event.leave_first or self._leave_first
        self.rules.append(Rule(name, reset, event.ends_after, late=late))

    def add_end(self, until: Tensor | None) -> None:
        """The end time, if there is one."""
        if until is not None:
            self._watch_clock(until, "until", event=len(self.rules), count=1)
        self.rules.append(Rule("until", count=1, status=Status.FINISHED))

    def add_time(self, index: int, time: Tensor) -> None:
        """A time at which the state is asked for."""
        self._watch_clock(time, f"at[{index}]", event=len(self.rules), count=None)
        self.rules.append(Rule(f"at[{index}]"))

    def with_resets(self, breakpoints: list[Any] | None) -> list[Any]:
        """The breakpoints, and the known times at which runs end."""
        return [*(breakpoints or ()), *self._resets]

    def _watch_clock(self, time: Tensor, name: str, *, event: int, count: int | None) -> None:
        self._watch(self._clock, self._clock.oriented(time), name, event=event, count=count)

    def _watch(self, criterion: CriterionMap, target: Tensor, name: str, **options: Any) -> None:
        value = float(target.detach())
        self.watches.append(Watch(len(self.watches), criterion, value, name=name, **options))
        self.targets.append(target)


def _attached(execution: Execution, inputs: Inputs, times: Tensor, events: int) -> Solution:
    """The solution, with graphs where a gradient was asked for."""
    call, route = execution.call, execution.call.gradient
    assert route is None or isinstance(route, GradientRoute)
    runs = [arc.run for arc in execution.arcs if arc.run is not None]
    if route is None or not torch.is_grad_enabled():
        chain = Chain.of_execution(execution, call.leaves)
        rows = chain.rows
        plain = (
            [torch.tensor(row.time, dtype=torch.float64, device=call.x0.device) for row in rows],
            [row.before for row in rows],
            [row.after for row in rows],
        )
        return solution_of(
            execution,
            rows,
            plain,
            times.detach(),
            events,
            inputs=(),
            costs=Costs(execution.stats),
            differentiation=None,
        )
    calls = call.flow.calls
    transitions = [*execution.first, *(one for arc in execution.arcs for one in arc.closing)]
    leaves = trace_leaves(call, runs, transitions)
    needed = is_needed(route, leaves, inputs)
    if needed:
        for run in runs:
            for hit in run.hits:
                if hit.status is Status.DEGENERATE:
                    check_criterion(call, leaves, hit)
    chain = Chain.of_execution(execution, leaves)
    chain = looked_at(chain, route, needed=needed, t0_wanted=inputs.t0.requires_grad)
    costs = Costs(execution.stats + Stats(checks=call.flow.calls - calls))
    differentiation = Differentiation(chain, route, costs) if chain.rows else None
    found: Any = ([], [], [])
    if differentiation is not None:
        found = attach(differentiation, inputs)
    return solution_of(
        execution,
        chain.rows,
        found,
        times,
        events,
        inputs=(*inputs.tensors, *leaves.tensors),
        costs=costs,
        differentiation=differentiation,
    )
