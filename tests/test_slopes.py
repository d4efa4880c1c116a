"""Log-log fits: exact on exact powers, honest about noise, sensitive to what is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from theory_checks.slopes import fit_slope, local_slopes

H = np.logspace(-3, -1.5, 9)


@pytest.mark.parametrize("power", [-1.0, 0.5, 1.0, 2.0, 4.0])
def test_an_exact_power_is_found_exactly(power: float) -> None:
    fit = fit_slope(H, 3.0 * H**power)
    assert fit.slope == pytest.approx(power, abs=1e-12)
    assert math.exp(fit.intercept) == pytest.approx(3.0, rel=1e-11)
    assert fit.interval == pytest.approx((power, power), abs=1e-11)
    assert fit.r_squared == pytest.approx(1.0, abs=1e-12)
    assert fit.n == 9
    np.testing.assert_allclose(fit.predict(H), 3.0 * H**power, rtol=1e-11)
    np.testing.assert_allclose(local_slopes(H, 3.0 * H**power), power, rtol=1e-11)


def test_constant_errors_have_slope_zero() -> None:
    fit = fit_slope(H, np.full(9, 2.0))
    assert fit.slope == pytest.approx(0.0, abs=1e-14)
    assert fit.r_squared == 1.0


def test_slope_interval_and_r_squared_agree_with_scipy() -> None:
    rng = np.random.default_rng(3)
    errors = H**1.2 * np.exp(0.3 * rng.standard_normal(9))
    fit = fit_slope(H, errors)
    reference = stats.linregress(np.log(H), np.log(errors))
    margin = stats.t.ppf(0.975, 7) * reference.stderr
    assert fit.slope == pytest.approx(reference.slope, rel=1e-12)
    assert fit.intercept == pytest.approx(reference.intercept, rel=1e-12)
    assert fit.interval == pytest.approx(
        (reference.slope - margin, reference.slope + margin), rel=1e-11
    )
    assert fit.r_squared == pytest.approx(reference.rvalue**2, rel=1e-11)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("points", [4, 9])
def test_the_interval_covers_the_truth_as_often_as_it_says(points: int, confidence: float) -> None:
    rng = np.random.default_rng(20)
    repetitions = 4000
    h = np.logspace(-3, -1.5, points)
    covered = 0
    for _ in range(repetitions):
        errors = 0.7 * h * np.exp(0.2 * rng.standard_normal(points))
        fit = fit_slope(h, errors, confidence=confidence)
        covered += fit.low <= 1.0 <= fit.high
    # Four standard deviations of the count; a normal quantile (for 4 points 0.86 instead of 0.95)
    # in place of Student's would be far outside.
    spread = 4.0 * math.sqrt(confidence * (1.0 - confidence) / repetitions)
    assert covered / repetitions == pytest.approx(confidence, abs=spread)


@pytest.mark.parametrize(
    "planted",
    [
        pytest.param(H**2, id="wrong order"),
        pytest.param(H + 0.05, id="a bias that does not vanish"),
        pytest.param(np.full(9, 0.1), id="no convergence"),
        pytest.param(H + 1e-6 / H, id="rounding noise at small steps"),
    ],
)
def test_planted_errors_leave_the_band_of_order_one(planted: np.ndarray) -> None:
    fit = fit_slope(H, planted)
    assert not (0.9 <= fit.slope <= 1.1 and fit.low > 0.8)


def test_local_slopes_show_what_the_fit_averages_away() -> None:
    slopes = local_slopes(H, H + 4e-6 / H)
    assert slopes.shape == (8,)
    assert slopes[0] < 0.0 < 0.9 < slopes[-1]


def test_order_of_points_and_container_do_not_matter() -> None:
    errors = H * (1.0 + H)
    reference = fit_slope(H, errors)
    turned = fit_slope(torch.tensor(H[::-1].copy()), torch.tensor(errors[::-1].copy()))
    listed = fit_slope(list(H), [torch.tensor(e) for e in errors])
    assert turned.slope == pytest.approx(reference.slope, rel=1e-12)
    assert listed == reference


@pytest.mark.parametrize("bad", [0.0, -1e-3, math.nan, math.inf])
@pytest.mark.parametrize("argument", ["h", "error"])
@pytest.mark.parametrize("function", [fit_slope, local_slopes])
def test_bad_values_are_named(function: object, argument: str, bad: float) -> None:
    values = {"h": list(H), "error": list(H)}
    values[argument][4] = bad
    with pytest.raises(ValueError, match=rf"^{argument} must be positive.*{argument}\[4\]"):
        function(**values)  # type: ignore[operator]


def test_too_few_points_unequal_lengths_and_equal_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="h must be a vector of at least 3"):
        fit_slope([0.1, 0.2], [0.1, 0.2])
    with pytest.raises(ValueError, match="h must be a vector of at least 2"):
        local_slopes([0.1], [0.1])
    with pytest.raises(ValueError, match="error must be as long as h"):
        fit_slope(H, H[:-1])
    with pytest.raises(ValueError, match="h must hold different step sizes"):
        fit_slope([0.1] * 4, [0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match=r"h\[1\] equals its neighbour"):
        local_slopes([0.2, 0.1, 0.1], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="error must be a vector"):
        fit_slope(H, H[:, None])
    with pytest.raises(ValueError, match="confidence"):
        fit_slope(H, H, confidence=95.0)
