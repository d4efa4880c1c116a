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
from .context import SHARED_CELLS, CellCache, Context, ProgressHook, settings_key
from .fingerprint import digest, library_hash, module_source, versions
from .plotting import style
from .registry import Check, Outcome
from .report import Header, write_report
from .results import Entry

CELLS = "cells"


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
        KeyboardInterrupt: Passed on once what is finished has been written.
    """
    if not checks:
        raise ValueError("checks is empty: nothing was selected")
    shown = display or Silent()
    if fresh:
        for folder in (SHARED_CELLS, *(check.name for check in checks)):
            shutil.rmtree(out / CELLS / folder, ignore_errors=True)
    keys = {check.name: check_key(check, context) for check in checks}
    finished: dict[str, Entry] = {}
    if not fresh:
        stored = {check.name: results.load(check.name, keys[check.name], out) for check in checks}
        finished = {name: entry for name, entry in stored.items() if entry is not None}
    _report(checks, finished, context, out)
    for position, check in enumerate(checks, start=1):
        if check.name in finished:
            shown.finished(finished[check.name], position, len(checks))
            continue
        shown.started(check, position, len(checks))
        inside = _context(context, check, out / CELLS / check.name, shown)
        entry = _run_one(check, inside, keys[check.name], out)
        results.save(entry, out)
        finished[check.name] = entry
        _report(checks, finished, context, out)
        shown.finished(entry, position, len(checks))
    return [finished[check.name] for check in checks]


def check_key(check: Check, context: Context) -> str:
    """A hash of everything that a check's outcome depends on."""
    return digest(check.name, settings_key(context), library_hash(), module_source(check.function))


def _context(context: Context, check: Check, folder: Path, display: ProgressHook) -> Context:
    """The context of one check, with its cell cache."""
    return replace(context, check=check.name, hook=display, cells=CellCache(folder))


def _run_one(check: Check, context: Context, key: str, out: Path) -> Entry:
    """Run one check and turn whatever happens, interruptions excepted, into an entry."""
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
