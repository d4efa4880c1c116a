"""The verdicts on Theorem 2, the orders and the figures: small cases pass, planted errors fail.

The cases go through the same `run_series` and `judge` as the checks, on problems of a few unknowns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import slow_after

from discrete.gradients import adjoint, index
from ode_stopping import StepAdjoint
from theory_checks.cells import CellCache
from theory_checks.checks import _cells, figure1, orders, theorem2
from theory_checks.checks._cells import Series, run_series
from theory_checks.checks._odeint_adjoint import odeint_adjoint
from theory_checks.checks._problems import Setup, build
from theory_checks.context import Context
from theory_checks.registry import REGISTRY, Outcome

QUADRATIC = Setup("quadratic", 1e-2, dim=6, condition=10.0)
QUARTIC = Setup("quartic", 1e-2, dim=4, condition=5.0)
FEW = tuple(0.5 * 10.0 ** (-k / 8) for k in range(9))


def small(setup: Setup, **others: Any) -> Outcome:
    """Theorem 2's verdict on one problem, one decade of step sizes."""
    series = Series(setup, FEW, rtol=1e-8, spread=True, **others)
    context = Context()
    results = run_series(context, [series])
    return theorem2.judge(results, theorem2.witnesses(context, [setup]), "")


def higher_order() -> float:
    """The slope of the gradient for RK4 with a partial last step."""
    fractions = (0.6, 0.45, 0.34, 0.25, 0.19)
    series = Series(QUARTIC, fractions, "RungeKutta4", "partial_step", rtol=1e-11)
    (result,) = run_series(Context(), [series])
    return result.study.slope.slope


@pytest.mark.parametrize("setup", slow_after(1, [QUARTIC, QUADRATIC]), ids=lambda setup: setup.kind)
def test_theorem_2_holds(setup: Setup) -> None:
    outcome = small(setup)
    assert outcome.passed
    assert outcome.interval is not None
    assert outcome.interval[0] > theorem2.LOWER_END
    (table,) = outcome.tables
    assert len(table.rows) == len(FEW) + 1
    (figure,) = outcome.figures
    assert len(figure.figure.axes) == 2


def witnessed(outcome: Outcome) -> list[float]:
    """What the truth is off from the witness: the gradient, and T."""
    assert isinstance(outcome.measured, dict)
    return [v for name, v in outcome.measured.items() if "witness" in name]


def test_the_truth_is_the_continuous_adjoint_and_as_witnessed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def not_asked(*_: Any) -> None:
        raise AssertionError("Theorem 2's truth is the continuous adjoint")

    monkeypatch.setattr(StepAdjoint, "pull_back_path", not_asked)
    gradient, time = witnessed(small(QUARTIC))
    assert gradient < 1e-7
    assert time < 1e-8


@pytest.mark.parametrize("part", slow_after(1, ["parameters", "time"]))
def test_a_witness_that_is_off_by_a_millionth_and_a_half_fails(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def off(*arguments: Any, **options: Any) -> Any:
        found = odeint_adjoint(*arguments, **options)
        value, by = getattr(found, part), 1.0 + 1.5e-6
        scaled = tuple(by * v for v in value) if part == "parameters" else by * value
        return replace(found, **{part: scaled})

    monkeypatch.setattr(theorem2, "odeint_adjoint", off)
    outcome = small(QUARTIC)
    assert not outcome.passed
    assert max(witnessed(outcome)) == pytest.approx(1.5e-6, rel=0.1)


def test_a_truth_that_is_off_is_seen_where_slopes_do_not_see_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = _cells.measure_time

    def off(*arguments: Any, **options: Any) -> Any:
        found = true(*arguments, **options)
        return replace(found, gradient=(1.0 + 1e-5) * found.gradient)

    monkeypatch.setattr(_cells, "measure_time", off)
    outcome = small(QUARTIC)
    assert not outcome.passed
    assert isinstance(outcome.measured, dict)
    assert next(iter(outcome.measured.values())) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("kind", ["logistic", "svm"])
def test_real_problems_can_be_built_and_differentiated(kind: str) -> None:
    pytest.importorskip("sklearn")
    instance = build(Setup(kind, 1.0))
    velocity = instance.flow(torch.tensor(0.0), instance.x0)
    found = torch.autograd.grad(velocity.square().sum(), instance.parameters, allow_unused=True)
    assert any(g is not None and bool(g.abs().max() > 0) for g in found)
    at_start = float(instance.criterion(torch.tensor(0.0), instance.x0).detach())
    assert at_start > 1.0


def wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """dN = + (...) instead of - (...) in Definition 3."""
    true = index.accurate_decrease
    monkeypatch.setattr(index, "accurate_decrease", lambda problem: -true(problem))


def epsilon_in_the_denominator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard against division by zero that is not small against the decrease."""
    true = index.accurate_decrease
    monkeypatch.setattr(index, "accurate_decrease", lambda problem: true(problem) - 1e-2)


def missing_factor_h(monkeypatch: pytest.MonkeyPatch) -> None:
    """dN instead of h dN."""
    monkeypatch.setattr("theory_checks.measurements.in_flow_time", lambda steps, h: steps)


@pytest.mark.parametrize(
    "plant", [wrong_sign, epsilon_in_the_denominator, missing_factor_h], ids=lambda f: f.__name__
)
def test_planted_errors_fail(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    plant(monkeypatch)
    assert not small(QUARTIC).passed


def test_lam_updated_too_early_fails_the_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """S with lam from after its update is O(h) off, which a first-order check cannot see.

    Theorem 2 is blind to it (Proposition 1 is not, and has its own check); the fourth-order one
    falls to first order.
    """
    assert higher_order() > orders.BARS["RungeKutta4", "partial_step"][0]
    true = adjoint._Backward.through

    def early(self: Any, begin: int, end: int, first: Tensor, last: Tensor) -> None:
        states = [first]
        for k in range(begin, end):
            states.append(self.problem.update.step(k, states[-1]))
        for k in reversed(range(begin, end)):
            held = [total.clone() for total in self.sweep.sums]
            ends = (states[k - begin], states[k - begin + 1])
            true(self, k, k + 1, *ends)
            updated = self.sweep.lam
            for total, kept in zip(self.sweep.sums, held, strict=True):
                total.copy_(kept)
            # The same step's sum once more, now with the lam that its update has made.
            true(self, k, k + 1, *ends)
            self.sweep.lam = updated

    monkeypatch.setattr(adjoint._Backward, "through", early)
    # Step by step needs a replay.
    monkeypatch.setattr(adjoint.DiscreteAdjoint, "graph_memory", 0)
    assert higher_order() < orders.BARS["RungeKutta4", "partial_step"][0]


def test_phases_are_spread_and_steps_hardly_moved() -> None:
    instance = build(QUADRATIC)
    steps = [fraction / instance.stiffness for fraction in FEW]
    spread = _cells.spread_phases(instance, steps)
    counts = [round(1 / abs(new / old - 1)) for new, old in zip(spread, steps, strict=True)]
    assert min(counts) > 10
    assert spread == sorted(spread, reverse=True)


def test_figure_1a_holds_and_sees_a_wrong_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert figure1.figure_1a(Context()).passed
    true = figure1.answer

    def late(point: figure1.Point) -> figure1.Answer:
        found = true(point)
        return replace(found, time=found.time * (1 + 1e-6))

    monkeypatch.setattr(figure1, "answer", late)
    assert not figure1.figure_1a(Context()).passed


def test_tangents_are_the_slopes_of_the_curve() -> None:
    point = figure1.Point(1.1, 0.5, gradient=True)
    found = figure1.answer(point)
    assert found.by_theta == pytest.approx(figure1._difference(point), rel=1e-6)
    assert found.discrete_by_theta == pytest.approx(found.by_theta, rel=0.2)


def test_cells_are_shared_between_checks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Context(check="one", cells=CellCache(tmp_path / "one"))
    second = Context(check="two", cells=CellCache(tmp_path / "two"))
    series = Series(QUADRATIC, FEW[:3], rtol=1e-6)
    (found,) = run_series(first.shared(), [series])
    assert len(list((tmp_path / "shared").glob("*.json"))) == 4
    for file in (tmp_path / "shared").glob("*.json"):
        file.touch()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "shared").glob("*.json")}
    (again,) = run_series(second.shared(), [series])
    assert again.study.gradient_errors == found.study.gradient_errors
    assert {file: file.stat().st_mtime_ns for file in times} == times


def test_the_issue_s_checks_are_there() -> None:
    names = {entry.name for entry in REGISTRY}
    assert {f"theorem-2-{kind}" for kind in ("quadratic", "quartic", "logistic", "svm")} <= names
    assert {"figure-1a", "figure-1b", "figure-2a", "figure-2b", "figure-5"} <= names
    assert {"orders-higher", "orders-log-index"} <= names
