"""Results of both sides as the pictures see them: what to draw against what, and where it ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.states import State
from .style import array

__all__ = ["POINTS", "View", "between", "finite", "position_of", "views"]

# Of a continuous path, where it has fewer accepted steps.
POINTS = 400
_DRAWABLE = 1e100


@dataclass(frozen=True)
class View:
    """A run to be drawn.

    Both sides are told apart by what their trajectories hold: this package may not import the
    discrete one.

    Attributes:
        run: A result or a trajectory.
        name: What the legend calls it; None for a run that is drawn alone.
        step: h as the user gave it, for an iteration of a bare callable, which has none.
        start: t0 for such an iteration: that of the flow it is drawn with, or 0.
    """

    run: Any
    name: str | None
    step: float | None = None
    start: float = 0.0

    @property
    def trajectory(self) -> Any:
        """The run's trajectory."""
        return getattr(self.run, "trajectory", self.run)

    @property
    def iterates(self) -> bool:
        """Whether it is an iteration."""
        return hasattr(self.trajectory, "losses")

    def clock(self) -> tuple[float, float]:
        """(t0, h) of an iteration.

        Raises:
            ValueError: Its update is a bare callable, and the user gave no step.
        """
        known = self.trajectory.clock
        if known is not None:
            return float(known[0]), float(known[1])
        if self.step is not None:
            return self.start, self.step
        named = "the iteration" if self.name is None else f"the iteration {self.name!r}"
        raise ValueError(
            f"{named} does not say its step in flow time, since its update is a bare callable: "
            'pass step=h, or draw it alone against="steps"'
        )

    def axis(self, k: Any, *, in_time: bool) -> Any:
        """Where step k of an iteration stands: at k, or at t0 + h k."""
        if not (self.iterates and in_time):
            return k
        start, step = self.clock()
        return start + step * k

    def values(self, *, in_time: bool) -> tuple[Any, Any]:
        """Where the run looked at J, and J there; NaN where J was not finite."""
        trajectory = self.trajectory
        if self.iterates:
            losses = array(trajectory.losses)
            return self.axis(np.arange(len(losses), dtype=np.float64), in_time=in_time), finite(
                losses
            )
        return array(trajectory.times), finite(array(trajectory.values))

    def crossings(self, *, in_time: bool) -> Any:
        """T or N, one for each target that was met, as an array."""
        reached = getattr(self.run, "reached", None)
        if reached is None:
            return np.array([])
        found = np.atleast_1d(array(self.run.steps if self.iterates else self.run.time))
        met = np.isfinite(found) & np.atleast_1d(reached.cpu().numpy())
        return self.axis(found[met], in_time=in_time)

    def outcome(self) -> str:
        """'T = 2.37', 'N = 24', or how the run missed; empty for a trajectory."""
        status = getattr(self.run, "status", None)
        found = self.crossings(in_time=False)
        symbol = "N" if self.iterates else "T"
        if status is None:
            return ""
        if isinstance(status, list | tuple):
            return f"{symbol} of {len(found)} targets"
        if not len(found):
            return str(status.name).lower().replace("_", " ")
        return f"{symbol} = {found[0]:.5g}"

    def states(self, points: int = POINTS) -> tuple[Any, list[State]]:
        """States along the run, and where: at times of a flow, at steps k of an iteration.

        A flow is looked at by its dense output, equally often in every accepted step: fast phases
        are short, and equal pieces of time would pass over them.

        Raises:
            RuntimeError: The run kept no states.
        """
        trajectory = self.trajectory
        if not self.iterates:
            times = between(array(trajectory.times), points)
            return times, _rows(trajectory(torch.from_numpy(times)), len(times))
        kept = list(trajectory.indices)
        states = _rows(trajectory.states, len(kept))
        last = len(trajectory) - 1
        # Checkpoints need not end at x_N.
        if kept[-1] != last and hasattr(self.run, "state") and not self.run.reached.ndim:
            kept, states = [*kept, last], [*states, _detached(self.run.state)]
        return np.array(kept, dtype=np.float64), states

    @property
    def hybrid(self) -> bool:
        """Whether it is a solution of `integrate`, whose state may jump."""
        return _is_hybrid(self.run)

    def stretches(self, points: int = POINTS) -> list[tuple[Any, list[State]]]:
        """Times and states between the jumps of a solution, one pair for every stretch.

        A stretch ends with the state before the jump, and the next begins with the one behind it.
        Points are dense both in time and in accepted steps: a step may be as long as a stretch,
        and a fast phase as short as a step.

        Raises:
            RuntimeError: The run kept no states.
        """
        trajectory = self.trajectory
        if not trajectory.arcs:
            return [(array(trajectory.times), _rows(trajectory.states, 1))]
        length = max(trajectory.end - trajectory.start, 1e-300)
        found = []
        for arc in trajectory.arcs:
            nodes = array(arc.times)
            share = math.ceil(points * (arc.end - arc.start) / length)
            even = np.linspace(arc.start, arc.end, share + 1)
            steps = between(nodes, math.ceil(points * len(nodes) / len(trajectory)))
            times = np.union1d(even, steps)
            found.append((times, _rows(arc(torch.from_numpy(times)), len(times))))
        return found

    def first(self) -> State:
        """A state of the run, for its structure."""
        return self.run.end.state if self.hybrid else self.states(1)[1][0]

    def met(self) -> list[State]:
        """The states in which a target was met."""
        reached = getattr(self.run, "reached", None)
        if reached is None:
            return []
        if not reached.ndim:
            return [_detached(self.run.state)] if bool(reached) else []
        rows = _rows(self.run.state, len(reached))
        return [row for row, hit in zip(rows, reached.tolist(), strict=True) if hit]

    @property
    def missed(self) -> bool:
        """Whether there is a target that it did not meet; False for a trajectory."""
        reached = getattr(self.run, "reached", None)
        return reached is not None and not bool(reached.all())

    @property
    def diverged(self) -> bool:
        """Whether it ran away."""
        status = getattr(self.run, "status", None)
        several = status if isinstance(status, list | tuple) else [status]
        return any(getattr(one, "name", "") == "DIVERGED" for one in several)

    def positions(self, position: Callable[[Any], Tensor] | None = None) -> tuple[Any, Any]:
        """Where `states` are, and the positions there, shape (K, d)."""
        at, states = self.states()
        # State by state: a position that the user wrote for one state may slice a stack of them
        # along the wrong axis.
        rows = [array(position_of(state, position)).reshape(-1) for state in states]
        return at, np.stack(rows)

    def along(self, function: Callable[..., Any], points: int = POINTS) -> tuple[Any, Any]:
        """Flow times along the run, and a function (t, state) -> one number there."""
        at, states = self.states(points)
        times = self.axis(at, in_time=True)
        found = []
        with torch.no_grad():
            for t, state in zip(times.tolist(), states, strict=True):
                like = state[0] if isinstance(state, tuple) else state
                clock = torch.tensor(t, dtype=like.dtype, device=like.device)
                found.append(float(function(clock, state)))
        return times, finite(np.array(found))


def views(
    runs: Any,
    labels: Sequence[str] | None = None,
    step: float | Sequence[float | None] | None = None,
    *,
    hybrid: bool = False,
) -> list[View]:
    """One run, a sequence or a mapping of runs, as a list of views.

    Args:
        runs: The runs.
        labels: Names, in the order of the runs; None: the keys of a mapping, else "run 1", ...,
            and none for a single run.
        step: h of the iterations of bare callables: one for all, or one a run.
        hybrid: Whether solutions of `integrate` may be among them.

    Raises:
        TypeError: Something is no run.
        ValueError: No runs, or not as many labels or steps as runs.
    """
    names: list[str | None]
    if isinstance(runs, Mapping):
        listed, names = list(runs.values()), [str(key) for key in runs]
    elif _is_run(runs, hybrid) or not isinstance(runs, Iterable):
        listed, names = [runs], [None]
    else:
        listed = list(runs)
        if not listed:
            raise ValueError("runs is empty: there is nothing to draw")
        names = [f"run {i + 1}" for i in range(len(listed))]
    if labels is not None:
        names = [labels] if isinstance(labels, str) else list(labels)
    steps = list(step) if isinstance(step, Sequence) else [step] * len(listed)
    for what, given in (("labels", names), ("step", steps)):
        if len(given) != len(listed):
            raise ValueError(f"{what}: {len(given)} for {len(listed)} runs")
    wrong = [type(run).__name__ for run in listed if not _is_run(run, hybrid)]
    if wrong:
        also = ", or solutions of integrate" if hybrid else ""
        raise TypeError(
            "runs must be results of stopping_time or stopping_index, or their trajectories"
            f"{also}; got {wrong[0]}"
        )
    starts = [v.trajectory.start for v in (View(run, None) for run in listed) if not v.iterates]
    start = starts[0] if starts else 0.0
    return [View(*given, start) for given in zip(listed, names, steps, strict=True)]


def between(grid: Any, points: int) -> Any:
    """A grid with equally many points put into each of its intervals, `points` of them or more."""
    last = len(grid) - 1
    if last < 1:
        return grid
    pieces = math.ceil(points / last)
    return np.interp(np.arange(last * pieces + 1) / pieces, np.arange(last + 1), grid)


def finite(values: Any) -> Any:
    """Values with NaN, a gap in the line, in the place of what cannot be drawn.

    That is infinities, and numbers so large that the margins of matplotlib's axes overflow.
    """
    with np.errstate(invalid="ignore"):
        return np.where(np.abs(values) < _DRAWABLE, values, np.nan)


def position_of(state: State, position: Callable[[Any], Tensor] | None) -> Tensor:
    """The position in a state; the first entry where nothing else is said."""
    if position is not None:
        return position(state)
    return state[0] if isinstance(state, tuple) else state


def _is_hybrid(run: object) -> bool:
    return hasattr(run, "hits") and hasattr(getattr(run, "trajectory", None), "arcs")


def _is_run(run: object, hybrid: bool = False) -> bool:
    if hybrid and _is_hybrid(run):
        return True
    trajectory = getattr(run, "trajectory", run)
    return hasattr(trajectory, "losses") or (
        hasattr(trajectory, "times") and hasattr(trajectory, "values")
    )


def _rows(stacked: State, count: int) -> list[State]:
    if isinstance(stacked, tuple):
        return [tuple(piece[i].detach() for piece in stacked) for i in range(count)]
    return [stacked[i].detach() for i in range(count)]


def _detached(state: State) -> State:
    if isinstance(state, tuple):
        return tuple(piece.detach() for piece in state)
    return state.detach()
