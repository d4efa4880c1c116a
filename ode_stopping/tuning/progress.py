"""A bar on the terminal while tuning runs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from ..core.optional import optional_module
from .history import TuningRecord, shown

__all__ = ["progress_bar"]

Show: TypeAlias = Callable[[TuningRecord], None]


@contextmanager
def progress_bar(total: int, *, wanted: bool | None) -> Iterator[Show]:
    """A function that moves the bar to a record.

    Args:
        total: Iterations.
        wanted: None: a bar if rich is installed and stderr is a terminal.

    Raises:
        ImportError: It is wanted, and rich is missing.
    """
    if wanted is None:
        wanted = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
    if not wanted:
        yield lambda record: None
        return
    rich = optional_module("rich.progress", "progress=True")
    console = optional_module("rich.console", "progress=True").Console(stderr=True)
    bar = rich.Progress(
        rich.TextColumn("tuning"),
        rich.BarColumn(bar_width=28),
        rich.MofNCompleteColumn(),
        rich.TimeElapsedColumn(),
        rich.TextColumn("{task.description}"),
        console=console,
    )
    with bar:
        line = bar.add_task("", total=total)

        def show(record: TuningRecord) -> None:
            runs = record.reached + record.missed
            text = f"objective {shown(record.objective)}, reached {record.reached} of {runs}"
            bar.update(line, completed=min(record.iteration + 1, total), description=text)

        yield show
