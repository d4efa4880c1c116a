"""Learned optimisers in files: safetensors with the class, its options and a version; no pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ode_stopping.core.files import replace_file
from ode_stopping.core.optional import optional_module
from ode_stopping.core.validation import described

if TYPE_CHECKING:
    from .base import LearnedOptimizer

__all__ = ["read_optimizer", "read_tensors", "write_optimizer", "write_tensors"]

_FORMAT = "ode-stopping learned optimizer"
Kind = TypeVar("Kind", bound="LearnedOptimizer")


def write_optimizer(learned: LearnedOptimizer, path: Path) -> None:
    """Write one to a file.

    Raises:
        TypeError: An option that JSON does not hold, by its name; a state that is no tensor.
    """
    kind = type(learned).__name__
    for name, value in learned.options.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"the option {name} of this {kind} cannot be saved: it is {described(value)}, and "
                "a file holds numbers, strings, True, False, None, and lists and dicts of these"
            ) from error
    tensors = learned.state_dict()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the state {name} of this {kind} cannot be saved: it is no tensor")
    about = {
        "format": _FORMAT,
        "class": kind,
        "version": str(learned.version),
        "options": json.dumps(learned.options),
    }
    write_tensors(tensors, about, path)


def write_tensors(tensors: Mapping[str, Tensor], about: Mapping[str, str], path: Path) -> None:
    """Write tensors and what is said about them to a file: the whole of it, or nothing.

    Raises:
        ImportError: The extra `learn` is missing.
        OSError: The file cannot be written.
    """
    safetensors = optional_module("safetensors.torch", "saving and loading", extra="learn")
    # (Copies: tensors that share their memory are refused.)
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    replace_file(path, safetensors.save(plain, metadata=dict(about)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `write_tensors` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no safetensors file, or half of one.
    """
    safetensors = optional_module("safetensors", "saving and loading", extra="learn")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            about: dict[str, str] = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name} is no safetensors file, or half of one: {error}") from error


def read_optimizer(every: type[LearnedOptimizer], kind: type[Kind], path: Path) -> Kind:
    """Read one from a file.

    Args:
        every: The base class.
        kind: The class that is asked for, with its subclasses.
        path: The file.

    Raises:
        ValueError: No learned optimiser, one of another or an unknown class, or of another version.
    """
    tensors, about = read_tensors(path)
    if about.get("format") != _FORMAT or not {"class", "version", "options"} <= set(about):
        raise ValueError(f"{path.name} holds no learned optimiser")
    name = about["class"]
    found = {one.__name__: one for one in _classes(every)}.get(name)
    if found is None:
        raise ValueError(
            f"{path.name} holds a {name}, which is not known here: import the module that defines "
            "it first"
        )
    if not issubclass(found, kind):
        raise ValueError(
            f"{path.name} holds a {name}, and no {kind.__name__}: read it by {name}.load"
        )
    if about["version"] != str(found.version):
        raise ValueError(
            f"{path.name} is of version {about['version']}, and this {name} reads version "
            f"{found.version}"
        )
    # What a constructor draws is overwritten: the caller's random numbers go on as if nothing was.
    with torch.random.fork_rng(devices=[]):
        learned = found(**json.loads(about["options"]))
    for place, target in learned.state_dict(keep_vars=True).items():
        if place in tensors and isinstance(target, Tensor):
            target.data = target.data.to(tensors[place].dtype)
    learned.load_state_dict(tensors)
    return learned


def _classes(kind: type[LearnedOptimizer]) -> Iterator[type[LearnedOptimizer]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _classes(below)
