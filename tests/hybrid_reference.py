"""A second road to the gradients of a hybrid problem: autograd through Runge-Kutta steps.

When and in which order everything is met is taken from the oracle's run, no derivative is: a hit's
time is T* - (J - target) / J' of one Newton step, the state moves with it by F dT. First
derivatives of both are right, by no formula of a jump.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Reference:
    """The path of a subject in steps that autograd sees.

    Args:
        subject: Of `_hybrids.subject`.
        torch_operations: Its operations.
        step: Largest step, in time without units.
        halved: Take two steps for each of those.
    """

    def __init__(
        self, subject: Any, torch_operations: Any, step: float = 0.01, *, halved: bool = False
    ) -> None:
        # Without units; what is returned has them.
        self.subject, self.problem, self.p = subject, subject.problem, subject.p
        self.operations, self.step = torch_operations, step
        self.halved = halved
        self.on = [0.0] * len(self.problem.breakpoints)

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        return self.problem.velocity(self.operations, t, x, self.p, self.on)

    def to(self, t: Tensor, x: Tensor, end: Tensor) -> Tensor:
        number = max(4, math.ceil(float((end - t).detach()) / self.step))
        number *= 2 if self.halved else 1
        h = (end - t) / number
        for k in range(number):
            at = t + k * h
            one = self.velocity(at, x)
            two = self.velocity(at + h / 2, x + h / 2 * one)
            three = self.velocity(at + h / 2, x + h / 2 * two)
            four = self.velocity(at + h, x + h * three)
            x = x + h / 6 * (one + 2 * two + 2 * three + four)
        return x

    def crossing(self, watch: Any, time: float, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        near = torch.tensor(time, dtype=torch.float64, requires_grad=True)
        x = self.to(t, x, near.detach())
        still = x.detach().requires_grad_()
        value = watch.criterion(self.operations, near, still, self.p)
        by_t, by_x = torch.autograd.grad(value, (near, still), allow_unused=True)
        rate = self.velocity(near, x).detach()
        slope = 0.0 if by_t is None else by_t
        slope = slope + by_x @ rate
        distance = watch.criterion(self.operations, near.detach(), x, self.p) - self.p[watch.level]
        late = -distance / slope
        return near.detach() + late, x + rate * late

    def solution(self, run: Any) -> Any:
        """What `integrate` would return, along the hits of a run."""
        p, problem = self.p, self.problem
        t, x, last = p["t0"], p["x0"], problem.leaves["t0"]
        self.on = [float(problem.leaves[name] <= last) for name in problem.breakpoints]
        hits: list[Any] = []
        states: dict[int, Tensor] = {}
        come = iter(run.hits)
        end = SimpleNamespace()
        kind = ""
        for (kind, index), time in zip(run.sequence, run.times, strict=True):
            if kind == "event":
                end = hits[-1]
                break
            if kind == "hit":
                hit, watch = next(come), problem.watches[index]
                if watch.criterion is None:
                    t, x = p[watch.level], self.to(t, x, p[watch.level])
                elif not hit.at_once and time > last:
                    t, x = self.crossing(watch, time, t, x)
                behind = x if watch.reset is None else watch.reset(self.operations, t, x, p)
                hits.append(
                    SimpleNamespace(event=index, time=t, state=x, after=behind, count=hit.count)
                )
                x = behind
            else:
                when = {"at": lambda: p["at"][index], "until": lambda: p["until"]}  # noqa: B023
                when["break"] = lambda: p[problem.breakpoints[index]]  # noqa: B023
                now = when[kind]()
                t, x = now, self.to(t, x, now)
                if kind == "break":
                    self.on[index] = 1.0
                elif kind == "at":
                    states[index] = x
                else:
                    end = SimpleNamespace(time=t, state=x)
            last = time
        unit, clock = self.subject.state, self.subject.time
        for hit in hits:
            hit.time, hit.state, hit.after = clock * hit.time, unit * hit.state, unit * hit.after
        if kind != "event":  # then the end is a hit, which has its units
            end.time, end.state = clock * end.time, unit * end.state
        states = {k: unit * state for k, state in states.items()}
        return SimpleNamespace(hits=hits, states=states, end=end, status="FINISHED")
