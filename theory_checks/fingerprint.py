"""Keys for results that may be reused: versions, source code and plain data, hashed.

A stored number is as good as the code that made it, so a key holds whatever can change the number:
the versions of the packages, the source of the libraries, and the source of the function together
with what it reaches through globals, defaults, closures and `functools.partial`.
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
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("ode_stopping", "discrete", "theory_checks")
# What presents numbers cannot change them: editing the report must not cost a night of computing.
_PRESENTATION = (
    "plots",
    "__main__.py",
    "cli.py",
    "context.py",
    "fingerprint.py",
    "plotting.py",
    "registry.py",
    "results.py",
    "runner.py",
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
    """The source of the module that defines `function`; its bytecode where there is no file."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(function))
        if path is not None:
            return Path(path).read_text(encoding="utf-8")
    except (OSError, TypeError):
        pass
    return _bytecode(getattr(function, "__code__", None))


def function_hash(function: Callable[..., Any]) -> str:
    """Hash of a function's source, and of what it reaches in its own module.

    Globals that are functions of the same package are followed, plain data enters by value; where
    something else is reached (a class, an object), the whole module enters instead.

    Raises:
        TypeError: a closure, default or partial argument that is neither plain data nor a function,
            named in the message; such things belong into the item.
    """
    parts: list[str] = []
    _reach(function, parts, set())
    return digest(*parts)


def _reach(function: Callable[..., Any], parts: list[str], seen: set[int]) -> None:
    """Append the source of `function` and of what it uses to `parts`."""
    while isinstance(function, functools.partial):
        parts.append(_bound(function.args, parts, seen, "partial argument"))
        parts.append(_bound(function.keywords, parts, seen, "partial keyword"))
        function = function.func
    function = inspect.unwrap(function)
    if not isinstance(function, types.FunctionType):
        parts += [repr(type(function)), module_source(function)]
        return
    if id(function.__code__) in seen:
        return
    seen.add(id(function.__code__))
    parts.append(f"{function.__module__}.{function.__qualname__}")
    try:
        parts.append(inspect.getsource(function))
    except (OSError, TypeError):
        parts.append(_bytecode(function.__code__))
    parts.append(_bound(function.__defaults__, parts, seen, "default"))
    parts.append(_bound(function.__kwdefaults__, parts, seen, "default"))
    free = inspect.getclosurevars(function).nonlocals
    parts.append(_bound(dict(sorted(free.items())), parts, seen, "closure"))
    for name in sorted(_names(function.__code__) & set(function.__globals__)):
        _reach_global(function, name, parts, seen)


def _reach_global(
    function: types.FunctionType, name: str, parts: list[str], seen: set[int]
) -> None:
    """Append what the global `name` of `function` is, as far as the library hash has it not yet."""
    value = function.__globals__[name]
    home = str(getattr(value, "__module__", function.__module__))
    if isinstance(value, types.ModuleType) or home.split(".")[0] in ("builtins", "typing"):
        return
    if isinstance(value, types.FunctionType) and _same_home(home, function.__module__):
        _reach(value, parts, seen)
        return
    if callable(value) and home != function.__module__:
        return  # a library's: its version or the library hash stands for it
    try:
        parts.append(f"{name}={canonical(value)}")
    except TypeError:
        parts.append(module_source(function))


def _same_home(home: str, module: str) -> bool:
    """Whether code of `home` is followed from `module`: the same module or a neighbouring check."""
    return home == module or home.startswith("theory_checks.checks.")


def _names(code: types.CodeType) -> set[str]:
    """The global names used in `code` and in the functions nested in it."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _bytecode(code: types.CodeType | None) -> str:
    """A stand-in for source that cannot be read; stable within one version of Python."""
    if code is None:
        return ""
    constants = [_bytecode(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return repr((code.co_code.hex(), code.co_names, constants))


def _bound(values: Any, parts: list[str], seen: set[int], where: str) -> str:
    """Canonical text of bound values, following functions among them."""
    if not values:
        return ""
    named = values.items() if isinstance(values, Mapping) else enumerate(values)
    texts: list[str] = []
    for name, value in named:
        if isinstance(value, types.FunctionType | functools.partial):
            _reach(value, parts, seen)
        elif not hasattr(value, "__cache_key__"):
            try:
                texts.append(f"{name}={canonical(value)}")
            except TypeError as error:
                raise TypeError(f"{where} {name!r}: {error}") from None
        else:
            texts.append(f"{name}={value.__cache_key__}")
    return ";".join(texts)


def canonical(value: Any) -> str:
    """One string for one value of plain data, the same in every process.

    Plain data: None, booleans, numbers, strings, torch dtypes and devices, enum members, paths, and
    tuples, lists, sets, mappings and dataclasses of them.

    Raises:
        TypeError: anything else, whose text need not determine it (a large tensor, for one).
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
