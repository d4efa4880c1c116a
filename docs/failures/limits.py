"""What is not caught: narrow dips of the criterion, short pulses of the flow."""

from __future__ import annotations

import warnings
from math import exp
from typing import Any

import numpy as np
import torch
from page import Table
from problems import F64, Function, parameter
from torch import Tensor

from ode_stopping import Torchdiffeq, UntrackedTensorError, stopping_time


def narrow() -> Table:
    """Dips of J between the points at which it is looked at, and pulses of the flow."""
    table = Table(["half-width w of the dip at x = 20", "truth", "here", "here, `max_step=w`"])
    x0 = torch.zeros(1, dtype=F64)
    clock: Function = lambda t, x: torch.ones_like(x)  # noqa: E731
    for width in (3.0, 1.0, 0.3, 0.1, 0.03):

        def dip(t: Tensor, x: Tensor, w: float = width) -> Tensor:
            return (1 - 0.01 * x - 0.6 * torch.exp(-(((x - 20) / w) ** 2))).sum()

        low, high = 20 - 3 * width, 20.0  # J = 0.5 by bisection
        for _ in range(60):
            middle = 0.5 * (low + high)
            above = 1 - 0.01 * middle - 0.6 * exp(-(((middle - 20) / width) ** 2)) > 0.5
            low, high = (middle, high) if above else (low, middle)
        runs = [
            float(stopping_time(clock, x0, dip, 0.5, solver=Torchdiffeq(max_step=step)).time)
            for step in (float("inf"), width)
        ]
        table.add(f"{width:g}", low, *runs)
    return table


def pulse() -> Table:
    """A flow that does something for a short time only; ten places of the pulse for each width."""
    table = Table(["width of the pulse (T = 3)", "right or warned about", "`UntrackedTensorError`",
                   "missed in silence", "`breakpoints=`: right"])  # fmt: skip
    for width in (0.3, 0.1, 0.03, 0.01):
        places = np.linspace(0.1, 2.3, 10)
        ends = [_pulsed(float(start), width, {}) for start in places]
        told = [_pulsed(float(a), width, {"breakpoints": [a, a + width]}) for a in places]
        seen = ends.count("right") + ends.count("warned")
        raised, silent = ends.count("UntrackedTensorError"), ends.count("silent")
        table.add(f"{width:g}", seen, raised, silent, told.count("right"))
    return table


def _pulsed(start: float, width: float, options: dict[str, Any]) -> str:
    """How x' = -x (1 + kick in [start, start + width]) ends, differentiated to kick."""
    kick, base = parameter(0.3), parameter(1.0)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        inside = start < float(t.detach()) < start + width
        return -base * x * (1 + kick if inside else 1.0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            x0 = torch.tensor([2.0], dtype=F64)
            stopping_time(flow, x0, lambda t, x: x.sum(), 0.1, **options).time.backward()
        except UntrackedTensorError as error:
            return type(error).__name__
    if caught:
        return "warned"
    right = kick.grad is not None and abs(float(kick.grad) / -width - 1) < 1e-4
    return "right" if right else "silent"
