"""All runs of the race put together: what each method is tuned to, and how it fares over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..registry import Context, Table
from .methods import METHODS
from .problems import GIVEN_SEED
from .race import HORIZON, Cell, Race, run_cell
from .statistics import (
    Profile,
    Tuned,
    bootstrap_ratio,
    censored_summary,
    median_with_interval,
    performance_profile,
    tune,
)

__all__ = [
    "Study",
    "collect",
    "grid_table",
    "profile",
    "ratio_in_words",
    "ratio_to",
    "tuned_table",
]

ROUNDING = 1e-11  # f - f* below it is none

Grid = Mapping[str, Sequence[Race]]  # setting's label -> a run a seed


@dataclass(frozen=True)
class Study:
    """The runs of some methods on some data from some starts.

    Attributes:
        data: Names of the data sets.
        methods: Names of the methods.
        seeds: Of the starts.
        runs: By (data, method): for each setting of the grid a run a seed.
    """

    data: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    runs: Mapping[tuple[str, str], Grid]

    def tuned(self, data: str, method: str) -> Tuned[str]:
        """The setting of the grid that does best in the median over the seeds."""
        grid = self.runs[data, method]
        return tune({label: [run.outcome for run in runs] for label, runs in grid.items()})

    def at_best(self, data: str, method: str) -> Sequence[Race]:
        """The runs with that setting, one a seed."""
        return self.runs[data, method][self.tuned(data, method).setting]

    def diverged(self, data: str, method: str) -> tuple[int, int]:
        """How many runs diverged, over the whole grid, and how many there are."""
        every = [run for runs in self.runs[data, method].values() for run in runs]
        return sum(run.diverged for run in every), len(every)


def collect(
    context: Context, data: Sequence[str], methods: Sequence[str], seeds: Sequence[int]
) -> Study:
    """Run all settings of all methods; finished cells are kept, and shared between checks."""
    cells = [
        Cell(name, method, seed, traces=seed == GIVEN_SEED)
        for name in data
        for method in methods
        for seed in seeds
    ]
    found = iter(context.shared().map(run_cell, cells))
    runs: dict[tuple[str, str], Grid] = {}
    for name in data:
        for method in methods:
            by_seed = [next(found) for _ in seeds]
            runs[name, method] = {
                setting_runs[0].setting.label: setting_runs
                for setting_runs in zip(*by_seed, strict=True)
            }
    return Study(tuple(data), tuple(methods), tuple(seeds), runs)


def ratio_to(study: Study, data: str, method: str, rival: str) -> float:
    """Median iterations of a tuned method over those of a tuned rival; at most 1: no slower.

    Where only the rival misses in the median it is more than the horizon, and the ratio over the
    horizon is what it is at most; where only the method does, inf. Where neither converges, the
    ratio of the medians of f - f* at the end.
    """
    mine, other = study.tuned(data, method), study.tuned(data, rival)
    if math.isfinite(mine.iterations) or math.isfinite(other.iterations):
        return mine.iterations / min(other.iterations, HORIZON)
    if math.isinf(mine.gap):
        return math.inf
    return max(mine.gap, ROUNDING) / max(other.gap, ROUNDING)


def ratio_in_words(study: Study, data: str, method: str, rival: str) -> str:
    """The ratio, saying what it is of where it is not simply of iterations."""
    mine, other = study.tuned(data, method), study.tuned(data, rival)
    ratio = ratio_to(study, data, method, rival)
    if math.isinf(ratio):
        return f"misses, {rival} does not" if math.isfinite(other.iterations) else "diverges"
    if math.isinf(mine.iterations):
        return f"both miss; of f - f*: {ratio:.2g}"
    if math.isinf(other.iterations):
        return f"below {ratio:.2f}: {rival} misses"
    interval = bootstrap_ratio(
        [run.iterations for run in study.at_best(data, method)],
        [run.iterations for run in study.at_best(data, rival)],
        seed=0,
    )
    low, high = (
        "open" if end in (0.0, math.inf) else f"{end:.2f}" for end in (interval.low, interval.high)
    )
    return f"{ratio:.2f} ({low} to {high})"


def median_gap(runs: Sequence[Race]) -> float:
    """Median of f - f* at the end; a run that is not finite has an infinite one."""
    return float(np.median([run.gap if math.isfinite(run.gap) else math.inf for run in runs]))


def tuned_table(study: Study, data: str, *, rival: str = "Adam") -> Table:
    """Every method at its best setting."""
    rows = []
    for method in study.methods:
        best, runs = study.tuned(data, method), study.at_best(data, method)
        missed = sum(run.diverged and math.isinf(run.iterations) for run in runs)
        counts = [run.iterations for run in runs]
        beside = "-"
        if method != rival and rival in study.methods and len(runs) > 1:
            beside = ratio_in_words(study, data, method, rival)
        blown_up, total = study.diverged(data, method)
        rows.append(
            (
                method,
                best.setting or "-",
                METHODS[method].tunes or "-",
                censored_summary(counts, HORIZON, diverged=missed),
                beside,
                median_gap(runs),
                float(np.median([run.seconds for run in runs])),
                f"{blown_up} of {total}",
            )
        )
    columns = (
        "method",
        "best setting",
        "of its",
        "iterations, median (95 % interval)",
        f"ratio to {rival}'s",
        "f - f* at the end",
        "seconds",
        "diverged, whole grid",
    )
    return Table(f"{data}: tuned, over {len(study.seeds)} starts", columns, rows)


def grid_table(study: Study, data: str, methods: Sequence[str]) -> Table:
    """Methods with the same grid of initial rates, setting by setting."""
    labels = list(study.runs[data, methods[0]])
    rows = []
    for label in labels:
        row: list[str] = [label]
        for method in methods:
            runs = study.runs[data, method][label]
            median = median_with_interval([run.iterations for run in runs])
            blown_up = sum(run.diverged for run in runs)
            text = f"{median.value:.4g}"
            if math.isinf(median.value):
                text = f"f - f* = {median_gap(runs):.1e}" + (
                    f", {median.missed} of {len(runs)} miss"
                )
            row.append(text + (f", {blown_up} diverged" if blown_up else ""))
        rows.append(row)
    return Table(
        f"{data}: by initial rate",
        ("rate", *methods),
        rows,
        "Median iterations to the tolerance; where the median run misses it, f - f* at the end.",
    )


def profile(study: Study) -> Profile:
    """Performance profiles over all pairs of data and start, each method tuned per data set."""
    costs = []
    for data in study.data:
        best = [study.at_best(data, method) for method in study.methods]
        costs += [[run.iterations for run in at_start] for at_start in zip(*best, strict=True)]
    return performance_profile(costs)
