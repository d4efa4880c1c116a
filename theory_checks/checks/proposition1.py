"""Proposition 1: Algorithm 1 equals reverse-mode differentiation of the unrolled loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete import DiscreteAdjoint, Euler, IndexRoute, Unrolled, stopping_index

from ..registry import Context, Outcome, Table, check
from ._problems import Instance, Setup, build

BOUND = 1e-12
# Euler runs at this share of the largest stable step; odd sizes make the last chunk a short one.
SHARE = 0.4
CHUNK = 7
# A budget of a few states makes Algorithm 1 keep checkpoints and replay the stretches between.
BUDGET_STATES = 5


@dataclass(frozen=True)
class Cell:
    """A problem, run by Euler at a share of its largest stable step."""

    setup: Setup
    share: float = SHARE


@dataclass(frozen=True)
class Comparison:
    """One problem's figures.

    Attributes:
        description: Of the problem.
        step: h, in flow time.
        index: N of the library.
        loop_index: N of the plain loop.
        parameters: How many numbers theta has.
        errors: Relative difference to the loop, by route and then by what it is differentiated to.
    """

    description: str
    step: float
    index: int
    loop_index: int
    parameters: int
    errors: dict[str, dict[str, float]]


def routes_for(instance: Instance) -> dict[str, IndexRoute]:
    """Algorithm 1 in every mode, and the library's own unrolled loop."""
    state = instance.x0.numel() * instance.x0.element_size()
    return {
        "Algorithm 1, one step a chunk": DiscreteAdjoint(chunk=1),
        f"Algorithm 1, {CHUNK} steps a chunk": DiscreteAdjoint(chunk=CHUNK),
        f"Algorithm 1, {BUDGET_STATES} checkpoints": DiscreteAdjoint(
            memory=BUDGET_STATES * state, chunk=CHUNK
        ),
        "Unrolled": Unrolled(),
    }


def unrolled_loop(
    instance: Instance, x0: Tensor, target: Tensor, step: Tensor, inputs: list[Tensor]
) -> tuple[int, list[Tensor]]:
    """N and its derivatives (Definition 3) by a plain loop, with nothing of the library's drivers.

    x <- x + h F(t0 + k h, x) until J(x) <= eps, one graph from the start to x_N, then one call of
    reverse-mode differentiation: dN = -(dJ(x_N) - d eps)/(J(x_N) - J(x_{N-1})).
    """
    x, k, before = x0, 0, float("nan")
    with torch.enable_grad():
        while True:
            time = k * step
            value = instance.criterion(time, x)
            loss = value.item()
            if loss <= target.item():
                break
            before = loss
            x = x + step * instance.flow(time, x)
            k += 1
        excess = value - target
    grads = torch.autograd.grad(excess, inputs)
    return k, [-gradient / (loss - before) for gradient in grads]


def compare(cell: Cell) -> Comparison:
    """Every route of the library against the plain loop, on one problem."""
    instance = build(cell.setup)
    size = 2.0 * cell.share / instance.stiffness
    x0 = instance.x0.detach().clone().requires_grad_(True)
    target = torch.tensor(instance.target, dtype=x0.dtype, device=x0.device, requires_grad=True)
    step = torch.tensor(size, dtype=x0.dtype, device=x0.device, requires_grad=True)
    inputs = [*instance.parameters, x0, target, step]
    loop_index, exact = unrolled_loop(instance, x0, target, step, inputs)
    errors: dict[str, dict[str, float]] = {}
    index = -1
    for name, route in routes_for(instance).items():
        result = stopping_index(
            Euler(instance.flow, step=step),
            x0,
            instance.criterion,
            target,
            gradient=route,
            evidence="light",
        )
        index = result.index
        found = torch.autograd.grad(result.steps, inputs)
        errors[name] = _relative_errors(found, exact)
    parameters = sum(p.numel() for p in instance.parameters)
    return Comparison(instance.description, size, index, loop_index, parameters, errors)


def _relative_errors(found: tuple[Tensor, ...], exact: list[Tensor]) -> dict[str, float]:
    """Errors in norm to theta (all parameters in one vector), x0, eps and h."""
    count = len(exact) - 3
    pieces = {"theta": slice(0, count)}
    for position, name in enumerate(("x0", "eps", "h"), start=count):
        pieces[name] = slice(position, position + 1)
    errors = {}
    for name, chosen in pieces.items():
        mine = torch.cat([g.reshape(-1) for g in found[chosen]])
        truth = torch.cat([g.reshape(-1) for g in exact[chosen]])
        errors[name] = float((mine - truth).norm() / truth.norm())
    return errors


@check(
    name="proposition-1",
    title="Algorithm 1 against the unrolled loop",
    source="Proposition 1",
    group="proposition-1",
    order=30,
)
def proposition_1(context: Context) -> Outcome:
    """Algorithm 1 gives the gradient of reverse-mode differentiation through the unrolled loop.

    Forward Euler on four problems: a rotated quadratic with ten preconditioner parameters a
    coordinate, the quartic, logistic regression on breast cancer with a schedule, the smooth SVM on
    digits 0 and 1. The reference is a plain loop written in this check. Differentiated to theta,
    x0, eps and h; Algorithm 1 by single steps, by chunks, and from checkpoints.

    Measured: the largest relative difference, in norm, a problem. Expected: 0. Tolerance: 1e-12 (in
    exact arithmetic the two are the same sums). The stopping indices have to be equal.
    """
    cells = standard_cells(context)
    return judge_proposition(context, cells)


def standard_cells(context: Context) -> list[Cell]:
    """The four problems, in float64: the bar of 1e-12 has no meaning in a shorter type."""
    dim = context.choose(quick=50, paper=1000)
    where: dict[str, Any] = {"seed": context.seed, "device": str(context.device)}
    return [
        Cell(Setup("quadratic", 1e-3, dim=dim, condition=100.0, **where)),
        Cell(Setup("quartic", 1e-3, dim=dim, condition=100.0, **where)),
        Cell(Setup("logistic", context.choose(quick=1e-3, paper=1e-5), **where)),
        Cell(Setup("svm", context.choose(quick=3.0, paper=1.0), **where)),
    ]


def judge_proposition(context: Context, cells: list[Cell]) -> Outcome:
    """The check on a choice of problems."""
    found = context.map(compare, cells)
    measured: dict[str, float] = {}
    rows: list[list[Any]] = []
    for cell, result in zip(cells, found, strict=True):
        worst = [error for errors in result.errors.values() for error in errors.values()]
        measured[cell.setup.kind] = float(np.max(worst))
        measured[f"difference of N: {cell.setup.kind}"] = float(result.index - result.loop_index)
        for route, errors in result.errors.items():
            rows.append(
                [
                    result.description,
                    result.index,
                    result.parameters,
                    result.step,
                    route,
                    *errors.values(),
                ]
            )
    bounds = {name: 0.0 if name.startswith("difference") else BOUND for name in measured}
    return Outcome.below(
        measured,
        bounds,
        details={"dtype": "float64", "chunk": CHUNK, "checkpoints": BUDGET_STATES},
        tables=[
            Table(
                "Relative difference of dN to the unrolled loop",
                ["problem", "N", "parameters", "h", "route", "by theta", "by x0", "by eps", "by h"],
                rows,
                "N in steps, h in flow time; the last four columns are differences in norm.",
            )
        ],
    )
