"""The fractional index N*: its value, its gradient, its continuity, and the orders of both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from iterations import (
    Leaves,
    central_differences,
    gradients,
    nonlinear,
    nonlinear_leaves,
    number,
    relative_gap,
)
from scipy.optimize import brentq
from torch import Tensor

from discrete import Euler, Heun, RungeKutta4, UpdateRule, stopping_index

INTERPOLATIONS = ("log", "hermite", "partial_step")
every_interpolation = pytest.mark.parametrize("interpolation", INTERPOLATIONS)


@every_interpolation
@pytest.mark.parametrize("rule", [Euler, Heun, RungeKutta4], ids=lambda rule: rule.__name__)
def test_gradient_is_that_of_the_value(rule: type[UpdateRule], interpolation: str) -> None:
    # A coarse step, so that the whole range of the perturbations stays within one step.
    leaves = nonlinear_leaves(step=0.27)
    result = nonlinear(leaves, rule, interpolation=interpolation)
    value = float(result.steps.detach())
    assert result.index - 1 < value <= result.index
    found = gradients(result.steps, leaves)

    def fractional(moved: Leaves) -> float:
        again = nonlinear(moved, rule, interpolation=interpolation, gradient=None)
        assert again.index == result.index
        return float(again.steps)

    coarse = relative_gap(central_differences(fractional, leaves, 2e-3), found)
    fine = relative_gap(central_differences(fractional, leaves, 1e-3), found)
    assert fine < 1e-3
    assert coarse / fine == pytest.approx(4.0, rel=0.1)


@every_interpolation
@pytest.mark.parametrize("rule", [Euler, RungeKutta4], ids=lambda rule: rule.__name__)
def test_continuous_where_the_index_jumps(rule: type[UpdateRule], interpolation: str) -> None:
    leaves = nonlinear_leaves(step=0.25)
    losses = nonlinear(leaves, rule, gradient=None).trajectory.losses
    at_jump = float(losses[-2])

    def steps(eps: float) -> tuple[int, float]:
        leaves["eps"] = number(eps)
        result = nonlinear(leaves, rule, interpolation=interpolation)
        return result.index, float(result.steps.detach())

    (before, low), (after, high) = (steps(at_jump * (1 + sign * 1e-9)) for sign in (1, -1))
    assert after == before + 1
    assert low == pytest.approx(before, abs=1e-6)
    assert high == pytest.approx(before, abs=1e-6)


def test_log_is_exact_for_exponential_decay() -> None:
    """x_k = (1 - h theta)^k x0: N* = log(2 eps/x0^2) / (2 log(1 - h theta)), at every step size."""
    for h, eps in ((0.3, 1e-2), (0.01, 1e-4), (1e-3, 1e-3)):
        theta, x0, target, step = number(1.3), number(2.0), number(eps), number(h)
        rule = Euler(lambda t, x, theta=theta: -theta * x, step=step)
        result = stopping_index(
            rule, x0, lambda t, x: 0.5 * x.square(), target, interpolation="log"
        )
        leaves = {"theta": theta, "x0": x0, "eps": target, "h": step}
        closed = torch.log(2 * target / x0.square()) / (2 * torch.log1p(-step * theta))
        assert float(result.steps.detach()) == pytest.approx(float(closed.detach()), rel=1e-12)
        assert relative_gap(gradients(result.steps, leaves), gradients(closed, leaves)) < 1e-9


# x_i' = -theta_i (x_i + sin(t) x_i^3), J = |x|^2: nonlinear and explicit in t. With u = x^-2 it is
# linear, u' = a (u + sin t) with a = 2 theta, so T and dT/dtheta are known.
ORDER_THETA = [0.5, 0.7, 0.9, 1.1, 1.3, 1.5]
ORDER_X0 = [1.0, -0.5, 0.8, 0.9, -1.1, 0.7]
ORDER_EPS = 0.11


def solution(t: Tensor, theta: Tensor) -> Tensor:
    """x(t) from ORDER_X0 at t = 0."""
    a, start = 2 * theta, number(ORDER_X0, grad=False)
    forced = a / (1 + a**2) * (torch.exp(a * t) - a * torch.sin(t) - torch.cos(t))
    return start.sign() / torch.sqrt(torch.exp(a * t) * start**-2 + forced)


def order_truth() -> tuple[float, Tensor]:
    """T and dT/dtheta, by the implicit function theorem on the closed form."""
    theta = number(ORDER_THETA)

    def excess(t: float) -> float:
        return float(solution(number(t, grad=False), theta.detach()).square().sum()) - ORDER_EPS

    time = number(brentq(excess, 0.0, 10.0, xtol=1e-15, rtol=1e-15))
    by_time, by_theta = torch.autograd.grad(solution(time, theta).square().sum(), [time, theta])
    return float(time.detach()), -by_theta / by_time


def order_errors(
    rule: type[UpdateRule], interpolation: str | None, steps: list[float]
) -> tuple[list[float], list[float]]:
    time, by_theta = order_truth()
    of_value, of_gradient = [], []
    for h in steps:
        theta = number(ORDER_THETA)

        def flow(t: Tensor, x: Tensor, theta: Tensor = theta) -> Tensor:
            return -theta * (x + torch.sin(t) * x**3)

        result = stopping_index(
            rule(flow, step=h),
            number(ORDER_X0, grad=False),
            lambda t, x: x.square().sum(),
            ORDER_EPS,
            interpolation=interpolation,
        )
        assert result.time is not None
        (found,) = torch.autograd.grad(result.time, theta, retain_graph=True)
        of_value.append(abs(float(result.time.detach()) - time))
        of_gradient.append(float((found - by_theta).norm()))
    return of_value, of_gradient


def slope(steps: list[float], errors: list[float]) -> float:
    return float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


COARSE = list(np.geomspace(0.2, 0.2 * 10**-1.5, 20))
FINE = list(np.geomspace(0.1, 0.1 * 10**-1.5, 60))


@pytest.mark.parametrize(
    ("rule", "interpolation", "at_least"),
    [
        (Heun, "hermite", 1.85),
        (RungeKutta4, "partial_step", 3.7),
        pytest.param(RungeKutta4, "hermite", 2.7, marks=pytest.mark.slow),
    ],
    ids=["Heun-hermite", "RK4-partial_step", "RK4-hermite"],
)
def test_order_of_the_gradient(rule: type[UpdateRule], interpolation: str, at_least: float) -> None:
    of_value, of_gradient = order_errors(rule, interpolation, COARSE)
    slopes = slope(COARSE, of_gradient), slope(COARSE, of_value)
    print(slopes)
    assert min(slopes) >= at_least


@pytest.mark.slow
def test_order_of_definition_3() -> None:
    _, of_gradient = order_errors(Euler, None, FINE)
    assert 0.9 <= slope(FINE, of_gradient) <= 1.1


def test_a_target_met_exactly_is_the_whole_number() -> None:
    for interpolation in INTERPOLATIONS:
        leaves = nonlinear_leaves(step=0.25)
        losses = nonlinear(leaves, gradient=None).trajectory.losses
        leaves["eps"] = losses[-1].clone().requires_grad_(True)
        result = nonlinear(leaves, interpolation=interpolation)
        assert float(result.steps.detach()) == pytest.approx(result.index, abs=1e-12)
        assert all(bool(g.isfinite().all()) for g in gradients(result.steps, leaves).values())
