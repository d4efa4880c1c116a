"""A hybrid problem, written once over operations that numpy and torch both have.

No torch here, nor in `path` and `oracle`: what they say is independent of the library. One
expression serves both sides, so that no error of transcription can be taken for one of the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Values = Mapping[str, Any]
Criterion = Callable[[Any, Any, Any, Values], Any]
Reset = Callable[[Any, Any, Any, Values], Any]
Velocity = Callable[[Any, Any, Any, Values, Any], Any]

DIRECTIONS = ("falling", "rising", "either")


class Unusable(Exception):
    """No problem for a comparison; the message says why, in the words that are counted."""


class _Numpy:
    """Operations on arrays; x may have one axis more, the last, for points of time."""

    exp, sin, cos, tanh, sqrt = np.exp, np.sin, np.cos, np.tanh, np.sqrt

    def stack(self, parts: list[Any]) -> Any:
        return np.array(parts)

    def matvec(self, matrix: Any, x: Any) -> Any:
        return matrix @ x

    def dot(self, a: Any, b: Any) -> Any:
        return a @ b


NUMPY = _Numpy()


@dataclass(frozen=True)
class Watch:
    """One event of a problem: a surface that is crossed, or a known time.

    Attributes:
        criterion: (operations, t, x, p) -> J, of components, numbers and dot products; None: an
            event at a known time.
        level: Name in p of the target, or of the known time.
        direction: "falling", "rising" or "either".
        reset: (operations, t, x, p) -> x+; None: x is not changed.
        terminal: Whether the first hit ends the run.
        count: At which hit the run ends.
        leave_first: Whether a watch that is met at the start has to be left first.
    """

    criterion: Criterion | None
    level: str
    direction: str = "falling"
    reset: Reset | None = None
    terminal: bool = False
    count: int | None = None
    leave_first: bool = False


@dataclass(frozen=True)
class Observable:
    """A number that L weighs.

    Attributes:
        what: "time", "state" (before) or "after" (behind) of a hit; "at", the state at a fixed
            time; "end_time", "end_state".
        event: Index of the event, for a hit.
        nth: Which of its hits, from 1; for "at": the index of the time.
        component: Of the state.
    """

    what: str
    event: int = -1
    nth: int = 0
    component: int = 0


@dataclass(frozen=True)
class Hybrid:
    """x' = F(t, x, p, on), with resets where its watches are met.

    Attributes:
        family: Its name.
        velocity: (operations, t, x, p, on) -> x'; on[k] is 1 behind the k-th breakpoint, else 0.
        leaves: What is differentiated to, by name: "x0", "t0", perhaps "until" and "at" (1-d), the
            targets and known times of the watches, the breakpoints, all other parameters.
        constants: What else p holds.
        watches: In the order of the call.
        breakpoints: Names in p of the times at which the velocity jumps.
        terms: What L is of, with the weights.
    """

    family: str
    velocity: Velocity
    leaves: dict[str, Any]
    watches: tuple[Watch, ...]
    constants: dict[str, Any] = field(default_factory=dict)
    breakpoints: tuple[str, ...] = ()
    terms: tuple[tuple[float, Observable], ...] = ()

    @property
    def times(self) -> set[str]:
        """Names of the leaves that are times."""
        known = {w.level for w in self.watches if w.criterion is None}
        return ({"t0", "until", "at", *self.breakpoints} | known) & set(self.leaves)

    @property
    def targets(self) -> set[str]:
        """Names of the leaves that are targets."""
        return {w.level for w in self.watches if w.criterion is not None}

    @property
    def p(self) -> dict[str, Any]:
        """All values by name."""
        return {name: _value(v) for name, v in (self.leaves | self.constants).items()}

    @property
    def size(self) -> int:
        """Dimension of the state."""
        return len(self.leaves["x0"])


def _value(value: Any) -> Any:
    """A float where there are no axes: NumPy's scalars are slow."""
    return np.asarray(value, float) if np.ndim(value) else float(value)
