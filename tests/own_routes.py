"""A problem for gradient routes of one's own, with jumps of the flow and several targets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import blocks
from torch import Tensor

from ode_stopping import (
    GradientRoute,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to-own-route.md"
JUMP = 1.0
TARGETS = {"one": [1e-2], "several": [0.5, 1e-2, 0.1]}


def of_the_page() -> dict[str, Any]:
    """Everything that the code on the page defines."""
    namespace: dict[str, Any] = {"__name__": "page"}
    exec(compile(blocks(PAGE, "python")[0].split("rate = ")[0], "how-to", "exec"), namespace)
    return namespace


OneByOne: type[GradientRoute] = of_the_page()["OneByOne"]


# --- the problem: x' = -r(t) x in two coordinates, J = |x|^2/2 ----------------------------------


class Switched:
    """r jumps from a to b at t = 1 where there is a breakpoint; else it is a.

    T = log(|x0|^2/(2 eps))/(2 a) without a jump, and 1 + (log(|x0|^2/(2 eps)) - 2 a)/(2 b) with it.
    """

    def __init__(self, targets: Sequence[float], *, jumps: bool) -> None:
        def leaf(value: Any) -> Tensor:
            return torch.tensor(value, dtype=torch.float64, requires_grad=True)

        self.a, self.b, self.x0 = leaf(0.8), leaf(1.9), leaf([1.4, -0.9])
        self.eps = leaf(list(targets))
        self.jumps = jumps

    @property
    def leaves(self) -> list[Tensor]:
        return [self.a, *([self.b] if self.jumps else []), self.x0, self.eps]

    def solve(self, route: GradientRoute, **options: Any) -> StoppingResult:
        def flow(t: Tensor, x: Tensor) -> Tensor:
            return -(self.b if self.jumps and bool(t > JUMP) else self.a) * x

        return stopping_time(
            flow,
            self.x0,
            lambda t, x: 0.5 * x.square().sum(),
            self.eps if len(self.eps) > 1 else self.eps[0],
            gradient=route,
            solver=Torchdiffeq(rtol=1e-9),
            breakpoints=[JUMP] if self.jumps else None,
            **{"evidence": "light", **options},
        )

    def truth(self) -> Tensor:
        distance = torch.log(self.x0.square().sum() / (2 * self.eps)) / 2
        if not self.jumps:
            return distance / self.a
        early = distance < self.a * JUMP
        late = JUMP + (distance - self.a * JUMP) / self.b
        return torch.where(early, distance / self.a, late)

    def error(self, route: GradientRoute, **options: Any) -> tuple[float, StoppingResult]:
        """Largest relative error over the leaves, in norm; and the result."""
        result = self.solve(route, **options)
        weights = torch.tensor([1.0, -0.6, 0.3], dtype=torch.float64)[: len(self.eps)]
        found = torch.autograd.grad(weights @ result.time.reshape(-1), self.leaves)
        known = torch.autograd.grad(weights @ self.truth(), self.leaves)
        gaps = [
            float((one - other).norm() / other.norm())
            for one, other in zip(found, known, strict=True)
        ]
        return max(gaps), result


def estimates(result: StoppingResult) -> list[float]:
    parts = result.evidence if isinstance(result.evidence, list) else [result.evidence]
    return [part.estimate for part in parts]


every_problem = pytest.mark.parametrize("jumps", [False, True], ids=["smooth", "jumps"])
every_target = pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
