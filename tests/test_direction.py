"""direction="rising": the same as -J that falls to -eps, with everything in the sign of J."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from turning import F64, Turning, first, growth, largest_gap, leaf
from variants import slow_after

from discrete import (
    DiscreteAdjoint,
    Euler,
    RungeKutta4,
    StoppingIndexTask,
    Truncated,
    Unrolled,
    minimise_stopping_index,
    stopping_index,
)
from discrete.check import check_index_gradient
from ode_stopping import (
    AllOf,
    AnyOf,
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientNorm,
    GradientRoute,
    InterpolatingAdjoint,
    Quadratic,
    Status,
    StepAdjoint,
    StoppingTask,
    Torchdiffeq,
    check_stopping_gradient,
    minimise_stopping_time,
    stopping_time,
)
from theory_checks import convergence_study

ROUTES = (
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
)
every_route = pytest.mark.parametrize(
    "route", slow_after(2, ROUTES), ids=lambda route: type(route).__name__
)
Criterion = Callable[[Tensor, Tensor], Tensor]


# --- closed forms -------------------------------------------------------------------------------


@every_route
def test_growth(route: GradientRoute) -> None:
    """T = t0 + log(eps/(phi x0))/theta and all its derivatives, from below; J' = theta eps."""
    theta, phi, x0, eps, t0 = leaf(0.7), leaf(1.3), leaf([0.2]), leaf(2.0), leaf(0.4)
    result = stopping_time(
        growth(theta),
        x0,
        lambda t, x: phi * x.sum(),
        eps,
        t0=t0,
        direction="rising",
        gradient=route,
        solver=Torchdiffeq(rtol=1e-10),
    )
    truth = t0 + torch.log(eps / (phi * x0.sum())) / theta
    leaves = [theta, phi, x0, eps, t0]
    assert result.status is Status.REACHED
    assert result.time.item() == pytest.approx(truth.item(), rel=1e-9)
    assert result.rate.item() == pytest.approx(1.4, rel=1e-8)
    found = torch.autograd.grad(result.time, leaves)
    assert largest_gap(list(found), list(torch.autograd.grad(truth, leaves))) < 1e-8


@every_route
def test_several_targets_are_met_from_the_lowest(route: GradientRoute) -> None:
    theta, eps = leaf(0.7), leaf([2.0, 0.1, 0.5, 3.0])
    x0 = leaf([0.2])
    result = stopping_time(
        growth(theta),
        x0,
        first,
        eps,
        direction="rising",
        gradient=route,
        solver=Torchdiffeq(rtol=1e-10),
    )
    assert [status.name for status in result.status] == ["REACHED", "AT_START", *["REACHED"] * 2]
    truth = torch.log(eps / x0) / theta * torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=F64)
    assert result.time.tolist() == pytest.approx(truth.tolist(), rel=1e-9)
    weights = torch.tensor([1.0, 5.0, -2.0, 0.5], dtype=F64)
    leaves = [theta, x0, eps]
    found = torch.autograd.grad((weights * result.time).sum(), leaves)
    expected = torch.autograd.grad((weights * truth).sum(), leaves)
    assert largest_gap(list(found), list(expected)) < 1e-8


@pytest.mark.parametrize("interpolation", [None, "log", "hermite", "partial_step"])
def test_growth_by_steps(interpolation: Any) -> None:
    """x_k = x0 (1 + h theta)^k; "log" is exact: N* = log(eps/x0)/log(1 + h theta)."""
    theta, x0, eps, h = leaf(0.7), leaf([0.2]), leaf(2.0), leaf(0.1)
    rule = Euler(growth(theta), step=h)
    result = stopping_index(rule, x0, first, eps, direction="rising", interpolation=interpolation)
    leaves = [theta, x0, eps, h]
    exact = torch.log(eps / x0.sum()) / torch.log1p(h * theta)
    n = math.ceil(exact.item())
    assert result.index == n
    J = [x0.sum() * (1 + h * theta) ** k for k in (n - 1, n)]
    assert result.decrease.item() == pytest.approx((J[1] - J[0]).item(), rel=1e-12)
    assert result.decrease.item() > 0
    found = list(torch.autograd.grad(result.steps, leaves))
    if interpolation == "log":
        assert result.steps.item() == pytest.approx(exact.item(), rel=1e-12)
        assert largest_gap(found, list(torch.autograd.grad(exact, leaves))) < 1e-10
    elif interpolation is None:
        assert result.steps.item() == n
        excess = -(J[1] - eps) / (J[1] - J[0]).detach()
        assert largest_gap(found, list(torch.autograd.grad(excess, leaves))) < 1e-10
    else:
        assert n - 1 < result.steps.item() <= n
        assert largest_gap(found, list(torch.autograd.grad(exact, leaves))) < 0.05


# --- the same as -J and -eps --------------------------------------------------------------------


def both_times(
    turning: Turning, eps: Tensor, **options: Any
) -> tuple[list[Any], list[list[Tensor]]]:
    """The run of J that rises to eps, and that of -J that falls to -eps, with their gradients."""
    results, gradients = [], []
    x0 = turning.x0.to(options.pop("dtype", F64))
    for criterion, target, direction in (
        (turning.first, eps, "rising"),
        (turning.minus, -eps, "falling"),
    ):
        result = stopping_time(
            turning.flow,
            x0,
            criterion,
            target,
            t0=turning.t0,
            direction=direction,  # type: ignore[arg-type]
            **options,
        )
        total = result.time.sum() + result.state.double().square().sum()
        results.append(result)
        leaves = [*turning.leaves[:3], turning.t0, eps]
        gradients.append(list(torch.autograd.grad(total, leaves)))
    return results, gradients


@every_route
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_to_the_mirror_image_bit_by_bit(route: GradientRoute, dtype: torch.dtype) -> None:
    turning = Turning([-0.7, 0.2], 0.3)
    solver = Torchdiffeq(rtol=1e-9 if dtype == F64 else 1e-4)
    results, gradients = both_times(
        turning, turning.eps, gradient=route, solver=solver, dtype=dtype
    )
    rising, falling = results
    assert rising.status is falling.status is Status.REACHED
    assert rising.time.item() == falling.time.item()
    assert torch.equal(rising.state, falling.state)
    assert rising.rate.item() == -falling.rate.item() > 0
    assert rising.best == -falling.best
    assert rising.best_time == falling.best_time
    assert torch.equal(rising.trajectory.values, -falling.trajectory.values)
    assert torch.equal(rising.trajectory.times, falling.trajectory.times)
    assert rising.near_miss == falling.near_miss
    assert rising.evidence.figures == falling.evidence.figures
    assert rising.evidence.rate == -falling.evidence.rate
    assert rising.stats == falling.stats
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert turning.eps.item() == 0.3


@pytest.mark.parametrize("evidence", ["standard", "thorough"])
def test_equal_with_the_error_of_every_leaf(evidence: str) -> None:
    turning = Turning([-0.7, 0.2], 0.3)
    eps = leaf([0.3, -0.1, 0.5])
    results, gradients = both_times(turning, eps, evidence=evidence)
    assert results[0].time.tolist() == results[1].time.tolist()
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert [e.leaves for e in results[0].evidence] == [e.leaves for e in results[1].evidence]


def test_equal_second_derivatives() -> None:
    turning = Turning([-0.7, 0.2], 0.3)
    found = []
    for criterion, sign, direction in (
        (turning.first, 1, "rising"),
        (turning.minus, -1, "falling"),
    ):
        result = stopping_time(
            turning.flow,
            turning.x0,
            criterion,
            sign * turning.eps,
            t0=turning.t0,
            direction=direction,  # type: ignore[arg-type]
            gradient=DirectAdjoint(),
        )
        leaves = [turning.w, turning.x0, turning.eps]
        grads = torch.autograd.grad(result.time, leaves, create_graph=True)
        found.append(torch.autograd.grad(sum((g * g).sum() for g in grads), leaves))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "route",
    [
        DiscreteAdjoint(),
        DiscreteAdjoint(memory=1),
        DiscreteAdjoint(chunk=3),
        Unrolled(),
        Truncated(steps=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("interpolation", [None, "hermite", "partial_step"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_indices_are_equal_bit_by_bit(route: Any, interpolation: Any, dtype: torch.dtype) -> None:
    """By every route, for every index, with the step, t0 and the criterion's own leaf."""
    turning, h, phi = Turning([-0.7, 0.2], 0.3), leaf(0.11), leaf(1.2)
    results, gradients = [], []
    x0 = turning.x0.detach().to(dtype)
    if not isinstance(route, Truncated):
        x0.requires_grad_(True)
    criterion: Criterion = lambda t, x: (phi * x[0] + 0.1 * torch.sin(t)).to(x.dtype)  # noqa: E731
    for sign, direction in ((1, "rising"), (-1, "falling")):
        result = stopping_index(
            RungeKutta4(turning.flow, step=h),
            x0,
            lambda t, x, sign=sign: sign * criterion(t, x),
            sign * turning.eps,
            t0=turning.t0,
            direction=direction,  # type: ignore[arg-type]
            interpolation=interpolation,
            gradient=route,
        )
        results.append(result)
        leaves = [turning.a, turning.w, turning.eps, turning.t0, h, phi]
        if x0.requires_grad:
            leaves.append(x0)
        assert result.time is not None
        total = result.steps + result.time + result.state.double().square().sum()
        gradients.append(torch.autograd.grad(total, leaves))
    rising, falling = results
    assert rising.index == falling.index > 3
    assert rising.steps.item() == falling.steps.item()
    assert rising.decrease.item() == -falling.decrease.item() > 0
    assert rising.best == -falling.best
    assert torch.equal(rising.trajectory.losses, -falling.trajectory.losses)
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert sum(float(g.abs().sum()) for g in gradients[0]) > 1


def test_several_targets_of_an_iteration() -> None:
    theta, eps = leaf(0.7), leaf([2.0, 0.1, 0.5, 0.51])
    found = []
    for sign, direction in ((1, "rising"), (-1, "falling")):
        result = stopping_index(
            Euler(growth(theta), step=0.1),
            torch.tensor([0.2], dtype=F64),
            lambda t, x, sign=sign: sign * x[0],
            sign * eps,
            direction=direction,  # type: ignore[arg-type]
        )
        assert [one.name for one in result.status] == ["REACHED", "AT_START", "REACHED", "REACHED"]
        assert result.index.tolist() == [35, 0, 14, 14]
        weights = torch.tensor([1.0, 2.0, 3.0, -1.0], dtype=F64)
        found.append(torch.autograd.grad((weights * result.steps).sum(), [theta, eps]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inside", [False, True])
def test_criteria_that_take_rows_and_those_that_differentiate(inside: bool) -> None:
    """x' = x on curvatures 1 and 2, J = |grad f|^2 = e^{2t} (x_1^2 + 4 x_2^2)."""
    objective = Quadratic(torch.tensor([1.0, 2.0], dtype=F64))
    x0 = leaf([0.1, 0.05])

    def differentiates(t: Tensor, x: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(objective(x), x, create_graph=True)
        return g.square().sum()

    criterion = differentiates if inside else GradientNorm(objective)
    result = stopping_time(
        lambda t, x: x, x0, criterion, 1.0, direction="rising", solver=Torchdiffeq(rtol=1e-10)
    )
    truth = -0.5 * torch.log(x0[0] ** 2 + 4 * x0[1] ** 2)
    assert result.time.item() == pytest.approx(truth.item(), rel=1e-9)
    found = torch.autograd.grad(result.time, x0) + torch.autograd.grad(truth, x0)
    assert torch.allclose(*found, rtol=1e-8)
    assert bool((result.trajectory.values > 0).all())


# --- through the library ------------------------------------------------------------------------


def test_any_and_all_change_places() -> None:
    """x_i = x_i(0) e^t with eps_i = 1: the minimum rises last."""
    x0 = torch.tensor([0.5, 0.1], dtype=F64)
    members = [lambda t, x: x[0].clone(), lambda t, x: x[1].clone()]
    for kind, start in ((AnyOf, 0.1), (AllOf, 0.5)):
        criterion = kind(*members, targets=[1.0, 1.0])
        time = stopping_time(lambda t, x: x, x0, criterion, 1.0, direction="rising")
        assert time.time.item() == pytest.approx(math.log(1 / start), rel=1e-6)
        steps = stopping_index(lambda k, x: 2 * x, x0, criterion, 1.0, direction="rising")
        assert steps.index == math.ceil(math.log2(1 / start))


def test_checks() -> None:
    theta, eps = leaf(0.7), leaf(2.0)
    time = check_stopping_gradient(
        growth(theta), leaf([0.2, 0.1]), first, eps, direction="rising", directions=1
    )
    assert time.passed
    assert time.rate > 0
    index = check_index_gradient(
        Euler(growth(theta), step=0.1),
        leaf([0.2, 0.1]),
        first,
        eps,
        direction="rising",
        directions=1,
    )
    assert index.passed
    assert index.rate > 0


def test_tuning() -> None:
    """T = log 10 / theta: descending T + theta makes theta larger towards sqrt(log 10)."""
    x0 = torch.tensor([0.2], dtype=F64)
    theta = leaf(0.7)
    tasks: tuple[tuple[Any, Any], ...] = (
        (minimise_stopping_time, StoppingTask(growth(theta), x0, first, 2.0, direction="rising")),
        (
            minimise_stopping_index,
            StoppingIndexTask(Euler(growth(theta), step=0.1), x0, first, 2.0, direction="rising"),
        ),
    )
    for minimise, task in tasks:
        with torch.no_grad():
            theta.fill_(0.7)
        before = getattr(task.run(), task.quantity).item()
        minimise(
            task,
            theta,
            optimizer=torch.optim.Adam([theta], lr=0.1),
            iterations=5,
            progress=False,
            on_error="raise",
        )
        assert theta.item() > 1.0
        assert getattr(task.run(), task.quantity).item() < 0.8 * before


def test_theorem_2_for_a_criterion_that_rises() -> None:
    theta = leaf(0.7)
    study = convergence_study(
        growth(theta),
        torch.tensor([0.2], dtype=F64),
        first,
        2.0,
        steps=[0.08, 0.04, 0.02, 0.01],
        interpolation="log",
        direction="rising",
    )
    assert study.reference.time == pytest.approx(math.log(10) / 0.7, rel=1e-8)
    # N* = log 10/log(1 + h theta): the first order cancels in the derivative, not in the value.
    assert study.slope.slope == pytest.approx(2.0, abs=0.05)
    assert study.time_slope is not None
    assert study.time_slope.slope == pytest.approx(1.0, abs=0.05)
    assert all(row.decrease > 0 for row in study.rows)
