"""The optimisers of the race, each with the settings that it may choose from.

Adam and its kin have six settings, the grid of rates of the paper's study; GD, NAG, NAG-SC (at 1/L)
and heavy ball (at 1/L, four momenta) are the study's, too. What is beside them is ours: six
settings each, and "finer" grids of eleven, for decades say little about what tuning can do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from discrete import SGDOLA, AdamHD, AdamOLA
from ode_stopping.core.optional import optional_module

from .problems import SVMProblem

__all__ = ["METHODS", "PRINTED", "Method", "Setting", "available_methods"]

# Table 1 of arXiv 2505.22509: (eta, eps_desc). For data that it does not have, a1a's.
PRINTED = {"a1a": (1e-2, 1e-5), "a2a": (1e-3, 1e-3), "a3a": (5e-5, 5e-4), "w3a": (5e-3, 5e-9)}
STRONG_CONVEXITY = 1e-4  # of NAG-SC


@dataclass(frozen=True)
class Setting:
    """One choice of what is tuned.

    Attributes:
        label: For tables, "0.1" or "1/L".
        value: A rate, momentum or whatever the method tunes.
        rate: A second number where there is one.
    """

    label: str
    value: float
    rate: float = 0.0


@dataclass(frozen=True)
class Method:
    """An optimiser and its grid.

    Attributes:
        name: In tables and on the command line.
        tunes: What the settings are.
        grid: problem -> settings.
        make: (parameter, setting, problem) -> optimiser; None for SciPy's L-BFGS, which has no
            steps of its own to call.
        needs: A package from PyPI without which it stays out.
    """

    name: str
    tunes: str
    grid: Callable[[SVMProblem], tuple[Setting, ...]]
    make: Callable[[Tensor, Setting, SVMProblem], Any] | None
    needs: str = ""

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None


class Accelerated(Optimizer):
    """Nesterov's method; the parameter is the look-ahead point y_k, where the gradient is taken.

    x_{k+1} = y_k - lr grad f(y_k), y_{k+1} = x_{k+1} + m_k (x_{k+1} - x_k), with m_k = k/(k+3) or a
    constant.
    """

    def __init__(self, params: Any, lr: float, momentum: float | None = None) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                k, x = state.get("k", 0), state.get("x", p.clone())
                m = k / (k + 3) if group["momentum"] is None else group["momentum"]
                following = p - group["lr"] * p.grad
                p.copy_(following + m * (following - x))
                state.update(k=k + 1, x=following)
        return value


def _rates(problem: SVMProblem) -> tuple[Setting, ...]:
    known = tuple(Setting(f"{rate:g}", rate) for rate in (1e-3, 1e-2, 0.1, 1.0, 10.0))
    return (*known, Setting("1/L", 1.0 / problem.lipschitz))


def _finer_rates(problem: SVMProblem) -> tuple[Setting, ...]:
    """Two rates a decade from 1e-3 to 100."""
    rates = [c * 10.0**e for e in range(-3, 2) for c in (1, 3)]
    return tuple(Setting(f"{rate:g}", rate) for rate in (*rates, 100.0))


def _fixed(problem: SVMProblem) -> tuple[Setting, ...]:
    return (Setting("1/L", 1.0 / problem.lipschitz),)


def _momenta(problem: SVMProblem) -> tuple[Setting, ...]:
    return tuple(Setting(f"{m:g}", m) for m in (0.1, 0.5, 0.9, 0.99))


def _hypergradients(problem: SVMProblem) -> tuple[Setting, ...]:
    """Steps 1e-3 to 1e-6 on the rate from 0.01, the two smallest from 0.1 as well."""
    pairs = [(b, 0.01) for b in (1e-3, 1e-4, 1e-5, 1e-6)] + [(b, 0.1) for b in (1e-5, 1e-6)]
    return tuple(Setting(f"{b:g} from {a:g}", b, a) for b, a in pairs)


def _multiples(problem: SVMProblem) -> tuple[Setting, ...]:
    """Rates around 1/L, for steps that are multiples of the gradient."""
    factors = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
    return tuple(Setting(f"{c:g}/L", c / problem.lipschitz) for c in factors)


def _coefficients(problem: SVMProblem) -> tuple[Setting, ...]:
    """Multiples of the rate that the method finds itself."""
    return tuple(Setting(f"{c:g}", c) for c in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0))


def _printed(x: Tensor, setting: Setting, problem: SVMProblem) -> AdamOLA:
    eta, threshold = PRINTED.get(problem.name, PRINTED["a1a"])
    return AdamOLA(
        [x],
        lr=setting.value,
        adapt_rate=eta,
        descent_threshold=threshold,
        variant="paper",
        deterministic=True,
    )


def _prodigy(x: Tensor, setting: Setting, problem: SVMProblem) -> Any:
    # Its authors' advice: leave lr at 1, tune d_coef.
    return optional_module("prodigyopt", "Prodigy").Prodigy([x], d_coef=setting.value)


def _schedule_free(x: Tensor, setting: Setting, problem: SVMProblem) -> Any:
    package = optional_module("schedulefree", "schedule-free Adam")
    return package.AdamWScheduleFree([x], lr=setting.value, weight_decay=0.0)


def _d_adaptation(x: Tensor, setting: Setting, problem: SVMProblem) -> Any:
    # Without a coefficient of its own: the rate multiplies what it finds.
    return optional_module("dadaptation", "D-Adaptation").DAdaptAdam([x], lr=setting.value)


def _nesterov_constant(problem: SVMProblem) -> float:
    root = sqrt(STRONG_CONVEXITY / problem.lipschitz)
    return (1.0 - root) / (1.0 + root)


_ALL = (
    Method("Adam", "rate", _rates, lambda x, s, f: torch.optim.Adam([x], lr=s.value)),
    Method(
        "Adam-OLA",
        "initial rate",
        _rates,
        lambda x, s, f: AdamOLA([x], s.value, deterministic=True),
    ),
    Method("Adam-OLA, printed", "initial rate", _rates, _printed),
    Method(
        "Adam-OLA, K = 3",
        "initial rate",
        _rates,
        lambda x, s, f: AdamOLA([x], s.value, horizon=3, deterministic=True),
    ),
    Method(
        "Adam-HD",
        "step on the rate",
        _hypergradients,
        lambda x, s, f: AdamHD([x], lr=s.rate, hypergradient_lr=s.value),
    ),
    Method("Adagrad", "rate", _rates, lambda x, s, f: torch.optim.Adagrad([x], lr=s.value)),
    Method("GD", "", _fixed, lambda x, s, f: torch.optim.SGD([x], lr=s.value)),
    Method(
        "heavy ball",
        "momentum",
        _momenta,
        lambda x, s, f: torch.optim.SGD([x], lr=1.0 / f.lipschitz, momentum=s.value),
    ),
    Method("NAG", "", _fixed, lambda x, s, f: Accelerated([x], lr=s.value)),
    Method(
        "NAG-SC",
        "",
        _fixed,
        lambda x, s, f: Accelerated([x], lr=s.value, momentum=_nesterov_constant(f)),
    ),
    Method(
        "momentum SGD, adapted",
        "initial rate",
        _multiples,
        lambda x, s, f: SGDOLA([x], s.value, deterministic=True),
    ),
    Method(
        "momentum SGD",
        "rate",
        _multiples,
        lambda x, s, f: torch.optim.SGD([x], lr=s.value, momentum=0.9),
    ),
    Method("Adam, finer", "rate", _finer_rates, lambda x, s, f: torch.optim.Adam([x], lr=s.value)),
    Method(
        "Adam-OLA, finer",
        "initial rate",
        _finer_rates,
        lambda x, s, f: AdamOLA([x], s.value, deterministic=True),
    ),
    Method("Prodigy", "coefficient", _coefficients, _prodigy, needs="prodigyopt"),
    Method("schedule-free Adam", "rate", _rates, _schedule_free, needs="schedulefree"),
    Method("D-Adaptation", "coefficient", _coefficients, _d_adaptation, needs="dadaptation"),
    Method("L-BFGS", "", lambda f: (Setting("", 0.0),), None),
)
METHODS = {method.name: method for method in _ALL}


def available_methods() -> tuple[str, ...]:
    """Those whose packages are installed."""
    return tuple(name for name, method in METHODS.items() if method.available)
