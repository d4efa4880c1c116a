"""Derivatives that get lost in some steps of an iteration: one difference of the run sees them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_lost_derivatives import LOST, Tripled, leaf
from torch import Tensor

from discrete import (
    DiscreteAdjoint,
    Euler,
    Heun,
    RungeKutta4,
    SemiImplicitEuler,
    Truncated,
    Unrolled,
    stopping_index,
)
from ode_stopping import (
    ExponentialSchedule,
    GradientAccuracyWarning,
    HeavyBallFlow,
    LossValue,
    Quadratic,
    RescaledGradientFlow,
)

F64 = torch.float64
ROUTES = [DiscreteAdjoint(), DiscreteAdjoint(chunk=3), DiscreteAdjoint(memory=64), Unrolled()]


class Planted:
    """x - h D x with something lost of `what` in the steps from 5 to 8."""

    def __init__(self, what: str, lose: Callable[[Tensor], Tensor]) -> None:
        self.rate, self.x0 = leaf(0.1), leaf([2.0, 1.0])
        self.what, self.lose = what, lose

    def __call__(self, k: int, x: Tensor) -> Tensor:
        rate, inner = self.rate, x
        if 5 <= k < 9:
            rate = self.lose(rate) if self.what == "rate" else rate
            inner = self.lose(x) if self.what == "x" else x
        return x - rate * inner * torch.tensor([1.0, 2.0], dtype=F64)

    def solve(self, **options: Any) -> Any:
        return stopping_index(self, self.x0, lambda k, x: (x**2).sum(), 1e-2, **options)


@pytest.mark.parametrize("route", ROUTES, ids=str)
@pytest.mark.parametrize("what", ["rate", "x"])
@pytest.mark.parametrize("lose", LOST)
def test_what_is_lost_is_named(lose: str, what: str, route: Any) -> None:
    result = Planted(what, LOST[lose]).solve(gradient=route)
    name = "rate" if what == "rate" else "x0"
    with pytest.warns(GradientAccuracyWarning, match=rf"moving .*{name}.* a little changes x_28"):
        result.steps.backward()


@pytest.mark.parametrize("of", ["steps", "state"])
@pytest.mark.parametrize("interpolation", [None, "log"])
def test_of_every_output(of: str, interpolation: Any) -> None:
    result = Planted("rate", Tripled.apply).solve(interpolation=interpolation)
    value = result.steps if of == "steps" else result.state.sum()
    with pytest.warns(GradientAccuracyWarning, match="moving .*rate"):
        value.backward()


def test_light_does_not_look_and_a_truncated_sum_is_not_accused() -> None:
    for options in ({"evidence": "light"}, {"gradient": Truncated(steps=4)}):
        planted = Planted("rate", Tripled.apply)
        planted.x0.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            planted.solve(**options).steps.backward()


def test_unknown_evidence() -> None:
    with pytest.raises(ValueError, match="evidence must be"):
        Planted("rate", Tripled.apply).solve(evidence="full")


RULES = [Euler, Heun, RungeKutta4, SemiImplicitEuler]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("interpolation", [None, "log", "hermite", "partial_step"])
@pytest.mark.parametrize("kind", ["schedule", "heavy ball"])
def test_right_gradients_are_not_contradicted(rule: Any, interpolation: Any, kind: str) -> None:
    """A learned step moves the clock as well; K targets are walked part by part."""
    f = Quadratic(torch.nn.Parameter(torch.tensor([1.0, 3.0], dtype=F64)))
    flow: Any = RescaledGradientFlow(f, schedule=ExponentialSchedule(1.0, 0.3))
    if kind == "heavy ball":
        flow = HeavyBallFlow(f, damping=1.5)
    step, x0 = leaf(0.05), leaf([2.0, -1.0])
    state = flow.initial_state(x0)
    targets = torch.tensor([1.0, 0.3], dtype=F64)
    result = stopping_index(
        rule(flow, step=step),
        state,
        LossValue(f),
        targets,
        t0=leaf(0.1),
        interpolation=interpolation,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.steps.sum().backward()
    assert step.grad is not None


def test_single_precision() -> None:
    rate = torch.tensor(0.1, requires_grad=True)
    x0 = torch.tensor([2.0, 1.0], requires_grad=True)
    result = stopping_index(lambda k, x: x - rate * x, x0, lambda k, x: (x**2).sum(), 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.steps.backward()
