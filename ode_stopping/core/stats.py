"""What a run and its gradient cost, in counts: returned by who spent them, and added up."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["Costs", "Stats"]


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
        checks: Evaluations spent on tracing the parameters, on comparing the derivatives of flow
            and criterion with differences before any gradient is promised, and on the evidence.
        route: The gradient route whose numbers the latest backward pass gave; None before there was
            one.
        fallback: Why that is not the route that was asked for; None where it is.
    """

    nfe_forward: int = 0
    nfe_backward: int | None = None
    vjps: int | None = None
    criterion_calls: int = 0
    accepted: int = 0
    rejected: int = 0
    control: int = 0
    checks: int = 0
    route: str | None = None
    fallback: str | None = None

    def __add__(self, other: Stats) -> Stats:
        """The counts of both; of the names those of `other`, where it has any."""
        return Stats(*(_sum(getattr(self, f.name), getattr(other, f.name)) for f in fields(Stats)))

    def to_dict(self) -> dict[str, int | str | None]:
        """The counts by name."""
        return asdict(self)


def _sum(first: Any, second: Any) -> Any:
    if first is None or second is None:
        return first if second is None else second
    return second if isinstance(second, str) else first + second


class Costs:
    """What a result has cost so far: its forward run, and the latest of its backward passes.

    Args:
        forward: The counts of the forward run, and of the checks after it.

    Attributes:
        total: Both together; brought up to date by every backward pass.
    """

    def __init__(self, forward: Stats) -> None:
        self._forward = forward
        self.total = forward + Stats()

    def note(self, backward: Stats) -> None:
        """A backward pass has ended; it takes the place of the one before."""
        for name, value in vars(self._forward + backward).items():
            setattr(self.total, name, value)
