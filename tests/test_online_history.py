"""The record: columns that line up, the table, the plot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from online_runs import Bumpy, closure_of, leaf, random

from discrete import SGDOLA, AdamOLA
from discrete.online import AdaptationHistory


def ran(steps: int = 9, **options: Any) -> Any:
    a, b = leaf(random(4, seed=1)), leaf(random(2, seed=2))
    optimizer = AdamOLA([{"params": [a]}, {"params": [b], "lr": 0.5}], 0.02, **options)
    closure = closure_of(optimizer, lambda: Bumpy()(a, b))
    for _ in range(steps):
        optimizer.step(closure)
    return optimizer


def assert_lines_up(history: AdaptationHistory, rows: int, names: set[str], groups: int) -> None:
    assert len(history) == rows
    assert set(history.signals) == set(history.values) == (names if rows else set())
    columns = [history.step, history.loss, history.after, history.action]
    columns += list(history.signals.values())
    columns += [trace for traces in history.values.values() for trace in traces]
    assert {len(column) for column in columns} == {rows}
    assert all(len(traces) == groups for traces in history.values.values())


@pytest.mark.parametrize("adapt", [("lr",), ("beta2", "lr", "beta1"), ("beta1",)])
@pytest.mark.parametrize("record_every", [0, 1, 3])
@pytest.mark.parametrize("every", [1, 2])
def test_columns_line_up(adapt: tuple[str, ...], record_every: int, every: int) -> None:
    optimizer = ran(adapt=adapt, record_every=record_every, every=every, horizon=2)
    history = optimizer.history
    rows = 9 // record_every if record_every else 0
    assert_lines_up(history, rows, set(adapt), 2)
    assert history.step == list(range(record_every, 10, record_every or 1))[:rows]
    for k, step in enumerate(history.step):
        looked = step % every == 0
        assert (history.after[k] is not None) == looked
        assert (history.action[k] != "not looked at") == looked
        for column in history.signals.values():
            assert (column[k] is not None) == looked
    if rows and rows * record_every == 9:
        for name, traces in history.values.items():
            coordinate = next(c for c in optimizer.coordinates if c.name == name)
            ends = [coordinate.read(group) for group in optimizer.param_groups]
            assert [trace[-1] for trace in traces] == ends
    assert history.rates == (history.values["lr"][0] if rows and "lr" in adapt else [])


def test_a_group_that_comes_later_and_a_record_that_is_thinned() -> None:
    optimizer = ran(record_every=2, adapt=("lr", "weight_decay"), weight_decay=0.1)
    optimizer.add_param_group({"params": [leaf([1.0])], "lr": 0.3})
    closure = closure_of(
        optimizer,
        lambda: sum(p.cosh().sum() for g in optimizer.param_groups for p in g["params"]),
    )
    for _ in range(5):
        optimizer.step(closure)
    assert_lines_up(optimizer.history, 7, {"lr", "weight_decay"}, 3)


def test_a_table() -> None:
    pytest.importorskip("pandas")
    optimizer = ran(adapt=("lr", "beta1"), every=2)
    table = optimizer.history.to_dataframe()
    assert list(table.columns) == [
        "step", "loss", "after", "action",
        "signal of lr", "lr", "lr (group 1)",
        "signal of beta1", "beta1", "beta1 (group 1)",
    ]  # fmt: skip
    assert len(table) == 9
    assert list(table["lr (group 1)"]) == optimizer.history.values["lr"][1]
    assert table["after"].isna().sum() == 5
    assert len(AdaptationHistory().to_dataframe()) == 0


def test_a_plot() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    optimizer = ran(steps=30, adapt=("lr", "beta1"))
    history = optimizer.history
    axes = history.plot()
    lines = [line for line in axes.get_lines() if line.get_linestyle() != "None"]
    for line, trace in zip(lines, history.values["lr"], strict=True):
        assert list(line.get_ydata()) == trace
        assert list(line.get_xdata()) == history.step
    rises = next(line for line in axes.get_lines() if line.get_linestyle() == "None")
    rose = [s for s, a in zip(history.step, history.action, strict=True) if a == "backed off"]
    assert rose
    assert list(rises.get_xdata()) == rose
    assert axes.get_yscale() == "log"
    _, other = pyplot.subplots()
    assert history.plot("beta1", axes=other) is other
    with pytest.raises(KeyError, match=r"'beta2': it is not adapted.*\['lr', 'beta1'\]"):
        history.plot("beta2")
    # The printed form may go below zero: no logarithm then.
    values = AdaptationHistory()
    values.add(1, 1.0, 2.0, "smaller", {}, {"lr": [-1.0]})
    assert values.plot().get_yscale() == "linear"
    pyplot.close("all")


def test_in_words() -> None:
    assert repr(AdaptationHistory()) == "AdaptationHistory(no steps)"
    history = ran(steps=3).history
    assert repr(history).startswith("AdaptationHistory(3 steps to 3; lr ")
    assert repr(history).endswith("larger 2, smaller 1)")
    assert history.counts() == {"larger": 2, "smaller": 1}


def test_back_and_forth() -> None:
    history = ran(adapt=("lr", "beta1")).history
    assert AdaptationHistory.from_dict(history.to_dict()) == history
    history.to_dict()["values"]["lr"][0].append(9.0)
    assert_lines_up(history, 9, {"lr", "beta1"}, 2)


def test_an_undone_step_is_recorded() -> None:
    x = leaf([0.3])
    optimizer = SGDOLA([x], 1e3)
    closure = closure_of(optimizer, lambda: -torch.log(1 - x.square()).sum())
    for _ in range(8):
        optimizer.step(closure)
    history = optimizer.history
    assert_lines_up(history, 8, {"lr"}, 1)
    for action, signal in zip(history.action, history.signals["lr"], strict=True):
        assert (signal is None) == (action == "undone")
