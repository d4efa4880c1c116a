"""J over flow time or steps as a curve: its values, what is drawn between them, its marks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.interpolate import PchipInterpolator

from .runs import POINTS, View, between, finite
from .style import DASHES, GREY, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Curve", "draw_targets", "keep_in_sight", "mark"]

# Beyond so many, markers run into each other.
_MARKED = 100


class Curve:
    """What is drawn of a run: the points where it was looked at, and the line through them."""

    def __init__(self, view: View, x: Any, y: Any, *, smooth: bool) -> None:
        self.view = view
        self.x = x
        self.y = y
        self._smooth = smooth  # whether something is to be drawn between the points

    @classmethod
    def of(
        cls,
        view: View,
        criterion: Callable[..., Any] | None,
        *,
        in_time: bool,
        coordinate: int | None = None,
    ) -> Curve:
        """J, or a coordinate, along a run."""
        if coordinate is not None:
            at, path = view.positions()
            return cls(
                view, view.axis(at, in_time=in_time), finite(path[:, coordinate]), smooth=False
            )
        if criterion is not None and not view.iterates:
            return cls(view, *view.along(criterion), smooth=False)
        return cls(view, *view.values(in_time=in_time), smooth=not view.iterates)

    def at(self, where: Any, *, log: bool) -> Any:
        """The curve at other places, on the line that is drawn."""
        usable = np.isfinite(self.y) & ((self.y > 0) | (not log))
        if not usable.any():
            return np.full(len(where), np.nan)
        x, first = np.unique(self.x[usable], return_index=True)  # increasing, as splines want it
        y = self.y[usable][first]
        heights = np.log(y) if log else y
        if self._smooth and len(x) > 1:
            with np.errstate(over="ignore", invalid="ignore"):  # a J that runs away
                found = PchipInterpolator(x, heights)(np.clip(where, x[0], x[-1]))
        else:
            found = np.interp(where, x, heights)
        return np.exp(found) if log else found

    def draw(
        self, axes: Axes, *, label: str | None, color: Any, log: bool, dots: bool = True
    ) -> Any:
        """The line, with markers where the run was looked at; returns it."""
        x, y, every = self.x, self.y, 1
        if self._smooth and np.isfinite(y).all() and len(x) > 1:
            x = between(self.x, POINTS)
            every = (len(x) - 1) // (len(self.x) - 1)
            y = self.at(x, log=log)
        drawn = look(iterates=self.view.iterates, count=len(self.x))
        if dots and self._smooth and len(self.x) <= _MARKED:
            drawn |= {"marker": ".", "markersize": 5, "markevery": every}
        (line,) = axes.plot(x, y, label=label, color=color, **drawn)
        return line


def draw_targets(axes: Axes, targets: Any) -> None:
    """A dashed line at each target."""
    for index, target in enumerate(targets):
        label = f"target {target:.4g}" if len(targets) == 1 else "targets"
        axes.axhline(
            target,
            color=GREY,
            linestyle=DASHES,
            linewidth=1.0,
            zorder=1.5,
            label=label if index == 0 else None,
        )


def mark(axes: Axes, where: Any, heights: Any, color: Any, outcome: str, view: View) -> None:
    """A large dot at each crossing; labelled for a run that is drawn alone."""
    if not len(where):
        return
    axes.plot(
        where,
        heights,
        linestyle="none",
        marker="o",
        markersize=7 if view.iterates else 8,
        color=color,
        markeredgecolor="white",
        zorder=5 if view.iterates else 6,
        label=outcome if view.name is None and outcome else None,
    )


def keep_in_sight(axes: Axes, shown: Sequence[View], curves: Sequence[Any]) -> None:
    """Cut the y axis off above what did not diverge: the rest would be a flat line at its foot."""
    calm = [y for view, y in zip(shown, curves, strict=True) if not view.diverged]
    if len(calm) in (0, len(shown)) or not np.isfinite(np.concatenate(calm)).any():
        return
    kept = np.concatenate([*calm, *(y[:1] for y in curves)])
    low, high = float(np.nanmin(kept)), float(np.nanmax(kept))
    # Matplotlib's margins are those of the whole range: the lower end has to be set as well.
    if axes.get_yscale() == "log" and low > 0:
        axes.set_ylim(0.5 * low, 10.0 * high)
    else:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.3 * (high - low))
