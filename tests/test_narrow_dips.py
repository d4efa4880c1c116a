"""Dips of J that are narrower than the solver's steps, which are long where the flow is easy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ode_stopping import Torchdiffeq, stopping_time

F64 = torch.float64


def turning(t: Tensor, x: Tensor) -> Tensor:
    return torch.stack([x[1], -x[0]])


@pytest.mark.parametrize(("method", "rtol"), [("dopri5", 1e-3), ("dopri8", 1e-5), ("dopri5", 1e-5)])
def test_the_first_of_many_peaks(method: str, rtol: float) -> None:
    """x_1 = cos(t + p), J = -1/(w + x_1^2): a dip of width sqrt(w) at every zero of x_1.

    With J = -s/w it is x_1^2 = w (1/s - 1) at T.
    """
    generator = np.random.default_rng(3)
    for _ in range(25):
        width, share = 10 ** generator.uniform(-2.0, -0.5), generator.uniform(0.6, 0.98)
        phase = generator.uniform(0.0, 0.9)
        level = math.sqrt(width * (1 / share - 1))
        if level >= math.cos(phase):
            continue
        x0 = torch.tensor([math.cos(phase), -math.sin(phase)], dtype=F64)
        result = stopping_time(
            turning,
            x0,
            lambda t, x, width=width: -1 / (width + x[0] ** 2),
            -share / width,
            solver=Torchdiffeq(method=method, rtol=rtol),
            max_time=40.0,
            gradient=None,
        )
        truth = math.acos(level) - phase
        assert float(result.time) == pytest.approx(truth, abs=30 * rtol), (width, share, phase)


def test_a_dip_at_the_end_of_a_step() -> None:
    """The samples of this step fall to its end, and J has turned just before it."""
    x0 = torch.tensor([1.0, 0.0], dtype=F64)
    result = stopping_time(
        turning,
        x0,
        lambda t, x: -1 / (0.02 + x[0] ** 2),
        -0.95 / 0.02,
        solver=Torchdiffeq(rtol=1e-3),
        max_time=40.0,
    )
    truth = math.acos(math.sqrt(0.02 * (1 / 0.95 - 1)))
    assert float(result.time.detach()) == pytest.approx(truth, abs=1e-2)
