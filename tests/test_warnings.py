"""Warnings reach the user each time, at the user's own line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from ode_stopping import GradientAccuracyWarning, stopping_time


def test_the_former_name_is_told_at_the_users_line() -> None:
    with pytest.warns(DeprecationWarning, match="cheap") as caught:
        stopping_time(lambda t, x: -x, torch.ones(1), lambda t, x: x.sum(), 0.5, evidence="cheap")  # type: ignore[arg-type]  # fmt: skip
    assert [Path(one.filename).name for one in caught] == [Path(__file__).name]


def bad_gradient(scale: float) -> None:
    """A jump of the flow that nobody named, once more."""
    rate = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    result = stopping_time(
        lambda t, x: -rate * torch.where(t < 1.0, 1.0, 3.0 * scale) * x,
        torch.ones(1, dtype=torch.float64),
        lambda t, x: x.sum(),
        0.05,
    )
    result.time.backward()


def test_three_bad_gradients_are_three_warnings() -> None:
    """With Python's own filter, which shows a warning once per place."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        for scale in (1.0, 1.0, 2.0):
            bad_gradient(scale)
    found = [one for one in caught if issubclass(one.category, GradientAccuracyWarning)]
    assert len(found) == 3
    assert {Path(one.filename).name for one in found} == {Path(__file__).name}


def test_filters_work() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", GradientAccuracyWarning)
        with pytest.raises(GradientAccuracyWarning):
            bad_gradient(1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", GradientAccuracyWarning)
        bad_gradient(1.0)
    assert not caught
