"""Orders beyond the paper: the fractional index, and rules of higher order."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..plotting import new_figure, slope_plot
from ..registry import Context, Figure, Outcome, check
from ..slopes import fit_slope
from ._cells import Result, Series, fit_details, row_table, run_series
from ._problems import Setup

# Bars on the slope of the gradient's error, and what theory gives.
BARS = {
    ("Heun", "hermite"): (1.85, 2.0),
    ("RungeKutta4", "hermite"): (2.7, 3.0),
    ("RungeKutta4", "partial_step"): (3.7, 4.0),
}
TIME_BARS = {("RungeKutta4", "partial_step"): (3.7, 4.0)}
RTOL = 1e-12
_PER_OCTAVE = 3
_SHORT = {"Heun": "Heun", "RungeKutta4": "RK4"}


@check(
    name="orders-higher",
    title="Orders of Heun and Runge-Kutta 4 with a fractional index",
    source="Beyond the paper (fractional index)",
    group="orders",
    order=60,
)
def orders_higher(context: Context) -> Outcome:
    """A partial last step keeps a rule's order p; differentiating a Hermite cubic leaves order 3.

    A partial last step keeps it in the index and in its gradient; the cubic Hermite interpolant is
    of order 4 and loses one when it is differentiated, which does not limit Heun's 2. On the
    quartic problem, where nothing is linear. The reference (rtol 1e-12) limits what can be seen
    below errors of about 1e-11.
    """
    setup = Setup.of(context, "quartic", 1e-2, dim=10, condition=10.0)
    # RK4 is stable for h L p < 2.78, and its fourth-order term dominates well below 1.
    count = context.choose(quick=10, paper=20)
    fractions = tuple(float(v) for v in np.geomspace(0.6, 0.06, count))
    series = [
        Series(setup, fractions, update, interpolation, RTOL) for update, interpolation in BARS
    ]
    results = dict(zip(BARS, run_series(context, series), strict=True))
    names = {key: f"{_SHORT[key[0]]}, {key[1]}".replace("_", " ") for key in BARS}
    measured = {names[key]: r.study.slope.slope for key, r in results.items()}
    bars = {names[key]: bar for key, (bar, _) in BARS.items()}
    orders = {names[key]: order for key, (_, order) in BARS.items()}
    for key, (bar, order) in TIME_BARS.items():
        name = f"{names[key]}: value of the index"
        fit = results[key].study.time_slope
        measured[name] = float("nan") if fit is None else fit.slope
        bars[name], orders[name] = bar, order
    return Outcome(
        measured=measured,
        expected=orders,
        tolerance={name: f"at least {bar:g}" for name, bar in bars.items()},
        passed=all(measured[name] >= bars[name] for name in bars),
        details={
            "why more than 3 with Hermite": "the error of RK4 itself, of order 4, is the larger "
            "part at these step sizes; the interpolant's, of order 3, takes over below them",
            "fits": {names[key]: fit_details(r.study.slope) for key, r in results.items()},
            "problem": results["Heun", "hermite"].instance.description,
        },
        tables=[row_table(names[key], r) for key, r in results.items()],
        figures=[_orders_figure({names[key]: r for key, r in results.items()})],
        interval=results["Heun", "hermite"].study.slope.interval,
    )


@check(
    name="orders-log-index",
    title="The log-linear fractional index with Euler",
    source="Beyond the paper (fractional index)",
    group="orders",
    order=61,
)
def orders_log_index(context: Context) -> Outcome:
    """On an exponential tail the log-linear index halves Definition 3's error, or better.

    It is smooth in h, besides: Richardson extrapolation, 2 g(h/2) - g(h), gains an order on it, and
    none on Definition 3's sawtooth. Valid where log J is linear in t: a quadratic (condition 10,
    d = 5) followed so far down that its slowest mode is all that is left.
    """
    setup = Setup.of(context, "quadratic", 1e-8, dim=5, condition=10.0)
    octaves = context.choose(quick=3, paper=6)
    count = _PER_OCTAVE * octaves + 1
    fractions = tuple(0.5 * 2.0 ** (-k / _PER_OCTAVE) for k in range(count))
    kinds = {"Definition 3": None, "log-linear": "log"}
    series = [Series(setup, fractions, "Euler", kind, 1e-10) for kind in kinds.values()]
    results = dict(zip(kinds, run_series(context, series), strict=True))
    gains = {name: _extrapolated(result) for name, result in results.items()}
    plain, logged = (results[name].study for name in kinds)
    ratios = np.array(plain.gradient_errors) / np.array(logged.gradient_errors)
    ratio = float(np.exp(np.log(ratios).mean()))
    h = plain.h[:-_PER_OCTAVE]
    fits = {name: fit_slope(h, gain) for name, gain in gains.items()}
    measured = {
        "Richardson on log-linear, slope": fits["log-linear"].slope,
        "log-linear, slope": logged.slope.slope,
        "Definition 3 error / log-linear error": ratio,
    }
    return Outcome(
        measured=measured,
        expected={
            "Richardson on log-linear, slope": 2.0,
            "log-linear, slope": 1.0,
            "Definition 3 error / log-linear error": "at least 2",
        },
        tolerance={
            "Richardson on log-linear, slope": "at least 1.85",
            "log-linear, slope": 0.1,
            "Definition 3 error / log-linear error": "at least 2",
        },
        passed=(
            fits["log-linear"].slope >= 1.85
            and abs(logged.slope.slope - 1.0) <= 0.1
            and ratio >= 2.0
        ),
        details={
            "Richardson on Definition 3, slope (no claim)": fits["Definition 3"].slope,
            "fits": {name: fit_details(fit) for name, fit in fits.items()},
            "problem": results["log-linear"].instance.description,
        },
        tables=[row_table(name, r) for name, r in results.items()],
        figures=[_log_figure(results, gains, fits)],
        interval=fits["log-linear"].interval,
    )


def _extrapolated(result: Result) -> list[float]:
    """Relative errors of 2 g(h/2) - g(h), the largest h first."""
    truth, runs = result.study.reference.gradient, result.runs
    return [
        float((2 * half.gradient - full.gradient - truth).norm() / truth.norm())
        for full, half in zip(runs, runs[_PER_OCTAVE:], strict=False)
    ]


def _orders_figure(results: dict[str, Result]) -> Figure:
    figure, (left, right) = new_figure(1, 2)
    h = next(iter(results.values())).study.h
    gradients: dict[str, Any] = {
        name: (r.study.gradient_errors, r.study.slope) for name, r in results.items()
    }
    times: dict[str, Any] = {
        name: (r.study.time_errors, r.study.time_slope) for name, r in results.items()
    }
    xlabel = r"step size $h$ (flow time)"
    slope_plot(left, h, gradients, xlabel, r"relative error of $h\,dN^*/d\theta$", expected=None)
    slope_plot(right, h, times, xlabel, r"relative error of $t_0 + hN^*$", expected=None)
    for axes in (left, right):
        # Room for the legend above three rising lines.
        axes.set_ylim(top=300.0 * axes.get_ylim()[1])
        axes.legend(loc="upper left")
    left.set_title("gradient")
    right.set_title("value")
    caption = (
        "Quartic problem. Left: error of the gradient of the fractional index; right: of its "
        "value. Slopes with 95 % intervals; theory: Heun 2, RK4 with Hermite 3 for the gradient "
        "and 4 for the value, RK4 with a partial last step 4 for both."
    )
    return Figure("orders", caption, figure)


def _log_figure(
    results: dict[str, Result], gains: dict[str, list[float]], fits: dict[str, Any]
) -> Figure:
    figure, axes = new_figure()
    study = results["log-linear"].study
    missing = [float("nan")] * _PER_OCTAVE
    series: dict[str, Any] = {
        name: (r.study.gradient_errors, r.study.slope) for name, r in results.items()
    }
    series |= {
        f"Richardson, {name}": ([*gain, *missing], fits[name]) for name, gain in gains.items()
    }
    slope_plot(axes, study.h, series, r"step size $h$ (flow time)", expected=None)
    axes.set_ylabel("relative error of the gradient")
    axes.set_ylim(bottom=axes.get_ylim()[0] / 30.0)
    axes.legend(loc="lower right")
    caption = (
        "Exponential tail, Euler. The log-linear index is smooth in h, so that extrapolating from "
        "h and h/2 gains an order; the sawtooth of Definition 3 lets it gain nothing."
    )
    return Figure("log-linear", caption, figure)
