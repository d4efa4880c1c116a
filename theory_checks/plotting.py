"""Figures of one style, made without pyplot: no window, no global state, safe in any process."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ode_stopping.plots.style import COLOURS, DASHES, GREY, GRID, INK, MARKERS

from .slopes import SlopeFit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "DPI",
    "MARKERS",
    "STYLE",
    "log_axes",
    "new_figure",
    "slope_plot",
    "style",
    "to_png",
]

DPI = 150

STYLE: dict[str, Any] = {
    "font.family": "serif",
    "font.serif": ["STIXGeneral", "DejaVu Serif"],
    "mathtext.fontset": "stix",
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.0,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "xtick.direction": "out",
    "ytick.direction": "out",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def style() -> AbstractContextManager[None]:
    """The report's style as a context; the runner holds it around every check.

    Raises:
        ImportError: Matplotlib is missing; the message says what to install.
    """
    context: AbstractContextManager[None] = _require("matplotlib").rc_context(STYLE)
    return context


def to_png(figure: Figure, *, dpi: float = DPI) -> bytes:
    """The figure as the bytes of a PNG file, without a date in it."""
    buffer = io.BytesIO()
    with style():  # fonts are looked up when a figure is drawn, not when it is made
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def new_figure(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 3.6,
    height: float = 2.9,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, Any]:
    """An empty figure in the report's style.

    Args:
        rows: Rows of axes.
        columns: Columns of axes.
        width: Inches for one set of axes; a lone one gets a third more.
        height: Inches for one set of axes, likewise.
        sharex: Whether the axes share their x range.
        sharey: Whether the axes share their y range.

    Returns:
        The figure and its axes: one `Axes` for a 1 x 1 figure, else the array of shape (rows,
        columns) with axes of length one dropped, as from `pyplot.subplots`.

    Raises:
        ImportError: Matplotlib is missing; the message says what to install.
        ValueError: `rows` or `columns` below 1.
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be at least 1, got {rows} and {columns}")
    matplotlib = _require("matplotlib")
    _require("matplotlib.figure")
    agg = _require("matplotlib.backends.backend_agg")
    scale = 4.0 / 3.0 if rows * columns == 1 else 1.0
    with style():
        figure = matplotlib.figure.Figure(
            figsize=(columns * width * scale, rows * height * scale), layout="constrained"
        )
        agg.FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, sharex=sharex, sharey=sharey)
    every = [axes] if rows * columns == 1 else list(axes.flat)
    for one in every:
        one.set_prop_cycle(color=COLOURS)
    return figure, axes


def slope_plot(
    axes: Axes,
    h: Any,
    series: Mapping[str, tuple[Any, SlopeFit | None]],
    xlabel: str = r"step size $h$",
    ylabel: str = "relative error",
    *,
    expected: float | None = 1.0,
) -> None:
    """Errors over step sizes on log axes, with fitted lines and the expected slope.

    Args:
        axes: Where to draw.
        h: (n,) step sizes.
        series: By name the (n,) errors, NaN where there is none, and their fit or None; the legend
            shows name, slope and confidence interval.
        xlabel: The quantity and unit of h.
        ylabel: The quantity and unit of the errors.
        expected: The slope of the dashed reference line, drawn below all points; None for none.
    """
    steps = _vector(h)
    with style():
        for position, (name, (errors, fit)) in enumerate(series.items()):
            _draw_series(axes, position, name, steps, _vector(errors), fit)
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
        axes.grid(visible=True, which="major")
        axes.minorticks_on()
        if expected is not None:
            _draw_reference(axes, steps, [_vector(e) for e, _ in series.values()], expected)
        log_axes(axes)
        axes.legend(loc="best")


def log_axes(axes: Axes, *, y: bool = True) -> None:
    """Logarithmic axes, with labels that do not run into each other.

    Matplotlib labels every minor tick of an axis of about a decade; here 2 and 5 are labelled on
    an axis of less than two decades, and powers of ten only on a longer one.

    Args:
        axes: Where the data are, or will be.
        y: Whether y is logarithmic as well as x.
    """
    ticker = _require("matplotlib.ticker")
    axes.set_xscale("log")
    if y:
        axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis) if y else (axes.xaxis,):
        axis.set_minor_formatter(ticker.FuncFormatter(partial(_minor_label, axis)))


def _minor_label(axis: Any, value: float, position: int | None = None) -> str:
    """2 x 10^e and 5 x 10^e where the axis is short."""
    low, high = sorted(axis.get_view_interval())
    exponent = math.floor(math.log10(value) + 1e-9)
    mantissa = round(value / 10.0**exponent)
    if high >= 100.0 * low or mantissa not in (2, 5):
        return ""
    return rf"${mantissa}\times10^{{{exponent}}}$"


def _draw_series(
    axes: Axes, position: int, name: str, steps: Any, errors: Any, fit: SlopeFit | None
) -> None:
    """Points of one series and its fitted line, labelled with slope and interval."""
    colour = COLOURS[position % len(COLOURS)]
    label = name
    if fit is not None:
        label = f"{name}: {fit.slope:.3f}  [{fit.low:.3f}, {fit.high:.3f}]"
        ends = np.array([steps.min(), steps.max()])
        axes.plot(ends, fit.predict(ends), color=colour, linewidth=1.0, alpha=0.8)
    axes.plot(
        steps,
        errors,
        linestyle="none" if fit is not None else ":",
        marker=MARKERS[position % len(MARKERS)],
        color=colour,
        markerfacecolor="white",
        label=label,
    )


def _draw_reference(axes: Axes, steps: Any, errors: list[Any], slope: float) -> None:
    """A dashed line of the expected slope, below the lowest point over the range of h."""
    ratios = [values / steps**slope for values in errors]
    usable = [r[np.isfinite(r) & (r > 0)] for r in ratios]
    lowest = [float(r.min()) for r in usable if len(r)]
    if not lowest:
        return
    ends = np.array([steps.min(), steps.max()])
    axes.plot(
        ends,
        0.5 * min(lowest) * ends**slope,
        color=GREY,
        linestyle=DASHES,
        linewidth=1.0,
        label=f"expected slope {slope:g}",
    )


def _vector(values: Any) -> Any:
    """`values` as a float64 vector; tensors are detached."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _require(module: str) -> Any:
    """Import a part of matplotlib, or say what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError('figures need matplotlib: pip install "ode-stopping[checks]"') from error
