"""What a gradient that cancels, or is nothing, is measured by: its parts, not the leaf's size."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor
from variants import slow_after

from ode_stopping import (
    DirectAdjoint,
    ForwardSensitivity,
    GradientAccuracyWarning,
    GradientRoute,
    InterpolatingAdjoint,
    StepAdjoint,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.gradients.chain import Chain
from ode_stopping.gradients.regridded import halved, merged

F64 = torch.float64
ROUTES = [
    StepAdjoint(),
    InterpolatingAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
]


def tensor(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


def warned(value: Tensor) -> bool:
    """Take the gradient; whether anything was said of its accuracy."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value.backward()
    assert all(isinstance(w.message, GradientAccuracyWarning) for w in caught)
    return bool(caught)


@pytest.mark.parametrize("route", slow_after(2, ROUTES), ids=lambda route: type(route).__name__)
@pytest.mark.parametrize(
    ("size", "frequency", "rtol"),
    [
        *((size, 10.0, 1e-3) for size in (0.0, 1e-9, 1e-4, 1.0)),
        (0.0, 10.0, 1e-5),
        (0.0, 30.0, 1e-7),
    ],
)
def test_a_leaf_that_is_zero_is_judged(
    route: GradientRoute, size: float, frequency: float, rtol: float
) -> None:
    """A bias that begins at zero forces what the steps of the run do not see.

    x_2' = -x_2 + p cos(w t) is at rest for p = 0, so that x_1 alone chooses the steps; dx_2(T)/dp =
    (cos wT + w sin wT - exp(-T)) / (1 + w^2). On the steps as they are it is off by 39 % with
    w = 30 at rtol 1e-7.
    """
    p, w = tensor(size), frequency

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return torch.stack([-x[0], -x[1] + p * torch.cos(w * t)])

    result = stopping_time(
        flow,
        torch.tensor([1.0, 0.0], dtype=F64),
        lambda t, x: x[0],
        0.01,
        solver=Torchdiffeq(rtol=rtol),
        gradient=route,
    )
    assert isinstance(result.state, Tensor)
    said, time = warned(result.state[1]), math.log(100.0)
    exact = (math.cos(w * time) + w * math.sin(w * time) - math.exp(-time)) / (1 + w * w)
    assert p.grad is not None
    assert said or abs(float(p.grad) / exact - 1.0) <= 50 * rtol


def decaying(scale: Tensor, route: GradientRoute, rtol: float) -> StoppingResult:
    """x' = -c x: x_T does not depend on c, for c moves x along its path."""
    rates = torch.tensor([1.0, 3.0, 0.2], dtype=F64)
    return stopping_time(
        lambda t, x: -scale * rates * x,
        torch.tensor([1.0, -2.0, 0.5], dtype=F64),
        lambda t, x: x.square().sum(),
        0.05,
        solver=Torchdiffeq(rtol=rtol),
        gradient=route,
        max_time=1e9,
    )


@pytest.mark.parametrize("route", slow_after(2, ROUTES), ids=lambda route: type(route).__name__)
@pytest.mark.parametrize(("scale", "rtol"), [(1e-6, 1e-4), (1.0, 1e-4), (1.0, 1e-7), (1e5, 1e-4)])
def test_a_leaf_that_moves_along_the_path_is_not_accused(
    route: GradientRoute, scale: float, rtol: float
) -> None:
    c = tensor(scale)
    result = decaying(c, route, rtol)
    assert isinstance(result.state, Tensor)
    assert not warned((torch.tensor([1.0, 2.0, -1.0], dtype=F64) * result.state).sum())
    assert c.grad is not None
    assert abs(float(c.grad)) * scale <= 5 * rtol  # of |x| = 2.3


@pytest.mark.parametrize("route", slow_after(2, ROUTES), ids=lambda route: type(route).__name__)
@pytest.mark.parametrize("on_time", [True, False])
def test_a_leaf_without_effect_is_not_accused(route: GradientRoute, on_time: bool) -> None:
    """A pulse at t = 30, where the run ends before t = 2: its height and place do 1e-190."""
    place, height, rate = tensor(30.0), tensor(0.0), tensor(2.0)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -rate * x + (1.0 + height) * torch.exp(-((t - place) ** 2) / 2)

    result = stopping_time(
        flow, torch.ones(2, dtype=F64), lambda t, x: x.norm(), 0.05, gradient=route
    )
    assert isinstance(result.state, Tensor)
    assert not warned(result.time if on_time else result.state @ torch.tensor([1.0, 2.0]).double())
    assert place.grad is not None
    assert abs(float(place.grad)) < 1e-150


@pytest.mark.parametrize("rtol", [1e-4, 1e-8])
def test_the_target_is_met_on_other_steps(rtol: float) -> None:
    """J moves slowly in its own size, T does not: it has to be met in units of time.

    J = 1e3 + x_1^2 + x_2^2; what a relative 1e-9 of J leaves over, T feels as 1e-4.
    """
    result = stopping_time(
        lambda t, x: torch.stack([-x[0] + x[1], -x[1] - 20 * x[0]]),
        tensor([0.1, 0.1]),
        lambda t, x: 1e3 + x.square().sum(),
        1e3 + 1e-3,
        solver=Torchdiffeq(rtol=rtol),
        evidence="light",
    )
    problem = result.problem
    for chain in (merged(Chain.of(problem)), halved(Chain.of(problem))):
        assert chain is not None
        (other,) = chain.problems
        point = other.crossing
        late = abs((point.value - problem.target) / point.rate)
        rounding = 100 * point.rounding / abs(point.rate)
        assert late <= max(1e-3 * rtol * other.steps[-1].length, rounding)
