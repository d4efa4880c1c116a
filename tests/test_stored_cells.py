"""Finished cells on disk: what comes back is what was stored, and anything else is foreign."""

from __future__ import annotations

import ast
import base64
import importlib
import json
import math
import os
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from theory_checks import cells, checks, smooth_svm
from theory_checks.cells import MISSING, CellCache, conforms, decode, encode, returned
from theory_checks.sealed import ForeignError, read_sealed, write_sealed


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
        (Other(), Any, "test_stored_cells.Other"),
        (Point(1.0), Any, "test_stored_cells.Point"),  # no annotation names it
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
        {"dataclass": ["test_stored_cells.Point", {"x": 1.0}]},
        {"dataclass": ["test_stored_cells.Point", []]},
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
