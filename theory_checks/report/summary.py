"""What a run was and what it found, for programs: the content of `summary.json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..results import Entry


@dataclass(frozen=True)
class Header:
    """The settings of a run.

    Attributes:
        profile: "quick" or "paper".
        device: As torch writes it.
        dtype: The name of the floating type.
        seed: Of the run.
        versions: By distribution.
        date: When the report was written.
        finished: Whether every selected check has a result.
        pending: The names of those that have none yet.
    """

    profile: str
    device: str
    dtype: str
    seed: int
    versions: dict[str, str]
    date: str
    finished: bool
    pending: list[str] = field(default_factory=list)


def summarise(header: Header, entries: Sequence[Entry]) -> dict[str, Any]:
    """The content of `summary.json`, every value strict JSON."""
    return {
        "profile": header.profile,
        "device": header.device,
        "dtype": header.dtype,
        "seed": header.seed,
        "versions": header.versions,
        "finished": header.finished,
        "checks": [
            {
                "name": entry.name,
                "title": entry.title,
                "group": entry.group,
                "source": entry.source,
                "measured": entry.measured,
                "expected": entry.expected,
                "tolerance": entry.tolerance,
                "interval": entry.interval,
                "passed": entry.passed,
                "seconds": round(entry.seconds, 3),
                "details": entry.details,
            }
            for entry in entries
        ],
    }
