"""The energies of the flows along their own paths, and what they imply for f."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ode_stopping import Torchdiffeq, stopping_time
from ode_stopping.flows import InertialHessianFlow

from ..plotting import COLOURS, MARKERS, new_figure
from ..registry import Context, Figure, Outcome, Table, check
from ._flows import FLOWS, setting

# The solver makes this error in E, relative to E(t0), and no flow has to rise by more.
RISE_BOUND = 1e-9
RTOL = 1e-11
SPAN = 6.0

# (flow, t, E(t0)) -> what f - f* may be at t; the strongly convex flows start at t0 = 0.
LossBound = Callable[[Any, Tensor, float], Tensor]


def _nesterov(flow: Any, t: Tensor, start: float) -> Tensor:
    return start / t**2


def _hessian_damped(flow: Any, t: Tensor, start: float) -> Tensor:
    assert isinstance(flow, InertialHessianFlow)
    weights = torch.stack([flow.weight(one, one) for one in t])
    return start / (t**2 * weights)


def _strongly_convex(flow: Any, t: Tensor, start: float) -> Tensor:
    return start * torch.exp(-flow.mu.value.sqrt() * t)


def _high_resolution(flow: Any, t: Tensor, start: float) -> Tensor:
    mu, s = flow.mu.value, flow.s.value
    return start * torch.exp(-0.25 * mu.sqrt() * t) / (1.0 + (mu * s).sqrt())


BOUNDS: dict[str, tuple[str, LossBound]] = {
    "Nesterov": ("E(t0)/t^2", _nesterov),
    "NAG-SC": ("E(t0) exp(-sqrt(mu) t)", _strongly_convex),
    "high resolution": ("E(t0) exp(-sqrt(mu) t/4)/(1 + sqrt(mu s))", _high_resolution),
    "Hessian damping": ("E(t0)/(t^2 w)", _hessian_damped),
}


@dataclass(frozen=True)
class Course:
    """An energy along a path.

    Attributes:
        times: The accepted times of the solver, from t0.
        energy: E there, relative to E(t0).
        excess: f - f* there, relative to E(t0).
        share: The largest (f - f*)/bound; NaN where no bound is claimed.
    """

    times: tuple[float, ...]
    energy: tuple[float, ...]
    excess: tuple[float, ...]
    share: float

    @property
    def rise(self) -> float:
        """The largest rise of E above an earlier value of it, relative to E(t0)."""
        values = np.array(self.energy)
        return float((values - np.minimum.accumulate(values)).max())


def course(name: str) -> Course:
    """Follow a flow for `SPAN`, and look at its energy at the solver's own steps.

    Between them the dense output would add an error of its own.
    """
    own = setting(name)
    end = own.t0 + SPAN

    def time_left(t: Tensor, state: Any) -> Tensor:
        return end - t

    solver = Torchdiffeq(method="dopri8", rtol=RTOL)
    result = stopping_time(own.flow, own.state, time_left, 0.0, t0=own.t0, solver=solver)
    times, states = result.trajectory.times, result.trajectory.states
    with torch.no_grad():
        one_by_one = [
            tuple(piece[i] for piece in states) if isinstance(states, tuple) else states[i]
            for i in range(len(times))
        ]
        energy = torch.stack(
            [own.flow.energy(t, state) for t, state in zip(times, one_by_one, strict=True)]
        )
        position = states[0] if isinstance(states, tuple) else states
        excess = own.flow.excess(position)
        start = float(energy[0])
        share = math.nan
        if name in BOUNDS:
            share = float((excess / BOUNDS[name][1](own.flow, times, start)).max())
    of_energy, of_excess = (tuple((e / start).tolist()) for e in (energy, excess))
    return Course(tuple(times.tolist()), of_energy, of_excess, share)


@check(
    name="energies",
    title="The energies of the flows fall",
    source="Beyond the paper (Lyapunov functions of the flows)",
    group="energies",
    order=67,
)
def energies_check(context: Context) -> Outcome:
    """The energy of each flow never rises along its path, and f - f* keeps the bound it implies.

    Each of the ten flows on the convex quartic, where the condition of its energy holds: alpha >= 3
    for Nesterov's flow, the margins of convergence for the one with Hessian-driven damping, mu at
    most the modulus for the strongly convex ones, tau1 <= 4 tau2 and a start of infinite age for
    Adam.

    Measured: the largest rise of E above an earlier value, relative to E(t0), and the largest
    (f - f*)/bound, with E(t0)/t^2 for Nesterov's flow, E(t0)/(t^2 w) with Hessian damping, and the
    exponential bounds of the strongly convex flows. Expected: no rise, and at most 1. Tolerance:
    1e-9, for the error of the solver (rtol 1e-11).
    """
    return judge_energies(context, tuple(FLOWS))


def judge_energies(context: Context, flows: Sequence[str]) -> Outcome:
    """The check on a choice of flows."""
    found = dict(zip(flows, context.map(course, flows), strict=True))
    measured: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for name, one in found.items():
        measured[f"rise: {name}"], bounds[f"rise: {name}"] = one.rise, RISE_BOUND
        if name in BOUNDS:
            key = f"(f - f*)/bound: {name}"
            measured[key], bounds[key] = one.share, 1.0
    return Outcome.below(
        measured,
        bounds,
        details={"rtol": RTOL, "dtype": "float64", "length of the paths": SPAN},
        tables=[
            Table(
                "Energies along the paths",
                ["flow", "largest rise of E", "E at the end", "bound on f - f*", "share of it"],
                [
                    [
                        name,
                        one.rise,
                        one.energy[-1],
                        BOUNDS[name][0] if name in BOUNDS else "",
                        one.share if name in BOUNDS else None,
                    ]
                    for name, one in found.items()
                ],
                "Energies relative to E(t0). Without a bound: E is f - f* itself. Share: the "
                "largest (f - f*)/bound.",
            )
        ],
        figures=[_figure(found)],
    )


def _figure(found: dict[str, Course]) -> Figure:
    figure, axes = new_figure(1, 2, width=4.2)
    for panel, title in zip(axes, ("energy E", "f - f*"), strict=True):
        for position, (name, one) in enumerate(found.items()):
            values = one.energy if panel is axes[0] else one.excess
            panel.plot(
                np.array(one.times) - one.times[0],
                values,
                color=COLOURS[position % len(COLOURS)],
                marker=MARKERS[position % len(MARKERS)],
                markevery=0.15,
                markersize=3.5,
                markerfacecolor="white" if position < len(COLOURS) else None,
                label=name,
            )
        panel.set(yscale="log", xlabel=r"$t - t_0$ (flow time)", title=title, ylim=(1e-8, 2.0))
    axes[0].set_ylabel(r"relative to $E(t_0)$")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    caption = (
        "Left: the energy of each flow along its path, which never rises. Right: f - f* along the "
        "same paths, which does. Both relative to the energy at the start."
    )
    return Figure("energies", caption, figure, "left only falling curves, right oscillating ones")
