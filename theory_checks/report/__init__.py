"""The report on a run: `summary.json` for programs, `index.html` for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from theory_checks.context import write_atomically
from theory_checks.report.html import render
from theory_checks.report.summary import Header, summarise
from theory_checks.results import Entry, dump

__all__ = ["Header", "render", "summarise", "write_report"]


def write_report(out: Path, header: Header, entries: Sequence[Entry]) -> None:
    """Write both files below `out`, each atomically."""
    write_atomically(out / "summary.json", dump(summarise(header, entries)))
    write_atomically(out / "index.html", render(out, header, entries).encode())
