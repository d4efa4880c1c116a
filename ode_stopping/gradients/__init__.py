"""Gradient routes: different roads to the same derivative of the flow map.

`InterpolatingAdjoint` is the default; `DirectAdjoint` has second derivatives; `ForwardSensitivity`
is for few parameters; `BacksolveAdjoint` needs no memory and raises where it would be wrong.
"""

from .backsolve import BacksolveAdjoint
from .direct import DirectAdjoint
from .forward import ForwardSensitivity
from .interpolating import InterpolatingAdjoint
from .route import GradientRoute, PullBack

__all__ = [
    "BacksolveAdjoint",
    "DirectAdjoint",
    "ForwardSensitivity",
    "GradientRoute",
    "InterpolatingAdjoint",
    "PullBack",
]
