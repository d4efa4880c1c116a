"""What the page is made of: tables, figures, and the places they fill between its marks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from theory_checks.files import write_atomically
from theory_checks.plotting import COLOURS, new_figure, style, to_png

DOCS = Path(__file__).resolve().parents[1]
IMAGES = DOCS / "images"
PAGE = DOCS / "when-is-it-wrong.md"
OURS, PEER, THIRD = COLOURS[0], COLOURS[1], COLOURS[2]


@dataclass
class Table:
    """A Markdown table."""

    head: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """One more row; floats are written with three digits."""
        self.rows.append([figure(cell) if isinstance(cell, float) else str(cell) for cell in cells])

    def __str__(self) -> str:
        lines = [list(self.head), ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(value: float) -> str:
    """Three digits for a number of ordinary size, two for an error."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"


@contextmanager
def canvas(name: str, *shape: int, **size: Any) -> Iterator[tuple[Any, Any]]:
    """A figure in the style of the report, saved as docs/images/NAME.png."""
    with style():
        drawing, axes = new_figure(*shape, **size)
        yield drawing, axes
        write_atomically(IMAGES / f"{name}.png", to_png(drawing, dpi=110))


def opening(name: str) -> str:
    """The line of the page below which a table stands."""
    return f"<!-- {name}: docs/failures -->"


def written(text: str, name: str, table: str) -> str:
    """The page with this table between its marks."""
    before, rest = text.split(opening(name) + "\n", 1)
    after = rest.split("<!-- end -->", 1)[1]
    return f"{before}{opening(name)}\n\n{table}\n\n<!-- end -->{after}"
