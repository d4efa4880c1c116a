"""What is tuned on: one problem with one start, that can be run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from torch import Tensor

from ..core.states import State
from ..core.validation import Direction, checked_direction, require_callable, require_flag
from ..gradients import GradientRoute, StepAdjoint
from ..result import StoppingResult
from ..solving.solver import Solver
from ..stopping import stopping_time

__all__ = ["Censored", "Start", "StoppingTask", "TuningTask"]

Start: TypeAlias = State | Callable[[], State]
Censored: TypeAlias = float | Literal["horizon"]


class TuningTask(ABC):
    """One run, the number of its result that is to become small, and what that is called.

    A subclass has the fields `x0`, `target`, `t0` and `name`.

    Attributes:
        x0: Start: a state, or a callable () -> state that makes it anew for every run.
        target: eps.
        t0: Start time, in flow time.
        name: For messages; may be empty.
        quantity: The attribute of the result that is minimised, a 0-d tensor.
    """

    x0: Start
    target: float | Tensor
    t0: float | Tensor
    name: str
    quantity: ClassVar[str]

    @abstractmethod
    def run(self, **settings: Any) -> Any:
        """The result of a run; a miss is censored, and nothing but GradientErrors is thrown.

        Args:
            **settings: `gradient` (a route or None), `censored`, and what else the kind has.
        """

    def start(self) -> State:
        """The start of a run that begins now."""
        return self.x0() if callable(self.x0) else self.x0

    def check(self, label: str) -> None:
        """Raise unless the task can be run again after its parameters have moved.

        Raises:
            ValueError: The start, t0 or target was computed once and has kept its graph; the target
                is not one number.
        """
        if isinstance(self.target, Tensor) and self.target.ndim > 0:
            raise ValueError(
                f"the target of {label} must be one number; got shape {tuple(self.target.shape)}. "
                "Make a task of each"
            )
        start = () if callable(self.x0) else self.x0
        pieces = start if isinstance(start, tuple) else (start,)
        for what, tensors in (("x0", pieces), ("t0", (self.t0,)), ("target", (self.target,))):
            if any(isinstance(t, Tensor) and t.grad_fn is not None for t in tensors):
                way = "pass a callable () -> state" if what == "x0" else "make it a leaf"
                raise ValueError(
                    f"{what} of {label} was computed from other tensors once, and would be out of "
                    f"date after the first step: {way}, or detach it"
                )


@dataclass(frozen=True, eq=False)
class StoppingTask(TuningTask):
    """One flow with one start, criterion and target: what `stopping_time` is called with.

    Args:
        flow: Module or callable (t, x) -> dx/dt.
        x0: Start: a tensor, a tuple of tensors, or a callable () -> state, for a start that depends
            on parameters that are tuned (v0 = beta(t0) grad f(x0), say).
        criterion: Module or callable (t, x) -> J.
        target: eps, one number.
        t0: Start time, in flow time.
        direction: As for `stopping_time`.
        leave_first: As for `stopping_time`.
        max_time: Absolute horizon, in flow time; None: t0 + 1e6, which is a long run where the
            target is out of reach, and a large number to count a miss with.
        breakpoints: Times at which the flow jumps.
        params: As for `stopping_time`; seldom needed.
        evidence: As for `stopping_time`; "light" halves the time of a step.
        name: For messages.

    Raises:
        TypeError: Flow or criterion cannot be called; leave_first is no flag.
        ValueError: An unknown direction.
    """

    quantity: ClassVar[str] = "time"

    flow: Callable[..., Any]
    x0: Start
    criterion: Callable[..., Any]
    target: float | Tensor
    _: KW_ONLY
    t0: float | Tensor = 0.0
    direction: Direction = "falling"
    leave_first: bool = False
    max_time: float | None = None
    breakpoints: Iterable[float] | None = None
    params: Sequence[Tensor] | None = None
    evidence: Literal["light", "standard", "thorough"] = "standard"
    name: str = ""

    def __post_init__(self) -> None:
        require_callable(self.flow, name="flow")
        require_callable(self.criterion, name="criterion")
        checked_direction(self.direction)
        require_flag(self.leave_first, name="leave_first")
        if self.breakpoints is not None:
            # An iterator would be used up by the first run.
            object.__setattr__(self, "breakpoints", tuple(self.breakpoints))

    def run(
        self,
        *,
        gradient: GradientRoute | None = StepAdjoint(),  # noqa: B008 - immutable
        censored: Censored = "horizon",
        solver: Solver | None = None,
        **unknown: Any,
    ) -> StoppingResult:
        """The stopping time from here.

        Args:
            gradient: Route; None: the time only.
            censored: What a miss counts as: a time, or "horizon".
            solver: As for `stopping_time`.
            **unknown: None.

        Raises:
            TypeError: Settings of another kind of task.
            Others: What `stopping_time` raises, without StoppingErrors.
        """
        if unknown:
            raise TypeError(f"a StoppingTask has no setting {', '.join(unknown)}")
        return stopping_time(
            self.flow,
            self.start(),
            self.criterion,
            self.target,
            t0=self.t0,
            direction=self.direction,
            leave_first=self.leave_first,
            max_time=self.max_time,
            breakpoints=self.breakpoints,
            params=self.params,
            gradient=gradient,
            censored=censored,
            solver=solver,
            throw=False,
            evidence=self.evidence,
        )
