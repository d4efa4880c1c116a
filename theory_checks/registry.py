"""What a check is: the decorator, the outcome it returns and the registry that holds it.

A check is one function in one file of `theory_checks/checks/`; the package finds the files by
itself, so adding a check is adding a file:

    from ..registry import Context, Figure, Outcome, Table, check

    @check(name="proposition-1", title="Proposition 1 on quadratics", source="Proposition 1",
           group="proposition-1")
    def proposition_1(context: Context) -> Outcome:
        \"\"\"The first paragraph is what is claimed; the report prints it under the title.\"\"\"
        dims = context.choose(quick=[2, 10], paper=[2, 10, 100, 1000])
        errors = context.map(relative_error, dims)     # cached cell by cell, in parallel
        return Outcome.below({"largest error": max(errors)}, 1e-12)

Modules whose name starts with an underscore hold helpers that several checks share; they are not
searched for checks, and a change in one makes every check run again.

Sources are written by theorem, equation or figure number, as in "Theorem 2" or "Eq. (13)".
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .context import Context

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = [
    "REGISTRY",
    "Check",
    "Context",
    "Figure",
    "Outcome",
    "Registry",
    "Table",
    "check",
]

SLUG = re.compile(r"[a-z0-9]+(?:[-.][a-z0-9]+)*")
Numbers = float | dict[str, float]


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        title: The heading, without a full stop.
        columns: The column names, units in parentheses.
        rows: One sequence a row, as long as `columns`: numbers (formatted by the report), strings,
            booleans or None (an empty cell).
        note: What the reader has to know to read it; printed below.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"rows[{number}] of table {self.title!r} has {len(row)} entries "
                    f"for {len(self.columns)} columns"
                )


@dataclass(frozen=True)
class Figure:
    """A figure of the report.

    Attributes:
        name: Unique within the check, lower case with hyphens; the file is `CHECK--NAME.png`.
        caption: What is shown and what to see in it.
        figure: A `matplotlib.figure.Figure`, from `theory_checks.plotting.new_figure`.
        alt: A description for readers who cannot see it; the caption where empty.
    """

    name: str
    caption: str
    figure: MatplotlibFigure
    alt: str = ""

    def __post_init__(self) -> None:
        _require_slug("name of a figure", self.name)


@dataclass(frozen=True)
class Outcome:
    """What a check found.

    A NaN in `measured` or `interval` never passes, whatever `passed` says.

    Attributes:
        measured: A number, or several by name.
        expected: What theory says: a number, numbers by the same names, a sentence, or None.
        tolerance: How far off is still right, in the same forms.
        passed: Whether the claim holds.
        details: Anything JSON can hold that explains the verdict; arrays and scalars of numpy and
            torch are converted.
        tables: Shown in the report in this order, after the figures.
        figures: Shown in the report in this order.
        interval: The 95 % confidence interval, (low, high), of `measured`, or of its first entry.
    """

    measured: Numbers
    expected: Any
    tolerance: Any
    passed: bool
    details: dict[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        measured: Numbers
        if isinstance(self.measured, Mapping):
            if not self.measured:
                raise ValueError("measured is an empty dict: a check has to measure something")
            measured = {str(name): float(value) for name, value in self.measured.items()}
            named = measured
        else:
            measured = float(self.measured)
            named = {"measured": measured}
        passed, details = bool(self.passed), dict(self.details)
        bad = [name for name, value in named.items() if math.isnan(value)]
        interval = None
        if self.interval is not None:
            low, high = (float(end) for end in self.interval)
            interval = (low, high)
            if math.isnan(low) or math.isnan(high):
                bad.append("interval")
            elif low > high:
                raise ValueError(f"interval must be (low, high), got ({low}, {high})")
        if bad:
            passed = False
            details["not_a_number"] = bad
        names = [figure.name for figure in self.figures]
        if len(set(names)) != len(names):
            raise ValueError(f"figures: names must be unique within a check, got {names}")
        values = {"measured": measured, "passed": passed, "details": details, "interval": interval}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def below(cls, measured: Numbers, bound: Numbers, **others: Any) -> Outcome:
        """An error of which every entry has to be at most `bound` (one number, or one a name)."""
        passed = all(abs(value) <= limit for value, limit in _pairs(measured, bound))
        return cls(measured, 0.0, bound, passed, **others)

    @classmethod
    def within(
        cls, measured: Numbers, expected: Numbers, tolerance: Numbers, **others: Any
    ) -> Outcome:
        """Numbers that have to satisfy |measured - expected| <= tolerance, name by name."""
        limits = [limit for _, limit in _pairs(measured, tolerance)]
        pairs = _pairs(measured, expected)
        passed = all(
            abs(value - truth) <= limit for (value, truth), limit in zip(pairs, limits, strict=True)
        )
        return cls(measured, expected, tolerance, passed, **others)


def _pairs(measured: Numbers, other: Numbers) -> list[tuple[float, float]]:
    """Pair each measured number with its partner in `other`, a number or a dict of equal names."""
    if not isinstance(measured, Mapping):
        if isinstance(other, Mapping):
            raise ValueError("measured is one number, so its bounds must be one number too")
        return [(float(measured), float(other))]
    if not isinstance(other, Mapping):
        return [(float(value), float(other)) for value in measured.values()]
    if set(measured) != set(other):
        raise ValueError(f"names differ: measured {sorted(measured)}, bounds {sorted(other)}")
    return [(float(value), float(other[name])) for name, value in measured.items()]


@dataclass(frozen=True)
class Check:
    """One registered claim; `function(context)` returns its `Outcome`."""

    name: str
    title: str
    source: str
    group: str
    function: Callable[[Context], Outcome]
    order: int = 0

    @property
    def claim(self) -> str:
        """The first paragraph of the function's docstring, as one line."""
        text = inspect.cleandoc(self.function.__doc__ or "")
        return " ".join(text.split("\n\n", maxsplit=1)[0].split())


class Registry:
    """Checks by name, in the order (`order`, registration)."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def __iter__(self) -> Iterator[Check]:
        return iter(sorted(self._checks.values(), key=lambda entry: entry.order))

    def __len__(self) -> int:
        return len(self._checks)

    def __getitem__(self, name: str) -> Check:
        return self._checks[name]

    def add(self, entry: Check) -> None:
        """Register `entry`.

        Raises:
            ValueError: A name or group that is no lower-case slug, a name registered before, or
                a function without a docstring (the report prints its first paragraph as the claim).
        """
        _require_slug("name of a check", entry.name)
        _require_slug("group of a check", entry.group)
        if entry.name in self._checks:
            raise ValueError(f"a check named {entry.name!r} is registered already")
        if not entry.claim:
            raise ValueError(f"check {entry.name!r} needs a docstring that says what is claimed")
        self._checks[entry.name] = entry

    def select(self, patterns: Iterable[str] = ()) -> list[Check]:
        """The checks whose name or group equals or matches (as a glob) one of `patterns`.

        Args:
            patterns: Names, groups or globs such as `theorem-2*`; all checks where empty.

        Raises:
            KeyError: A pattern that matches nothing; the message lists names close to it.
        """
        everything = list(self)
        chosen: set[str] = set()
        wanted = list(patterns)
        for pattern in wanted:
            hits = {
                entry.name
                for entry in everything
                if fnmatch.fnmatchcase(entry.name, pattern)
                or fnmatch.fnmatchcase(entry.group, pattern)
            }
            if not hits:
                raise KeyError(self._unknown(pattern))
            chosen |= hits
        return [entry for entry in everything if not wanted or entry.name in chosen]

    def _unknown(self, pattern: str) -> str:
        """Say that `pattern` is unknown and what was probably meant."""
        known = list(dict.fromkeys(n for entry in self for n in (entry.name, entry.group)))
        close = difflib.get_close_matches(pattern.lower(), known, n=5, cutoff=0.5)
        close += [name for name in known if pattern.lower() in name and name not in close][:5]
        hint = f"close to it: {', '.join(close)}" if close else f"known: {', '.join(known)}"
        return f"no check, group or glob {pattern!r}; {hint}"


REGISTRY = Registry()


def check(
    *,
    name: str,
    title: str,
    source: str,
    group: str,
    order: int = 0,
    registry: Registry | None = None,
) -> Callable[[Callable[[Context], Outcome]], Callable[[Context], Outcome]]:
    """Register a function `context -> Outcome` as a check; the function is returned unchanged.

    Args:
        name: Unique, lower case with hyphens, such as "theorem-2-quartic".
        title: A short heading for the report.
        source: The theorem, equation or figure, such as "Theorem 2".
        group: Checks of one group run together by `--only GROUP`, such as "theorem-2".
        order: Checks run in ascending order; ties in the order of registration.
        registry: Where to register; the package's own `REGISTRY` where None.

    Raises:
        ValueError: See `Registry.add`.
    """

    def register(function: Callable[[Context], Outcome]) -> Callable[[Context], Outcome]:
        target = REGISTRY if registry is None else registry
        target.add(Check(name, title, source, group, function, order))
        return function

    return register


def _require_slug(what: str, name: str) -> None:
    """Raise a ValueError unless `name` is lower case words joined by hyphens or dots."""
    if not SLUG.fullmatch(name):
        raise ValueError(f"the {what} must be lower case words joined by hyphens, got {name!r}")
