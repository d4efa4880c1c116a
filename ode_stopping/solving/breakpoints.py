"""Known jumps of a flow in t: the times between which it is smooth."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_list", "learned_times", "smooth_pieces"]


def as_list(breakpoints: object) -> Any:
    """The breakpoints as a list, for an iterator can be gone through once; else as they are."""
    if isinstance(breakpoints, Tensor):
        return list(breakpoints.reshape(-1).unbind())
    if isinstance(breakpoints, str) or not isinstance(breakpoints, Iterable):
        return breakpoints  # (None, or what `smooth_pieces` refuses)
    return list(breakpoints)


def learned_times(breakpoints: object) -> tuple[Tensor, ...]:
    """Those of the listed breakpoints that require grad, each of shape ()."""
    if not isinstance(breakpoints, list | tuple):
        return ()
    tensors = [one for one in breakpoints if isinstance(one, Tensor) and one.requires_grad]
    return tuple(one.reshape(()) for one in tensors)


def smooth_pieces(
    start: float, horizon: float, breakpoints: Iterable[float | Tensor] | None, like: Tensor
) -> tuple[tuple[float, ...], bool]:
    """The start, the breakpoints in between in order, and the horizon.

    Args:
        start: t0, in flow time.
        horizon: Latest time, in flow time.
        breakpoints: Times at which the flow jumps; those outside of [start, horizon) do not matter.
        like: A state, for the dtype in which the flow sees t.

    Returns:
        The times, and whether the flow jumps at the start itself.

    Raises:
        TypeError: Not a collection of numbers.
        ValueError: NaN or infinite; two that the dtype cannot tell apart.
    """
    if breakpoints is None:
        return (start, horizon), False
    given: object = breakpoints
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(
            f"breakpoints must be a collection of times; got {type(breakpoints).__name__}"
        )
    times = sorted({_checked(b) for b in given})
    inside = [t for t in times if start < t < horizon]
    pieces = (start, *inside, horizon)
    for first, second in pairwise(pieces) if inside else ():
        seen = torch.tensor([first, second], dtype=like.dtype)
        if not bool(seen[1] > seen[0]):
            raise ValueError(
                f"breakpoints must be told apart by {like.dtype}, in which the flow sees t; got "
                f"{first!r} and {second!r}"
            )
    return pieces, start in times


def _checked(value: object) -> float:
    if isinstance(value, Tensor):
        value = value.detach().item() if value.numel() == 1 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"breakpoints must hold numbers; got {type(value).__name__}")
    if not isfinite(value):
        raise ValueError(f"breakpoints must be finite; got {value}")
    return float(value)
