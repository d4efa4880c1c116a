"""Runs that never arrive: no crossing, NaN, means over them (parts 5, 6 and 15)."""

from __future__ import annotations

from typing import Any

import torch
from outcomes import said
from page import Table
from peers import Field, StillRunning, peer_time
from problems import F64, Function, half_square, parameter

from discrete import Euler, stopping_index
from ode_stopping import StoppingResult, mean_over_reached, stopping_time


def unreached() -> Table:
    """No crossing, or none to wait for."""
    table = Table(["case", "torchdiffeq", "here", "evaluations here"])
    x0 = torch.tensor([2.0], dtype=F64)
    cases: dict[str, tuple[Function, float]] = {
        "target below the least value of J": (lambda t, x: 1 + half_square(t, x), 0.5),
        "J(x0) below the target already": (half_square, 9.0),
    }
    for name, (criterion, target) in cases.items():
        flow = Field(lambda t, x: -x, limit=5_000)
        try:
            with torch.no_grad():
                other = f"T = {float(peer_time(flow, x0, criterion, target)):.4g}"
        except StillRunning:
            other = f"still running after {flow.limit} evaluations"
        result = stopping_time(lambda t, x: -x, x0, criterion, target)
        own = f"{result.status.name}, T = {float(result.time):g}"
        table.add(name, other, own, result.stats.nfe_forward)
    return table


def diverging() -> Table:
    """NaN as a hit."""
    table = Table(["case", "torchdiffeq", "here"])
    x0 = torch.tensor([1.0], dtype=F64)
    fast: Function = lambda t, x: -30 * x  # noqa: E731
    event = peer_time(Field(fast), x0, half_square, 1e-2, method="rk4", options={"step_size": 0.1})
    table.add(
        "x' = -30 x in steps of 0.1 (rk4; Euler here)",
        f"T = {float(event.detach()):.4g}",
        said(lambda: stopping_index(Euler(fast, step=0.1), x0, half_square, 1e-2)),
    )
    burst: Function = lambda t, x: x**3  # noqa: E731
    table.add(
        "x' = x³, which is infinite at t = 1/2",
        said(lambda: peer_time(Field(burst, limit=20_000), x0, half_square, 1e-2)),
        said(lambda: stopping_time(burst, x0, half_square, 1e-2)),
    )
    return table


def means() -> Table:
    """The mean over runs of which some miss."""
    table = Table(["mean over starts 1, 2, 3, 4 of which 3 and 4 miss", "mean", "d mean/dθ"])
    theta = parameter(1.0)
    starts = [torch.tensor([start], dtype=F64) for start in (1.0, 2.0, 3.0, 4.0)]

    def runs(censored: Any = None) -> list[StoppingResult]:
        return [stopping_time(lambda t, x: -theta * x, x0, half_square, 0.02, max_time=2.5,
                              censored=censored) for x0 in starts]  # fmt: skip

    plain = torch.stack([run.time for run in runs()]).mean()
    table.add(
        "of `.time`", float(plain.detach()), said(lambda: torch.autograd.grad(plain, theta)[0])
    )
    found = mean_over_reached(runs())
    slope = float(torch.autograd.grad(found.mean, theta)[0])
    table.add(f"`mean_over_reached` ({found.missed} missed)", float(found.mean.detach()), slope)
    counted = torch.stack([run.time for run in runs("horizon")]).mean()
    slope = float(torch.autograd.grad(counted, theta)[0])
    table.add('of `.time`, `censored="horizon"`', float(counted.detach()), slope)
    return table
