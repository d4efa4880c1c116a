"""Level sets of functions of the plane: of the objective, and of the criterion at its target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .runs import finite
from .style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_objective", "draw_target", "on_grid"]

_FINE, _COARSE = 300, 80
# A batch of points: an objective over a large data set holds points times data in memory.
_CHUNK = 512
# Levels begin this far below the highest value: further down there is nothing to be seen.
_DEPTH = 1e-4


def on_grid(
    function: Callable[[Tensor], Tensor], extent: Sequence[float], like: Tensor
) -> tuple[Any, Any, Any]:
    """A function of points of the plane on a grid.

    Args:
        function: x -> one value; a whole batch (n, 2) in one call where it can do that.
        extent: Left, right, bottom, top.
        like: A tensor of the dtype and on the device of the points.

    Returns:
        The two coordinates and the values, each of shape (m, m), NaN where not finite.
    """
    batched = _takes_batches(function, _grid(extent, 3, like)[2])
    x, y, points = _grid(extent, _FINE if batched else _COARSE, like)
    with torch.no_grad():
        if batched:
            rows = [function(chunk) for chunk in points.split(_CHUNK)]
        else:
            rows = [function(point).reshape(1) for point in points]
    values = torch.cat(rows).detach().cpu().double().numpy()
    return x, y, finite(values.reshape(x.shape))


def draw_objective(
    axes: Axes,
    grid: tuple[Any, Any, Any],
    levels: int | Sequence[float],
    minimum: float | None,
) -> None:
    """Lines and shades at levels of f that are equally spaced in log(f - f*).

    Args:
        axes: Where to draw.
        grid: What `on_grid` returns.
        levels: How many, or the values of f themselves.
        minimum: f*; None: the least value on the grid.
    """
    x, y, f = grid
    if not np.isfinite(f).any():
        return
    base = np.nanmin(f) if minimum is None else minimum
    height = f - base
    top = np.nanmax(height)
    if not top > 0:
        return
    if isinstance(levels, int):
        heights = np.geomspace(max(np.nanmin(height), _DEPTH * top), top, levels + 1)
    else:
        heights = np.sort(np.asarray(levels, dtype=np.float64) - base)
    heights = np.unique(heights[heights > 0])
    if not len(heights) or not _visible(height, heights).any():
        return
    height = np.ma.masked_invalid(height)
    lowest = 0.1 * heights[0]
    shades = np.log10(np.ma.maximum(height, lowest))
    if len(heights) > 1:
        axes.contourf(x, y, shades, levels=np.log10(heights), cmap="Greys", alpha=0.25)
    axes.contour(x, y, height, levels=heights, colors="#b5b5b0", linewidths=0.5)


def draw_target(axes: Axes, grid: tuple[Any, Any, Any], targets: Any) -> None:
    """The level sets J = target, as thick lines; one that is out of sight is left out."""
    x, y, values = grid
    if not np.isfinite(values).any():
        return
    seen = np.unique(targets[_visible(values, targets)])
    if not len(seen):
        return
    axes.contour(x, y, np.ma.masked_invalid(values), levels=seen, colors=INK, linewidths=1.8)
    named = ", ".join(f"{target:.3g}" for target in seen)
    axes.plot([], [], color=INK, linewidth=1.8, label=f"J = {named}")


def _visible(values: Any, levels: Any) -> Any:
    """Which levels a grid has on both sides."""
    return (np.nanmin(values) < levels) & (levels < np.nanmax(values))


def _grid(extent: Sequence[float], size: int, like: Tensor) -> tuple[Any, Any, Tensor]:
    left, right, bottom, top = extent
    x, y = np.meshgrid(np.linspace(left, right, size), np.linspace(bottom, top, size))
    points = torch.from_numpy(np.stack([x.ravel(), y.ravel()], axis=-1))
    return x, y, points.to(dtype=like.dtype, device=like.device)


def _takes_batches(function: Callable[[Tensor], Tensor], points: Tensor) -> bool:
    """Whether a function gives for a batch what it gives point by point.

    The shape alone does not say so: x[0] of a batch is a point.
    """
    with torch.no_grad():
        single = torch.stack([function(point).reshape(()) for point in points])
        try:
            batch = function(points)
        except Exception:  # whatever a function for one point makes of nine of them
            return False
    return batch.shape == single.shape and torch.allclose(batch, single, equal_nan=True)
