"""Selection, bad usage, the page, and the real command of `theory_checks`."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dummy_checks import ROOT, Dummies, good, invoke, pictured, run, summary, wrong

from theory_checks import __main__ as entry_point
from theory_checks.context import Context
from theory_checks.plotting import new_figure, slope_plot
from theory_checks.registry import Check, Outcome, Registry
from theory_checks.report import numbers

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
