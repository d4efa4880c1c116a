"""Flows x' = F(t, x) that optimise, and the schedules and preconditioners that shape them."""

from ode_stopping.flows.base import Flow
from ode_stopping.flows.gradient import GradientFlow, PreconditionedFlow, RescaledGradientFlow
from ode_stopping.flows.preconditioners import (
    CoordinatewisePreconditioner,
    DiagonalPreconditioner,
    NetworkPreconditioner,
)
from ode_stopping.flows.schedules import (
    ConstantSchedule,
    ExponentialSchedule,
    PolynomialSchedule,
)

__all__ = [
    "ConstantSchedule",
    "CoordinatewisePreconditioner",
    "DiagonalPreconditioner",
    "ExponentialSchedule",
    "Flow",
    "GradientFlow",
    "NetworkPreconditioner",
    "PolynomialSchedule",
    "PreconditionedFlow",
    "RescaledGradientFlow",
]
