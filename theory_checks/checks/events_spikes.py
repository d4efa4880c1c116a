"""Leaky integrate-and-fire: spike times against DOP853 with differences, and a closed form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Tensor

from ode_stopping import Event, integrate

from ..registry import Context, Outcome, Table, check
from ._events import errors_of, jacobian, leaves_of, worst_figure
from ._rotated import ROUTES

SPIKES = 20
# The spikes that are differentiated, each to every parameter.
NUMBERS = (1, 2, 5, 10, 20)
BOUND = 1e-6
VALUE_BOUND = 1e-6
# DOP853's interpolant, in which the threshold is looked for, is of a lower order than its steps.
LONGEST_STEP = 0.1
# Of the differences, which are of fourth order.
MOVE = 3e-4
NEURON = {
    "tau": 1.0,
    "I0": 1.8,
    "A": 0.3,
    "omega": 1.5,
    "phase": 0.5,
    "threshold": 1.0,
    "reset": -0.2,
    "v0": 0.1,
    "t0": 0.1,
}


@dataclass(frozen=True)
class Cell:
    """One solve: the input, "sinusoidal" or "constant", and a route."""

    drive: str
    route: str


@dataclass(frozen=True)
class Errors:
    """Errors of one solve: of the spike times, of derivatives by leaf, and by spike."""

    times: float
    leaves: dict[str, float]
    spikes: list[float]


def neuron(drive: str) -> dict[str, float]:
    """The parameters of a neuron; without those of the sine where the input is constant."""
    sine = ("A", "omega", "phase")
    return {k: v for k, v in NEURON.items() if drive == "sinusoidal" or k not in sine}


def constant_truth(leaves: Mapping[str, Tensor]) -> Tensor:
    """T_n of a constant input, shape (SPIKES,), with its graph.

    T_n = t0 + tau (log((I0 - v0)/(I0 - threshold)) + (n - 1) log((I0 - reset)/(I0 - threshold)))
    """
    drive, below = leaves["I0"], leaves["I0"] - leaves["threshold"]
    first = ((drive - leaves["v0"]) / below).log()
    between = ((drive - leaves["reset"]) / below).log()
    return leaves["t0"] + leaves["tau"] * (first + torch.arange(SPIKES) * between)


def simulated(values: Mapping[str, float]) -> NDArray[np.float64]:
    """T_1 .. T_SPIKES by SciPy's DOP853 at 1e-12, spike by spike."""

    def velocity(t: float, v: NDArray[np.float64]) -> NDArray[np.float64]:
        sine = values["A"] * math.sin(values["omega"] * t + values["phase"])
        return (values["I0"] + sine - v) / values["tau"]

    def excess(t: float, v: NDArray[np.float64]) -> float:
        return float(v[0]) - values["threshold"]

    excess.terminal, excess.direction = True, 1.0  # type: ignore[attr-defined]
    times: list[float] = []
    t, start = values["t0"], values["v0"]
    for _ in range(SPIKES):
        found = solve_ivp(
            velocity,
            (t, t + 50.0),
            [start],
            method="DOP853",
            rtol=1e-12,
            atol=1e-14,
            max_step=LONGEST_STEP,
            events=excess,
        )
        t, start = float(found.t_events[0][0]), values["reset"]
        times.append(t)
    return np.array(times)


def differences(values: Mapping[str, float]) -> NDArray[np.float64]:
    """d T_n / d values, shape (SPIKES, P), by differences of fourth order."""
    columns = []
    for name, value in values.items():
        step = MOVE * (abs(value) or 1.0)
        up, down, far_up, far_down = (
            simulated({**values, name: value + m * step}) for m in (1, -1, 2, -2)
        )
        columns.append((8 * (up - down) - (far_up - far_down)) / (12 * step))
    return np.stack(columns, axis=1)


def spikes(leaves: Mapping[str, Tensor], route: str) -> Tensor:
    """T_1 .. T_SPIKES by the library, at default settings."""

    def flow(t: Tensor, v: Tensor) -> Tensor:
        drive = leaves["I0"]
        if "A" in leaves:
            drive = drive + leaves["A"] * torch.sin(leaves["omega"] * t + leaves["phase"])
        return (drive - v) / leaves["tau"]

    solution = integrate(
        flow,
        leaves["v0"].reshape(1),
        t0=leaves["t0"],
        events=[
            Event(
                lambda t, v: v[0],
                leaves["threshold"],
                direction="rising",
                reset=lambda t, v: leaves["reset"].reshape(1),
                count=SPIKES,
            )
        ],
        gradient=ROUTES[route](),
    )
    return torch.stack([hit.time for hit in solution.hits])


def truth_of(drive: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The spike times, and their derivatives, without the library."""
    values = neuron(drive)
    if drive == "sinusoidal":
        return simulated(values), differences(values)
    leaves = leaves_of(values)
    times = constant_truth(leaves)
    return times.detach().numpy(), jacobian(times, leaves)


def errors_against(
    cell: Cell, times: NDArray[np.float64], gradients: NDArray[np.float64]
) -> Errors:
    """Errors of one solve against the truth."""
    leaves = leaves_of(neuron(cell.drive))
    found = spikes(leaves, cell.route)
    rows = [number - 1 for number in NUMBERS]
    ours, truth = jacobian(found[rows], leaves), gradients[rows]
    largest = np.abs(truth).max(axis=0)
    single = (np.abs(ours - truth) / np.where(largest > 0.0, largest, 1.0)).max(axis=1).tolist()
    gap = float(np.abs(found.detach().numpy() - times).max())
    return Errors(gap, errors_of(ours, truth, leaves, by_column=True), single)


@check(
    name="events-spikes",
    title="Integrate-and-fire: twenty spikes and their derivatives",
    source="Theorem 1 and the saltation formula",
    group="events",
    order=92,
)
def events_spikes(context: Context) -> Outcome:
    """Times of 20 spikes of a leaky integrate-and-fire neuron, differentiated to every parameter.

    tau v' = -v + I0 + A sin(omega t + phase); at the threshold v is set back. With A the truth is
    SciPy's DOP853 at 1e-12 and differences of fourth order of its spike times; without it T_n is a
    closed form. Every derivative of spikes 1, 2, 5, 10 and 20 counts: to tau, I0, A, omega, phase,
    the threshold, the reset, v(t0) and t0.

    Measured: by input and route the largest error of a derivative, relative to the largest one to
    that parameter (some pass near zero by accident), and the error of the times. Tolerance: 1e-6,
    at default settings and in float64. Quick: the default route.
    """
    routes = context.choose(quick=("StepAdjoint",), paper=tuple(ROUTES))
    return judge_spikes(context, ("sinusoidal", "constant"), routes)


def judge_spikes(context: Context, drives: Sequence[str], routes: Sequence[str]) -> Outcome:
    """The check on a choice of inputs and routes.

    Args:
        context: The settings.
        drives: "sinusoidal", "constant".
        routes: Keys of `ROUTES`.
    """
    found: dict[Cell, Errors] = {}
    for drive in drives:
        times, gradients = truth_of(drive)
        for route in routes:
            context.progress(f"{drive} input, {route}")
            found[Cell(drive, route)] = errors_against(Cell(drive, route), times, gradients)
    measured: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for cell, errors in found.items():
        name = f"derivatives, {cell.drive} input: {cell.route}"
        measured[name] = float(np.max(list(errors.leaves.values())))
        bounds[name] = BOUND
    measured["spike times"] = float(np.max([errors.times for errors in found.values()]))
    bounds["spike times"] = VALUE_BOUND
    return Outcome.below(
        measured,
        bounds,
        details={"dtype": "float64", "neuron": NEURON, "spikes": list(NUMBERS)},
        tables=[
            Table(
                "Largest error of a derivative, by leaf",
                ["input", "route", *NEURON],
                [
                    [cell.drive, cell.route, *(errors.leaves.get(name) for name in NEURON)]
                    for cell, errors in found.items()
                ],
                "Relative to the largest derivative to the leaf over these spikes.",
            )
        ],
        figures=[
            worst_figure(
                "spikes",
                {f"{c.drive}, {c.route}": (NUMBERS, e.spikes) for c, e in found.items()},
                label="spike",
                bound=BOUND,
                caption="The largest relative error of a derivative of the spike time, by the "
                "number of the spike.",
            )
        ],
    )
