"""The page "When is it wrong?": its numbers are those that its script prints, its code runs."""

from __future__ import annotations

import importlib
import math
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"
SCRIPT = DOCS / "failures"
PAGE = DOCS / "when-is-it-wrong.md"
# Those that take about a second or less; the script makes all of them.
CHEAP = (
    "lost",
    "diverging",
    "dip_in_a_step",
    "time_jump",
    "state_jump",
    "arithmetic",
    "stochastic",
    "increase",
    "means",
    "example_evidence",
    "example_check",
    "example_any",
)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
# Figures below this are errors: they are compared by their size only.
ERROR = 1e-3

pytest.importorskip("matplotlib")


@cache
def script(name: str = "measurements") -> ModuleType:
    # `python docs/failures` finds its modules in the same way.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT)
        return importlib.import_module(name)


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def on_the_page(name: str) -> str:
    found = re.search(rf"<!-- {name}: docs/failures -->\n(.*?)<!-- end -->", page(), re.DOTALL)
    assert found is not None, f"no place for {name}"
    return found[1].strip()


def same(first: str, second: str) -> bool:
    """Whether two numbers agree: to a percent, or, for errors, within a factor of 30."""
    a, b = float(first), float(second)
    if a == b or (abs(a) < ERROR and abs(b) < ERROR and min(abs(a), abs(b)) == 0.0):
        return True
    if max(abs(a), abs(b)) < ERROR:
        return abs(math.log(abs(a) / abs(b))) < math.log(30)
    return math.isclose(a, b, rel_tol=1e-2)


@pytest.mark.parametrize("name", CHEAP)
def test_numbers_are_those_of_the_script(name: str) -> None:
    threads = torch.get_num_threads()
    measured = str(script().MEASUREMENTS[name]())
    torch.set_num_threads(threads)
    written = on_the_page(name)
    # Widths of padded columns follow the numbers.
    words = [re.sub(r"[\s-]+", " ", NUMBER.sub("#", text)) for text in (measured, written)]
    assert words[0] == words[1]
    pairs = zip(NUMBER.findall(measured), NUMBER.findall(written), strict=True)
    different = [pair for pair in pairs if not same(*pair)]
    assert not different, f"run docs/failures --update: {different}"


def test_every_measurement_is_on_the_page() -> None:
    marks = re.findall(r"<!-- (\w+): docs/failures -->", page())
    assert sorted(marks) == sorted(script().MEASUREMENTS)
    for name in marks:
        assert on_the_page(name), f"run docs/failures --update {name}"


def test_every_block_of_code_is_an_example_of_the_script() -> None:
    evidence = script("evidence")
    examples = {evidence.EVIDENCE, evidence.CHECK, evidence.CHECK_KINK, evidence.CHECK_ANY}
    blocks = set(re.findall(r"```python\n(.*?)```", page(), re.DOTALL))
    assert blocks == examples


def test_every_mode_has_a_number_or_a_plot() -> None:
    sections = re.split(r"^## ", page(), flags=re.MULTILINE)[1:]
    assert len(sections) == 18
    for section in sections:
        shown = "| --- |" in section or "](images/" in section or "```text" in section
        assert shown, section.splitlines()[0]


def test_links_and_images() -> None:
    text = page()
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif not target.startswith("https://"):
            assert (DOCS / target).exists(), target
    linked = set(re.findall(r"\]\(images/(\w+)\.png\)", text))
    code = "".join(path.read_text(encoding="utf-8") for path in SCRIPT.glob("*.py"))
    drawn = set(re.findall(r'canvas\("(\w+)"', code))
    assert linked == drawn


def test_lines_are_short() -> None:
    # A long address in brackets cannot be broken.
    prose = [re.sub(r"\(https[^)]*\)", "", line) for line in page().splitlines()]
    assert max(len(line) for line in prose if not line.startswith(("|", "!["))) <= 120


def test_names_on_the_page_exist() -> None:
    import discrete
    import ode_stopping

    known = {*vars(ode_stopping), *vars(discrete)}
    named = set(re.findall(r"`(\w*(?:Error|Warning|Adjoint|Decrease|Sensitivity))`", page()))
    assert named - {"AssertionError", "RuntimeError"} <= known
