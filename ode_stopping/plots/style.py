"""The look of the pictures: colours, an empty figure, a legend that stays off the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import Tensor

from ..core.optional import optional_module

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "COLOURS",
    "DASHES",
    "GREY",
    "GRID",
    "INK",
    "MARKERS",
    "array",
    "canvas",
    "is_log",
    "legend",
    "look",
]

# Okabe and Ito's colours without black and yellow, and two more: colour-blind readers can tell them
# apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4B8A", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
INK = "#333333"
GREY = "#555555"
GRID = "#e4e4e0"
DASHES = (0, (4, 3))

_SIZE = (6.4, 4.0)
# More entries than this cover data wherever they are put.
_LARGEST_LEGEND = 4


def canvas(axes: Axes | None, what: str) -> Axes:
    """The axes to draw on; None makes a figure, which a notebook shows by itself.

    What is set here is set on the axes and not in rcParams: ticks are made when the figure is
    drawn, and would otherwise have another look than the rest.

    Args:
        axes: The user's, which keep their look, or None.
        what: Who needs matplotlib, for the error.

    Raises:
        ImportError: Matplotlib is missing; the message says what to install.
    """
    pyplot = optional_module("matplotlib.pyplot", what)
    if axes is not None:
        return axes
    _, made = pyplot.subplots(figsize=_SIZE, layout="constrained")
    made.set_prop_cycle(color=COLOURS)
    made.spines[["top", "right"]].set_visible(False)
    made.spines[["left", "bottom"]].set(color=INK, linewidth=0.7)
    made.grid(visible=True, color=GRID, linewidth=0.6)
    made.set_axisbelow(True)
    new: Axes = made
    return new


def legend(axes: Axes, *, outside: bool = False) -> None:
    """A legend of what has a label: inside where it is short, else to the right of the axes."""
    count = len(axes.get_legend_handles_labels()[1])
    if not count:
        return
    if outside or count > _LARGEST_LEGEND:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, frameon=False)
    else:
        axes.legend(loc="best", framealpha=0.85, edgecolor="none")


def look(*, iterates: bool, count: int) -> dict[str, Any]:
    """Flows are lines, iterations dots that a dotted line joins; the more there are, the smaller.

    Lines are above dots: a thin line on dots leaves both to be seen.
    """
    if not iterates:
        return {"linewidth": 1.4, "zorder": 3.5}
    size = 6.0 if count <= 100 else 4.0 if count <= 400 else 2.0
    return {"linestyle": ":", "linewidth": 0.9, "marker": ".", "markersize": size, "zorder": 3}


def is_log(log: bool | Literal["auto"], values: Sequence[Any]) -> bool:
    """Whether a y axis is to be logarithmic; "auto": where every value on it is positive."""
    if log != "auto":
        return bool(log)
    shown = np.concatenate([np.asarray(part)[np.isfinite(part)] for part in values])
    return bool(len(shown)) and bool((shown > 0).all())


def array(values: Any) -> Any:
    """Tensors (of any device, with a graph or not), sequences of them and numbers, as float64."""
    if isinstance(values, Tensor):
        return values.detach().cpu().double().numpy()
    if isinstance(values, list | tuple):
        return np.array([array(value) for value in values], dtype=np.float64)
    return np.asarray(values, dtype=np.float64)
