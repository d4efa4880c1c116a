"""The pages on events: tables are those of the tests, code prints what is printed below it."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from event_oracle import Problem
from pages import missing_targets, printed
from test_public_examples import CANCELLING, PROBLEMS
from test_public_outcomes import OUTCOMES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXAMPLES = DOCS / "public-examples.md"
COMPARISONS = [DOCS / "from-torchdiffeq.md", DOCS / "from-diffrax.md"]
PAGES = [EXAMPLES, *COMPARISONS]
PAIR = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL)
ASKED = {
    "time": "a time",
    "end time": "the end time",
    "at": "a value at a time",
    "state": "the state at an event",
    "after": "the state behind a reset",
    "end": "the state at the end",
}


def outcome_of(problem: Problem) -> str:
    if problem.name in CANCELLING:
        return "right by the size of their parts: 1.6e-5 of what is left"
    return "right"


def problem_rows() -> list[str]:
    head = [
        "| problem | seen at | asked | leaves | outcome |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = []
    for one in PROBLEMS:
        asked = ", ".join(ASKED[kind] for kind in dict.fromkeys(kind for kind, *_ in one.asked))
        leaves = ", ".join(f"`{name}`" for name in one.leaves)
        rows.append(f"| {one.name} | {one.source} | {asked} | {leaves} | {outcome_of(one)} |")
    return head + rows


def outcome_rows() -> list[str]:
    rows = [f"| {name} | {seen} | {says} |" for name, (says, seen) in OUTCOMES.items()]
    return ["| situation | seen at | outcome |", "| --- | --- | --- |", *rows]


TABLES = {"problems": problem_rows, "outcomes": outcome_rows}


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_those_of_the_tests(name: str) -> None:
    text = EXAMPLES.read_text(encoding="utf-8")
    found = re.search(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert found is not None
    assert found[1].strip().splitlines() == TABLES[name]()


def pairs() -> list[object]:
    found = []
    for page in COMPARISONS:
        for place, (code, shown) in enumerate(PAIR.findall(page.read_text(encoding="utf-8"))):
            # Compiling takes jax some seconds a block.
            marks = pytest.mark.slow if "import diffrax" in code else ()
            found.append(pytest.param(code, shown, id=f"{page.stem}-{place}", marks=marks))
    return found


@pytest.mark.parametrize(("code", "shown"), pairs())
def test_code_prints_what_is_printed_below_it(code: str, shown: str) -> None:
    if "import diffrax" not in code:
        assert printed(code, "page") == shown
        return
    if find_spec("diffrax") is None:
        pytest.skip("diffrax is an optional extra")
    # jax keeps global settings: in a process of its own, and with its own warnings.
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == shown


@pytest.mark.parametrize("page", COMPARISONS, ids=lambda page: page.stem)
def test_every_block_has_its_output(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(PAIR.findall(text)) == text.count("```python") >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    assert missing_targets(page) == []
    wrong = (DOCS / "when-is-it-wrong.md").read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^## (.*)$", wrong, re.MULTILINE)
    }
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\(when-is-it-wrong\.md#([^)]+)\)", text)) <= anchors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_readme_leads_to_the_page(page: Path) -> None:
    assert f"](docs/{page.name})" in (ROOT / "README.md").read_text(encoding="utf-8")
