"""Equation (13): what is left of the discrete gradient when only the last steps are counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from discrete import DiscreteAdjoint, Euler, Truncated, stopping_index
from ode_stopping import (
    Criterion,
    GradientNorm,
    LogisticRegression,
    LossValue,
    PreconditionedFlow,
    Problem,
)
from ode_stopping.problems.datasets import breast_cancer

from ..plotting import COLOURS, MARKERS, new_figure
from ..registry import Context, Figure, Outcome, Table, check
from ._problems import Setup, quadratic, unit_start

BOUND = 1e-12
SHARE = 0.4
MAX_STEPS = 100_000
REGULARIZATION = 1e-2
Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """A problem with x' = -p grad f(x), p a diagonal.

    Attributes:
        kind: "quadratic" (J = |grad f|^2) or "logistic" (J = f).
        target: eps.
        dim: Unknowns of the quadratic.
        condition: Of the quadratic.
        seed: Of basis, start and p.
    """

    kind: str
    target: float
    dim: int = 50
    condition: float = 100.0
    seed: int = 0


@dataclass(frozen=True)
class ByHand:
    """What the formulas need, in numpy and apart from the library.

    Attributes:
        gradient: x -> grad f.
        hessian_product: (x, v) -> hess f(x) v.
        loss: x -> J.
        loss_gradient: x -> grad J.
    """

    gradient: Callable[[Vector], Vector]
    hessian_product: Callable[[Vector, Vector], Vector]
    loss: Callable[[Vector], float]
    loss_gradient: Callable[[Vector], Vector]


@dataclass(frozen=True)
class Course:
    """Truncated sums of one problem over K.

    Attributes:
        description: Of the problem.
        index: N.
        step: h, in flow time.
        steps: The values of K, from 1 to N.
        bias: Relative distance, in norm, of the sum over K steps to the full one.
        gap: Relative distance of the library's truncated sum to the hand-made one.
        full_gap: Relative distance of the full sum by Algorithm 1 to the hand-made one.
    """

    description: str
    index: int
    step: float
    steps: tuple[int, ...]
    bias: tuple[float, ...]
    gap: tuple[float, ...]
    full_gap: float


def quadratic_by_hand(objective: Any) -> ByHand:
    """f = x^T Q x/2 and J = |Q x|^2."""
    matrix = objective.dense().numpy()
    return ByHand(
        gradient=lambda x: matrix @ x,
        hessian_product=lambda x, v: matrix @ v,
        loss=lambda x: float((matrix @ x) @ (matrix @ x)),
        loss_gradient=lambda x: 2.0 * matrix @ (matrix @ x),
    )


def logistic_by_hand(features: Tensor, labels: Tensor) -> ByHand:
    """f = mean log(1 + exp(-m)) + reg/2 |x|^2, m_i = y_i (row_i w - b), and J = f."""
    rows = features.numpy()
    signed = labels.numpy()[:, None] * np.hstack([rows, -np.ones((len(rows), 1))])
    count = len(rows)

    def gradient(x: Vector) -> Vector:
        return -signed.T @ (1.0 / (1.0 + np.exp(signed @ x))) / count + REGULARIZATION * x

    def hessian_product(x: Vector, v: Vector) -> Vector:
        sigmoid = 1.0 / (1.0 + np.exp(signed @ x))
        weighted = sigmoid * (1.0 - sigmoid) * (signed @ v)
        return signed.T @ weighted / count + REGULARIZATION * v

    def loss(x: Vector) -> float:
        penalty = 0.5 * REGULARIZATION * float(x @ x)
        return float(np.logaddexp(0.0, -(signed @ x)).mean()) + penalty

    return ByHand(gradient, hessian_product, loss, gradient)


def make(cell: Cell) -> tuple[Problem, Criterion, Tensor, Tensor, float, ByHand]:
    """Objective, criterion, x0, p, h and the formulas by hand."""
    criterion: Criterion
    objective: Problem
    if cell.kind == "quadratic":
        setup = Setup("quadratic", cell.target, cell.dim, cell.condition, cell.seed)
        spectral = quadratic(setup)
        objective, x0, by_hand = spectral, unit_start(setup), quadratic_by_hand(spectral)
        criterion, largest = GradientNorm(objective), cell.condition
    else:
        features, labels = breast_cancer()
        objective = LogisticRegression(
            features, labels, regularization=REGULARIZATION, intercept=True
        )
        x0 = torch.zeros(objective.dim, dtype=torch.float64)
        criterion, by_hand = LossValue(objective), logistic_by_hand(features, labels)
        largest = float(objective.lipschitz() or 0.0)
    generator = torch.Generator().manual_seed(cell.seed + 5)
    p = torch.exp(0.1 * torch.randn(x0.shape, generator=generator, dtype=torch.float64))
    step = 2.0 * SHARE / (largest * float(p.max()))
    return objective, criterion, x0, p.requires_grad_(True), step, by_hand


def equation_13(path: Sequence[Vector], hand: ByHand, p: Vector, step: float) -> Vector:
    """Eq. (13) as printed: h A_theta(x_{N-1})^T grad J(x_N) / (J(x_N) - J(x_{N-1})).

    A = p grad f, so that A_theta = diag(grad f(x_{N-1})).
    """
    before, after = path[-2], path[-1]
    decrease = hand.loss(after) - hand.loss(before)
    return step * hand.gradient(before) * hand.loss_gradient(after) / decrease


def sums_by_hand(path: Sequence[Vector], hand: ByHand, p: Vector, step: float) -> list[Vector]:
    """The sums over the last K = 1, 2, .., N steps.

    lam_N = grad J(x_N), lam_k = lam_{k+1} - h hess f(x_k) (p lam_{k+1}); the step k adds
    h grad f(x_k) lam_{k+1} / (J(x_N) - J(x_{N-1})).
    """
    decrease = hand.loss(path[-1]) - hand.loss(path[-2])
    lam = hand.loss_gradient(path[-1])
    total = np.zeros_like(lam)
    sums = []
    for x in reversed(path[:-1]):
        total = total + step * hand.gradient(x) * lam / decrease
        sums.append(total)
        lam = lam - step * hand.hessian_product(x, p * lam)
    return sums


def path_by_hand(x0: Vector, hand: ByHand, p: Vector, step: float, target: float) -> list[Vector]:
    """x_0, .., x_N of forward Euler.

    Raises:
        ValueError: The target is not met within `MAX_STEPS` steps.
    """
    path = [x0]
    while hand.loss(path[-1]) > target:
        if len(path) > MAX_STEPS:
            raise ValueError(f"target {target:g} is not met in {MAX_STEPS} steps: is it below f*?")
        path.append(path[-1] - step * p * hand.gradient(path[-1]))
    return path


def course(cell: Cell) -> Course:
    """The truncated sums of one problem: by the library and by hand."""
    objective, criterion, x0, p, step, hand = make(cell)
    weights = p.detach().numpy()
    path = path_by_hand(x0.numpy(), hand, weights, step, cell.target)
    sums = sums_by_hand(path, hand, weights, step)
    count = len(sums)
    spread = np.round(np.linspace(1, count, 9)).astype(int)
    ladder = np.unique([1, 2, min(4, count), *spread]).tolist()
    rule = Euler(PreconditionedFlow(objective, preconditioner=p), step=step)

    def by_library(route: DiscreteAdjoint | Truncated) -> tuple[int, Vector]:
        result = stopping_index(rule, x0, criterion, cell.target, gradient=route, evidence="light")
        (gradient,) = torch.autograd.grad(result.steps, p)
        return result.index, gradient.numpy()

    index, full = by_library(DiscreteAdjoint())
    bias, gap = [], []
    for k in ladder:
        _, found = by_library(Truncated(steps=k))
        exact = equation_13(path, hand, weights, step) if k == 1 else sums[k - 1]
        gap.append(_distance(found, exact))
        bias.append(_distance(found, full))
    kinds = {"quadratic": f"rotated quadratic, d = {cell.dim}, condition {cell.condition:g}, "
             "J = |grad f|^2", "logistic": "logistic regression, breast cancer, J = f"}  # fmt: skip
    return Course(
        kinds[cell.kind],
        index if index == count else -1,
        step,
        tuple(ladder),
        tuple(bias),
        tuple(gap),
        _distance(full, sums[-1]),
    )


def _distance(found: Vector, exact: Vector) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@check(
    name="equation-13",
    title="One-step and K-step truncation",
    source="Eq. (13)",
    group="equation-13",
    order=40,
)
def equation_13_check(context: Context) -> Outcome:
    """With K = 1 the truncated gradient is equation (13); its bias falls to zero as K goes to N.

    Forward Euler with a diagonal preconditioner p, differentiated to p: a rotated quadratic of
    condition 100 (J = |grad f|^2) and logistic regression on breast cancer (J = f). The formulas
    are evaluated by hand, in numpy, along a path that is iterated by hand.

    Measured: the relative difference of `Truncated(steps=1)` to equation (13), the largest one of
    `Truncated(steps=K)` to the sum over K steps by hand, the one of K = N to Algorithm 1, and by
    how much the bias changes from one K to the next (below 1: it falls). Expected: 0. Tolerance:
    1e-12.
    The size of the bias is shown, not judged: along a mode of a quadratic every step contributes
    the same, so that K of N steps give about the share K/N of the gradient.
    """
    cells = [
        Cell("quadratic", 1e-3, dim=context.choose(quick=50, paper=500), seed=context.seed),
        Cell("logistic", context.choose(quick=0.12, paper=0.11), seed=context.seed),
    ]
    return judge_truncation(context, cells)


def judge_truncation(context: Context, cells: Sequence[Cell]) -> Outcome:
    """The check on a choice of problems."""
    courses = context.map(course, cells)
    measured: dict[str, float] = {}
    bounds: dict[str, float] = {}
    rows: list[list[Any]] = []
    for cell, found in zip(cells, courses, strict=True):
        bias = np.array(found.bias)
        figures = {
            "K = 1 against eq. (13)": (found.gap[0], BOUND),
            "any K against the sum by hand": (float(np.max(found.gap)), BOUND),
            "K = N against Algorithm 1": (found.bias[-1], BOUND),
            "Algorithm 1 against the sum by hand": (found.full_gap, BOUND),
            "bias at the next K over bias at K": (float(np.max(bias[1:] / bias[:-1])), 1.0),
            "N differs from the count by hand": (float(found.index < 0), 0.0),
        }
        for name, (value, bound) in figures.items():
            measured[f"{name}: {cell.kind}"], bounds[f"{name}: {cell.kind}"] = value, bound
        for k, b, g in zip(found.steps, found.bias, found.gap, strict=True):
            rows.append([found.description, found.index, k, b, g])
    return Outcome.below(
        measured,
        bounds,
        details={
            "dtype": "float64",
            "bias at K = 1": {c.kind: f.bias[0] for c, f in zip(cells, courses, strict=True)},
            "h": {c.kind: f.step for c, f in zip(cells, courses, strict=True)},
        },
        tables=[
            Table(
                "Truncated sums over the last K of N steps",
                ["problem", "N", "K", "relative bias", "difference to the sum by hand"],
                rows,
                "Bias: distance to the full gradient dN/dp, relative, in norm.",
            )
        ],
        figures=[_figure(courses)],
    )


def _figure(courses: Sequence[Course]) -> Figure:
    figure, axes = new_figure()
    for position, found in enumerate(courses):
        axes.plot(
            np.array(found.steps) / found.index,
            found.bias,
            marker=MARKERS[position],
            color=COLOURS[position],
            markerfacecolor="white",
            label=f"{found.description.split(',')[0]}, N = {found.index}",
        )
    axes.plot([0.0, 1.0], [1.0, 0.0], color="#555555", linestyle=(0, (4, 3)), label="1 - K/N")
    axes.set(xlabel=r"share of the steps, $K/N$", ylabel="relative bias of the truncated gradient")
    axes.legend(loc="best")
    caption = (
        "Bias of the gradient truncated to the last K of N steps, relative to the full gradient. "
        "The one-step form of equation (13) is the leftmost point of each curve: it holds the "
        "share of one step only. The bias is zero at K = N."
    )
    return Figure("bias", caption, figure, "bias falling from nearly one to zero at K = N")
