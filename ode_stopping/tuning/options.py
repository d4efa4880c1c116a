"""The options of tuning: one record for both sides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import inf, isfinite
from typing import Any, Literal, TypeAlias

from torch import Tensor

from ..core.validation import described, require_count, require_flag
from .history import TuningRecord
from .tasks import Censored

__all__ = ["Penalty", "TuningOptions"]

Penalty: TypeAlias = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class TuningOptions:
    """How the loop runs; `minimise_stopping_time` says what each option means.

    Raises:
        TypeError, ValueError: Naming the option.
    """

    iterations: int = 100
    batch_size: int | None = None
    censored: Censored = "horizon"
    penalty: Penalty | None = None
    weight: float = 1.0
    clip: float | None = None
    seed: int = 0
    progress: bool | None = None
    callback: Callable[[TuningRecord], bool | None] | None = None
    restore_best: bool = True
    on_error: Literal["raise", "skip"] = "raise"

    def __post_init__(self) -> None:
        require_count(self.iterations, name="iterations")
        if self.batch_size is not None:
            require_count(self.batch_size, name="batch_size")
        _require_number(self.weight, "weight", least=0.0)
        if self.clip is not None:
            _require_number(self.clip, "clip", least=0.0, strictly=True)
        if self.censored != "horizon":
            if self.censored is None or isinstance(self.censored, str):
                raise ValueError(
                    f'censored must be a finite number or "horizon"; got {self.censored!r} (a miss '
                    "without a number would make every mean infinite)"
                )
            _require_number(self.censored, "censored")
        for name in ("penalty", "callback"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} must be callable or None; got {described(value)}")
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip"; got {self.on_error!r}')
        if self.progress is not None:
            require_flag(self.progress, name="progress")
        require_flag(self.restore_best, name="restore_best")

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> TuningOptions:
        """The options among the arguments of a function that has a keyword of each name.

        A new option is a field here, and a keyword of the two functions with its line there.
        """
        return cls(**{entry.name: arguments[entry.name] for entry in fields(cls)})


def _require_number(
    value: object, name: str, *, least: float = -inf, strictly: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number; got {described(value)}")
    if not isfinite(value) or value < least or (strictly and value == least):
        bound = f" {'>' if strictly else '>='} {least:g}" if least > -inf else ""
        raise ValueError(f"{name} must be finite{' and' if bound else ''}{bound}; got {value}")
