"""Variants of a test of which the first run by default and the rest under `make test-slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(count: int, variants: Iterable[Any]) -> list[Any]:
    """The values of one argument as parameters, all behind the first `count` marked slow."""
    return [
        pytest.param(one, marks=() if i < count else pytest.mark.slow)
        for i, one in enumerate(variants)
    ]
