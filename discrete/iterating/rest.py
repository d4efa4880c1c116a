"""Has an iteration come to rest short of its targets? Twin of `ode_stopping.crossing.rest`."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ode_stopping.core.functions import CriterionMap

from ..rules.maps import UpdateMap
from .watches import Watches

__all__ = ["BLOCK", "ROUNDING", "Rest", "probes"]

# Steps of one look; two looks, one after the other, find a run at rest.
BLOCK = 512
# Steps that are tried next, one by one, and further ones that are spread to the limit.
_NEXT = 1024
_SPREAD = 2048
# Movement that rounding can explain, in units of eps.
ROUNDING = 16.0
# Steps over which a small departure from the state must not grow, and how much is growth.
_POWERS = 200
_GROWTH = 1e-5


class Rest:
    """Has x_k come to rest above the target? Then the limit need not be walked to.

    Looked at is J first, which is known anyway, in blocks of 512 steps. Where it would not come
    down to the target (or up from one that has to be left first) by the limit at the pace of the
    last two blocks, the states of one more block are watched. At rest is a state of which every
    element

    - has stayed where it is, to within 16 roundings of itself; or
    - has stayed below 16 roundings of its largest value on the way, and does not grow (a momentum
      that dies down, a coordinate that decays to zero).

    An update or a criterion that depends on k or t may wake up again, so both are tried at the same
    state: at the next 1024 steps one by one (a learning rate with a period), and at 2048 more
    between them and the limit (a schedule that begins late). Where a step still moves the state by
    roundings, a small departure is followed for 200 steps and must not grow: a saddle is left in
    the end, however slowly.

    What cannot be known: an update that sleeps for long, and wakes up for less than a 2048th of the
    steps that are left; and hidden state, which a step that is tried changes.

    Args:
        update: G_k.
        criterion: J.
        limit: Of k.

    Attributes:
        due: The step at which to look next.
        since: Step from which on the state rests, once it does.
    """

    def __init__(self, update: UpdateMap, criterion: CriterionMap, limit: int) -> None:
        self._update = update
        self._criterion = criterion
        self._limit = limit
        self.due = 1 if limit > 2 * BLOCK else limit + 1
        self.since = 0
        self._largest: Tensor | None = None
        self._block = _Block()

    def is_resting(self, k: int, x: Tensor, losses: list[Any], watches: Any) -> bool:
        """Whether the run rests away from its targets for good; to be asked at step `due`."""
        largest = self._largest = (
            x.abs() if self._largest is None else torch.maximum(self._largest, x.abs())
        )
        if k < BLOCK:
            # The scale of each element: the first steps know it best.
            self.due = 2 * k
            return False
        if self._block.open:
            return self._watch(k, x, losses, watches, largest)
        self.due = k + BLOCK
        if k >= 2 * BLOCK and self._is_quiet(k, losses, watches):
            self._block = _Block(k)
            self._block.add(x)
            self.due = k + 1
        return False

    def _is_quiet(self, k: int, losses: list[float], watches: Watches) -> bool:
        """Whether J meets and leaves no target at the pace of the last two blocks."""
        older, newer = losses[-2 * BLOCK : -BLOCK], losses[-BLOCK:]
        low, high = min(newer), max(newer)
        spread = max(*older, high) - min(*older, low)
        blocks = (self._limit - k) / BLOCK
        fall, rise = max(min(older) - low, 0.0), max(high - max(older), 0.0)
        above, below = low - watches.highest, watches.leave - high
        return min(above, below) > spread and above > fall * blocks and below > rise * blocks

    def _watch(self, k: int, x: Tensor, losses: list[Any], watches: Any, largest: Tensor) -> bool:
        block, eps = self._block, torch.finfo(x.dtype).eps
        block.add(x)
        age = k - block.begin
        self.due = k + 1
        # Now and then whether to go on: a state that moves is known by its first steps.
        if age & (age - 1) == 0 and not block.stays(largest, eps):
            self._close(k + BLOCK)
            return False
        if age < 2 * BLOCK:
            if age == BLOCK:
                block.halve()
            return False
        begin = block.begin
        if not (block.rests(largest, eps) and self._is_quiet(k, losses, watches)):
            self._close(k + BLOCK)
            return False
        awake, still = self._wakes_at(k, x, losses, watches, largest)
        if awake is None and (still or not self._grows(k, x, largest)):
            self.since = begin
            return True
        # What was tried is not tried again until the run has gone as far.
        self._close(k + _NEXT + _SPREAD if awake is None else max(awake, k) + BLOCK)
        return False

    def _close(self, due: int) -> None:
        self._block, self.due = _Block(), due

    def _wakes_at(
        self, k: int, x: Tensor, losses: list[float], watches: Watches, largest: Tensor
    ) -> tuple[int | None, bool]:
        """A step that moves x or J, if one is found; else whether every step gave x exactly."""
        eps, allowed = torch.finfo(x.dtype).eps, self._allowed(x, largest)
        recent = losses[-BLOCK:]
        low, high = min(recent), max(recent)
        room = (high - low) + ROUNDING * eps * max(abs(low), abs(high))
        clock, still = self._update.clock, True
        for step in probes(k, self._limit):
            try:
                moved = self._update.step(step, x)
                value = self._criterion.value(clock.time(step + 1), x)
            except Exception:
                # A table of rates that ends, say. The run will see it when it gets there.
                return step, False
            gap = (moved - x).abs()
            still = still and not bool(gap.any())
            if not bool((gap <= allowed).all()) or watches.concerned(value):
                return step, False
            if not (isfinite(value) and low - room <= value <= high + room):
                return step, False
        return None, still

    @staticmethod
    def _allowed(x: Tensor, largest: Tensor) -> Tensor:
        """By how much a step may move each element of a state at rest."""
        eps = torch.finfo(x.dtype).eps
        allowed = ROUNDING * eps * torch.maximum(x.abs(), eps * largest)
        return torch.where(x.abs() <= ROUNDING * eps * largest, 2 * x.abs(), allowed)

    def _grows(self, k: int, x: Tensor, largest: Tensor) -> bool:
        """Whether a small departure from x grows, by power iteration with differences."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        size = torch.finfo(x.dtype).eps ** 0.5 * max(float(x.norm()), float(largest.max()))
        direction, growth, base = noise / noise.norm(), 1.0, x
        for i in range(_POWERS):
            step = min(k + i, self._limit - 1)
            try:
                following = self._update.step(step, base)
                moved = (self._update.step(step, base + size * direction) - following) / size
            except Exception:
                return True  # not known: the run goes on
            base, factor = following, float(moved.norm())
            if factor == 0.0:
                return False
            direction = moved / factor
            if i >= _POWERS // 2:
                growth *= factor
        return not growth <= 1 + _GROWTH


class _Block:
    """The box of the states over some steps, and of those in its first half.

    Args:
        begin: The first step; None: not open.
    """

    def __init__(self, begin: int | None = None) -> None:
        self.open = begin is not None
        self.begin = begin or 0
        self._low = self._high = self._early = torch.empty(0)
        self._whole = self._low, self._high

    def add(self, x: Tensor) -> None:
        """One more state."""
        if not self._low.numel():
            self._low = self._high = x
            return
        self._low, self._high = torch.minimum(self._low, x), torch.maximum(self._high, x)

    def halve(self) -> None:
        """Begin the second half, whose box must not be larger than that of the first."""
        self._early = self._size()
        self._whole = self._low, self._high
        self._low = self._high = torch.empty(0)

    def stays(self, largest: Tensor, eps: float) -> bool:
        """Whether every element has stayed where it is, or is small and does not matter."""
        if not self._low.numel():
            return True
        width, size = self._high - self._low, self._size()
        small = size <= ROUNDING * eps * largest
        return bool((small | (width <= ROUNDING * eps * size)).all())

    def rests(self, largest: Tensor, eps: float) -> bool:
        """Whether it has stayed so, and what is small has not grown."""
        if not self.stays(largest, eps):
            return False
        low = torch.minimum(self._low, self._whole[0])
        high = torch.maximum(self._high, self._whole[1])
        size = torch.maximum(low.abs(), high.abs())
        still = high - low <= ROUNDING * eps * size
        small = size <= ROUNDING * eps * largest
        return bool((still | (small & (self._size() <= self._early))).all())

    def _size(self) -> Tensor:
        return torch.maximum(self._low.abs(), self._high.abs())


def probes(k: int, limit: int) -> list[int]:
    """Steps from k on below the limit: the next ones, and others at no fixed distance."""
    near = range(k, min(k + _NEXT, limit))
    left = limit - k - _NEXT
    if left <= 0:
        return list(near)
    # One in each of equal parts, at a place that differs by the golden ratio, so that no period
    # hides; and crowded towards the present as well.
    parts = [int(left * (i + i * 0.6180339887498949 % 1) / _SPREAD) for i in range(_SPREAD)]
    crowded = [int(left * 2.0 ** (-i / 4)) for i in range(80)]
    steps = sorted({k + _NEXT + min(s, left - 1) for s in (*parts, *crowded)} | {limit - 1})
    return [*near, *steps]
