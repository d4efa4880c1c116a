"""Flows for `test_recorded_products.py`: their gradients, and what these cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ode_stopping import (
    GradientNorm,
    GradientRoute,
    HeavyBallFlow,
    PreconditionedFlow,
    Quadratic,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.problems import random_rotation

DIM = 64
SPECTRUM = torch.logspace(-1, 0.3, DIM, dtype=torch.float64)
ROTATION = random_rotation(DIM, seed=0)
MATRIX = (ROTATION * SPECTRUM) @ ROTATION.mT
START = torch.randn(DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Flow = Callable[[Tensor, Any], Any]


@dataclass(frozen=True)
class Case:
    """A flow with its leaves, made anew for every run."""

    flow: Flow
    leaves: list[Tensor]
    x0: Any = None
    criterion: Callable[[Tensor, Any], Tensor] = lambda t, x: (x * x).sum()
    target: Any = 1e-3
    rtol: float = 1e-7
    method: str = "dopri5"
    breakpoints: Any = None


@dataclass(frozen=True)
class Found:
    """Gradients of T, evaluations and products of the backward pass."""

    gradients: list[Tensor]
    evaluations: int
    products: int

    def recorded_beside(self, eager: Found) -> bool:
        """Whether most of the products were taken without an evaluation."""
        return eager.evaluations - self.evaluations > eager.products / 2


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_(True)


def found(
    make: Callable[[], Case],
    route: GradientRoute,
    between: Callable[[], None] = lambda: None,
) -> Found:
    """The gradient of T, or of the sum of all; `between` the two passes something may happen."""
    case = make()
    start = START.clone() if case.x0 is None else case.x0
    x0 = leaf(start) if isinstance(start, Tensor) else tuple(leaf(part) for part in start)
    result = stopping_time(
        case.flow,
        x0,
        case.criterion,
        case.target,
        gradient=route,
        solver=Torchdiffeq(method=case.method, rtol=case.rtol),
        evidence="light",
        breakpoints=case.breakpoints,
    )
    between()
    result.time.sum().backward()
    leaves = [*case.leaves, *([x0] if isinstance(x0, Tensor) else x0)]
    gradients = [p.grad for p in leaves if p.grad is not None]
    assert len(gradients) == len(leaves)
    stats = result.stats
    assert stats.nfe_backward is not None
    assert stats.vjps is not None
    return Found(gradients, stats.nfe_backward, stats.vjps)


def rotated() -> Case:
    theta = leaf(torch.ones(DIM, dtype=torch.float64))
    return Case(lambda t, x: -theta * (MATRIX @ x), [theta])


def driven() -> Case:
    matrix, rate = leaf(MATRIX), leaf(torch.tensor(0.3, dtype=torch.float64))
    return Case(lambda t, x: -(1 + 0.5 * torch.sin(rate * t)) * (matrix @ x), [matrix, rate])


class Network(nn.Module):
    """x' = -(1 + tanh(W x + b) / 2) x, with a forward hook that hands its output on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM, dtype=torch.float64)
        generator = torch.Generator().manual_seed(2)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / DIM
        self.layer.register_forward_hook(lambda module, inputs, output: 2 * output)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -(1 + torch.tanh(self.layer(x)) / 2) * (MATRIX @ x)


def network() -> Case:
    flow = Network()
    return Case(flow, list(flow.parameters()))


def inner_gradient() -> Case:
    theta = leaf(SPECTRUM)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        energy = (theta * torch.cosh(x)).sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0]

    return Case(flow, [theta])


def gradient_of_a_function() -> Case:
    theta = leaf(SPECTRUM)
    energy = torch.func.grad(lambda x: (theta * torch.cosh(x)).sum())
    return Case(lambda t, x: -energy(x), [theta])


def library_classes() -> Case:
    theta, problem = leaf(torch.ones(DIM, dtype=torch.float64)), Quadratic(MATRIX)
    flow = PreconditionedFlow(problem, preconditioner=theta)
    return Case(flow, [theta], criterion=GradientNorm(problem))


def heavy_ball() -> Case:
    damping = leaf(torch.tensor(2.0, dtype=torch.float64))
    problem = Quadratic(MATRIX)
    flow = HeavyBallFlow(problem, damping=damping)
    start = tuple(part.detach() for part in flow.initial_state(START))
    return Case(flow, [damping], start, GradientNorm(problem))


def tuple_state() -> Case:
    stiffness = leaf(SPECTRUM)

    def flow(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, v = state
        return v, -stiffness * x - 2 * v

    energy = lambda t, state: (state[0] ** 2).sum() + (state[1] ** 2).sum()  # noqa: E731
    return Case(flow, [stiffness], (START, torch.zeros_like(START)), energy)


def branch_by_where() -> Case:
    theta, slope = leaf(torch.ones(DIM, dtype=torch.float64)), leaf(SPECTRUM / 10)
    return Case(
        lambda t, x: -theta * (MATRIX @ x) - torch.where(x > 0, slope * x * x, 0.0), [theta, slope]
    )


def jump_by_where() -> Case:
    theta = leaf(torch.ones(DIM, dtype=torch.float64))
    gain = lambda t: torch.where(t < 1.0, 1.0, 0.5)  # noqa: E731
    return Case(lambda t, x: -theta * gain(t) * (MATRIX @ x), [theta], breakpoints=(1.0,))


def learned_jump() -> Case:
    theta = leaf(torch.ones(DIM, dtype=torch.float64))
    tau = leaf(torch.tensor(1.0, dtype=torch.float64))
    gain = lambda t: torch.where(t < tau, 1.0, 0.5)  # noqa: E731
    return Case(lambda t, x: -theta * gain(t) * (MATRIX @ x), [theta, tau], breakpoints=[tau])


def several_targets() -> Case:
    return replace(rotated(), target=torch.tensor([1.0, 0.1, 1e-3], dtype=torch.float64))


def unused_leaf() -> Case:
    used, unused = leaf(SPECTRUM), leaf(torch.ones(3, dtype=torch.float64))
    return Case(lambda t, x: -used * x + 0.0 * unused.sum(), [used, unused])


def by(make: Callable[[], Case], method: str, rtol: float) -> Callable[[], Case]:
    return lambda: replace(make(), method=method, rtol=rtol)


RECORDED = {
    "rotated": rotated,
    "driven": driven,
    "network": network,
    "inner gradient": inner_gradient,
    "torch.func.grad": gradient_of_a_function,
    "classes": library_classes,
    "heavy ball": heavy_ball,
    "tuple": tuple_state,
    "where": branch_by_where,
    "jump": jump_by_where,
    "learned jump": learned_jump,
    "targets": several_targets,
    "unused leaf": unused_leaf,
    # One with an evaluation at the end of a step, one with more than a quartic's order.
    "fehlberg2": by(rotated, "fehlberg2", 1e-6),
    "dopri8": by(driven, "dopri8", 1e-10),
}
