"""Dummy checks in registries of their own, for the tests of the engine."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from theory_checks.cli import make_app
from theory_checks.context import Context
from theory_checks.plotting import new_figure, slope_plot
from theory_checks.registry import Figure, Outcome, Registry, Table, check
from theory_checks.slopes import fit_slope

ROOT = Path(__file__).resolve().parent.parent


def invoke(registry: Registry, *arguments: str | Path) -> Result:
    """Run the command line on `registry` in this process."""
    return CliRunner().invoke(make_app(registry), [str(a) for a in arguments])


def run(registry: Registry, out: Path, *arguments: str) -> Result:
    """Run `run` with the report in `out`, in this process alone."""
    return invoke(registry, "run", "--out", out, "--jobs", "1", *arguments)


def summary(out: Path) -> dict[str, Any]:
    """The content of summary.json, refusing tokens that are no JSON."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    text = (out / "summary.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return content


class Dummies:
    """A registry of checks that count how often they run."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.calls: dict[str, int] = {}

    def add(self, name: str, body: Callable[[Context], Outcome], group: str = "dummy") -> None:
        """Register `body` under `name`."""

        def function(context: Context) -> Outcome:
            """The claim of a dummy, with `code` & <markup>.

            A second paragraph.
            """
            self.calls[name] = self.calls.get(name, 0) + 1
            return body(context)

        decorate = check(
            name=name, title=f"Title {name}", source="Eq. (1)", group=group, registry=self.registry
        )
        decorate(function)


@pytest.fixture(name="dummies")
def make_dummies() -> Dummies:
    return Dummies()


def good(context: Context) -> Outcome:
    return Outcome.below(1e-13, 1e-12)


def wrong(context: Context) -> Outcome:
    return Outcome.within(1.2, 1.0, 0.1)


def pictured(context: Context) -> Outcome:
    h = np.logspace(-3, -1, 8)
    fit = fit_slope(h, 2.0 * h)
    figure, axes = new_figure()
    slope_plot(axes, h, {"quartic": (2.0 * h, fit)})
    return Outcome.within(
        {"slope": fit.slope, "constant": 2.0},
        {"slope": 1.0, "constant": 2.0},
        {"slope": 0.1, "constant": 1e-9},
        interval=fit.interval,
        tables=[Table("Errors", ["h", "N", "error"], [[0.1, 10, 0.2], [0.01, 100, math.nan]])],
        figures=[Figure("slope", "A slope of 1.", figure, alt="a rising line")],
    )
