"""The three checks where a leaf has fewer digits than the state: it moves by what it can hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from planted import scaled_gradient
from torch import Tensor

from discrete import check_index_gradient
from ode_stopping import check_gradient, check_stopping_gradient
from ode_stopping.checking.report import FINITE_DIFFERENCES, GradientReport

X0 = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)


def leaf(dtype: torch.dtype) -> Tensor:
    return torch.tensor([1.1, 2.3, 0.7], dtype=dtype, requires_grad=True)


def velocity(weight: Tensor, x: Tensor) -> Tensor:
    return -weight.to(x.dtype) * x * (1 + x.square())


def energy(t: Tensor, x: Tensor) -> Tensor:
    return x.square().sum()


def of_the_index(weight: Tensor, factor: float, *, step: float = 0.01) -> GradientReport:
    return check_index_gradient(
        lambda k, x: x + step * velocity(scaled_gradient(weight, factor), x), X0, energy, 1e-2
    )


def of_the_time(weight: Tensor, factor: float) -> GradientReport:
    return check_stopping_gradient(
        lambda t, x: velocity(scaled_gradient(weight, factor), x), X0, energy, 1e-2
    )


def of_a_function(weight: Tensor, factor: float) -> GradientReport:
    return check_gradient(lambda: value(scaled_gradient(weight, factor)), [weight])


def value(weight: Tensor) -> Tensor:
    # (The sum cancels: the derivative is small beside the curvature.)
    wide = weight.double()
    return (wide.sin() * X0).sum() + 5 * wide.square().sum() - 12.3 * wide.sum()


@pytest.mark.parametrize("check", [of_the_index, of_the_time, of_a_function])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_gradient_of_a_leaf_with_fewer_digits(
    check: Callable[[Tensor, float], GradientReport], dtype: torch.dtype
) -> None:
    report = check(leaf(dtype), 1.0)
    rows = [f for f in report.findings if f.road == FINITE_DIFFERENCES]
    assert report.passed, report
    assert len(rows) == 3
    for row in rows:
        assert row.passed is True, report
        assert row.difference < 1e-6, report
        # The remainder is one of a difference at the point that was meant: h^2, and not h.
        assert row.order is not None
        assert row.order == pytest.approx(2.0, abs=0.15), report


@pytest.mark.parametrize(
    ("check", "error"), [(of_the_index, 2e-4), (of_the_time, 2e-4), (of_a_function, 5e-3)]
)
def test_wrong_gradient_of_a_leaf_with_fewer_digits(
    check: Callable[[Tensor, float], GradientReport], error: float
) -> None:
    report = check(leaf(torch.float32), 1.0 + error)
    assert not report.passed, report
    assert report.wrong, report


def test_missing_gradient_is_not_made_up_for() -> None:
    """What a move lacks is made up for by the gradient that is claimed: one of 0 adds nothing."""
    report = of_a_function(leaf(torch.float32), 0.0)
    assert report.wrong == ("weight",), report


@pytest.mark.slow
def test_many_parts_are_added_up_in_the_type_of_the_leaf() -> None:
    """A gradient of 2,600 parts in float32 has lost more than its last digit."""
    report = of_the_index(leaf(torch.float32), 1.0, step=1e-3)
    assert report.time > 2500
    assert report.passed, report
