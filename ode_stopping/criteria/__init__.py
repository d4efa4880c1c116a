"""Stopping criteria J(t, x): the flow stops the first time that J falls to the target."""

from .base import Criterion
from .combined import AllOf, AnyOf
from .of_objective import GradientNorm, LossValue, RelativeDecrease

__all__ = ["AllOf", "AnyOf", "Criterion", "GradientNorm", "LossValue", "RelativeDecrease"]
