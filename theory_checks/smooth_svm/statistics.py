"""Comparing optimisers when some runs never reach the tolerance.

A run that misses costs math.inf: it is right-censored at the horizon and is never dropped, nor
counted as the horizon. A statistic that a miss leaves open says so, by an inf or a share.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Setting = TypeVar("Setting", bound=Hashable)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Median:
    """A median of censored values with its distribution-free interval.

    Attributes:
        value: The median; inf if it is a miss.
        low: Lower end of the interval.
        high: Upper end; inf if all that is known is that the median is at least `low`.
        count: How many values there were, the missed ones included.
        missed: How many of them were infinite.
        coverage: The probability with which an interval like this holds the true median: exact for
            a continuous law, at least that for any other. It is below the confidence asked for
            only where even the whole range of the sample is.
    """

    value: float
    low: float
    high: float
    count: int
    missed: int
    coverage: float


def median_with_interval(values: ArrayLike, *, confidence: float = 0.95) -> Median:
    """The median and the pair of order statistics that holds the true one.

    With x_(1) <= ... <= x_(n) sorted, misses last, the median is the middle value; for an even n
    it is the mean of the two middle ones, so inf as soon as the upper of them is. The interval
    [x_(k), x_(n+1-k)] holds the median of a continuous law with the probability
    1 - 2 P(Binomial(n, 1/2) <= k - 1), whatever the law; censoring is a monotone map and changes
    nothing. The largest k is taken whose coverage is at least `confidence`; if there is none, as
    for n <= 5 and 95 %, k = 1 (the whole range), and the coverage says how little that is.
    Source: David and Nagaraja, Order Statistics (2003), section 7.1.

    Args:
        values: (n,) iterations to the tolerance, inf for a miss; any order.
        confidence: The coverage wanted, in (0, 1).

    Raises:
        ValueError: No values, not a vector, a NaN or -inf, or a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    array = np.sort(_vector("values", values))
    n = len(array)
    ranks = np.arange(1, (n + 1) // 2 + 1)
    coverages = 1.0 - 2.0 * stats.binom.cdf(ranks - 1, n, 0.5)
    # Coverage falls as the rank k rises, so the number of ranks that suffice is the last of them.
    k = max(int(np.count_nonzero(coverages >= confidence)), 1)
    return Median(
        value=float(_median_of_sorted(array)),
        low=float(array[k - 1]),
        high=float(array[n - k]),
        count=n,
        missed=int(np.count_nonzero(np.isinf(array))),
        coverage=float(coverages[k - 1]),
    )


@dataclass(frozen=True, eq=False)
class Profile:
    """The performance profiles of several solvers.

    Attributes:
        taus: (t,) ratios at which the profiles are given, ascending, at least 1.
        shares: (t, solvers) rho_s(tau), in [0, 1].
        ratios: (problems, solvers) cost over the least cost of the problem; inf for a miss.
    """

    taus: Array
    shares: Array
    ratios: Array

    @property
    def wins(self) -> Array:
        """(solvers,) rho_s(1): the share of problems where s is the best; a tie counts for all."""
        return _shares(self.ratios, np.ones(1))[0]

    @property
    def solved(self) -> Array:
        """(solvers,) the limit of rho_s(tau) for large tau: the share of problems s solves."""
        return np.asarray(np.isfinite(self.ratios).mean(axis=0))

    def area(self, limit: float) -> Array:
        """The mean height of each curve over log tau, from 1 to `limit`, exactly.

        It is (1 / log T) times the integral of rho_s(tau) d(log tau) from 1 to T, which is the mean
        over problems of max(0, 1 - log r_ps / log T): 1 for a solver that is always the best, 0 for
        one that is never within T times the best. `taus` does not matter.

        Args:
            limit: T, finite and greater than 1.

        Returns:
            (solvers,) areas in [0, 1].

        Raises:
            ValueError: `limit` is not finite or not above 1.
        """
        if not (math.isfinite(limit) and limit > 1.0):
            raise ValueError(f"limit must be finite and greater than 1, got {limit}")
        return np.asarray(np.maximum(0.0, 1.0 - np.log(self.ratios) / math.log(limit)).mean(axis=0))


def performance_profile(costs: ArrayLike, *, taus: ArrayLike | None = None) -> Profile:
    """For each solver, the share of problems it solves within tau times the least cost.

    r_ps = c_ps / min_s c_ps and rho_s(tau) = #{p : r_ps <= tau} / #problems. A problem that nobody
    solves counts for nobody, and stays among the #problems. Source: Dolan and More, Benchmarking
    optimization software with performance profiles, Math. Program. 91 (2002), section 2.

    Args:
        costs: (problems, solvers), positive; inf where the solver missed.
        taus: (t,) ascending ratios, finite and at least 1; None for 1 and every other finite ratio
            that occurs, where alone the profiles jump.

    Raises:
        ValueError: No problem or no solver, a cost that is NaN or not positive, costs too far apart
            for a float, or taus that are not as said.
    """
    array = np.asarray(costs, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"costs must be (problems, solvers), not empty, got shape {array.shape}")
    _check_positive("costs", array)
    least = array.min(axis=1, keepdims=True)
    ratios = np.full(array.shape, math.inf)
    solved = np.isfinite(array)
    with np.errstate(over="ignore"):  # looked for in the next lines
        np.divide(array, least, out=ratios, where=solved)
    if np.any(np.isinf(ratios[solved])):
        # As an infinite ratio it would silently become a miss.
        raise ValueError("costs of one problem are too far apart for their ratio to be a float")
    if taus is None:
        grid = np.union1d([1.0], ratios[solved])
    else:
        grid = _vector("taus", taus)
        if grid[0] < 1.0 or np.any(np.diff(grid) <= 0.0) or math.isinf(grid[-1]):
            raise ValueError(f"taus must ascend, be finite and at least 1, got {grid}")
    return Profile(grid, _shares(ratios, grid), ratios)


@dataclass(frozen=True)
class Outcome:
    """How one run with one seed ended.

    Attributes:
        iterations: The first iteration within the tolerance; inf if it was not reached.
        gap: f - f* at the end. Rounding may leave it slightly negative.
        diverged: Whether the run was given up because it blew up. The gap then counts as inf; the
            iterations count as they are, for a tolerance may be met before that.

    Raises:
        ValueError: Iterations are NaN or negative.
    """

    iterations: float
    gap: float
    diverged: bool = False

    def __post_init__(self) -> None:
        if not self.iterations >= 0.0:
            raise ValueError(
                f"iterations must be at least 0, or inf for a miss, got {self.iterations}"
            )


@dataclass(frozen=True)
class Tuned(Generic[Setting]):
    """The best of several settings.

    Attributes:
        setting: Its key.
        by: What decided: "iterations" if it converges in the median, else "final value".
        iterations: Its median iterations to the tolerance; inf by "final value".
        gap: Its median final gap; inf if half of the runs of every setting diverged, and then
            `setting` is no more than the first one.
    """

    setting: Setting
    by: Literal["iterations", "final value"]
    iterations: float
    gap: float


def tune(outcomes: Mapping[Setting, Sequence[Outcome]]) -> Tuned[Setting]:
    """The setting of the fewest iterations in the median over seeds, else of the smallest gap.

    Settings are compared by (median iterations, median gap) in that order, and the first in the
    mapping is taken of several equal ones. Where no setting converges in the median, all first
    entries are inf and the gap decides. A gap of a diverged run, or one not finite, is inf.

    Args:
        outcomes: For each setting one outcome a seed; the same number for each, not zero.

    Raises:
        ValueError: No settings, no outcomes, or different numbers of them.
    """
    counts = {setting: len(runs) for setting, runs in outcomes.items()}
    if not counts:
        raise ValueError("outcomes must hold at least one setting, got none")
    if min(counts.values()) == 0 or len(set(counts.values())) > 1:
        # Medians over different seeds compare the seeds.
        raise ValueError(f"outcomes must hold the same seeds for each setting, got {counts}")
    medians = {setting: _medians(runs) for setting, runs in outcomes.items()}
    best = min(medians, key=lambda setting: medians[setting])  # the first of equal ones
    iterations, gap = medians[best]
    converges = math.isfinite(iterations)
    return Tuned(best, "iterations" if converges else "final value", iterations, gap)


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its bootstrap interval.

    Attributes:
        value: median(a) / median(b). inf: a misses in the median; 0: b does (all that is known is
            then that the ratio is below the finite median over the horizon); NaN: both do.
        low: Lower end of the interval.
        high: Upper end of it.
        undecided: The share of resamples where both medians miss and the ratio is inf / inf.
        count: How many pairs there were.
    """

    value: float
    low: float
    high: float
    undecided: float
    count: int


def bootstrap_ratio(
    a: ArrayLike, b: ArrayLike, *, seed: int, resamples: int = 2000, confidence: float = 0.95
) -> Ratio:
    """median(a) / median(b) over common seeds, with a percentile interval of the paired bootstrap.

    Each resample draws n seeds with replacement and takes a and b at the same ones. The ends are
    the resampled ratios that leave (1 - confidence) / 2 of them outside on either side. One that is
    undecided could be any number, so it stands at 0 for the lower end and at inf for the upper:
    dropping it would make a narrow interval of the few that happen to be decided. Source: Efron and
    Tibshirani, An Introduction to the Bootstrap (1993), section 13.3. The coverage is approximate,
    and for fewer than about ten pairs too low.

    Args:
        a: (n,) costs, positive, inf for a miss; a[i] and b[i] belong to the same seed.
        b: (n,) costs to divide by.
        seed: Of the resampling.
        resamples: How many, at least 2 / (1 - confidence), so that each end has one beyond it.
        confidence: The coverage wanted, in (0, 1).

    Raises:
        ValueError: Fewer than 2 pairs, unequal lengths, a cost that is NaN or not positive, too few
            resamples, or a confidence outside (0, 1).
    """
    _check_confidence(confidence)
    above, below = _vector("a", a), _vector("b", b)
    _check_positive("a", above)
    _check_positive("b", below)
    n = len(above)
    if len(below) != n:
        raise ValueError(f"b must be as long as a ({n}), got {len(below)} values")
    if n < 2:
        raise ValueError("a must hold at least 2 values: one pair says nothing of the scatter")
    fewest = math.ceil(round(2.0 / (1.0 - confidence), 6))  # 1 - 0.95 is not quite 0.05
    if resamples < fewest:
        raise ValueError(f"resamples must be at least {fewest}, got {resamples}")
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    ratios = _ratios_of_medians(above[drawn], below[drawn])
    undecided = np.isnan(ratios)
    # An order statistic, for interpolating as np.quantile does makes inf - inf.
    beyond = math.floor(round((1.0 - confidence) / 2.0 * resamples, 6))
    return Ratio(
        value=float(_ratios_of_medians(above[None], below[None])[0]),
        low=float(np.sort(np.where(undecided, 0.0, ratios))[beyond]),
        high=float(np.sort(np.where(undecided, math.inf, ratios))[resamples - 1 - beyond]),
        undecided=float(undecided.mean()),
        count=n,
    )


def censored_summary(
    values: ArrayLike, horizon: float, *, diverged: int = 0, confidence: float = 0.95
) -> str:
    """The median, its interval and the misses in words.

    For example "566 (480 to 655), 3 of 25 not in 1000, 1 diverged". What is infinite reads "over
    1000". A sample too small for the confidence shows its range with the coverage that it has:
    "500 (range 480 to 655, 75 %), all 3 in 1000".

    Args:
        values: (n,) iterations to the tolerance, inf for a miss.
        horizon: How many iterations a run had; no finite value is above it.
        diverged: How many of the misses blew up.
        confidence: Of the interval, in (0, 1).

    Raises:
        ValueError: Values that `median_with_interval` refuses or that are beyond the horizon, a
            horizon not positive and finite, or more diverged runs than misses.
    """
    if not (math.isfinite(horizon) and horizon > 0.0):
        raise ValueError(f"horizon must be positive and finite, got {horizon}")
    array = _vector("values", values)
    median = median_with_interval(array, confidence=confidence)
    late = array[np.isfinite(array) & (array > horizon)]
    if len(late):
        raise ValueError(f"values must be at most the horizon {horizon} or inf, got {late[0]}")
    if not 0 <= diverged <= median.missed:
        raise ValueError(f"diverged must be 0 to {median.missed}, the misses, got {diverged}")
    value, low, high = (
        f"over {horizon:.10g}" if math.isinf(number) else f"{number:.10g}"
        for number in (median.value, median.low, median.high)
    )
    if median.coverage >= confidence:
        interval = f"{low} to {high}"
    else:
        interval = f"range {low} to {high}, {100.0 * median.coverage:.4g} %"
    missed = f"{median.missed} of {median.count} not" if median.missed else f"all {median.count}"
    blown_up = f", {diverged} diverged" if diverged else ""
    return f"{value} ({interval}), {missed} in {horizon:.10g}{blown_up}"


def _median_of_sorted(values: Array) -> Array:
    """The medians along the last axis of sorted values above -inf."""
    n = values.shape[-1]
    # No inf - inf can occur, so an infinite middle value makes the mean infinite, as it should.
    return np.asarray(0.5 * (values[..., (n - 1) // 2] + values[..., n // 2]))


def _ratios_of_medians(a: Array, b: Array) -> Array:
    """(m,) median(a) / median(b) along the last axis of (m, n) arrays; NaN for inf / inf."""
    above, below = (_median_of_sorted(np.sort(values, axis=-1)) for values in (a, b))
    undecided = np.isinf(above) & np.isinf(below)
    return np.divide(above, below, out=np.full(above.shape, math.nan), where=~undecided)


def _medians(runs: Sequence[Outcome]) -> tuple[float, float]:
    """The median iterations and the median gap of the runs of one setting."""
    gaps = [math.inf if run.diverged or not math.isfinite(run.gap) else run.gap for run in runs]
    iterations = np.sort(np.asarray([run.iterations for run in runs], dtype=np.float64))
    return float(_median_of_sorted(iterations)), float(_median_of_sorted(np.sort(gaps)))


def _shares(ratios: Array, taus: Array) -> Array:
    """(taus, solvers) the share of all problems whose ratio is at most tau."""
    return np.asarray((ratios[None] <= taus[:, None, None]).mean(axis=1))


def _vector(name: str, values: ArrayLike) -> Array:
    """Turn `values` into a vector of numbers above -inf, or raise a ValueError that names them."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name} must be a vector of at least 1 value, got shape {array.shape}")
    wrong = np.flatnonzero(~(array > -math.inf))
    if len(wrong):
        raise ValueError(
            f"{name} must be numbers, or inf for a miss, got {name}[{wrong[0]}] = {array[wrong[0]]}"
        )
    return array


def _check_positive(name: str, array: Array) -> None:
    """Raise a ValueError that names the first value that is NaN or not positive."""
    wrong = np.argwhere(~(array > 0.0))
    if len(wrong):
        place = ", ".join(str(index) for index in wrong[0])
        raise ValueError(
            f"{name} must be positive, or inf for a miss, got {name}[{place}] = "
            f"{array[tuple(wrong[0])]}"
        )


def _check_confidence(confidence: float) -> None:
    """Raise a ValueError unless 0 < confidence < 1."""
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
