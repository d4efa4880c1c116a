"""Single precision and what a dtype cannot hold: part 11 of the page."""

from __future__ import annotations

import torch
from outcomes import relative, said
from page import Table
from problems import Function, half_square
from rotated_flow import Rotated

from ode_stopping import Torchdiffeq, stopping_time


def precision() -> Table:
    """Single precision."""
    table = Table(["condition", "torchdiffeq: error of T", "of dT/dp",
                   "here: error of T", "of dT/dp", "warned"])  # fmt: skip
    for condition in (10.0, 100.0, 1000.0):
        problem = Rotated(condition, 1e-3, torch.float32)
        result, gradient, warned = problem.ours(None)
        end, truth = problem.truth(float(result.time.detach()))
        try:
            event, other, _ = problem.peer(1e-4, adjoint=True)
            cells: tuple[object, ...] = abs(event / end - 1), relative(other, truth)
        except (AssertionError, RuntimeError) as error:
            cells = ("", f"raises `{type(error).__name__}`")
        table.add(f"{condition:g}", *cells, abs(float(result.time.detach()) / end - 1),
                  relative(gradient, truth), "yes" if warned else "no")  # fmt: skip
    return table


def arithmetic() -> Table:
    """What the dtype cannot hold."""
    table = Table(["case", "here"])
    x0 = torch.tensor([2.0], requires_grad=True)
    offset: Function = lambda t, x: 1 + half_square(t, x)  # noqa: E731
    table.add("float32, J = 1 + x²/2, target 1 + 1e-5 (T = 6.103)",
              said(lambda: stopping_time(lambda t, x: -x, x0, offset, 1 + 1e-5).time))  # fmt: skip
    table.add(
        "float32, rtol = 1e-9",
        said(lambda: stopping_time(lambda t, x: -x, x0.detach(), half_square, 1e-2,
                                   solver=Torchdiffeq(rtol=1e-9)).time),
    )  # fmt: skip
    return table
