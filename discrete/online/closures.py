"""Calling the user's closure: loss and gradients, with a graph where one is needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ode_stopping.core.status import MissingGradientError

__all__ = [
    "Closure",
    "Evaluation",
    "Randomness",
    "evaluate",
    "require_second_derivatives",
    "same_loss",
]

Closure = Callable[[], Any]


@dataclass(frozen=True)
class Evaluation:
    """Loss and gradients at one point.

    Attributes:
        value: What the closure returned; without its graph, where that is kept for `graph`.
        loss: The same as a number.
        rounding: Of the loss, by its dtype.
        gradients: One a parameter, None where the loss does not depend on it; no graph.
        graph: The same with a graph to the parameters, where that was asked for.
        versions: How often the gradients had been changed in place by then.
    """

    value: Any
    loss: float
    rounding: float
    gradients: list[Tensor | None]
    graph: list[Tensor | None] | None
    versions: tuple[int, ...]

    def still_valid(self) -> bool:
        """Whether nobody has changed the gradients since."""
        return self.versions == _versions(self.gradients)


def evaluate(
    closure: Closure, parameters: Sequence[Tensor], *, name: str, graph: bool = False
) -> Evaluation:
    """Call the closure, which computes the loss, calls backward() and returns the loss.

    Args:
        closure: The user's.
        parameters: All that the optimiser has.
        name: Of the optimiser, for messages.
        graph: Whether the gradients are to be differentiable: the closure's own backward() is then
            run with create_graph=True, and parameters that autograd saves are copied, since the
            optimiser is going to change them.

    Raises:
        TypeError: The closure returned something else than one number.
        MissingGradientError: No parameter has a gradient, or, with `graph`, it has none or is not
            the one that backward() left.
        ValueError: A gradient is sparse or complex, or the loss of 16 bits.
    """
    for p in parameters:
        # A closure that leaves zero_grad() to the loop would add this gradient to the last one.
        p.grad = None
    keep = _KeepGraph(parameters) if graph else None
    with torch.enable_grad(), _keeping(keep, parameters):
        value = closure()
    loss, rounding = _number(value, name)
    gradients = [p.grad for p in parameters]
    if all(gradient is None for gradient in gradients):
        raise MissingGradientError(
            f"no parameter of this {name} has a gradient after the closure: it has to call "
            "zero_grad(), compute the loss, call loss.backward() and return the loss"
        )
    for gradient in gradients:
        if gradient is not None and (gradient.is_sparse or gradient.is_complex()):
            kind = "sparse" if gradient.is_sparse else "complex"
            raise ValueError(f"{name} takes dense real gradients; got a {kind} one")
    kept = None
    if keep is not None:
        keep.require_gradients(name)
        if isinstance(value, Tensor):
            # A list of losses would keep the graph of every step alive.
            value = value.detach()
        kept = gradients
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = None if gradient is None else gradient.detach()
        gradients = [p.grad for p in parameters]
    return Evaluation(value, loss, rounding, gradients, kept, _versions(gradients))


def same_loss(seen: Evaluation, other: tuple[float, float]) -> bool:
    """Whether two losses are one, but for the rounding of sums in another order.

    Args:
        seen: An evaluation.
        other: Loss and rounding of another one.
    """
    loss, rounding = other
    if not (isfinite(seen.loss) and isfinite(loss)):
        return False
    return abs(seen.loss - loss) <= 100.0 * max(seen.rounding, rounding)


def require_second_derivatives(gradients: Sequence[Tensor]) -> None:
    """Raise where autograd has a graph of the gradients that leads nowhere.

    `once_differentiable` hands out such a one; asked for products with the Hessian by name of the
    parameters autograd passes it over, and the Hessian would seem to be zero.

    Raises:
        MissingGradientError: Part of the loss can be differentiated once only.
    """
    pending = [gradient.grad_fn for gradient in gradients if gradient.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node.name() == "torch::autograd::Error":
            raise MissingGradientError(
                "horizon > 1 differentiates the gradient once more, and a part of the loss says "
                "that it cannot be (torch.autograd.function.once_differentiable): use horizon=1"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)


class Randomness:
    """The state of torch's generators, to show a second evaluation the same masks as the first.

    Args:
        parameters: Their devices count, and the CPU.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._devices = {p.device for p in parameters if p.device.type == "cuda"}
        self._before = self._now()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Go back to that state, and afterwards to the present one."""
        now = self._now()
        self._set(self._before)
        try:
            yield
        finally:
            self._set(now)

    def _now(self) -> dict[Any, Tensor]:
        states: dict[Any, Tensor] = {"cpu": torch.get_rng_state()}
        states.update((d, torch.cuda.get_rng_state(d)) for d in self._devices)
        return states

    def _set(self, states: dict[Any, Tensor]) -> None:
        for device, state in states.items():
            if device == "cpu":
                torch.set_rng_state(state)
            else:
                torch.cuda.set_rng_state(state, device)


class _KeepGraph(TorchFunctionMode):
    """Runs every loss.backward() with create_graph=True."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._parameters = parameters
        self._left: list[tuple[Tensor | None, int]] | None = None

    def require_gradients(self, name: str) -> None:
        """Raise unless the gradients are those that the last backward() left.

        Raises:
            MissingGradientError: Saying what the closure has to do instead.
        """
        left, self._left = self._left, None
        if left is None:
            raise MissingGradientError(
                f"{name} with horizon > 1 differentiates the gradient once more, so the closure "
                "has to call loss.backward() (not torch.autograd.backward, nor a scaler's)"
            )
        for (then, version), (now, present) in zip(left, self._gradients(), strict=True):
            if then is not now or version != present:
                raise MissingGradientError(
                    f"{name} with horizon > 1 differentiates the gradient once more, and the "
                    "closure changes it after loss.backward() (clipping, scaling), which the graph "
                    "does not know. Put it into the loss, or use horizon=1"
                )

    def _gradients(self) -> list[tuple[Tensor | None, int]]:
        found = [p.grad for p in self._parameters]
        return [(g, 0 if g is None else g._version) for g in found]

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.Tensor.backward:
            return func(*args, **kwargs)
        kwargs["create_graph"] = kwargs["retain_graph"] = True
        with warnings.catch_warnings():
            # The cycle parameter -> gradient -> graph is broken in `evaluate`.
            warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
            result = func(*args[:1], **_named(args[1:], kwargs))
        self._left = self._gradients()
        return result


def _named(positional: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of backward() by name, so that create_graph cannot be given twice."""
    names = ("gradient", "retain_graph", "create_graph", "inputs")
    return {**dict(zip(names, positional, strict=False)), **kwargs}


@contextmanager
def _keeping(mode: _KeepGraph | None, parameters: Sequence[Tensor]) -> Iterator[None]:
    if mode is None:
        yield
        return
    storages = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor: Tensor) -> Tensor:
        mine = tensor.layout == torch.strided and (tensor.untyped_storage().data_ptr() in storages)
        return tensor.clone() if mine else tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), mode:
        yield


def _number(value: Any, name: str) -> tuple[float, float]:
    """The loss as a float, and its rounding."""
    if isinstance(value, Tensor) and value.numel() == 1 and value.is_floating_point():
        if torch.finfo(value.dtype).bits < 32:
            raise ValueError(
                f"{name}: the closure returned a loss in {value.dtype}, whose rounding hides what "
                "a step changes; compute it in float32, as in cross_entropy(model(x).float(), y)"
            )
        loss = float(value.detach())
        return loss, 4.0 * torch.finfo(value.dtype).eps * abs(loss)
    if isinstance(value, float):
        loss = float(value)  # NumPy's is one, too, but no plain value for a state_dict
        return loss, 4.0 * torch.finfo(torch.float64).eps * abs(loss)
    what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise TypeError(f"{name}: the closure must return the loss, one number; got {what}")


def _versions(gradients: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(g._version for g in gradients if g is not None)
