"""A finished check as plain data: what is stored, resumed from and reported."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .context import write_atomically
from .plotting import to_png
from .registry import Check, Outcome

RESULTS = "results"
FIGURES = "figures"


@dataclass(frozen=True)
class Entry:
    """One finished check; every field holds strict JSON.

    Attributes:
        name: Of the check, as are title, source, group and claim.
        title: See `Check`.
        source: See `Check`.
        group: See `Check`.
        claim: See `Check`.
        measured: See `Outcome`, as are expected, tolerance, passed, details and interval; null
            where the check raised.
        expected: See `Outcome`.
        tolerance: See `Outcome`.
        passed: Whether the claim holds.
        seconds: Wall time.
        details: See `Outcome`; holds `error` and `traceback` where the check raised.
        interval: See `Outcome`.
        tables: The tables as dicts of title, columns, rows and note.
        figures: Dicts of name, caption, alt and file (relative to the output folder).
        key: What the result depends on, hashed.
        date: When it was computed.
        reused: Whether it comes from an earlier run; not stored.
    """

    name: str
    title: str
    source: str
    group: str
    claim: str
    measured: Any
    expected: Any
    tolerance: Any
    passed: bool
    seconds: float
    details: dict[str, Any]
    interval: list[Any] | None = None
    tables: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, str]] = field(default_factory=list)
    key: str = ""
    date: str = ""
    reused: bool = field(default=False, compare=False)


def jsonable(value: Any) -> Any:
    """`value` as strict JSON: numbers that JSON has no token for become "NaN", "Infinity", ..."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [jsonable(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted((jsonable(entry) for entry in value), key=str)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    if hasattr(value, "tolist"):  # arrays and scalars of numpy and torch
        return jsonable(value.tolist())
    return str(value)


def dump(content: Any) -> bytes:
    """`content` as strict, readable JSON."""
    return (json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def from_outcome(check: Check, outcome: Outcome, seconds: float, key: str, out: Path) -> Entry:
    """Turn an outcome into an entry, writing its figures below `out`.

    Raises:
        Exception: Whatever drawing a figure raises.
    """
    figures = []
    for figure in outcome.figures:
        file = f"{FIGURES}/{check.name}--{figure.name}.png"
        write_atomically(out / file, to_png(figure.figure))
        alt = figure.alt or figure.caption
        figures.append({"name": figure.name, "caption": figure.caption, "alt": alt, "file": file})
    tables = [
        {
            "title": table.title,
            "columns": [str(column) for column in table.columns],
            "rows": jsonable([list(row) for row in table.rows]),
            "note": table.note,
        }
        for table in outcome.tables
    ]
    return Entry(
        **_identity(check),
        measured=jsonable(outcome.measured),
        expected=jsonable(outcome.expected),
        tolerance=jsonable(outcome.tolerance),
        passed=outcome.passed,
        seconds=seconds,
        details=jsonable(outcome.details),
        interval=jsonable(outcome.interval),
        tables=tables,
        figures=figures,
        key=key,
        date=now(),
    )


def from_error(check: Check, error: BaseException, trace: str, seconds: float, key: str) -> Entry:
    """The entry of a check that raised: failed, with the traceback in its details."""
    return Entry(
        **_identity(check),
        measured=None,
        expected=None,
        tolerance=None,
        passed=False,
        seconds=seconds,
        details={"error": f"{type(error).__name__}: {error}", "traceback": trace},
        key=key,
        date=now(),
    )


def now() -> str:
    """The local time to the minute, with its offset."""
    return datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")


def save(entry: Entry, out: Path) -> None:
    """Store an entry where a later run finds it."""
    content = {name: value for name, value in vars(entry).items() if name != "reused"}
    write_atomically(out / RESULTS / f"{entry.name}.json", dump(content))


def load(name: str, key: str, out: Path) -> Entry | None:
    """The stored entry of a check that passed under the same key, complete with its figures.

    A check that failed is not reused: what made it fail may lie outside of what the key sees
    (memory, a busy machine), and its cells are kept anyway.
    """
    try:
        content = json.loads((out / RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        entry = Entry(**content, reused=True)
    except (OSError, ValueError, TypeError):
        return None
    complete = all((out / figure["file"]).is_file() for figure in entry.figures)
    return entry if entry.key == key and entry.passed and complete else None


def _identity(check: Check) -> dict[str, Any]:
    """The fields that an entry shares with its check."""
    return {
        "name": check.name,
        "title": check.title,
        "source": check.source,
        "group": check.group,
        "claim": check.claim,
    }
