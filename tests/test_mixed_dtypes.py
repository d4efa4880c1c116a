"""Parameters of another dtype than the state; what cannot be differentiated is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discrete import DiscreteAdjoint, Euler, Unrolled, stopping_index
from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    MissingGradientError,
    StepAdjoint,
    Torchdiffeq,
    stopping_time,
)

ROUTES = [
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
]
HALF = (torch.float16, torch.bfloat16)
F32, F64 = torch.float32, torch.float64


def square(t: Tensor, x: Tensor) -> Tensor:
    return (x * x).sum()


def rounding(*types: torch.dtype) -> float:
    return max(torch.finfo(dtype).eps for dtype in types)


# autograd adds up the graph of DirectAdjoint in the parameter's own type, and the warning is right.
@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize("value", [2.0, 1.3, 0.7, 0.1])
@pytest.mark.parametrize("dtype", [F32, *HALF], ids=str)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: type(route).__name__)
def test_a_number_of_lower_precision(
    route: GradientRoute, dtype: torch.dtype, value: float
) -> None:
    """x' = -a x from ones(2) to |x|^2 = 0.1: T = log(20)/(2 a), dT/da = -T/a."""
    a = torch.tensor(value, dtype=dtype, requires_grad=True)
    x0 = torch.ones(2, dtype=F64)
    result = stopping_time(lambda t, x: -a * x, x0, square, 0.1, gradient=route)
    (gradient,) = torch.autograd.grad(result.time, a)
    seen = float(a.detach())
    assert float(result.time.detach()) == pytest.approx(math.log(20) / 2 / seen, rel=1e-5)
    assert gradient.dtype == dtype
    truth = -math.log(20) / 2 / seen**2
    assert gradient.item() == pytest.approx(truth, rel=max(8 * rounding(dtype), 1e-6))


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: type(route).__name__)
def test_a_number_of_higher_precision(route: GradientRoute) -> None:
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    result = stopping_time(lambda t, x: -a * x, torch.ones(2), square, 0.1, gradient=route)
    (gradient,) = torch.autograd.grad(result.time, a)
    assert gradient.dtype == F64
    assert gradient.item() == pytest.approx(-0.374466538, rel=1e-3)


@pytest.mark.parametrize("dtype", [F32, *HALF], ids=str)
@pytest.mark.parametrize(
    "route", [DiscreteAdjoint(), DiscreteAdjoint(chunk=4), Unrolled()], ids=str
)
def test_an_index(route: Any, dtype: torch.dtype) -> None:
    """x_k = (1 - h a)^k: Definition 3 is -J_a / (J_N - J_{N-1})."""
    a = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    rule = Euler(lambda t, x: -a * x, step=0.01)
    result = stopping_index(rule, torch.ones(2, dtype=F64), square, 0.1, gradient=route)
    (gradient,) = torch.autograd.grad(result.steps, a)
    n, factor = result.index, 0.98
    drop = 2 * factor ** (2 * n) - 2 * factor ** (2 * n - 2)
    truth = -2 * 2 * n * factor ** (2 * n - 1) * -0.01 / drop
    assert gradient.dtype == dtype
    assert gradient.item() == pytest.approx(truth, rel=max(8 * rounding(dtype), 1e-6))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_network_that_computes_in_half_precision(dtype: torch.dtype) -> None:
    """Its rounding is no missing derivative; a derivative that is missing is seen still."""
    inner = nn.Linear(2, 2, dtype=dtype)
    with torch.no_grad():
        inner.weight.copy_(torch.tensor([[1.0, 0.25], [0.0, 0.5]]))
        inner.bias.zero_()
    x0 = torch.ones(2, dtype=F32)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -x - 0.1 * inner(x.to(dtype)).to(x.dtype)

    result = stopping_time(flow, x0, square, 0.5, gradient=None)
    assert 0.3 < float(result.time) < 1.0

    def lost(t: Tensor, x: Tensor) -> Tensor:
        return -inner(x.to(dtype).detach()).to(x.dtype)

    if dtype is torch.bfloat16:  # eight bits are too few for a difference that would tell
        return
    x1 = torch.ones(2, dtype=F64, requires_grad=True)
    with pytest.raises(MissingGradientError):
        stopping_time(lost, x1, square, 0.5, solver=Torchdiffeq(rtol=1e-2))


def test_a_complex_parameter_is_refused_by_name() -> None:
    c = torch.tensor(0.3 + 0.4j, dtype=torch.complex128, requires_grad=True)
    x0 = torch.tensor([2.0], dtype=F64)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -c.abs() * x

    with pytest.raises(TypeError, match="complex128 that requires grad is used"):
        stopping_time(flow, x0, lambda t, x: x.sum(), 0.5)
    with pytest.raises(TypeError, match="complex128 that requires grad is used"):
        stopping_index(Euler(flow, step=0.1), x0, lambda t, x: x.sum(), 0.5)
    with torch.no_grad():
        time = stopping_time(flow, x0, lambda t, x: x.sum(), 0.5).time
    assert float(time) == pytest.approx(math.log(4) / 0.5, rel=1e-6)


def test_a_real_tensor_behind_a_complex_one_is_fine() -> None:
    parts = torch.tensor([0.3, 0.4], dtype=F64, requires_grad=True)
    result = stopping_time(
        lambda t, x: -torch.view_as_complex(parts).abs() * x,
        torch.tensor([2.0], dtype=F64),
        lambda t, x: x.sum(),
        0.5,
    )
    (gradient,) = torch.autograd.grad(result.time, parts)
    # T = log(4)/|c|
    truth = [-math.log(4) / 0.25 * share for share in (0.6, 0.8)]
    assert gradient.tolist() == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_network_of_another_dtype_is_named_at_entry(wrapped: bool) -> None:
    net = nn.Linear(2, 2)
    flow = (lambda t, x: -net(x)) if wrapped else _Module(net)
    words = r"mixes dtypes: the state is torch.float64, and \S*net.weight is torch.float32"
    x0 = torch.ones(2, dtype=F64)
    with pytest.raises(TypeError, match=words):
        stopping_time(flow, x0, square, 0.1)
    with pytest.raises(TypeError, match="mixes dtypes"):
        stopping_index(Euler(flow, step=0.1), x0, square, 0.1)


class _Module(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Tensor, x: Tensor) -> Any:
        return -self.net(x)


def test_hooks_are_named() -> None:
    p = torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    p.register_hook(lambda g: 2 * g)
    x0 = torch.ones(2, dtype=F64)
    with pytest.raises(MissingGradientError, match=r"A hook on a tensor or a module"):
        stopping_time(lambda t, x: -p * x, x0, square, 0.1)
    net = nn.Linear(2, 2).double()
    net.register_full_backward_hook(lambda module, given, out: tuple(2 * g for g in given))
    with pytest.raises(MissingGradientError, match=r"A hook on a tensor or a module"):
        stopping_time(lambda t, x: -x - 0.1 * torch.tanh(net(x)), x0, square, 0.1)


def test_a_hook_that_only_looks_is_fine() -> None:
    p = torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    seen: list[Tensor] = []
    p.register_hook(lambda g: seen.append(g))
    result = stopping_time(lambda t, x: -p * x, torch.ones(2, dtype=F64), square, 0.1)
    result.time.backward()
    assert seen
    assert p.grad is not None
