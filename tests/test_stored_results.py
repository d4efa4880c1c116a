"""A folder of results may come from anywhere: nothing in it is executed, and its content is tested.

What `theory_checks` stores is JSON with a format, a version and a checksum. What is not as it was
written is computed anew, and said; figures are read inside of the folder only.
"""

from __future__ import annotations

import ast
import base64
import importlib
import json
import math
import os
import pickle
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dummy_checks import ROOT, Dummies, good, pictured, run, summary
from numpy.typing import NDArray
from torch import Tensor

from theory_checks import cells, checks, results, smooth_svm
from theory_checks.cells import MISSING, CellCache, conforms, decode, encode, returned
from theory_checks.context import Context
from theory_checks.registry import Outcome
from theory_checks.report import Header, render, summarise
from theory_checks.sealed import ForeignError, dump, read_sealed, write_sealed

TRAVERSALS = ["../secret.png", "../../etc/passwd", "figures/../../secret.png", "secret.txt"]


@dataclass(frozen=True)
class Point:
    """A record inside of another one."""

    x: float
    label: str | None = None


@dataclass(frozen=True)
class Record:
    """One of everything that a cell may return."""

    point: Point
    numbers: tuple[float, ...]
    array: NDArray[np.float64]
    tensors: tuple[Tensor, ...]
    table: dict[str, dict[str, float]]
    flags: list[bool] = field(default_factory=list)
    index: int | None = None


class Other:
    """No dataclass."""


RECORD = Record(
    Point(-0.0, "a\n\u2200"),
    (0.1, math.inf, -math.inf, 5e-324, 3.0),
    np.array([[1.5, -math.inf], [1e300, 0.1]]),
    (torch.tensor(0.1, dtype=torch.float64), torch.zeros(0, 3), torch.ones(2, dtype=torch.int64)),
    {"dT": {"theta": 1e-9}},
    [True, False],
    10**40,
)


def same(first: Any, second: Any) -> bool:
    """Whether two results are the same in types and bits."""
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        alike = first.dtype == second.dtype and first.shape == second.shape
        return alike and cells._bytes_of(first) == cells._bytes_of(second)
    if isinstance(first, np.ndarray | np.generic):
        alike = first.dtype == second.dtype and first.shape == second.shape
        return alike and first.tobytes() == second.tobytes()
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return same(list(first.items()), list(second.items()))
    if hasattr(first, "__dataclass_fields__"):
        return same(vars(first), vars(second))
    return repr(first) == repr(second)  # sees the sign of zero


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (RECORD, Record),
        ([RECORD, RECORD], list[Record]),
        ((Point(1.0), 2), tuple[Point, int]),
        ({(1, "a"): 2.0, None: -0.0}, Any),
        ([math.nan, 1, True, None, "nan", [], (), {}], Any),
        ({"tensor": ["float64", [], ""], "dict": 1}, dict[str, Any]),  # looks like our own marks
        (np.float64(0.1), float),
        (np.int64(3), int),
        (np.bool_(True), bool),
        (np.array(2.0, dtype=np.float32), Any),
        (np.array([1 + 2j, math.nan]), Any),
        (np.arange(6).reshape(2, 3).T, Any),
        (torch.tensor([1.5, math.nan], dtype=torch.bfloat16), Tensor),
        (torch.tensor([1 + 2j]).conj(), Tensor),
        (torch.arange(6.0).reshape(2, 3).T, Tensor),
        (torch.tensor([True]), Tensor),
    ],
)
def test_a_result_comes_back_as_it_was(tmp_path: Path, value: Any, kind: Any) -> None:
    assert same(decode(json.loads(json.dumps(encode(value, kind))), kind), value)
    cache = CellCache(tmp_path)
    assert cache.load("key", kind) is MISSING
    cache.save("key", value, kind)
    assert same(cache.load("key", kind), value)
    assert CellCache(tmp_path, reuse=False).load("key", kind) is MISSING
    assert [path.name for path in tmp_path.iterdir()] == ["key.json"]


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (Other(), Any, "test_stored_results.Other"),
        (Point(1.0), Any, "test_stored_results.Point"),  # no annotation names it
        ({1, 2}, Any, "builtins.set"),
        (np.array([Other()]), Any, "numpy.ndarray"),
        (torch.ones(2, requires_grad=True), Tensor, "requires_grad=True"),
        (torch.ones(2).to_sparse(), Tensor, "dense"),
        (Point("1"), Point, "annotated"),  # type: ignore[arg-type]
        ((1.0, "2"), tuple[float, float], "annotated"),
        (1.0, str, "annotated"),
    ],
)
def test_what_cannot_be_stored_is_named(
    tmp_path: Path, value: Any, kind: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        CellCache(tmp_path).save("key", value, kind)
    assert list(tmp_path.iterdir()) == []


def test_conforming_is_what_type_checkers_call_it() -> None:
    assert conforms(1, float)
    assert not conforms(1.0, int)
    assert not conforms(True, int)
    assert not conforms(True, float)
    assert not conforms(1, bool)
    assert conforms((), tuple[float, ...])
    assert not conforms((1.0,), tuple[float, float])
    assert not conforms(np.zeros(2, dtype=np.float32), NDArray[np.float64])
    assert conforms({"a": [None, 1.0]}, dict[str, list[float | None]])
    assert not conforms({"a": [None, "1"]}, dict[str, list[float | None]])


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


def test_the_classes_in_a_file_are_those_of_the_annotation(tmp_path: Path) -> None:
    """A name in a file imports nothing and makes nothing that the cell does not return."""
    for label in ("os.system", "subprocess.Popen", f"{__name__}.Record", f"{__name__}.Other"):
        content = {"key": "k", "result": {"dataclass": [label, {"x": 1.0, "label": None}]}}
        write_sealed(tmp_path / "k.json", cells.FORMAT, content)
        with pytest.raises(ForeignError, match="something else than its cell returns"):
            CellCache(tmp_path).load("k", Point)


# --- malformed cells ---------------------------------------------------------------------------

ONE = base64.b64encode(np.ones(1).tobytes()).decode()


@pytest.mark.parametrize(
    "result",
    [
        "1.0",
        None,
        True,
        {},
        {"float": "1e5"},
        {"float": []},
        {"unknown": 1},
        {"tuple": 1.0},
        {"tuple": [1.0], "dict": []},
        {"dict": [[{"dict": []}, 1.0]]},  # a key that is no key
        {"dict": [1.0]},
        {"array": ["<f8", [2], ONE]},
        {"array": ["<f8", [10**12], ONE]},
        {"array": ["<f8", [-1], ONE]},
        {"array": ["<f8", 1, ONE]},
        {"array": ["|O", [1], ONE]},
        {"array": ["f8,f8", [1], ONE]},
        {"array": ["<f8", [1], "not base64"]},
        {"array": ["<f8", [1]]},
        {"tensor": ["Tensor", [1], ONE]},
        {"tensor": ["float64", [2], ONE]},
        {"tensor": ["float64", [True], ONE]},
        {"scalar": ["<f8", [], ""]},
        {"dataclass": ["test_stored_results.Point", {"x": 1.0}]},
        {"dataclass": ["test_stored_results.Point", []]},
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_cell_of_another_form_is_foreign(tmp_path: Path, result: Any) -> None:
    """With the right checksum: the content is looked at, and never raises anything else."""
    write_sealed(tmp_path / "k.json", cells.FORMAT, {"key": "k", "result": result})
    with pytest.raises(ForeignError, match=r"^k\.json "):
        CellCache(tmp_path).load("k", float)


def replaced(content: Any, name: str, value: Any) -> Any:
    return {**content, name: value}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda sealed: replaced(sealed, "format", "another"), "not a file of the format"),
        (lambda sealed: replaced(sealed, "version", 2), "another version"),
        (lambda sealed: replaced(sealed, "version", True), "another version"),
        (lambda sealed: replaced(sealed, "sha256", "0" * 64), "differs from its checksum"),
        (lambda sealed: replaced(sealed, "content", {"key": "k", "result": 3.0}), "checksum"),
        (lambda sealed: replaced(sealed, "more", 1), "checksum"),
        (lambda sealed: [sealed], "not a file of the format"),
        (lambda sealed: None, "not a file of the format"),
    ],
)
def test_format_version_and_checksum(
    tmp_path: Path, edit: Callable[[Any], Any], message: str
) -> None:
    cache, path = CellCache(tmp_path), tmp_path / "k.json"
    cache.save("k", 2.0, float)
    sealed = json.loads(path.read_text())
    path.write_text(json.dumps(edit(sealed)))
    with pytest.raises(ForeignError, match=message):
        cache.load("k", float)
    path.write_text(json.dumps(sealed))
    assert cache.load("k", float) == 2.0
    (tmp_path / "other.json").write_text(json.dumps(sealed))
    with pytest.raises(ForeignError, match="another cell"):
        cache.load("other", float)


@pytest.mark.parametrize(
    "text",
    ["", "{", "NaN", '{"a": 1e999}', '{"a": -Infinity}', "1" * 5000, '"\\ud800"', "[" * 100_000],
    ids=range(8),
)
def test_what_is_no_strict_json_is_foreign(tmp_path: Path, text: str) -> None:
    (tmp_path / "k.json").write_text(text)
    with pytest.raises(ForeignError, match=r"^k\.json "):
        read_sealed(tmp_path / "k.json", "any")


def test_pipes_folders_and_dead_links_are_foreign(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")  # reading it would wait for ever
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    for name in ("pipe", "folder", "link", "bytes"):
        with pytest.raises(ForeignError, match=f"^{name}.json "):
            read_sealed(tmp_path / f"{name}.json", "any")
    assert read_sealed(tmp_path / "none.json", "any") is None


def test_every_cell_of_the_checks_returns_what_can_be_stored() -> None:
    """A dataclass has to be named by the annotation; found by the calls of `map` in the source."""
    found = []
    modules = [
        importlib.import_module(f"{package.__name__}.{info.name}")
        for package in (checks, smooth_svm)
        for info in pkgutil.iter_modules(package.__path__)
    ]
    for module in modules:
        for node in ast.walk(ast.parse(Path(module.__file__ or "").read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr != "map" or "context" not in ast.unparse(node.func.value):
                continue
            assert isinstance(node.args[0], ast.Name), ast.unparse(node)
            kind = returned(getattr(module, node.args[0].id))
            assert kind is not Any, f"{module.__name__}.{node.args[0].id} has no return annotation"
            cells._classes(kind)
            found.append(node.args[0].id)
    assert len(found) >= 20


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
