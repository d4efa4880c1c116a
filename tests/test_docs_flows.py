"""The pages of docs/flows: every flow has one, with its parameters, and says what is so."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import blocks, missing_targets, printed
from test_algorithms import PAIRS, X0, by_flow, quartic
from torch import Tensor

import ode_stopping
from discrete import Algorithm, Euler
from discrete.rules import algorithms
from ode_stopping import Flow

DOCS = Path(__file__).resolve().parents[1] / "docs"
FOLDER = DOCS / "flows"
INDEX = FOLDER / "README.md"
PAGES = sorted(page for page in FOLDER.glob("*.md") if page != INDEX)
FLOWS = [
    flow
    for flow in vars(ode_stopping).values()
    if inspect.isclass(flow) and issubclass(flow, Flow) and not inspect.isabstract(flow)
]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def page_of(flow: type[Flow]) -> Path:
    """The one with the flow in a heading."""
    (page,) = [p for p in PAGES if re.search(rf"^#+ .*`{flow.__name__}`$", text_of(p), re.M)]
    return page


# --- what has to be there -------------------------------------------------------------------------


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.__name__)
def test_every_flow_has_a_page_with_all_its_parameters(flow: type[Flow]) -> None:
    text = text_of(page_of(flow))
    names = [name for name in inspect.signature(flow).parameters if name != "self"]
    assert names
    assert [name for name in names if f"`{name}`" not in text] == []


@every_page
def test_pages_have_the_same_parts(page: Path) -> None:
    text = text_of(page)
    parts = ("State", "Algorithm", "Energy", "Singularities", "What to expect of T", "Source")
    assert [part for part in parts if f"\n**{part}.** " not in text] == []
    assert f"](../images/flows/{page.stem}.png)" in text


@every_page
def test_the_index_leads_to_every_page(page: Path) -> None:
    rows = [line for line in text_of(INDEX).splitlines() if f"[{page.stem}]({page.name})" in line]
    assert len(rows) == 1


@pytest.mark.parametrize("page", [INDEX, *PAGES], ids=lambda page: page.stem)
def test_links_and_pictures_exist(page: Path) -> None:
    assert missing_targets(page) == []
    headings = re.findall(r"^## (.*)$", text_of(INDEX), re.M)
    anchors = {title.lower().replace(",", "").replace(" ", "-") for title in headings}
    assert set(re.findall(r"\]\(README\.md#([^)]+)\)", text_of(page))) <= anchors


def test_every_picture_is_drawn_by_the_script_and_small() -> None:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("flow_pictures", DOCS / "flow_pictures.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flow_pictures", script)  # for its dataclass
        spec.loader.exec_module(script)
    pictures = {path.stem: path for path in script.IMAGES.glob("*.png")}
    assert set(script.PICTURES) == set(pictures) == {page.stem for page in PAGES}
    assert max(path.stat().st_size for path in pictures.values()) < 60_000


# --- what is said ---------------------------------------------------------------------------------


@every_page
def test_the_example_prints_what_is_printed_below_it(page: Path) -> None:
    (code,), (shown,) = blocks(page, "python"), blocks(page, "text")
    assert printed(code, page.name) == shown


class PositionFirst:
    """x with the old other states, then these with the gradient at the new x."""

    def __init__(self, flow: Any, step: float) -> None:
        self.flow, self.step = flow, step

    def __call__(self, k: int, state: Any, t: Tensor) -> Any:
        x, *others = state
        moved = x + self.step * self.flow(t, state)[0]
        rates = self.flow(t, (moved, *others))[1:]
        return moved, *(z + self.step * rate for z, rate in zip(others, rates, strict=True))


ORDERS = {
    "sgd(f, lr=, momentum=m)": PAIRS["SGD, momentum"][0],
    "sgd(f, lr=, momentum=m, nesterov=True)": PAIRS["SGD, nesterov"][0],
    "nesterov(f, lr=)": lambda f: algorithms.nesterov(f, lr=0.02),
    "rmsprop(f, lr=, alpha=)": PAIRS["RMSprop"][0],
    "adam(f, lr=, betas=)": PAIRS["Adam"][0],
}


def departure(algorithm: Algorithm, rule: Any) -> str:
    """Largest distance to the algorithm's iterates, relative to their own from x0, in words."""
    known, found = by_flow(algorithm), by_flow(algorithm, rule)
    gap = (found - known).norm(dim=-1).max() / (known - X0).norm(dim=-1).max()
    percent = f"{100 * float(gap):#.2g}".rstrip(".")
    return f"{percent} %" if gap < 1 else "first step lr g/eps"


@pytest.mark.parametrize("name", ORDERS)
def test_other_orders_of_update_leave_the_algorithm_as_the_table_says(name: str) -> None:
    algorithm = ORDERS[name](quartic())
    h = float(algorithm.update.step)
    rules = PositionFirst(algorithm.flow, h), Euler(algorithm.flow, step=h)
    measured = [departure(algorithm, rule) for rule in rules]
    (row,) = [line for line in text_of(INDEX).splitlines() if line.startswith(f"| `{name}`")]
    assert [cell.strip() for cell in row.split("|")[-3:-1]] == measured
