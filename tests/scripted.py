"""A method whose steps are written down, and what a run over them is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ode_stopping import Method, Solver, Step
from ode_stopping.call import Call, Watch
from ode_stopping.core.functions import CriterionMap
from ode_stopping.core.leaves import LeafSet
from ode_stopping.core.states import StateLayout
from ode_stopping.crossing.run import Run, find_crossings
from ode_stopping.crossing.watch import Hit
from ode_stopping.solving.flow_map import FlowMap

F64 = torch.float64

Script = Callable[[float], tuple[float, float]]


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=F64)


class Scripted(Method):
    """Steps to where the script is; the first so many from a time are rejected.

    Args:
        script: t -> (y, y').
        rejections: Start of a step -> how many trials from there fail.
    """

    order = 5

    def __init__(self, script: Script, rejections: dict[float, int]) -> None:
        self.script = script
        self.left = dict(rejections)
        self.trials: list[tuple[float, float]] = []

    def trial(self, f: Any, t0: float, y0: Tensor, f0: Tensor, t1: float) -> Step:
        self.trials.append((t0, t1))
        value, slope = self.script(t1)
        fails = self.left.get(t0, 0) > 0
        if fails:
            self.left[t0] -= 1
        error = number(1e6 if fails else 0.0)
        return Step(t0, t1, y0, f0, number(value), number(slope), error)

    def replay(self, f: Any, step: Step, y0: Tensor, t0: Any, h: Any) -> Tensor:
        raise AssertionError("a forward run replays nothing")


@dataclass(frozen=True, kw_only=True)
class ScriptedSolver(Solver):
    """Steps of length 1 unless they are told otherwise."""

    max_step: float = 1.0
    first_step: float | None = 1.0

    def method(self, dtype: torch.dtype) -> Method:
        raise AssertionError("the call holds its method")


@dataclass(frozen=True)
class Keeping:
    """What a run asks of a route."""

    needs_path: bool


@dataclass
class Scene:
    """A script with what is watched."""

    script: Script
    targets: Sequence[float] = (0.0,)
    times: tuple[float, ...] = (0.0, 100.0)
    rejections: dict[float, int] = field(default_factory=dict)
    criterion: Callable[[Tensor, Tensor], Tensor] = lambda t, x: x[0]
    route: Keeping | None = None
    solver: dict[str, Any] = field(default_factory=dict)
    velocity: Callable[[float], float] | None = None
    leave_first: bool = False

    def run(self) -> tuple[Run, Scripted]:
        method = Scripted(self.script, self.rejections)
        x0 = number(self.script(self.times[0])[0])
        layout = StateLayout.of(x0)
        solver = ScriptedSolver(rtol=1e-6, **self.solver)
        velocity = self.velocity or (lambda t: self.script(t)[1])

        def flow(t: Tensor, x: Tensor) -> Tensor:
            return torch.full_like(x, velocity(float(t)))

        criterion = CriterionMap(self.criterion, layout, x0)
        call = Call(
            flow=FlowMap(flow, layout, x0, times=self.times),
            leaves=LeafSet.collect(flow, self.criterion),
            solver=solver,
            method=method,
            tolerances=solver.tolerances(F64),
            times=self.times,
            x0=x0,
            watches=tuple(Watch(k, criterion, target) for k, target in enumerate(self.targets)),
            gradient=self.route,
            evidence="light",
            leave_first=self.leave_first,
        )
        return find_crossings(call), method


def line(start: float, slope: float) -> Script:
    return lambda t: (start + slope * t, slope)


def indices(hits: Iterable[Hit]) -> list[int]:
    return [hit.watch.index for hit in hits]


def contiguous(steps: Sequence[Step]) -> bool:
    return all(a.t1 == b.t0 and torch.equal(a.y1, b.y0) for a, b in pairwise(steps))
