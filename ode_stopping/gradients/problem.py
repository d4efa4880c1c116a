"""A solved problem, as the gradient routes see it: the path, and the hits on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from ..call import Call
from ..core.functions import CriterionMap
from ..core.leaves import LeafSet
from ..core.names import names_of
from ..core.states import StateLayout
from ..crossing.point import Crossing
from ..crossing.run import Run
from ..crossing.watch import Hit
from ..solving.flow_map import FlowMap
from ..solving.solver import Method, Solver, Tolerances
from ..solving.step import Step
from ..solving.trajectory import Trajectory

__all__ = ["Jump", "Piece", "StoppingProblem"]


@dataclass(frozen=True)
class Jump:
    """What lam gains at a hit.

    Attributes:
        time: T, in flow time.
        cotangent: Added to lam there, shape (n,).
        velocity: F(T, x_T), shape (n,).
        node: Number of the node of the path where the hit's own steps begin.
        steps: From the node to the hit; empty where the hit is the node.
        size: |w| + |s g| where the cotangent is w + s g: its norm if nothing cancelled.
    """

    time: float
    cotangent: Tensor
    velocity: Tensor
    node: int
    steps: tuple[Step, ...] = ()
    size: float = 0.0


@dataclass(frozen=True)
class Piece:
    """A stretch of the path, x(t) from `start` to `end`.

    Attributes:
        call: What was asked.
        leaves: Tensors that receive gradients, besides x0, t0 and the target.
        times: Start and end of the stretch, and the times between them at which the flow jumps.
        x0: x at the start, shape (n,), without graph.
        x_end: x at the end, shape (n,).
        velocity: F at the end, shape (n,).
        steps: The accepted steps from start to end; empty where the route keeps none.
    """

    call: Call
    leaves: LeafSet
    times: tuple[float, ...]
    x0: Tensor
    x_end: Tensor
    velocity: Tensor
    steps: tuple[Step, ...]

    @property
    def flow(self) -> FlowMap:
        """dx/dt on flat vectors."""
        return self.call.flow

    @property
    def layout(self) -> StateLayout:
        """Layout of the state."""
        return self.call.layout

    @property
    def solver(self) -> Solver:
        """Solver of the forward run."""
        return self.call.solver

    @property
    def method(self) -> Method:
        """Its method."""
        return self.call.method

    @property
    def tolerances(self) -> Tolerances:
        """Its tolerances."""
        return self.call.tolerances

    @property
    def start(self) -> float:
        """Start of the stretch, in flow time."""
        return self.times[0]

    @property
    def end(self) -> float:
        """End of the stretch, in flow time."""
        return self.times[-1]

    def number_at(self, time: float) -> int:
        """The number of the flow's smooth piece that a step from this time lies on."""
        return self.flow.number_at(time)

    @property
    def segments(self) -> list[tuple[int, float, float]]:
        """(number of the flow's piece, begin, end) of the smooth pieces, in order of time."""
        first = self.number_at(self.start)
        pairs = zip(self.times, self.times[1:], strict=False)
        return [(first + i, begin, end) for i, (begin, end) in enumerate(pairs)]

    @cached_property
    def trajectory(self) -> Trajectory:
        """x(t) on the stretch."""
        grid = [self.start, *(step.t1 for step in self.steps)] if self.steps else self.times
        values = [float("nan")] * len(grid)
        size = max(float(self.layout.norm(x)) for x in (self.x0, self.x_end))
        return Trajectory(self.layout, self.method, self.x0, self.steps, grid, values, largest=size)

    def at_end(self, cotangent: Tensor) -> Jump:
        """A cotangent on x at the end, as the one thing that lam receives."""
        return Jump(self.end, cotangent, self.velocity, len(self.steps))

    def between(self, first: int, last: int) -> Piece:
        """The stretch from the start of step `first` to the end of step `last - 1`."""
        return self.made_of(self.steps[first:last])

    def made_of(self, steps: tuple[Step, ...]) -> Piece:
        """A stretch of these steps."""
        a, b = steps[0].t0, steps[-1].t1
        inner = [t for t in self.call.times[1:-1] if a < t < b]
        return Piece(
            self.call,
            self.leaves,
            (a, *inner, b),
            steps[0].y0,
            steps[-1].y1,
            steps[-1].f1,
            steps,
        )


@dataclass(frozen=True)
class StoppingProblem(Piece):
    """The whole path, from t0 to the last target that is differentiated.

    Attributes:
        run: What the forward run found.
        hits: The targets that are differentiated, in order of time.
        knows_time: Whether the flow knows its derivative to t (it reads no `t.item()`).
    """

    run: Run
    hits: tuple[Hit, ...]
    knows_time: bool = True

    @classmethod
    def of(cls, run: Run, leaves: LeafSet) -> StoppingProblem:
        """The problem of a run that has a target with a derivative."""
        call, hits = run.call, tuple(hit for hit in run.hits if hit.status.name == "REACHED")
        last = hits[-1]
        assert last.point is not None
        inner = [t for t in call.times[1:-1] if t < last.time]
        return cls(
            call=call,
            leaves=leaves,
            times=(call.start, *inner, last.time),
            x0=call.x0,
            x_end=last.state,
            velocity=last.point.velocity,
            steps=tuple(run.trajectory.steps[: last.node]) + last.steps if call.keeps else (),
            run=run,
            hits=hits,
        )

    def knowing(self, *, time: bool) -> StoppingProblem:
        """The same, with what was found out about the flow's derivative to t."""
        return self if time == self.knows_time else replace(self, knows_time=time)

    @property
    def criterion(self) -> CriterionMap:
        """J of the last hit, on flat vectors."""
        return self.hits[-1].watch.criterion

    @cached_property
    def trajectory(self) -> Trajectory:
        """x(t), as the run left it; up to the last target, where that is not its end."""
        if self.steps and self.steps[-1] is not self.run.trajectory.steps[-1]:
            return self.made_of(self.steps).trajectory
        return self.run.trajectory

    @property
    def crossing(self) -> Crossing:
        """The crossing of the last target."""
        point = self.hits[-1].point
        assert point is not None
        return point

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What the leaves are called."""
        return tuple(names_of(self.leaves.tensors, self.call.functions))

    def jump(self, hit: Hit, cotangent: Tensor, size: float = 0.0) -> Jump:
        """What lam gains at a hit; the last one is the end of the path."""
        assert hit.point is not None
        at_end = hit is self.hits[-1]
        node = len(self.steps) if at_end else hit.node
        steps = () if at_end else hit.steps
        return Jump(hit.time, cotangent, hit.point.velocity, node, steps, size)

    @property
    def target(self) -> float:
        """The last target, as J falls to it; `criterion.shown` has it in the user's sign."""
        return self.hits[-1].watch.target
