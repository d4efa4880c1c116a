"""Run checks one after the other, keeping everything that is finished.

After every check the report is written anew, each file atomically, so that an interruption by
whatever means costs the running check only (and of that only the cells that are not finished).
"""

from __future__ import annotations

import shutil
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from . import results
from .cells import CellCache
from .context import SHARED_CELLS, Context, ProgressHook, settings_key
from .files import WriteError, inside, require_writable
from .fingerprint import digest, library_hash, module_source, versions
from .plotting import style
from .registry import Check, Outcome
from .report import Header, write_report
from .results import Entry
from .sealed import ForeignError

CELLS = "cells"


class StoppedError(Exception):
    """A run that ended because its folder takes no more files.

    Attributes:
        error: What could not be written.
        kept: The finished checks that are stored and need not run again.
        lost: Those that are finished and not stored.
        cells: How many finished cells are in the folder.
    """

    def __init__(self, error: WriteError, kept: list[Entry], lost: list[Entry], cells: int) -> None:
        super().__init__(error, kept, lost, cells)
        self.error = error
        self.kept = kept
        self.lost = lost
        self.cells = cells

    def __str__(self) -> str:
        parts = [
            str(self.error),
            f"finished and kept: {', '.join(entry.name for entry in self.kept) or 'nothing'}",
        ]
        if self.lost:
            parts.append(f"finished and not kept: {', '.join(entry.name for entry in self.lost)}")
        if self.cells:
            parts.append(f"cells kept: {self.cells}")
        if self.kept or self.cells:
            parts.append("the same command goes on from there")
        return "; ".join(parts)


class Display(ProgressHook, Protocol):
    """What shows a run while it goes on; `theory_checks.terminal` has two of them."""

    def started(self, check: Check, position: int, total: int) -> None:
        """A check begins; `position` counts from 1."""

    def finished(self, entry: Entry, position: int, total: int) -> None:
        """A check has ended, or an earlier result of it is used again (`entry.reused`)."""


class Silent:
    """Shows nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""

    def warning(self, text: str) -> None:
        """Show nothing."""

    def step(self, done: int, total: int) -> None:
        """Show nothing."""

    def started(self, check: Check, position: int, total: int) -> None:
        """Show nothing."""

    def finished(self, entry: Entry, position: int, total: int) -> None:
        """Show nothing."""


def run(
    checks: Sequence[Check],
    context: Context,
    out: Path,
    *,
    fresh: bool = False,
    display: Display | None = None,
) -> list[Entry]:
    """Run `checks` and write `summary.json`, `index.html` and `figures/` below `out`.

    A check that passed before with the same key (profile, dtype, device, seed, versions, source of
    the check's module and of the libraries) is not run again.

    Args:
        checks: What to run, in this order.
        context: The settings; `cells` is set here, to a folder below `out`.
        out: The output folder, made where missing.
        fresh: Compute everything anew, checks and cells.
        display: Shows the progress; None for silence.

    Returns:
        The entries, in the order of `checks`. An exception inside a check is an entry that failed.

    Raises:
        ValueError: No checks.
        StoppedError: Something cannot be written; what was finished before is kept.
        KeyboardInterrupt: Passed on once what is finished has been written.
    """
    if not checks:
        raise ValueError("checks is empty: nothing was selected")
    shown = display or Silent()
    finished: dict[str, Entry] = {}
    stored: set[str] = set()
    try:
        _prepare(out, checks, fresh=fresh)
        keys = {check.name: check_key(check, context) for check in checks}
        if not fresh:
            finished = _stored(checks, keys, out, shown)
            stored = set(finished)
        _report(checks, finished, context, out)
        for position, check in enumerate(checks, start=1):
            if check.name in stored:
                shown.finished(finished[check.name], position, len(checks))
                continue
            shown.started(check, position, len(checks))
            inside_check = _context(context, check, out / CELLS / check.name, shown)
            entry = _run_one(check, inside_check, keys[check.name], out)
            finished[check.name] = entry
            results.save(entry, out)
            stored.add(check.name)
            _report(checks, finished, context, out)
            shown.finished(entry, position, len(checks))
    except WriteError as error:
        entries = [finished[check.name] for check in checks if check.name in finished]
        kept = [entry for entry in entries if entry.name in stored]
        lost = [entry for entry in entries if entry.name not in stored]
        cells = sum(1 for _ in (out / CELLS).rglob("*.json"))
        raise StoppedError(error, kept, lost, cells) from error
    return [finished[check.name] for check in checks]


def _prepare(out: Path, checks: Sequence[Check], *, fresh: bool) -> None:
    """Make the folders, see that they take files, and remove cells that are not to be reused.

    Raises:
        WriteError: A folder cannot be written, or is a link to a place elsewhere: what is read and
            replaced here has to be the run's own.
    """
    require_writable(out)
    for name in (results.RESULTS, results.FIGURES, CELLS):
        if not inside(out / name, out):
            raise WriteError(out / name, "it is a link to a place outside of the folder")
        require_writable(out / name)
    for name in (SHARED_CELLS, *(check.name for check in checks)) if fresh else ():
        try:
            shutil.rmtree(out / CELLS / name)
        except FileNotFoundError:
            continue
        except OSError as error:  # old cells that stay would be reused
            raise WriteError(out / CELLS / name, error.strerror or str(error)) from error


def _stored(
    checks: Sequence[Check], keys: dict[str, str], out: Path, shown: Display
) -> dict[str, Entry]:
    """The results of an earlier run that hold still, by name; says which files are foreign."""
    found: dict[str, Entry] = {}
    for check in checks:
        try:
            entry = results.load(check, keys[check.name], out)
        except ForeignError as error:
            shown.warning(f"{error}: {check.name} is computed anew")
            continue
        if entry is not None:
            found[check.name] = entry
    return found


def check_key(check: Check, context: Context) -> str:
    """A hash of everything that a check's outcome depends on."""
    return digest(check.name, settings_key(context), library_hash(), module_source(check.function))


def _context(context: Context, check: Check, folder: Path, display: ProgressHook) -> Context:
    """The context of one check, with its cell cache."""
    return replace(context, check=check.name, hook=display, cells=CellCache(folder))


def _run_one(check: Check, context: Context, key: str, out: Path) -> Entry:
    """Run one check and turn whatever happens into an entry, interruptions and full disks excepted.

    Raises:
        WriteError: A cell or a figure cannot be written; that says nothing about the claim.
    """
    begin = time.perf_counter()
    try:
        # A check must not depend on those that ran before it.
        torch.manual_seed(context.seed)
        np.random.seed(context.seed % 2**32)
        with warnings.catch_warnings(record=True) as caught, style():
            outcome = check.function(context)
        if not isinstance(outcome, Outcome):
            raise TypeError(
                f"check {check.name!r} must return an Outcome, got {type(outcome).__name__}"
            )
        if caught:
            texts = [f"{w.category.__name__}: {w.message}" for w in caught]
            outcome.details["warnings"] = list(dict.fromkeys(texts))
        return results.from_outcome(check, outcome, time.perf_counter() - begin, key, out)
    except WriteError:
        raise
    except (Exception, SystemExit) as error:
        seconds = time.perf_counter() - begin
        return results.from_error(check, error, traceback.format_exc(), seconds, key)


def _report(
    checks: Sequence[Check], finished: dict[str, Entry], context: Context, out: Path
) -> None:
    """Write the report on what is finished so far."""
    entries = [finished[check.name] for check in checks if check.name in finished]
    header = Header(
        profile=context.profile,
        device=str(context.device),
        dtype=str(context.dtype).removeprefix("torch."),
        seed=context.seed,
        versions=versions(),
        date=results.now(),
        finished=len(entries) == len(checks),
        pending=[check.name for check in checks if check.name not in finished],
    )
    write_report(out, header, entries)
