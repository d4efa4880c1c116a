"""A piecewise constant criterion on the continuous side: refused by name, or no time at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ode_stopping import (
    DegenerateCrossingError,
    GradientError,
    MissingGradientError,
    StoppingError,
    Torchdiffeq,
    stopping_time,
)

START = torch.tensor([2.0, 1.0], dtype=torch.float64)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def finely_rounded(t: Tensor, x: Tensor) -> Tensor:
    return torch.round(1e5 * x.square().sum()) / 1e5


def count(t: Tensor, x: Tensor) -> Tensor:
    return (x > 0.5).to(x).mean()


@pytest.mark.parametrize("rtol", [1e-6, 1e-4])
def test_rounded(rtol: float) -> None:
    theta = number(1.3)
    arguments = (lambda t, x: -theta * x, START, finely_rounded, 0.5)
    with pytest.raises(MissingGradientError, match="piecewise constant"):
        stopping_time(*arguments, solver=Torchdiffeq(rtol=rtol), throw=False)
    # |x0|^2 exp(-2 theta T) = 0.5 to within half a step of the staircase
    time = stopping_time(*arguments, gradient=None, throw=False).time.item()
    assert time == pytest.approx(float(torch.tensor(10.0).log()) / 2.6, rel=1e-4)


@pytest.mark.parametrize(
    ("rtol", "dtype"),
    [
        (1e-6, torch.float64),
        (1e-3, torch.float64),
        (1e-2, torch.float64),
        (1e-4, torch.float32),
        (1e-2, torch.float32),
    ],
)
def test_a_count_never_gives_a_silent_zero(rtol: float, dtype: torch.dtype) -> None:
    theta = torch.tensor(1.3, dtype=dtype, requires_grad=True)
    with pytest.raises((StoppingError, GradientError)):
        stopping_time(
            lambda t, x: -theta * x, START.to(dtype), count, 0.4, solver=Torchdiffeq(rtol=rtol)
        ).time.backward()
    assert theta.grad is None


def test_a_touch_is_a_touch_still() -> None:
    """J = (t - 1)^2 touches 0 at t = 1 with J' = 0: DEGENERATE, and no staircase."""
    theta = number(1.0)
    with pytest.raises(DegenerateCrossingError):
        stopping_time(
            lambda t, x: theta * torch.ones_like(x),
            torch.zeros(1, dtype=torch.float64),
            lambda t, x: (x - 1).square().sum(),
            1e-24,
            max_time=3.0,
        )
