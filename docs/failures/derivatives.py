"""What autograd sees: lost gradients, second derivatives, transforms (4, 12, 16)."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import torch
from outcomes import or_none, said
from page import Table
from peers import Field, peer_time
from problems import F64, Function, half_square, parameter
from torch import Tensor

from discrete import Euler, stopping_index
from ode_stopping import DirectAdjoint, InterpolatingAdjoint, Torchdiffeq, stopping_time


def lost() -> Table:
    """Gradients that get lost on the way."""
    table = Table(["derivative", "truth", "torchdiffeq", "here"])
    start = torch.tensor([1.5], dtype=F64)
    a, eps = parameter(1.7), parameter(1e-2)
    flow = Field(lambda t, x: -a * x, [a])

    def scaled(t: Tensor, x: Tensor) -> Tensor:
        return 0.5 * a * x.square().sum()

    span = log(1.7 * 1.5**2 / (2 * 1e-2)) / (2 * 1.7)
    event = peer_time(flow, start, scaled, eps)
    result = stopping_time(flow, start, scaled, eps)
    truths = {"a, in flow and criterion": 1 / (2 * 1.7**2) - span / 1.7,
              "the target": -1 / (2 * 1.7 * 1e-2)}  # fmt: skip
    for leaf, (name, truth) in zip((a, eps), truths.items(), strict=True):
        table.add(f"by {name}", truth, or_none(event, leaf), or_none(result.time, leaf))
    event = peer_time(Field(lambda t, x: -a * x), start, half_square, 1e-2)
    result = stopping_time(lambda t, x: -a * x, start, half_square, 1e-2)
    truth = -log(1.5**2 / 2e-2) / (2 * 1.7**2)
    table.add("by a tensor in a closure", truth, or_none(event, a), or_none(result.time, a))

    def forgetful(t: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (g,) = torch.autograd.grad(0.5 * (x**2).sum(), x)
        return -a * g

    start = start.clone().requires_grad_()
    event = peer_time(Field(forgetful, [a]), start, half_square, 1e-2)
    table.add(
        "by x0, `create_graph=True` forgotten in the flow",
        1 / (1.7 * 1.5),
        or_none(event, start),
        said(lambda: stopping_time(forgetful, start, half_square, 1e-2)),
    )
    return table


def clock() -> Table:
    """A function that reads t as a number hides its dependence on t from autograd."""
    table = Table(["derivative", "truth (t used as a tensor)", "t read by `.item()`"])
    x0 = torch.tensor([2.0, 1.0], dtype=F64)
    theta, start = parameter(1.0), parameter(0.3)

    def by_theta(read: Callable[[Tensor], Any]) -> str:
        flow: Function = lambda t, x: -theta * x  # noqa: E731
        late: Function = lambda t, x: half_square(t, x) - 0.05 * read(t)  # noqa: E731
        return said(lambda: or_none(stopping_time(flow, x0, late, 0.1).time, theta))

    def by_start(read: Callable[[Tensor], Any]) -> str:
        flow: Function = lambda t, x: -(1 + 0.5 * torch.sin(torch.as_tensor(read(t)))) * x  # noqa: E731
        rule = Euler(flow, step=0.01)
        return said(
            lambda: or_none(
                stopping_index(rule, x0, half_square, 0.1, t0=start, interpolation="log").steps,
                start,
            )
        )

    for name, run in (("dT/dθ, criterion", by_theta), ("dN*/dt0, Euler", by_start)):
        table.add(name, run(lambda t: t), run(lambda t: t.item()))
    return table


def second() -> Table:
    """d²T/dθ² of x' = -θ x is 2T/θ²."""
    table = Table(["run", "d²T/dθ²"])
    x0, theta = torch.tensor([2.0], dtype=F64), parameter(1.3)
    flow = Field(lambda t, x: -theta * x, [theta])
    span = log(4.0 / 2e-2) / (2 * 1.3)
    table.add("truth", 2 * span / 1.3**2)

    def twice(value: Tensor) -> float:
        (once,) = torch.autograd.grad(value, theta, create_graph=True)
        return float(torch.autograd.grad(once, theta)[0])

    for adjoint in (False, True):
        interface = "odeint_adjoint" if adjoint else "odeint"
        words = said(lambda a=adjoint: twice(peer_time(flow, x0, half_square, 1e-2, adjoint=a)))
        table.add(f"torchdiffeq, `{interface}`", words)
    for route in (InterpolatingAdjoint(), DirectAdjoint()):
        words = said(lambda r=route: twice(stopping_time(flow, x0, half_square, 1e-2, gradient=r,
                     solver=Torchdiffeq(rtol=1e-9)).time))  # fmt: skip
        table.add(f"here, `{type(route).__name__}`", words)
    return table


def transforms() -> Table:
    """Functional transforms over the loop."""
    table = Table(["transform of T(x0)", "here"])
    points = torch.tensor([[2.0], [1.0]], dtype=F64)

    def of(x0: Tensor) -> Tensor:
        return stopping_time(lambda t, x: -x, x0, half_square, 0.1).time

    for name in ("vmap", "grad", "jacrev", "jacfwd", "hessian"):
        argument = points if name == "vmap" else points[0]
        transformed = getattr(torch.func, name)(of)
        table.add(f"`torch.func.{name}`", said(lambda f=transformed, a=argument: f(a)))
    return table
