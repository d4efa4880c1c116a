"""The page on online adaptation: its example runs as printed, and its options exist."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path

from pages import blocks, missing_targets, printed

from discrete import AdamOLA
from discrete.online import AdaptationOptions

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to-online-adaptation.md"


def test_example_prints_what_is_printed_below_it() -> None:
    assert printed(blocks(PAGE, "python")[0], "how-to") == blocks(PAGE, "text")[0]


def test_links_lead_somewhere() -> None:
    assert missing_targets(PAGE) == []


def test_every_option_on_the_page_exists() -> None:
    known = {field.name for field in fields(AdaptationOptions)}
    known |= set(inspect.signature(AdamOLA).parameters)
    named = set(re.findall(r"[`( ](\w+)=", PAGE.read_text(encoding="utf-8").split("```text")[1]))
    assert named - known - {"download", "steps"} == set()  # of other functions
    assert {"horizon", "every", "deterministic", "held_out", "caution"} <= named
