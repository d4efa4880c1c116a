"""A folder of results may come from anywhere: nothing in it is executed, and its content is tested.

What `theory_checks` stores is JSON with a format, a version and a checksum. What is not as it was
written is computed anew, and said; figures are read inside of the folder only.
"""

from __future__ import annotations

import ast
import base64
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dummy_checks import ROOT, Dummies, good, pictured, run, summary

from theory_checks import results
from theory_checks.context import Context
from theory_checks.registry import Outcome
from theory_checks.report import Header, render, summarise
from theory_checks.sealed import ForeignError, dump, write_sealed

TRAVERSALS = ["../secret.png", "../../etc/passwd", "figures/../../secret.png", "secret.txt"]


# --- nothing is executed -----------------------------------------------------------------------


class Bomb:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def square(item: int) -> float:
    """A cell."""
    return float(item * item)


def squares(context: Context) -> Outcome:
    """A check with three cells."""
    values = context.map(square, [1, 2, 3])
    return Outcome.within(sum(values), 14.0, 0.0)


def test_a_planted_pickle_is_never_loaded(dummies: Dummies, tmp_path: Path) -> None:
    dummies.add("one", squares)
    out, mark = tmp_path / "out", tmp_path / "executed"
    run(dummies.registry, out)
    planted = pickle.dumps(Bomb(mark))
    files = [*(out / "cells" / "one").glob("*.json"), out / "results" / "one.json"]
    assert len(files) == 4
    for path in files:
        path.write_bytes(planted)
        path.with_suffix(".pickle").write_bytes(planted)  # the name of former versions
    result = run(dummies.registry, out)
    assert result.exit_code == 0, result.output
    assert not mark.exists()
    assert dummies.calls == {"one": 2}
    assert summary(out)["checks"][0]["measured"] == 14.0
    for path in files:
        assert f"{path.name} is not strict JSON" in result.output
    assert "one is computed anew" in result.output
    again = run(dummies.registry, out)
    assert "reused" in again.output
    assert "anew" not in again.output.replace("computes them anew", "")


def sources() -> Iterator[Path]:
    """Every file of Python code outside of the tests, which are run on purpose."""
    for folder in ("ode_stopping", "discrete", "theory_checks", "benchmarks", "docs"):
        yield from (ROOT / folder).rglob("*.py")


def executing(source: str) -> list[str]:
    """Imports and calls by which code reads files that may execute something."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        banned = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
        found += [name for name in names if name.partition(".")[0] in banned]
        if isinstance(node, ast.Call):
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            called = ast.unparse(node.func)
            if called in ("joblib.load", "pd.read_pickle", "pandas.read_pickle"):
                found.append(called)
            if called == "torch.load" and options.get("weights_only") != "True":
                found.append(called)
            if options.get("allow_pickle", "False") != "False":
                found.append(called)
    return found


def test_no_file_that_may_execute_something_is_read_anywhere() -> None:
    assert executing("import pickle\ntorch.load(p)\nnp.load(p, allow_pickle=True)\njoblib.load(p)")
    paths = list(sources())
    assert len(paths) > 150
    assert {str(path): found for path in paths if (found := executing(path.read_text()))} == {}


# --- malformed results -------------------------------------------------------------------------


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in a JSON, containers included."""
    yield path
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from leaves(content[key], (*path, key))


def planted(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place."""
    if not path:
        return value
    copy: Any = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = planted(content[path[0]], path[1:], value)
    return copy


WRONG: list[Any] = [None, True, 7, -1.5, "text", "<b>", [], [1], {}, {"a": {"b": [1]}}, [[]]]


def test_no_wrong_value_in_a_stored_result_breaks_a_run(dummies: Dummies, tmp_path: Path) -> None:
    """Every value replaced by every wrong one, with the right checksum: reused whole, or not."""
    dummies.add("two", pictured)
    run(dummies.registry, tmp_path)
    path = tmp_path / "results" / "two.json"
    original = json.loads(path.read_text())["content"]
    (check,) = dummies.registry
    key = original["key"]
    entry = results.load(check, key, tmp_path)
    assert entry is not None
    assert entry.reused
    header = Header("quick", "cpu", "float64", 0, {}, "", True)
    refused = 0
    tried = 0
    for place in leaves(original):
        for value in WRONG:
            write_sealed(path, results.FORMAT, planted(original, place, value))
            tried += 1
            try:
                found = results.load(check, key, tmp_path)
            except ForeignError:
                refused += 1
                continue
            if found is None:
                assert place[0] in ("key", "passed")
                continue
            # What is accepted has the types of a result and can be shown.
            page = render(tmp_path, header, [found])
            assert "<b>" not in page.replace("<b>Figure", "").replace("<b>Table", "")
            dump(summarise(header, [found]))
    assert tried > 500
    assert refused > 0.5 * tried


@pytest.mark.parametrize("name", ["title", "claim", "source", "group", "name"])
def test_a_result_of_another_check_is_computed_anew(
    dummies: Dummies, tmp_path: Path, name: str
) -> None:
    dummies.add("one", good)
    run(dummies.registry, tmp_path)
    path = tmp_path / "results" / "one.json"
    content = json.loads(path.read_text())["content"]
    write_sealed(path, results.FORMAT, {**content, name: "another"})
    result = run(dummies.registry, tmp_path)
    assert result.exit_code == 0
    assert "one.json is the result of another check: one is computed anew" in result.output
    assert dummies.calls == {"one": 2}


def test_a_result_of_a_former_version_is_computed_anew(dummies: Dummies, tmp_path: Path) -> None:
    """Before there was a checksum, the file held the fields alone."""
    dummies.add("one", good)
    run(dummies.registry, tmp_path)
    path = tmp_path / "results" / "one.json"
    path.write_text(json.dumps(json.loads(path.read_text())["content"]))
    result = run(dummies.registry, tmp_path)
    assert "one.json is not a file of the format 'ode-stopping result'" in result.output
    assert dummies.calls == {"one": 2}


# --- figures -----------------------------------------------------------------------------------


@pytest.fixture(name="folder")
def make_folder(dummies: Dummies, tmp_path: Path) -> Path:
    """A folder with a figure, beside two secrets."""
    dummies.add("two", pictured)
    out = tmp_path / "deep" / "out"
    run(dummies.registry, out)
    (out.parent / "secret.png").write_bytes((out / "figures/two--slope.png").read_bytes() + b"key")
    (out / "secret.txt").write_text("key")
    return out


@pytest.mark.parametrize("file", [*TRAVERSALS, "/etc/hostname", "figures/two--other.png", ""])
def test_a_result_names_no_figure_but_its_own(dummies: Dummies, folder: Path, file: str) -> None:
    path = folder / "results" / "two.json"
    content = json.loads(path.read_text())["content"]
    content["figures"][0]["file"] = file
    write_sealed(path, results.FORMAT, content)
    result = run(dummies.registry, folder)
    assert result.exit_code == 0, result.output
    assert dummies.calls == {"two": 2}
    assert "names a figure that is not the check's own" in result.output
    assert summary(folder)["checks"][0]["passed"]
    drawn = (folder / "figures" / "two--slope.png").read_bytes()
    assert base64.b64encode(drawn).decode() in (folder / "index.html").read_text()


@pytest.mark.parametrize("kind", ["link", "content", "folder"])
def test_a_figure_that_is_another_file_is_drawn_anew(
    dummies: Dummies, folder: Path, kind: str
) -> None:
    secret = folder.parent / "secret.png"
    kept = secret.read_bytes()
    figure = folder / "figures" / "two--slope.png"
    drawn = figure.read_bytes()
    figure.unlink()
    if kind == "link":
        secret.write_bytes(drawn)  # even where the checksum is right
        kept = drawn
        figure.symlink_to(secret)
    elif kind == "content":
        figure.write_bytes(kept)
    else:
        (folder / "figures").rmdir()
        (folder.parent / "elsewhere").mkdir()
        (folder / "figures").symlink_to(folder.parent / "elsewhere")
    result = run(dummies.registry, folder)
    if kind == "folder":
        assert result.exit_code == 3
        assert "figures: it is a link to a place outside of the folder" in result.output
        assert list((folder.parent / "elsewhere").iterdir()) == []
        return
    assert result.exit_code == 0, result.output
    assert "figures/two--slope.png is not there as it was drawn" in result.output
    assert dummies.calls == {"two": 2}
    assert figure.read_bytes() == drawn
    assert not figure.is_symlink()
    assert secret.read_bytes() == kept  # replaced, not written through


@pytest.mark.parametrize("file", [*TRAVERSALS, "/etc/hostname", "figures", "figures/none.png"])
def test_the_page_reads_pictures_inside_the_folder_only(folder: Path, file: str) -> None:
    assert results.read_figure("figures/two--slope.png", folder) is not None
    assert results.read_figure(file, folder) is None
