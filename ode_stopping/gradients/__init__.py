"""Gradient routes: different roads to the same derivative of the flow map.

`StepAdjoint`, the default, is the exact transpose of the accepted steps; `InterpolatingAdjoint` is
the continuous adjoint; `DirectAdjoint` has second derivatives; `ForwardSensitivity` is for few
parameters; `BacksolveAdjoint` needs no memory and raises where it would be wrong.
"""

from .backsolve import BacksolveAdjoint
from .direct import DirectAdjoint
from .forward import ForwardSensitivity
from .interpolating import InterpolatingAdjoint
from .problem import Piece
from .route import GradientRoute, PullBack
from .steps import StepAdjoint

__all__ = [
    "BacksolveAdjoint",
    "DirectAdjoint",
    "ForwardSensitivity",
    "GradientRoute",
    "InterpolatingAdjoint",
    "Piece",
    "PullBack",
    "StepAdjoint",
]
