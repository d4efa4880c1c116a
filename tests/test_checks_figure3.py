"""The check of Figure 3: its verdict, and a small training through it."""

from __future__ import annotations

import math

import pytest

from theory_checks.checks.figure3 import NAMES, Cell, Tried, judge, measure, ratio_of_medians


def tried(index: list[int], *, rises: bool = False) -> Tried:
    count = len(index)
    return Tried(index, [True] * count, [rises] * count, [0.1] * count, 0.0, [1.0, 0.5, 0.1])


def rows(gamed: bool, fast: int) -> dict[str, list[Tried]]:
    found = {name: [tried([40, 50, 60])] * 3 for name in NAMES.values()}
    found[NAMES["printed", 1.0]] = [tried([2, 3, 4], rises=gamed)] * 3
    found[NAMES["ladder", 1.0]] = [tried([fast, fast, fast])] * 3
    return found


@pytest.mark.parametrize(
    ("gamed", "fast", "passed"), [(True, 25, True), (False, 25, False), (True, 60, False)]
)
def test_the_verdict(gamed: bool, fast: int, passed: bool) -> None:
    outcome = judge(rows(gamed, fast))
    assert outcome.passed is passed
    assert outcome.measured == {
        "met by a rise": float(gamed),
        "lambda 1 over 0": fast / 50,
    }


def test_the_interval_holds_the_ratio_of_what_varies() -> None:
    ratio, low, high = ratio_of_medians(
        [tried([10, 20, 30]), tried([12, 18, 33])], [tried([20, 40, 60]), tried([22, 41, 57])]
    )
    assert ratio == pytest.approx(19 / 40.5)
    assert low < ratio < high


@pytest.mark.parametrize("criterion", ["printed", "ladder"])
def test_a_small_training(criterion: str) -> None:
    cell = Cell(criterion, 1.0, 0, dim=4, hidden=3, steps=2, horizon=6, tried=5)
    found = measure(cell)
    assert repr(found) == repr(measure(cell))  # (NaN is not itself.)
    assert len(found.index) == 5
    assert len(found.values) == 25
    assert all(math.isnan(f) != met for f, met in zip(found.at_index, found.met, strict=True))
    assert all(1 <= n <= 25 for n in found.index)
