"""A function's tensor operations, recorded once and run again on other inputs.

What autograd runs for a product is a list of operations, too: recorded, it needs no graph, and what
only unwanted outputs need can be left out of it. A recording holds one branch. Functions that read
a number off a tensor, by which they could choose another, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

__all__ = ["Recording", "Unrecordable"]

# What hands a tensor's numbers or its memory to Python without an operation, or takes Python into
# the backward pass.
_UNSEEN = {"numpy", "tolist", "data_ptr", "storage", "untyped_storage", "_typed_storage"}
_UNSEEN |= {"__array__", "__dlpack__", "__repr__", "__format__", "__deepcopy__", "__reduce_ex__"}
_UNSEEN |= {"apply_", "map_", "map2_", "register_hook"}
# Tags of operations whose results are numbers, have a size that depends on them, or are random.
_REFUSED = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
# What writes into a tensor of its own, and the same with a result of its own.
_ATEN = torch.ops.aten
_IN_PLACE = {
    _ATEN.squeeze_.default: _ATEN.squeeze.default,
    _ATEN.squeeze_.dim: _ATEN.squeeze.dim,
    _ATEN.unsqueeze_.default: _ATEN.unsqueeze.default,
    _ATEN.masked_fill_.Scalar: _ATEN.masked_fill.Scalar,
}


class Unrecordable(Exception):
    """The function does what a recording cannot hold."""


@dataclass(frozen=True)
class _Slot:
    """Place of a tensor that depends on the inputs."""

    number: int


@dataclass(frozen=True)
class Recording:
    """Operations in the order in which they ran.

    Attributes:
        operations: Each with its arguments and its results, slots in the place of tensors, and the
            numbers in all tensors that it reads and writes.
        outputs: Slots, or tensors that do not depend on the inputs.
        size: Number of slots; the first ones are the inputs.
    """

    operations: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[int], int]]
    outputs: list[Any]
    size: int

    @classmethod
    def of(cls, function: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> Recording:
        """Record `function` at some inputs.

        Raises:
            Unrecordable: It reads numbers off tensors, draws random ones, or writes in place.
        """
        recorder = _Recorder(inputs)
        with _Watch(recorder), recorder:
            found = function(*inputs)
        outputs = [recorder.slotted(one) for one in found]
        if recorder.refused is not None:
            raise Unrecordable(f"{recorder.refused} in a recording")
        return cls(recorder.operations, outputs, recorder.size)

    @property
    def traffic(self) -> int:
        """Numbers that are read and written in one run: what it costs where tensors are large."""
        return sum(operation[4] for operation in self.operations)

    def giving(self, *positions: int) -> Recording:
        """Some of the outputs alone, without the operations that only the others need."""
        outputs = [self.outputs[i] for i in positions]
        needed = {slot.number for slot in _slots(outputs)}
        kept = []
        for operation in reversed(self.operations):
            if needed.intersection(operation[3]):
                kept.append(operation)
                needed |= {slot.number for slot in _slots(operation[1])}
        return replace(self, operations=kept[::-1], outputs=outputs)

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs at these inputs."""
        values: list[Any] = [*inputs, *[None] * (self.size - len(inputs))]
        for function, arguments, options, results, _ in self.operations:
            found = function(*_filled(arguments, values), **options)
            for number, value in zip(results, _listed(found), strict=True):
                values[number] = value
        return _filled(self.outputs, values)


def _listed(found: Any) -> Sequence[Any]:
    return found if isinstance(found, tuple | list) else (found,)


def _slots(arguments: Any) -> list[_Slot]:
    return [one for one in tree_iter(arguments) if type(one) is _Slot]


def _filled(arguments: Sequence[Any], values: list[Any]) -> list[Any]:
    return [
        values[one.number]
        if type(one) is _Slot
        else _filled(one, values)
        if isinstance(one, list | tuple)
        else one
        for one in arguments
    ]


class _Recorder(TorchDispatchMode):
    """Lists the operations on everything that depends on the inputs.

    What cannot be held is noted in `refused`, and runs as ever: the function must not be left half
    way by an error that is none of its own.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.operations: list[Any] = []
        self.size = self._inputs = len(inputs)
        self.refused: str | None = None
        self._slots = {id(tensor): _Slot(i) for i, tensor in enumerate(inputs)}
        # Held, so that no address comes twice.
        self._held = list(inputs)

    def refuse(self, what: str) -> None:
        """Note that something cannot be held."""
        self.refused = self.refused or what

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To skip the compiler it is imported, which takes a second; nothing is compiled here.
        return False

    def slotted(self, tensor: Tensor) -> Any:
        """The slot of a tensor; itself, where it is a constant."""
        slot = self._slots.get(id(tensor))
        if slot is not None:
            return slot
        if any(torch._C._is_alias_of(tensor, one) for one in self._held):  # type: ignore[attr-defined]
            self.refuse("a tensor that came of another without an operation")
        return tensor.detach()

    def _is_own(self, tensor: Tensor) -> bool:
        """Whether a tensor is the result of an operation, and no other one shows its memory."""
        same = [one for one in self._held if torch._C._is_alias_of(tensor, one)]  # type: ignore[attr-defined]
        return (
            len(same) == 1 and same[0] is tensor and self._slots[id(tensor)].number >= self._inputs
        )

    def _note(self, tensor: Tensor, slot: _Slot) -> None:
        self._slots[id(tensor)] = slot
        self._held.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        changes = func._schema.is_mutable and not (func in _IN_PLACE and self._is_own(args[0]))
        if changes or _REFUSED.intersection(func.tags):
            self.refuse(str(func))
        found = func(*args, **kwargs)
        if self.refused is not None:
            return found
        arguments, options = tree_map_only(Tensor, self.slotted, (args, kwargs))
        if _slots(options):
            self.refuse(f"{func} with a tensor by keyword")
        if not _slots(arguments):
            return found
        if func is torch.ops.aten.detach.default:
            self._note(found, arguments[0])
            return found
        results = list(range(self.size, self.size + len(_listed(found))))
        for number, tensor in zip(results, _listed(found), strict=True):
            if isinstance(tensor, Tensor):
                self._note(tensor, _Slot(number))
        self.size += len(results)
        traffic = sum(one.numel() for one in tree_iter((args, found)) if isinstance(one, Tensor))
        operation = _IN_PLACE.get(func, func)
        self.operations.append((operation, arguments, options, results, traffic))
        return found


class _Watch(TorchFunctionMode):
    """Sees what reads a tensor without an operation that the recorder would see."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _UNSEEN:
            self._recorder.refuse(name)
        return func(*args, **(kwargs or {}))
