"""Events: what is looked for on a path, and what follows where it is met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from .core.validation import described, require_callable, require_count, require_flag

__all__ = ["Event"]


@dataclass(frozen=True)
class Event:
    """A criterion that meets its target: T solves J(T, x(T)) = target.

    Args:
        criterion: Module or callable (t, x) -> J, a 0-d tensor.
        target: eps: a float or a 0-d tensor, which may require grad.
        direction: "falling": J comes down to the target; "rising": it comes up to it; "either":
            both count, and nothing is met at t0.
        terminal: The end is at the first hit, or at hit `count`.
        reset: (t, x) -> x+, the state from which the path goes on; of x's structure. Tensors that
            require grad in it receive their gradients. None: x goes on as it is.
        count: The end is at the hit of this number. None: at the first where `terminal`.
        leave_first: J has to be on the other side of the target first; nothing is met at t0.

    After a hit an event counts again once J has left the target by more than its rounding.

    Raises:
        TypeError, ValueError: Bad input, naming the argument.
    """

    criterion: Callable[..., Any] | None
    target: float | Tensor = 0.0
    direction: Literal["falling", "rising", "either"] = "falling"
    terminal: bool = False
    reset: Callable[..., Any] | None = None
    count: int | None = None
    leave_first: bool = False
    time: float | Tensor | None = None

    def __init__(
        self,
        criterion: Callable[..., Any],
        target: float | Tensor = 0.0,
        *,
        direction: Literal["falling", "rising", "either"] = "falling",
        terminal: bool = False,
        reset: Callable[..., Any] | None = None,
        count: int | None = None,
        leave_first: bool = False,
    ) -> None:
        require_callable(criterion, name="criterion")
        if not (isinstance(direction, str) and direction in ("falling", "rising", "either")):
            raise ValueError(
                f'direction must be "falling", "rising" or "either"; got {described(direction)}'
            )
        self._set(criterion, target, direction, terminal, reset, count, leave_first, None)

    @classmethod
    def at(
        cls,
        time: float | Tensor,
        *,
        reset: Callable[..., Any] | None = None,
        terminal: bool = False,
    ) -> Event:
        """An event at a known time: a dose, a switch.

        Args:
            time: When, in flow time: a float or a 0-d tensor, which may require grad. Beyond the
                end it does not take place, and its derivative is zero.
            reset: As for `Event`.
            terminal: Whether it is the end.
        """
        event = cls.__new__(cls)
        event._set(None, 0.0, "falling", terminal, reset, None, False, time)
        return event

    def _set(
        self,
        criterion: Callable[..., Any] | None,
        target: float | Tensor,
        direction: str,
        terminal: bool,
        reset: Callable[..., Any] | None,
        count: int | None,
        leave_first: bool,
        time: float | Tensor | None,
    ) -> None:
        if reset is not None:
            require_callable(reset, name="reset", call="(t, x) -> x+")
        require_flag(terminal, name="terminal")
        require_flag(leave_first, name="leave_first")
        if count is not None:
            require_count(count, name="count")
        values = {
            "criterion": criterion,
            "target": target,
            "direction": direction,
            "terminal": terminal,
            "reset": reset,
            "count": count,
            "leave_first": leave_first,
            "time": time,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def ends_after(self) -> int | None:
        """The number of the hit that is the end; None: it goes on."""
        if self.count is not None:
            return self.count
        return 1 if self.terminal else None
