"""Interrupted runs of the checks go on where they stopped; cells of `Context.map` are cached."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dummy_checks import Dummies, good, pictured, run, summary, wrong

from theory_checks import checks, fingerprint
from theory_checks.cells import CellCache
from theory_checks.context import Context
from theory_checks.fingerprint import canonical, function_hash
from theory_checks.registry import Outcome

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
    files = list((tmp_path / "cells").glob("*.json"))
    assert len(files) == 5
    for path in files:
        path.write_bytes(path.read_bytes()[:5])
    assert context.map(cell, range(5)) == values
    assert sum(traces(tmp_path).values()) == 11


def test_parallel_cells_give_the_same_numbers_and_report_steps(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    class Hook:
        def message(self, text: str) -> None:
            pass

        def warning(self, text: str) -> None:
            raise AssertionError(text)

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
    assert len(list(tmp_path.glob("*.json"))) == 4
    assert len(set(alone)) == 4


def test_cell_keys_see_settings_items_and_the_source_of_the_module(tmp_path: Path) -> None:
    """An edit of the file is an edit of the key, even where the function itself stayed."""
    file = tmp_path / "planted_cells.py"

    def key(source: str) -> str:
        file.write_text(source, encoding="utf-8")
        namespace: dict[str, Any] = {"__name__": "planted_cells"}
        exec(compile(source, str(file), "exec"), namespace)
        return function_hash(namespace["cell"])

    base = "factor = 2\ndef helper(x): return x + 1\ndef cell(x): return factor * helper(x)\n"
    reference = key(base)
    assert key(base) == reference
    assert key(base.replace("factor = 2", "factor = 3")) != reference
    assert key(base.replace("x + 1", "x - 1")) != reference
    assert key(base.replace("factor * ", "factor / ")) != reference
    assert len({function_hash(functools.partial(record, Path(name))) for name in "ab"}) == 2
    assert len({function_hash(bound) for bound in (closing_over(1), closing_over(2))}) == 2
    nested = [closing_over(functools.partial(record, Path(name))) for name in "ab"]
    assert function_hash(nested[0]) != function_hash(nested[1])
    assert canonical((1, 1.0, True, "1")) == canonical((1, 1.0, True, "1"))
    assert len({canonical(value) for value in (1, 1.0, True, "1", [1], (1,), {1: 1})}) == 7


def closing_over(value: object) -> Callable[[float], object]:
    """A cell with something bound to it."""
    return lambda item: (item, value)


def test_an_edit_of_a_source_file_of_the_libraries_is_an_edit_of_every_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {name: tmp_path / name for name in fingerprint.LIBRARIES}
    files = {
        "ode_stopping/deep/down.py": True,
        "discrete/rule.py": True,
        "theory_checks/studies.py": True,
        "theory_checks/checks/_shared.py": True,
        "theory_checks/checks/one.py": False,  # of its own key only
        "theory_checks/report/html.py": False,  # presents numbers
    }
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a = 1\n", encoding="utf-8")

    def found(name: str) -> SimpleNamespace:
        return SimpleNamespace(submodule_search_locations=[str(folders[name])])

    monkeypatch.setattr("importlib.util.find_spec", found)
    for name, enters in files.items():
        before = fingerprint.library_hash.__wrapped__()
        (tmp_path / name).write_text("a = 2\n", encoding="utf-8")
        assert (fingerprint.library_hash.__wrapped__() != before) is enters, name


def test_no_check_imports_another_one() -> None:
    """A key holds the source of one check and of the shared files, whose names begin with "_"."""
    for path in Path(checks.__path__[0]).glob("*.py"):
        assert not re.search(r"^from \.[a-z]", path.read_text("utf-8"), re.M)


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
