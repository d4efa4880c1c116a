"""When is a step of the forward run good enough? The error measures of the adaptive steps.

Two things have to hold. The state has to be right to the tolerance, as everywhere. And the
*velocity* has to be right: explicit steps at their limit of stability leave noise of the size of
the tolerance in the fast modes, which the state (and J, and so T) hardly shows, while every
derivative of T is made of velocities and gradients, which weigh that noise by the curvature. So a
step is rejected, too, where the error estimate of the state, pushed through the flow, changes the
velocity by more than a few tolerances. That costs one evaluation of the flow a step where it
decides anything, and is looked at now and then elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

__all__ = ["Tolerances"]

# The absolute tolerance that goes with a relative one, in units of the size of the state: what an
# element of the state may err where it passes through zero.
_FLOOR_PER_RTOL = 1e-4

_Size = TypeVar("_Size", float, Tensor)


@dataclass(frozen=True)
class Tolerances:
    """Relative and absolute tolerance of a solve.

    Attributes:
        rtol: Relative tolerance.
        atol: Absolute tolerance; None: 1e-4 rtol times the root mean square of the piece of the
            state that an element belongs to, at every step anew, so that it never drowns a state
            that has become small on its way to a small target.
    """

    rtol: float
    atol: float | None = None

    def floor(self, size: _Size) -> _Size | float:
        """The absolute tolerance for a state of this size, or for pieces of these sizes."""
        return _FLOOR_PER_RTOL * self.rtol * size if self.atol is None else self.atol
