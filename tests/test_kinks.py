"""Kinks of the criterion at the crossing: the derivative of the run's side, and a warning."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ode_stopping import (
    AllOf,
    AnyOf,
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    KinkWarning,
    StepAdjoint,
    Torchdiffeq,
    stopping_time,
)

F64 = torch.float64
ROUTES = [
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
]


def leaf(value: Any) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


class Tie:
    """x_i' = -a_i x_i from (2, 4) with a = (1, 2): x_1 = x_2 = 1 at T = log 2, x_2 above before."""

    def __init__(self) -> None:
        self.a, self.x0 = leaf([1.0, 2.0]), leaf([2.0, 4.0])

    def solve(self, criterion: Callable[..., Any], **options: Any) -> tuple[Tensor, Tensor]:
        options.setdefault("gradient", StepAdjoint())
        with pytest.warns(KinkWarning, match=r"kink at t = 0\.6931"):
            result = stopping_time(lambda t, x: -self.a * x, self.x0, criterion, 1.0, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            a, x0 = torch.autograd.grad(result.time, [self.a, self.x0])
        return a, x0

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        """dT of the coordinate that the criterion follows: T = log(x_i(0))/a_i."""
        a, x0 = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
        rate, start = float(self.a.detach()[index]), float(self.x0.detach()[index])
        a[index], x0[index] = -math.log(start) / rate**2, 1 / (rate * start)
        return a, x0


KINKED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "max": (lambda t, x: x.max(), 1),
    "amax": (lambda t, x: x.amax(), 1),
    "maximum": (lambda t, x: torch.maximum(x[0], x[1]), 1),
    "min": (lambda t, x: x.min(), 0),
    "by an absolute value": (lambda t, x: 0.5 * (x[0] + x[1] + (x[0] - x[1]).abs()), 1),
    "by relu": (lambda t, x: x[0] + torch.relu(x[1] - x[0]), 1),
}


@pytest.mark.parametrize("name", KINKED)
@pytest.mark.parametrize("rtol", [1e-7, 1e-4])
def test_the_side_of_the_run(name: str, rtol: float) -> None:
    criterion, index = KINKED[name]
    tie = Tie()
    found = tie.solve(criterion, solver=Torchdiffeq(rtol=rtol), evidence="standard")
    for one, truth in zip(found, tie.of(index), strict=True):
        torch.testing.assert_close(one, truth, rtol=30 * rtol, atol=30 * rtol)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: type(route).__name__)
@pytest.mark.parametrize("evidence", ["light", "standard", "thorough"])
def test_every_route_takes_the_same_side(route: GradientRoute, evidence: Any) -> None:
    tie = Tie()
    found = tie.solve(KINKED["max"][0], gradient=route, evidence=evidence)
    for one, truth in zip(found, tie.of(1), strict=True):
        torch.testing.assert_close(one, truth, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(("kind", "index"), [(AnyOf, 0), (AllOf, 1)])
def test_criteria_that_are_met_at_once(kind: type, index: int) -> None:
    tie = Tie()
    members = [lambda t, x: x[0], lambda t, x: x[1]]
    found = tie.solve(kind(*members, targets=[1.0, 1.0]))
    for one, truth in zip(found, tie.of(index), strict=True):
        torch.testing.assert_close(one, truth, rtol=3e-6, atol=3e-6)


def test_a_parameter_of_the_criterion_on_an_exact_tie() -> None:
    """J = max(phi x, x) at phi = 1: torch would split the derivative in halves."""
    phi, x0 = leaf(1.0), leaf([2.0])
    with pytest.warns(KinkWarning):
        result = stopping_time(
            lambda t, x: -x, x0, lambda t, x: torch.maximum(phi * x[0], 3 * x[0] - 2.0), 1.0
        )
    result.time.backward()
    # Before T = log 2 it is 3 x - 2 that falls to the target: dT/dx0 = 1/x0, and nothing of phi.
    assert x0.grad is not None
    assert phi.grad is not None
    torch.testing.assert_close(float(x0.grad), 0.5, rtol=1e-5, atol=0)
    torch.testing.assert_close(float(phi.grad), 0.0, rtol=0, atol=1e-9)


def test_a_tie_all_along() -> None:
    """No side is smooth: what torch chooses is one of the generalised derivatives."""
    rate, x0 = leaf(1.0), leaf([2.0, 2.0])
    with pytest.warns(KinkWarning):
        result = stopping_time(lambda t, x: -rate * x, x0, lambda t, x: x.max(), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_rate, to_start = torch.autograd.grad(result.time, [rate, x0])
    torch.testing.assert_close(float(to_rate), -math.log(2.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(float(to_start.sum()), 0.5, rtol=1e-6, atol=0)
    assert bool((to_start >= 0).all())


SMOOTH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": lambda t, x: (x**2).sum() / 2,
    "steep": lambda t, x: (x**8).sum() / 2,
    "norm": lambda t, x: x.norm() / math.sqrt(2),
    "logsumexp": lambda t, x: torch.logsumexp(20 * x, 0) / 20 - math.log(2) / 20,
    "far from its kink": lambda t, x: torch.maximum(x[0], x[1] - 0.1),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-5, 1e-8])
def test_a_smooth_criterion_has_none(name: str, rtol: float) -> None:
    tie = Tie()
    with warnings.catch_warnings():
        warnings.simplefilter("error", KinkWarning)
        stopping_time(
            lambda t, x: -tie.a * x, tie.x0, SMOOTH[name], 1.0, solver=Torchdiffeq(rtol=rtol)
        )
