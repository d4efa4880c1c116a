"""Bad input is answered at entry, with the argument's name and what it got."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from math import isfinite
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .states import State

__all__ = [
    "checked_scalar",
    "checked_state",
    "checked_target",
    "leaving_inference_mode",
    "refuse_transforms",
    "require_callable",
    "require_instance",
]

Run = TypeVar("Run", bound=Callable[..., Any])


def require_callable(value: object, *, name: str) -> None:
    """Raise unless `value` can be called.

    Raises:
        TypeError: Naming the argument.
    """
    if not callable(value):
        raise TypeError(f"{name} must be callable, (t, x) -> ...; got {type(value).__name__}")


def require_instance(value: object, kind: type, *, name: str) -> None:
    """Raise unless `value` is None or an instance of `kind`.

    Raises:
        TypeError: Naming the argument.
    """
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__} or None; got {type(value).__name__}")


def leaving_inference_mode(function: Run) -> Run:
    """Let `function(flow, x0, ...)` run outside of inference mode, without gradients, if it is on.

    Flows that differentiate inside cannot work there: no graph can be built on tensors made in it.
    """

    @wraps(function)
    def wrapper(flow: Any, x0: Any, *args: Any, **options: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            return function(flow, x0, *args, **options)
        with torch.inference_mode(False), torch.no_grad():
            pieces = x0 if isinstance(x0, tuple) else (x0,)
            plain = tuple(p.clone() if isinstance(p, Tensor) else p for p in pieces)
            return function(flow, plain if isinstance(x0, tuple) else plain[0], *args, **options)

    return cast("Run", wrapper)


def checked_state(x0: object, *, name: str = "x0") -> State:
    """The start state: floating, finite, of one dtype and device.

    Raises:
        TypeError: Not a tensor or tuple of tensors; not floating; mixed dtypes.
        ValueError: Mixed devices; non-finite; no elements.
    """
    pieces = x0 if isinstance(x0, tuple) else (x0,)
    if not pieces:
        raise ValueError(
            f"{name} must be a tensor or a non-empty tuple of tensors; got an empty tuple"
        )
    tensors: list[Tensor] = []
    for piece in pieces:
        if not isinstance(piece, Tensor):
            raise TypeError(
                f"{name} must be a tensor or a tuple of tensors; got {type(piece).__name__}"
            )
        if not piece.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got dtype {piece.dtype}")
        tensors.append(piece)
    dtypes = sorted({str(piece.dtype) for piece in tensors})
    if len(dtypes) > 1:
        raise TypeError(f"{name} must have one dtype in all its tensors; got {', '.join(dtypes)}")
    devices = sorted({str(piece.device) for piece in tensors})
    if len(devices) > 1:
        raise ValueError(f"{name} must be on one device; got {', '.join(devices)}")
    if sum(piece.numel() for piece in tensors) == 0:
        raise ValueError(f"{name} must have at least one element")
    for index, piece in enumerate(tensors):
        bad = ~torch.isfinite(piece.detach())
        if bool(bad.any()):
            raise ValueError(
                f"{name} must be finite; got {int(bad.sum())} NaN or inf (entry {index})"
            )
    return tuple(tensors) if isinstance(x0, tuple) else tensors[0]


def checked_scalar(value: object, *, name: str, like: Tensor) -> Tensor:
    """A finite float or 0-d tensor as a 0-d tensor that keeps its graph.

    A float becomes float64 whatever the state's dtype: times and targets are not rounded to
    float32.

    Raises:
        TypeError: Neither a number nor a floating 0-d tensor.
        ValueError: Wrong shape or device; NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(f"{name} must be a float or a 0-d tensor; got {type(value).__name__}")
    if isinstance(value, Tensor):
        if value.shape != ():
            raise ValueError(f"{name} must be a 0-d tensor; got shape {tuple(value.shape)}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating-point; got dtype {value.dtype}")
        if value.device != like.device:
            raise ValueError(f"{name} is on {value.device} but x0 on {like.device}")
        tensor = value
    else:
        tensor = torch.tensor(float(value), dtype=torch.float64, device=like.device)
    if not isfinite(float(tensor.detach())):
        raise ValueError(f"{name} must be finite; got {float(tensor.detach())}")
    return tensor


def checked_target(target: object, *, like: Tensor, criterion: object) -> Tensor:
    """The target as a 0-d tensor.

    Raises:
        TypeError, ValueError: As `checked_scalar`; a negative target for a criterion that declares
            itself nonnegative; a vector of targets, which is not available yet.
    """
    if isinstance(target, Tensor) and target.ndim == 1:
        raise ValueError(
            f"target must be a float or a 0-d tensor; got shape {tuple(target.shape)} (several "
            "targets in one "
            "solve are not available yet: call once a target)"
        )
    tensor = checked_scalar(target, name="target", like=like)
    if getattr(criterion, "nonnegative", False) is True and float(tensor.detach()) < 0:
        raise ValueError(
            f"target must not be negative for a nonnegative criterion; got "
            f"{float(tensor.detach()):g}"
        )
    return tensor


def refuse_transforms(*inputs: object) -> None:
    """Raise where a functional transform (vmap, grad, jvp of torch.func) is active.

    Raises:
        RuntimeError: Naming the batched form.
    """
    pieces: list[object] = []
    for value in inputs:
        pieces += value if isinstance(value, tuple) else [value]
    wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)
    if wrapped is not None and any(isinstance(p, Tensor) and wrapped(p) for p in pieces):
        raise RuntimeError(
            "functional transforms (torch.func.vmap, grad, jvp) cannot go through an adaptive "
            "loop, whose number "
            "of steps depends on the data. For many problems at once see batched=; for "
            "derivatives use "
            "torch.autograd."
        )
