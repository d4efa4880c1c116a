"""Finished cells of `Context.map` on disk: plain data, arrays, tensors and dataclasses as JSON.

The file says which dataclass a record is, but names no code: a class is one that the return
annotation of the cell's function reaches, and every field has to have its annotated type.
"""

from __future__ import annotations

import base64
import collections.abc
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .sealed import ForeignError, read_sealed, write_sealed

FORMAT = "ode-stopping cell"
MISSING = object()
_PLAIN = (bool, int, str, type(None))
_ARRAY_KINDS = "biufc"  # booleans and numbers: an array of objects would be a pickle
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not str(dtype).startswith("torch.q")
}


@dataclass(frozen=True)
class CellCache:
    """Finished cells of `Context.map`, one file each below `folder`.

    Attributes:
        folder: Where the files are.
        reuse: False to compute everything anew (and overwrite what is there).
    """

    folder: Path
    reuse: bool = True

    def load(self, key: str, kind: Any = Any) -> Any:
        """The result stored under `key`, or `MISSING`.

        Args:
            key: Of the cell.
            kind: The type of the result, `returned(function)`.

        Raises:
            ForeignError: A file that is not what `save` writes for this key and type.
        """
        if not self.reuse:
            return MISSING
        path = self.folder / f"{key}.json"
        content = read_sealed(path, FORMAT)
        if content is None:
            return MISSING
        if not isinstance(content, dict) or content.get("key") != key or len(content) != 2:
            raise ForeignError(f"{path.name} is the file of another cell")
        try:
            result = decode(content["result"], kind)
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise ForeignError(f"{path.name} holds something else than its cell returns") from error
        if not conforms(result, kind):
            raise ForeignError(f"{path.name} holds something else than its cell returns")
        return result

    def save(self, key: str, result: Any, kind: Any = Any) -> None:
        """Store `result` under `key`.

        Raises:
            TypeError: What cannot be stored, or is not of the type `kind`.
            WriteError: The file cannot be written.
        """
        if not conforms(result, kind):
            raise TypeError(f"a cell must return what it is annotated with, {kind}; got {result!r}")
        content = {"key": key, "result": encode(result, kind)}
        write_sealed(self.folder / f"{key}.json", FORMAT, content)


def returned(function: Callable[..., Any]) -> Any:
    """The type that a function's annotation says it returns; Any where there is none.

    Raises:
        TypeError: An annotation that names what cannot be looked up from the function's module.
    """
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    return _hints(function).get("return", Any) if inspect.isfunction(function) else Any


def encode(value: Any, kind: Any = Any) -> Any:
    """`value` as strict JSON that `decode` turns back into an equal value of the same types.

    Args:
        value: None, booleans, numbers, strings, lists, tuples, dicts, arrays and scalars of NumPy
            (numbers only), dense tensors on the CPU that require no grad, and dataclasses that
            `kind` reaches.
        kind: The type of the value.

    Raises:
        TypeError: Anything else; the message names it.
    """
    return _encode(value, _classes(kind))


def _encode(value: Any, classes: dict[str, type[Any]]) -> Any:
    # Exact types: a subclass (an enum's member, say) would come back as something else.
    if type(value) in _PLAIN:
        return value
    if type(value) is float:
        return value if np.isfinite(value) else {"float": repr(value)}
    if type(value) is list:
        return [_encode(entry, classes) for entry in value]
    if type(value) is tuple:
        return {"tuple": [_encode(entry, classes) for entry in value]}
    if type(value) is dict:
        return {"dict": [[_encode(k, classes), _encode(v, classes)] for k, v in value.items()]}
    if isinstance(value, np.generic | np.ndarray) and value.dtype.kind in _ARRAY_KINDS:
        name = "array" if isinstance(value, np.ndarray) else "scalar"
        return {name: [value.dtype.str, list(value.shape), _text(value.tobytes())]}
    if type(value) is torch.Tensor:
        return {"tensor": [*_described(value), _text(_bytes_of(value))]}
    kind = classes.get(_name(type(value)))
    if kind is type(value):
        names = [f.name for f in dataclasses.fields(kind)]
        inner = {name: _encode(getattr(value, name), classes) for name in names}
        return {"dataclass": [_name(kind), inner]}
    raise TypeError(
        f"a cell's result cannot be stored: {_name(type(value))}. Possible are plain data, arrays, "
        "tensors on the CPU, and dataclasses that the function's return annotation names"
    )


def decode(content: Any, kind: Any = Any) -> Any:
    """The value of which `encode` made `content`.

    Raises:
        LookupError | TypeError | ValueError: What `encode` does not make.
    """
    return _decode(content, _classes(kind))


def _decode(content: Any, classes: dict[str, type[Any]]) -> Any:
    if isinstance(content, list):
        return [_decode(entry, classes) for entry in content]
    if not isinstance(content, dict):
        return content
    ((name, inner),) = content.items()
    if name == "float":
        return {"inf": np.inf, "-inf": -np.inf, "nan": float("nan")}[inner]
    if name == "tuple":
        return tuple([_decode(entry, classes) for entry in inner])
    if name == "dict":
        return {_decode(key, classes): _decode(entry, classes) for key, entry in inner}
    if name in ("array", "scalar"):
        dtype, shape, text = inner
        return _array(dtype, shape, text)[() if name == "scalar" else ...]
    if name == "tensor":
        dtype, shape, text = inner
        # Bytes first, seen as numbers afterwards: NumPy does not have all of torch's types.
        size = _DTYPES[dtype].itemsize
        flat = torch.from_numpy(_array("|u1", [*shape, size], text).reshape(-1))
        return flat.view(_DTYPES[dtype]).reshape(shape)
    if name == "dataclass":
        (label, fields) = inner
        return classes[label](**{key: _decode(entry, classes) for key, entry in fields.items()})
    raise ValueError(f"nothing is stored as {name!r}")


def _array(dtype: str, shape: list[int], text: str) -> Any:
    """An array of one's own from its bytes, of which there have to be as many as its shape says."""
    kind = np.dtype(dtype)
    if kind.kind not in _ARRAY_KINDS or kind.str != dtype:
        raise ValueError(f"no array is stored with the type {dtype!r}")
    if any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"a shape must be of whole numbers, got {shape!r}")
    return np.frombuffer(base64.b64decode(text, validate=True), dtype=kind).reshape(shape).copy()


def _described(value: torch.Tensor) -> tuple[str, list[int]]:
    """Type and shape of a tensor that can be stored."""
    name = str(value.dtype).removeprefix("torch.")
    plain = value.layout is torch.strided and value.device.type == "cpu" and name in _DTYPES
    if not plain or value.requires_grad:
        raise TypeError(
            "a cell's result cannot be stored: a tensor must be dense, on the CPU and without "
            f"requires_grad; got {value.layout}, {value.device}, "
            f"requires_grad={value.requires_grad}, {value.dtype}"
        )
    return name, list(value.shape)


def _bytes_of(value: torch.Tensor) -> bytes:
    """The numbers of a tensor, whatever their type, in the order of its shape."""
    flat = value.resolve_conj().resolve_neg().reshape(-1).contiguous()
    content: bytes = flat.view(torch.uint8).numpy().tobytes()
    return content


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def conforms(value: Any, kind: Any) -> bool:
    """Whether a value has an annotated type, the entries of containers and dataclasses included.

    A whole number is a float, as for type checkers, and NumPy's scalars are numbers.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if kind is None or kind is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(conforms(value, one) for one in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and _tuple_conforms(value, arguments)
    if origin in (list, collections.abc.Sequence):
        allowed = list if origin is list else (list, tuple)
        return isinstance(value, allowed) and all(conforms(one, arguments[0]) for one in value)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict) and all(
            conforms(key, arguments[0]) and conforms(one, arguments[1])
            for key, one in value.items()
        )
    if origin is np.ndarray:  # numpy.typing.NDArray[scalar]
        scalars = typing.get_args(arguments[1]) if len(arguments) > 1 else ()
        scalar = scalars[0] if scalars and isinstance(scalars[0], type) else np.generic
        return isinstance(value, np.ndarray) and issubclass(value.dtype.type, scalar)
    if kind is float or kind is int:
        whole = (int, np.integer)
        return isinstance(value, (*whole, float, np.floating) if kind is float else whole) and (
            not isinstance(value, bool)
        )
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if not isinstance(kind, type) or not isinstance(value, kind):
        return False
    if not dataclasses.is_dataclass(kind):
        return True
    hints = _hints(kind)
    return all(conforms(getattr(value, f.name), hints[f.name]) for f in dataclasses.fields(kind))


def _tuple_conforms(value: tuple[Any, ...], arguments: tuple[Any, ...]) -> bool:
    """A tuple of any length, as in tuple[float, ...], or of a fixed one."""
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return all(conforms(one, arguments[0]) for one in value)
    return len(value) == len(arguments) and all(map(conforms, value, arguments))


def _classes(kind: Any) -> dict[str, type[Any]]:
    """The dataclasses that a type reaches, through its arguments and their fields, by name."""
    found: dict[str, type[Any]] = {}
    waiting = [kind]
    while waiting:
        one = waiting.pop()
        waiting += typing.get_args(one)
        if isinstance(one, type) and dataclasses.is_dataclass(one) and _name(one) not in found:
            found[_name(one)] = one
            waiting += _hints(one).values()
    return found


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    """The annotations of a function or class, looked up."""
    try:
        return typing.get_type_hints(owner)
    except NameError as error:
        raise TypeError(
            f"the annotations of {_name(owner)} must be names of its module: {error}"
        ) from error


def _name(owner: Any) -> str:
    return f"{owner.__module__}.{owner.__qualname__}"
