"""Run the notebooks from clean: `python notebooks/run.py [--write] [NAME ...]`.

Every code cell runs in a fresh kernel, in order; the first error ends the run with status 1.
`--write` puts the outputs into the files, without what changes from run to run.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent
CELL_LIMIT = 110  # seconds; a notebook is to stay below two minutes


def cleared(notebook: Any) -> Any:
    """The notebook as nobody has run it."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """The outputs, with what a stream printed in pieces put together: the cuts are chance."""
    kept: list[Any] = []
    for output in outputs:
        same = kept and output.output_type == kept[-1].output_type == "stream"
        if same and output.name == kept[-1].name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def run(path: Path, *, write: bool) -> float:
    """Run one notebook, and return the seconds that it took.

    Raises:
        CellExecutionError: A cell failed.
    """
    notebook = cleared(nbformat.read(path, as_version=4))
    begin = time.perf_counter()
    client = NotebookClient(notebook, timeout=CELL_LIMIT, resources={"metadata": {"path": FOLDER}})
    client.execute()
    seconds = time.perf_counter() - begin
    for cell in notebook.cells:
        cell.metadata = {}  # times of execution
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    if write:
        nbformat.write(notebook, path)
    return seconds


def main(arguments: list[str]) -> int:
    """The command."""
    write = "--write" in arguments
    named = [argument for argument in arguments if argument != "--write"]
    paths = [FOLDER / name for name in named] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        print(f"{path.name} ...", end=" ", flush=True)
        try:
            print(f"{run(path, write=write):.0f} s", flush=True)
        except CellExecutionError as error:
            print(f"FAILED\n{error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
