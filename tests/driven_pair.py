"""A driven state of two tensors whose force jumps, with every input a leaf."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ode_stopping import (
    GradientRoute,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)

F64 = torch.float64
CHUNKS = (1, 3, 100)


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Largest relative difference in norm."""
    return max(
        float((one - other).norm() / other.norm()) for one, other in zip(first, second, strict=True)
    )


class Pair(nn.Module):
    """A driven state (x, v) whose force jumps at t = 0.6 and t = 1.4; J = energy."""

    jumps = (0.6, 1.4)

    def __init__(self) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor([1.0, 2.2, 0.7], dtype=F64))
        self.damping = nn.Parameter(torch.tensor(0.8, dtype=F64))
        self.force = nn.Parameter(torch.tensor([0.3, -0.2, 0.4], dtype=F64))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, v = state
        piece = sum(bool(t > jump) for jump in self.jumps)
        pull = self.force[piece] * torch.cos(t)
        return v, -self.stiffness * x - 0.2 * x**3 - self.damping * v + pull * torch.tanh(x)

    def energy(self, t: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        x, v = state
        return 0.5 * ((self.stiffness * x * x).sum() + v.square().sum())


class PairProblem:
    """`Pair` with every input a leaf."""

    def __init__(self, targets: Sequence[float] = (0.1,)) -> None:
        self.flow = Pair()
        self.x0 = torch.tensor([1.0, -0.6, 0.8], dtype=F64, requires_grad=True)
        self.v0 = torch.tensor([0.2, 0.4, -0.1], dtype=F64, requires_grad=True)
        self.eps = torch.tensor(list(targets), dtype=F64, requires_grad=True)
        self.leaves = [self.x0, self.v0, self.eps, *self.flow.parameters()]

    def solve(
        self,
        route: GradientRoute,
        *,
        rtol: float = 1e-7,
        method: str = "dopri5",
        only: int | None = None,
    ) -> StoppingResult:
        eps = self.eps if only is None else self.eps[only]
        return stopping_time(
            self.flow,
            (self.x0, self.v0),
            self.flow.energy,
            eps[0] if eps.ndim and len(eps) == 1 else eps,
            gradient=route,
            breakpoints=Pair.jumps,
            solver=Torchdiffeq(method=method, rtol=rtol),
            evidence="light",
        )

    def gradients(self, value: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(
            value, self.leaves, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        return list(found)


def functional(result: StoppingResult) -> Tensor:
    """T and x_T weighed, of one target or of several."""
    position, velocity = result.state
    weights = torch.tensor([0.4, -0.7, 1.1], dtype=F64)
    return result.time.sum() + (position @ weights).sum() - 0.5 * velocity[..., 1].sum()
