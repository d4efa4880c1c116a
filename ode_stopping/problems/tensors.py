"""How tensors given to a problem, flow or schedule are taken in and kept.

One rule holds for the whole library: *a tensor is kept as the object it is*. What requires grad
stays the very leaf (or the very node of a graph) the user holds, so that gradients arrive there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

Number: TypeAlias = float | int
ArrayLike: TypeAlias = Tensor | np.ndarray | Sequence[float] | Sequence[Sequence[float]]


def attach(
    module: nn.Module, name: str, value: Tensor | Number, *, learnable: bool = False
) -> None:
    """Store a number or tensor on a module without losing its identity or its graph.

    * A `nn.Parameter` is registered as a parameter.
    * Any other tensor that requires grad becomes a plain attribute: it is the same object
      afterwards, and `module.to(...)` does not move it (moving would make a copy that is not the
      user's leaf any more).
    * A tensor that does not require grad becomes a buffer and follows `module.to(...)`.
    * A number becomes a 0-d float64 tensor: a parameter where `learnable`, else a buffer.

    Raises:
        TypeError: `value` is neither a number nor a floating-point tensor.
        ValueError: `value` is not finite.
    """
    tensor = as_floating(value, name)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    elif not isinstance(value, Tensor) and learnable:
        module.register_parameter(name, nn.Parameter(tensor))
    elif tensor.requires_grad:
        setattr(module, name, tensor)
    else:
        module.register_buffer(name, tensor)


def as_floating(value: ArrayLike | Number, name: str) -> Tensor:
    """The value as a finite floating-point tensor; a floating-point tensor is returned as it is.

    Numbers, sequences and integer arrays become float64; floating-point arrays keep their type.

    Raises:
        TypeError: Not numeric, complex, or a tensor of integers.
        ValueError: An entry is NaN or infinite.
    """
    if isinstance(value, Tensor):
        tensor = value
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got dtype {tensor.dtype}")
    else:
        tensor = _from_numpy(value, name)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinite entries")
    return tensor


def _from_numpy(value: ArrayLike | Number, name: str) -> Tensor:
    if hasattr(value, "toarray"):
        raise TypeError(
            f"{name} must be dense, got a sparse {type(value).__name__}; pass .toarray()"
        )
    array = np.array(value)  # a copy: the caller's array may be read-only, or change later
    if array.dtype.kind in "iub":
        array = array.astype(np.float64)
    if array.dtype.kind != "f":
        raise TypeError(f"{name} must hold real numbers, got {type(value).__name__}")
    return torch.as_tensor(array)


def scalar(value: Tensor | Number, name: str) -> Tensor | Number:
    """The value itself after a check that it is one number (a 0-d tensor or a Python number).

    Raises:
        ValueError: It has a dimension.
    """
    shape = tuple(value.shape) if isinstance(value, Tensor) else np.shape(value)
    if shape:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {shape}")
    return value
