"""Is it a crossing? The verdict on a point at which J meets its target."""

from __future__ import annotations

import torch

from ..call import Call, Watch
from ..core.status import Status
from .point import Crossing

__all__ = ["jump_note", "verdict"]


def verdict(call: Call, watch: Watch, point: Crossing, *, grazing: bool) -> tuple[Status, str]:
    """REACHED, DEGENERATE or DIVERGED, and a sentence on it.

    Args:
        call: What was asked.
        watch: What was met.
        point: What is known there.
        grazing: Whether J turned back next to the target, within its error.
    """
    if not point.is_finite():
        return Status.DIVERGED, "a derivative at the crossing is not finite"
    # (J falls to its target: where it rises there, T is behind the bottom of a dip.)
    if grazing or not point.is_transversal(call.tolerances.rtol) or point.rate > 0:
        rate = watch.criterion.shown(point.rate)
        note = f"J'(T) = {rate:.3g} against a scale of {point.rate_scale:.3g}"
        if grazing:
            note += "; J turns back next to the target, within its error"
        return Status.DEGENERATE, note
    if _is_jump(call, watch, point):
        return Status.DEGENERATE, jump_note(watch, point.value)
    return Status.REACHED, ""


def _is_jump(call: Call, watch: Watch, point: Crossing) -> bool:
    """Whether J misses the target by more than T can be moved by tolerance and rounding."""
    start, eps = call.start, torch.finfo(point.state.dtype).eps
    in_time = 10 * call.tolerances.rtol * (point.time - start)
    in_time += 4 * eps * max(abs(point.time), abs(start))
    return abs(point.value - watch.target) > in_time * abs(point.rate) + 100 * point.rounding


def jump_note(watch: Watch, value: float) -> str:
    """What to say where J is at `value` behind its target."""
    gap = watch.criterion.shown(value - watch.target)
    return f"J jumps over the target: J(T) - eps = {gap:.3g}"
