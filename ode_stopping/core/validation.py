"""Bad input is answered at entry, with the argument's name and what it got."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from math import inf, isfinite
from numbers import Real
from types import FrameType
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from .states import State
from .warn import warn_user

__all__ = [
    "Direction",
    "checked_direction",
    "checked_evidence",
    "checked_horizon",
    "checked_number",
    "checked_scalar",
    "checked_state",
    "checked_target",
    "checked_targets",
    "described",
    "leaving_inference_mode",
    "ordinary",
    "refuse_batched_cotangent",
    "refuse_batches",
    "refuse_lost_views",
    "refuse_transforms",
    "require_callable",
    "require_count",
    "require_flag",
    "require_instance",
    "require_whole",
]

Run = TypeVar("Run", bound=Callable[..., Any])

# Of flow time, where none is given.
_DEFAULT_HORIZON = 1e6

# How J comes to its target.
Direction: TypeAlias = Literal["falling", "rising"]


def require_callable(value: object, *, name: str, call: str = "(t, x) -> ...") -> None:
    """Raise unless `value` is an object that can be called.

    Raises:
        TypeError: Naming the argument.
    """
    if isinstance(value, type):
        raise TypeError(
            f"{name} must be an object that is called as {call}; got the class {value.__name__}: "
            f"make one first, as in {value.__name__}(...)"
        )
    if not callable(value):
        raise TypeError(f"{name} must be callable, {call}; got {described(value)}")


def require_instance(value: object, kind: type, *, name: str, example: str = "") -> None:
    """Raise unless `value` is None or an instance of `kind`.

    Raises:
        TypeError: Naming the argument.
    """
    if value is None or isinstance(value, kind):
        return
    hint = f", as in {name}={example}" if example else ""
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(
            f"{name} must be an object or None{hint}; got the class {value.__name__} (are the "
            "brackets missing?)"
        )
    raise TypeError(f"{name} must be a {kind.__name__} or None{hint}; got {described(value)}")


def require_flag(value: object, *, name: str) -> None:
    """Raise unless `value` is True or False: "no" would count as true.

    Raises:
        TypeError: Naming the argument.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {described(value)}")


def checked_direction(value: object) -> bool:
    """Whether J is to rise to its target: direction="rising", and not "falling".

    Raises:
        ValueError: Something else.
    """
    if not (isinstance(value, str) and value in ("falling", "rising")):
        raise ValueError(f'direction must be "falling" or "rising"; got {described(value)}')
    return value == "rising"


def described(value: object) -> str:
    """Type and, where it is short, value of an argument, for messages."""
    if isinstance(value, Tensor):
        return f"a Tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    kind = type(value).__name__
    return f"{kind} {text}" if len(text) <= 40 and value is not None else kind


def require_count(value: object, *, name: str) -> None:
    """Raise unless `value` is a positive integer.

    Raises:
        TypeError, ValueError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {described(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def require_whole(value: object, *, name: str) -> None:
    """Raise unless `value` is an integer, of any sign: a seed.

    Raises:
        TypeError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int; got {described(value)}")


def checked_number(
    value: object, *, name: str, low: float = -inf, high: float = inf, closed: bool = False
) -> float:
    """A finite number in (low, high), or in [low, high) with `closed`.

    Raises:
        TypeError, ValueError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {described(value)}")
    number = float(value)
    if not (isfinite(number) and low <= number < high and (closed or number > low)):
        bounds = [f"{'>=' if closed else '>'} {low:g}"] if low > -inf else []
        bounds += [f"< {high:g}"] if high < inf else []
        raise ValueError(f"{name} must be {' and '.join(['finite', *bounds])}; got {number:g}")
    return number


def leaving_inference_mode(function: Run) -> Run:
    """Let `function` run outside of inference mode, without gradients, if it is on.

    Functions that differentiate inside cannot work there: no graph can be built on tensors made in
    it. Tensors among the arguments that come from there are copied, whatever the mode is now.
    """

    @wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        if not torch.is_inference_mode_enabled():
            given = {name: ordinary(value) for name, value in options.items()}
            return function(*map(ordinary, args), **given)
        with torch.inference_mode(False), torch.no_grad():
            return wrapper(*args, **options)

    return cast("Run", wrapper)


def ordinary(value: Any) -> Any:
    """A copy of a tensor made in inference mode, also in a tuple; all else as it is."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    return tuple(map(ordinary, value)) if type(value) is tuple else value


def checked_state(x0: object, *, name: str = "x0", half: bool = False) -> State:
    """The start state: floating, finite, of one dtype and device.

    Args:
        x0: A tensor or a tuple of tensors.
        name: The argument, for messages.
        half: Whether half precision will do (for an iteration, but not for an adaptive solver,
            whose error estimates would be rounding).

    Raises:
        TypeError: Not a tensor or tuple of tensors; not floating; mixed dtypes; half precision.
        ValueError: Mixed devices; without data; non-finite; no elements.
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
                f"{name} must be a tensor or a tuple of tensors; got {type(piece).__name__}. "
                "Write torch.tensor(..., dtype=torch.float64)"
            )
        if not piece.is_floating_point():
            raise TypeError(
                f"{name} must be a floating-point tensor; got dtype {piece.dtype}. Write "
                f"{name}.double(), or state complex numbers by their real and imaginary parts"
            )
        if piece.layout is not torch.strided:
            raise TypeError(
                f"{name} must be a dense tensor; got layout {piece.layout}. Write {name}.to_dense()"
            )
        tensors.append(piece)
    dtypes = sorted({str(piece.dtype) for piece in tensors})
    if len(dtypes) > 1:
        raise TypeError(f"{name} must have one dtype in all its tensors; got {', '.join(dtypes)}")
    if not half and tensors[0].dtype.itemsize < 4:
        raise TypeError(
            f"{name} must be float32 or float64 for an adaptive solver; got dtype "
            f"{tensors[0].dtype}. Write {name}.float()"
        )
    devices = sorted({str(piece.device) for piece in tensors})
    if len(devices) > 1:
        raise ValueError(f"{name} must be on one device; got {', '.join(devices)}")
    if tensors[0].is_meta:
        raise ValueError(f"{name} must hold numbers; got tensors on the device meta, without data")
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
    if isinstance(value, bool) or not isinstance(value, Real | Tensor):
        raise TypeError(f"{name} must be a float or a 0-d tensor; got {described(value)}")
    if isinstance(value, Tensor):
        if value.shape != ():
            raise ValueError(
                f"{name} must be a 0-d tensor; got shape {tuple(value.shape)}. Write "
                f"{name}.squeeze() if it holds one number"
            )
        if not value.is_floating_point():
            raise TypeError(
                f"{name} must be floating-point; got dtype {value.dtype}. Write {name}.double()"
            )
        if value.device != like.device:
            raise ValueError(
                f"{name} is on {value.device} but x0 on {like.device}. Write {name}.to(x0.device)"
            )
        tensor = value
    else:
        try:
            number = float(value)
        except OverflowError:
            raise ValueError(f"{name} must be finite; got an integer beyond floats") from None
        tensor = torch.tensor(number, dtype=torch.float64, device=like.device)
    if not isfinite(float(tensor.detach())):
        raise ValueError(f"{name} must be finite; got {float(tensor.detach())}")
    return tensor


def checked_horizon(max_time: object, start: float, like: Tensor) -> float:
    """The absolute horizon; None: t0 + 1e6.

    Raises:
        TypeError, ValueError: No finite number; not later than t0.
    """
    if max_time is None:
        return start + _DEFAULT_HORIZON
    horizon = float(checked_scalar(max_time, name="max_time", like=like).detach())
    if not horizon > start:
        raise ValueError(f"max_time must be later than t0 = {start:g}; got {horizon:g}")
    return horizon


def checked_evidence(evidence: object) -> Literal["light", "standard", "thorough"]:
    """How much is asked of a gradient.

    Raises:
        ValueError: Something else.
    """
    if evidence == "cheap":
        warn_user('evidence="cheap" is called "light" now', DeprecationWarning)
        return "light"
    if evidence not in ("light", "standard", "thorough"):
        raise ValueError(f'evidence must be "light", "standard" or "thorough"; got {evidence!r}')
    return evidence


def refuse_batches(*, batched: bool) -> None:
    """Raise for what is not built yet.

    Raises:
        NotImplementedError: `batched`.
    """
    if batched:
        raise NotImplementedError("batched=True is not available yet: call it once a sample")


def checked_targets(target: object, *, like: Tensor, criterion: object) -> list[Tensor]:
    """One target, or a vector of them, shape (K,), as 0-d tensors with their graphs.

    Raises:
        TypeError, ValueError: As `checked_target` for one of them; none; a value twice.
    """
    if not (isinstance(target, Tensor) and target.ndim == 1):
        return [checked_target(target, like=like, criterion=criterion)]
    if target.shape[0] == 0:
        raise ValueError("target must hold at least one number; got shape (0,)")
    every = [checked_target(one, like=like, criterion=criterion) for one in target.unbind()]
    values = [float(one.detach()) for one in every]
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise ValueError(f"target must not hold a value twice; got {twice[0]:g} more than once")
    return every


def checked_target(target: object, *, like: Tensor, criterion: object) -> Tensor:
    """The target as a 0-d tensor.

    Raises:
        TypeError, ValueError: As `checked_scalar`; a negative target for a criterion that declares
            itself nonnegative.
    """
    tensor = checked_scalar(target, name="target", like=like)
    if getattr(criterion, "nonnegative", False) is True and float(tensor.detach()) < 0:
        raise ValueError(
            f"target must not be negative: {type(criterion).__name__} is never below 0, so it "
            f"would never be crossed; got {float(tensor.detach()):g}"
        )
    return tensor


def refuse_transforms(*inputs: object) -> None:
    """Raise inside of a functional transform (vmap, grad, jvp of torch.func) and of forward mode.

    Whatever is transformed: a closure over the transformed tensor is seen by nobody at entry, and
    in forward mode its tangent would be lost without a word.

    Args:
        *inputs: Tensors, or tuples of tensors, that must not be transformed ones either.

    Raises:
        RuntimeError: Naming the batched form.
    """
    pieces: list[object] = []
    for value in inputs:
        pieces += value if isinstance(value, tuple) else [value]
    wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)
    stack = getattr(torch._C._functorch, "peek_interpreter_stack", None)
    transformed = (stack is not None and stack() is not None) or (
        wrapped is not None and any(isinstance(p, Tensor) and wrapped(p) for p in pieces)
    )
    if transformed or getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0:
        raise RuntimeError(
            "functional transforms (torch.func.vmap, grad, jvp, ...) and forward-mode "
            "differentiation cannot go through a loop whose number of steps depends on the data. "
            "For many problems at once see batched=; for derivatives use torch.autograd.grad or "
            ".backward() (DirectAdjoint has second ones)."
        )


def is_batched(cotangent: Tensor) -> bool:
    """Whether a backward pass is asked for many rows at once (is_grads_batched, vectorize)."""
    try:
        cotangent.sum().item()
    except RuntimeError:
        return True
    return False


def refuse_batched_cotangent(cotangent: Tensor) -> None:
    """Raise in a backward pass that is asked for many rows at once.

    Args:
        cotangent: A cotangent.

    Raises:
        RuntimeError: Naming is_grads_batched and vectorize.
    """
    if is_batched(cotangent):
        raise RuntimeError(
            "this backward pass cannot run for a batch of cotangents (is_grads_batched=True, "
            "vectorize=True): call torch.autograd.grad once a row"
        )


def refuse_lost_views(*, has_history: bool) -> None:
    """Raise where torch.autograd.functional would take a lost derivative for a zero.

    With create_graph=True (so in every `hessian`) it hands out a view of each input and asks for
    the derivative to that view. A closure over the view is found as the leaf behind it, the view
    itself counts as unused, and unused is zero there.

    Args:
        has_history: Whether flow, update or criterion use a tensor that is no leaf.

    Raises:
        RuntimeError: Naming params=.
    """
    if not has_history:
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not (
        frame.f_globals.get("__name__") == "torch.autograd.functional"
        and "create_graph" in frame.f_locals
    ):
        frame = frame.f_back
    if frame is not None and frame.f_locals["create_graph"] is True:
        raise RuntimeError(
            "torch.autograd.functional with create_graph=True (hessian always) passes a view of "
            "its input, which is used in a closure here: its derivative would come out as zero. "
            "Name it, params=[input], or use torch.autograd.grad. Second derivatives need "
            "DirectAdjoint of stopping_time."
        )
