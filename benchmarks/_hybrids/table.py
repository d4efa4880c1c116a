"""Counts over rows, and the problems that are to be looked at."""

from __future__ import annotations

import math
import platform
import statistics
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

from .rows import Row

VERDICTS = (
    "right",
    "warned",
    "accused",
    "beyond the promise",
    "silently wrong",
    "refused",
    "other hits",
    "crashed",
)


def table(rows: Sequence[Row]) -> list[str]:
    """Head, counts, and what is to be looked at, in Markdown."""
    usable = [row for row in rows if row.usable]
    gradients = [row for row in usable if row.has_gradient]
    dropped = Counter(row.outcome.removeprefix("unusable: ") for row in rows if not row.usable)
    draws = Counter(why.partition(": ")[2] for row in rows for why in row.dropped)
    good = [row for row in gradients if not row.bad]
    oracle = [row.oracle_seconds for row in usable if math.isfinite(row.oracle_seconds)]
    lines = [
        "# Random hybrid problems against an oracle",
        "",
        f"By `benchmarks/hybrids.py`, which says how errors are counted: {len(rows)} problems, "
        f"{sum(row.seconds for row in rows):.0f} s of one core, "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch "
        f"{version('torch')}, torchdiffeq {version('torchdiffeq')}, SciPy {version('scipy')}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| problems; without an oracle | {len(rows)}; {_listed(dropped)} |",
        f"| draws thrown away before that | {_listed(draws)} |",
        f"| median seconds of the oracle | {_median(oracle)} |",
        f"| gradients; leaves; leaves of which the oracle is not clear | {len(gradients)}; "
        f"{sum(len(row.leaves) for row in gradients)}; "
        f"{sum(len(row.unclear) for row in gradients)} |",
        f"| **silently wrong**: gradients; leaves | "
        f"**{sum(bool(row.silent) for row in gradients)}**; "
        f"{sum(len(row.silent) for row in gradients)} |",
        f"| **accused**: of the good ones | **{sum(row.warned for row in good)}** of {len(good)} |",
        f"| refused by name | {_said(usable, 'refused')} |",
        f"| ended by an exception that is not the library's | {_said(usable, 'crashed')} |",
        f"| other hits than the oracle's | {_said(usable, 'other hits')} |",
        "",
    ]
    for of in ("family", "route", "method"):
        lines += [*_by(usable, of), ""]
    return [*lines, *_cases(usable)]


def _listed(found: Counter[str]) -> str:
    names = ", ".join(f"{n} {name}" for name, n in found.most_common())
    return f"{found.total()} ({names})" if found else "0"


def _said(rows: Sequence[Row], verdict: str) -> str:
    return _listed(Counter(row.outcome for row in rows if row.verdict == verdict))


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2g}" if values else "-"


def _by(rows: Sequence[Row], of: str) -> list[str]:
    lines = [
        f"| {of} | " + " | ".join(VERDICTS) + " | median error / rtol |",
        "| --- |" + " --- |" * (len(VERDICTS) + 1),
    ]
    for value in sorted({getattr(row, of) for row in rows}):
        group = [row for row in rows if getattr(row, of) == value]
        said = Counter(row.verdict for row in group)
        errors = [leaf.error / row.rtol for row in group for leaf in row.leaves.values()]
        errors = [error for error in errors if math.isfinite(error)]
        counts = " | ".join(str(said[verdict]) for verdict in VERDICTS)
        lines.append(f"| {value} | {counts} | {_median(errors)} |")
    return lines


def _cases(rows: Sequence[Row]) -> list[str]:
    wanted = ("silently wrong", "other hits", "crashed", "accused", "beyond the promise")
    found = [row for row in rows if row.verdict in wanted]
    if not found:
        return ["No gradient is silently wrong, wrong without a warning, or accused."]
    lines = [
        "To be looked at (`--only` with the number runs one again):",
        "",
        "| problem | verdict | family | route, method, rtol | leaf: error, estimate, promise; or "
        "what was said |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(found, key=lambda row: (wanted.index(row.verdict), row.number)):
        name = (row.silent or [row.worst])[0]
        what = row.said[:120].replace("|", "/").replace("\n", " ")
        if name:
            leaf = row.leaves[name]
            what = f"{name}: {leaf.error:.1e}, {leaf.estimate:.1e}, {row.promise:.1e}"
        lines.append(
            f"| {row.number} | {row.verdict} | {row.family} | {row.route}, {row.method}, "
            f"{row.rtol:.1e} | {what} |"
        )
    return lines
