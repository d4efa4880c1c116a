"""Repeated infusions at learned times: when the level is crossed, against superposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from ode_stopping import Event, integrate

from ..plotting import new_figure
from ..registry import Context, Figure, Outcome, Table, check
from ._events import errors_of, jacobian, leaves_of
from ._rotated import ROUTES

DOSES = 12
END = 13.0
BOUND = 1e-6
VALUE_BOUND = 1e-7
SAMPLES = 4000
# Crossings that are looked at one by one, from the first; the last is added.
SINGLE = (0, 10)


@dataclass(frozen=True)
class Cell:
    """One solve: a route, and the seed of the schedule."""

    route: str
    seed: int


@dataclass(frozen=True)
class Errors:
    """Errors of one solve.

    Attributes:
        crossings: How many crossings were found, less how many there are.
        times: The largest error of a crossing time, in flow time.
        above: The largest relative error of a derivative of the time above the level, by leaf.
        single: Likewise of single crossings.
    """

    crossings: int
    times: float
    above: dict[str, float]
    single: dict[str, float]


def schedule(seed: int) -> dict[str, Tensor]:
    """Starts, durations and rates of 12 infusions, one about every unit of time, and constants."""
    generator = torch.Generator().manual_seed(seed)
    first, second, third = torch.rand((3, DOSES), generator=generator, dtype=torch.float64)
    starts = torch.arange(DOSES) + 0.05 + 0.1 * first
    return leaves_of(
        {
            "starts": starts.tolist(),
            "durations": (0.3 + 0.1 * second).tolist(),
            "rates": (4.0 + third).tolist(),
            "elimination": 0.9,
            "level": 1.5,
            "C0": [0.2],
        }
    )


def concentration(leaves: Mapping[str, Tensor], t: Tensor) -> Tensor:
    """C(t), shape (), the superposition of what each infusion has brought.

        C(t) = C0 exp(-k t) + sum_i r_i/k (exp(-k (s_i - u_i)) - exp(-k s_i)),

    s_i = max(t - start_i, 0) since the start of infusion i, u_i = min(s_i, duration_i) of it on.
    """
    k = leaves["elimination"]
    since = (t - leaves["starts"]).clamp(min=0.0)
    on = torch.minimum(since, leaves["durations"])
    parts = leaves["rates"] / k * (torch.exp(-k * (since - on)) - torch.exp(-k * since))
    return leaves["C0"][0] * torch.exp(-k * t) + parts.sum()


def excess(leaves: Mapping[str, Tensor], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """C - level at many times, without graph."""
    with torch.no_grad():
        values = [concentration(leaves, t) for t in torch.from_numpy(times).unbind()]
        return np.asarray((torch.stack(values) - leaves["level"]).numpy())


def true_crossings(leaves: Mapping[str, Tensor]) -> Tensor:
    """Every time at which C is at the level, in order, with derivatives by the implicit function.

    dT = -(dC - d level) / C'(T).
    """
    grid = np.linspace(0.0, END, SAMPLES, dtype=np.float64)
    values = excess(leaves, grid)
    found = []
    for index in np.flatnonzero(values[1:] * values[:-1] < 0):
        root = brentq(
            lambda t: float(excess(leaves, np.array([t]))[0]),
            grid[index],
            grid[index + 1],
            xtol=1e-15,
        )
        time = torch.tensor(root, dtype=torch.float64, requires_grad=True)
        (rate,) = torch.autograd.grad(concentration(leaves, time), time)
        miss = concentration(leaves, time.detach()) - leaves["level"]
        found.append(root - (miss - miss.detach()) / rate)
    return torch.stack(found)


def found_crossings(leaves: Mapping[str, Tensor], route: str) -> Tensor:
    """The same by the library, at default settings."""

    def flow(t: Tensor, x: Tensor) -> Tensor:
        starts = leaves["starts"].detach()
        on = (t >= starts) & (t < starts + leaves["durations"].detach())
        return (on * leaves["rates"]).sum() - leaves["elimination"] * x

    solution = integrate(
        flow,
        leaves["C0"],
        until=END,
        events=[Event(lambda t, x: x[0], leaves["level"], direction="either")],
        breakpoints=torch.cat([leaves["starts"], leaves["starts"] + leaves["durations"]]),
        gradient=ROUTES[route](),
    )
    return torch.stack([hit.time for hit in solution.hits])


def time_above(crossings: Tensor) -> Tensor:
    """How long C is above the level, shape (); it is below at both ends."""
    return crossings[1::2].sum() - crossings[0::2].sum()


def solve(cell: Cell) -> Errors:
    """Errors of the crossings and of their derivatives, by one route."""
    leaves = schedule(cell.seed)
    found, exact = found_crossings(leaves, cell.route), true_crossings(leaves)
    missing = len(found) - len(exact)
    if missing:
        nothing = dict.fromkeys(leaves, float("nan"))
        return Errors(missing, float("nan"), nothing, nothing)
    rows = [*SINGLE, len(exact) - 1]
    ours, truth = (torch.stack([time_above(t), *t[rows]]) for t in (found, exact))
    gradients, right = jacobian(ours, leaves), jacobian(truth, leaves)
    return Errors(
        0,
        float((found - exact).abs().max().detach()),
        errors_of(gradients[:1], right[:1], leaves),
        errors_of(gradients[1:], right[1:], leaves),
    )


@check(
    name="events-dosing",
    title="Twelve infusions at learned times: when the level is crossed",
    source="Theorem 1, with breakpoints and events beyond the paper",
    group="events",
    order=91,
)
def events_dosing(context: Context) -> Outcome:
    """The time above a level over 12 infusions, differentiated to when each begins and how long.

    C' = -k C + sum of the rates of the infusions that are on; starts and ends are breakpoints that
    require grad. The level is crossed upward and downward, with every infusion once or not at all.
    The truth is the superposition of closed forms, its roots by bisection, their derivatives by the
    implicit function theorem. Differentiated are the time above the level and three of the
    crossings, to the 12 starts, the 12 durations, the 12 rates, k, the level and C(0).

    Measured: by route, the largest relative error of a derivative (norms for vectors; the error
    itself where it has to be zero), crossings that are missing, and the error of the times.
    Tolerance: 1e-6 for derivatives, 1e-7 for times, at default settings and in float64. Quick: the
    default route.
    """
    routes = context.choose(quick=("StepAdjoint",), paper=tuple(ROUTES))
    return judge_dosing(context, routes)


def judge_dosing(context: Context, routes: Sequence[str]) -> Outcome:
    """The check on a choice of routes.

    Args:
        context: The settings.
        routes: Keys of `ROUTES`.
    """
    cells = [Cell(route, context.seed) for route in routes]
    found = dict(zip(routes, context.map(solve, cells), strict=True))
    measured: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for route, errors in found.items():
        for what, parts in (("time above", errors.above), ("crossings", errors.single)):
            measured[f"{what}: {route}"] = float(np.max(list(parts.values())))
            bounds[f"{what}: {route}"] = BOUND
    measured["times of the crossings"] = float(np.max([one.times for one in found.values()]))
    bounds["times of the crossings"] = VALUE_BOUND
    wrong = float(np.max([abs(one.crossings) for one in found.values()]))
    measured["crossings too few or too many"], bounds["crossings too few or too many"] = wrong, 0.0
    leaves = schedule(context.seed)
    crossings = true_crossings(leaves).detach()
    return Outcome.below(
        measured,
        bounds,
        details={
            "dtype": "float64",
            "doses": DOSES,
            "crossings": len(crossings),
            "time above the level": float(time_above(crossings)),
        },
        tables=[
            Table(
                "Relative errors by leaf",
                ["route", "of", *leaves],
                [
                    [route, what, *(parts[name] for name in leaves)]
                    for route, errors in found.items()
                    for what, parts in (("time above", errors.above), ("single", errors.single))
                ],
                "Of a vector the norm of the error over the norm of the derivative.",
            )
        ],
        figures=[_figure(leaves, crossings)],
    )


def _figure(leaves: Mapping[str, Tensor], crossings: Tensor) -> Figure:
    figure, axes = new_figure()
    times = np.linspace(0.0, END, 600, dtype=np.float64)
    level = float(leaves["level"].detach())
    axes.plot(times, excess(leaves, times) + level, label="concentration")
    axes.axhline(level, color="#555555", linestyle=(0, (4, 3)), label="level")
    axes.plot(crossings.numpy(), np.full(len(crossings), level), "o", markerfacecolor="white")
    axes.set(xlabel="t (flow time)", ylabel="C(t)")
    axes.legend(loc="best")
    caption = (
        "The concentration over the twelve infusions, and the times at which it crosses the level: "
        "up while an infusion is on, down after it."
    )
    return Figure("concentration", caption, figure, "a saw of twelve teeth across a dashed line")
