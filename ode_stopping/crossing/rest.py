"""Has a flow come to rest short of its target?"""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from ..solving.solver import Function, Tolerances
from ..solving.step import Step

__all__ = ["Rest"]

_WINDOW = 256
_PROBES = 32
_SHARE_OF_TIME = 1e-3
_POWERS = 60
_GROWTH = 1e-4


class Rest:
    """Has the state come to rest? Then the horizon need not be walked to in steps of 3/L.

    At rest: within the last 256 accepted steps the state has moved by less than ten tolerances (the
    absolute one in units of the largest state on the way: a state that decays to zero rests), and
    the criterion has closed less than a hundredth of its distance to the target. A flow that
    depends on t may wake up again, so the velocity at the same point is looked at on the way to the
    horizon.
    """

    def __init__(self, tolerances: Tolerances) -> None:
        self._tolerances = tolerances
        self._window: deque[tuple[float, Tensor, float]] = deque(maxlen=_WINDOW)
        self._start: float | None = None
        self._until_next = _WINDOW
        self._largest = 0.0

    def is_resting(self, step: Step, excess: float, largest: float) -> bool:
        """Whether the state has hardly moved for a while, up to the end of this step.

        Args:
            step: The latest step.
            excess: How far J is from the nearest target.
            largest: Largest size of the state so far.
        """
        self._largest = largest
        self._window.append((step.t1, step.y1, excess))
        self._start = step.t0 if self._start is None else self._start
        self._until_next -= 1
        if self._until_next > 0:
            return False
        self._until_next = _WINDOW // 8
        time, state, previous_excess = self._window[0]
        if excess < 0.99 * previous_excess:
            return False
        # In a sliding mode the state does not move, for time does not: that is no rest.
        if step.t1 - time < _SHARE_OF_TIME * (step.t1 - self._start):
            return False
        moved = (step.y1 - state).abs()
        floor = self._tolerances.floor(largest)
        allowed = 10 * (floor + self._tolerances.rtol * step.y1.abs())
        return bool((moved <= allowed).all())

    def stays(self, flow: Function, now: float, x: Tensor, horizon: float) -> bool:
        """Whether the velocity at this state stays at its present noise until the horizon."""
        speed = max(float(flow(now, y).abs().max()) for y in (x, self._window[0][1]))
        remaining = horizon - now
        for i in range(1, _PROBES + 1):
            # Half of the probes evenly, half of them crowded towards the present.
            fraction = i / _PROBES if i % 2 == 0 else 2.0 ** -(_PROBES - i)
            probe = flow(now + fraction * remaining, x)
            if not float(probe.abs().max()) <= 10 * speed:
                return False
        return not self._grows(flow, now, x)

    def _grows(self, flow: Function, t: float, x: Tensor) -> bool:
        """Whether a small departure from x grows: a saddle is left in the end, however slowly.

        Power iteration with the derivative of a Runge-Kutta step, by differences; stable flows,
        oscillating ones too, shrink every departure or keep its size.
        """
        times = [entry[0] for entry in self._window]
        length = (times[-1] - times[0]) / (len(times) - 1) / 3
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        size = torch.finfo(x.dtype).eps ** 0.5 * max(float(x.norm()), self._largest)
        base = _runge_kutta(flow, t, x, length)
        direction, growth = noise / noise.norm(), 1.0
        for k in range(_POWERS):
            moved = (_runge_kutta(flow, t, x + size * direction, length) - base) / size
            factor = float(moved.norm())
            if not factor > 0:
                return False
            direction = moved / factor
            if k >= _POWERS // 2:
                growth *= factor
        return growth > 1 + _GROWTH


def _runge_kutta(flow: Function, t: float, x: Tensor, length: float) -> Tensor:
    """One classical step of the flow as it is at time t."""
    first = flow(t, x)
    second = flow(t, x + 0.5 * length * first)
    third = flow(t, x + 0.5 * length * second)
    fourth = flow(t, x + length * third)
    return x + length / 6 * (first + 2 * second + 2 * third + fourth)
