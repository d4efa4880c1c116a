"""Leaves that are so small that a share of themselves does not show: no derivative hides there."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from planted import scaled_gradient
from test_lost_derivatives import F64, LOST, leaf
from torch import Tensor
from variants import slow_after

from discrete import Unrolled, check_index_gradient, stopping_index
from ode_stopping import (
    GradientAccuracyWarning,
    InterpolatingAdjoint,
    MissingGradientError,
    StepAdjoint,
    check_gradient,
    check_stopping_gradient,
    stopping_time,
)

SIZES = [0.0, 1e-300, 1e-12, 1e-8, 1e-5, 0.05]
X0 = torch.tensor([2.0, 1.0], dtype=F64)


def time_of(bias: Tensor, lost: Any, **options: Any) -> Tensor:
    """x' = -x + b cos t, where b is lost before t = 1 if at all."""

    def flow(t: Tensor, x: Tensor) -> Tensor:
        b = bias if lost is None or float(t.detach()) > 1.0 else lost(bias)
        return -x + b * torch.cos(t)

    result = stopping_time(flow, X0, lambda t, x: x.square().sum(), 0.05, **options)
    return result.time


def index_of(bias: Tensor, lost: Any, **options: Any) -> Tensor:
    """The same with steps of 0.1, where b is lost in the steps 5 to 9 if at all."""

    def update(k: int, x: Tensor) -> Tensor:
        b = lost(bias) if lost is not None and 5 <= k < 10 else bias
        return x + 0.1 * (-x + b * math.cos(0.1 * k))

    return stopping_index(update, X0, lambda k, x: x.square().sum(), 0.05, **options).steps


@pytest.mark.parametrize("route", [StepAdjoint(), InterpolatingAdjoint()], ids=str)
@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("size", slow_after(3, [0.0, 1e-300, 1e-8, 1e-12, 1e-5, 0.05]))
def test_lost_on_a_part_of_the_path(size: float, how: str, route: Any) -> None:
    bias = leaf(size)
    with pytest.warns(GradientAccuracyWarning, match="bias"):
        time_of(bias, LOST[how], gradient=route).backward()


@pytest.mark.parametrize("how", LOST)
@pytest.mark.parametrize("size", SIZES)
def test_lost_in_some_steps(size: float, how: str) -> None:
    bias = leaf(size)
    with pytest.warns(GradientAccuracyWarning, match="bias"):
        index_of(bias, LOST[how]).backward()


@pytest.mark.parametrize("side", ["flow", "update"])
@pytest.mark.parametrize("size", SIZES)
def test_lost_in_part_everywhere(size: float, side: str) -> None:
    """Half of the bias is a constant for autograd, at every point: that is refused."""
    bias = leaf(size)

    def half(b: Tensor) -> Tensor:
        return 0.5 * b + 0.5 * b.detach()

    def of_flow() -> Tensor:
        return stopping_time(
            lambda t, x: -x + half(bias) * torch.cos(t), X0, lambda t, x: x.norm(), 0.2
        ).time

    def of_update() -> Tensor:
        return stopping_index(
            lambda k, x: x + 0.1 * (half(bias) - x), X0, lambda k, x: x.norm(), 0.2
        ).steps

    with pytest.raises(MissingGradientError, match="wrong or missing"):
        (of_flow if side == "flow" else of_update)().backward()


@pytest.mark.parametrize("size", SIZES)
def test_right_ones_are_let_be(size: float) -> None:
    """The same without a loss, on both sides, against a difference of a larger move."""
    for value_of in (time_of, index_of):
        bias = leaf(size)
        options = {"gradient": Unrolled()} if value_of is index_of else {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            value_of(bias, None, **options).backward()
        assert bias.grad is not None
        if value_of is time_of:
            ahead, behind = (float(time_of(leaf(size + h), None).detach()) for h in (1e-4, -1e-4))
            assert float(bias.grad) == pytest.approx((ahead - behind) / 2e-4, rel=1e-3)


@pytest.mark.parametrize("size", [1e-16, 1e-12, 1e-8])
@pytest.mark.parametrize("kind", ["root", "logarithm", "asserted", "denominator"])
def test_a_domain_that_ends_near_the_leaf(kind: str, size: float) -> None:
    """What must stay positive may not be moved through zero: then nothing is said."""
    eps = leaf(size)

    def gain() -> Tensor:
        if kind == "asserted" and float(eps.detach()) <= 0.0:
            raise ValueError("eps must be positive")
        return {
            "root": 1.0 + torch.sqrt(eps),
            "logarithm": 1.0 - 0.01 * torch.log(eps),
            "asserted": 1.0 + eps,
            "denominator": 1.0 / (1.0 + eps),
        }[kind]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        time = stopping_time(lambda t, x: -gain() * x, X0, lambda t, x: x.norm(), 0.05).time
        time.backward()
        index = stopping_index(
            lambda k, x: x - 0.1 * gain() * x, X0, lambda k, x: x.norm(), 0.05
        ).steps
        index.backward()


def test_the_epsilon_of_an_adaptive_method() -> None:
    """x' = -x / (sqrt(v) + eps) with v far above eps^2 and far below: no word of either."""
    for v in (1e-20, 1e-8, 1.0):
        eps, second = leaf(1e-8), torch.tensor(v, dtype=F64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            time = stopping_time(
                lambda t, x, s=second, e=eps: -x * 1e-8 / (s.sqrt() + e),
                X0,
                lambda t, x: x.norm(),
                0.05,
                max_time=1e12,
            ).time
            time.backward()
        # T = log(|x0|/0.05) (sqrt(v) + eps) / 1e-8
        exact = math.log(math.sqrt(5.0) / 0.05) / 1e-8
        assert eps.grad is not None
        assert float(eps.grad) == pytest.approx(exact, rel=1e-5)


# --- the checks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [0.0, 0.01])
@pytest.mark.parametrize("size", [0.0, 1e-12, 1e-8, 1e-4])
@pytest.mark.parametrize("check", ["time", "index", "function"])
def test_checks_judge_small_leaves(check: str, size: float, error: float) -> None:
    bias = leaf(size)

    def seen() -> Tensor:
        return scaled_gradient(bias, 1.0 + error)

    if check == "time":
        report = check_stopping_gradient(
            lambda t, x: -x + 0.05 * seen() * torch.cos(t), X0, lambda t, x: x.norm(), 0.2
        )
    elif check == "index":
        report = check_index_gradient(
            lambda k, x: 0.9 * x + 0.005 * seen(), X0, lambda k, x: x.norm(), 0.2
        )
    else:
        report = check_gradient(lambda: torch.sin(3 * seen()) + 1 + seen().exp(), [bias])
    assert report.verdict == ("wrong" if error else "right"), report


@pytest.mark.parametrize("size", [1e-12, 1e-8])
def test_checks_stay_inside_the_domain(size: float) -> None:
    """sqrt(eps) has no value below 0: eps is moved by its own size after all."""
    eps = leaf(size)
    report = check_gradient(lambda: 1e-3 * torch.sqrt(eps) + torch.log(eps), [eps])
    assert report.verdict == "right", report


@pytest.mark.parametrize("route", [StepAdjoint(), InterpolatingAdjoint()], ids=str)
def test_a_leaf_that_does_nothing_is_right(route: Any) -> None:
    """A pulse long after T: its place has a derivative of 1e-150, which no road can tell from 0."""
    place, rate = leaf(30.0), leaf(2.0)
    report = check_stopping_gradient(
        lambda t, x: -rate * x + torch.exp(-((t - place) ** 2) / 2),
        X0,
        lambda t, x: x.norm(),
        0.2,
        gradient=route,
    )
    assert report.verdicts == {"place": "right", "rate": "right"}, report
    assert report.passed
