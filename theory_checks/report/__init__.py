"""The report on a run: `summary.json` for programs, `index.html` for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomically
from ..results import Entry
from ..sealed import dump
from .html import render
from .summary import Header, summarise

__all__ = ["Header", "render", "summarise", "write_report"]


def write_report(out: Path, header: Header, entries: Sequence[Entry]) -> None:
    """Write both files below `out`, each atomically.

    Raises:
        WriteError: One of them cannot be written.
    """
    write_atomically(out / "summary.json", dump(summarise(header, entries)))
    write_atomically(out / "index.html", render(out, header, entries).encode())
