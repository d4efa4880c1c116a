"""The page on batches of iterations: its example prints what it says, and its links lead on."""

from __future__ import annotations

from pathlib import Path

from pages import blocks, missing_targets, printed

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to-batched-iterations.md"


def test_example_prints_what_is_printed_below_it() -> None:
    assert printed(blocks(PAGE, "python")[0], "how-to") == blocks(PAGE, "text")[0]


def test_links_lead_somewhere() -> None:
    assert missing_targets(PAGE) == []
