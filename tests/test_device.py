"""Nothing assumes a CPU: results live where x0 does, and agree with those of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from discrete import DiscreteAdjoint, Euler, IndexRoute, RungeKutta4, Unrolled, stopping_index
from discrete.learned import (
    CoordinateLSTM,
    LearnedOptimizer,
    LearnedPreconditioner,
    LearnedSchedule,
    RNNprop,
)
from ode_stopping import (
    DirectAdjoint,
    ForwardSensitivity,
    GradientNorm,
    GradientRoute,
    InterpolatingAdjoint,
    LossValue,
    PreconditionedFlow,
    Quadratic,
    StepAdjoint,
    stopping_time,
)
from ode_stopping.problems import geometric_spectrum, random_rotation

DIM, TARGET = 6, 1e-4


def problem(device: torch.device) -> tuple[PreconditionedFlow, Tensor, GradientNorm, Tensor]:
    """A rotated quadratic with learnable rates, made on the CPU and moved."""
    rotation = random_rotation(DIM, seed=0).to(device)
    objective = Quadratic(geometric_spectrum(DIM, 10.0).to(device), rotation=rotation)
    rates = torch.linspace(0.8, 1.2, DIM, dtype=torch.float64).to(device).requires_grad_(True)
    x0 = torch.linspace(-1.0, 1.0, DIM, dtype=torch.float64).to(device)
    flow = PreconditionedFlow(objective, preconditioner=rates)
    return flow, x0, GradientNorm(objective), rates


@pytest.mark.parametrize(
    "route", [StepAdjoint(), InterpolatingAdjoint(), DirectAdjoint(), ForwardSensitivity()], ids=str
)
def test_stopping_time(device: torch.device, route: GradientRoute) -> None:
    values = []
    for where in (torch.device("cpu"), device):
        flow, x0, criterion, rates = problem(where)
        result = stopping_time(flow, x0, criterion, TARGET, gradient=route)
        (gradient,) = torch.autograd.grad(result.time, rates)
        assert isinstance(result.state, Tensor)
        for tensor in (result.time, result.state, result.rate, result.reached, gradient):
            assert tensor.device.type == where.type
        values.append((result.time.detach().cpu(), gradient.cpu()))
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("route", [DiscreteAdjoint(), DiscreteAdjoint(memory=400), Unrolled()])
@pytest.mark.parametrize("rule", [Euler, RungeKutta4])
@pytest.mark.parametrize("interpolation", [None, "hermite", "partial_step"])
def test_stopping_index(
    device: torch.device,
    route: IndexRoute,
    rule: type[Euler | RungeKutta4],
    interpolation: str | None,
) -> None:
    values = []
    for where in (torch.device("cpu"), device):
        flow, x0, criterion, rates = problem(where)
        result = stopping_index(
            rule(flow, step=0.05),
            x0,
            criterion,
            TARGET,
            gradient=route,
            interpolation=interpolation,  # type: ignore[arg-type]
        )
        (gradient,) = torch.autograd.grad(result.steps, rates)
        for tensor in (result.steps, result.decrease, result.reached, gradient):
            assert tensor.device.type == where.type
        values.append((result.steps.detach().cpu(), gradient.cpu()))
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=0.0)


def learned_rules() -> list[LearnedOptimizer]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            LearnedSchedule([0.1, 0.2], momentum=0.3),
            LearnedPreconditioner(DIM, rank=2),
            CoordinateLSTM(4).double(),
            RNNprop(4).double(),
        ]


@pytest.mark.parametrize("which", range(4))
def test_learned_optimisers(device: torch.device, which: int) -> None:
    ends = []
    for where in (torch.device("cpu"), device):
        learned = learned_rules()[which].to(where)
        f = Quadratic(geometric_spectrum(DIM, 10.0).to(where))
        x0 = torch.linspace(-1.0, 1.0, DIM, dtype=torch.float64).to(where)
        update = learned.update(f)
        run = stopping_index(
            update, update.initial_state(x0), LossValue(f), 1e-9, max_steps=3, at=[3]
        )
        (end, *_) = run.states_at
        gradients = torch.autograd.grad(end.sum(), list(learned.parameters()))
        p = torch.nn.Parameter(x0.clone())
        optimizer = learned.optimizer([p])
        for _ in range(3):
            optimizer.zero_grad()
            f(p).backward()
            optimizer.step()
        kept = [v for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        assert {t.device.type for t in (end, *gradients, *kept)} == {where.type}
        torch.testing.assert_close(p.detach(), end[0].detach(), rtol=1e-9, atol=1e-12)
        ends.append(end[0].detach().cpu())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("which", range(4))
def test_learned_steps_bring_no_tensor_from_elsewhere(which: int) -> None:
    """On the device meta, which has no numbers, and mixes with no other."""
    learned = learned_rules()[which].to("meta")
    x = torch.empty(3, DIM, dtype=torch.float64, device="meta")
    norm = torch.empty(3, 1, dtype=torch.float64, device="meta")
    memory = learned.initial_memory(x)
    for k in range(2):
        step, memory = learned.step(k, x, memory, norm)
        assert {piece.device.type for piece in (step, *memory)} == {"meta"}
        assert step.shape == x.shape
