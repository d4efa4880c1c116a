"""What a user types who never thinks of a dtype: torch's float32, held against float64.

Nothing here may warn, and nothing may come out in another dtype than it went in (but for T, which
is float64).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from variants import slow_after

from discrete import Euler, Heun, RungeKutta4, Unrolled, stopping_index
from ode_stopping import (
    AllOf,
    AnyOf,
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientFlow,
    GradientNorm,
    GradientRoute,
    InterpolatingAdjoint,
    LossValue,
    PreconditionedFlow,
    Quadratic,
    QuarticQuadratic,
    RelativeDecrease,
    RescaledGradientFlow,
    StepAdjoint,
    stopping_time,
)
from ode_stopping.flows import HeavyBallFlow, NesterovFlow, Positive

ROUTES = [
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
]
SPECTRUM = [1.0, 2.0, 4.0]
START = [1.0, -0.5, 0.8]
CLOSE = 2e-3


class Learned(nn.Module):
    """A schedule with one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.3))

    def forward(self, t: Tensor) -> Tensor:
        return torch.exp(-self.rate * t) + 0.5


def quadratic() -> Quadratic:
    return Quadratic(nn.Parameter(torch.tensor(SPECTRUM)))


def made(name: str) -> tuple[nn.Module, Any, float, float]:
    """Flow, criterion, target and t0, all in torch's default dtype."""
    f: Any = quadratic()
    if name == "quartic":
        f = QuarticQuadratic(nn.Parameter(torch.tensor(SPECTRUM)))
    flows: dict[str, Callable[[], nn.Module]] = {
        "schedule": lambda: RescaledGradientFlow(f, schedule=Learned()),
        "preconditioner": lambda: PreconditionedFlow(
            f, preconditioner=nn.Parameter(torch.tensor([1.0, 0.7, 0.5]))
        ),
        "heavy ball": lambda: HeavyBallFlow(f, damping=Positive(3.0)),
        "Nesterov": lambda: NesterovFlow(f, alpha=3.0),
    }
    criteria: dict[str, Callable[[], Any]] = {
        "gradient norm": lambda: GradientNorm(f),
        "relative": lambda: RelativeDecrease(f, reference=2.0),
        "any": lambda: AnyOf(LossValue(f), GradientNorm(f), targets=[0.05, 0.01]),
        "all": lambda: AllOf(LossValue(f), GradientNorm(f), targets=[0.05, 0.2]),
    }
    flow = flows.get(name, lambda: GradientFlow(f))()
    criterion = criteria.get(name, lambda: LossValue(f))()
    target = 1.0 if name in ("any", "all") else 0.1
    return flow, criterion, target, 1.0 if name == "Nesterov" else 0.0


NAMES = [
    "gradient flow",
    "quartic",
    "schedule",
    "preconditioner",
    "heavy ball",
    "Nesterov",
    "gradient norm",
    "relative",
    "any",
    "all",
]


def answers(
    name: str, dtype: torch.dtype, solve: Callable[..., tuple[Tensor, Any]]
) -> list[Tensor]:
    """The value, and the gradients to start and parameters."""
    flow, criterion, target, t0 = made(name)
    flow.to(dtype)
    criterion.to(dtype)
    x0 = torch.tensor(START, dtype=dtype, requires_grad=True)
    state = flow.initial_state(x0)  # type: ignore[operator]
    value, found = solve(flow, state, criterion, target, t0)
    pieces = found if isinstance(found, tuple) else (found,)
    assert {piece.dtype for piece in pieces} == {dtype}
    parameters = list({id(p): p for m in (flow, criterion) for p in m.parameters()}.values())
    gradients = torch.autograd.grad(value, [x0, *parameters], allow_unused=True)
    assert {g.dtype for g in gradients if g is not None} == {dtype}
    return [value.detach(), *(torch.zeros(1) if g is None else g for g in gradients)]


def assert_close(found: list[Tensor], truth: list[Tensor]) -> None:
    for one, other in zip(found, truth, strict=True):
        assert float((one.double() - other).norm()) <= CLOSE * float(other.norm()) + 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_stopping_times(name: str) -> None:
    def solve(flow: Any, state: Any, criterion: Any, target: float, t0: float) -> Any:
        result = stopping_time(flow, state, criterion, target, t0=t0)
        assert result.time.dtype == torch.float64
        return result.time, result.state

    assert_close(answers(name, torch.float32, solve), answers(name, torch.float64, solve))


@pytest.mark.parametrize("route", slow_after(2, ROUTES), ids=lambda route: type(route).__name__)
@pytest.mark.parametrize("name", ["schedule", "heavy ball"])
def test_every_route(name: str, route: GradientRoute) -> None:
    def solve(flow: Any, state: Any, criterion: Any, target: float, t0: float) -> Any:
        result = stopping_time(flow, state, criterion, target, t0=t0, gradient=route)
        return result.time, result.state

    assert_close(answers(name, torch.float32, solve), answers(name, torch.float64, solve))


@pytest.mark.parametrize("update", [Euler, Heun, RungeKutta4])
@pytest.mark.parametrize("interpolation", [None, "log", "hermite", "partial_step"])
@pytest.mark.parametrize("name", ["gradient flow", "schedule", "heavy ball"])
def test_stopping_indices(name: str, update: Any, interpolation: Any) -> None:
    def solve(flow: Any, state: Any, criterion: Any, target: float, t0: float) -> Any:
        result = stopping_index(
            update(flow, step=0.05), state, criterion, target, t0=t0, interpolation=interpolation
        )
        return result.steps, result.state

    assert_close(answers(name, torch.float32, solve), answers(name, torch.float64, solve))


def test_a_closure_with_everything() -> None:
    """Targets, breakpoints and t0 that require grad, a rising criterion, autograd.grad inside."""

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        def leaf(value: Any) -> Tensor:
            return torch.tensor(value, dtype=dtype, requires_grad=True)

        rate, switch, t0 = leaf([1.0, 2.0]), leaf(0.4), leaf(0.1)
        x0, targets = leaf([2.0, 1.0]), leaf([-0.5, -0.1])

        def flow(t: Tensor, x: Tensor) -> Tensor:
            scale = torch.where(t < switch, 1.0, 1.5).to(x.dtype)
            (g,) = torch.autograd.grad((rate * x**2).sum() / 2, x, create_graph=True)
            return -scale * g

        result = stopping_time(
            flow,
            x0,
            lambda t, x: -(x**2).sum(),
            targets,
            t0=t0,
            breakpoints=[switch],
            direction="rising",
        )
        leaves = [rate, switch, t0, x0, targets]
        found = torch.autograd.grad(result.time.sum(), leaves)
        assert {g.dtype for g in found} == {dtype}
        return [result.time.detach(), *found]

    assert_close(gradients(torch.float32), gradients(torch.float64))


def test_unrolled_and_the_adjoint() -> None:
    rate, x0 = torch.tensor(0.1, requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)

    def update(k: int, x: Tensor) -> Tensor:
        return x - rate * x * (1 + 0.1 * torch.sin(torch.tensor(float(k))))

    found = [
        torch.autograd.grad(
            stopping_index(update, x0, lambda k, x: (x**2).sum(), 0.1, **options).steps, [rate, x0]
        )
        for options in ({}, {"gradient": Unrolled()})
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
