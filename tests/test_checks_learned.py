"""The check of learned optimisers, with errors planted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted import scaled_gradient
from test_checks_discrete import update_lam_before_the_sum

from discrete.gradients import index
from discrete.learned import base
from ode_stopping.core.status import MissingGradientError
from theory_checks.checks import learned
from theory_checks.context import Context
from theory_checks.registry import REGISTRY, Outcome

KINDS = ("identity (12)", "targets", "dN by Definition 3", "dN*")


@pytest.fixture(autouse=True)
def short_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "UPDATES", 30)


def outcome(kind: str = "RNNprop") -> Outcome:
    return learned.judge_learned(Context(), [learned.Cell(kind, "quadratic", dim=3, hidden=4)])


def failed(found: Outcome) -> set[str]:
    """Which of the figures are above their bounds, by the first words of their names."""
    assert isinstance(found.measured, dict)
    bounds: Any = found.tolerance
    wrong = [name for name, value in found.measured.items() if not abs(value) <= bounds[name]]
    assert found.passed is not bool(wrong)
    return {kind for kind in KINDS for name in wrong if name.startswith((kind + ":", kind + " "))}


@pytest.mark.parametrize("kind", ["RNNprop", "CoordinateLSTM"])
def test_it_holds(kind: str) -> None:
    found = outcome(kind)
    assert failed(found) == set()
    (row,) = found.tables[0].rows
    assert row[1] >= 4  # steps in which f decreases
    assert row[2] > 0.01  # a gradient that is there
    assert row[7] > 1e-3  # the two definitions are not one


def test_lam_updated_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    update_lam_before_the_sum(monkeypatch)
    with pytest.warns(Warning, match="derivative"):
        found = outcome()
    assert {"identity (12)", "dN by Definition 3", "dN*"} <= failed(found)


def test_decrease_that_is_a_little_off(monkeypatch: pytest.MonkeyPatch) -> None:
    right = index.accurate_decrease
    monkeypatch.setattr(index, "accurate_decrease", lambda problem: right(problem) * (1 + 1e-6))
    assert {"identity (12)", "dN by Definition 3"} <= failed(outcome())


def test_fractional_index_differentiated_by_definition_3(monkeypatch: pytest.MonkeyPatch) -> None:
    right = learned.stopping_index

    def plain(*args: Any, **options: Any) -> Any:
        keep = options.get("gradient", 0) is None
        return right(*args, **(options if keep else {**options, "interpolation": None}))

    monkeypatch.setattr(learned, "stopping_index", plain)
    assert failed(outcome()) == {"dN*"}


def test_gradients_of_f_a_little_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way through the gradients that the network is fed, wrong by 1e-5."""
    right = base.gradient_at

    def off(*args: Any) -> Any:
        gradient, samples = right(*args)
        return scaled_gradient(gradient, 1 + 1e-5), samples

    monkeypatch.setattr(base, "gradient_at", off)
    assert failed(outcome()) == {"identity (12)", "dN by Definition 3", "dN*"}


def test_gradients_of_f_held_constant_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The detached direction of meta-training is no derivative of N."""
    right = base.gradient_at

    def detached(*args: Any) -> Any:
        gradient, samples = right(*args)
        return gradient.detach(), samples

    (weights,) = [learned.train(learned.Cell("RNNprop", "quadratic"), torch.Generator())]
    monkeypatch.setattr(learned, "train", lambda cell, generator: weights)
    monkeypatch.setattr(base, "gradient_at", detached)
    with pytest.raises(MissingGradientError, match="the state in the update"):
        learned.judge_learned(Context(), [learned.Cell("RNNprop", "quadratic")])


@pytest.mark.slow
def test_the_quick_profile_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert REGISTRY["learned-optimiser"].function(Context(check="learned-optimiser")).passed
