"""Known jumps of a flow in t: the times between which it is smooth."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import isfinite

import torch
from torch import Tensor

__all__ = ["smooth_pieces"]


def smooth_pieces(
    start: float, horizon: float, breakpoints: Iterable[float] | None, like: Tensor
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
        ValueError: NaN or infinite; a tensor that requires grad; two that the dtype cannot tell
            apart.
    """
    if breakpoints is None:
        return (start, horizon), False
    given: object = breakpoints
    if isinstance(given, Tensor):
        given = given.reshape(-1).unbind()
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
        if value.requires_grad:
            raise ValueError(
                "breakpoints must be constants; got a tensor that requires grad. The stopping time "
                "is not differentiated to the times of the jumps: detach them, or make the jump a "
                "steep smooth function of t - b"
            )
        value = value.item() if value.numel() == 1 else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"breakpoints must hold numbers; got {type(value).__name__}")
    if not isfinite(value):
        raise ValueError(f"breakpoints must be finite; got {value}")
    return float(value)
