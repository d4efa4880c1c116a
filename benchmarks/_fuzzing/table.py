"""Counts over rows, and the cases that are to be looked at."""

from __future__ import annotations

import math
import platform
import statistics
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np

from ode_stopping.solving.solver import LARGEST_PROMISE, PROMISE_PER_RTOL

from .cases import Settings
from .rows import Leaf, Row

_NOTHING = 1 / 50  # of its natural size: what is left of a gradient that vanishes


def counts(rows: Sequence[Row]) -> dict[str, str]:
    """What is counted, over rows of one sample."""
    usable = [row for row in rows if row.usable]
    gradients = [row for row in usable if row.has_gradient]
    leaves = sum(len(row.leaves) for row in gradients)
    good = [row for row in gradients if row.good]
    bad = [row for row in gradients if not row.good]
    silent = [row for row in gradients if row.silent]
    bad_leaves = sum(len(row.bad) for row in bad)
    beyond = [row for row in gradients if any(_beyond(row, leaf) for leaf in row.leaves.values())]
    default = [row for row in gradients if row.default]
    refused = Counter(row.outcome for row in usable if row.verdict == "refused")
    crashed = Counter(row.said[:80] for row in usable if row.verdict == "crashed")
    dropped = Counter(row.outcome for row in rows if not row.usable)
    unwarned = [row for row in bad if not row.spoken]
    found = {
        "cases; without an oracle": f"{len(rows)}; {_listed(dropped)}",
        "refused by name": _listed(refused),
        "ended by an exception that is not the library's": _listed(crashed),
        "gradients; leaves": f"{len(gradients)}; {leaves}",
        "right, nothing said": f"{sum(not row.warned for row in good)}",
        "wrong (a leaf beyond the promise) and warned": f"{sum(row.spoken for row in bad)}",
        "wrong, unwarned, within ten estimates": f"{sum(not row.silent for row in unwarned)}",
        "**silently wrong**: gradients; leaves; of the leaves that are wrong": (
            f"**{len(silent)}**; {sum(len(row.silent) for row in silent)}; "
            f"{_share(sum(len(row.silent) for row in silent), bad_leaves)}"
        ),
        "**accused**: of the good ones": (
            f"**{sum(row.accused for row in good)}** of {len(good)}, "
            f"{_share(sum(row.accused for row in good), len(good))}"
        ),
        "accused by": _listed(Counter(map(_accuser, filter(lambda row: row.accused, good)))),
        "good, and told of a near graze": f"{sum(row.grazing for row in good)}",
        "beyond 50 rtol": (
            f"{len(beyond)} of {len(gradients)}, {_share(len(beyond), len(gradients))}"
        ),
        "the same at the default tolerance": (
            f"{sum(row in beyond for row in default)} of {len(default)}, "
            f"{_share(sum(row in beyond for row in default), len(default))}"
        ),
    }
    if any(row.settings.jumps for row in rows):
        crossed = [row for row in gradients if row.switches]
        said = Counter(row.verdict for row in crossed)
        found["gradients over a path that does jump"] = _listed(said)
    ratios = [
        leaf.estimate / leaf.error
        for row in gradients
        for leaf in row.leaves.values()
        if leaf.error > row.rtol and math.isfinite(leaf.estimate) and math.isfinite(leaf.error)
    ]
    if ratios:
        low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
        found["estimate / error of a leaf that is above rtol, 5, 50, 95 %"] = (
            f"{low:.2g}, {middle:.2g}, {high:.2g}"
        )
    costs = [row.cost for row in gradients if row.cost is not None]
    if costs:
        of_default = [row.cost for row in default if row.cost is not None] or [math.nan]
        found["cost over light, median and mean; at the default tolerance"] = (
            f"{statistics.median(costs):.2f}, {statistics.fmean(costs):.2f}; "
            f"{statistics.median(of_default):.2f}, {statistics.fmean(of_default):.2f}"
        )
    return found


def _largest_figure(row: Row) -> str:
    return max(row.figures, key=row.figures.__getitem__, default="")


def _accused_leaf(row: Row) -> str:
    return max(row.leaves, key=lambda name: row.leaves[name].estimate)


def _accuser(row: Row) -> str:
    """The figure that is too large; of a leaf that is next to nothing, that."""
    figure = _largest_figure(row)
    if figure != "refinement":
        return figure
    leaf = row.leaves[_accused_leaf(row)]
    vanishes = leaf.truth <= _NOTHING * leaf.natural or leaf.truth == 0.0
    return "a gradient that vanishes" if vanishes else "other steps"


def _beyond(row: Row, leaf: Leaf) -> bool:
    return not leaf.error <= PROMISE_PER_RTOL * row.rtol


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _listed(found: Counter[str]) -> str:
    names = ", ".join(f"{n} {name.removeprefix('unusable: ')}" for name, n in found.most_common())
    return f"{found.total()} ({names})" if found else "0"


def table(rows: Sequence[Row]) -> list[str]:
    """Counts of every sample side by side, and the cases that are to be looked at."""
    samples: dict[Settings, list[Row]] = {}
    for row in rows:
        samples.setdefault(row.settings, []).append(row)
    columns = [(title(settings), counts(group)) for settings, group in samples.items()]
    names = list(dict.fromkeys(name for _, found in columns for name in found))
    lines = ["| | " + " | ".join(head for head, _ in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for name in names:
        cells = [found.get(name, "") for _, found in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for settings, group in samples.items():
        lines += ["", f"## {title(settings)}", ""]
        lines += [f"`python benchmarks/fuzz.py {command(settings)} --cases {len(group)}`", ""]
        for name, of in (("family", "flow"), ("route", "route"), ("method", "method")):
            lines += [*_by(group, name, of), ""]
        lines += _cases(group)
    return lines


def _by(rows: Sequence[Row], name: str, of: str) -> list[str]:
    lines = [
        f"| {name} | gradients | refused | wrong and warned | wrong, unwarned | silently wrong | "
        "accused | median error / rtol |",
        "| --- |" + " --- |" * 7,
    ]
    usable = [row for row in rows if row.usable]
    for value in sorted({getattr(row, of) for row in usable}):
        group = [row for row in usable if getattr(row, of) == value]
        said = Counter(row.verdict for row in group)
        per_rtol = [
            leaf.error / row.rtol
            for row in group
            for leaf in row.leaves.values()
            if math.isfinite(leaf.error)
        ]
        median = f"{statistics.median(per_rtol):.2g}" if per_rtol else ""
        lines.append(
            f"| {value} | {sum(row.has_gradient for row in group)} | {said['refused']} | "
            f"{said['warned']} | {said['beyond the promise']} | {said['silently wrong']} | "
            f"{said['accused']} | {median} |"
        )
    return lines


def _cases(rows: Sequence[Row]) -> list[str]:
    wanted = ("silently wrong", "accused", "beyond the promise")
    found = [row for row in rows if row.verdict in wanted]
    if not found:
        return ["No gradient is silently wrong, wrong without a warning, or accused."]
    lines = [
        "To be looked at (`--only` with the number runs one again):",
        "",
        "| case | verdict | flow, criterion | route, method, rtol | leaf: error, estimate, promise "
        "| over its natural size | error of T | largest figure |",
        "| --- |" + " --- |" * 7,
    ]
    for row in sorted(found, key=lambda row: (wanted.index(row.verdict), row.number)):
        name = _accused_leaf(row) if row.verdict == "accused" else (row.silent or row.bad)[0]
        leaf = row.leaves[name]
        figure = _largest_figure(row)
        size = f" {row.figures[figure]:.1e}" if figure else ""
        taken = "" if row.taken in ("", row.route) else f" (by {row.taken})"
        share = f"{leaf.truth / leaf.natural:.0e}" if leaf.natural > 0 else ""
        lines.append(
            f"| {row.number} | {row.verdict} | {row.flow}, {row.criterion} | "
            f"{row.route}{taken}, {row.method}, {row.rtol:.1e} | "
            f"{name}: {leaf.error:.1e}, {leaf.estimate:.1e}, {row.promise:.1e} | {share} | "
            f"{row.error_of_time:.1e} | {figure}{size} |"
        )
    return lines


def title(settings: Settings) -> str:
    """A sample in a few words."""
    words = [f"{settings.evidence}, cotangents on {settings.what}"]
    if settings.jumps:
        words.append("flows that jump")
    if settings.methods != Settings.methods:
        words.append("/".join(settings.methods))
    if settings.dtypes != Settings.dtypes:
        words.append("/".join(settings.dtypes))
    if settings.route is not None:
        words.append(settings.route)
    if settings.cost:
        words.append("with its cost")
    return ", ".join(words) + (f", seed {settings.seed}" if settings.seed else "")


def command(settings: Settings) -> str:
    """The options that make a sample."""
    words = [f"--seed {settings.seed} --evidence {settings.evidence} --what {settings.what}"]
    if settings.jumps:
        words.append("--jumps")
    if settings.methods != Settings.methods:
        words.append(f"--methods {' '.join(settings.methods)}")
    if settings.dtypes != Settings.dtypes:
        words.append(f"--dtypes {' '.join(settings.dtypes)}")
    if settings.route is not None:
        words.append(f"--route {settings.route}")
    if settings.cost:
        words.append("--cost")
    return " ".join(words)


def head(rows: Sequence[Row]) -> list[str]:
    seconds = sum(row.seconds for row in rows)
    return [
        "# Random stopping times against an oracle",
        "",
        f"By `benchmarks/fuzz.py`, which says how errors are counted: {len(rows)} cases, "
        f"{seconds:.0f} s of one core, {platform.processor() or platform.machine()}, Python "
        f"{platform.python_version()}, torch {version('torch')}, torchdiffeq "
        f"{version('torchdiffeq')}, SciPy {version('scipy')}. Promise: {PROMISE_PER_RTOL:g} rtol, "
        f"at most {LARGEST_PROMISE:g}. Counts are of gradients unless it says leaves.",
        "",
    ]
