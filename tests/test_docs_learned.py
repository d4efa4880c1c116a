"""The page on learned optimisers: its examples run as printed, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from pages import blocks, missing_targets, printed_in_turn

import discrete.learned
from discrete import stopping_index
from discrete.learned import LearnedOptimizer, LearnedSchedule
from ode_stopping import LossValue, Quadratic

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to-learned-optimizers.md"


def test_examples_print_what_is_printed_below_them() -> None:
    assert printed_in_turn(PAGE) == blocks(PAGE, "text")


def test_links_lead_somewhere() -> None:
    assert missing_targets(PAGE) == []


def test_every_class_is_in_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)\(", text, flags=re.MULTILINE))
    kinds = {
        name
        for name in discrete.learned.__all__
        if isinstance(kind := getattr(discrete.learned, name), type)
        and issubclass(kind, LearnedOptimizer)
        and kind is not LearnedOptimizer
    }
    assert named == kinds


def test_no_single_rate_is_as_fast() -> None:
    f = Quadratic(torch.tensor([1.0, 10.0], dtype=torch.float64))
    x0 = torch.tensor([1.0, 1.0], dtype=torch.float64)
    fastest = float("inf")
    for rate in torch.linspace(0.1, 0.2, 100)[:-1].tolist():
        update = LearnedSchedule([rate]).update(f)
        start = update.initial_state(x0)
        run = stopping_index(update, start, LossValue(f), 1e-3, interpolation="log", gradient=None)
        fastest = min(fastest, float(run.steps))
    assert fastest > 16
