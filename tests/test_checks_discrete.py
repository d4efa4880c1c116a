"""The checks of Proposition 1, equation (13) and identity (12), with wrong formulas planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from discrete.gradients import index
from ode_stopping.core.sweep import Sweep
from theory_checks.checks import identity12, proposition1, truncation
from theory_checks.checks._problems import Setup
from theory_checks.context import Context
from theory_checks.registry import REGISTRY, Outcome

SMALL = Setup("quadratic", 1e-2, dim=8, condition=10.0)


def measured(outcome: Outcome) -> dict[str, float]:
    assert isinstance(outcome.measured, dict)
    return outcome.measured


def update_lam_before_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """S takes the lam that has gone through the step already."""
    right = Sweep.through

    def early(self: Any, end: Any, start: Any, extra: Any = (), *, keep: bool = False) -> Any:
        probe = Sweep(self.lam)
        right(probe, end, start, keep=True)
        self.lam = list(probe.lam)
        found = right(self, end, start, extra, keep=keep)
        self.lam = probe.lam
        return found

    monkeypatch.setattr(Sweep, "through", early)


def lose_the_step_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """dN without the factor h."""
    right = index.accurate_decrease

    def divided(problem: Any) -> float:
        return right(problem) * problem.clock.step_value

    monkeypatch.setattr(index, "accurate_decrease", divided)


# --- Proposition 1 --------------------------------------------------------------------------------


def proposition() -> Outcome:
    return proposition1.judge_proposition(Context(), [proposition1.Cell(SMALL)])


def test_proposition_1_holds_on_all_four_problems() -> None:
    settings = [
        SMALL,
        Setup("quartic", 1e-2, dim=8, condition=10.0),
        Setup("logistic", 1e-2),
        Setup("svm", 20.0),
    ]
    cells = [proposition1.Cell(setup) for setup in settings]
    outcome = proposition1.judge_proposition(Context(), cells)
    assert outcome.passed
    assert len(outcome.tables[0].rows) == 16
    assert all(row[1] > proposition1.CHUNK for row in outcome.tables[0].rows)


def test_proposition_1_notices_lam_updated_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    update_lam_before_the_sum(monkeypatch)
    outcome = proposition()
    assert not outcome.passed
    assert measured(outcome)["quadratic"] > 1e-3


def test_proposition_1_notices_a_lost_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    lose_the_step_size(monkeypatch)
    assert not proposition().passed


# --- equation (13) --------------------------------------------------------------------------------


def truncated() -> Outcome:
    cell = truncation.Cell("quadratic", 1e-2, dim=8, condition=10.0)
    return truncation.judge_truncation(Context(), [cell])


def test_equation_13_holds() -> None:
    cells = [
        truncation.Cell("quadratic", 1e-2, dim=8, condition=10.0),
        truncation.Cell("logistic", 0.2),
    ]
    outcome = truncation.judge_truncation(Context(), cells)
    assert outcome.passed
    assert min(outcome.details["bias at K = 1"].values()) > 0.5
    biases = [row[3] for row in outcome.tables[0].rows if row[0].startswith("rotated")]
    assert biases == sorted(biases, reverse=True)
    assert biases[-1] < 1e-12


def test_equation_13_notices_a_lost_factor_in_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    lose_the_step_size(monkeypatch)
    outcome = truncated()
    assert not outcome.passed
    assert measured(outcome)["K = 1 against eq. (13): quadratic"] > 1.0


def test_equation_13_notices_a_lost_factor_in_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    right = truncation.equation_13

    def without_step(path: Any, hand: Any, p: Any, step: float) -> Any:
        return right(path, hand, p, step) / step

    monkeypatch.setattr(truncation, "equation_13", without_step)
    assert not truncated().passed


def test_equation_13_notices_lam_updated_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """K = 1 has no lam to be early with; every longer sum has."""
    update_lam_before_the_sum(monkeypatch)
    found = measured(truncated())
    assert found["K = 1 against eq. (13): quadratic"] < 1e-12
    assert found["any K against the sum by hand: quadratic"] > 1e-3


def test_the_logistic_formulas_are_those_of_the_library() -> None:
    objective, _, x0, _, _, hand = truncation.make(truncation.Cell("logistic", 0.2))
    x = x0 + 0.3
    v = np.linspace(-1.0, 1.0, x.numel())
    np.testing.assert_allclose(hand.gradient(x.numpy()), objective.gradient(x).numpy(), rtol=1e-12)
    assert hand.loss(x.numpy()) == pytest.approx(float(objective(x)), rel=1e-14)
    h = 1e-5
    up, down = (hand.gradient(x.numpy() + sign * h * v) for sign in (1.0, -1.0))
    product = hand.hessian_product(x.numpy(), v)
    np.testing.assert_allclose(product, (up - down) / (2 * h), rtol=1e-7, atol=1e-10)


# --- identity (12) --------------------------------------------------------------------------------


def identity() -> Outcome:
    return identity12.judge_identity(Context(), [identity12.Cell(SMALL, 8)])


def test_identity_12_holds() -> None:
    cells = [identity12.Cell(SMALL, 8), identity12.Cell(Setup("logistic", 1.0), 5)]
    outcome = identity12.judge_identity(Context(), cells)
    assert outcome.passed
    assert all(row[3] > 0.0 for row in outcome.tables[0].rows)


def test_identity_12_notices_lam_updated_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    update_lam_before_the_sum(monkeypatch)
    assert not identity().passed


def test_identity_12_notices_a_lost_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    lose_the_step_size(monkeypatch)
    assert not identity().passed


# --- the checks as they are run -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["proposition-1", "equation-13", "identity-12"])
def test_the_quick_profile_holds(name: str) -> None:
    assert REGISTRY[name].function(Context(check=name)).passed
