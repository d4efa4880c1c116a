"""Adaptive steps with a method of torchdiffeq, one at a time.

The public `odeint` hides what a stopping time needs: each accepted step with its dense output, a
stop in the middle, a bound on the times at which the flow is evaluated, and an end other than an
assertion when the step size underflows.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from math import inf

import torch

from ..core.status import StoppingWarning
from ..core.validation import require_count
from .method import adaptive_methods
from .tolerances import Tolerances

__all__ = ["Torchdiffeq"]

_DEFAULT_RTOL = {torch.float64: 1e-7, torch.float32: 1e-4}


@dataclass(frozen=True)
class Torchdiffeq:
    """An adaptive method of torchdiffeq with its tolerances and limits.

    Args:
        method: Name of an adaptive Runge-Kutta method (see `adaptive_methods`).
        rtol: Relative tolerance; None: 1e-7 in float64, 1e-4 in float32.
        atol: Absolute tolerance; None: 1e-4 rtol times the present size of the state (the root mean
            square of each of its tensors), so that it cannot drown a state that becomes small on
            its way to a small target.
        max_steps: Limit on accepted and rejected steps together.
        max_step: Largest step, in flow time.
        first_step: First step, in flow time; None: chosen by the solver.

    Raises:
        ValueError: Unknown method; a tolerance, step or limit that is not positive; rtol >= 1.
        TypeError: One that is not a number.
    """

    method: str = "dopri5"
    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 100_000
    max_step: float = inf
    first_step: float | None = None

    def __post_init__(self) -> None:
        if self.method not in adaptive_methods():
            raise ValueError(
                f"method must be one of the adaptive methods {adaptive_methods()}; got "
                f"{self.method!r}"
            )
        _require_number(self.rtol, "rtol", "a number between 0 and 1", below=1.0)
        _require_number(self.atol, "atol", "a non-negative number", or_zero=True)
        require_count(self.max_steps, name="max_steps")
        _require_number(self.max_step, "max_step", "a positive number", finite=False)
        _require_number(self.first_step, "first_step", "a positive number")

    def tolerances(self, dtype: torch.dtype) -> Tolerances:
        """Tolerances for states of this dtype, with a warning where the dtype cannot hold them."""
        rtol = self.rtol if self.rtol is not None else _DEFAULT_RTOL.get(dtype, 1e-3)
        floor = 10 * torch.finfo(dtype).eps
        if rtol < floor:
            warnings.warn(
                f"rtol = {rtol:g} is below what {dtype} can hold (about {floor:.1g}); use a "
                "larger rtol "
                "or float64",
                StoppingWarning,
                stacklevel=4,
            )
        return Tolerances(rtol, self.atol)


def _require_number(
    value: object,
    name: str,
    wanted: str,
    *,
    below: float = inf,
    or_zero: bool = False,
    finite: bool = True,
) -> None:
    """Raise unless `value` is None or a number in (0, below)."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {wanted} or None; got {type(value).__name__}")
    inside = 0 < value < below or (value == 0 and or_zero) or (value == inf and not finite)
    if not inside:
        raise ValueError(f"{name} must be {wanted}; got {value}")
