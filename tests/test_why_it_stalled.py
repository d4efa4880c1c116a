"""Runs that do not get through say why: a criterion that jumps, a flow that is stiff."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ode_stopping import StalledError, Status, Torchdiffeq, stopping_time
from ode_stopping.core.states import StateLayout
from ode_stopping.crossing.stiffness import fastest_rate
from ode_stopping.solving.flow_map import FlowMap

F64 = torch.float64
START = torch.tensor([1.0, 2.0], dtype=F64)

# On x' = -x the sum of x is 3 exp(-t): J, target and T.
PASSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float]] = {
    "down in t": (lambda t, x: x.sum() - 0.5 * (t > 1.0), 0.2, math.log(3 / 0.7)),
    "up in t": (lambda t, x: x.sum() + 0.5 * (t > 1.0), 0.6, math.log(3 / 0.1)),
    "down in x": (
        lambda t, x: x.sum() + 0.1 * (x.sum() > 0.5),
        0.1,
        math.log(3 / 0.1),
    ),
    "up in x": (lambda t, x: x.sum() + 0.1 * (x.sum() <= 0.5), 0.15, math.log(3 / 0.05)),
}


@pytest.mark.parametrize("case", PASSED)
@pytest.mark.parametrize("rtol", [1e-4, 1e-9])
def test_a_jump_of_the_criterion_on_the_way_is_passed(case: str, rtol: float) -> None:
    criterion, target, end = PASSED[case]
    x0 = START.clone().requires_grad_()
    result = stopping_time(lambda t, x: -x, x0, criterion, target, solver=Torchdiffeq(rtol=rtol))
    assert result.status is Status.REACHED
    assert float(result.time.detach()) == pytest.approx(end, rel=10 * rtol)
    (gradient,) = torch.autograd.grad(result.time, x0)
    # T = log(sum x0/eps') with eps' the sum at T.
    assert gradient.tolist() == pytest.approx([1 / 3, 1 / 3], rel=100 * rtol)


OVER: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, float]] = {
    "in t": (lambda t, x: x.sum() - 1.0 * (t > 1.0), 0.5, 1.0),
    "in x": (lambda t, x: x.sum() + 1.0 * (x.sum() > 0.5), 0.9, math.log(6.0)),
}


@pytest.mark.parametrize("case", OVER)
def test_a_jump_over_the_target_is_degenerate(case: str) -> None:
    criterion, target, end = OVER[case]
    result = stopping_time(lambda t, x: -x, START, criterion, target, throw=False)
    assert result.status is Status.DEGENERATE
    assert "J jumps over the target" in result.note
    assert float(result.time) == pytest.approx(end, rel=1e-6)


def robertson(t: Tensor, y: Tensor) -> Tensor:
    """Three reactions with rates from 0.04 to 3e7."""
    slow = -0.04 * y[0] + 1e4 * y[1] * y[2]
    fast = 3e7 * y[1] ** 2
    return torch.stack([slow, -slow - fast, fast])


def test_a_stiff_flow_is_called_stiff() -> None:
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    with pytest.raises(StalledError, match=r"the flow is stiff: its fastest rate is about 2\.\d+e"):
        stopping_time(robertson, y0, lambda t, y: y[0], 0.3, solver=Torchdiffeq(max_steps=800))


def test_a_long_run_is_not() -> None:
    """An oscillation takes its steps for its accuracy."""
    with pytest.raises(StalledError) as caught:
        stopping_time(
            lambda t, x: torch.stack([x[1], -x[0]]),
            torch.tensor([1.0, 0.0], dtype=F64),
            lambda t, x: x.square().sum(),
            0.5,
            solver=Torchdiffeq(rtol=1e-9, max_steps=300),
        )
    assert "step limit of 300" in str(caught.value)
    assert "stiff" not in str(caught.value)


@pytest.mark.parametrize("spread", [0.0, 6.0])
def test_the_fastest_rate(spread: float) -> None:
    """Of x' = A x: the spectral radius, whatever the units of the entries."""
    units = torch.logspace(0, spread, 3, dtype=F64)
    matrix = torch.tensor([[-2.0, 1.0, 0.0], [0.0, -40.0, 3.0], [1.0, 0.0, -5.0]], dtype=F64)
    scaled = units[:, None] * matrix / units
    x = units * torch.tensor([1.0, -0.5, 0.7], dtype=F64)
    flow = FlowMap(lambda t, y: scaled @ y, StateLayout.of(x), x, times=(0.0, 1.0))
    radius = float(torch.linalg.eigvals(matrix).abs().max())
    assert fastest_rate(flow, 0.0, x) == pytest.approx(radius, rel=1e-2)


def test_the_rate_of_an_oscillation() -> None:
    """A complex pair, +-7i."""
    x = torch.tensor([1.0, 0.3], dtype=F64)
    flow = FlowMap(
        lambda t, y: torch.stack([7.0 * y[1], -7.0 * y[0]]), StateLayout.of(x), x, times=(0.0, 1.0)
    )
    assert fastest_rate(flow, 0.0, x) == pytest.approx(7.0, rel=0.3)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_the_rate_where_the_flow_is_constant_or_not_finite(value: float) -> None:
    x = torch.ones(2, dtype=F64)
    flow = FlowMap(lambda t, y: y * 0 + value, StateLayout.of(x), x, times=(0.0, 1.0))
    assert fastest_rate(flow, 0.0, x) == 0.0
