"""A finished check as plain data: what is stored, resumed from and reported."""

from __future__ import annotations

import dataclasses
import datetime
import enum
import hashlib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cells import conforms
from .files import inside, write_atomically
from .plotting import to_png
from .registry import SLUG, Check, Outcome
from .sealed import ForeignError, read_sealed, write_sealed

FORMAT = "ode-stopping result"
RESULTS = "results"
FIGURES = "figures"
_PNG = b"\x89PNG\r\n\x1a\n"
_SPECIAL = ("NaN", "Infinity", "-Infinity")


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
        figures: Dicts of name, caption, alt, file (relative to the output folder) and the file's
            sha256.
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
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value.encode(errors="backslashreplace").decode())  # lone surrogates
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


def from_outcome(check: Check, outcome: Outcome, seconds: float, key: str, out: Path) -> Entry:
    """Turn an outcome into an entry, writing its figures below `out`.

    Raises:
        WriteError: A figure cannot be written.
        Exception: Whatever drawing a figure raises.
    """
    figures = []
    for figure in outcome.figures:
        file = figure_file(check.name, figure.name)
        content = to_png(figure.figure)
        write_atomically(out / file, content)
        figures.append(
            {
                "name": figure.name,
                "caption": figure.caption,
                "alt": figure.alt or figure.caption,
                "file": file,
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
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


def figure_file(check: str, figure: str) -> str:
    """Where a figure of a check is, relative to the output folder."""
    return f"{FIGURES}/{check}--{figure}.png"


def read_figure(file: str, out: Path) -> bytes | None:
    """The bytes of a PNG file inside of `out`; None where there is none, or it lies elsewhere.

    The report embeds them and may be handed on: a link must not draw other files into it.
    """
    path = out / file
    try:
        if not inside(path, out) or not path.is_file():
            return None
        content = path.read_bytes()
    except OSError:
        return None
    return content if content.startswith(_PNG) else None


def save(entry: Entry, out: Path) -> None:
    """Store an entry where a later run finds it.

    Raises:
        WriteError: The file cannot be written.
    """
    content = {name: value for name, value in vars(entry).items() if name != "reused"}
    write_sealed(out / RESULTS / f"{entry.name}.json", FORMAT, content)


def load(check: Check, key: str, out: Path) -> Entry | None:
    """The stored entry of a check that passed under the same key, complete with its figures.

    A check that failed is not reused: what made it fail may lie outside of what the key sees
    (memory, a busy machine), and its cells are kept anyway.

    Raises:
        ForeignError: A file that is not what `save` writes for this check, or a figure that is not
            the one that was drawn.
    """
    path = out / RESULTS / f"{check.name}.json"
    content = read_sealed(path, FORMAT)
    if content is None:
        return None
    hints = {name: kind for name, kind in _entry_hints().items() if name != "reused"}
    if not isinstance(content, dict) or set(content) != set(hints):
        raise ForeignError(f"{path.name} has not the fields of a result")
    for name, kind in hints.items():
        if not conforms(content[name], kind):
            raise ForeignError(f"{path.name} has a {name} of the wrong type")
    if content["key"] != key or not content["passed"]:
        return None
    if any(content[name] != value for name, value in _identity(check).items()):
        raise ForeignError(f"{path.name} is the result of another check")
    if not all(map(_is_table, content["tables"])) or not _is_outcome(content):
        raise ForeignError(f"{path.name} has not the numbers and tables of a result")
    for figure in content["figures"]:
        _require_figure(figure, check.name, path.name, out)
    return Entry(**content, reused=True)


def _entry_hints() -> dict[str, Any]:
    """The types of the fields of `Entry`."""
    return typing.get_type_hints(Entry)


def _is_outcome(content: Mapping[str, Any]) -> bool:
    """Whether the numbers of an entry have the forms that the report shows."""
    measured, interval = content["measured"], content["interval"]
    named = measured if isinstance(measured, dict) else {"": measured}
    return (
        content["seconds"] >= 0
        and bool(named)
        and all(_is_number(value) for value in named.values())
        and (interval is None or (len(interval) == 2 and all(map(_is_number, interval))))
    )


def _is_number(value: Any) -> bool:
    """Whether a value is a number as `jsonable` writes it."""
    return value in _SPECIAL if isinstance(value, str) else conforms(value, float)


def _is_table(table: Mapping[str, Any]) -> bool:
    """Whether a dict is a table as `from_outcome` writes it."""
    kinds = {"title": str, "columns": list[str], "rows": list[list[Any]], "note": str}
    if set(table) != set(kinds):
        return False
    return all(conforms(table[name], kind) for name, kind in kinds.items()) and all(
        len(row) == len(table["columns"]) and not any(isinstance(c, dict | list) for c in row)
        for row in table["rows"]
    )


def _require_figure(figure: Mapping[str, str], check: str, stored: str, out: Path) -> None:
    """Raise a ForeignError unless the figure is the file that `from_outcome` wrote."""
    if set(figure) != {"name", "caption", "alt", "file", "sha256"}:
        raise ForeignError(f"{stored} has not the fields of a figure")
    if not SLUG.fullmatch(figure["name"]) or figure["file"] != figure_file(check, figure["name"]):
        raise ForeignError(f"{stored} names a figure that is not the check's own")
    content = read_figure(figure["file"], out)
    if content is None or hashlib.sha256(content).hexdigest() != figure["sha256"]:
        raise ForeignError(f"{figure['file']} is not there as it was drawn")


def _identity(check: Check) -> dict[str, Any]:
    """The fields that an entry shares with its check."""
    return {
        "name": check.name,
        "title": check.title,
        "source": check.source,
        "group": check.group,
        "claim": check.claim,
    }
