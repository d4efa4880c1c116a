"""Somebody else's step code, run with a graph beside it.

The step of an optimiser is written to run without gradients: in place, with hyperparameters that
are Python floats, with detach(), item() and out= on the way. `traced` runs such code as it stands,
with the same arithmetic bit for bit, and differentiates what it computes:

- a hyperparameter is a `TracedNumber`, a float that carries a 0-d tensor;
- every call into torch passes through a mode, which reads detach() and .data as the tensor itself,
  item() as a `TracedNumber`, and out= as a copy; where a call takes a number that has a derivative,
  the value is torch's own and the graph that of the same formula in tensors;
- what autograd saves is copied, so that a later change in place does no harm.

What cannot be followed raises. The exceptions are functions outside of torch (`math.sqrt`, NumPy),
which see a plain float: their derivative is lost, and has to be found missing by a comparison with
differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ode_stopping.core.status import GradientError, MissingGradientError

__all__ = ["TracedNumber", "guarded", "traced"]


class TracedNumber(float):
    """A float with a derivative: its value is Python's, its graph that of a 0-d tensor.

    Arithmetic gives traced numbers again. A comparison with exactly its own value is a branch at
    the point itself, where there is no derivative, and raises GradientError; so does what would
    turn it into a plain number.

    Args:
        value: The value.
        graph: Returns the 0-d tensor, float64. It is called where the number meets a tensor, and
            once only.
        label: The hyperparameter, for messages.
    """

    label: str
    _make: Callable[[], Tensor] | None
    _made: Tensor

    def __new__(cls, value: float, graph: Callable[[], Tensor], label: str) -> TracedNumber:
        """A number with its graph in waiting."""
        made = super().__new__(cls, value)
        made._make, made.label = graph, label
        return made

    @classmethod
    def of(cls, tensor: Tensor, label: str) -> TracedNumber:
        """The value of a 0-d tensor, float64."""
        return cls(tensor.item(), lambda: tensor, label)

    @property
    def graph(self) -> Tensor:
        """The 0-d tensor."""
        if self._make is not None:
            self._made, self._make = self._make(), None
        return self._made

    __hash__ = float.__hash__

    def __bool__(self) -> bool:
        """Whether it is not zero, which it must not be."""
        return self != 0.0

    def _unfollowed(self, *_: object) -> NoReturn:
        raise MissingGradientError(
            f"the optimiser's code turns {self.label} into a plain number on the way (float(), "
            f"int() or the like), so there is no derivative to {self.label}: give it as a number "
            "or detach it"
        )

    __float__ = __int__ = __trunc__ = __round__ = __floor__ = __ceil__ = _unfollowed
    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __divmod__ = _unfollowed


def _arithmetic(name: str) -> Callable[..., Any]:
    on_floats, on_tensors = getattr(float, name), getattr(Tensor, name)

    def operate(self: TracedNumber, *others: Any) -> Any:
        if not all(isinstance(other, int | float) for other in others):
            return NotImplemented  # a tensor's own operator is next, and passes through the mode

        def graph() -> Tensor:
            return on_tensors(self.graph, *(_graph(other) for other in others))

        return TracedNumber(on_floats(self, *others), graph, self.label)

    return operate


def _comparison(name: str) -> Callable[..., Any]:
    on_floats = getattr(float, name)

    def compare(self: TracedNumber, other: Any) -> Any:
        if isinstance(other, int | float) and float.__eq__(self, other):
            raise GradientError(
                f"the optimiser's code branches on {self.label}, or on a number computed from it, "
                f"at {_plain(other):g}, and that is where it is: there is no derivative to "
                f"{self.label} at a branch. Move it a little, give it as a number, or detach it"
            )
        return on_floats(self, other)

    return compare


_BINARY = ("add", "sub", "mul", "truediv", "pow")

for _name in (*(f"__{r}{op}__" for op in _BINARY for r in ("", "r")), "__neg__", "__abs__"):
    setattr(TracedNumber, _name, _arithmetic(_name))

for _name in ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"):
    setattr(TracedNumber, _name, _comparison(_name))


def _plain(value: Any) -> Any:
    """Numbers without graph, in lists and tuples too."""
    if isinstance(value, TracedNumber):
        return float.__float__(value)
    if type(value) in (list, tuple):
        return type(value)(_plain(entry) for entry in value)
    return value


def _graph(value: Any) -> Any:
    return value.graph if isinstance(value, TracedNumber) else value


def _label(values: Sequence[Any]) -> str:
    """The hyperparameter among the arguments of a call; empty where there is none."""
    for value in values:
        if isinstance(value, TracedNumber):
            return value.label
        found = _label(value) if type(value) in (list, tuple) else ""
        if found:
            return found
    return ""


def _clamp(tensor: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """Between bounds of which torch wants both as tensors."""
    bounds = (b if b is None else torch.as_tensor(b).to(tensor) for b in (min, max))
    return torch.clamp(tensor, *bounds)


# What a call computes, in tensors: the derivative is taken of these, the value from torch's own.
_FORMULAS: dict[str, Callable[..., Tensor]] = {
    "add": lambda t, other, *, alpha=1: t + alpha * other,
    "sub": lambda t, other, *, alpha=1: t - alpha * other,
    "mul": lambda t, other: t * other,
    "div": lambda t, other: t / other,
    "pow": lambda t, other: t**other,
    "__rsub__": lambda t, other: other - t,
    "__rdiv__": lambda t, other: other / t,
    "__rpow__": lambda t, other: other**t,
    "addcmul": lambda t, a, b, *, value=1: t + value * (a * b),
    "addcdiv": lambda t, a, b, *, value=1: t + value * (a / b),
    "lerp": lambda t, end, weight: t + weight * (end - t),
    "clamp": _clamp,
    "fill": lambda t, value: value.expand(t.shape),
    "full_like": lambda t, value, **_: value.expand(t.shape),
    "as_tensor": lambda value, **_: value,
    "tensor": lambda value, **_: value,
}

_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})

_PLAIN_NUMBERS = frozenset({"__float__", "__int__", "__index__", "tolist", "numpy", "__array__"})

_SAME = frozenset({"detach", "detach_"})

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

_IS_LEAF = Tensor.is_leaf.__get__  # type: ignore[attr-defined]


class _Tracing(TorchFunctionMode):
    """Every call of torch, followed; also inside of `torch.no_grad()`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.is_grad_enabled():
            return _followed(func, args, kwargs or {})
        with torch.enable_grad():
            return _followed(func, args, kwargs or {})


def _followed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", "")
    if name in _SAME or func == _DATA:
        return args[0]
    if func == _IS_LEAF:
        return True  # optimisers refuse a parameter that was computed from something
    if func == _SET_DATA:
        return args[0].copy_(args[1])
    if kwargs.get("out") is not None:
        rest = {key: value for key, value in kwargs.items() if key != "out"}
        return kwargs["out"].copy_(_followed(func, args, rest))
    label = _label((*args, *kwargs.values()))
    if label:
        return _with_numbers(func, name, args, kwargs, label)
    if name == "item" and args[0].requires_grad:
        # A copy: the tensor may be changed in place later.
        copy = args[0].reshape(()).to(torch.float64, copy=True)
        return TracedNumber.of(copy, "a number in its state")
    if name in _PLAIN_NUMBERS and args[0].requires_grad:
        raise MissingGradientError(
            f"the optimiser's code takes a tensor that has a derivative out of torch ({name}): the "
            "derivative of its step cannot be followed"
        )
    if name in ("sqrt", "sqrt_") and args[0].requires_grad:
        root: Tensor = _Root.apply(args[0])
        return root if name == "sqrt" else args[0].copy_(root)
    return func(*args, **kwargs)


def _with_numbers(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], label: str
) -> Any:
    """A call that takes a traced number: torch's value, with the graph of the formula."""
    plain = [_plain(value) for value in args], {key: _plain(kwargs[key]) for key in kwargs}
    if name in _COMPARISONS:
        return func(*plain[0], **plain[1])
    if name == "__setitem__":
        tensor, where, number = args
        value = torch.tensor(_plain(number), dtype=tensor.dtype, device=tensor.device)
        tensor[where] = _Valued.apply(_graph(number), (value,))
        return None
    in_place = name.endswith("_") and not name.endswith("__")
    base = name[:-1] if in_place else name
    formula = _FORMULAS.get(base)
    try:
        if formula is None:
            raise TypeError
        graph = formula(*map(_graph, args), **{key: _graph(kwargs[key]) for key in kwargs})
    except TypeError:
        raise MissingGradientError(
            f"the optimiser's code gives {label} to torch's {name} as a plain number, so there is "
            f"no derivative to {label}: give it as a number or detach it"
        ) from None
    with torch.no_grad():
        # Not in place, so that the formula's own copies are left alone.
        value = (getattr(torch, base) if in_place else func)(*plain[0], **plain[1])
    result: Tensor = _Valued.apply(graph, (value,))
    return args[0].copy_(result) if in_place else result


class _Valued(torch.autograd.Function):
    """The derivative of one tensor with the value of another (in a tuple, as it has no graph)."""

    @staticmethod
    def forward(ctx: Any, graph: Tensor, value: tuple[Tensor]) -> Tensor:
        return value[0]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return cotangent, None


class _Root(torch.autograd.Function):
    """sqrt(v), whose derivative at v = 0 is infinite.

    Where the cotangent is zero there, as in m / (sqrt(v) + eps) with m = 0, the product is of
    second order and its limit is 0; autograd would give 0 * inf = NaN.
    """

    @staticmethod
    def forward(ctx: Any, square: Tensor) -> Tensor:
        root = square.sqrt()
        ctx.save_for_backward(root)
        return root.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        at_zero = root == 0
        if bool((at_zero & (cotangent != 0)).any()):
            raise GradientError(
                "the optimiser takes the square root of a number that is exactly zero, where its "
                "derivative is infinite. Usually a coordinate whose gradient is too small to be "
                "squared in this dtype: leave it out, rescale the objective, or use an optimiser "
                "without a root"
            )
        return torch.where(at_zero, torch.zeros_like(root), cotangent / (2 * root))


class _Finite(torch.autograd.Function):
    """Copies of tensors, whose gradients have to be finite."""

    @staticmethod
    def forward(ctx: Any, where: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.where = where
        ctx.set_materialize_grads(False)
        return tuple(tensor.clone() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        for gradient in gradients:
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                raise GradientError(
                    f"the derivative of {ctx.where} is not finite. Usually a root or a quotient "
                    "is taken of a number that is exactly zero there, as at a coordinate whose "
                    "gradient has always been zero; or the run is chaotic and derivatives overflow"
                )
        return (None, *gradients)


def guarded(tensors: Sequence[Tensor], *, where: str) -> list[Tensor]:
    """Copies; a gradient that comes back to them and is not finite raises GradientError.

    Args:
        tensors: Inputs of a step.
        where: What is differentiated, for the message.
    """
    live = [tensor for tensor in tensors if tensor.requires_grad]
    copies = iter(_Finite.apply(where, *live) if live else ())
    return [next(copies) if tensor.requires_grad else tensor.clone() for tensor in tensors]


@contextmanager
def traced() -> Iterator[None]:
    """Inside, step code builds a graph; see the module."""
    copies = saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda copy: copy)
    with copies, _Tracing():
        yield
