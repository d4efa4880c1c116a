"""Velocities that jump, in time and in the state: parts 9 and 10 of the page."""

from __future__ import annotations

from math import log

import torch
from outcomes import gradient_of, or_none, said
from page import Table
from peers import Field, peer_time
from problems import F64, Function, half_square, parameter
from torch import Tensor

from ode_stopping import DirectAdjoint, InterpolatingAdjoint, stopping_time


def time_jump() -> Table:
    """A flow whose rate jumps from 1 to 3 at t = 1."""
    table = Table(["run", "error of T", "error of dT/d(first rate)", "evaluations", "says"])
    first, second, x0 = parameter(1.0), parameter(3.0), torch.tensor([2.0], dtype=F64)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -(first if float(t.detach()) < 1 else second) * x

    end, truth = 1 + (log(4 / 2e-3) / 2 - 1) / 3, -1 / 3
    counted = Field(flow, [first, second])
    event = peer_time(counted, x0, half_square, 1e-3, rtol=1e-7, atol=1e-11)
    calls, found = counted.calls, gradient_of(event, first)
    table.add("torchdiffeq", abs(float(event.detach()) / end - 1),
              abs(float(found) / truth - 1), calls, "nothing")  # fmt: skip
    for name, breakpoints in (("here", None), ("here, `breakpoints=[1.0]`", [1.0])):
        result = stopping_time(flow, x0, half_square, 1e-3, breakpoints=breakpoints)
        words = said(lambda r=result: r.time.backward())
        assert first.grad is not None
        error = abs(float(first.grad) / truth - 1)
        first.grad = second.grad = None
        table.add(name, abs(float(result.time.detach()) / end - 1), error, result.stats.nfe_forward,
                  words.removeprefix("None, ").replace("None", "nothing"))  # fmt: skip
    return table


def state_jump() -> Table:
    """A velocity that jumps where x passes 1: lam has a jump that no adjoint equation has."""
    table = Table(["run", "dT/dx0 (truth 1/3)", "evidence"])
    kinked: Function = lambda t, x: -torch.where(x > 1, 1.0, 3.0) * x  # noqa: E731
    total: Function = lambda t, x: x.sum()  # noqa: E731
    x0 = parameter([3.0])
    event = peer_time(Field(kinked), x0, total, 0.1)
    table.add("torchdiffeq, `odeint_adjoint`", or_none(event, x0), "-")
    event = peer_time(Field(kinked), x0, total, 0.1, adjoint=False)
    table.add("torchdiffeq, `odeint`", or_none(event, x0), "-")
    for route in (InterpolatingAdjoint(), DirectAdjoint()):
        result = stopping_time(kinked, x0, total, 0.1, gradient=route)
        words = said(lambda r=result: float(torch.autograd.grad(r.time, x0)[0]))
        assert result.evidence is not None
        estimate = f"estimated error {result.evidence.estimate:.2f}"
        table.add(f"here, `{type(route).__name__}`", words, estimate)
    return table
