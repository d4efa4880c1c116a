"""Flows that call `autograd.grad` inside, and autograd modes around the call, on the discrete side.

x_i' = -2 a_i x_i: a step of a method with the stability function R multiplies x_i by R(-2 a_i h),
so N and every definition of the index have closed forms.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from iterations import number
from torch import Tensor

from discrete import (
    DiscreteAdjoint,
    Euler,
    Heun,
    IndexRoute,
    RungeKutta4,
    SemiImplicitEuler,
    Truncated,
    Unrolled,
    UpdateRule,
    stopping_index,
)
from ode_stopping import MissingGradientError, stopping_time

RULES: dict[type[UpdateRule], Any] = {
    Euler: lambda z: 1 + z,
    Heun: lambda z: 1 + z + z**2 / 2,
    RungeKutta4: lambda z: 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24,
    SemiImplicitEuler: lambda z: 1 + z,
}
STEP = 0.01


def square(t: Tensor, x: Tensor) -> Tensor:
    return x.square().sum()


def closed_form(rule: type[UpdateRule], interpolation: str | None) -> tuple[int, Tensor]:
    """N and dN/da from x0 = (1, 1), a = (1, 2) to |x|^2 = 1e-2, in float64."""
    factor, a = RULES[rule], number([1.0, 2.0])

    def loss(k: int, s: Tensor | float = 1.0) -> Tensor:
        """J where the last of k steps is shortened to s h."""
        z = -2 * a * STEP
        return (factor(z) ** (k - 1) * factor(s * z)).square().sum()

    n = next(k for k in range(1, 1000) if float(loss(k).detach()) <= 1e-2)
    before, after = loss(n - 1), loss(n)
    if interpolation is None:
        value = -after / (after - before).detach()
    elif interpolation == "log":
        value = (before.log() - number(1e-2).log()) / (before.log() - after.log())
    else:
        s = number(1.0)
        for _ in range(60):
            (slope,) = torch.autograd.grad(loss(n, s), s)
            s = number(float((s - (loss(n, s) - 1e-2) / slope).detach()))
        (slope,) = torch.autograd.grad(loss(n, s), s)
        value = -loss(n, s.detach()) / slope
    return n, torch.autograd.grad(value, a)[0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("interpolation", "dtype"),
    [
        (None, torch.float32),
        ("log", torch.float32),
        ("partial_step", torch.float32),
        ("hermite", torch.float32),
        ("partial_step", torch.float64),
    ],
)
@pytest.mark.parametrize(
    "route", [DiscreteAdjoint(), DiscreteAdjoint(chunk=7), Unrolled(), Truncated(steps=500)]
)
def test_gradient_by_autograd_inside(
    rule: type[UpdateRule], interpolation: Any, route: IndexRoute, dtype: torch.dtype
) -> None:
    a = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad((a * x**2).sum(), x, create_graph=True)
        return -gradient

    result = stopping_index(
        rule(flow, step=STEP),
        torch.ones(2, dtype=dtype),
        square,
        1e-2,
        interpolation=interpolation,
        gradient=route,
    )
    # The cubic through J and J' at both ends: the road of order 3, here 1 % from the log-linear.
    near = {"hermite": "log"}.get(interpolation, interpolation)
    n, expected = closed_form(rule, near)
    (found,) = torch.autograd.grad(result.steps, a)
    allowed = 1e-3 if interpolation == "hermite" else 1e-10 if dtype is torch.float64 else 1e-5
    assert result.index == n
    torch.testing.assert_close(found.double(), expected, rtol=allowed, atol=0)


def test_the_numbers_of_the_report() -> None:
    """Written down by hand once, so that the closed forms above are not alone."""
    expected = {
        None: [-111.827, -0.99515],
        "log": [-113.307, -1.04238],
        "partial_step": [-114.001, -1.04880],
    }
    for interpolation, numbers in expected.items():
        n, found = closed_form(Euler, interpolation)
        assert n == 115
        assert found.tolist() == pytest.approx(numbers, rel=1e-5)


def by_autograd(t: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(x.square().sum() / 2, x, create_graph=True)
    return -gradient


@pytest.mark.parametrize("interpolation", [None, "log", "hermite", "partial_step"])
@pytest.mark.parametrize("flow", [lambda t, x: -x, by_autograd])
def test_inference_mode(flow: Any, interpolation: Any) -> None:
    def steps(x: Tensor, h: Any, eps: Any, t0: Any) -> float:
        return stopping_index(
            Euler(flow, step=h), x, square, eps, t0=t0, interpolation=interpolation
        ).steps.item()

    plain = steps(torch.ones(2, dtype=torch.float64), 0.1, 0.1, 0.0)
    with torch.inference_mode():
        inside = [torch.tensor(value, dtype=torch.float64) for value in ([1.0, 1.0], 0.1, 0.1, 0.0)]
        assert steps(*inside) == plain
        result = stopping_index(lambda k, s: (0.9 * s[0],), (inside[0],), _first, inside[2])
        assert result.index == 15
    # Tensors from there, after it has ended.
    assert steps(*inside) == plain


def _first(t: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    return square(t, state[0])


def test_a_start_from_inference_mode_has_gradients_to_all_else() -> None:
    with torch.inference_mode():
        x0 = torch.ones(2, dtype=torch.float64)
    a = number(1.0)
    index = stopping_index(
        Euler(lambda t, x: -a * x, step=0.1), x0, square, 0.1, interpolation="log"
    )
    index.steps.backward()
    # (1 - a/10)^(2 N*) = 0.05, so dN*/da = N* / (10 (1 - a/10) log(1 - a/10)) at a = 1
    q = torch.tensor(0.9, dtype=torch.float64)
    assert a.grad is not None
    expected = index.steps.item() / float(10 * q * q.log())
    assert a.grad.item() == pytest.approx(expected, rel=1e-9)
    a.grad = None
    time = stopping_time(lambda t, x: -a * x, x0, square, 0.1).time
    time.backward()
    assert a.grad.item() == pytest.approx(-time.item(), rel=1e-6)


def test_an_update_that_works_in_inference_mode_itself() -> None:
    """Its values serve; its derivatives are missing, and that is said."""
    a = number(1.0)

    def update(k: int, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return x - 0.1 * a * x

    x0 = torch.ones(2, dtype=torch.float64)
    assert stopping_index(update, x0, square, 0.1, gradient=None).index == 15
    with pytest.raises(MissingGradientError, match="update"):
        stopping_index(update, x0.requires_grad_(True), square, 0.1)
