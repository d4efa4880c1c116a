"""The report on a run: `summary.json` for programs, `index.html` for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..context import write_atomically
from ..results import Entry, dump
from .html import render
from .summary import Header, summarise

__all__ = ["Header", "render", "summarise", "write_report"]


def write_report(out: Path, header: Header, entries: Sequence[Entry]) -> None:
    """Write both files below `out`, each atomically."""
    write_atomically(out / "summary.json", dump(summarise(header, entries)))
    write_atomically(out / "index.html", render(out, header, entries).encode())
