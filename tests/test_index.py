"""N is the first k with J(x_k) <= eps, and its derivatives are those of Definition 3."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from iterations import (
    Leaves,
    central_differences,
    definition_3,
    gradients,
    nonlinear,
    nonlinear_leaves,
    number,
    relative_gap,
    unrolled_loss,
)
from torch import Tensor

from discrete import DiscreteAdjoint, Euler, Heun, RungeKutta4, UpdateRule, stopping_index
from ode_stopping import GradientNorm, PreconditionedFlow, Quadratic

SPECTRUM = np.array([0.5, 1.0, 4.0])
WEIGHTS = np.array([0.9, 1.2, 0.3])
START = np.array([1.0, -2.0, 0.7])


def closed_loss(k: np.ndarray | int, h: float) -> np.ndarray:
    """J = |grad f(x_k)|^2 with x_k = (1 - h p l)^k x0 (form 5)."""
    x = (1 - h * WEIGHTS * SPECTRUM) ** np.asarray(k)[..., None] * START
    return ((SPECTRUM * x) ** 2).sum(-1)


def closed_index(h: float, eps: float) -> int:
    low, high = 0, 1
    while closed_loss(high, h) > eps:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if closed_loss(middle, h) <= eps else (middle, high)
    return high


def form_5(h: float) -> tuple[Euler, Tensor, Tensor, GradientNorm]:
    problem = Quadratic(torch.from_numpy(SPECTRUM))
    weights = torch.tensor(WEIGHTS, requires_grad=True)
    rule = Euler(PreconditionedFlow(problem, preconditioner=weights), step=h)
    return rule, weights, torch.from_numpy(START), GradientNorm(problem)


@pytest.mark.parametrize("eps", [1.0, 1e-2, 1e-5, 1e-10])
@pytest.mark.parametrize("h", [0.3, 0.1, 0.013])
def test_first_step_at_the_target(h: float, eps: float) -> None:
    rule, _, x0, criterion = form_5(h)
    result = stopping_index(rule, x0, criterion, eps)
    assert result.index == closed_index(h, eps)
    assert float(result.steps.detach()) == result.index
    assert closed_loss(result.index, h) <= eps < closed_loss(result.index - 1, h)
    assert result.time is not None
    assert float(result.time.detach()) == pytest.approx(h * result.index, rel=1e-15)
    assert float(result.decrease) == pytest.approx(
        closed_loss(result.index, h) - closed_loss(result.index - 1, h), rel=1e-9
    )
    losses = result.trajectory.losses.numpy()
    np.testing.assert_allclose(losses, closed_loss(np.arange(len(losses)), h), rtol=1e-10)


def test_the_target_between_two_neighbouring_losses() -> None:
    h = 0.1
    rule, _, x0, criterion = form_5(h)
    losses = stopping_index(rule, x0, criterion, 1e-3).trajectory.losses.tolist()
    k = len(losses) - 2
    for eps, expected in (
        (losses[k], k),
        (math.nextafter(losses[k], math.inf), k),
        (math.nextafter(losses[k], 0.0), k + 1),
    ):
        assert stopping_index(rule, x0, criterion, eps).index == expected


@pytest.mark.parametrize(("h", "eps"), [(0.1, 1e-6), (0.002, 1e-8)])
def test_derivative_in_closed_form(h: float, eps: float) -> None:
    rule, weights, x0, criterion = form_5(h)
    result = stopping_index(rule, x0, criterion, eps)
    n = result.index
    factor = 1 - h * WEIGHTS * SPECTRUM
    x = factor**n * START
    by_weights = 2 * SPECTRUM**2 * x * n * factor ** (n - 1) * (-h * SPECTRUM) * START
    expected = -by_weights / (closed_loss(n, h) - closed_loss(n - 1, h))
    (found,) = torch.autograd.grad(result.steps, weights)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_a_hundred_thousand_steps() -> None:
    # The loop alone, with the closed form's arithmetic in it and nothing else: 1e5 steps take
    # seconds.
    h, eps = 2e-4, 1e-8
    factor = torch.from_numpy(1 - h * WEIGHTS * SPECTRUM)
    squares = torch.from_numpy(SPECTRUM**2)
    result = stopping_index(
        lambda k, x: factor * x,
        torch.from_numpy(START),
        lambda t, x: torch.dot(squares, x * x),
        eps,
        gradient=None,
    )
    assert result.index == closed_index(h, eps)
    assert 8e4 < result.index < 1.2e5
    assert len(result.trajectory.losses) == result.index + 1
    assert result.trajectory.indices == []
    assert not result.steps.requires_grad


def test_bare_callables_count_steps() -> None:
    # x_{k+1} = x_k (1 - rate / (k + 1)): the clock of a bare callable is t0 + k.
    rate, seen = number(0.5), []

    def update(k: int, x: Tensor) -> Tensor:
        assert isinstance(k, int)
        return x * (1 - rate / (k + 1))

    def criterion(t: Tensor, x: Tensor) -> Tensor:
        seen.append(t.item())
        return x.square().sum()

    result = stopping_index(update, number([2.0]), criterion, 0.1, t0=3.0)
    x, expected = 2.0, 0
    while x * x > 0.1:
        x, expected = x * (1 - 0.5 / (expected + 1)), expected + 1
    assert result.index == expected
    assert result.time is None
    assert seen[: expected + 1] == [3.0 + k for k in range(expected + 1)]
    x = number(2.0, grad=False)
    for k in range(expected):
        before, x = x, x * (1 - rate / (k + 1))
    (by_rate,) = torch.autograd.grad(x * x, rate)
    (found,) = torch.autograd.grad(result.steps, rate)
    decrease = float((x * x - before * before).detach())
    torch.testing.assert_close(found, -by_rate / decrease, rtol=1e-13, atol=0)


def test_definition_3_to_every_leaf() -> None:
    """To theta, phi, x0, the target, t0 and the step, against differences of J(x_N) - eps."""
    leaves = nonlinear_leaves()
    result = nonlinear(leaves)
    n = result.index
    decrease = float((unrolled_loss(leaves, n) - unrolled_loss(leaves, n - 1)).detach())
    assert float(result.decrease) == pytest.approx(decrease, rel=1e-12)
    found = gradients(result.steps, leaves)

    def by_differences(size: float) -> Leaves:
        moved = central_differences(lambda p: float(unrolled_loss(p, n).detach()), leaves, size)
        return {name: -gradient / decrease for name, gradient in moved.items()}

    coarse = relative_gap(by_differences(2e-3), found)
    fine = relative_gap(by_differences(1e-3), found)
    assert fine < 1e-4
    assert coarse / fine == pytest.approx(4.0, rel=0.05)
    assert relative_gap(found, definition_3(leaves, n)) < 1e-12


@pytest.mark.parametrize("rule", [Euler, Heun, RungeKutta4])
@pytest.mark.parametrize("interpolation", ["hermite", "partial_step"])
def test_time_follows_steps(rule: type[UpdateRule], interpolation: str) -> None:
    leaves = nonlinear_leaves()
    result = nonlinear(leaves, rule, interpolation=interpolation)
    h, t0 = float(leaves["h"].detach()), float(leaves["t0"].detach())
    assert result.time is not None
    assert float(result.time.detach()) == pytest.approx(t0 + h * float(result.steps.detach()))
    of_steps, of_time = gradients(result.steps, leaves), gradients(result.time, leaves)
    extra = {"t0": 1.0, "h": float(result.steps.detach())}
    for name in leaves:
        expected = h * of_steps[name] + extra.get(name, 0.0)
        torch.testing.assert_close(of_time[name], expected, rtol=1e-12, atol=1e-12)


def test_learnable_step_of_a_non_autonomous_flow_as_a_parameter() -> None:
    # The step moves the clock as well: the check of the derivatives must not mistake that for an
    # error.
    h = torch.nn.Parameter(torch.tensor(0.01, dtype=torch.float64))
    rule = Euler(lambda t, x: -torch.exp(0.5 * t) * x, step=h)
    x0 = number([1.0], grad=False)
    result = stopping_index(rule, x0, lambda t, x: x.square().sum(), 1e-2)
    (found,) = torch.autograd.grad(result.steps, h)
    x = before = x0
    for k in range(result.index):
        before, x = x, x - h * torch.exp(0.5 * k * h) * x
    (by_h,) = torch.autograd.grad(x.square().sum(), h)
    expected = -by_h / (x.square() - before.square()).sum().detach()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_shapes_of_states() -> None:
    for shape in ((), (1,), (2, 3)):
        x0 = torch.full(shape, 2.0, dtype=torch.float64, requires_grad=True)
        rule = Euler(lambda t, x: -x, step=0.1)
        result = stopping_index(rule, x0, lambda t, x: x.square().mean(), 0.5)
        assert result.state.shape == shape
        assert result.trajectory.states.shape == (result.index + 1, *shape)
        (found,) = torch.autograd.grad(result.steps, x0)
        assert found.shape == shape


def test_a_small_budget_keeps_few_states() -> None:
    leaves = nonlinear_leaves()
    result = nonlinear(leaves, gradient=DiscreteAdjoint(memory=10 * 4 * 8))
    assert 5 <= len(result.trajectory.indices) <= 10
    x, v = result.trajectory.states
    assert x.shape[1:] == (2,)
    assert v.shape[1:] == (2, 1)
