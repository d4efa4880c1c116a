"""Stopping times of optimisation flows, and their derivatives.

    x' = F(theta, x, t),  x(t0) = x0,   T = inf{ t >= t0 : J(x(t)) <= eps }

`stopping_time` finds T and makes it differentiable; flows, criteria and problems are ready-made;
gradient routes are interchangeable.
"""

from importlib.metadata import PackageNotFoundError, version

from .checking import Finding, GradientReport
from .checking.check import check_stopping_gradient
from .checking.function import check_gradient
from .core.means import ReachedMean, mean_over_reached
from .core.status import (
    BacksolveMismatchError,
    DegenerateCrossingError,
    DivergedError,
    GradientAccuracyWarning,
    GradientError,
    KinkWarning,
    MissingGradientError,
    NotReachedError,
    NotReproducibleError,
    StalledError,
    Status,
    StoppingError,
    StoppingWarning,
    UntrackedTensorError,
)
from .criteria import AllOf, AnyOf, Criterion, GradientNorm, LossValue, RelativeDecrease
from .crossing.near_miss import NearMiss
from .events import Event
from .flows import (
    AdamFlow,
    AtLeast,
    Bounded,
    ConstantSchedule,
    CoordinatewisePreconditioner,
    DiagonalPreconditioner,
    ExponentialSchedule,
    Flow,
    GradientFlow,
    HeavyBallFlow,
    HighResolutionFlow,
    InertialHessianFlow,
    Margins,
    NesterovFlow,
    NetworkPreconditioner,
    NetworkSchedule,
    NewtonFlow,
    PolynomialSchedule,
    Positive,
    PreconditionedFlow,
    RescaledGradientFlow,
    RMSPropFlow,
    StronglyConvexNesterovFlow,
    VanishingDamping,
    WithIntegrals,
    convergence_margins,
    hessian_norm,
    stability_margins,
)
from .gradients import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    Piece,
    PullBack,
    StepAdjoint,
)
from .gradients.evidence import Evidence
from .integration import integrate
from .problems import (
    LogisticRegression,
    ModuleObjective,
    Problem,
    Quadratic,
    QuarticQuadratic,
    Rosenbrock,
    SmoothSVM,
)
from .result import StoppingResult
from .solution import Hit, Solution
from .solving.hybrid_trajectory import HybridTrajectory
from .solving.runge_kutta import RungeKutta
from .solving.solver import Method, Solver
from .solving.step import Step
from .solving.torchdiffeq import Torchdiffeq
from .solving.trajectory import Trajectory
from .stopm import LearnedISHD, StoPMConstants, learned_ishd, stopm_penalty, stopm_task, train_stopm
from .stopping import stopping_time
from .tuning import (
    StoppingTask,
    TuningError,
    TuningHistory,
    TuningRecord,
    TuningTask,
    minimise_stopping_time,
)

try:
    __version__ = version("ode-stopping")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AdamFlow",
    "AllOf",
    "AnyOf",
    "AtLeast",
    "BacksolveAdjoint",
    "BacksolveMismatchError",
    "Bounded",
    "ConstantSchedule",
    "CoordinatewisePreconditioner",
    "Criterion",
    "DegenerateCrossingError",
    "DiagonalPreconditioner",
    "DirectAdjoint",
    "DivergedError",
    "Event",
    "Evidence",
    "ExponentialSchedule",
    "Finding",
    "Flow",
    "ForwardSensitivity",
    "GradientAccuracyWarning",
    "GradientError",
    "GradientFlow",
    "GradientNorm",
    "GradientReport",
    "GradientRoute",
    "HeavyBallFlow",
    "HighResolutionFlow",
    "Hit",
    "HybridTrajectory",
    "InertialHessianFlow",
    "InterpolatingAdjoint",
    "KinkWarning",
    "LearnedISHD",
    "LogisticRegression",
    "LossValue",
    "Margins",
    "Method",
    "MissingGradientError",
    "ModuleObjective",
    "NearMiss",
    "NesterovFlow",
    "NetworkPreconditioner",
    "NetworkSchedule",
    "NewtonFlow",
    "NotReachedError",
    "NotReproducibleError",
    "Piece",
    "PolynomialSchedule",
    "Positive",
    "PreconditionedFlow",
    "Problem",
    "PullBack",
    "Quadratic",
    "QuarticQuadratic",
    "RMSPropFlow",
    "ReachedMean",
    "RelativeDecrease",
    "RescaledGradientFlow",
    "Rosenbrock",
    "RungeKutta",
    "SmoothSVM",
    "Solution",
    "Solver",
    "StalledError",
    "Status",
    "Step",
    "StepAdjoint",
    "StoPMConstants",
    "StoppingError",
    "StoppingResult",
    "StoppingTask",
    "StoppingWarning",
    "StronglyConvexNesterovFlow",
    "Torchdiffeq",
    "Trajectory",
    "TuningError",
    "TuningHistory",
    "TuningRecord",
    "TuningTask",
    "UntrackedTensorError",
    "VanishingDamping",
    "WithIntegrals",
    "__version__",
    "check_gradient",
    "check_stopping_gradient",
    "convergence_margins",
    "hessian_norm",
    "integrate",
    "learned_ishd",
    "mean_over_reached",
    "minimise_stopping_time",
    "stability_margins",
    "stopm_penalty",
    "stopm_task",
    "stopping_time",
    "train_stopm",
]
