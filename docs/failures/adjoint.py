"""A right time with a wrong gradient: parts 1 to 3 of the page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import log, sqrt
from unittest.mock import patch

import numpy as np
import torch
from outcomes import gradient_of, relative, said
from page import OURS, PEER, THIRD, Table, canvas
from peers import Field, peer_time
from problems import F64, half_square, parameter
from rotated_flow import Rotated

from ode_stopping import BacksolveAdjoint, Torchdiffeq, stopping_time
from ode_stopping.solving import errors as control


def backward() -> Table:
    """x integrated backward."""
    table = Table(
        ["condition", "torchdiffeq: error of T", "of dT/dp", "here: error of T", "of dT/dp",
         "here, `BacksolveAdjoint`"]
    )  # fmt: skip
    conditions, peers, own = [1.5, 3.0, 10.0, 30.0, 100.0], [], []
    for condition in conditions:
        problem = Rotated(condition)
        result, gradient, _ = problem.ours(1e-6)
        end, truth = problem.truth(float(result.time.detach()))
        event, other, _ = problem.peer(1e-6, adjoint=True)
        peers.append(relative(other, truth))
        own.append(relative(gradient, truth))
        table.add(
            f"{condition:g}",
            abs(event / end - 1),
            peers[-1],
            abs(float(result.time.detach()) / end - 1),
            own[-1],
            said(lambda p=problem, t=truth: relative(p.ours(1e-6, BacksolveAdjoint())[1], t)),
        )
    with canvas("backward", width=3.9, height=2.5) as (_, axes):
        axes.loglog(conditions, peers, "s-", color=PEER, label="torchdiffeq, odeint_adjoint")
        axes.loglog(conditions, own, "o-", color=OURS, label="here, InterpolatingAdjoint")
        axes.axhline(1.0, color="#555555", linewidth=0.8, linestyle=":")
        axes.set(xlabel="condition number", ylabel="relative error of dT/dp", ylim=(1e-10, 1e82))
        axes.text(1.5, 3e1, "100 % wrong", fontsize=8.5, color="#555555")
        axes.legend(loc="upper left")
    return table


@contextmanager
def without_velocity_control() -> Iterator[None]:
    """The planted omission of tests/test_control.py: the error of the state alone."""
    with (
        patch.object(control.VelocityError, "_ratio", lambda self, *lists: 0.0),
        patch("ode_stopping.crossing.run._POLISH_AFTER", 10**9),
    ):
        yield


def stiff() -> Table:
    """A right T with a wrong gradient."""
    table = Table(
        ["rtol", "control of the velocity", "error of T", "error of dT/dp", "evaluations", "warned"]
    )
    problem = Rotated(1000.0, 1e-5)
    rtols = [1e-3, 1e-4, 1e-5, 1e-6, 1e-7]
    curves: dict[str, list[tuple[float, float, float, bool]]] = {"on": [], "off": [], "peer": []}
    end, truth = problem.truth(158.0)
    for rtol in rtols:
        for name in ("on", "off"):
            with nullcontext() if name == "on" else without_velocity_control():
                result, gradient, warned = problem.ours(rtol)
            row = abs(float(result.time.detach()) / end - 1), relative(gradient, truth)
            calls = result.stats.nfe_forward
            curves[name].append((*row, calls, warned))
            table.add(f"{rtol:.0e}", name, *row, calls, "yes" if warned else "no")
        event, other, flow = problem.peer(rtol, adjoint=False)
        row = abs(event / end - 1), relative(other, truth)
        curves["peer"].append((*row, flow.calls, False))
        table.add(f"{rtol:.0e}", "(torchdiffeq, `odeint`)", *row, flow.calls, "no")
    _draw_stiff(rtols, curves)
    return table


def _draw_stiff(
    rtols: list[float], curves: dict[str, list[tuple[float, float, float, bool]]]
) -> None:
    looks = {
        "peer": (PEER, "s", "torchdiffeq, through odeint"),
        "off": (THIRD, "^", "here, control switched off"),
        "on": (OURS, "o", "here"),
    }
    with canvas("stiff", 1, 2, width=4.1, height=3.1) as (drawing, (left, right)):
        for name, (colour, marker, label) in looks.items():
            time_errors, errors, calls, warned = zip(*curves[name], strict=True)
            left.loglog(rtols, errors, marker=marker, color=colour, label=label)
            left.loglog(rtols, np.maximum(time_errors, 1e-12), ":", color=colour, linewidth=1.0)
            rings = [(r, e) for r, e, w in zip(rtols, errors, warned, strict=True) if w]
            if rings:
                left.plot(*zip(*rings, strict=True), "o", markersize=10, color="none",
                          markeredgecolor="#333333")  # fmt: skip
            right.semilogx(rtols, calls, marker=marker, color=colour)
        left.plot([], [], ":", color="#333333", label="the same, error of T")
        left.plot([], [], "o", markersize=9, color="none", markeredgecolor="#333333",
                  label="warned about")  # fmt: skip
        left.set(xlabel="rtol", ylabel="relative error of dT/dp")
        right.set(xlabel="rtol", ylabel="evaluations of the flow, forward",
                  ylim=(0, 4800))  # fmt: skip
        drawing.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)


def denominator() -> Table:
    """An epsilon beside J'."""
    table = Table(["target", "J'(T)", "torchdiffeq (`odeint`): error of dT/dθ", "here"])
    theta_value, start = 1.3, torch.tensor([2.0], dtype=F64)
    targets, peers, own = [1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-11, 1e-12, 1e-13, 1e-14], [], []
    for target in targets:
        truth = -log(4.0 / (2 * target)) / (2 * theta_value**2)
        theta = parameter(theta_value)
        flow = Field(lambda t, x, theta=theta: -theta * x, [theta])
        event = peer_time(
            flow, start, half_square, target, adjoint=False, atol=1e-10 * sqrt(target)
        )
        peers.append(abs(float(gradient_of(event, theta)) / truth - 1))
        result = stopping_time(
            lambda t, x, theta=theta: -theta * x, start, half_square, target,
            solver=Torchdiffeq(rtol=1e-9),
        )  # fmt: skip
        own.append(abs(float(gradient_of(result.time, theta)) / truth - 1))
        table.add(f"{target:.0e}", float(result.rate), peers[-1], own[-1])
    with canvas("denominator", width=3.9, height=2.5) as (_, axes):
        axes.loglog(targets, peers, "s-", color=PEER, label="torchdiffeq, odeint_event")
        axes.loglog(targets, own, "o-", color=OURS, label="here")
        axes.set(xlabel="target", ylabel="relative error of dT/dθ")
        axes.invert_xaxis()
        axes.legend(loc="center left")
    return table
