"""What a user calls the tensors that functions depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

__all__ = ["names_of", "tensors_in"]

_DEPTH = 4
_LONGEST = 64


def names_of(
    tensors: Sequence[Tensor],
    functions: Mapping[str, object],
    params: Sequence[Tensor] | None = None,
    *,
    taken: Sequence[str] = (),
) -> list[str]:
    """A name for every leaf: that of the parameter, of the closed-over variable, or a number.

    Args:
        tensors: The leaves.
        functions: By what name each function goes in those of its parameters.
        params: Tensors that the caller named.
        taken: Names that others have.
    """
    known: dict[int, str] = {}
    for prefix, function in functions.items():
        for name, tensor in tensors_in(function, prefix):
            known.setdefault(id(tensor), name)
    for index, tensor in enumerate(params or ()):
        known.setdefault(id(tensor), f"params[{index}]")
    names: list[str] = []
    for index, tensor in enumerate(tensors):
        fallback = f"leaf {index} of shape {tuple(tensor.shape)}"
        name = known.get(id(tensor), fallback)
        names.append(name if name not in (*taken, *names) else f"{name} (leaf {index})")
    return names


def tensors_in(thing: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors that an object holds, with the way to them."""
    return _tensors_in(thing, name, _DEPTH, set())


def _tensors_in(
    thing: object, name: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(thing, Tensor):
        yield name, thing
        return
    if depth == 0 or id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, nn.Module):
        for key, tensor in (*thing.named_parameters(), *thing.named_buffers()):
            yield f"{name}.{key}", tensor
    for key, held in _held(thing, name):
        yield from _tensors_in(held, key, depth - 1, seen)


def _held(thing: object, name: str) -> Iterable[tuple[str, object]]:
    """What an object holds: entries, variables that a function closes over, attributes."""
    if isinstance(thing, dict):
        return [(f"{name}[{key!r}]", value) for key, value in list(thing.items())[:_LONGEST]]
    if isinstance(thing, list | tuple):
        return [(f"{name}[{index}]", value) for index, value in enumerate(thing[:_LONGEST])]
    if isinstance(thing, type):
        return []
    code = getattr(thing, "__code__", None)
    if code is not None:
        return _closed_over(thing, code)
    owner = getattr(thing, "__self__", None)
    if owner is not None:
        return [(name, owner)]
    attributes = getattr(thing, "__dict__", {})
    return [(f"{name}.{key}", value) for key, value in attributes.items() if key[:1] != "_"]


def _closed_over(function: Callable[..., Any] | object, code: Any) -> list[tuple[str, object]]:
    """The variables that a function takes from around it, by their own names."""
    owner = getattr(function, "__self__", None)
    held: list[tuple[str, object]] = [] if owner is None else [("self", owner)]
    for key, cell in zip(
        code.co_freevars, getattr(function, "__closure__", None) or (), strict=False
    ):
        try:
            held.append((key, cell.cell_contents))
        except ValueError:  # a variable that has no value yet
            continue
    around = getattr(function, "__globals__", {})
    kinds = (Tensor, nn.Module, dict, list, tuple)
    held += [(key, around[key]) for key in code.co_names if isinstance(around.get(key), kinds)]
    return held
