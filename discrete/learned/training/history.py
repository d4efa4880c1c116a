"""What a meta-training did, step by step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ode_stopping.core.optional import optional_module

__all__ = ["MetaHistory", "MetaRecord"]


@dataclass(frozen=True)
class MetaRecord:
    """One meta-step.

    Attributes:
        step: Its number, from 0.
        horizon: K, the steps of the optimiser.
        loss: Mean over the problems of sum w_k f(x_k) + lambda N, misses as K + 1.
        value: Mean f(x_K) of the runs that stayed finite.
        reached: Share of targets met.
        index: Mean N, misses as K + 1.
        rises: Share of the targets met in a step in which f rose.
        blown: Share of the problems whose f was above 10 times its lowest, or not finite.
        skipped: Updates left out since their gradient was not finite.
        gradient_norm: Of the last update, before it is clipped.
        rate: Learning rate.
        validation: Mean N on the validation problems; None where it was not looked at.
        seconds: Wall time.
    """

    step: int
    horizon: int
    loss: float
    value: float
    reached: float
    index: float
    rises: float
    blown: float
    skipped: int
    gradient_norm: float
    rate: float
    validation: float | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Numbers by name."""
        return asdict(self)


@dataclass
class MetaHistory:
    """A meta-training.

    Attributes:
        records: One a step.
        best: The step after which the mean N on the validation problems was least; None: the
            parameters are the last ones.
    """

    records: list[MetaRecord] = field(default_factory=list)
    best: int | None = None

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return [record.loss for record in self.records]

    @property
    def skipped(self) -> int:
        """Updates that were left out."""
        return sum(record.skipped for record in self.records)

    def to_dataframe(self) -> Any:
        """One row a step, as a pandas DataFrame (needs the extra `checks`)."""
        pandas = optional_module("pandas", "to_dataframe")
        return pandas.DataFrame([record.to_dict() for record in self.records])

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        if not self.records:
            return "MetaHistory(no steps)"
        last = self.records[-1]
        return (
            f"MetaHistory({len(self)} steps, loss {last.loss:.4g}, {100 * last.reached:.0f} % "
            f"reached, mean index {last.index:.4g})"
        )
