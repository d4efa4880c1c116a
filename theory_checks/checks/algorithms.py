"""Which flow, discretisation and step is which algorithm: iterates beside those of torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete import Algorithm, Euler, UpdateRule
from discrete.rules import algorithms
from ode_stopping import LogisticRegression, Problem, QuarticQuadratic
from ode_stopping.core.states import State
from ode_stopping.problems.datasets import breast_cancer
from ode_stopping.problems.rotations import geometric_spectrum, random_rotation

from ..plotting import COLOURS, new_figure
from ..registry import Context, Figure, Outcome, Table, check

BOUND = 1e-12
STEPS = 200
# How far another order of update has to lead away, relative to the way that the iterates go: a
# comparison that it survives would compare nothing.
LEAST_GAP = 1e-3
Path = Tensor


@dataclass(frozen=True)
class Pair:
    """An algorithm as the library makes it, and the one to compare it with.

    Attributes:
        make: (f, learning rate) -> the algorithm.
        reference: (f, x0, learning rate) -> the iterates x_1, .., x_STEPS, shape (STEPS, d).
        rate: Learning rate; times 1/L where steps are multiples of the gradient.
    """

    make: Callable[[Problem, float], Algorithm]
    reference: Callable[[Problem, Tensor, float], Path]
    rate: float


def by_torch(
    kind: type[torch.optim.Optimizer], **options: Any
) -> Callable[[Problem, Tensor, float], Path]:
    """The iterates of an optimiser of torch."""

    def run(f: Problem, x0: Tensor, rate: float) -> Path:
        point = x0.clone().requires_grad_()
        optimizer = kind([point], lr=rate, **options)  # type: ignore[call-arg]
        path = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            f(point).backward()
            optimizer.step()
            path.append(point.detach().clone())
        return torch.stack(path)

    return run


def look_ahead_points(f: Problem, x0: Tensor, rate: float) -> Path:
    """Nesterov's method by hand; its look-ahead points y_k."""
    x, y, path = x0, x0, []
    for k in range(STEPS):
        following = y - rate * f.gradient(y)
        y = following + k / (k + 3) * (following - x)
        x = following
        path.append(y)
    return torch.stack(path)


PAIRS: dict[str, Pair] = {
    "gradient descent": Pair(
        lambda f, lr: algorithms.gradient_descent(f, lr=lr), by_torch(torch.optim.SGD), 0.5
    ),
    "SGD, momentum": Pair(
        lambda f, lr: algorithms.sgd(f, lr=lr, momentum=0.9),
        by_torch(torch.optim.SGD, momentum=0.9),
        0.1,
    ),
    "SGD, nesterov=True": Pair(
        lambda f, lr: algorithms.sgd(f, lr=lr, momentum=0.9, nesterov=True),
        by_torch(torch.optim.SGD, momentum=0.9, nesterov=True),
        0.1,
    ),
    "Nesterov's method": Pair(lambda f, lr: algorithms.nesterov(f, lr=lr), look_ahead_points, 0.5),
    "RMSprop": Pair(
        lambda f, lr: algorithms.rmsprop(f, lr=lr, alpha=0.98),
        by_torch(torch.optim.RMSprop, alpha=0.98),
        0.003,
    ),
    "Adam": Pair(
        lambda f, lr: algorithms.adam(f, lr=lr, betas=(0.9, 0.99)),
        by_torch(torch.optim.Adam, betas=(0.9, 0.99)),
        0.01,
    ),
}
# The step of these is no multiple of the gradient, and does not shrink with the curvature.
OWN_SCALE = ("RMSprop", "Adam")


class PositionFirst(UpdateRule):
    """Planted: the position moves with the old states, then the others at the new position."""

    order = 1

    def advance(self, t: Tensor, x: State, step: float | Tensor) -> State:
        """The state after a step of this size."""
        assert isinstance(x, tuple)
        moved = (x[0] + step * self.flow(t, x)[0], *x[1:])
        slopes = self.flow(t, moved)
        pairs = zip(x[1:], slopes[1:], strict=True)
        return (moved[0], *(piece + step * slope for piece, slope in pairs))


WRONG: dict[str, tuple[str, type[UpdateRule]]] = {
    "SGD with momentum, position first": ("SGD, momentum", PositionFirst),
    "SGD with momentum, old velocity": ("SGD, momentum", Euler),
    "Adam, old moments": ("Adam", Euler),
    "Adam, position first": ("Adam", PositionFirst),
}


def make_problem(kind: str) -> tuple[Problem, Tensor, float]:
    """f, x0 and the scale 1/L of the learning rates.

    L is the largest curvature of the path, on the quartic about twice that of its quadratic part.
    """
    if kind == "quartic":
        rotation = random_rotation(10, seed=4)
        f: Problem = QuarticQuadratic(geometric_spectrum(10, 20.0), rotation=rotation)
        generator = torch.Generator().manual_seed(0)
        return f, torch.randn(10, generator=generator, dtype=torch.float64), 1.0 / 40.0
    features, labels = breast_cancer()
    logistic = LogisticRegression(features, labels, regularization=1e-2, intercept=True)
    x0 = torch.full((logistic.dim,), 0.1, dtype=torch.float64)
    return logistic, x0, 1.0 / float(logistic.lipschitz() or 1.0)


@dataclass(frozen=True)
class Cell:
    """An algorithm of `PAIRS`, or a planted order of `WRONG`, on a problem."""

    name: str
    kind: str


@dataclass(frozen=True)
class Gaps:
    """How far the library's iterates are from the others.

    Attributes:
        steps: The largest difference of an element, step by step.
        way: The largest distance of an iterate's element from its start.
    """

    steps: tuple[float, ...]
    way: float

    @property
    def largest(self) -> float:
        """Over all steps."""
        # Not max(): it would lose a NaN.
        return float(np.max(self.steps))


def compare(cell: Cell) -> Gaps:
    """Follow both sides for `STEPS` steps."""
    f, x0, scale = make_problem(cell.kind)
    name, rule = WRONG.get(cell.name, (cell.name, None))
    pair = PAIRS[name]
    rate = pair.rate if name in OWN_SCALE else pair.rate * scale
    algorithm = pair.make(f, rate)
    update = algorithm.update if rule is None else rule(algorithm.flow, step=algorithm.update.step)
    state, own = algorithm.initial_state(x0), []
    with torch.no_grad():
        for k in range(STEPS):
            time = torch.as_tensor(algorithm.t0 + k * update.step, dtype=torch.float64)
            state = update(k, state, time)
            own.append(algorithm.flow.position(state).clone())
    known = pair.reference(f, x0, rate)
    gaps = (torch.stack(own) - known).abs().amax(-1)
    return Gaps(tuple(gaps.tolist()), float((known - x0).abs().max()))


@check(
    name="algorithms",
    title="Optimisers as flow, discretisation and step",
    source="Beyond the paper (flows of the known optimisers)",
    group="algorithms",
    order=65,
)
def algorithms_check(context: Context) -> Outcome:
    """The iterates of `discrete.algorithms` are those of torch.optim, to rounding.

    SGD without and with momentum, with nesterov=True, RMSprop and Adam beside torch.optim, and
    Nesterov's method beside its formula, at its look-ahead points: 200 steps on a quartic (d = 10)
    and on logistic regression (breast cancer).

    Measured: the largest difference of any element at any step, and the least difference that a
    wrong order of update makes (the position first, or with the old states), relative to the way of
    the iterates. Expected: 0, and a gap. Tolerance: 1e-12, and at least 1e-3.
    """
    return judge_algorithms(context, tuple(PAIRS), ("quartic", "logistic"))


def judge_algorithms(context: Context, names: Sequence[str], kinds: Sequence[str]) -> Outcome:
    """The check on a choice of algorithms and problems."""
    right = [Cell(name, kind) for name in names for kind in kinds]
    planted = [Cell(name, kind) for name, (of, _) in WRONG.items() if of in names for kind in kinds]
    cells = [*right, *planted]
    found = dict(zip(cells, context.map(compare, cells), strict=True))
    measured = {
        name: float(np.max([found[Cell(name, kind)].largest for kind in kinds])) for name in names
    }
    expected: dict[str, Any] = dict.fromkeys(names, 0.0)
    tolerance: dict[str, Any] = dict.fromkeys(names, BOUND)
    passed = all(value <= BOUND for value in measured.values())
    shares = {cell: found[cell].largest / found[cell].way for cell in planted}
    if planted:
        label = "least gap of a wrong order of update"
        measured[label] = min(shares.values())
        expected[label], tolerance[label] = "a gap", f"at least {LEAST_GAP:g}"
        passed = passed and measured[label] >= LEAST_GAP
    return Outcome(
        measured,
        expected,
        tolerance,
        passed,
        details={
            "dtype": "float64",
            "steps": STEPS,
            "wrong orders, relative to the way": {
                f"{cell.name}: {cell.kind}": share for cell, share in shares.items()
            },
        },
        tables=[
            Table(
                "Largest differences over all steps",
                ["algorithm", "problem", "difference", "way of the iterates", "same"],
                [[c.name, c.kind, g.largest, g.way, g.largest <= BOUND] for c, g in found.items()],
                "Difference: of any element, at any step. Way: the largest distance of an element "
                "from its start. The last rows are planted orders of update.",
            )
        ],
        figures=[_figure(found, right, planted)],
    )


def _figure(found: dict[Cell, Gaps], right: Sequence[Cell], planted: Sequence[Cell]) -> Figure:
    figure, axes = new_figure(1, 2, width=4.2)
    kinds = list(dict.fromkeys(cell.kind for cell in right))
    panels = dict(zip(kinds, np.atleast_1d(axes), strict=False))
    numbers = np.arange(1, STEPS + 1)
    for group, dashes in ((right, "-"), (planted, (0, (4, 2)))):
        names = list(dict.fromkeys(cell.name for cell in group))
        for cell in group:
            gaps = np.array(found[cell].steps)
            panels[cell.kind].plot(
                numbers,
                # Equal to the last bit is off the axis otherwise.
                np.maximum(gaps, 1e-18),
                linestyle=dashes,
                color=COLOURS[names.index(cell.name) % len(COLOURS)],
                label=cell.name,
            )
    for kind, panel in panels.items():
        panel.axhline(BOUND, color="#555555", linewidth=0.8)
        panel.set(yscale="log", xlabel="step", title=kind, ylim=(1e-18, 1e2))
    first = panels[kinds[0]]
    first.set_ylabel("largest difference of an element")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    caption = (
        "Differences to torch.optim (or to Nesterov's formula), step by step. Solid: the library's "
        "algorithms, at rounding; below the grey line of the tolerance. Dashed: planted orders of "
        "update, which are other algorithms. Differences of zero are drawn at 1e-18."
    )
    return Figure("differences", caption, figure, "solid lines near 1e-15, dashed ones far above")
