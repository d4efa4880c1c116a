"""The user's flow and criterion, evaluated so that no gradient is lost.

A `FlowMap` and a `CriterionMap` sit between the solvers, which see flat vectors without gradients,
and the user's functions, which see states and may call `torch.autograd.grad` themselves. They count
evaluations, keep t inside [t0, max_time], check shapes, and build a graph only on request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Stats"]


@dataclass
class Stats:
    """What a run cost, in counts.

    Attributes:
        nfe_forward: Evaluations of the flow (or of the update) until the target was found.
        nfe_backward: Evaluations of the flow in the latest backward pass; None before there was
            one.
        vjps: Vector-Jacobian products in the latest backward pass; None before there was one.
        criterion_calls: Evaluations of the criterion on the way to the target.
        accepted: Accepted steps.
        rejected: Rejected steps.
        control: Evaluations of the flow, among `nfe_forward`, that the control of the velocity
            took.
        checks: Evaluations spent on tracing the parameters and on comparing the derivatives of flow
            and criterion with differences, before any gradient is promised.
    """

    nfe_forward: int = 0
    nfe_backward: int | None = None
    vjps: int | None = None
    criterion_calls: int = 0
    accepted: int = 0
    rejected: int = 0
    control: int = 0
    checks: int = 0

    def to_dict(self) -> dict[str, int | None]:
        """The counts by name."""
        return asdict(self)


class TotalStats(Stats):
    """The counts of the parts of a run, added up whenever they are read.

    Args:
        parts: One a part; those of a backward pass that did not reach a part count as 0.
    """

    def __init__(self, parts: Sequence[Stats]) -> None:
        super().__init__()
        self._parts = list(parts)

    def __getattribute__(self, name: str) -> Any:
        if name not in _COUNTS:
            return super().__getattribute__(name)
        counts = [getattr(part, name) for part in self._parts]
        known = [count for count in counts if count is not None]
        return sum(known) if known else None


_COUNTS = frozenset(field.name for field in fields(Stats))
