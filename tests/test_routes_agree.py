"""All routes against each other, and second derivatives: right, or an error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    StepAdjoint,
    Torchdiffeq,
    stopping_time,
)
from theory_checks.closed_forms import CLOSED_FORMS

ROUTES = (
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
)


class Oscillator(nn.Module):
    """A damped, driven, nonlinear oscillator (x, v); the criterion shares its stiffness."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.stiffness = nn.Parameter(torch.tensor([1.0, 2.2], dtype=torch.float64))
        self.damping = nn.Parameter(torch.tensor(0.35, dtype=torch.float64))
        mix = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        self.mix = nn.Parameter(0.2 * mix)

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, v = state
        force = -self.stiffness * x - 0.3 * x**3 + torch.tanh(self.mix @ x) * torch.cos(t)
        return v, force - self.damping * (1 + 0.1 * torch.sin(t)) * v

    def energy(self, t: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        x, v = state
        potential = 0.5 * (self.stiffness * x * x).sum()
        return (potential + 0.5 * (v * v).sum()) * (1 + 0.05 * torch.sin(2 * t))


def gradients(route: GradientRoute, method: str = "dopri5") -> dict[str, Tensor]:
    """Derivatives of T + w^T state to everything."""
    flow = Oscillator()
    x0 = torch.tensor([1.0, -0.6], dtype=torch.float64, requires_grad=True)
    v0 = torch.tensor([0.2, 0.4], dtype=torch.float64, requires_grad=True)
    eps, t0 = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.2, 0.5))
    result = stopping_time(
        flow,
        (x0, v0),
        flow.energy,
        eps,
        t0=t0,
        gradient=route,
        solver=Torchdiffeq(method=method, rtol=1e-8),
        evidence="light",
    )
    position, velocity = result.state
    (result.time + position[0] - 0.5 * velocity[1]).backward()
    leaves = {"x0": x0, "v0": v0, "eps": eps, "t0": t0, **dict(flow.named_parameters())}
    found = {}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        found[name] = leaf.grad
    return found


def test_all_routes_give_one_answer() -> None:
    reference = gradients(DirectAdjoint(), method="dopri8")
    for route in ROUTES:
        for name, gradient in gradients(route).items():
            gap = float((gradient - reference[name]).norm())
            assert gap < 1e-6 * float(reference[name].norm()), (type(route).__name__, name)


def test_second_derivative_of_the_direct_route() -> None:
    """Form 1: d2T/dtheta2 = 2 T/theta^2."""
    theta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    eps = 1e-2
    time = stopping_time(
        lambda t, x: -theta * x,
        torch.tensor([2.0], dtype=torch.float64),
        lambda t, x: 0.5 * x.square().sum(),
        eps,
        gradient=DirectAdjoint(),
        solver=Torchdiffeq(rtol=1e-10),
        evidence="light",
    ).time
    (first,) = torch.autograd.grad(time, theta, create_graph=True)
    (second,) = torch.autograd.grad(first, theta)
    span = math.log(4 / (2 * eps)) / (2 * 1.3)
    assert second.item() == pytest.approx(2 * span / 1.3**2, rel=1e-7)


def test_mixed_second_derivatives_of_the_direct_route() -> None:
    """Form 4, T = t0 + (1/(2 eps) - 1/x0^2)/(2 theta): the full Hessian to theta, x0 and eps."""
    theta, x0, eps = (
        torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.8, 1.5, 0.05)
    )
    time = stopping_time(
        lambda t, x: -theta * x**3,
        x0,
        lambda t, x: 0.5 * x**2,
        eps,
        gradient=DirectAdjoint(),
        solver=Torchdiffeq(rtol=1e-10),
        evidence="light",
    ).time
    closed = (1 / (2 * eps) - 1 / x0**2) / (2 * theta)
    for output_pair in zip(
        *(first_derivatives(t, theta, x0, eps) for t in (time, closed)), strict=True
    ):
        measured, truth = (torch.stack(second(g, theta, x0, eps)) for g in output_pair)
        assert float((measured - truth).norm()) < 1e-6 * float(truth.norm())


def first_derivatives(value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, leaves, create_graph=True)


def second(gradient: Tensor, *leaves: Tensor) -> list[Tensor]:
    rows = torch.autograd.grad(gradient, leaves, retain_graph=True, allow_unused=True)
    return [torch.zeros(()) if row is None else row for row in rows]


@pytest.mark.parametrize(
    "route", [StepAdjoint(), InterpolatingAdjoint(), BacksolveAdjoint(), ForwardSensitivity()]
)
def test_second_derivatives_of_the_other_routes_raise(route: GradientRoute) -> None:
    leaves = CLOSED_FORMS[0].leaves(0.1, 0.0)
    time = CLOSED_FORMS[0].solve(leaves, route).time
    (first,) = torch.autograd.grad(time, leaves["theta"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(first, leaves["theta"], retain_graph=True)
    # A penalty on the gradient would lose its own gradient in silence otherwise.
    with pytest.raises(RuntimeError, match="differentiated again"):
        (time + first.square()).backward()


def test_counts_are_none_until_a_gradient_was_taken() -> None:
    for route in ROUTES:
        leaves = CLOSED_FORMS[0].leaves(0.1, 0.0)
        result = CLOSED_FORMS[0].solve(leaves, route)
        assert result.stats.vjps is None
        assert result.stats.nfe_backward is None
        assert result.stats.checks < 40
        result.time.backward()
        assert result.stats.vjps is not None
        assert result.stats.vjps > 0
        assert result.stats.nfe_backward is not None
