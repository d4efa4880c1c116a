"""Stopping indices of iterations, and their derivatives.

    x_{k+1} = G_k(x_k, theta),   N = min{ k : J(x_k) <= eps }

`stopping_index` runs the iteration, finds N and makes it differentiable by the discrete adjoint.
The twin of `ode_stopping`: h dN/dtheta tends to dT/dtheta as h -> 0 (Theorem 2 of arXiv
2505.22509). `AdamOLA` and `SGDOLA` are optimisers that descend N while they run.
"""

from .check import check_index_gradient
from .gradients.adjoint import DiscreteAdjoint, IndexRoute, Truncated, Unrolled
from .online import SGDOLA, AdamHD, AdamOLA, OnlineAdaptation
from .result import StoppingIndexResult
from .rules import algorithms
from .rules.algorithms import Algorithm
from .rules.step_decrease import StepDecrease
from .rules.torch_optim.optimizer import TorchOptimizer
from .rules.updates import Euler, Heun, RungeKutta4, SemiImplicitEuler, UpdateRule
from .stopping import stopping_index
from .tuning import StoppingIndexTask, minimise_stopping_index

__all__ = [
    "SGDOLA",
    "AdamHD",
    "AdamOLA",
    "Algorithm",
    "DiscreteAdjoint",
    "Euler",
    "Heun",
    "IndexRoute",
    "OnlineAdaptation",
    "RungeKutta4",
    "SemiImplicitEuler",
    "StepDecrease",
    "StoppingIndexResult",
    "StoppingIndexTask",
    "TorchOptimizer",
    "Truncated",
    "Unrolled",
    "UpdateRule",
    "algorithms",
    "check_index_gradient",
    "minimise_stopping_index",
    "stopping_index",
]
