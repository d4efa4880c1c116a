"""Warnings that reach the user each time that there is something new to say.

Python shows a warning once per place in the code, and the place would be one line of this library,
or the one line of a training loop: of three bad gradients one would be heard of. So a warning is
given at the user's own line, without a memory of what was said there before. Filters work as ever.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["warn_user"]

_OURS = frozenset({"ode_stopping", "discrete", "torch", "torchdiffeq"})


def warn_user(message: str, category: type[Warning]) -> None:
    """Give a warning at the line from which the library, or autograd, was called."""
    frame: FrameType | None = sys._getframe(1)
    here = frame
    while frame is not None and _package(frame) in _OURS:
        frame = frame.f_back
    # A thread of autograd's own has no line of the user's above it.
    place = frame if frame is not None else here
    assert place is not None
    warnings.warn_explicit(
        message,
        category,
        filename=place.f_code.co_filename,
        lineno=place.f_lineno,
        module=place.f_globals.get("__name__", "<unknown>"),
        registry={},
    )


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
