"""How a run can end, and the errors and warnings that say so.

Shared by the continuous side (`ode_stopping`) and the discrete side (`discrete`): a `Status` is
data, a `StoppingError` is the same fact raised, and every message says what happened and what to
try.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

__all__ = [
    "BacksolveMismatchError",
    "DegenerateCrossingError",
    "DivergedError",
    "GradientAccuracyWarning",
    "GradientError",
    "KinkWarning",
    "MissingGradientError",
    "NotReachedError",
    "NotReproducibleError",
    "StalledError",
    "Status",
    "StoppingError",
    "StoppingWarning",
    "UntrackedTensorError",
]


class Status(Enum):
    """How a run ended. The value is a sentence: what happened, and what to try."""

    REACHED = "The criterion met the target, by a transversal crossing."
    AT_START = (
        "The criterion has met the target at the start already: the stopping time is t0 and "
        "depends on t0 alone. Choose another target or start, or leave_first=True for the first "
        "crossing after the criterion has left the target."
    )
    NOT_REACHED = (
        "The criterion did not meet the target within the horizon. Raise max_time (or max_steps of "
        "an iteration), or choose a target that the best value seen has met."
    )
    DEGENERATE = (
        "The criterion touches the target without crossing it (J'(T) is zero to within the "
        "solver's "
        "tolerance), so the stopping time has no derivative here. Move the target a little."
    )
    DIVERGED = (
        "The state, its velocity or the criterion became infinite or NaN before the target was "
        "reached. "
        "Check the flow (a step size or rate too large?) and the start."
    )
    FINISHED = "The end time was reached."
    ZENO = (
        "An event follows on itself without end: its reset leaves the state on its own surface "
        "with the criterion still going through it, or the times between its hits have shrunk to "
        "nothing. What is known ends here. Let the reset lead away from the surface, let the "
        "criterion depend on the mode where the event is to be passed once, or end before (count=, "
        "until=)."
    )
    STALLED = (
        "The solver gave up: its step size underflowed or its step limit was used up. Loosen the "
        "tolerances, raise max_steps of the solver, or look for a singularity of the flow."
    )


class StoppingError(RuntimeError):
    """A run ended in a way that leaves no stopping time to use.

    Attributes:
        time: Flow time (or step) at which the run ended.
        step: Number of accepted steps until then.
        best: Smallest value of the criterion that was seen; the largest of one that rises.
        result: The full result, with the trajectory up to that point.
    """

    def __init__(
        self,
        message: str,
        *,
        time: float | None = None,
        step: int | None = None,
        best: float | None = None,
        result: Any = None,
    ) -> None:
        super().__init__(message)
        self.time = time
        self.step = step
        self.best = best
        self.result = result


class DegenerateCrossingError(StoppingError):
    """The transversality condition of Theorem 1 fails: J'(T) is zero to within the tolerance."""


class DivergedError(StoppingError):
    """State, velocity or criterion became non-finite."""


class StalledError(StoppingError):
    """The solver's step size underflowed, or its step limit was used up."""


class NotReachedError(StoppingError):
    """A non-zero cotangent reached the stopping time of a run that never met its target."""


class GradientError(RuntimeError):
    """A derivative could not be computed to the promised accuracy, so none is returned."""


class MissingGradientError(GradientError):
    """The user's flow, update or criterion loses part of its own derivative."""


class UntrackedTensorError(GradientError):
    """A tensor that requires grad showed up too late to receive its gradient."""


class NotReproducibleError(GradientError):
    """The same evaluation gave two different answers (randomness or hidden state)."""


class BacksolveMismatchError(GradientError):
    """The state re-integrated backward did not come back to the start."""


class StoppingWarning(UserWarning):
    """A result that is right as far as the arithmetic allows, and why that may not be far."""


class GradientAccuracyWarning(StoppingWarning):
    """A gradient whose estimated error exceeds the promise, with the reason and the remedy."""


class KinkWarning(StoppingWarning):
    """A function has a kink at the point itself: what is returned is a one-sided derivative."""


ERROR_OF_STATUS: dict[Status, type[StoppingError]] = {
    Status.DEGENERATE: DegenerateCrossingError,
    Status.DIVERGED: DivergedError,
    Status.STALLED: StalledError,
}
