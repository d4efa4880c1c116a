"""The notebooks as committed: complete, in order, without errors or paths of a machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[Any]:
    return [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]


def test_all_nine_are_there() -> None:
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{n:02}" for n in range(1, 10)]


@every_notebook
def test_outputs_are_those_of_one_run_from_clean(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell["outputs"])


@every_notebook
def test_nothing_of_a_machine_is_in_it(path: Path) -> None:
    assert path.stat().st_size < 1_000_000
    for cell in code_cells(path):
        printed = "".join("".join(output.get("text", [])) for output in cell["outputs"])
        # A warning that nobody meant to show prints the file that it comes from.
        assert not re.search(r"(site-packages|\.py:\d+:|/home/|/tmp/)", printed), printed


@every_notebook
def test_no_setting_inside_lets_an_error_pass(path: Path) -> None:
    """Tags and metadata could skip a cell, allow it to fail, or give it another time limit."""
    notebook = json.loads(path.read_text("utf-8"))
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    assert not any(cell["metadata"] for cell in notebook["cells"])


@every_notebook
def test_links_lead_somewhere(path: Path) -> None:
    cells = json.loads(path.read_text("utf-8"))["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (FOLDER / target).exists(), target
