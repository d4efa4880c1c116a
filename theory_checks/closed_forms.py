"""Stopping times known in closed form, with every derivative: the oracles of Theorem 1.

The checks, the tests and the calibration all take their forms from here.

Conventions. The flow starts at t0, which is a leaf of its own: every answer is written for a free
t0, so that dT/dt0 is an oracle, too. A form is a flow and a criterion made from named leaves; its
answer maps "T" to the stopping time and every leaf's name to the derivative of T.

| form | flow | criterion | what it adds |
| --- | --- | --- | --- |
| 1 | x' = -theta x | x^2/2 | exponential decay |
| 2 | x' = 1 | q - x | a parameter of the criterion alone |
| 3 | x' = -th1 exp(-th2 t) x | x^2/2 | a flow that depends on t |
| 4 | x' = -theta x^3 | x^2/2 | sublinear decay, long times |
| 5 | x' = -p l x | sum (l x)^2 | vectors; l is in flow and criterion |
| 6 | x' = -a x | a x^2/2 | a scalar in flow and criterion |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from ode_stopping import GradientRoute, StoppingResult, Torchdiffeq, stopping_time

Values = dict[str, Any]
Leaves = dict[str, Tensor]
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ClosedForm:
    """A flow and a criterion whose stopping time is known.

    Attributes:
        name: For tables and keys.
        parameters: leaf name -> (value, symbol); the symbol is "theta" for a parameter of the flow,
            "phi" for one of the criterion, "theta = phi" for one of both.
        x0: The start.
        flow: leaves -> the callable (t, x) -> dx/dt.
        criterion: leaves -> the callable (t, x) -> J.
        answer: values of all leaves -> {"T": ..., leaf name: dT/dleaf}.
        target_state: eps -> the typical size of x_T.
        smallest: The smallest target the form is meant for.
    """

    name: str
    parameters: dict[str, tuple[Any, str]]
    x0: tuple[float, ...]
    flow: Callable[[Leaves], Function]
    criterion: Callable[[Leaves], Function]
    answer: Callable[[Values], Values]
    target_state: Callable[[float], float]
    smallest: float = 1e-12

    def values(self, eps: float, t0: float) -> Values:
        """Everything that T depends on, as numbers and arrays."""
        given = {name: value for name, (value, _) in self.parameters.items()}
        return {**given, "x0": np.array(self.x0), "eps": eps, "t0": t0}

    def leaves(self, eps: float, t0: float) -> Leaves:
        """The same as float64 leaves that require grad."""
        return {
            name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
            for name, value in self.values(eps, t0).items()
        }

    def symbol(self, leaf: str) -> str:
        """What a leaf is in the theory: theta, phi, theta = phi, x0, eps or t0."""
        return self.parameters[leaf][1] if leaf in self.parameters else leaf

    def solve(
        self,
        leaves: Leaves,
        route: GradientRoute | None,
        *,
        rtol: float | None = None,
        method: str = "dopri5",
    ) -> StoppingResult:
        """The library's answer.

        With `rtol`, the absolute tolerance is a tenth of it times the size of x_T: at one that is
        not small against x_T, the last part of the path is not resolved at all.
        """
        eps = float(leaves["eps"].detach())
        atol = None if rtol is None else 0.1 * rtol * self.target_state(eps)
        return stopping_time(
            self.flow(leaves),
            leaves["x0"],
            self.criterion(leaves),
            leaves["eps"],
            t0=leaves["t0"],
            max_time=1e6,
            solver=Torchdiffeq(method=method, rtol=rtol, atol=atol),
            gradient=route,
            evidence="light",  # the route's own gradient, not that of halved steps
        )

    def errors(self, time: Tensor, leaves: Leaves) -> tuple[float, dict[str, float]]:
        """Errors of T, relative to T - t0, and, after backward, of every derivative (in norm).

        A leaf without a gradient has the error inf.
        """
        eps, t0 = (float(leaves[name].detach()) for name in ("eps", "t0"))
        answer = self.answer(self.values(eps, t0))
        of_time = abs(float(time.detach()) - answer["T"]) / abs(answer["T"] - t0)
        of_derivatives = dict.fromkeys(leaves, math.inf)
        for name, leaf in leaves.items():
            if leaf.grad is not None:
                exact = np.asarray(answer[name], dtype=np.float64)
                gap = np.linalg.norm(leaf.grad.numpy() - exact)
                of_derivatives[name] = float(gap / np.linalg.norm(exact))
        return of_time, of_derivatives


def _half_square(v: Leaves) -> Function:
    return lambda t, x: 0.5 * x.square().sum()


def _root_of_twice(eps: float) -> float:
    return math.sqrt(2 * eps)


def _exponential(v: Values) -> Values:
    theta, x0, eps = v["theta"], v["x0"][0], v["eps"]
    span = math.log(x0**2 / (2 * eps)) / (2 * theta)
    return {
        "T": v["t0"] + span,
        "theta": -span / theta,
        "x0": [1 / (theta * x0)],
        "eps": -1 / (2 * theta * eps),
        "t0": 1.0,
    }


def _clock(v: Values) -> Values:
    span = v["q"] - v["eps"] - v["x0"][0]
    return {"T": v["t0"] + span, "q": 1.0, "x0": [-1.0], "eps": -1.0, "t0": 1.0}


def _schedule(v: Values) -> Values:
    # The integral of alpha over [t0, T] is th1/th2 (exp(-th2 t0) - u), u = exp(-th2 T), and has to
    # be s; so u = exp(-th2 t0) - th2 s/th1 and T = -ln(u)/th2.
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


def _cubic(v: Values) -> Values:
    theta, x0, eps = v["theta"], v["x0"][0], v["eps"]
    span = (1 / (2 * eps) - 1 / x0**2) / (2 * theta)
    return {
        "T": v["t0"] + span,
        "theta": -span / theta,
        "x0": [1 / (theta * x0**3)],
        "eps": -1 / (4 * theta * eps**2),
        "t0": 1.0,
    }


def modes_at_target(v: Values) -> tuple[float, NDArray[np.float64], float]:
    """T - t0, x_T and J'(T) of form 5."""
    p, curvature, x0 = (np.asarray(v[name]) for name in ("p", "curvature", "x0"))

    def log_excess(span: float) -> float:
        x = x0 * np.exp(-p * curvature * span)
        return math.log(float(((curvature * x) ** 2).sum()) / v["eps"])

    span = float(brentq(log_excess, 0.0, 100.0, xtol=1e-15, rtol=1e-15))
    x = x0 * np.exp(-p * curvature * span)
    return span, x, -2 * float((p * curvature**3 * x**2).sum())


def _modes(v: Values) -> Values:
    p, curvature, x0 = (np.asarray(v[name]) for name in ("p", "curvature", "x0"))
    span, x, rate = modes_at_target(v)
    return {
        "T": v["t0"] + span,
        "p": 2 * span * curvature**3 * x**2 / rate,
        "curvature": -2 * curvature * x**2 * (1 - p * span * curvature) / rate,
        "x0": -2 * curvature**2 * x**2 / x0 / rate,
        "eps": 1 / rate,
        "t0": 1.0,
    }


def _shared(v: Values) -> Values:
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
        {"theta": (1.3, "theta")},
        (2.0,),
        lambda v: lambda t, x: -v["theta"] * x,
        _half_square,
        _exponential,
        _root_of_twice,
    ),
    ClosedForm(
        "form2-clock",
        {"q": (2.5, "phi")},
        (0.25,),
        lambda v: lambda t, x: torch.ones_like(x),
        lambda v: lambda t, x: v["q"] - x.sum(),
        _clock,
        lambda eps: 1.0,
    ),
    ClosedForm(
        "form3-schedule",
        {"rate": (1.2, "theta"), "decay": (0.04, "theta")},
        (1.5,),
        lambda v: lambda t, x: -v["rate"] * torch.exp(-v["decay"] * t) * x,
        _half_square,
        _schedule,
        _root_of_twice,
    ),
    ClosedForm(
        "form4-cubic",
        {"theta": (0.8, "theta")},
        (1.5,),
        lambda v: lambda t, x: -v["theta"] * x**3,
        _half_square,
        _cubic,
        _root_of_twice,
        smallest=1e-4,
    ),
    ClosedForm(
        "form5-modes",
        {
            "p": (np.array([1.1, 0.8]), "theta"),
            "curvature": (np.array([1.0, 2.0]), "theta = phi"),
        },
        (1.0, -0.8),
        lambda v: lambda t, x: -v["p"] * v["curvature"] * x,
        lambda v: lambda t, x: (v["curvature"] * x).square().sum(),
        _modes,
        math.sqrt,
    ),
    ClosedForm(
        "form6-shared",
        {"a": (1.7, "theta = phi")},
        (1.5,),
        lambda v: lambda t, x: -v["a"] * x,
        lambda v: lambda t, x: 0.5 * v["a"] * x.square().sum(),
        _shared,
        _root_of_twice,
    ),
)
FORMS = {form.name: form for form in CLOSED_FORMS}
