"""Other values in the place of tensors, for this thread and this moment only.

To see what a function does when a parameter moves, the parameter itself must not be moved: another
thread may be using it, and an interrupt would leave it changed. So every call into torch passes
through a mode, which exists for one thread, and hands on another tensor in the parameter's place.
What a compiled function keeps inside of itself does not pass through it: `Substitution.met` says
which tensors were seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Substitution"]


class Substitution(TorchFunctionMode):
    """A context in which torch sees other tensors in the place of some.

    Each new one requires grad where the old one does, so that a function that asks takes the same
    branch.

    Args:
        tensors: The tensors.
        values: What is seen in their place, of the same dtypes (and shapes, but for rows of them).
        graph: Whether the values keep their graph, so that derivatives go through them.
    """

    def __init__(
        self, tensors: Sequence[Tensor], values: Sequence[Tensor], *, graph: bool = False
    ) -> None:
        super().__init__()
        self._tensors = list(tensors)  # held, so that no other object can have their addresses
        self._seen = {
            id(old): new if graph else new.detach().requires_grad_(old.requires_grad)
            for old, new in zip(tensors, values, strict=True)
        }
        self._met: set[int] = set()

    @property
    def met(self) -> list[bool]:
        """Which of the tensors were replaced at least once."""
        return [id(tensor) in self._met for tensor in self._tensors]

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The call, with other tensors."""
        args = tuple(self._replaced(arg) for arg in args)
        named = {name: self._replaced(value) for name, value in (kwargs or {}).items()}
        return function(*args, **named)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            found = self._seen.get(id(value))
            if found is None:
                return value
            self._met.add(id(value))
            return found
        if type(value) in (list, tuple):
            return type(value)(self._replaced(one) for one in value)
        return value
