"""Modules that are imported where they are used: what an extra brings, and the pictures."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["optional_module", "pictures"]


def optional_module(module: str, what: str, *, extra: str = "checks") -> Any:
    """Import what an extra brings; where it is missing, say what needs it and which extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{what} needs {module.split(".")[0]}: pip install "ode-stopping[{extra}]"'
        ) from error


def pictures(module: str = "") -> Any:
    """The package of plots, or a module of it.

    It draws results and imports what it needs of them; a `plot` method of a result that imported
    it openly would close a circle.
    """
    return importlib.import_module(f"ode_stopping.plots.{module}".rstrip("."))
