"""Warnings of the library while a gradient is checked: noted, or of no interest."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from ..core.status import StoppingWarning

__all__ = ["listening", "quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """Runs that are solved for comparison only: what they would warn about is not the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoppingWarning)
        yield


@contextmanager
def listening() -> Iterator[list[str]]:
    """The library's own warnings become lines of the report; all others pass on."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield texts
        finally:
            texts += [str(w.message) for w in caught if issubclass(w.category, StoppingWarning)]
    for w in caught:
        if not issubclass(w.category, StoppingWarning):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
