"""Pictures of the race."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..plotting import COLOURS, MARKERS, log_axes, new_figure
from .problems import load
from .race import HORIZON, Race
from .statistics import Profile, median_with_interval
from .study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_profiles", "draw_rates", "draw_traces"]

_FLOOR = 1e-11  # below it f - f* is rounding
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)))


def draw_traces(study: Study, data: str, seed: int) -> Figure:
    """f - f* over iterations and over time, and the learning rates, from one start."""
    figure, (by_step, by_time, rates) = new_figure(1, 3, width=4.0, height=3.6)
    place, minimum = study.seeds.index(seed), load(data).minimum
    for number, method in enumerate(study.methods):
        run: Race = study.at_best(data, method)[place]
        setting = study.tuned(data, method).setting
        gaps = np.maximum(run.values - minimum, _FLOOR)
        gaps = np.where(gaps < 1e8, gaps, np.nan)
        look = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": _DASHES[number // len(COLOURS)],
            "linewidth": 1.1,
        }
        name = method + (f" ({setting})" if setting else "")
        by_step.plot(np.arange(1, len(gaps) + 1), gaps, label=name, **look)
        by_time.plot(np.maximum(run.times, 1e-5), gaps, **look)
        positive = np.where(run.rates > 0, run.rates, np.nan)
        if len(positive) and np.ptp(positive[np.isfinite(positive)]) > 0:
            rates.plot(np.arange(1, len(positive) + 1), positive, **look)
        below = np.flatnonzero(run.rates <= 0)
        if len(below):  # from here on the trace has no place on the axis
            last = max(int(below[0]), 1)
            rates.plot(last, run.rates[last - 1], marker="X", color=look["color"], clip_on=False)
    by_step.set(yscale="log", xlabel="iteration", ylabel=r"$f - f^*$", title=data)
    by_time.set(yscale="log", xlabel="seconds", ylabel=r"$f - f^*$", xscale="log")
    rates.set(yscale="log", xlabel="iteration", ylabel="learning rate")
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_profiles(profile: Profile, methods: Sequence[str]) -> Figure:
    """rho(tau) of every method."""
    figure, axes = new_figure(width=4.4, height=3.4)
    last = max(2.0, float(profile.taus[-1])) * 1.05
    for number, method in enumerate(methods):
        shares = profile.shares[:, number]
        axes.step(
            [1.0, *profile.taus, last],
            [shares[0], *shares, shares[-1]],
            where="post",
            label=method,
            color=COLOURS[number % len(COLOURS)],
            linestyle=_DASHES[number // len(COLOURS)],
        )
    axes.set(xlabel=r"$\tau$, times the fewest iterations", ylabel=r"share within $\tau$")
    axes.set_ylim(-0.02, 1.02)
    log_axes(axes, y=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def draw_rates(study: Study, methods: Sequence[str]) -> Figure:
    """Iterations over the initial rate, medians with intervals, one set of axes a data set."""
    columns = min(len(study.data), 3)
    rows = math.ceil(len(study.data) / columns)
    figure, grid = new_figure(rows, columns, width=3.4, height=2.8, sharey=True)
    every = [grid] if rows * columns == 1 else list(grid.flat)
    for axes, data in zip(every, study.data, strict=False):
        _draw_rates_of(axes, study, data, methods)
    for axes in every[len(study.data) :]:
        axes.set_visible(False)
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(methods))
    return figure


def _draw_rates_of(axes: Any, study: Study, data: str, methods: Sequence[str]) -> None:
    for number, method in enumerate(methods):
        found = []
        for runs in study.runs[data, method].values():
            median = median_with_interval([run.iterations for run in runs])
            ends = (median.low, median.value, median.high)
            found.append((runs[0].setting.value, *(min(end, HORIZON) for end in ends)))
        rates, low, middle, high = np.array(sorted(found)).T
        shift = 1.0 + 0.12 * (number - (len(methods) - 1) / 2)
        axes.errorbar(
            rates * shift,
            middle,
            yerr=[middle - low, high - middle],
            color=COLOURS[number],
            marker=MARKERS[number],
            capsize=2,
            label=method,
        )
    axes.set(title=data, xlabel="initial rate", ylim=(0, 1.04 * HORIZON))
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("iterations (at the top: missed)")
    log_axes(axes, y=False)
