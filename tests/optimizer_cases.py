"""Optimisers with their hyperparameters, and the objective that they are tried on."""

from __future__ import annotations

from typing import Any

import torch
from iterations import number
from torch import Tensor
from torch.optim import Optimizer

from discrete import TorchOptimizer, check_index_gradient
from ode_stopping import GradientNorm
from ode_stopping.checking.report import GradientReport

optim = torch.optim
MOMENTS = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.02}

# Optimiser, hyperparameters that are differentiated, options that are not.
CASES: dict[str, tuple[type[Optimizer], dict[str, Any], dict[str, Any]]] = {
    "SGD": (optim.SGD, {"lr": 0.1, "weight_decay": 0.02}, {}),
    "SGD-momentum": (
        optim.SGD,
        {"lr": 0.1, "momentum": 0.7, "dampening": 0.3, "weight_decay": 0.02},
        {},
    ),
    "SGD-nesterov": (
        optim.SGD,
        {"lr": 0.05, "momentum": 0.7, "weight_decay": 0.02},
        {"nesterov": True},
    ),
    "Adam": (optim.Adam, MOMENTS, {}),
    "Adam-amsgrad": (optim.Adam, MOMENTS, {"amsgrad": True}),
    "AdamW": (optim.AdamW, MOMENTS, {}),
    "NAdam": (optim.NAdam, {**MOMENTS, "momentum_decay": 0.004}, {}),
    "NAdam-decoupled": (
        optim.NAdam,
        {"lr": 0.1, "weight_decay": 0.02},
        {"decoupled_weight_decay": True},
    ),
    "RAdam": (optim.RAdam, MOMENTS, {}),
    "RMSprop": (optim.RMSprop, {"lr": 0.05, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.02}, {}),
    "RMSprop-centered": (
        optim.RMSprop,
        {"lr": 0.03, "alpha": 0.9, "eps": 0.1, "weight_decay": 0.02, "momentum": 0.5},
        {"centered": True},
    ),
    "Adagrad": (
        optim.Adagrad,
        {
            "lr": 0.4,
            "lr_decay": 0.01,
            "weight_decay": 0.02,
            "initial_accumulator_value": 0.1,
            "eps": 1e-3,
        },
        {},
    ),
    "Adadelta": (optim.Adadelta, {"lr": 1.2, "rho": 0.9, "eps": 1e-2, "weight_decay": 0.02}, {}),
    "Adamax": (optim.Adamax, MOMENTS, {}),
    "Adafactor": (
        optim.Adafactor,
        {"lr": 0.1, "beta2_decay": -0.8, "eps": (1e-3, 1e-3), "d": 1.1, "weight_decay": 0.02},
        {},
    ),
    "ASGD": (
        optim.ASGD,
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.7, "t0": 2.5, "weight_decay": 0.02},
        {},
    ),
    "Rprop-bounded": (
        optim.Rprop,
        {"lr": 0.02, "etas": (0.5, 1.2), "step_sizes": (0.05, 0.3)},
        {},
    ),
    "Rprop": (optim.Rprop, {"lr": 0.02, "etas": (0.5, 1.2), "step_sizes": (1e-4, 0.3)}, {}),
}
# Bounds that are not met in these runs; another case, or a test of its own, meets them.
IDLE = {
    "ASGD": {"['t0']"},
    "Adafactor": {"['eps'][0]", "['eps'][1]", "['d']"},
    "Rprop": {"['step_sizes'][0]"},
    "Rprop-bounded": {"['lr']"},
}
# They keep numbers in single precision, unless the default dtype is double.
ROUNDED = ("NAdam", "NAdam-decoupled", "ASGD")


class Bowl:
    """A quartic bowl in two coupled unknowns, with a leaf."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.theta = torch.tensor(1.3, dtype=dtype, requires_grad=True)

    def __call__(self, x: Tensor) -> Tensor:
        a, b = x.reshape(-1)[:2]
        return self.theta * (a**2 + 0.4 * a * b + 0.6 * b**2) + 0.1 * a**4 - a + 2.0 * b


def start(*, grad: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([1.5, 0.7], dtype=dtype, requires_grad=grad)


def leaves(options: dict[str, Any]) -> dict[str, Any]:
    """Every number as a leaf."""
    return {
        name: tuple(number(v) for v in value) if isinstance(value, tuple) else number(value)
        for name, value in options.items()
    }


def adapted(name: str, *, grad: bool = True) -> TorchOptimizer:
    kind, options, fixed = CASES[name]
    return TorchOptimizer(kind, Bowl(), **(leaves(options) if grad else options), **fixed)


def report_of(update: TorchOptimizer, target: float = 0.3) -> GradientReport:
    criterion = GradientNorm(update.objective)
    return check_index_gradient(
        update, update.initial_state(start()), criterion, target, directions=1
    )
