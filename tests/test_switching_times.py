"""Breakpoints that require grad: dL/db = lam(b)^T (F(b-) - F(b+)), on every route."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    KinkWarning,
    Piece,
    PullBack,
    StepAdjoint,
    StoppingWarning,
    Torchdiffeq,
    stopping_time,
)

F64 = torch.float64
ROUTES = [
    StepAdjoint(),
    StepAdjoint(chunk=1),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
]
ids = {"ids": lambda route: repr(route)}


def tensor(value: Any, *, grad: bool = True) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=grad)


class Switched:
    """x' = -a x before the switch b, -c x after it, J = |x|^2: with s = log(x0^2/eps)/2,

    T = b + (s - a b)/c, so dT/db = 1 - a/c, dT/da = -b/c, dT/dc = -(s - a b)/c^2.
    """

    def __init__(self, switch: float = 0.7) -> None:
        self.a, self.c = tensor(1.0), tensor(0.25)
        self.switch, self.x0 = tensor(switch), tensor([2.0])

    def solve(self, target: Any, route: GradientRoute, **options: Any) -> Any:
        return stopping_time(
            lambda t, x: -torch.where(t < self.switch.detach(), self.a, self.c) * x,
            self.x0,
            lambda t, x: (x * x).sum(),
            target,
            gradient=route,
            solver=Torchdiffeq(rtol=1e-9),
            breakpoints=[self.switch],
            **options,
        )

    def truth(self, target: float) -> tuple[float, float, float]:
        a, c, b = (float(p.detach()) for p in (self.a, self.c, self.switch))
        s = math.log(4.0 / target) / 2
        return 1 - a / c, -b / c, -(s - a * b) / c**2


@pytest.mark.parametrize("route", ROUTES, **ids)
@pytest.mark.parametrize("evidence", ["light", "standard"])
def test_the_closed_form(route: GradientRoute, evidence: str) -> None:
    problem = Switched()
    result = problem.solve(0.1, route, evidence=evidence)
    found = torch.autograd.grad(result.time, [problem.switch, problem.a, problem.c])
    for gradient, truth in zip(found, problem.truth(0.1), strict=True):
        assert gradient.item() == pytest.approx(truth, rel=1e-7)


@pytest.mark.parametrize("route", ROUTES, **ids)
def test_several_targets(route: GradientRoute) -> None:
    """One is met before the switch, where the derivative to it is zero."""
    problem = Switched()
    targets = [3.0, 0.5, 0.1]
    result = problem.solve(tensor(targets), route)
    weights = tensor([1.0, -2.0, 0.5], grad=False)
    (gradient,) = torch.autograd.grad(weights @ result.time, problem.switch)
    truth = -2.0 * problem.truth(0.5)[0] + 0.5 * problem.truth(0.1)[0]
    assert gradient.item() == pytest.approx(truth, rel=1e-7)


# T does not depend on b: the error of DirectAdjoint's stretched steps is compared with zero.
@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize("route", ROUTES, **ids)
def test_the_state(route: GradientRoute) -> None:
    """x_T lies on the level set whatever the switch; the second entry moves with T - b alone."""
    a, b = tensor(1.0), tensor(0.5)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        late = (t > b.detach()).to(F64)
        return torch.stack([-a * x[0], late])

    result = stopping_time(
        flow,
        tensor([1.0, 0.0], grad=False),
        lambda t, x: x[0],
        0.1,
        gradient=route,
        breakpoints=[b],
        solver=Torchdiffeq(rtol=1e-8),
    )
    # x_2(T) = T - b, and T = log(10)/a does not depend on b.
    found = torch.autograd.grad(result.state[1], [b, a])
    assert found[0].item() == pytest.approx(-1.0, rel=1e-7)
    assert found[1].item() == pytest.approx(-math.log(10.0), rel=1e-6)


@pytest.mark.parametrize("route", ROUTES, **ids)
def test_a_switch_that_the_flow_uses_as_well(route: GradientRoute) -> None:
    """x' = -(c + d (t - b)) x after b: both terms add.

    With u = T - b: a b + c u + d u^2/2 = log(1/eps), so dT/db = 1 - (a - ...)/(c + d u) with
    du/db = -a/(c + d u).
    """
    a, c, d, b = tensor(1.0), tensor(0.3), tensor(0.2), tensor(0.8)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -torch.where(t < b.detach(), a, c + d * (t - b)) * x

    result = stopping_time(
        flow,
        tensor([1.0], grad=False),
        lambda t, x: x.sum(),
        0.05,
        gradient=route,
        breakpoints=[b],
        solver=Torchdiffeq(rtol=1e-9),
    )
    (gradient,) = torch.autograd.grad(result.time, b)
    left = math.log(20.0) - 0.8
    u = (-0.3 + math.sqrt(0.09 + 0.4 * left)) / 0.2
    assert float(result.time.detach()) == pytest.approx(0.8 + u, rel=1e-8)
    assert gradient.item() == pytest.approx(1 - 1.0 / (0.3 + 0.2 * u), abs=1e-8)


@pytest.mark.parametrize("route", ROUTES, **ids)
def test_one_tensor_of_several(route: GradientRoute) -> None:
    """Rates 1, 2, 0.5 between two learned switches: T = log(1/eps)/r_2 + ..., linear in both."""
    switches = tensor([0.4, 0.9])
    rates = [1.0, 2.0, 0.5]

    def flow(t: Tensor, x: Tensor) -> Tensor:
        first, second = switches.detach()
        rate = torch.where(t < first, rates[0], torch.where(t < second, rates[1], rates[2]))
        return -rate * x

    result = stopping_time(
        flow,
        tensor([1.0]),
        lambda t, x: x.sum(),
        0.05,
        gradient=route,
        breakpoints=switches,
        solver=Torchdiffeq(rtol=1e-9),
    )
    (gradient,) = torch.autograd.grad(result.time, switches)
    # r_2 (T - b_2) = s - r_0 b_1 - r_1 (b_2 - b_1)
    truth = [(rates[1] - rates[0]) / rates[2], 1 - rates[1] / rates[2]]
    assert gradient.tolist() == pytest.approx(truth, rel=1e-7)


def test_second_derivatives() -> None:
    """d2T/(db dc) = a/c^2 by DirectAdjoint."""
    problem = Switched()
    result = problem.solve(0.1, DirectAdjoint())
    (first,) = torch.autograd.grad(result.time, problem.switch, create_graph=True)
    (second,) = torch.autograd.grad(first, problem.c)
    assert second.item() == pytest.approx(1.0 / 0.25**2, rel=1e-6)


@pytest.mark.parametrize("route", ROUTES, **ids)
def test_a_switch_that_does_not_matter(route: GradientRoute) -> None:
    """Before t0 and after T: zero, and not None."""
    before, after = tensor(-1.0), tensor(50.0)
    x0 = tensor([1.0])
    result = stopping_time(
        lambda t, x: -x, x0, lambda t, x: x.sum(), 0.5, gradient=route, breakpoints=(before, after)
    )
    assert [g.item() for g in torch.autograd.grad(result.time, [before, after])] == [0.0, 0.0]


def test_at_the_start() -> None:
    """One-sided, and said so."""
    b = tensor(0.0)
    with pytest.warns(KinkWarning, match="falls on the start"):
        result = stopping_time(
            lambda t, x: -x, tensor([1.0]), lambda t, x: x.sum(), 0.5, breakpoints=[b]
        )
    assert torch.autograd.grad(result.time, b)[0].item() == 0.0


def test_at_the_end() -> None:
    """T = 1 exactly, where x' = -1; the flow stops there in any case."""
    b = tensor(1.0)

    def solve() -> Any:
        return stopping_time(
            lambda t, x: -torch.ones_like(x),
            tensor([2.0]),
            lambda t, x: x.sum(),
            1.0,
            breakpoints=[b],
        )

    with pytest.warns(StoppingWarning, match="breakpoint 1") as caught:
        result = solve()
    assert KinkWarning in [one.category for one in caught]
    assert float(result.time.detach()) == 1.0
    assert torch.autograd.grad(result.time, b)[0].item() == 0.0


def test_a_miss_and_a_start_on_the_target() -> None:
    b = tensor(0.3)
    options: dict[str, Any] = {"breakpoints": [b], "max_time": 1.0}
    start = stopping_time(lambda t, x: -x, tensor([1.0]), lambda t, x: x.sum(), 2.0, **options)
    assert torch.autograd.grad(start.time, b)[0].item() == 0.0
    censored = stopping_time(
        lambda t, x: -x, tensor([1.0]), lambda t, x: x.sum(), 1e-9, censored=5.0, **options
    )
    assert torch.autograd.grad(censored.time, b)[0].item() == 0.0


def test_in_single_precision() -> None:
    """The gradient comes in the breakpoint's own dtype."""
    b = torch.tensor(0.7, requires_grad=True)
    x0 = torch.tensor([2.0])
    result = stopping_time(
        lambda t, x: -torch.where(t < b.detach(), 1.0, 0.25) * x,
        x0,
        lambda t, x: (x * x).sum(),
        0.1,
        breakpoints=[b],
    )
    (gradient,) = torch.autograd.grad(result.time, b)
    assert gradient.dtype == torch.float32
    assert gradient.item() == pytest.approx(-3.0, rel=1e-3)


class Plain(GradientRoute):
    """A stranger's, which knows nothing of switches: it is walked piece by piece."""

    def pull_back(self, piece: Piece, cotangent: Tensor) -> PullBack:
        return InterpolatingAdjoint().pull_back(piece, cotangent)


def test_a_route_of_ones_own() -> None:
    problem = Switched()
    result = problem.solve(0.1, Plain())
    (gradient,) = torch.autograd.grad(result.time, problem.switch)
    assert gradient.item() == pytest.approx(problem.truth(0.1)[0], rel=1e-7)
    assert result.evidence.second_route < 1e-7


def test_training_a_switching_time() -> None:
    """Two gears, c x^2 and d x: the fastest stop changes where both are as fast, at x = d/c."""
    c, d = 1.0, 0.5
    b = tensor(0.2)
    optimizer = torch.optim.SGD([b], lr=0.5)
    for _ in range(60):
        optimizer.zero_grad()
        result = stopping_time(
            lambda t, x: -torch.where(t < b.detach(), c * x * x, d * x),
            tensor([4.0], grad=False),
            lambda t, x: x.sum(),
            1e-2,
            breakpoints=[b],
            evidence="light",
        )
        result.time.backward()
        optimizer.step()
    # x = 1/(1/4 + c t) until x = d/c.
    assert float(b.detach()) == pytest.approx(1 / 0.5 - 1 / 4, abs=1e-3)
