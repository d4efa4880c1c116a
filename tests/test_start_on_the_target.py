"""A start within the rounding of the target: what is said, and what is not."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from turning import F64, Turning, run

from ode_stopping import (
    Status,
    StepAdjoint,
    StoppingResult,
    StoppingWarning,
    stopping_time,
)

NAMES = "leave_first=True"


def warned(turning: Turning, **options: Any) -> tuple[StoppingResult, list[warnings.WarningMessage]]:  # fmt: skip # noqa: E501
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run(turning, **{"leave_first": False, **options})
    return result, [one for one in caught if issubclass(one.category, StoppingWarning)]


@pytest.mark.parametrize("gradient", [StepAdjoint(), None])
@pytest.mark.parametrize(
    ("x0", "eps", "direction"),
    [
        ([0.0, -1.0], 0.0, "falling"),
        ([0.25, -1.0], 0.25, "falling"),
        ([math.nextafter(0.25, 0.0), -1.0], 0.25, "falling"),
        ([math.nextafter(0.25, 1.0), -1.0], 0.25, "falling"),
        ([0.25, 1.0], 0.25, "rising"),
        ([1e-17, 1.0], 0.0, "rising"),
    ],
)
def test_a_start_on_the_target_that_moves_away(
    x0: list[float], eps: float, direction: str, gradient: Any
) -> None:
    turning = Turning(x0, eps)
    result, caught = warned(turning, direction=direction, gradient=gradient)
    assert len(caught) == 1
    assert NAMES in str(caught[0].message)
    assert f"target {eps:g}" in str(caught[0].message)
    assert Path(caught[0].filename).name == "turning.py"  # which calls stopping_time
    met = (x0[0] <= eps) if direction == "falling" else (x0[0] >= eps)
    assert result.status is (Status.AT_START if met else Status.REACHED)
    # What the warning names gives the same answer on either side.
    again, silent = warned(turning, direction=direction, leave_first=True)
    assert not silent
    assert again.time.item() == pytest.approx(turning.crossings(eps, direction)[0], abs=1e-8)


def test_each_target_is_warned_about_by_itself() -> None:
    _, caught = warned(Turning([0.25, -1.0], 0.25), target=torch.tensor([0.25, 0.5], dtype=F64))
    assert len(caught) == 1
    assert "target 0.25" in str(caught[0].message)


@pytest.mark.parametrize(
    ("x0", "eps", "direction"),
    [
        ([0.25, 1.0], 0.25, "falling"),  # on the target, and on its way below
        ([0.25, -1.0], 0.25, "rising"),
        ([0.2, -1.0], 0.25, "falling"),  # clearly below
        ([0.25 - 1e-9, -1.0], 0.25, "falling"),
        ([0.3, 1.0], 0.25, "rising"),
        ([0.25 + 1e-9, 1.0], 0.25, "rising"),
    ],
)
def test_other_starts_are_at_start_without_a_warning(
    x0: list[float], eps: float, direction: str
) -> None:
    result, caught = warned(Turning(x0, eps), direction=direction)
    assert not caught
    assert result.status is Status.AT_START
    assert result.time.item() == 0.3


@pytest.mark.parametrize(("weight", "expected"), [(-1.0, 1), (1.0, 0)])
def test_a_start_at_rest_on_the_target(weight: float, expected: int) -> None:
    """x'' = -x from rest at 1: x falls, and J' is zero at the start."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = stopping_time(
            lambda t, s: (s[1], -s[0]),
            (torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)),
            lambda t, s: weight * (s[0].sum() - 1.0),
            0.0,
        )
    assert result.status is Status.AT_START
    assert sum(NAMES in str(one.message) for one in caught) == expected


def test_a_flow_at_rest_on_the_target_does_not_move_away() -> None:
    result = stopping_time(
        lambda t, x: torch.zeros_like(x), torch.ones(1, dtype=F64), lambda t, x: x[0].clone(), 1.0
    )
    assert result.status is Status.AT_START
