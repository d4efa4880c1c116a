"""The engine behind `python -m theory_checks`, run on dummy checks in registries of their own."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from theory_checks import __main__ as entry_point
from theory_checks.cli import make_app
from theory_checks.context import CellCache, Context
from theory_checks.fingerprint import canonical, function_hash
from theory_checks.plotting import new_figure, slope_plot
from theory_checks.registry import Check, Figure, Outcome, Registry, Table, check
from theory_checks.report import numbers
from theory_checks.results import dump, jsonable
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


@pytest.fixture
def dummies() -> Dummies:
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


# --- verdicts and exit status ------------------------------------------------------------------


def test_all_hold_gives_status_zero_and_the_fixed_summary(dummies: Dummies, tmp_path: Path) -> None:
    dummies.add("one", good)
    dummies.add("two", pictured, group="other")
    result = run(dummies.registry, tmp_path, "--seed", "5")
    assert result.exit_code == 0, result.output
    content = summary(tmp_path)
    assert set(content) == {
        "profile", "device", "dtype", "seed", "versions", "finished", "checks",
    }  # fmt: skip
    assert content["profile"] == "quick"
    assert (content["device"], content["dtype"], content["seed"]) == ("cpu", "float64", 5)
    assert content["finished"] is True
    assert content["versions"]["torch"] == torch.__version__
    one, two = content["checks"]
    assert set(one) == {
        "name", "title", "group", "source", "measured", "expected", "tolerance", "interval",
        "passed", "seconds", "details",
    }  # fmt: skip
    assert (one["name"], one["source"], one["passed"]) == ("one", "Eq. (1)", True)
    assert (one["measured"], one["expected"], one["tolerance"]) == (1e-13, 0.0, 1e-12)
    assert one["interval"] is None
    assert two["measured"]["constant"] == 2.0
    assert two["interval"] == pytest.approx([1.0, 1.0])
    assert two["group"] == "other"


def test_one_failure_gives_status_one_and_the_others_still_run(
    dummies: Dummies, tmp_path: Path
) -> None:
    dummies.add("bad", wrong)
    dummies.add("fine", good)
    result = run(dummies.registry, tmp_path)
    assert result.exit_code == 1
    assert [entry["passed"] for entry in summary(tmp_path)["checks"]] == [False, True]
    for text in ("bad", "fine", "Eq. (1)", "PASS", "FAIL", "1 of 2 checks failed"):
        assert text in result.output


def test_an_exception_is_a_failed_check_with_its_traceback(
    dummies: Dummies, tmp_path: Path
) -> None:
    def raising(context: Context) -> Outcome:
        raise ArithmeticError("the sky fell <b>[bold]")

    dummies.add("raising", raising)
    dummies.add("leaving", lambda context: sys.exit(0))
    dummies.add("nothing", lambda context: None)  # type: ignore[arg-type, return-value]
    dummies.add("fine", good)
    result = run(dummies.registry, tmp_path)
    assert result.exit_code == 1
    raised, left, nothing, fine = summary(tmp_path)["checks"]
    assert raised["passed"] is False
    assert raised["measured"] is None
    assert raised["details"]["error"] == "ArithmeticError: the sky fell <b>[bold]"
    assert "in raising" in raised["details"]["traceback"]
    assert left["passed"] is False
    assert "must return an Outcome, got NoneType" in nothing["details"]["error"]
    assert fine["passed"] is True
    assert "the sky fell <b>[bold]" in result.output
    assert "the sky fell &lt;b&gt;[bold]" in (tmp_path / "index.html").read_text()


def test_a_figure_that_cannot_be_drawn_fails_its_check_only(
    dummies: Dummies, tmp_path: Path
) -> None:
    def undrawable(context: Context) -> Outcome:
        figure, axes = new_figure()
        axes.set_title(r"$\notacommand{$")
        return Outcome(1.0, 1.0, 0.1, True, figures=[Figure("broken", "No.", figure)])

    dummies.add("undrawable", undrawable)
    dummies.add("fine", good)
    assert run(dummies.registry, tmp_path).exit_code == 1
    assert [entry["passed"] for entry in summary(tmp_path)["checks"]] == [False, True]


@pytest.mark.parametrize("measured", [math.nan, {"a": 1.0, "b": math.nan}, torch.tensor(math.nan)])
def test_nan_never_passes(dummies: Dummies, tmp_path: Path, measured: Any) -> None:
    dummies.add("nan", lambda context: Outcome(measured, 1.0, 0.1, True))
    assert run(dummies.registry, tmp_path).exit_code == 1
    entry = summary(tmp_path)["checks"][0]
    assert entry["passed"] is False
    assert entry["details"]["not_a_number"] in (["measured"], ["b"])


def test_nan_never_passes_by_the_constructors_nor_in_an_interval() -> None:
    assert not Outcome.below(math.nan, 1.0).passed
    assert not Outcome.within({"a": math.nan}, 1.0, 1.0).passed
    assert not Outcome.within(1.0, math.nan, 1.0).passed
    assert not Outcome(1.0, 1.0, 0.1, True, interval=(math.nan, 1.0)).passed


def test_the_constructors_judge_every_name() -> None:
    assert Outcome.below({"a": 0.1, "b": 0.2}, 0.2).passed
    assert not Outcome.below({"a": 0.1, "b": 0.3}, 0.2).passed
    assert not Outcome.below({"a": 0.1, "b": -0.3}, 0.2).passed
    assert not Outcome.below({"a": 0.1, "b": 0.1}, {"a": 0.2, "b": 0.05}).passed
    assert Outcome.within({"a": 1.05, "b": 2.0}, {"a": 1.0, "b": 2.0}, 0.1).passed
    assert not Outcome.within({"a": 1.05, "b": 2.2}, {"a": 1.0, "b": 2.0}, 0.1).passed
    with pytest.raises(ValueError, match="names differ"):
        Outcome.within({"a": 1.0}, {"b": 1.0}, 0.1)
    with pytest.raises(ValueError, match="one number"):
        Outcome.below(1.0, {"a": 1.0})


def test_malformed_outcomes_are_refused() -> None:
    with pytest.raises(ValueError, match="empty dict"):
        Outcome({}, 1.0, 0.1, True)
    with pytest.raises(ValueError, match="interval"):
        Outcome(1.0, 1.0, 0.1, True, interval=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"rows\[1\]"):
        Table("t", ["a", "b"], [[1, 2], [1]])
    figure, _ = new_figure()
    with pytest.raises(ValueError, match="unique"):
        Outcome(1.0, 1.0, 0.1, True, figures=[Figure("a", "", figure), Figure("a", "", figure)])
    with pytest.raises(ValueError, match="lower case"):
        Figure("../escape", "", figure)


def test_a_warning_inside_a_check_is_kept(dummies: Dummies, tmp_path: Path) -> None:
    def warning(context: Context) -> Outcome:
        warnings.simplefilter("always")
        warnings.warn("rounding noise", RuntimeWarning, stacklevel=1)
        return good(context)

    dummies.add("warning", warning)
    assert run(dummies.registry, tmp_path).exit_code == 0
    details = summary(tmp_path)["checks"][0]["details"]
    assert details["warnings"] == ["RuntimeWarning: rounding noise"]


def test_checks_are_seeded_whatever_ran_before(dummies: Dummies, tmp_path: Path) -> None:
    draw = lambda context: Outcome(float(torch.rand(()) + np.random.rand()), None, None, True)  # noqa: E731
    dummies.add("first", draw)
    dummies.add("second", draw)
    run(dummies.registry, tmp_path)
    first, second = summary(tmp_path)["checks"]
    assert first["measured"] == second["measured"]
    run(dummies.registry, tmp_path, "--seed", "1")
    assert summary(tmp_path)["checks"][0]["measured"] != first["measured"]


# --- strict JSON -------------------------------------------------------------------------------


def test_summary_is_strict_json_whatever_the_details_hold(dummies: Dummies, tmp_path: Path) -> None:
    details = {
        "inf": math.inf, "nan": np.float32("nan"), "array": np.array([1.0, -math.inf]),
        "tensor": torch.tensor([1, 2]), "scalar": torch.tensor(0.5, requires_grad=True),
        "path": Path("a"), "dtype": torch.float64, "set": {2, 1}, 3: (True, np.bool_(False)),
        "integer": np.int64(7),
    }  # fmt: skip
    dummies.add("odd", lambda context: Outcome(math.inf, 1.0, 0.1, False, details=details))
    assert run(dummies.registry, tmp_path).exit_code == 1
    entry = summary(tmp_path)["checks"][0]
    assert entry["measured"] == "Infinity"
    assert entry["details"] == {
        "inf": "Infinity", "nan": "NaN", "array": [1.0, "-Infinity"], "tensor": [1, 2],
        "scalar": 0.5, "path": "a", "dtype": "torch.float64", "set": [1, 2],
        "3": [True, False], "integer": 7,
    }  # fmt: skip


def test_dump_refuses_what_slipped_through() -> None:
    assert jsonable(float("nan")) == "NaN"
    with pytest.raises(ValueError, match="JSON"):
        dump({"a": math.nan})


# --- interruption and resumption ---------------------------------------------------------------


def test_an_interrupted_run_keeps_what_it_finished_and_goes_on_from_there(
    dummies: Dummies, tmp_path: Path
) -> None:
    state = {"interrupt": True}

    def interrupted(context: Context) -> Outcome:
        if state["interrupt"]:
            raise KeyboardInterrupt
        return good(context)

    dummies.add("one", pictured)
    dummies.add("two", interrupted)
    dummies.add("three", good)
    result = run(dummies.registry, tmp_path)
    assert result.exit_code == 130
    assert "interrupted" in result.output
    content = summary(tmp_path)
    assert content["finished"] is False
    assert [entry["name"] for entry in content["checks"]] == ["one"]
    page = (tmp_path / "index.html").read_text()
    assert "Title one" in page
    assert "Pending: two, three" in page

    state["interrupt"] = False
    result = run(dummies.registry, tmp_path)
    assert result.exit_code == 0
    assert dummies.calls == {"one": 1, "two": 2, "three": 1}
    assert "one PASS (reused" in result.output
    assert "1 reused" in result.output
    content = summary(tmp_path)
    assert content["finished"] is True
    assert [entry["name"] for entry in content["checks"]] == ["one", "two", "three"]
    assert "data:image/png;base64" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    "arguments", [("--seed", "1"), ("--dtype", "float32"), ("--profile", "paper"), ("--fresh",)]
)
def test_another_setting_computes_anew(
    dummies: Dummies, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    dummies.add("one", good)
    run(dummies.registry, tmp_path)
    run(dummies.registry, tmp_path)
    assert dummies.calls == {"one": 1}
    run(dummies.registry, tmp_path, *arguments)
    assert dummies.calls == {"one": 2}


def test_other_versions_or_sources_compute_anew(
    dummies: Dummies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dummies.add("one", good)
    run(dummies.registry, tmp_path)
    monkeypatch.setattr("theory_checks.runner.library_hash", lambda: "edited")
    run(dummies.registry, tmp_path)
    assert dummies.calls == {"one": 2}
    monkeypatch.setattr("theory_checks.runner.module_source", lambda function: "edited")
    run(dummies.registry, tmp_path)
    assert dummies.calls == {"one": 3}
    monkeypatch.setattr("theory_checks.context.versions", lambda: {"torch": "9.9"})
    run(dummies.registry, tmp_path)
    assert dummies.calls == {"one": 4}
    run(dummies.registry, tmp_path)
    assert dummies.calls == {"one": 4}


def test_failures_lost_figures_and_broken_files_compute_anew(
    dummies: Dummies, tmp_path: Path
) -> None:
    dummies.add("failing", wrong)
    dummies.add("pictured", pictured)
    dummies.add("broken", good)
    run(dummies.registry, tmp_path)
    (tmp_path / "figures" / "pictured--slope.png").unlink()
    (tmp_path / "results" / "broken.json").write_text("{")
    run(dummies.registry, tmp_path)
    assert dummies.calls == {"failing": 2, "pictured": 2, "broken": 2}


# --- the cells of Context.map ------------------------------------------------------------------


def record(folder: Path, item: int) -> float:
    """A cell that leaves a trace and draws a random number; item 3 fails while told to."""
    with (folder / f"{item}.trace").open("a") as stream:
        stream.write("x")
    if item == 3 and (folder / "fail").exists():
        raise RuntimeError("cell 3 failed")
    return item + float(torch.rand(()))


def traces(folder: Path) -> dict[str, int]:
    """How often each cell ran."""
    return {path.stem: len(path.read_text()) for path in sorted(folder.glob("*.trace"))}


def test_cells_survive_a_failure_in_a_later_one(tmp_path: Path) -> None:
    context = Context(check="cells", cells=CellCache(tmp_path / "cells"))
    cell = functools.partial(record, tmp_path)
    (tmp_path / "fail").touch()
    with pytest.raises(RuntimeError, match="cell 3 failed"):
        context.map(cell, range(5))
    assert traces(tmp_path) == {"0": 1, "1": 1, "2": 1, "3": 1}
    (tmp_path / "fail").unlink()
    values = context.map(cell, range(5))
    assert traces(tmp_path) == {"0": 1, "1": 1, "2": 1, "3": 2, "4": 1}
    assert [int(value) for value in values] == [0, 1, 2, 3, 4]
    assert context.map(cell, [4, 0]) == [values[4], values[0]]
    assert sum(traces(tmp_path).values()) == 6
    for path in (tmp_path / "cells").glob("*.pickle"):
        path.write_bytes(path.read_bytes()[:5])
    assert context.map(cell, range(5)) == values


def test_parallel_cells_give_the_same_numbers_and_report_steps(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    class Hook:
        def message(self, text: str) -> None:
            pass

        def step(self, done: int, total: int) -> None:
            steps.append((done, total))

    def closure(item: int) -> float:
        # Settings may reach a cell through the context it closes over.
        return context.seed + item + float(torch.rand((), dtype=context.dtype))

    context = Context(seed=2, check="cells")
    alone = context.map(closure, range(4))
    context = Context(seed=2, jobs=2, check="cells", cells=CellCache(tmp_path), hook=Hook())
    assert context.map(closure, range(4)) == alone
    assert steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(list(tmp_path.glob("*.pickle"))) == 4
    assert len(set(alone)) == 4


def test_cell_keys_see_settings_items_and_what_a_function_uses() -> None:
    def make(source: str) -> Callable[[float], float]:
        namespace: dict[str, Any] = {"__name__": "planted"}
        exec(source, namespace)
        function: Callable[[float], float] = namespace["cell"]
        return function

    base = "factor = 2\ndef helper(x): return x + 1\ndef cell(x): return factor * helper(x)\n"
    reference = function_hash(make(base))
    assert function_hash(make(base)) == reference
    assert function_hash(make(base.replace("factor = 2", "factor = 3"))) != reference
    assert function_hash(make(base.replace("x + 1", "x - 1"))) != reference
    assert function_hash(make(base.replace("factor * ", "factor / "))) != reference
    assert function_hash(make(base + "def unrelated(x): return x\n")) == reference
    assert function_hash(functools.partial(record, Path("a"))) != function_hash(
        functools.partial(record, Path("b"))
    )
    assert canonical((1, 1.0, True, "1")) == canonical((1, 1.0, True, "1"))
    assert len({canonical(value) for value in (1, 1.0, True, "1", [1], (1,), {1: 1})}) == 7


def test_cells_refuse_what_no_key_can_be_made_of() -> None:
    opaque = object()
    with pytest.raises(TypeError, match="not plain data"):
        Context().map(float, [torch.zeros(3)])
    with pytest.raises(TypeError, match="closure 'opaque'"):
        Context().map(lambda item: (item, opaque), [1])


def test_the_context_chooses_by_profile_and_refuses_nonsense() -> None:
    assert Context(profile="quick").choose(quick=1, paper=2) == 1
    assert Context(profile="paper").choose(quick=1, paper=2) == 2
    with pytest.raises(ValueError, match="profile"):
        Context(profile="quickly")
    with pytest.raises(ValueError, match="jobs"):
        Context(jobs=0)


# --- selection and bad usage -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["--only", "theorem-2-quartic"], ["theorem-2-quartic"]),
        (["--only", "theorem-2"], ["theorem-2-quartic", "theorem-2-svm"]),
        (["--only", "*quartic*"], ["theorem-2-quartic"]),
        (["--only", "theorem-2-svm", "--only", "one"], ["one", "theorem-2-svm"]),
        (["--only", "one", "theorem-2-svm"], ["one", "theorem-2-svm"]),
        (["--only", "one,theorem-2-svm"], ["one", "theorem-2-svm"]),
        ([], ["one", "theorem-2-quartic", "theorem-2-svm"]),
    ],
)
def test_only_takes_names_groups_and_globs(
    dummies: Dummies, tmp_path: Path, only: list[str], expected: list[str]
) -> None:
    dummies.add("one", good)
    dummies.add("theorem-2-quartic", good, group="theorem-2")
    dummies.add("theorem-2-svm", good, group="theorem-2")
    assert run(dummies.registry, tmp_path, *only).exit_code == 0
    assert [entry["name"] for entry in summary(tmp_path)["checks"]] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "theorem-3"], "theorem-2"),
        (["--only", "one", "--only", "quartc"], "no check, group or glob 'quartc'"),
        (["--only", "zzz"], "known: one"),
        (["--only", ","], "names no check"),
        (["--jobs", "0"], "--jobs"),
        (["--jobs", "-2"], "--jobs"),
        (["--seed", "-1"], "--seed"),
        (["--profile", "quickly"], "--profile"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "nonsense"], "--device"),
        (["--device", "meta"], "'meta' is not available"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_usage_gives_status_two_and_says_why(
    dummies: Dummies, tmp_path: Path, arguments: list[str], message: str
) -> None:
    dummies.add("one", good)
    dummies.add("theorem-2-quartic", good, group="theorem-2")
    out = tmp_path / "out"
    result = invoke(dummies.registry, "run", "--out", out, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert dummies.calls == {}
    assert not out.exists()


def test_no_checks_and_a_file_as_folder_are_usage_errors(dummies: Dummies, tmp_path: Path) -> None:
    empty = invoke(Registry(), "run", "--out", tmp_path)
    assert empty.exit_code == 2
    assert "no checks to run" in empty.output
    dummies.add("one", good)
    (tmp_path / "file").touch()
    assert invoke(dummies.registry, "run", "--out", tmp_path / "file").exit_code == 2


def test_list_shows_every_check(dummies: Dummies) -> None:
    dummies.add("one", good)
    dummies.add("two", good, group="other")
    result = invoke(dummies.registry, "list")
    assert result.exit_code == 0
    for text in ("one", "two", "Title two", "other", "Eq. (1)"):
        assert text in result.output


def test_the_registry_refuses_duplicates_bad_names_and_missing_claims() -> None:
    def claimed(context: Context) -> Outcome:
        """A claim over
        two lines.

        More.
        """
        return good(context)

    registry = Registry()
    registry.add(Check("late", "t", "s", "g", claimed, order=2))
    registry.add(Check("early", "t", "s", "g", claimed, order=1))
    assert [entry.name for entry in registry] == ["early", "late"]
    assert registry["late"].claim == "A claim over two lines."
    with pytest.raises(ValueError, match="registered already"):
        registry.add(Check("late", "t", "s", "g", claimed))
    with pytest.raises(ValueError, match="lower case"):
        registry.add(Check("Not a slug", "t", "s", "g", claimed))
    with pytest.raises(ValueError, match="docstring"):
        registry.add(Check("silent", "t", "s", "g", good))


# --- the page ----------------------------------------------------------------------------------


def test_the_page_holds_every_check_its_figures_and_nothing_from_elsewhere(
    dummies: Dummies, tmp_path: Path
) -> None:
    dummies.add("one", good)
    dummies.add("two", pictured)
    dummies.add("three", wrong)
    run(dummies.registry, tmp_path)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for name in ("one", "two", "three"):
        assert f'<a href="#{name}">' in page
        assert f'id="{name}"' in page
    assert "The claim of a dummy, with <code>code</code> &amp; &lt;markup&gt;." in page
    assert "A second paragraph" not in page
    assert 'alt="a rising line"' in page
    assert "Table 1. Errors" in page
    assert "A slope of 1." in page
    assert torch.__version__ in page
    assert page.count("data:image/png;base64,") == 1
    png = tmp_path / "figures" / "two--slope.png"
    assert png.read_bytes().startswith(b"\x89PNG")
    sources = re.findall(r"(?:src|href)=\"([^\"]{0,30})", page)
    assert all(source.startswith(("#", "data:")) for source in sources)
    assert not re.search(r"<script|<link|@import|url\(", page)
    assert not list(tmp_path.rglob(".*"))  # no temporary file is left


def test_numbers_are_written_for_people() -> None:
    assert numbers.number(1.0004) == "1"
    assert numbers.number(0.012345) == "0.01235"
    assert numbers.number(-2.5e-7) == "−2.5\u00a0×\u00a010⁻⁷"
    assert numbers.number(1e-12) == "10⁻¹²"
    assert numbers.number(30000) == "30\u2009000"
    assert numbers.number(True) == "yes"
    assert numbers.number(None) == "–"
    assert numbers.number("NaN") == "NaN"
    assert numbers.column([0.1, 0.03162, 0.0]) == ["0.10000", "0.03162", "0.00000"]
    assert numbers.column([1.0, 2.5e-7]) == ["1.00\u00a0×\u00a010⁰", "2.50\u00a0×\u00a010⁻⁷"]
    assert numbers.column([1, None, "a"]) == ["1", "–", "a"]
    assert numbers.lines({"a": 1.0, "b": 2.0, "c": 3.0}, limit=2) == ["a: 1", "b: 2", "and 1 more"]
    assert numbers.seconds(3725.0) == "1 h 02 min"


def test_figures_leave_the_global_style_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    _, axes = new_figure(2, 3)
    assert axes.shape == (2, 3)
    slope_plot(axes[0, 0], [0.1, 0.2, 0.4], {"a": ([math.nan, 0.1, 0.2], None)}, expected=2.0)
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(ValueError, match="rows and columns"):
        new_figure(0, 1)


# --- the real command --------------------------------------------------------------------------

PLANTED = '''
"""Two checks, the second of which hangs until it is killed."""
import sys, time
from theory_checks.cli import make_app
from theory_checks.registry import Outcome, Registry, check

registry = Registry()

@check(name="first", title="First", source="Eq. (1)", group="g", registry=registry)
def first(context):
    """Holds."""
    return Outcome.below(context.map(abs, [0.0, -1e-14])[1], 1e-12)

@check(name="second", title="Second", source="Eq. (2)", group="g", registry=registry)
def second(context):
    """Hangs."""
    print("hanging", flush=True)
    time.sleep(60)

make_app(registry)()
'''


def environment() -> dict[str, str]:
    """The environment of a subprocess that finds the checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path}


def test_a_killed_process_leaves_what_it_finished(tmp_path: Path) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    out = tmp_path / "out"
    command = [sys.executable, str(script), "run", "--jobs", "1", "--out", str(out)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("hanging"):
                break
        process.terminate()
        lines += process.stdout.readlines()
    assert process.returncode == 130
    assert any("first PASS" in line for line in lines)
    content = summary(out)
    assert content["finished"] is False
    assert [(entry["name"], entry["passed"]) for entry in content["checks"]] == [("first", True)]


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "theory_checks", "run", "--only", "no-such-check"]
    done = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "--only" in done.stderr


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(entry_point, "_NEEDED", ("rich", "no_such_package_here"))
    with pytest.raises(SystemExit) as caught:
        entry_point.main()
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "needs no_such_package_here" in message
    assert 'pip install "ode-stopping[checks]"' in message
