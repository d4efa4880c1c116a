"""Flows x' = F(t, x) that optimise, and what shapes them."""

from .adaptive import AdamFlow, RMSPropFlow
from .base import Flow
from .conditions import Margins, convergence_margins, hessian_norm, stability_margins
from .gradient import GradientFlow, PreconditionedFlow, RescaledGradientFlow
from .hessian_damping import HighResolutionFlow, InertialHessianFlow
from .hyperparameters import AtLeast, Bounded, Positive, VanishingDamping
from .inertial import HeavyBallFlow, NesterovFlow, StronglyConvexNesterovFlow
from .newton import NewtonFlow
from .preconditioners import (
    CoordinatewisePreconditioner,
    DiagonalPreconditioner,
    NetworkPreconditioner,
)
from .quadrature import WithIntegrals
from .schedules import ConstantSchedule, ExponentialSchedule, NetworkSchedule, PolynomialSchedule

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
