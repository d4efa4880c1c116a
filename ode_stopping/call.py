"""What was asked of `stopping_time`: one record, made once by the entry and passed whole.

A run has the call that it answers, a solved problem has its run. A new setting of the entry is a
field here, read where it matters; nothing in between hands it on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor

from .core.functions import Clock, CriterionMap, ResetMap
from .core.leaves import LeafSet
from .core.states import StateLayout
from .core.status import Status
from .solving.flow_map import FlowMap
from .solving.solver import Method, Solver, Tolerances

__all__ = ["Call", "Route", "Rule", "Watch"]


class Route(Protocol):
    """What a run asks of a gradient route (`gradients.route.GradientRoute`)."""

    @property
    def needs_path(self) -> bool:
        """Whether the steps have to be kept."""


@dataclass(frozen=True)
class Watch:
    """A target that a criterion is watched for; a run ends when all of its watches have been met.

    Attributes:
        index: Its place among the watches of the call.
        criterion: J on flat vectors; it falls, whatever direction the user's J has.
        target: eps, which J falls to.
        leave: The value that J has to exceed before a fall to the target counts; None: it counts
            from now on, and J is above the target.
        landed: Whether J has been put on the target by a reset, and has not left it since.
        event: What it belongs to: a crossing in either direction has two watches.
        repeats: Whether it is waited for again once it was met.
        count: The run ends where its event is met for so many times from now on; None: it does not.
        name: What the target is called.
    """

    index: int
    criterion: CriterionMap
    target: float
    leave: float | None = None
    landed: bool = False
    event: int = 0
    repeats: bool = False
    count: int | None = None
    name: str = "target"

    @property
    def time(self) -> float | None:
        """When it is met, in flow time, where that is known: J is the clock."""
        return -self.target if isinstance(self.criterion, Clock) else None

    def counting(self) -> Watch:
        """The same, once J has been above its target."""
        return replace(self, leave=None, landed=False)


@dataclass(frozen=True)
class Rule:
    """What follows where an event is met.

    Attributes:
        name: What the event is called.
        reset: x+ = R(t, x-); None: x stays as it is.
        count: The whole ends where it is met for so many times; None: it does not.
        status: What that end is called.
        late: Whether J has to leave the target at the start before anything counts.
    """

    name: str
    reset: ResetMap | None = None
    count: int | None = None
    status: Status = Status.REACHED
    late: bool = False

    @property
    def ends_runs(self) -> bool:
        """Whether every hit ends a run, for something else begins there."""
        return self.reset is not None


@dataclass(frozen=True)
class Call:
    """A checked call.

    Attributes:
        flow: dx/dt on flat vectors.
        leaves: Tensors that receive gradients as far as they are known before any evaluation.
        solver: Of the forward run.
        method: The solver's, for the dtype of the state.
        tolerances: Likewise.
        times: Start, breakpoints and horizon: the flow is smooth in t between them.
        x0: Start, shape (n,), without graph.
        watches: What the run looks for, in the order given.
        learned: The breakpoints that require grad, in the order given.
        gradient: Route of the derivatives; None: the time only, and nothing is kept.
        censored: What a miss counts as, in flow time; None: infinity.
        evidence: How much is asked of a gradient: "light", "standard" or "thorough".
        leave_first: Whether J has to be above a target before a fall to it counts.
        rules: What follows where the events are met, by the number of the event; empty: the call
            ends with its watches.
    """

    flow: FlowMap
    leaves: LeafSet
    solver: Solver
    method: Method
    tolerances: Tolerances
    times: tuple[float, ...]
    x0: Tensor
    watches: tuple[Watch, ...]
    learned: tuple[float, ...] = ()
    gradient: Route | None = None
    censored: float | None = None
    evidence: Literal["light", "standard", "thorough"] = "standard"
    leave_first: bool = False
    rules: tuple[Rule, ...] = ()

    @property
    def layout(self) -> StateLayout:
        """Layout of the state."""
        return self.flow.layout

    @property
    def criteria(self) -> list[CriterionMap]:
        """The criteria that are watched, each once."""
        return list({id(watch.criterion): watch.criterion for watch in self.watches}.values())

    @property
    def resets(self) -> list[ResetMap]:
        """The resets of the events."""
        return [rule.reset for rule in self.rules if rule.reset is not None]

    @property
    def functions(self) -> dict[str, object]:
        """The user's functions, by name."""
        criteria = [one.function for one in self.criteria if not isinstance(one, Clock)]
        resets = [one.function for one in self.resets]
        found: dict[str, object] = {"flow": self.flow.function}
        for name, functions in (("criterion", criteria), ("reset", resets)):
            for index, function in enumerate(functions):
                found[name if len(functions) == 1 else f"{name} {index}"] = function
        return found

    @property
    def start(self) -> float:
        """t0, in flow time."""
        return self.times[0]

    @property
    def first_piece(self) -> int:
        """The number of the smooth piece of the flow that the run starts on."""
        return self.flow.number_at(self.start)

    @property
    def keeps(self) -> bool:
        """Whether the forward run keeps its steps."""
        if self.gradient is None:
            return False
        # x and lam at a breakpoint, and what is asked of every leaf, need the steps.
        return self.gradient.needs_path or len(self.times) > 2 or not self.light

    @property
    def light(self) -> bool:
        """Whether a gradient is judged by what the solves know anyway."""
        return self.evidence == "light"

    @property
    def thorough(self) -> bool:
        """Whether steps are halved until two gradients in a row agree."""
        return self.evidence == "thorough"

    @property
    def promise(self) -> float:
        """The relative error of a gradient up to which nothing is said."""
        return self.tolerances.promise(self.x0.dtype)
