"""What marks a run: a watch that was met."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..call import Watch
from ..core.status import Status
from ..solving.step import Step
from .near_miss import NearMiss
from .point import Crossing

__all__ = ["Hit", "clearance"]


def clearance(watches: Iterable[Watch], low: float, high: float) -> float:
    """How far values of J in [low, high] are from the nearest target; 0 where one is met.

    A target that counts is met from above, and one that does not is left from below.
    """
    gaps = [w.target - high if w.leave is not None else low - w.target for w in watches]
    return max(min(gaps), 0.0)


@dataclass(frozen=True)
class Hit:
    """A watch that was met.

    The hit is at the end of `steps`, which begin at a node of the path; without steps of its own it
    is that node.

    Attributes:
        watch: Which one.
        status: REACHED, AT_START, or DEGENERATE (met without a derivative).
        time: T, in flow time.
        state: x_T, shape (n,).
        point: What is known there; None for AT_START.
        node: Number of the node of the path.
        steps: From the node to the hit: the partial step, or finer steps.
        note: One more sentence on it.
        near_miss: The dip of J before it that came closest to the target.
        state_error: Estimate of the error of x_T by the last steps, shape (n,).
    """

    watch: Watch
    status: Status
    time: float
    state: Tensor
    point: Crossing | None = None
    node: int = 0
    steps: tuple[Step, ...] = ()
    note: str = ""
    near_miss: NearMiss | None = None
    state_error: Tensor | None = None
