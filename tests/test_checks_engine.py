"""Verdicts, exit status and strict JSON of the engine behind `python -m theory_checks`."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dummy_checks import Dummies, good, pictured, run, summary, wrong

from theory_checks.context import Context
from theory_checks.plotting import new_figure
from theory_checks.registry import Figure, Outcome, Table
from theory_checks.results import jsonable
from theory_checks.sealed import dump

# --- verdicts and exit status ------------------------------------------------------------------


def test_all_hold_gives_status_zero_and_the_fixed_summary(dummies: Dummies, tmp_path: Path) -> None:
    dummies.add("one", good)
    dummies.add("two", pictured, group="other")
    result = run(dummies.registry, tmp_path, "--seed", "5")
    assert result.exit_code == 0, result.output
    content = summary(tmp_path)
    assert set(content) == {
        "profile", "device", "dtype", "seed", "versions", "finished", "checks",
    }  # fmt: skip
    assert content["profile"] == "quick"
    assert (content["device"], content["dtype"], content["seed"]) == ("cpu", "float64", 5)
    assert content["finished"] is True
    assert content["versions"]["torch"] == torch.__version__
    one, two = content["checks"]
    assert set(one) == {
        "name", "title", "group", "source", "measured", "expected", "tolerance", "interval",
        "passed", "seconds", "details",
    }  # fmt: skip
    assert (one["name"], one["source"], one["passed"]) == ("one", "Eq. (1)", True)
    assert (one["measured"], one["expected"], one["tolerance"]) == (1e-13, 0.0, 1e-12)
    assert one["interval"] is None
    assert two["measured"]["constant"] == 2.0
    assert two["interval"] == pytest.approx([1.0, 1.0])
    assert two["group"] == "other"


def test_one_failure_gives_status_one_and_the_others_still_run(
    dummies: Dummies, tmp_path: Path
) -> None:
    dummies.add("bad", wrong)
    dummies.add("fine", good)
    result = run(dummies.registry, tmp_path)
    assert result.exit_code == 1
    assert [entry["passed"] for entry in summary(tmp_path)["checks"]] == [False, True]
    for text in ("bad", "fine", "Eq. (1)", "PASS", "FAIL", "1 of 2 checks failed"):
        assert text in result.output


def test_an_exception_is_a_failed_check_with_its_traceback(
    dummies: Dummies, tmp_path: Path
) -> None:
    def raising(context: Context) -> Outcome:
        raise ArithmeticError("the sky fell <b>[bold]")

    dummies.add("raising", raising)
    dummies.add("leaving", lambda context: sys.exit(0))
    dummies.add("nothing", lambda context: None)  # type: ignore[arg-type, return-value]
    dummies.add("fine", good)
    result = run(dummies.registry, tmp_path)
    assert result.exit_code == 1
    raised, left, nothing, fine = summary(tmp_path)["checks"]
    assert raised["passed"] is False
    assert raised["measured"] is None
    assert raised["details"]["error"] == "ArithmeticError: the sky fell <b>[bold]"
    assert "in raising" in raised["details"]["traceback"]
    assert left["passed"] is False
    assert "must return an Outcome, got NoneType" in nothing["details"]["error"]
    assert fine["passed"] is True
    assert "the sky fell <b>[bold]" in result.output
    assert "the sky fell &lt;b&gt;[bold]" in (tmp_path / "index.html").read_text()


def test_a_figure_that_cannot_be_drawn_fails_its_check_only(
    dummies: Dummies, tmp_path: Path
) -> None:
    def undrawable(context: Context) -> Outcome:
        figure, axes = new_figure()
        axes.set_title(r"$\notacommand{$")
        return Outcome(1.0, 1.0, 0.1, True, figures=[Figure("broken", "No.", figure)])

    dummies.add("undrawable", undrawable)
    dummies.add("fine", good)
    assert run(dummies.registry, tmp_path).exit_code == 1
    assert [entry["passed"] for entry in summary(tmp_path)["checks"]] == [False, True]


@pytest.mark.parametrize("measured", [math.nan, {"a": 1.0, "b": math.nan}, torch.tensor(math.nan)])
def test_nan_never_passes(dummies: Dummies, tmp_path: Path, measured: Any) -> None:
    dummies.add("nan", lambda context: Outcome(measured, 1.0, 0.1, True))
    assert run(dummies.registry, tmp_path).exit_code == 1
    entry = summary(tmp_path)["checks"][0]
    assert entry["passed"] is False
    assert entry["details"]["not_a_number"] in (["measured"], ["b"])


def test_nan_never_passes_by_the_constructors_nor_in_an_interval() -> None:
    assert not Outcome.below(math.nan, 1.0).passed
    assert not Outcome.within({"a": math.nan}, 1.0, 1.0).passed
    assert not Outcome.within(1.0, math.nan, 1.0).passed
    assert not Outcome(1.0, 1.0, 0.1, True, interval=(math.nan, 1.0)).passed


def test_the_constructors_judge_every_name() -> None:
    assert Outcome.below({"a": 0.1, "b": 0.2}, 0.2).passed
    assert not Outcome.below({"a": 0.1, "b": 0.3}, 0.2).passed
    assert not Outcome.below({"a": 0.1, "b": -0.3}, 0.2).passed
    assert not Outcome.below({"a": 0.1, "b": 0.1}, {"a": 0.2, "b": 0.05}).passed
    assert Outcome.within({"a": 1.05, "b": 2.0}, {"a": 1.0, "b": 2.0}, 0.1).passed
    assert not Outcome.within({"a": 1.05, "b": 2.2}, {"a": 1.0, "b": 2.0}, 0.1).passed
    with pytest.raises(ValueError, match="names differ"):
        Outcome.within({"a": 1.0}, {"b": 1.0}, 0.1)
    with pytest.raises(ValueError, match="one number"):
        Outcome.below(1.0, {"a": 1.0})


def test_malformed_outcomes_are_refused() -> None:
    with pytest.raises(ValueError, match="empty dict"):
        Outcome({}, 1.0, 0.1, True)
    with pytest.raises(ValueError, match="interval"):
        Outcome(1.0, 1.0, 0.1, True, interval=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"rows\[1\]"):
        Table("t", ["a", "b"], [[1, 2], [1]])
    figure, _ = new_figure()
    with pytest.raises(ValueError, match="unique"):
        Outcome(1.0, 1.0, 0.1, True, figures=[Figure("a", "", figure), Figure("a", "", figure)])
    with pytest.raises(ValueError, match="lower case"):
        Figure("../escape", "", figure)


def test_a_warning_inside_a_check_is_kept(dummies: Dummies, tmp_path: Path) -> None:
    def warning(context: Context) -> Outcome:
        warnings.simplefilter("always")
        warnings.warn("rounding noise", RuntimeWarning, stacklevel=1)
        return good(context)

    dummies.add("warning", warning)
    assert run(dummies.registry, tmp_path).exit_code == 0
    details = summary(tmp_path)["checks"][0]["details"]
    assert details["warnings"] == ["RuntimeWarning: rounding noise"]


def test_checks_are_seeded_whatever_ran_before(dummies: Dummies, tmp_path: Path) -> None:
    draw = lambda context: Outcome(float(torch.rand(()) + np.random.rand()), None, None, True)  # noqa: E731
    dummies.add("first", draw)
    dummies.add("second", draw)
    run(dummies.registry, tmp_path)
    first, second = summary(tmp_path)["checks"]
    assert first["measured"] == second["measured"]
    run(dummies.registry, tmp_path, "--seed", "1")
    assert summary(tmp_path)["checks"][0]["measured"] != first["measured"]


# --- strict JSON -------------------------------------------------------------------------------


def test_summary_is_strict_json_whatever_the_details_hold(dummies: Dummies, tmp_path: Path) -> None:
    details = {
        "inf": math.inf, "nan": np.float32("nan"), "array": np.array([1.0, -math.inf]),
        "tensor": torch.tensor([1, 2]), "scalar": torch.tensor(0.5, requires_grad=True),
        "path": Path("a"), "dtype": torch.float64, "set": {2, 1}, 3: (True, np.bool_(False)),
        "integer": np.int64(7),
    }  # fmt: skip
    dummies.add("odd", lambda context: Outcome(math.inf, 1.0, 0.1, False, details=details))
    assert run(dummies.registry, tmp_path).exit_code == 1
    entry = summary(tmp_path)["checks"][0]
    assert entry["measured"] == "Infinity"
    assert entry["details"] == {
        "inf": "Infinity", "nan": "NaN", "array": [1.0, "-Infinity"], "tensor": [1, 2],
        "scalar": 0.5, "path": "a", "dtype": "torch.float64", "set": [1, 2],
        "3": [True, False], "integer": 7,
    }  # fmt: skip


def test_dump_refuses_what_slipped_through() -> None:
    assert jsonable(float("nan")) == "NaN"
    with pytest.raises(ValueError, match="JSON"):
        dump({"a": math.nan})
