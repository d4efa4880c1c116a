"""Truncation: one step is eq. 13, all steps are the full sum, and more steps leave less bias."""

from __future__ import annotations

import pytest
import torch
from iterations import (
    gradients,
    nonlinear,
    nonlinear_flow,
    nonlinear_leaves,
    relative_gap,
    weighted_norm,
)

from discrete import Euler, Truncated, stopping_index
from ode_stopping import GradientError

PARAMETERS = ("theta", "phi", "eps")


def test_one_step_is_equation_13() -> None:
    """h grad J(x_N)^T A_theta(x_{N-1}) / (J(x_N) - J(x_{N-1})), with A = -F."""
    leaves = nonlinear_leaves()
    result = nonlinear(leaves, gradient=Truncated(steps=1))
    n, h, t0 = result.index, leaves["h"].detach(), leaves["t0"].detach()
    (found,) = torch.autograd.grad(result.steps, leaves["theta"])

    flow, criterion = nonlinear_flow(leaves), weighted_norm(leaves)
    path = [(leaves["x"].detach(), leaves["v"].detach())]
    with torch.no_grad():
        for k in range(n):
            x, v = path[-1]
            dx, dv = flow(t0 + k * h, (x, v))
            path.append((x + h * dx, v + h * dv))
    end = tuple(piece.clone().requires_grad_(True) for piece in path[n])
    loss = criterion(t0 + n * h, end)
    of_end = torch.autograd.grad(loss, end)
    decrease = loss.detach() - criterion(t0 + (n - 1) * h, path[n - 1]).detach()
    # The velocity of v has no theta in it.
    velocity, _ = flow(t0 + (n - 1) * h, path[n - 1])
    (inner,) = torch.autograd.grad(velocity, leaves["theta"], of_end[0])
    torch.testing.assert_close(found, -h * inner / decrease, rtol=1e-12, atol=0)


@pytest.mark.parametrize("extra", [0, 1, 1000])
def test_all_steps_are_the_full_sum(extra: int) -> None:
    leaves = nonlinear_leaves()
    full = nonlinear(leaves)
    truth = gradients(full.steps, leaves)
    result = nonlinear(leaves, gradient=Truncated(steps=full.index + extra))
    assert relative_gap(gradients(result.steps, leaves), truth) < 1e-12


def test_more_steps_leave_less_bias() -> None:
    leaves = nonlinear_leaves()
    # Other leaves than parameters would ask the truncated sum for what it does not have.
    for name in ("x", "v", "t0", "h"):
        leaves[name].requires_grad_(False)
    wanted = {name: leaves[name] for name in PARAMETERS}
    full = nonlinear(leaves)
    truth = gradients(full.steps, wanted)
    counts = [1, 4, 16, 40, 64, full.index]
    bias = [
        relative_gap(gradients(nonlinear(leaves, gradient=Truncated(k)).steps, wanted), truth)
        for k in counts
    ]
    assert bias == sorted(bias, reverse=True)
    assert bias[0] > 0.9
    assert bias[-1] < 1e-12


def test_keeps_no_more_states_than_it_needs() -> None:
    result = nonlinear(nonlinear_leaves(), gradient=Truncated(steps=5))
    assert result.trajectory.indices == list(range(result.index - 5, result.index + 1))


@pytest.mark.parametrize("steps", [1, 10, 73])
def test_gradient_to_the_start_raises(steps: int) -> None:
    leaves = nonlinear_leaves()
    result = nonlinear(leaves, gradient=Truncated(steps=steps))
    assert steps < result.index
    with pytest.raises(GradientError, match="x0"):
        torch.autograd.grad(result.steps, leaves["x"])


def test_gradient_to_the_start_where_one_step_is_all() -> None:
    x0 = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    result = stopping_index(
        Euler(lambda t, x: -x, step=0.5),
        x0,
        lambda t, x: x.square().sum(),
        0.5,
        gradient=Truncated(steps=1),
    )
    assert result.index == 1
    (found,) = torch.autograd.grad(result.steps, x0)
    # J_1 = x0^2/4, J_1 - J_0 = -3/4
    assert float(found) == pytest.approx(0.5 / 0.75, rel=1e-14)
