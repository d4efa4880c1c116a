"""Keys for results that may be reused: versions, source code and plain data, hashed.

A stored number is as good as the code that made it. A key therefore holds the versions of the
packages, the source of the libraries (helpers of the checks included), the whole source of the
module that defines the function, and the plain data bound to the function.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import torch

LIBRARIES = ("ode_stopping", "discrete", "theory_checks")
# What presents numbers cannot change them: editing the report must not cost a night of computing.
_PRESENTATION = (
    "plots",
    "__main__.py",
    "cells.py",
    "cli.py",
    "context.py",
    "files.py",
    "fingerprint.py",
    "plotting.py",
    "registry.py",
    "results.py",
    "runner.py",
    "sealed.py",
    "terminal.py",
    "report",
)
_DISTRIBUTIONS = (
    "torch",
    "torchdiffeq",
    "numpy",
    "scipy",
    "scikit-learn",
    "pandas",
    "matplotlib",
    "joblib",
)


def versions() -> dict[str, str]:
    """The versions of Python, this library and what it computes with; missing ones are left out."""
    found = {"python": platform.python_version()}
    try:
        found["ode-stopping"] = importlib.metadata.version("ode-stopping")
    except importlib.metadata.PackageNotFoundError:
        found["ode-stopping"] = "not installed (run from a checkout)"
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def digest(*parts: str) -> str:
    """A short hash of strings; lengths enter, so that ("ab", "c") is not ("a", "bc")."""
    hasher = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        hasher.update(f"{len(encoded)}:".encode() + encoded)
    return hasher.hexdigest()[:32]


@functools.lru_cache(maxsize=1)
def library_hash() -> str:
    """Hash of the source of the three packages, without single checks and what only presents."""
    parts: list[str] = []
    for package in LIBRARIES:
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(root).rglob("*.py")):
                relative = path.relative_to(root)
                if package == "theory_checks" and not _enters(relative):
                    continue
                parts += [f"{package}/{relative.as_posix()}", path.read_text(encoding="utf-8")]
    return digest(*parts)


def _enters(relative: Path) -> bool:
    """Whether a file of theory_checks is part of the library hash."""
    if relative.parts[0] == "checks":
        return relative.name.startswith("_") and relative.name != "__init__.py"
    return relative.parts[0] not in _PRESENTATION


def module_source(function: Callable[..., Any]) -> str:
    """The source of the module that defines `function`; empty where it has no file."""
    try:
        return Path(inspect.getsourcefile(inspect.unwrap(function)) or "").read_text("utf-8")
    except (OSError, TypeError):
        return ""


def function_hash(function: Callable[..., Any]) -> str:
    """Hash of a function's name, the source of its module, and what is bound to it.

    Bound are the variables of a closure and the arguments of `functools.partial`: plain data,
    functions, or objects with a `__cache_key__`.

    Raises:
        TypeError: Something else is bound; the message names it. It belongs into the item.
    """
    parts: list[str] = []
    while isinstance(function, functools.partial):
        parts += _bound("partial argument", dict(enumerate(function.args)))
        parts += _bound("partial keyword", function.keywords)
        function = function.func
    function = inspect.unwrap(function)
    if isinstance(function, FunctionType):
        parts += _bound("closure", inspect.getclosurevars(function).nonlocals)
    parts += [function.__module__, function.__qualname__, module_source(function)]
    return digest(*parts)


def _bound(where: str, values: Mapping[Any, Any]) -> list[str]:
    """Texts of bound values."""
    texts: list[str] = []
    for name, value in values.items():
        try:
            if isinstance(value, FunctionType | functools.partial):
                text = function_hash(value)
            else:
                text = getattr(value, "__cache_key__", None) or canonical(value)
        except TypeError as error:
            raise TypeError(f"{where} {name!r}: {error}") from None
        texts.append(f"{name}={text}")
    return texts


def canonical(value: Any) -> str:
    """One string for one value of plain data, the same in every process.

    Plain data: None, booleans, numbers, strings, torch dtypes and devices, enum members, paths, and
    tuples, lists, sets, mappings and dataclasses of them.

    Raises:
        TypeError: Anything else, whose text need not determine it (a large tensor, for one).
    """
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype):
        return f"{type(value).__name__}:{value!r}"
    if isinstance(value, torch.device | Path):
        return f"{type(value).__name__}:{value}"
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}[{','.join(canonical(entry) for entry in value)}]"
    if isinstance(value, set | frozenset):
        return f"set[{','.join(sorted(canonical(entry) for entry in value))}]"
    if isinstance(value, Mapping):
        entries = sorted((canonical(key), canonical(entry)) for key, entry in value.items())
        return f"dict[{','.join(f'{key}={entry}' for key, entry in entries)}]"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = ",".join(
            f"{f.name}={canonical(getattr(value, f.name))}" for f in dataclasses.fields(value)
        )
        return f"{type(value).__qualname__}({fields})"
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return canonical(value.item())
    raise TypeError(f"not plain data, so no key can be made of it: {type(value).__qualname__}")
