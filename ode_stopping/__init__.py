"""Stopping times of optimisation flows, and their derivatives.

    x' = F(theta, x, t),  x(t0) = x0,   T = inf{ t >= t0 : J(x(t)) <= eps }

`stopping_time` finds T and makes it differentiable; flows, criteria and problems are ready-made;
gradient routes are interchangeable.
"""

from importlib.metadata import PackageNotFoundError, version

from .criteria import Criterion, GradientNorm, LossValue, RelativeDecrease
from .flows import (
    ConstantSchedule,
    CoordinatewisePreconditioner,
    DiagonalPreconditioner,
    ExponentialSchedule,
    Flow,
    GradientFlow,
    NetworkPreconditioner,
    PolynomialSchedule,
    PreconditionedFlow,
    RescaledGradientFlow,
)
from .gradients import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
)
from .problems import (
    LogisticRegression,
    Problem,
    Quadratic,
    QuarticQuadratic,
    Rosenbrock,
    SmoothSVM,
)
from .result import StoppingResult
from .solver import Torchdiffeq
from .status import (
    BacksolveMismatchError,
    DegenerateCrossingError,
    DivergedError,
    GradientError,
    MissingGradientError,
    NotReachedError,
    NotReproducibleError,
    StalledError,
    Status,
    StoppingError,
    StoppingWarning,
    UntrackedTensorError,
)
from .stopping import stopping_time
from .trajectory import Trajectory

try:
    __version__ = version("ode-stopping")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BacksolveAdjoint",
    "BacksolveMismatchError",
    "ConstantSchedule",
    "CoordinatewisePreconditioner",
    "Criterion",
    "DegenerateCrossingError",
    "DiagonalPreconditioner",
    "DirectAdjoint",
    "DivergedError",
    "ExponentialSchedule",
    "Flow",
    "ForwardSensitivity",
    "GradientError",
    "GradientFlow",
    "GradientNorm",
    "GradientRoute",
    "InterpolatingAdjoint",
    "LogisticRegression",
    "LossValue",
    "MissingGradientError",
    "NetworkPreconditioner",
    "NotReachedError",
    "NotReproducibleError",
    "PolynomialSchedule",
    "PreconditionedFlow",
    "Problem",
    "Quadratic",
    "QuarticQuadratic",
    "RelativeDecrease",
    "RescaledGradientFlow",
    "Rosenbrock",
    "SmoothSVM",
    "StalledError",
    "Status",
    "StoppingError",
    "StoppingResult",
    "StoppingWarning",
    "Torchdiffeq",
    "Trajectory",
    "UntrackedTensorError",
    "__version__",
    "stopping_time",
]
