"""A problem in torch: its leaves, the call of `integrate`, and L of what came back.

In units: F(t, x) = (s / tau) f(t / tau, x / s), J = c j(t / tau, x / s), and L the same number. The
oracle's gradients are those without units; `Subject.unit` says by what they differ.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ode_stopping import GradientRoute, Torchdiffeq

from .problem import Hybrid

_MAX_STEPS = 20_000
_DTYPE = torch.float64


class OtherHitsError(Exception):
    """The library's run passes through other hits than the oracle's."""


class _Torch:
    """Operations on tensors."""

    exp, sin, cos, tanh, sqrt = torch.exp, torch.sin, torch.cos, torch.tanh, torch.sqrt

    def stack(self, parts: list[Any]) -> Tensor:
        return torch.stack([torch.as_tensor(part, dtype=_DTYPE) for part in parts])

    def matvec(self, matrix: Tensor, x: Tensor) -> Tensor:
        return matrix @ x

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


TORCH = _Torch()


class Subject:
    """A problem in torch, with leaves of its own.

    Args:
        problem: The problem.
        method: Of torchdiffeq.
        rtol: Tolerance; None: the default.
        scales: s, tau and c.
    """

    def __init__(
        self,
        problem: Hybrid,
        method: str,
        rtol: float | None,
        scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        self.problem = problem
        self.state, self.time, self.value = scales
        self.leaves: dict[str, Tensor] = {
            name: torch.tensor(
                np.asarray(value, float) * self.unit(name), dtype=_DTYPE, requires_grad=True
            )
            for name, value in problem.leaves.items()
        }
        self.constants = {
            name: torch.tensor(value, dtype=_DTYPE) for name, value in problem.constants.items()
        }
        self.solver = Torchdiffeq(method=method, rtol=rtol, max_steps=_MAX_STEPS)

    def unit(self, name: str) -> float:
        """Of a leaf: what it is here over what it is for the oracle."""
        if name == "x0":
            return self.state
        if name in self.problem.times:
            return self.time
        return self.value if name in self.problem.targets else 1.0

    @property
    def p(self) -> dict[str, Tensor]:
        """All values by name, without units."""
        units = {name: self.unit(name) for name in self.leaves}
        plain = {n: v if units[n] == 1.0 else v / units[n] for n, v in self.leaves.items()}
        return plain | self.constants

    def flow(self, t: Tensor, x: Tensor) -> Tensor:
        """x'."""
        leaves, problem = self.leaves, self.problem
        on = [(t >= leaves[name].detach()).to(_DTYPE) for name in problem.breakpoints]
        rate = problem.velocity(TORCH, t / self.time, x / self.state, self.p, on)
        return rate * (self.state / self.time)

    def events(self) -> list[Any]:
        """The watches as events of the library."""
        from ode_stopping import Event  # type: ignore[attr-defined, unused-ignore]

        def in_units(function: Any, unit: float) -> Any:
            if function is None:
                return None
            return lambda t, x: unit * function(TORCH, t / self.time, x / self.state, self.p)

        found = []
        for watch in self.problem.watches:
            level, reset = self.leaves[watch.level], in_units(watch.reset, self.state)
            if watch.criterion is None:
                found.append(Event.at(level, reset=reset, terminal=watch.terminal))
                continue
            more: dict[str, Any] = {"leave_first": True} if watch.leave_first else {}
            found.append(
                Event(
                    in_units(watch.criterion, self.value),
                    level,
                    direction=watch.direction,
                    terminal=watch.terminal,
                    reset=reset,
                    count=watch.count,
                    **more,
                )
            )
        return found

    def solve(self, gradient: GradientRoute, **more: Any) -> Any:
        """The run, forward."""
        from ode_stopping import integrate  # type: ignore[attr-defined, unused-ignore]

        p, problem = self.leaves, self.problem
        if "at" in p:
            more["at"] = p["at"]
        if problem.breakpoints:
            more["breakpoints"] = [p[name] for name in problem.breakpoints]
        if "until" not in p:
            # The default horizon is 1e6 in whatever unit the time has.
            more["max_time"] = 1e6 * max(self.time, 1.0)
        return integrate(
            self.flow,
            p["x0"],
            t0=p["t0"],
            until=p.get("until"),
            events=self.events(),
            solver=self.solver,
            gradient=gradient,
            **more,
        )

    def require_same_hits(self, solution: Any, expected: list[tuple[int, int]]) -> None:
        """(event, count) of every hit, in order.

        Raises:
            OtherHitsError: They are others.
        """
        found = [(int(hit.event), int(hit.count)) for hit in solution.hits]
        if found != expected:
            raise OtherHitsError(f"{found}, where the oracle has {expected}")

    def total(self, solution: Any) -> Tensor:
        """L."""
        hits: dict[tuple[int, int], Any] = {(int(h.event), int(h.count)): h for h in solution.hits}
        weights: dict[tuple[str, int, int], dict[int, float]] = defaultdict(dict)
        for weight, what in self.problem.terms:
            weights[what.what, what.event, what.nth][what.component] = weight
        total = torch.zeros((), dtype=_DTYPE)
        for (what, event, nth), of in weights.items():
            if what in ("time", "end_time"):
                end_or_hit = solution.end if what == "end_time" else hits[event, nth]
                total = total + of[0] / self.time * end_or_hit.time
                continue
            if what == "at":
                state = solution.states[nth]
            elif what == "end_state":
                state = solution.end.state
            else:
                hit = hits[event, nth]
                state = hit.state if what == "state" else hit.after
            row = [of.get(i, 0.0) for i in range(state.shape[-1])]
            total = total + torch.tensor(row, dtype=_DTYPE) / self.state @ state
        return total
