"""The accepted part of a forward run, as it grows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import nan

import torch
from torch import Tensor

from ..call import Call
from ..core.functions import CriterionMap
from ..solving.step import Step
from ..solving.trajectory import Trajectory
from .scan import Scan
from .watch import Hit

__all__ = ["Path"]

_RECENT = 3


class Path:
    """Steps, times and values of J so far, and what J did between them.

    Args:
        call: What was asked.
        criterion: J that is kept at the nodes; None where there is none, and J is NaN.
        value: J at the start.

    Attributes:
        criterion: As given.
        grid: Accepted times, from t0: the nodes of the path.
        values: J there.
        steps: The steps, where they are kept.
        state: The state at the last node.
        best: Smallest J that was seen, and where.
        largest: Largest root mean square of a piece of the state.
    """

    def __init__(self, call: Call, criterion: CriterionMap | None, value: float = nan) -> None:
        self._call = call
        self.criterion = criterion
        self._keep = call.keeps
        self._recent: deque[Step] = deque(maxlen=_RECENT)
        self._errors: deque[Tensor] = deque(maxlen=_RECENT)
        self._held = 0
        self.largest = float(call.x0.norm()) / call.x0.numel() ** 0.5
        self.state = call.x0
        self.steps: list[Step] = []
        self.grid = [call.start]
        self.values = [value]
        self.best = (value, call.start)

    def value_at(self, t: float, x: Tensor) -> float:
        """J at time t and state x, shape (n,)."""
        return nan if self.criterion is None else self.criterion.value(t, x)

    def _value_of(self, hit: Hit) -> float:
        """J at a hit."""
        assert hit.point is not None
        if hit.watch.criterion is self.criterion:
            return hit.point.value
        return self.value_at(hit.time, hit.state)

    def shown(self, value: float) -> float:
        """J in the user's sign."""
        return value if self.criterion is None else self.criterion.shown(value)

    @property
    def node(self) -> int:
        """Number of the last node; that of t0 is 0."""
        return len(self.grid) - 1

    def look(self, scan: Scan, until: float) -> None:
        """Note what was seen of J inside a step, up to a time."""
        seen = [(value, time) for time, value in scan.points if time < until]
        self.best = min([self.best, *seen])

    def add(self, step: Step, value: float, size: float = 0.0) -> None:
        """Append an accepted step, with J and the size of the state at its end."""
        self._recent.append(step)
        self._errors.append(step.error)
        if self._keep:
            self.steps.append(step)
        self.largest = max(self.largest, size)
        self.grid.append(step.t1)
        self.values.append(value)
        self.state = step.y1

    def begin_piece(self) -> None:
        """From here on the steps before are not taken again, and say nothing of the error."""
        self._recent.clear()
        self._errors.clear()

    def hold(self, node: int) -> None:
        """Steps up to this node stay, for something begins there."""
        self._held = max(self._held, node)

    def recent(self) -> list[Step]:
        """The last few steps, as far back as they may be taken again."""
        count = min(len(self._recent), self.node - self._held)
        return list(self._recent)[len(self._recent) - count :]

    def replace_recent(self, steps: Sequence[tuple[Step, float]]) -> None:
        """Put other steps, with J at their ends, in the place of the recent ones."""
        count = len(self.recent())
        kept = (self.steps, self.grid, self.values) if self._keep else (self.grid, self.values)
        for entries in kept:
            del entries[len(entries) - count :]
        self.begin_piece()
        for step, value in steps:
            self.add(step, value)

    def state_error(self, *further: Step, room: int = 0) -> Tensor:
        """Root of the summed squares of the last steps' error estimates, by element, shape (n,).

        Args:
            *further: Steps after those of the path.
            room: How many more will follow: the estimate is of three steps with them.
        """
        errors = [*self._errors, *(step.error for step in further)][room - _RECENT :]
        squares = [error.square() for error in errors]
        return sum(squares, torch.zeros_like(self._call.x0)).sqrt()

    def trajectory(self, hits: Iterable[Hit]) -> Trajectory:
        """The path as a trajectory, hits marked inside of its steps, and J in the user's sign."""
        call, shown = self._call, self.shown
        crossings = [hit for hit in hits if hit.point is not None]
        return Trajectory(
            call.layout,
            call.method,
            call.x0,
            self.steps,
            self.grid,
            [shown(value) for value in self.values],
            largest=self.largest,
            marks={hit.time: (shown(self._value_of(hit)), hit.state) for hit in crossings},
        )
