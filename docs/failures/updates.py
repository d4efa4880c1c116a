"""Algorithms: updates that are no functions, and the index N (parts 13 and 14)."""

from __future__ import annotations

from collections.abc import Callable
from math import nan
from typing import Any

import numpy as np
import torch
from outcomes import relative, said
from page import OURS, PEER, Table, canvas
from problems import F64, Function, half_square, parameter
from torch import Tensor, nn

from discrete import Euler, StepDecrease, stopping_index
from discrete.gradients.index import accurate_decrease
from ode_stopping import Torchdiffeq, stopping_time


def stochastic() -> Table:
    """An update that is not a function of its arguments."""
    table = Table(["update", "here"])
    rate, x0 = parameter(0.1), torch.tensor([2.0, 1.0], dtype=F64)
    count = [0]

    def stateful(k: int, x: Tensor) -> Tensor:
        count[0] += 1
        return x - rate * (1 + 0.01 * count[0]) * x

    def dropout(k: int, x: Tensor) -> Tensor:
        return x - rate * nn.functional.dropout(x, 0.5)

    def seeded(k: int, x: Tensor) -> Tensor:
        mask = torch.rand(2, generator=torch.Generator().manual_seed(k)) > 0.5
        return x - 2 * rate * torch.where(mask, x, 0.0)

    names = {"dropout": dropout, "counts its calls": stateful, "dropout, seeded by k": seeded}
    torch.manual_seed(0)
    for name, update in names.items():
        words = said(lambda u=update: float(torch.autograd.grad(
            stopping_index(u, x0, half_square, 1e-2).steps, rate)[0]))  # fmt: skip
        table.add(name, words if "raises" in words else f"dN/d(rate) = {words}")
    return table


def index() -> Table:
    """Definition 3: unit, order, bracket, precision."""
    table = Table(["h", "error of h dN/dθ", "of h dN*/dθ (\"log\")", "dN/dθ itself",
                   "(T - hN)/h", "float32: error of J_N - J_{N-1}", "of the one used"])  # fmt: skip
    rates = torch.tensor([1.0, 4.0], dtype=F64)
    start, eps = torch.tensor([1.0, 1.0], dtype=F64), 1e-3

    def solve(h: float, dtype: torch.dtype, interpolation: Any = None) -> tuple[Any, Tensor]:
        theta = torch.tensor([1.0, 0.5], dtype=dtype, requires_grad=True)
        flow: Function = lambda t, x: -theta * rates.to(dtype) * x  # noqa: E731
        run = stopping_index(Euler(flow, step=h), start.to(dtype), _squares, eps,
                             interpolation=interpolation)  # fmt: skip
        return run, torch.autograd.grad(run.steps, theta)[0]

    theta = torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    exact = stopping_time(lambda t, x: -theta * rates * x, start, _squares, eps,
                          solver=Torchdiffeq(rtol=1e-11))  # fmt: skip
    (truth,) = torch.autograd.grad(exact.time, theta)
    end = float(exact.time.detach())
    shown = [0.1, 0.01, 1e-3]
    rows: list[tuple[float, ...]] = []
    for h in map(float, [*np.logspace(-1.01, -2.6, 40), *shown, *np.logspace(-2.7, -3.7, 6)]):
        gaps = _differences_in_single(h, rates, start, eps)
        if h < 2e-3 and h not in shown:
            rows.append((h, nan, nan, *gaps))
            continue
        run, by_theta = solve(h, F64)
        _, smooth = solve(h, F64, "log")
        rows.append((h, relative(h * by_theta, truth), relative(h * smooth, truth), *gaps))
        if h in shown:
            bracket = (end - h * run.index) / h
            table.add(f"{h:g}", *rows[-1][1:3], float(by_theta.norm()), bracket, *gaps)
    _draw_index(np.array(sorted(rows)))
    return table


def _squares(t: Tensor, x: Tensor) -> Tensor:
    return x.square().sum()


def _differences_in_single(
    h: float, rates: Tensor, start: Tensor, eps: float
) -> tuple[float, float]:
    """Relative errors of J_N - J_{N-1} in float32: the plain difference, and the one in use."""
    speed = torch.tensor([1.0, 0.5])
    flow: Function = lambda t, x: -speed * rates.float() * x  # noqa: E731
    run = stopping_index(Euler(flow, step=h), start.float(), _squares, eps)
    assert run.problem is not None
    before = run.problem.previous.double()
    truth = float(((1 - h * speed * rates) * before).square().sum() - before.square().sum())
    return abs(float(run.decrease) / truth - 1), abs(accurate_decrease(run.problem) / truth - 1)


def _draw_index(rows: Any) -> None:
    h, plain, smooth, difference, ours = rows.T
    known = np.isfinite(plain)
    with canvas("index", 1, 2, width=4.0, height=2.9) as (_, (left, right)):
        look: dict[str, Any] = {"marker": ".", "lw": 0.9}
        left.loglog(h[known], plain[known], color=PEER, label="Definition 3", **look)
        left.loglog(h[known], smooth[known], color=OURS, label='fractional, "log"', **look)
        left.set(xlabel="step size h", ylabel="relative error of h dN/dθ", ylim=(1e-5, 2))
        left.legend(loc="upper left")
        right.loglog(h, np.maximum(difference, 1e-9), color=PEER, label="subtracted", **look)
        right.loglog(h, np.maximum(ours, 1e-9), color=OURS, label="from the increment", **look)
        right.set(xlabel="step size h", ylabel=r"error of $J_N - J_{N-1}$ in float32",
                  ylim=(7e-10, 1e-1))  # fmt: skip
        right.legend(loc="upper right")


def increase() -> Table:
    """f(x_{k-1}) - f(x_k) <= tol."""
    table = Table(["criterion", "N", "decrease of f over the last step"])

    def swing(k: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, v = state[0], state[1]
        v = 0.95 * v - 0.3 * x
        return x + 0.3 * v, v

    start = torch.tensor([1.0], dtype=F64), torch.zeros(1, dtype=F64)
    loss: Callable[[Tensor], Tensor] = lambda x: 0.5 * x.square().sum()  # noqa: E731

    def remember(k: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*swing(k, state), state[0])

    begin = (*start, 2 * start[0])
    run = stopping_index(remember, begin, lambda t, s: loss(s[2]) - loss(s[0]), 1e-7, gradient=None)
    table.add("the plain difference <= 1e-7", run.index,
              float(loss(run.state[2]) - loss(run.state[0])))  # fmt: skip
    criterion = StepDecrease(loss)
    run = stopping_index(criterion.wrap(swing), criterion.initial_state(start), criterion, 1e-7,
                         gradient=None)  # fmt: skip
    table.add("`StepDecrease` <= 1e-7", run.index, float(run.state[-1]))
    return table
