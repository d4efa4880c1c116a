"""Crossings that come back within a step, or all but happen: parts 7 and 8 of the page."""

from __future__ import annotations

import warnings
from math import acos, nan

import numpy as np
import torch
from page import OURS, PEER, Table, canvas
from peers import Field, peer_time
from problems import F64, parameter
from torch import Tensor

from ode_stopping import StoppingResult, stopping_time


def _cosine(t: Tensor, x: Tensor) -> Tensor:
    return torch.cos(x).sum()


def dip_in_a_step() -> Table:
    """A crossing that comes back before the step ends."""
    table = Table(["criterion, with x' = 1", "truth", "torchdiffeq", "here"])
    x0, clock = torch.zeros(1, dtype=F64), Field(lambda t, x: torch.ones_like(x))
    for level in (0.0, -0.5, -0.9):
        own = stopping_time(clock, x0, _cosine, level).time
        other = peer_time(clock, x0, _cosine, level)
        table.add(f"cos x = {level:g}", acos(level), float(other.detach()), float(own))
    return table


def heavy_ball(damping: float) -> tuple[StoppingResult, bool]:
    """Closed form 7, and whether the run warned."""
    a = parameter(damping)
    curvatures = torch.tensor([1.0, 60.0], dtype=F64)
    start = torch.tensor([1.0, 0.3], dtype=F64), torch.zeros(2, dtype=F64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = stopping_time(
            lambda t, s: (s[1], -a * s[1] - curvatures * s[0]),
            start,
            lambda t, s: 0.5 * (curvatures * s[0] ** 2).sum(),
            0.08,
        )
        result.time.backward()
    return result, bool(caught)


def grazing() -> Table:
    """T jumps under a small change of the damping."""
    table = Table(["damping", "T", "dT/d(damping)", "near miss: margin", "at t", "warned"])
    for damping in (0.8, 0.86, 0.87, 0.88, 0.9, 1.0):
        result, warned = heavy_ball(damping)
        miss = result.near_miss
        leaf = next(iter(result.problem.leaves.tensors))  # type: ignore[union-attr]
        dip = ("-", "-") if miss is None else (miss.margin, miss.time)
        slope, said_so = float(leaf.grad), "yes" if warned else "no"
        table.add(f"{damping:g}", float(result.time.detach()), slope, *dip, said_so)
    dampings = np.concatenate([np.linspace(0.8, 0.875, 9), np.linspace(0.877, 1.0, 11)])
    runs = [heavy_ball(float(a)) for a in dampings]
    times = np.array([float(run.time.detach()) for run, _ in runs])
    misses = [run.near_miss for run, _ in runs]
    margins = np.array([nan if miss is None else miss.margin for miss in misses])
    jump = int(np.argmax(np.diff(times))) + 1
    with canvas("grazing", 1, 2, width=4.0, height=2.7) as (_, (left, right)):
        for part in (slice(None, jump), slice(jump, None)):
            left.plot(dampings[part], times[part], ".-", color=OURS)
            right.plot(dampings[part], margins[part], ".-", color=PEER)
        left.axvline(dampings[jump - 1 : jump + 1].mean(), color="#555555", lw=0.8, ls=":")
        left.set(xlabel="damping", ylabel="stopping time T", ylim=(1.35, 1.85))
        warned = [(a, m) for a, m, (_, w) in zip(dampings, margins, runs, strict=True) if w]
        right.plot(*zip(*warned, strict=True), "o", markersize=9, color="none",
                   markeredgecolor="#333333", label="warned about")  # fmt: skip
        right.set(
            xlabel="damping",
            ylabel="margin of the near miss",
            xlim=left.get_xlim(),
            ylim=(-0.006, 0.13),
        )
        right.legend(loc="center right")
    return table
