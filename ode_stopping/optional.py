"""Modules that an extra brings, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["optional_module"]


def optional_module(module: str, what: str) -> Any:
    """Import what an extra brings; where it is missing, say what needs it and which extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{what} needs {module.split(".")[0]}: pip install "ode-stopping[checks]"'
        ) from error
