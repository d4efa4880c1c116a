"""Stopping times that are known in closed form, with every derivative (theory: forms 1 to 6).

A case is one entry of `CLOSED_FORMS`; the tests run through all of them. Every closed form is
written for a start time t0 of its own, so that dT/dt0 is tested as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from ode_stopping import GradientRoute, StoppingResult, Torchdiffeq, stopping_time

Values = dict[str, Any]
Answer = dict[str, Any]
TARGETS = (1e-1, 1e-4, 1e-8, 1e-12)


@dataclass(frozen=True)
class ClosedForm:
    """A flow and a criterion whose stopping time is known.

    Attributes:
        name: Shown by pytest.
        parameters: Name -> value of every leaf besides x0, eps and t0.
        x0: Start.
        flow: Leaves -> the callable (t, x) -> dx/dt.
        criterion: Leaves -> the callable (t, x) -> J.
        answer: Values (numbers and arrays, with "x0", "eps" and "t0") -> {"T": ..., leaf name:
            dT/dleaf}.
        target_state: Typical size of the state at the target, for an absolute tolerance small
            against it.
        smallest: Smallest target that the case is meant for.
    """

    name: str
    parameters: Values
    x0: list[float]
    flow: Callable[[dict[str, Tensor]], Callable[[Tensor, Tensor], Tensor]]
    criterion: Callable[[dict[str, Tensor]], Callable[[Tensor, Tensor], Tensor]]
    answer: Callable[[Values], Answer]
    target_state: Callable[[float], float] = lambda eps: math.sqrt(2 * eps)
    smallest: float = 1e-12

    def values(self, eps: float, t0: float) -> Values:
        """Everything that T depends on, as numbers and arrays."""
        return {**self.parameters, "x0": np.array(self.x0), "eps": eps, "t0": t0}

    def leaves(self, eps: float, t0: float) -> dict[str, Tensor]:
        """The same as leaf tensors."""
        return {
            name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
            for name, value in self.values(eps, t0).items()
        }

    def solve(
        self,
        leaves: dict[str, Tensor],
        route: GradientRoute | None,
        *,
        rtol: float | None = None,
        method: str = "dopri5",
    ) -> StoppingResult:
        """The library's answer; with `rtol`, at an absolute tolerance small against x_T."""
        eps = float(leaves["eps"].detach())
        atol = None if rtol is None else 0.1 * rtol * self.target_state(eps)
        return stopping_time(
            self.flow(leaves),
            leaves["x0"],
            self.criterion(leaves),
            leaves["eps"],
            t0=leaves["t0"],
            max_time=1e5,
            solver=Torchdiffeq(method=method, rtol=rtol, atol=atol),
            gradient=route,
        )

    def errors(self, time: Tensor, leaves: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
        """Errors of T, relative to T - t0, and, after backward, of every derivative (in norm)."""
        eps, t0 = (float(leaves[name].detach()) for name in ("eps", "t0"))
        answer = self.answer(self.values(eps, t0))
        of_time = abs(float(time.detach()) - answer["T"]) / abs(answer["T"] - t0)
        of_derivatives = {}
        for name, leaf in leaves.items():
            assert leaf.grad is not None, f"no gradient for {name}"
            truth = np.asarray(answer[name], dtype=float)
            gap = np.linalg.norm(leaf.grad.numpy() - truth)
            of_derivatives[name] = float(gap / np.linalg.norm(truth))
        return of_time, of_derivatives


def half_square(leaves: dict[str, Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """J = |x|^2/2."""
    return lambda t, x: 0.5 * x.square().sum()


def _exponential(v: Values) -> Answer:
    theta, x0, eps = v["theta"], v["x0"][0], v["eps"]
    span = math.log(x0**2 / (2 * eps)) / (2 * theta)
    return {
        "T": v["t0"] + span,
        "theta": -span / theta,
        "x0": [1 / (theta * x0)],
        "eps": -1 / (2 * theta * eps),
        "t0": 1.0,
    }


def _clock(v: Values) -> Answer:
    span = v["q"] - v["eps"] - v["x0"][0]
    return {"T": v["t0"] + span, "q": 1.0, "x0": [-1.0], "eps": -1.0, "t0": 1.0}


def _schedule(v: Values) -> Answer:
    rate, decay, x0, eps, t0 = v["rate"], v["decay"], v["x0"][0], v["eps"], v["t0"]
    s = math.log(x0**2 / (2 * eps)) / 2
    at_start = math.exp(-decay * t0)
    u = at_start - decay * s / rate
    by_s = 1 / (rate * u)
    return {
        "T": -math.log(u) / decay,
        "rate": -s / (rate**2 * u),
        "decay": math.log(u) / decay**2 + (t0 * at_start + s / rate) / (decay * u),
        "x0": [by_s / x0],
        "eps": -by_s / (2 * eps),
        "t0": at_start / u,
    }


def _cubic(v: Values) -> Answer:
    theta, x0, eps = v["theta"], v["x0"][0], v["eps"]
    span = (1 / (2 * eps) - 1 / x0**2) / (2 * theta)
    return {
        "T": v["t0"] + span,
        "theta": -span / theta,
        "x0": [1 / (theta * x0**3)],
        "eps": -1 / (4 * theta * eps**2),
        "t0": 1.0,
    }


def preconditioned_modes(v: Values) -> tuple[float, np.ndarray, float]:
    """T - t0, x_T and J'(T) of form 5."""
    p, curvature, x0 = (np.asarray(v[k]) for k in ("p", "curvature", "x0"))

    def log_excess(span: float) -> float:
        x = x0 * np.exp(-p * curvature * span)
        return math.log(float(((curvature * x) ** 2).sum()) / v["eps"])

    span = brentq(log_excess, 0.0, 100.0, xtol=1e-15, rtol=1e-15)
    x = x0 * np.exp(-p * curvature * span)
    return span, x, -2 * float((p * curvature**3 * x**2).sum())


def _preconditioned(v: Values) -> Answer:
    p, curvature, x0 = (np.asarray(v[k]) for k in ("p", "curvature", "x0"))
    span, x, rate = preconditioned_modes(v)
    return {
        "T": v["t0"] + span,
        "p": 2 * span * curvature**3 * x**2 / rate,
        "curvature": -(2 * curvature * x**2 - 2 * p * span * curvature**2 * x**2) / rate,
        "x0": -2 * curvature**2 * x**2 / x0 / rate,
        "eps": 1 / rate,
        "t0": 1.0,
    }


def _shared(v: Values) -> Answer:
    a, x0, eps = v["a"], v["x0"][0], v["eps"]
    span = math.log(a * x0**2 / (2 * eps)) / (2 * a)
    return {
        "T": v["t0"] + span,
        "a": 1 / (2 * a**2) - span / a,
        "x0": [1 / (a * x0)],
        "eps": -1 / (2 * a * eps),
        "t0": 1.0,
    }


CLOSED_FORMS = (
    ClosedForm(
        "form1-exponential",
        {"theta": 1.3},
        [2.0],
        lambda v: lambda t, x: -v["theta"] * x,
        half_square,
        _exponential,
    ),
    ClosedForm(
        "form2-clock",
        {"q": 2.5},
        [0.25],
        lambda v: lambda t, x: torch.ones_like(x),
        lambda v: lambda t, x: v["q"] - x.sum(),
        _clock,
        target_state=lambda eps: 1.0,
    ),
    ClosedForm(
        "form3-schedule",
        {"rate": 1.2, "decay": 0.05},
        [1.5],
        lambda v: lambda t, x: -v["rate"] * torch.exp(-v["decay"] * t) * x,
        half_square,
        _schedule,
    ),
    ClosedForm(
        "form4-cubic",
        {"theta": 0.8},
        [1.5],
        lambda v: lambda t, x: -v["theta"] * x**3,
        half_square,
        _cubic,
        smallest=1e-4,
    ),
    ClosedForm(
        "form5-preconditioned",
        {"p": np.array([0.9, 0.7]), "curvature": np.array([1.0, 3.0])},
        [1.0, -0.8],
        lambda v: lambda t, x: -v["p"] * v["curvature"] * x,
        lambda v: lambda t, x: (v["curvature"] * x).square().sum(),
        _preconditioned,
        target_state=math.sqrt,
    ),
    ClosedForm(
        "form6-shared",
        {"a": 1.7},
        [1.5],
        lambda v: lambda t, x: -v["a"] * x,
        lambda v: lambda t, x: 0.5 * v["a"] * x.square().sum(),
        _shared,
    ),
)
