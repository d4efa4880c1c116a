"""Each figure of the evidence in a situation in which it alone exceeds the promise."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from ode_stopping import (
    DirectAdjoint,
    GradientAccuracyWarning,
    InterpolatingAdjoint,
    StepAdjoint,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.crossing.point import Crossing, lam_change

F64 = torch.float64


def leaf(value: Any) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


def judged(result: StoppingResult) -> set[str]:
    """The figures that exceed the promise after a backward pass of T."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientAccuracyWarning)
        result.time.backward()
    assert result.evidence is not None
    promise = result.evidence.promise
    return {name for name, value in result.evidence.figures.items() if value > promise}


def lorenz(rtol: float, gradient: Any, method: str = "dopri5") -> StoppingResult:
    """Lorenz's flow, whose errors grow by exp(0.9 t), and a J that hardly depends on the state."""

    def flow(t: Tensor, x: Tensor) -> Tensor:
        a, b, c = x.unbind()
        return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c])

    return stopping_time(
        flow,
        leaf([1.0, 1.0, 20.0]),
        lambda t, x: 10 - t + 5e-3 * x[0],
        0.0,
        solver=Torchdiffeq(method=method, rtol=rtol),
        gradient=gradient,
        evidence="light",
    )


@pytest.mark.parametrize("route", [StepAdjoint(), InterpolatingAdjoint()], ids=str)
def test_time_term(route: Any) -> None:
    """The error of T, from lam and the error estimates of the steps."""
    result = lorenz(1e-6, route)
    assert judged(result) == {"time_term"}
    assert result.stats.fallback is None
    truth = lorenz(1e-10, None, "dopri8")
    error = abs(float(result.time.detach()) - float(truth.time))
    assert result.evidence is not None
    assert result.evidence.time_error is not None
    # The estimates are those of the fourth-order formula: larger than the error, not smaller.
    assert error / 10 < result.evidence.time_error < 1e4 * error


def test_quadrature() -> None:
    """A backward solve that is looser than the promise: the embedded formula is a second one."""
    rate, w = leaf(1.0), leaf(0.3)
    result = stopping_time(
        lambda t, x: -rate * x * (1 + 0.5 * torch.sin(20 * t + w)),
        leaf([2.0, 1.0]),
        lambda t, x: (x**2).sum(),
        1e-2,
        solver=Torchdiffeq(rtol=1e-9),
        gradient=InterpolatingAdjoint(rtol=1e-4),
        evidence="light",
    )
    assert "quadrature" in judged(result)
    assert result.evidence is not None
    assert result.evidence.quadrature is not None
    assert 1e-7 < result.evidence.quadrature < 1e-3


@pytest.mark.parametrize("route", [StepAdjoint(), InterpolatingAdjoint()], ids=str)
def test_identity(route: Any) -> None:
    """A jump in time that nobody named: lam^T F jumps, int lam^T F_t does not know."""
    rate = leaf(1.0)
    result = stopping_time(
        lambda t, x: -rate * torch.where(t < 0.5, 1.0, 1.5) * x,
        leaf([2.0, 1.0]),
        lambda t, x: (x**2).sum(),
        1e-2,
        gradient=route,
        evidence="light",
    )
    assert judged(result) == {"identity"}


def test_clock() -> None:
    """T - t0 is short against T."""
    result = stopping_time(
        lambda t, x: -x,
        leaf([2.0]),
        lambda t, x: x.sum(),
        1.0,
        t0=1e11,
        max_time=1e11 + 10,
        solver=Torchdiffeq(rtol=1e-9),
        evidence="light",
    )
    assert judged(result) == {"clock"}


def test_second_route() -> None:
    """The derivative of steps over a kink of the flow, held against the continuous adjoint."""
    rate = leaf(1.0)
    result = stopping_time(
        lambda t, x: -rate * torch.where(x > 1, 1.0, 3.0) * x,
        leaf([3.0, 2.0]),
        lambda t, x: (x**2).sum(),
        1e-2,
        gradient=DirectAdjoint(),
        evidence="light",
    )
    assert {"second_route", "identity"} & judged(result)


def sphere(state: Tensor) -> tuple[Any, Crossing]:
    """x' = -x and J = |x|^2 at a state."""
    result = stopping_time(
        lambda t, x: -x, leaf([3.0, 1.0, 2.0]), lambda t, x: (x**2).sum(), 1.0, evidence="light"
    )
    assert result.problem is not None
    call = result.problem.call
    return call, Crossing.at(result.problem.criterion, 1.0, state, -state)


def test_noise_is_moved_back_to_the_level_set() -> None:
    """An error along F changes T and no direction; one across it turns lam by as much."""
    state = torch.tensor([0.6, 0.0, 0.8], dtype=F64)
    call, point = sphere(state)
    delta = 1e-4
    along, across = delta * state, delta * torch.tensor([0.0, 1.0, 0.0], dtype=F64)
    assert lam_change(call.flow, point, along) < 10 * delta**2
    assert lam_change(call.flow, point, across) == pytest.approx(delta, rel=1e-3)


@pytest.mark.parametrize("evidence", ["light", "standard"])
def test_refinement(evidence: Any) -> None:
    """Steps as long as the period of the rate: the path has no figure for each leaf."""
    rate, x0 = leaf(1.0), leaf([2.0])
    result = stopping_time(
        lambda t, x: -rate * x * (1 + 0.5 * torch.sin(30 * t)),
        x0,
        lambda t, x: x.sum(),
        2 * math.exp(-4.0),
        solver=Torchdiffeq(rtol=5e-4),
        gradient=InterpolatingAdjoint(),
        evidence=evidence,
    )
    assert ("refinement" in judged(result)) == (evidence == "standard")


@pytest.mark.parametrize("evidence", ["light", "standard"])
def test_an_epidemic_at_rest_is_not_accused(evidence: Any) -> None:
    """SIR until max |F| <= 1e-6, far down: within the promise, and nothing is said of it."""
    beta, gamma = leaf(0.5), leaf(0.2)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        infected, recovered = beta * x[0] * x[1], gamma * x[1]
        return torch.stack([-infected, infected - recovered, recovered])

    result = stopping_time(
        flow, leaf([0.99, 0.01, 0.0]), lambda t, x: flow(t, x).abs().max(), 1e-6, evidence=evidence
    )
    found = torch.autograd.grad(result.time, [beta, gamma])
    # dopri8 at rtol 1e-11
    for one, truth in zip(found, (-144.11973175668538, -84.34368781117877), strict=True):
        assert float(one) == pytest.approx(truth, rel=5e-6)
