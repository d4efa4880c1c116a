"""Learned optimisers: identity (12), and both gradients of their stopping index."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from discrete import stopping_index
from discrete.learned import CoordinateLSTM, LearnedOptimizer, RNNprop
from ode_stopping import LogisticRegression, LossValue, Problem, Quadratic

from ..registry import Context, Outcome, Table, check

BOUND = 1e-10
DIFFERENCES = 1e-7
LEAST_STEPS = 4
# Training: problems at once, steps of each, updates, learning rate of Adam.
PROBLEMS, HORIZON, UPDATES, RATE = 16, 12, 40, 1e-2
DIRECTIONS = 3
# Of a difference, in units of a direction of the size of the parameters.
STEP = 3e-5
KINDS: dict[str, type[RNNprop | CoordinateLSTM]] = {
    "RNNprop": RNNprop,
    "CoordinateLSTM": CoordinateLSTM,
}


@dataclass(frozen=True)
class Cell:
    """A learned optimiser on a problem.

    Attributes:
        kind: A key of `KINDS`.
        problem: "quadratic" or "logistic".
        dim: Unknowns.
        hidden: Width of the network.
        steps: K, at most.
        seed: Of the network, the problems and the start.
        device: Of all tensors.
    """

    kind: str
    problem: str
    dim: int = 5
    hidden: int = 6
    steps: int = 20
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Found:
    """What was measured of one.

    Attributes:
        steps: K, the number of steps in which f decreases from the start.
        wrong_index: How many of the targets f(x_k) did not give N = k.
        identity: Relative difference of the two sides of (12), in norm; the larger one of the sum
            over runs with a target each, and of one run with all targets.
        size: Norm of its left-hand side.
        index: N at a target between two values of f.
        definition_3: Largest error of dN by Definition 3 along the directions, relative to the
            largest of these derivatives.
        fractional: The same of dN* and central differences of N*.
        apart: |dN - dN*| over |dN*|, in norm: what the definitions differ by.
    """

    steps: int
    wrong_index: int
    identity: float
    size: float
    index: int
    definition_3: float
    fractional: float
    apart: float


def drawn(shape: tuple[int, ...], generator: torch.Generator, device: str) -> Tensor:
    """Normal numbers, the same ones on every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def train(cell: Cell, generator: torch.Generator) -> LearnedOptimizer:
    """A network that has learned to go down on diagonal quadratics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        learned = KINDS[cell.kind](cell.hidden).double().to(cell.device)
    curvature = drawn((PROBLEMS, cell.dim), generator, cell.device).square() + 0.1
    starts = drawn((PROBLEMS, cell.dim), generator, cell.device)

    def objective(x: Tensor) -> Tensor:
        return 0.5 * (curvature * x * x).sum(-1)

    update = learned.update(objective)
    tuner = torch.optim.Adam(learned.parameters(), lr=RATE)
    for _ in range(UPDATES):
        state, total = update.initial_state(starts), starts.new_zeros(())
        for k in range(HORIZON):
            state = update(k, state)
            total = total + objective(state[0]).log().mean()
        tuner.zero_grad()
        total.backward()
        tuner.step()
    return learned


def make(cell: Cell) -> tuple[LearnedOptimizer, Problem, Tensor]:
    """The optimiser, an objective that it was not trained on, and a start."""
    generator = torch.Generator().manual_seed(cell.seed)
    with torch.enable_grad():
        learned = train(cell, generator)
    x0 = drawn((cell.dim,), generator, cell.device)
    if cell.problem == "quadratic":
        return learned, Quadratic(drawn((cell.dim,), generator, cell.device).abs() + 0.3), x0
    data = drawn((4 * cell.dim, cell.dim), generator, cell.device)
    labels = torch.where(
        data.sum(-1) > 0.5 * drawn((len(data),), generator, cell.device), 1.0, -1.0
    )
    return learned, LogisticRegression(data, labels.double(), regularization=0.05), x0


def unrolled(learned: LearnedOptimizer, f: Problem, x: Tensor, steps: int) -> list[Tensor]:
    """f(x_0), .., f(x_steps) by a plain loop, with the graph of autograd."""
    memory, values = learned.initial_memory(x), [f(x)]
    for k in range(steps):
        gradient = f.gradient(x)
        length = gradient.square().sum(-1, keepdim=True).sqrt()
        u, memory = learned.step(k, gradient, memory, length)
        x = x + u
        values.append(f(x))
    return values


def decreasing(values: Sequence[float]) -> int:
    """The number of steps from the start on in which f decreases."""
    pairs = list(pairwise(values))
    rises = [k for k, (before, after) in enumerate(pairs) if not after < before]
    return rises[0] if rises else len(pairs)


def measure(cell: Cell) -> Found:
    """Both sides of (12), and dN and dN* beside differences."""
    learned, f, x0 = make(cell)
    parameters = list(learned.parameters())
    update, criterion = learned.update(f), LossValue(f)
    start = update.initial_state(x0)
    # Of the iteration itself: a target is met at k where it is the very number.
    course = stopping_index(update, start, criterion, 0.0, gradient=None, max_steps=cell.steps)
    steps = decreasing(course.trajectory.losses.tolist())
    if steps < LEAST_STEPS:
        raise RuntimeError(f"the trained {cell.kind} descends for {steps} steps only")
    losses = course.trajectory.losses.tolist()[: steps + 1]
    with torch.enable_grad():
        values = unrolled(learned, f, x0, steps)
        left = _flat(torch.autograd.grad(torch.stack(values[1:]).sum(), parameters))
    targets, drops = x0.new_tensor(losses[1:]), -x0.new_tensor(losses).diff()
    run = stopping_index(update, start, criterion, targets)
    together = _flat(torch.autograd.grad((drops * run.steps).sum(), parameters))
    wrong = int((run.index.cpu() != torch.arange(1, steps + 1)).sum())
    right = torch.zeros_like(left)
    for k in range(1, steps + 1):
        run = stopping_index(update, start, criterion, losses[k], evidence="light")
        wrong += run.index != k
        right += drops[k - 1] * _flat(torch.autograd.grad(run.steps, parameters))

    # The largest drop of the second half: moved parameters must not change N.
    index = max(range(steps // 2 + 1, steps + 1), key=lambda k: losses[k - 1] / losses[k])
    target = (losses[index - 1] * losses[index]) ** 0.5
    by_3, by_log = (
        stopping_index(update, start, criterion, target, interpolation=interpolation)
        for interpolation in (None, "log")
    )
    gradients = [_flat(torch.autograd.grad(one.steps, parameters)) for one in (by_3, by_log)]

    def loss(moved: LearnedOptimizer) -> float:
        return unrolled(moved, f, x0, index)[-1].item()

    def fractional(moved: LearnedOptimizer) -> float:
        rule = moved.update(f)
        found = stopping_index(
            rule, start, criterion, target, gradient=None, interpolation="log", max_steps=4 * index
        )
        return float(found.steps)

    moves = directions(learned, cell)
    drop = losses[index] - losses[index - 1]
    slopes_3 = [-slope(learned, move, loss) / drop for move in moves]
    slopes_log = [slope(learned, move, fractional) for move in moves]
    return Found(
        steps,
        wrong,
        max(float((left - one).norm() / left.norm()) for one in (right, together)),
        float(left.norm()),
        int(by_3.index),
        _worst(gradients[0], moves, slopes_3),
        _worst(gradients[1], moves, slopes_log),
        float((gradients[0] - gradients[1]).norm() / gradients[1].norm()),
    )


def directions(learned: LearnedOptimizer, cell: Cell) -> list[Tensor]:
    """Random changes of all parameters at once, of their own size."""
    generator = torch.Generator().manual_seed(cell.seed + 1)
    size = parameters_to_vector(learned.parameters()).detach()
    noise = [drawn(tuple(size.shape), generator, cell.device) for _ in range(DIRECTIONS)]
    return [one * (size.abs() + 0.1 * size.norm() / len(size) ** 0.5) for one in noise]


def slope(
    learned: LearnedOptimizer, move: Tensor, value: Callable[[LearnedOptimizer], float]
) -> float:
    """Central differences at h and h/2, with the error of order h^2 taken out."""
    middle = parameters_to_vector(learned.parameters()).detach()
    other = copy.deepcopy(learned)

    def at(step: float) -> float:
        with torch.no_grad():
            vector_to_parameters(middle + step * move, other.parameters())
            return value(other)

    coarse, fine = ((at(h) - at(-h)) / (2 * h) for h in (STEP, STEP / 2))
    return (4 * fine - coarse) / 3


def _worst(gradient: Tensor, moves: Sequence[Tensor], slopes: Sequence[float]) -> float:
    figures = [float(gradient @ move) for move in moves]
    gap = max(abs(a - b) for a, b in zip(figures, slopes, strict=True))
    return gap / max(abs(one) for one in slopes)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@check(
    name="learned-optimiser",
    title="Stopping indices of a learned optimiser",
    source="Eq. (12), Definition 3",
    group="learned-optimiser",
    order=42,
)
def learned_optimiser(context: Context) -> Outcome:
    """The stopping index of a learned optimiser has the derivatives that theory gives it.

    Small recurrent networks are trained to go down on diagonal quadratics, and run on a quadratic
    and a logistic regression with a ridge that they have not seen, as far as f decreases.

    Identity (12) holds for their weights: the gradient of sum_k f(x_k), by autograd of a plain
    loop, is sum_k (f(x_{k-1}) - f(x_k)) dN/dtheta at the targets f(x_k), from a run of
    `stopping_index` for each, and from one run for all. At one target between two values of f,
    dN/dtheta by Definition 3 is -df(x_N)/dtheta, by central differences at fixed N, over
    f(x_N) - f(x_{N-1}); and the gradient of the fractional index N* is the slope of N* itself, by
    central differences. The gradients of f that the network is fed depend on theta, too: without
    that term all three would fail.

    Measured: relative differences, and the number of targets at which N is not k. Expected: 0.
    Tolerance: 1e-10 for (12), 1e-7 where there are differences.
    """
    where = {"seed": context.seed, "device": str(context.device)}
    cells = [
        Cell("RNNprop", "quadratic", **where),  # type: ignore[arg-type]
        Cell("RNNprop", "logistic", **where),  # type: ignore[arg-type]
    ]
    if context.profile == "paper":
        cells += [
            Cell("CoordinateLSTM", "quadratic", **where),  # type: ignore[arg-type]
            Cell("RNNprop", "logistic", dim=40, hidden=20, **where),  # type: ignore[arg-type]
        ]
    return judge_learned(context, cells)


def judge_learned(context: Context, cells: Sequence[Cell]) -> Outcome:
    """The check on a choice of networks and problems."""
    measured: dict[str, float] = {}
    bounds: dict[str, float] = {}
    rows = []
    for cell, found in zip(cells, context.map(measure, cells), strict=True):
        name = f"{cell.kind}, {cell.problem}, d = {cell.dim}"
        for what, value, bound in (
            ("identity (12)", found.identity, BOUND),
            ("targets with N other than k", float(found.wrong_index), 0.0),
            ("dN by Definition 3", found.definition_3, DIFFERENCES),
            ("dN*", found.fractional, DIFFERENCES),
        ):
            measured[f"{what}: {name}"], bounds[f"{what}: {name}"] = value, bound
        rows.append(
            [
                name,
                found.steps,
                found.size,
                found.identity,
                found.index,
                found.definition_3,
                found.fractional,
                found.apart,
            ]
        )
    columns = [
        "optimiser and problem",
        "K",
        "norm of the gradient of the sum",
        "difference in (12)",
        "N",
        "error of dN",
        "error of dN*",
        "dN and dN* apart",
    ]
    note = (
        "The last column is no error: Definition 3 and the fractional index are two derivatives, "
        "which differ by what one step changes."
    )
    return Outcome.below(
        measured,
        bounds,
        details={"dtype": "float64"},
        tables=[Table("Derivatives of the stopping index", columns, rows, note)],
    )
