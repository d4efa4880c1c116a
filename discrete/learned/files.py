"""Learned optimisers in files: safetensors with the class, its options and a version; no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from ode_stopping.core.optional import optional_module

if TYPE_CHECKING:
    from .base import LearnedOptimizer

__all__ = ["read_optimizer", "read_tensors", "write_optimizer", "write_tensors"]

_FORMAT = "ode-stopping learned optimizer"
Kind = TypeVar("Kind", bound="LearnedOptimizer")


def write_optimizer(learned: LearnedOptimizer, path: Path) -> None:
    """Write one to a file."""
    about = {
        "format": _FORMAT,
        "class": type(learned).__name__,
        "version": str(learned.version),
        "options": json.dumps(learned.options),
    }
    write_tensors(learned.state_dict(), about, path)


def write_tensors(tensors: Mapping[str, Tensor], about: Mapping[str, str], path: Path) -> None:
    """Write tensors and what is said about them to a file: the whole of it, or nothing.

    Another name first, forced to the disk, then renamed: a kill leaves the old file or the new one.
    """
    safetensors = optional_module("safetensors.torch", "save", extra="learn")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.save(plain, metadata=dict(about))
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_tensors` wrote."""
    safetensors = optional_module("safetensors", "load", extra="learn")
    with safetensors.safe_open(str(path), framework="pt") as file:
        about: dict[str, str] = file.metadata() or {}
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


def read_optimizer(kind: type[Kind], path: Path) -> Kind:
    """Read one of this class or of a subclass from a file.

    Raises:
        ValueError: No learned optimiser, one of an unknown class, or of another version.
    """
    tensors, about = read_tensors(path)
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
