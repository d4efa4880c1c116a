"""Flows x' = F(t, x) that optimise, and what shapes them."""

from ode_stopping.flows.adaptive import AdamFlow, RMSPropFlow
from ode_stopping.flows.base import Flow
from ode_stopping.flows.conditions import (
    Margins,
    convergence_margins,
    hessian_norm,
    stability_margins,
)
from ode_stopping.flows.gradient import GradientFlow, PreconditionedFlow, RescaledGradientFlow
from ode_stopping.flows.hessian_damping import HighResolutionFlow, InertialHessianFlow
from ode_stopping.flows.hyperparameters import AtLeast, Bounded, Positive, VanishingDamping
from ode_stopping.flows.inertial import HeavyBallFlow, NesterovFlow, StronglyConvexNesterovFlow
from ode_stopping.flows.newton import NewtonFlow
from ode_stopping.flows.preconditioners import (
    CoordinatewisePreconditioner,
    DiagonalPreconditioner,
    NetworkPreconditioner,
)
from ode_stopping.flows.quadrature import WithIntegrals
from ode_stopping.flows.schedules import (
    ConstantSchedule,
    ExponentialSchedule,
    NetworkSchedule,
    PolynomialSchedule,
)

__all__ = [
    "AdamFlow",
    "AtLeast",
    "Bounded",
    "ConstantSchedule",
    "CoordinatewisePreconditioner",
    "DiagonalPreconditioner",
    "ExponentialSchedule",
    "Flow",
    "GradientFlow",
    "HeavyBallFlow",
    "HighResolutionFlow",
    "InertialHessianFlow",
    "Margins",
    "NesterovFlow",
    "NetworkPreconditioner",
    "NetworkSchedule",
    "NewtonFlow",
    "PolynomialSchedule",
    "Positive",
    "PreconditionedFlow",
    "RMSPropFlow",
    "RescaledGradientFlow",
    "StronglyConvexNesterovFlow",
    "VanishingDamping",
    "WithIntegrals",
    "convergence_margins",
    "hessian_norm",
    "stability_margins",
]
