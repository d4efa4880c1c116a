"""Learned optimisers in files: safetensors with the class, its options and a version; no pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ode_stopping.core.optional import optional_module

if TYPE_CHECKING:
    from .base import LearnedOptimizer

__all__ = ["read_optimizer", "write_optimizer"]

_FORMAT = "ode-stopping learned optimizer"
Kind = TypeVar("Kind", bound="LearnedOptimizer")


def write_optimizer(learned: LearnedOptimizer, path: Path) -> None:
    """Write one to a file."""
    numpy_free = optional_module("safetensors.torch", "save", extra="learn")
    about = {
        "format": _FORMAT,
        "class": type(learned).__name__,
        "version": str(learned.version),
        "options": json.dumps(learned.options),
    }
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in learned.state_dict().items()
    }
    numpy_free.save_file(tensors, str(path), metadata=about)


def read_optimizer(kind: type[Kind], path: Path) -> Kind:
    """Read one of this class or of a subclass from a file.

    Raises:
        ValueError: No learned optimiser, one of an unknown class, or of another version.
    """
    safetensors = optional_module("safetensors", "load", extra="learn")
    with safetensors.safe_open(str(path), framework="pt") as file:
        about = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about.get("format") != _FORMAT:
        raise ValueError(f"{path.name} holds no learned optimiser")
    known = {one.__name__: one for one in _classes(kind)}
    found = known.get(about["class"])
    if found is None:
        raise ValueError(
            f"{path.name} holds a {about['class']}, which is none of {sorted(known)}: import the "
            "module that defines it first"
        )
    if int(about["version"]) != found.version:
        raise ValueError(
            f"{path.name} is of version {about['version']}, and this {found.__name__} reads "
            f"version {found.version}"
        )
    learned = found(**json.loads(about["options"]))
    learned.load_state_dict(tensors)
    return learned


def _classes(kind: type[Kind]) -> Iterator[type[Kind]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _classes(below)
