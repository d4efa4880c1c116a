"""Identity (12): the gradient of a sum of losses is a sum of gradients of stopping indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete import Euler, stopping_index
from ode_stopping import LossValue, PreconditionedFlow

from ..plotting import COLOURS, MARKERS, new_figure
from ..registry import Context, Figure, Outcome, Table, check
from ._problems import Setup, build

BOUND = 1e-10
SHARE = 0.4


@dataclass(frozen=True)
class Cell:
    """A problem, and how many steps are summed over."""

    setup: Setup
    steps: int


@dataclass(frozen=True)
class Sides:
    """Both sides of the identity.

    Attributes:
        description: Of the problem.
        step: h, in flow time.
        losses: f(x_0), .., f(x_K).
        wrong_index: How many of the targets f(x_k) did not give N = k.
        norms: |dN/dtheta| at every target.
        size: The norm of the left-hand side.
        error: Relative difference of the two sides, in norm.
    """

    description: str
    step: float
    losses: tuple[float, ...]
    wrong_index: int
    norms: tuple[float, ...]
    size: float
    error: float


def both_sides(cell: Cell) -> Sides:
    """The sum by differentiating an unrolled loop, and by `stopping_index` at every target."""
    instance = build(cell.setup)
    assert isinstance(instance.flow, PreconditionedFlow)
    objective = instance.flow.objective
    step = 2.0 * SHARE / instance.stiffness
    x, losses, summands = instance.x0, [], []
    with torch.enable_grad():
        for k in range(cell.steps + 1):
            value = objective(x)
            losses.append(value.item())
            summands.append(value)
            x = x + step * instance.flow(torch.full_like(value, k * step).detach(), x)
        left = torch.autograd.grad(torch.stack(summands[1:]).sum(), instance.parameters)
    right = [torch.zeros_like(p) for p in instance.parameters]
    criterion, rule = LossValue(objective), Euler(instance.flow, step=step)
    wrong, norms = 0, []
    for k in range(1, cell.steps + 1):
        result = stopping_index(rule, instance.x0, criterion, losses[k], evidence="light")
        wrong += result.index != k
        by_index = torch.autograd.grad(result.steps, instance.parameters)
        weight = losses[k - 1] - losses[k]
        right = [total + weight * g for total, g in zip(right, by_index, strict=True)]
        norms.append(float(_flat(by_index).norm()))
    size = float(_flat(left).norm())
    error = float((_flat(left) - _flat(right)).norm()) / size
    return Sides(instance.description, step, tuple(losses), wrong, tuple(norms), size, error)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@check(
    name="identity-12",
    title="Sums of losses as sums of stopping indices",
    source="Eq. (12)",
    group="identity-12",
    order=41,
)
def identity_12(context: Context) -> Outcome:
    """A sum of losses has the gradient of a weighted sum of stopping indices.

    With J = f, targets f(x_k) and f decreasing, the derivative of sum_k f(x_k) to theta is the sum
    over k of (f(x_{k-1}) - f(x_k)) dN/dtheta at the target f(x_k).

    Forward Euler on a rotated quadratic with ten preconditioner parameters a coordinate, and on
    logistic regression (breast cancer) with a preconditioner and a schedule. Left: autograd of an
    unrolled loop. Right: `stopping_index` at each of the targets.

    Measured: the relative difference of the two sides, in norm; the number of targets at which N is
    not k, and of steps in which f does not decrease. Expected: 0. Tolerance: 1e-10.
    """
    where: dict[str, Any] = {"seed": context.seed, "device": str(context.device)}
    steps = context.choose(quick=40, paper=200)
    cells = [
        Cell(Setup("quadratic", 1.0, dim=50, condition=100.0, **where), steps),
        Cell(Setup("logistic", 1.0, **where), steps),
    ]
    return judge_identity(context, cells)


def judge_identity(context: Context, cells: Sequence[Cell]) -> Outcome:
    """The check on a choice of problems."""
    sides = context.map(both_sides, cells)
    measured: dict[str, float] = {}
    bounds: dict[str, float] = {}
    rows: list[list[Any]] = []
    for cell, found in zip(cells, sides, strict=True):
        kind = cell.setup.kind
        change = float(np.diff(found.losses).max())
        measured[kind], bounds[kind] = found.error, BOUND
        measured[f"targets with N other than k: {kind}"] = float(found.wrong_index)
        bounds[f"targets with N other than k: {kind}"] = 0.0
        measured[f"steps in which f does not decrease: {kind}"] = float(
            np.sum(np.diff(found.losses) >= 0)
        )
        bounds[f"steps in which f does not decrease: {kind}"] = 0.0
        rows.append([found.description, cell.steps, found.step, found.size, found.error, change])
    return Outcome.below(
        measured,
        bounds,
        details={"dtype": "float64"},
        tables=[
            Table(
                "Both sides of identity (12)",
                [
                    "problem",
                    "K",
                    "h",
                    "norm of the left-hand side",
                    "relative difference",
                    "largest change of f",
                ],
                rows,
            )
        ],
        figures=[_figure(sides)],
    )


def _figure(sides: Sequence[Sides]) -> Figure:
    figure, axes = new_figure()
    for position, found in enumerate(sides):
        drops = -np.diff(found.losses)
        weighted = drops * np.array(found.norms)
        axes.plot(
            range(1, len(weighted) + 1),
            weighted,
            marker=MARKERS[position],
            markersize=3,
            color=COLOURS[position],
            markerfacecolor="white",
            label=found.description.split(",")[0],
        )
    axes.set(
        yscale="log",
        xlabel="step k",
        ylabel=r"$(f(x_{k-1}) - f(x_k))\, |dN/d\theta|$",
    )
    axes.legend(loc="best")
    caption = (
        "The summands of identity (12), in norm: the derivative of the stopping index at the "
        "target f(x_k), weighted by the decrease of f in that step. It equals |df(x_k)/dtheta|."
    )
    return Figure("summands", caption, figure, "norms of the summands over the steps")
