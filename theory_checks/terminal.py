"""A run on the terminal: a live display where there is one, plain lines where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from .registry import Check
from .report import numbers
from .results import Entry
from .runner import Display

_PLAIN_WIDTH = 150


def make_console() -> Console:
    """A console on standard output; wide enough for the tables where that is a file or a pipe."""
    console = Console(highlight=False)
    if not console.is_terminal and console.width < _PLAIN_WIDTH:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    return console


@contextmanager
def display(console: Console) -> Iterator[Display]:
    """The display that suits `console`, live for as long as the context lasts."""
    if not console.is_terminal:
        yield Lines(console)
        return
    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=console,
        transient=True,
    )
    with progress:
        yield Live(progress)


class Lines:
    """Plain lines: one when a check begins, its messages, and one when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def message(self, text: str) -> None:
        """Print the message, indented."""
        self._print(f"        {text}")

    def warning(self, text: str) -> None:
        """Print the message, indented."""
        self.message(text)

    def step(self, done: int, total: int) -> None:
        """Print nothing: a line a step would bury the rest."""

    def started(self, check: Check, position: int, total: int) -> None:
        """Print which check begins."""
        self._print(f"{_counter(position, total)} {check.name} ...")

    def finished(self, entry: Entry, position: int, total: int) -> None:
        """Print the verdict."""
        self._print(f"{_counter(position, total)} {_verdict_line(entry)}")

    def _print(self, text: str) -> None:
        """Print at once, so that a log can be followed."""
        self._console.print(escape(text), soft_wrap=True)
        sys.stdout.flush()


class Live:
    """Two bars: the run, and the running check with its latest message."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._all = progress.add_task("checks", total=None, note="")
        self._current = progress.add_task("", total=None, note="", visible=False)

    def message(self, text: str) -> None:
        """Show the message beside the bar of the running check."""
        self._progress.update(self._current, note=escape(text))

    def warning(self, text: str) -> None:
        """Print the message above the bars, where it stays."""
        self._progress.console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)

    def step(self, done: int, total: int) -> None:
        """Move the bar of the running check."""
        self._progress.update(self._current, completed=done, total=total)

    def started(self, check: Check, position: int, total: int) -> None:
        """Start a bar for the check."""
        self._progress.update(self._all, total=total, completed=position - 1)
        self._progress.remove_task(self._current)
        self._current = self._progress.add_task(escape(check.name), total=None, note="")

    def finished(self, entry: Entry, position: int, total: int) -> None:
        """Print the verdict above the bars."""
        self._progress.update(self._all, total=total, completed=position)
        colour = "green" if entry.passed else "red"
        line = f"{_counter(position, total)} {_verdict_line(entry)}"
        self._progress.console.print(f"[{colour}]{escape(line)}[/]", soft_wrap=True)


def _counter(position: int, total: int) -> str:
    """Which check this is, as in [ 3/12]."""
    return f"[{position:{len(str(total))}d}/{total}]"


def _verdict_line(entry: Entry) -> str:
    """Name, verdict, time, and whether the result is an earlier one."""
    verdict = "PASS" if entry.passed else "FAIL"
    if entry.reused:
        return f"{entry.name} {verdict} (reused: computed {entry.date}, nothing changed since)"
    line = f"{entry.name} {verdict} ({numbers.seconds(entry.seconds)})"
    return f"{line}: {entry.details['error']}" if _raised(entry) else line


def _raised(entry: Entry) -> bool:
    """Whether the check ended in an exception."""
    return entry.measured is None and "error" in entry.details


def show_checks(console: Console, checks: Iterable[Check]) -> None:
    """Print a table of what can be run."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("name", "source", "title", "group"):
        table.add_column(name, no_wrap=name == "name")
    for check in checks:
        table.add_row(*map(escape, (check.name, check.source, check.title, check.group)))
    console.print(table)


def show_results(console: Console, entries: Sequence[Entry], out: Path) -> None:
    """Print the table of results, and what it comes to."""
    show_table(console, entries)
    failed = sum(not entry.passed for entry in entries)
    reused = sum(entry.reused for entry in entries)
    verdict = (
        f"{failed} of {len(entries)} checks failed" if failed else f"all {len(entries)} checks hold"
    )
    if reused:
        verdict += f"; {reused} reused from an earlier run (--fresh computes them anew)"
    console.print(f"[{'red' if failed else 'green'}]{verdict}[/]")
    console.print(f"report: {escape(str(out / 'index.html'))}", soft_wrap=True)


def show_table(console: Console, entries: Sequence[Entry]) -> None:
    """Print the table of results alone."""
    table = Table(box=None, pad_edge=False, header_style="bold", row_styles=["", "dim"])
    if console.no_color or not console.is_terminal:
        table.row_styles = []
    for name in ("name", "source", "measured", "expected", "tolerance", "verdict", "seconds"):
        table.add_column(
            name,
            justify="right" if name == "seconds" else "left",
            no_wrap=name in ("verdict", "seconds"),
            overflow="fold",
        )
    for entry in entries:
        table.add_row(*_result_row(entry))
    console.print(table)


def _result_row(entry: Entry) -> list[str]:
    """The cells of one row, escaped."""
    measured = ["raised"] if _raised(entry) else numbers.lines(entry.measured)
    if entry.interval:
        measured.append(numbers.interval(entry.interval))
    colour, verdict = ("green", "PASS") if entry.passed else ("red", "FAIL")
    return [
        escape(entry.name),
        escape(entry.source),
        escape("\n".join(measured)),
        escape("\n".join(numbers.lines(entry.expected))),
        escape("\n".join(numbers.lines(entry.tolerance))),
        f"[{colour}]{verdict}[/]",
        f"{entry.seconds:.1f}",
    ]
