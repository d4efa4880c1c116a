"""A sample of `benchmarks/calibration.py`: warnings come where they should."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "calibration.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calibration", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibration"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def calibration() -> ModuleType:
    return load()


def test_a_sample_of_the_study(calibration: ModuleType) -> None:
    rows = calibration.study(40, seed=11, largest_condition=30.0)
    counts = calibration.verdict(rows)
    assert counts["gradients"] > 30
    assert not [row for row in rows if row.missed]
    good = [row for row in rows if row.good]
    assert len(good) > 30
    # Fewer than 5 % over hundreds of problems; one of a small sample.
    assert sum(row.warned for row in good) <= 1


def test_the_study_sees_what_is_missed(calibration: ModuleType) -> None:
    """An error that is silently above estimate and promise counts, and so does a NaN."""
    draw = calibration.draw_problem(0, 10.0)
    silent = calibration.Row(draw, "gradient", 1e-3, 0.0, 1e-6, 1e-5, warned=False)
    assert silent.missed
    assert calibration.Row(draw, "gradient", float("nan"), 0.0, 1e-6, 1e-5).missed
    assert not calibration.Row(draw, "gradient", 1e-3, 0.0, 1e-6, 1e-5, warned=True).missed
    assert not calibration.Row(draw, "gradient", 9e-6, 0.0, 1e-9, 1e-5).missed
    assert calibration.verdict([silent])["error above the promise"] == 1


@pytest.mark.slow
def test_a_larger_sample_with_stiff_problems(calibration: ModuleType) -> None:
    rows = calibration.study(120, seed=12, largest_condition=1e3)
    good = [row for row in rows if row.good]
    assert not [row for row in rows if row.missed]
    assert sum(row.warned for row in good) <= 0.05 * len(good)
