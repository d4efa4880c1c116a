"""Stopping times over a hyperparameter, with the slopes that the library computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.status import StoppingError
from .style import array, canvas, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_sensitivity", "sweep"]

# A tangent takes up this part of the space between neighbours, and of the height of the picture.
_WIDTH, _HEIGHT = 0.7, 0.25


def sweep(function: Callable[[Tensor], Any], values: Iterable[Any]) -> tuple[Tensor, Tensor]:
    """Stopping times (or indices) over a hyperparameter, and their derivatives.

    Args:
        function: theta, a 0-d float64 tensor that requires grad -> the result of `stopping_time`
            (its `time` is taken) or of `stopping_index` (its `steps`), or a 0-d tensor: a time or
            an entry of a state of `integrate`.
        values: Values of theta.

    Returns:
        T or N and its derivative to theta, each of shape (m,), float64, without a graph. A run that
        missed its target, or ended in a `StoppingError`, has infinity and NaN; so has a tensor that
        is not finite.

    Raises:
        ValueError: A result has no gradient to theta, or several targets.
    """
    times, slopes = [], []
    for value in array(list(values)).tolist():
        theta = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        try:
            with torch.enable_grad():
                result = function(theta)
        except StoppingError:
            times.append(float("inf"))
            slopes.append(float("nan"))
            continue
        time, slope = _slope(result, theta)
        times.append(time)
        slopes.append(slope)
    return torch.tensor(times, dtype=torch.float64), torch.tensor(slopes, dtype=torch.float64)


def plot_sensitivity(
    values: Any,
    results_or_times: Any,
    gradients: Any = None,
    *,
    axes: Axes | None = None,
    label: str | None = None,
    color: Any = None,
    tangent_length: float | None = None,
    connected: bool = True,
) -> Axes:
    """T(theta) or N(theta) over a scalar hyperparameter, with tangents of the given slopes.

    Misses (infinite times) are gaps, and crosses at the top edge.

    Args:
        values: theta, shape (m,).
        results_or_times: T or N there, shape (m,), or the results themselves.
        gradients: The derivatives, shape (m,), NaN where there is none; None draws no tangents.
        axes: Where to draw; None makes a figure.
        label: Name of the curve for the legend.
        color: Of the curve; None: the cycle of the axes.
        tangent_length: Width of the tangents, in the unit of theta; None: what fits between
            neighbours.
        connected: Join the points by a line; not where the quantity jumps.

    Returns:
        The axes.

    Raises:
        ImportError: Matplotlib is missing.
        ValueError: Shapes that do not match; results of several targets.
    """
    theta = array(values).reshape(-1)
    times, quantity = _times(results_or_times)
    slopes = None if gradients is None else array(gradients).reshape(-1)
    for name, given in (("results_or_times", times), ("gradients", slopes)):
        if given is not None and given.shape != theta.shape:
            raise ValueError(f"{name} must have shape {theta.shape}, as values; got {given.shape}")
    axes = canvas(axes, "plot_sensitivity")
    met = np.isfinite(times)
    shown = np.where(met, times, np.nan)
    (line,) = axes.plot(
        theta,
        shown,
        linestyle="-" if connected else "none",
        marker=".",
        markersize=5,
        linewidth=1.4,
        color=color,
        label=label,
    )
    if slopes is not None and met.any():
        _draw_tangents(axes, theta, shown, slopes, tangent_length)
    if not met.all():
        axes.plot(
            theta[~met],
            np.ones((~met).sum()),
            linestyle="none",
            marker="x",
            markersize=6,
            color=line.get_color(),
            transform=axes.get_xaxis_transform(),
            clip_on=False,
            label="target not reached",
        )
    axes.set(xlabel=r"hyperparameter $\theta$", ylabel=quantity)
    legend(axes)
    return axes


def _draw_tangents(axes: Axes, theta: Any, times: Any, slopes: Any, length: float | None) -> None:
    usable = np.isfinite(slopes) & np.isfinite(times)
    half = np.full(theta.shape, np.nan if length is None else length / 2)
    if length is None:
        half = 0.5 * _WIDTH * _spacing(theta)
        # A steep tangent must not stretch the axis until the curve is flat.
        room = 0.5 * _HEIGHT * (float(np.ptp(times[np.isfinite(times)])) or 1.0)
        steepest = np.abs(slopes[usable])
        half[usable] = np.minimum(half[usable], room / np.maximum(steepest, 1e-300))
    half, theta, times, slopes = (part[usable] for part in (half, theta, times, slopes))
    # One line for all, broken by NaN: one entry of the legend.
    gap = np.full(theta.shape, np.nan)
    x = np.stack([theta - half, theta + half, gap], axis=-1)
    y = np.stack([times - slopes * half, times + slopes * half, gap], axis=-1)
    axes.plot(x.ravel(), y.ravel(), color="black", linewidth=1.8, zorder=4, label="tangents")


def _spacing(theta: Any) -> Any:
    """The distance of each value from its nearest neighbour."""
    if len(theta) < 2:
        return np.full(theta.shape, 0.2 * float(np.abs(theta).max(initial=0.0)) or 1.0)
    distances = np.abs(theta[:, None] - theta[None, :])
    distances[distances == 0] = np.inf
    nearest = distances.min(axis=1)
    return np.where(np.isfinite(nearest), nearest, 1.0)


def _times(given: Any) -> tuple[Any, str]:
    """Times as an array, and what they are."""
    if not isinstance(given, Tensor | np.ndarray):
        given = list(given)
        if any(hasattr(entry, "reached") for entry in given):
            steps = [hasattr(result, "steps") for result in given]
            name = "stopping index N (steps)" if all(steps) else "stopping time T (flow time)"
            return np.array([_reached(_quantity(result), result) for result in given]), name
    return array(given).reshape(-1), "stopping time"


def _quantity(result: Any) -> Tensor:
    """N of an iteration, T of a flow; a tensor is it already."""
    if isinstance(result, Tensor):
        found = result
    else:
        found = result.steps if hasattr(result, "steps") else result.time
    if found.ndim:
        raise ValueError(
            f"one target at a time: the result has {found.numel()}; pass result.time[k] and its "
            "gradients as arrays"
        )
    return found


def _reached(time: Tensor, result: Any) -> float:
    """T or N; infinity for a miss, whatever a miss was told to count as."""
    return float(time.detach()) if bool(result.reached) else float("inf")


def _slope(result: Any, theta: Tensor) -> tuple[float, float]:
    time = _quantity(result)
    met = torch.isfinite(time) if isinstance(result, Tensor) else result.reached
    if not bool(met):
        return float("inf"), float("nan")
    slope = None
    if time.requires_grad:
        (slope,) = torch.autograd.grad(time, theta, allow_unused=True)
    if slope is None:
        raise ValueError(
            "the result has no gradient to theta: function must use its argument as it is "
            "(no float(), .item() or .detach()), and keep the gradient route"
        )
    return float(time.detach()), float(slope)
