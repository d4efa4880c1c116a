"""Warnings about results that the arithmetic, not the method, makes inaccurate."""

from __future__ import annotations

import warnings

import torch

from .control import Tolerances
from .implicit import Crossing
from .status import StoppingWarning

__all__ = ["warn_about_rounding"]


def warn_about_rounding(crossing: Crossing, start: float, tolerances: Tolerances) -> None:
    """Warn where the rounding noise of J, divided by |J'|, is above the tolerance on T.

    The noise is estimated as eps_machine (|J| + sum_i |g_i x_i|): J itself is rounded, and so is x.
    """
    state = crossing.state
    eps = torch.finfo(state.dtype).eps
    noise = eps * (abs(crossing.value) + float((crossing.gradient * state).abs().sum()))
    in_time = noise / abs(crossing.rate)
    allowed = tolerances.rtol * max(abs(crossing.time - start), abs(crossing.time))
    if in_time > allowed:
        warnings.warn(
            f"rounding in {state.dtype} moves the stopping time by about {in_time:.2g}, more than "
            "the tolerance "
            f"{allowed:.2g}: the criterion is too flat at the target for this dtype. Use float64, "
            "a larger target, "
            "or a larger rtol.",
            StoppingWarning,
            stacklevel=4,
        )
