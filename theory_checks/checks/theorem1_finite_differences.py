"""Theorem 1 against central differences of the stopping time, on a problem without closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ode_stopping import (
    ExponentialSchedule,
    GradientNorm,
    QuarticQuadratic,
    RescaledGradientFlow,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.problems.rotations import geometric_spectrum, random_rotation

from ..plotting import COLOURS, MARKERS, new_figure
from ..registry import Context, Figure, Outcome, Table, check
from ..slopes import SlopeFit, fit_slope

DIM = 6
TARGET = 1e-2
START = 0.25
SLOPE_BOUND = 0.05
ERROR_BOUND = 1e-8
# Steps relative to the size of the quantity: FALLING halvings, where errors have to fall fourfold
# each time, and then on to where the noise of two solves takes over.
LARGEST_STEP = 0.04
FALLING = 5
LABELS = {
    "rate": r"$\theta_1$ (rate)",
    "decay": r"$\theta_2$ (decay)",
    "spectrum": r"$\theta=\phi$ (spectrum)",
    "quartic": r"$\theta=\phi$ (quartic)",
    "x0": r"$x_0$",
    "eps": r"$\varepsilon$",
    "t0": r"$t_0$",
}


@dataclass(frozen=True)
class Cell:
    """T at one displaced point: x' = -alpha(t) grad f(x), J = |grad f|^2.

    Attributes:
        name: The quantity that is moved, a key of `LABELS`; "" for none.
        move: By how much, along a fixed direction as long as the quantity itself.
        seed: Of basis and start.
    """

    name: str
    move: float
    seed: int


def leaves_of(seed: int) -> dict[str, Tensor]:
    """Every quantity that T depends on."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(DIM, generator=generator, dtype=torch.float64)
    given = {
        "rate": torch.tensor(1.3, dtype=torch.float64),
        "decay": torch.tensor(0.3, dtype=torch.float64),
        "spectrum": geometric_spectrum(DIM, 8.0),
        "quartic": torch.tensor(1.5, dtype=torch.float64),
        "x0": 1.2 * normal / normal.norm(),
        "eps": torch.tensor(TARGET, dtype=torch.float64),
        "t0": torch.tensor(START, dtype=torch.float64),
    }
    return {name: value.clone().requires_grad_(True) for name, value in given.items()}


def direction_of(name: str, value: Tensor, seed: int) -> Tensor:
    """A direction in which to differentiate, of the length of the quantity."""
    if value.ndim == 0:
        return value.detach().abs()
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    random = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return random / random.norm() * value.detach().norm()


def time_of(leaves: dict[str, Tensor], seed: int, solver: Torchdiffeq, **options: Any) -> Tensor:
    """T, by the library."""
    objective = QuarticQuadratic(
        leaves["spectrum"],
        rotation=random_rotation(DIM, seed=seed),
        quartic=leaves["quartic"],
    )
    schedule = ExponentialSchedule(leaves["rate"], leaves["decay"])  # with a start of its own, 0
    return stopping_time(
        RescaledGradientFlow(objective, schedule=schedule),
        leaves["x0"],
        GradientNorm(objective),
        leaves["eps"],
        t0=leaves["t0"],
        max_time=1e3,
        solver=solver,
        **options,
    ).time


def displaced(cell: Cell) -> float:
    """T with one quantity moved, at a tolerance at which its noise is some 1e-13."""
    leaves = leaves_of(cell.seed)
    if cell.name:
        direction = direction_of(cell.name, leaves[cell.name], cell.seed)
        leaves[cell.name] = leaves[cell.name].detach() + cell.move * direction
    accurate = Torchdiffeq(method="dopri8", rtol=1e-11, atol=1e-15)
    return float(time_of(leaves, cell.seed, accurate, gradient=None))


def derivatives(seed: int) -> dict[str, float]:
    """The directional derivatives of T by the default route, StepAdjoint."""
    leaves = leaves_of(seed)
    time_of(leaves, seed, Torchdiffeq(rtol=1e-11, atol=1e-14)).backward()
    found = {}
    for name, leaf in leaves.items():
        gradient = torch.full_like(leaf, torch.nan) if leaf.grad is None else leaf.grad
        found[name] = float((gradient * direction_of(name, leaf, seed)).sum())
    return found


@check(
    name="theorem-1-finite-differences",
    title="Derivatives against central differences",
    source="Theorem 1",
    group="theorem-1",
    order=12,
)
def finite_differences(context: Context) -> Outcome:
    """Central differences of T tend to the gradient as the square of their step.

    A nonlinear flow that depends on t explicitly, x' = -th1 exp(-th2 t) grad f(x) with the quartic
    f = x^T Q x/2 + c sum x^4/4 (d = 6, Q rotated, condition number 8) and J = |grad f|^2, started
    at t0 = 0.25; differentiated to th1, th2, the spectrum and c (in flow and criterion), x0, eps
    and t0, along a fixed direction where that is a vector.

    Measured: the slope of the error over the first five steps of a ladder, each half the one before
    (2: the error falls fourfold each time), and the smallest error on the ladder, relative to the
    derivative.
    Expected: 2, and 0 up to the plateau where the noise of T divided by the step takes over.
    Tolerance: 0.05 and 1e-8. Differences are of T solved by dopri8 at rtol 1e-11, the gradient is
    the default route's, StepAdjoint's, at rtol 1e-11; always in float64.
    """
    beyond = context.choose(quick=(8, 32), paper=(2,) * 12)
    return judge_differences(context, tuple(LABELS), beyond, derivatives)


def judge_differences(
    context: Context,
    names: Sequence[str],
    beyond: Sequence[int],
    gradient: Callable[[int], dict[str, float]],
) -> Outcome:
    """The check for a choice of quantities, of steps below the halvings, and a gradient to judge.

    Args:
        context: The settings.
        names: Keys of `LABELS`.
        beyond: By what each further step is smaller than the one before.
        gradient: (seed) -> the derivatives by name.
    """
    exact = gradient(context.seed)
    factors = np.cumprod([1.0, *[2.0] * (FALLING - 1), *beyond])
    steps = np.asarray(LARGEST_STEP / factors, dtype=np.float64)
    cells = [Cell(n, sign * h, context.seed) for n in names for h in steps for sign in (1.0, -1.0)]
    times = dict(zip(cells, context.map(displaced, cells), strict=True))
    errors: dict[str, NDArray[np.float64]] = {}
    for name in names:
        up, down = (
            np.array([times[Cell(name, sign * h, context.seed)] for h in steps])
            for sign in (1.0, -1.0)
        )
        quotients = (up - down) / (2 * steps)
        errors[name] = np.abs(quotients - exact[name]) / abs(exact[name])
    measured: dict[str, float] = {}
    expected: dict[str, float] = {}
    bounds: dict[str, float] = {}
    fits: dict[str, SlopeFit] = {}
    for name in names:
        # An error of exactly zero is possible on the plateau, where nothing is fitted.
        fits[name] = fit_slope(steps[:FALLING], np.maximum(errors[name][:FALLING], 1e-300))
        measured[f"slope: {name}"] = fits[name].slope
        expected[f"slope: {name}"], bounds[f"slope: {name}"] = 2.0, SLOPE_BOUND
        measured[f"smallest error: {name}"] = float(errors[name].min())
        expected[f"smallest error: {name}"], bounds[f"smallest error: {name}"] = 0.0, ERROR_BOUND
    rows = [[name, exact[name], fits[name].slope, *errors[name].tolist()] for name in names]
    return Outcome.within(
        measured,
        expected,
        bounds,
        interval=fits[names[0]].interval,
        details={
            "dtype": "float64",
            "steps of the fit": FALLING,
            "intervals of the slopes": {name: fit.interval for name, fit in fits.items()},
            "smallest and largest fall of the error at one halving (of the fitted steps)": {
                name: _falls(errors[name][:FALLING]) for name in names
            },
        },
        tables=[
            Table(
                "Relative error of the central difference, by step",
                ["quantity", "dT along the direction", "slope", *[f"{h:.2g}" for h in steps]],
                rows,
                "Steps are relative to the size of the quantity.",
            )
        ],
        figures=[_figure(steps, errors)],
    )


def _falls(errors: NDArray[np.float64]) -> tuple[float, float]:
    ratios = errors[:-1] / errors[1:]
    return float(ratios.min()), float(ratios.max())


def _figure(steps: NDArray[np.float64], errors: dict[str, NDArray[np.float64]]) -> Figure:
    figure, axes = new_figure()
    for position, (name, values) in enumerate(errors.items()):
        axes.plot(
            steps,
            np.maximum(values, 1e-16),
            marker=MARKERS[position],
            color=COLOURS[position],
            markerfacecolor="white",
            label=LABELS[name],
        )
    largest = max(float(values[0]) for values in errors.values())
    axes.plot(
        steps,
        3 * largest * (steps / steps[0]) ** 2,
        color="#555555",
        linestyle=(0, (4, 3)),
        label="slope 2",
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=r"relative step $\delta$ of the central difference",
        ylabel="relative error against the gradient",
    )
    axes.legend(loc="best", ncols=2)
    caption = (
        "Central differences of the stopping time against the gradient by StepAdjoint. Errors fall "
        "fourfold with every halving of the step until the noise of the two solves, divided by the "
        "step, takes over."
    )
    return Figure("ladder", caption, figure, "errors falling with slope two to a plateau")
