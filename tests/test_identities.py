"""Exact identities along the path, and finite differences that fall fourfold."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ode_stopping import (
    BacksolveAdjoint,
    GradientRoute,
    InterpolatingAdjoint,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.gradients import PullBack
from ode_stopping.gradients.problem import StoppingProblem
from ode_stopping.gradients.quotient import cotangent_at_crossing

THETA = 0.8
X0 = torch.tensor([1.2, -0.7], dtype=torch.float64)


def autonomous(theta: Tensor | float) -> Callable[[Tensor, Tensor], Tensor]:
    coupling = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    return lambda t, x: -theta * (coupling @ x) - x**3


def scheduled(theta: Tensor | float) -> Callable[[Tensor, Tensor], Tensor]:
    flow = autonomous(theta)
    return lambda t, x: torch.exp(-0.3 * t) * flow(t, x) + 0.02 * torch.sin(3 * t)


def energy(t: Tensor, x: Tensor) -> Tensor:
    return x[0] ** 2 + 2 * x[1] ** 2


def solved(
    flow: Callable[[Tensor, Tensor], Tensor], rtol: float = 1e-9, method: str = "dopri5"
) -> StoppingResult:
    return stopping_time(
        flow,
        X0.clone().requires_grad_(),
        energy,
        0.05,
        t0=0.2,
        solver=Torchdiffeq(method=method, rtol=rtol, atol=0.01 * rtol),
    )


def adjoint(problem: StoppingProblem, **options: object) -> tuple[PullBack, Tensor]:
    """The pull-back of a unit cotangent on T, and lam(T)."""
    zero = torch.zeros_like(problem.x0)
    lam, _ = cotangent_at_crossing(problem.crossing, torch.ones((), dtype=torch.float64), zero)
    return InterpolatingAdjoint().solve(problem, lam, **options), lam  # type: ignore[arg-type]


def test_adjoint_along_the_velocity_is_minus_one() -> None:
    problem = solved(autonomous(THETA)).problem
    assert problem is not None
    times = torch.linspace(problem.start, problem.end, 23, dtype=torch.float64).tolist()
    pulled, _ = adjoint(problem, times=times)
    assert pulled.samples is not None
    for t, lam in zip(times, pulled.samples, strict=True):
        velocity = problem.flow.plain(t, problem.trajectory.flat(t))
        assert float(lam @ velocity) == pytest.approx(-1.0, abs=1e-7)


def test_adjoint_along_the_velocity_is_not_minus_one_for_a_schedule() -> None:
    """Were the identity to hold here, too, the test above would prove nothing."""
    problem = solved(scheduled(THETA)).problem
    assert problem is not None
    pulled, _ = adjoint(problem)
    assert abs(float(pulled.start @ problem.flow.plain(problem.start, problem.x0)) + 1) > 1e-2


@pytest.mark.parametrize("flow", [autonomous, scheduled])
@pytest.mark.parametrize(
    "route", [InterpolatingAdjoint(), BacksolveAdjoint()], ids=["kept", "back"]
)
def test_both_forms_of_the_start_time_derivative(
    flow: Callable[[float], Callable[[Tensor, Tensor], Tensor]], route: GradientRoute
) -> None:
    problem = solved(flow(THETA)).problem
    assert problem is not None
    _, lam = adjoint(problem)
    pulled = route.pull_back(problem, lam)
    crossing = problem.crossing
    first = -float(pulled.start @ problem.flow.plain(problem.start, problem.x0))
    assert pulled.time is not None
    second = float(crossing.gradient @ crossing.velocity) / crossing.rate + pulled.time
    assert first == pytest.approx(second, rel=1e-7)


@pytest.mark.parametrize("flow", [autonomous, scheduled])
def test_finite_differences_fall_fourfold(
    flow: Callable[[Tensor | float], Callable[[Tensor, Tensor], Tensor]],
) -> None:
    theta = torch.tensor(THETA, dtype=torch.float64, requires_grad=True)
    result = solved(flow(theta), 1e-12, "dopri8")
    result.time.backward()
    assert theta.grad is not None

    def difference(h: float) -> float:
        up, down = (solved(flow(THETA + s), 1e-12, "dopri8").time.item() for s in (h, -h))
        return (up - down) / (2 * h)

    errors = [abs(difference(h) - theta.grad.item()) for h in (0.01, 0.005, 0.0025)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(4.0, rel=0.1)
