"""The report as one page that opens from disk: no network, no scripts, figures inside."""

from __future__ import annotations

import base64
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..plotting import DPI
from ..results import Entry, read_figure
from . import numbers
from .summary import Header

_ENLARGED = 1.2  # figures are drawn for print; on a screen they may be somewhat larger
_CODE = re.compile(r"`+([^`]+)`+")


def render(out: Path, header: Header, entries: Sequence[Entry]) -> str:
    """The page as a string.

    Args:
        out: The folder that the entries' figure files are relative to.
        header: The settings of the run.
        entries: The finished checks, in the order of the page.

    Raises:
        ImportError: jinja2 is missing; the message says what to install.
    """
    try:
        jinja2 = importlib.import_module("jinja2")
    except ModuleNotFoundError as error:
        raise ImportError('the report needs jinja2: pip install "ode-stopping[checks]"') from error
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        number=numbers.number,
        seconds=numbers.seconds,
        interval=numbers.interval,
        lines=numbers.lines,
        prose=_prose,
        plain=_plain,
    )
    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    page: str = environment.from_string(source).render(
        header=header,
        entries=entries,
        passed=sum(entry.passed for entry in entries),
        seconds=sum(entry.seconds for entry in entries),
        verdict_rows=_verdict_rows,
        cells=_cells,
        details=_details,
        image=lambda figure: _image(read_figure(figure["file"], out)),
    )
    return page


def _prose(text: str) -> Any:
    """Escape a text and set what it has in backticks as code."""
    markup = importlib.import_module("markupsafe")
    return markup.Markup(_CODE.sub(r"<code>\1</code>", str(markup.escape(text))))


def _plain(text: str) -> str:
    """A text without its backticks and dollar signs, for attributes and headings."""
    return _CODE.sub(r"\1", text)


def _verdict_rows(entry: Entry) -> list[dict[str, Any]]:
    """Rows (name, measured, expected, tolerance) of the box under a check's title.

    A bound that is one value for several measured numbers stands in the first row and spans all.
    """
    measured = entry.measured if isinstance(entry.measured, Mapping) else {"": entry.measured}
    rows: list[dict[str, Any]] = []
    for position, (name, value) in enumerate(measured.items()):
        row: dict[str, Any] = {"name": name, "measured": numbers.number(value)}
        for bound in ("expected", "tolerance"):
            values = getattr(entry, bound)
            if isinstance(values, Mapping):
                row[bound] = (numbers.number(values.get(name)), 1)
            elif position == 0:
                row[bound] = (numbers.number(values), len(measured))
            else:
                row[bound] = None
        rows.append(row)
    return rows


def _cells(table: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    """Rows of (text, class) of a table, each column in a notation of its own."""
    columns = list(zip(*table["rows"], strict=True))
    texts = [numbers.column(values) for values in columns]
    kinds = ["text" if any(_is_text(value) for value in values) else "number" for values in columns]
    return [
        [(texts[c][r], kinds[c]) for c in range(len(columns))] for r in range(len(table["rows"]))
    ]


def _is_text(value: Any) -> bool:
    """Whether a cell holds words rather than a number that JSON has no token for."""
    return isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity")


def _details(entry: Entry) -> list[tuple[str, str, bool]]:
    """Rows (name, text, whether it is preformatted) of a check's details."""
    rows = []
    for name, value in entry.details.items():
        if isinstance(value, str):
            rows.append((name, value, "\n" in value))
        elif isinstance(value, Mapping | list):
            compact = json.dumps(value, ensure_ascii=False)
            text = compact if len(compact) < 400 else json.dumps(value, indent=1)
            rows.append((name, text, True))
        else:
            rows.append((name, numbers.number(value), False))
    return rows


def _image(content: bytes | None) -> dict[str, Any] | None:
    """The bytes of a figure as a data address, with the width to show it at; None where it is gone.

    A width below the number of pixels keeps the figure sharp on dense screens and in print, and its
    letters about as large as the page's.
    """
    if content is None:
        return None
    pixels = int.from_bytes(content[16:20], "big")  # the width in the header of a PNG file
    address = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    return {"address": address, "width": round(pixels * _ENLARGED * 96 / DPI)}
