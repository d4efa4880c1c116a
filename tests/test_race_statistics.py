"""Statistics of races with misses: closed cases, coverage as stated, and no reward for a miss."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from theory_checks.smooth_svm.statistics import (
    Median,
    Outcome,
    Ratio,
    Tuned,
    bootstrap_ratio,
    censored_summary,
    median_with_interval,
    performance_profile,
    tune,
)

INF, NAN = math.inf, math.nan
REPETITIONS = 4000
Interval = tuple[float, float]


def sample(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


# Whole numbers: their products and differences are exact, and so must be what is claimed of them.
ITERATIONS = st.one_of(st.integers(1, 1000).map(float), st.just(INF))
SAMPLES = st.lists(ITERATIONS, min_size=1, max_size=30)


@st.composite
def cost_tables(draw: st.DrawFn) -> np.ndarray:
    """Draw (problems, solvers) whole costs and misses."""
    solvers = draw(st.integers(1, 4))
    row = st.lists(ITERATIONS, min_size=solvers, max_size=solvers)
    return np.array(draw(st.lists(row, min_size=1, max_size=8)))


# The median and its interval


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ([7.0], 7.0),
        ([INF], INF),
        ([INF, 1.0, 3.0], 3.0),
        ([INF, 1.0, INF], INF),
        ([4.0, 1.0, 2.0, INF], 3.0),
        ([INF, 1.0, 2.0, INF], INF),  # the upper of the two middle ones is a miss
        ([INF, 1.0, INF, INF], INF),
    ],
)
def test_median_by_hand(values: list[float], median: float) -> None:
    found = median_with_interval(values)
    assert found.value == median
    assert found.count == len(values)
    assert found.missed == values.count(INF)
    # All of these are too small for 95 %.
    assert (found.low, found.high) == (min(values), max(values))
    assert found.coverage == pytest.approx(1.0 - 2.0 ** (1 - len(values)), abs=1e-15)


@pytest.mark.parametrize(
    ("count", "confidence", "rank", "coverage"),
    [
        (5, 0.95, 1, 1 - 2 / 2**5),  # the whole range is not enough
        (6, 0.95, 1, 1 - 2 / 2**6),
        (9, 0.95, 2, 1 - 2 * (1 + 9) / 2**9),
        (10, 0.99, 1, 1 - 2 / 2**10),
        (4, 0.3, 2, 6 / 16),
        (4, 0.375, 2, 6 / 16),  # just enough is enough
        (25, 0.95, 8, 0.9567147493362427),
    ],
)
def test_interval_by_hand(count: int, confidence: float, rank: int, coverage: float) -> None:
    found = median_with_interval(np.arange(count, 0.0, -1.0), confidence=confidence)
    assert (found.low, found.high) == (rank, count + 1 - rank)
    assert found.coverage == pytest.approx(coverage, abs=1e-14)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_the_pair_is_the_tightest_that_suffices(confidence: float) -> None:
    for count in range(1, 60):
        found = median_with_interval(np.arange(1.0, count + 1.0), confidence=confidence)
        rank = int(found.low)
        this, deeper = (
            1 - Fraction(2 * sum(math.comb(count, i) for i in range(k)), 2**count)
            for k in (rank, rank + 1)
        )
        assert found.high == count + 1 - rank
        assert found.coverage == pytest.approx(float(this), abs=1e-13)
        assert this >= confidence or rank == 1
        assert deeper < confidence or rank == (count + 1) // 2


def simulated(interval: Callable[[np.ndarray], Interval], count: int, horizon: float) -> float:
    """How often the interval holds log 2, the median of the exponential law, under censoring."""
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(REPETITIONS):
        values = rng.exponential(size=count)
        values[values > horizon] = INF
        low, high = interval(values)
        covered += low <= math.log(2.0) <= high
    return covered / REPETITIONS


def of_the_package(values: np.ndarray) -> Interval:
    found = median_with_interval(values)
    return (found.low, found.high)


def four_deviations(coverage: float) -> float:
    return 4.0 * math.sqrt(coverage * (1.0 - coverage) / REPETITIONS)


@pytest.mark.parametrize("horizon", [INF, 1.0])
@pytest.mark.parametrize("count", [3, 6, 25, 26])
def test_the_interval_covers_the_median_as_often_as_it_says(count: int, horizon: float) -> None:
    stated = median_with_interval(np.arange(count)).coverage
    found = simulated(of_the_package, count, horizon)
    assert found == pytest.approx(stated, abs=four_deviations(stated))


def one_rank_too_deep(values: np.ndarray) -> Interval:
    return tuple(np.sort(values)[[8, 16]])


def misses_dropped(values: np.ndarray) -> Interval:
    return of_the_package(values[np.isfinite(values)])


@pytest.mark.parametrize("planted", [one_rank_too_deep, misses_dropped])
def test_planted_intervals_do_not_cover_as_stated(planted: Callable[..., Interval]) -> None:
    stated = median_with_interval(np.arange(25)).coverage
    assert simulated(planted, 25, 1.0) < stated - four_deviations(stated)


def test_a_median_beyond_the_horizon_is_not_taken_for_the_horizon() -> None:
    values = np.array([900.0, 950.0, *[INF] * 8])
    found = median_with_interval(values)
    assert found == Median(INF, 950.0, INF, 10, 8, found.coverage)
    planted = median_with_interval(np.minimum(values, 1000.0))
    assert planted.value == planted.high == 1000.0


@sample(200)
@given(SAMPLES, st.randoms(use_true_random=False))
def test_order_does_not_matter_and_misses_never_lower_a_median(
    values: list[float], random: Any
) -> None:
    before = median_with_interval(values)
    assert before.low <= before.value <= before.high
    shuffled = random.sample(values, len(values))
    assert median_with_interval(shuffled) == before
    after = median_with_interval([INF, *shuffled[1:]])
    assert after.low >= before.low
    assert after.high >= before.high
    assert after.value >= before.value
    assert median_with_interval([*values, INF]).value >= before.value


def test_bad_arguments_of_medians_are_named() -> None:
    for values in ([], [[1.0, 2.0]], 3.0):
        with pytest.raises(ValueError, match="values must be a vector of at least 1"):
            median_with_interval(values)
    for bad in (NAN, -INF):
        with pytest.raises(ValueError, match=r"values must be numbers.*values\[1\]"):
            median_with_interval([1.0, bad])
    for confidence in (0.0, 1.0, 95.0, NAN):
        with pytest.raises(ValueError, match="confidence must be in"):
            median_with_interval([1.0], confidence=confidence)


# Performance profiles

COSTS = np.array([[10.0, 20.0], [30.0, 10.0], [5.0, INF], [INF, INF]])


def test_profile_by_hand() -> None:
    profile = performance_profile(COSTS)
    np.testing.assert_array_equal(profile.ratios, [[1, 2], [3, 1], [1, INF], [INF, INF]])
    np.testing.assert_array_equal(profile.taus, [1.0, 2.0, 3.0])
    # The problem that nobody solved stays among the four.
    np.testing.assert_array_equal(profile.shares, [[0.5, 0.25], [0.5, 0.5], [0.75, 0.5]])
    np.testing.assert_array_equal(profile.wins, [0.5, 0.25])
    np.testing.assert_array_equal(profile.solved, [0.75, 0.5])
    # log_9 of 1, 3, 1 and of 2, 1.
    expected = [(1 + 0.5 + 1) / 4, (1 - math.log(2) / math.log(9) + 1) / 4]
    np.testing.assert_allclose(profile.area(9.0), expected, rtol=1e-14)
    at = performance_profile(COSTS, taus=[1.5, 2.0, 100.0])
    np.testing.assert_array_equal(at.shares, [[0.5, 0.25], [0.5, 0.5], [0.75, 0.5]])
    np.testing.assert_array_equal(at.wins, profile.wins)  # though 1 is not among the taus


def test_a_tie_counts_for_all_and_no_solution_for_nobody() -> None:
    np.testing.assert_array_equal(performance_profile([[2.0, 2.0]]).wins, [1.0, 1.0])
    nobody = performance_profile([[INF, INF]])
    np.testing.assert_array_equal(nobody.taus, [1.0])
    np.testing.assert_array_equal(nobody.shares, [[0.0, 0.0]])
    np.testing.assert_array_equal(nobody.area(10.0), [0.0, 0.0])


@pytest.mark.parametrize(
    "planted",
    [
        pytest.param(COSTS[:3], id="the unsolved problem dropped"),
        pytest.param(COSTS[:2], id="problems with any miss dropped"),
        pytest.param(np.minimum(COSTS, 1000.0), id="a miss as the horizon"),
    ],
)
def test_planted_profiles_differ(planted: np.ndarray) -> None:
    right, wrong = performance_profile(COSTS), performance_profile(planted)
    assert not np.array_equal(wrong.wins, right.wins)


@sample(200)
@given(cost_tables(), st.randoms(use_true_random=False))
def test_scaling_problems_and_reordering_change_no_profile(costs: np.ndarray, random: Any) -> None:
    problems, solvers = (random.sample(range(n), n) for n in costs.shape)
    scales = [[float(random.randint(1, 10**6))] for _ in problems]
    before = performance_profile(costs)
    after = performance_profile((costs * scales)[problems][:, solvers])
    np.testing.assert_array_equal(after.taus, before.taus)
    np.testing.assert_array_equal(after.shares, before.shares[:, solvers])


@sample(150)
@given(cost_tables(), st.data())
def test_a_further_miss_never_raises_the_profile_of_its_solver(
    costs: np.ndarray, data: st.DataObject
) -> None:
    problem = data.draw(st.integers(0, costs.shape[0] - 1))
    solver = data.draw(st.integers(0, costs.shape[1] - 1))
    before = performance_profile(costs)
    worse = costs.copy()
    worse[problem, solver] = INF
    after = performance_profile(worse, taus=before.taus)
    assert np.all(after.shares[:, solver] <= before.shares[:, solver])
    others = np.arange(costs.shape[1]) != solver
    assert np.all(after.shares[:, others] >= before.shares[:, others])


@sample(150)
@given(cost_tables())
def test_profiles_rise_from_wins_to_solved_and_area_is_their_integral(costs: np.ndarray) -> None:
    profile = performance_profile(costs)
    assert np.all(np.diff(profile.shares, axis=0) >= 0.0)
    np.testing.assert_array_equal(profile.shares[0], profile.wins)
    np.testing.assert_array_equal(profile.shares[-1], profile.solved)
    limit = 2000.0  # beyond every ratio, so the steps can be summed one by one
    widths = np.diff(np.log(np.append(profile.taus, limit)))
    integral = widths @ profile.shares / math.log(limit)
    np.testing.assert_allclose(profile.area(limit), integral, rtol=1e-11, atol=1e-14)


def test_bad_arguments_of_profiles_are_named() -> None:
    for bad in (0.0, -1.0, NAN, -INF):
        with pytest.raises(ValueError, match=r"costs must be positive.*costs\[1, 0\]"):
            performance_profile([[1.0, 2.0], [bad, 1.0]])
    for shape in [(3,), (0, 2), (2, 0), (1, 1, 1)]:
        with pytest.raises(ValueError, match=r"costs must be \(problems, solvers\)"):
            performance_profile(np.ones(shape))
    with pytest.raises(ValueError, match="too far apart"):  # or it would be a silent miss
        performance_profile([[1e-200, 1e200]])
    for taus in [[0.5, 1.0], [1.0, 1.0], [2.0, 1.0], [1.0, INF], [1.0, NAN], []]:
        with pytest.raises(ValueError, match="taus must"):
            performance_profile(COSTS, taus=taus)
    for limit in (1.0, 0.5, INF, NAN):
        with pytest.raises(ValueError, match="limit must"):
            performance_profile(COSTS).area(limit)


# Tuning


def runs(*pairs: tuple[float, float]) -> list[Outcome]:
    return [Outcome(iterations, gap) for iterations, gap in pairs]


def test_the_fewest_iterations_in_the_median_win() -> None:
    found = tune(
        {
            0.1: runs((100, 1e-9), (300, 1e-9), (200, 1e-9)),
            0.2: runs((90, 1e-4), (INF, 1e-9), (INF, 1e-9)),  # the fastest single run
            0.3: runs((150, 1e-5), (INF, 1.0), (120, 1e-5)),
        }
    )
    assert found == Tuned(0.3, "iterations", 150.0, 1e-5)
    found_late = tune({"slow": runs((999, 1e-3)), "close": runs((INF, 1e-12))})
    assert found_late == Tuned("slow", "iterations", 999.0, 1e-3)


def test_where_none_converges_the_smallest_median_gap_wins() -> None:
    found = tune(
        {
            "a": runs((INF, 0.5), (INF, 0.4), (INF, 0.3)),
            "b": runs((10, 1e-8), (INF, 0.35), (INF, 7.0)),  # one lucky run of three
            "c": [Outcome(INF, 1e-9, diverged=True), *runs((INF, 0.1), (INF, NAN))],
            "d": runs((INF, 0.1), (INF, -INF), (INF, -INF)),
        }
    )
    assert found == Tuned("b", "final value", INF, 0.35)


def test_ties_go_by_the_gap_and_then_by_the_order() -> None:
    tied = {"a": runs((5, 0.3)), "b": runs((5, 0.2)), "c": runs((5, 0.2))}
    assert tune(tied).setting == "b"
    assert tune(dict(reversed(tied.items()))).setting == "c"
    lost = {"x": [Outcome(INF, 0.1, diverged=True)], "y": runs((INF, NAN))}
    assert tune(lost) == Tuned("x", "final value", INF, INF)


def test_outcomes_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one setting"):
        tune({})
    with pytest.raises(ValueError, match="the same seeds"):
        tune({"a": [], "b": []})
    with pytest.raises(ValueError, match="the same seeds"):
        tune({"a": runs((1, 1.0)), "b": runs((1, 1.0), (2, 1.0))})
    for bad in (NAN, -1.0):
        with pytest.raises(ValueError, match="iterations must be"):
            Outcome(bad, 1.0)


# Ratios of medians


def test_a_ratio_that_is_the_same_for_every_seed_has_no_scatter() -> None:
    b = np.random.default_rng(2).lognormal(sigma=2.0, size=15)
    found = bootstrap_ratio(2.0 * b, b, seed=0)
    assert found == Ratio(2.0, 2.0, 2.0, 0.0, 15)
    # Planted: the pairs torn apart, as two separate resamplings would do.
    torn = bootstrap_ratio(2.0 * b, np.roll(b, 4), seed=0)
    assert torn.high > 1.5 * torn.low
    assert torn != bootstrap_ratio(2.0 * b, np.roll(b, 4), seed=1)
    assert torn == bootstrap_ratio(2.0 * b, np.roll(b, 4), seed=0)


def test_two_pairs_by_hand() -> None:
    # Resampled medians of a: 1 (a quarter), 1.5 (half), 2 (a quarter).
    found = bootstrap_ratio([1.0, 2.0], [4.0, 4.0], seed=0)
    assert found == Ratio(0.375, 0.25, 0.5, 0.0, 2)
    assert bootstrap_ratio([1.0, 2.0], [4.0, 4.0], seed=0, confidence=0.3).low == 0.375


def test_infinite_medians_decide_where_they_can() -> None:
    missed, met = [INF, INF, INF], [5.0, 6.0, 7.0]
    assert bootstrap_ratio(missed, met, seed=0) == Ratio(INF, INF, INF, 0.0, 3)
    assert bootstrap_ratio(met, missed, seed=0) == Ratio(0.0, 0.0, 0.0, 0.0, 3)
    both = bootstrap_ratio(missed, missed, seed=0)
    assert math.isnan(both.value)
    assert (both.low, both.high, both.undecided) == (0.0, INF, 1.0)


def test_an_undecided_resample_could_be_any_number() -> None:
    # Undecided unless the first pair is drawn twice: in three resamples of four.
    found = bootstrap_ratio([5.0, INF], [5.0, INF], seed=3)
    assert math.isnan(found.value)
    assert found.undecided == pytest.approx(0.75, abs=4.0 * math.sqrt(0.75 * 0.25 / 2000))
    # The decided ones are all 1; [1, 1] would claim to know what three in four do not tell.
    assert (found.low, found.high) == (0.0, INF)


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_the_bootstrap_interval_covers_about_as_often_as_it_says(correlation: float) -> None:
    rng = np.random.default_rng(17)
    covered, repetitions = 0, 500
    for seed in range(repetitions):
        x, y = rng.standard_normal((2, 25))
        y = correlation * x + math.sqrt(1.0 - correlation**2) * y
        found = bootstrap_ratio(np.exp(0.5 * x) * 3.0, np.exp(0.5 * y), seed=seed, resamples=400)
        covered += found.low <= 3.0 <= found.high
    # Approximate, so 3 points on top of the scatter of the count.
    spread = 4.0 * math.sqrt(0.95 * 0.05 / repetitions)
    assert covered / repetitions == pytest.approx(0.95, abs=0.03 + spread)


@sample(60)
@given(st.lists(st.tuples(ITERATIONS, ITERATIONS), min_size=2, max_size=12), st.integers(0, 10))
def test_exchanging_the_two_inverts_and_scaling_scales(
    pairs: list[tuple[float, float]], seed: int
) -> None:
    a, b = np.array(pairs).T
    forth, back = (bootstrap_ratio(x, y, seed=seed, resamples=200) for x, y in ((a, b), (b, a)))
    ends = [1.0 / end if end else INF for end in (back.high, back.low)]
    assert [forth.low, forth.high] == pytest.approx(ends, rel=1e-14)
    assert forth.undecided == back.undecided
    assert math.isnan(forth.value) == math.isnan(back.value)
    scaled = bootstrap_ratio(4.0 * a, b, seed=seed, resamples=200)
    assert (scaled.low, scaled.high) == (4.0 * forth.low, 4.0 * forth.high)


def test_bad_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="confidence must be in"):
        bootstrap_ratio([1.0, 2.0], [1.0, 2.0], seed=0, confidence=1.0)
    with pytest.raises(ValueError, match="b must be as long as a"):
        bootstrap_ratio([1.0, 2.0], [1.0], seed=0)
    with pytest.raises(ValueError, match="at least 2 values"):
        bootstrap_ratio([1.0], [1.0], seed=0)
    with pytest.raises(ValueError, match="resamples must be at least 40"):
        bootstrap_ratio([1.0, 2.0], [1.0, 2.0], seed=0, resamples=39)
    with pytest.raises(ValueError, match=r"a must be positive.*a\[1\]"):
        bootstrap_ratio([1.0, 0.0], [1.0, 2.0], seed=0)
    with pytest.raises(ValueError, match=r"b must be numbers.*b\[0\]"):
        bootstrap_ratio([1.0, 2.0], [NAN, 2.0], seed=0)


# In words


def test_summaries_by_hand() -> None:
    # Of 25 the interval is from the 8th to the 18th, the median the 13th.
    values = [*range(100, 107), 480, *[500] * 4, 566, *[600] * 4, 655, *[700] * 4, INF, INF, INF]
    assert censored_summary(values, 1000, diverged=1) == (
        "566 (480 to 655), 3 of 25 not in 1000, 1 diverged"
    )
    assert censored_summary(values[:12] + [INF] * 13, 1000) == (
        "over 1000 (480 to over 1000), 13 of 25 not in 1000"
    )
    assert censored_summary([480, 500, 655], 1000) == (
        "500 (range 480 to 655, 75 %), all 3 in 1000"
    )
    assert censored_summary([1_234_567, 1_234_568], 2e6) == (
        "1234567.5 (range 1234567 to 1234568, 50 %), all 2 in 2000000"
    )
    assert censored_summary([1000], 1000) == "1000 (range 1000 to 1000, 0 %), all 1 in 1000"


def test_summaries_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most the horizon 1000 or inf, got 1001"):
        censored_summary([5, 1001], 1000)
    for diverged in (-1, 2):
        with pytest.raises(ValueError, match="diverged must be 0 to 1"):
            censored_summary([5, INF], 1000, diverged=diverged)
    for horizon in (0.0, INF, NAN):
        with pytest.raises(ValueError, match="horizon must"):
            censored_summary([5.0], horizon)
