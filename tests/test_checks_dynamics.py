"""The checks of the flows of optimisers: reduced forms hold, planted errors fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from discrete import Algorithm, Euler, SemiImplicitEuler
from ode_stopping import LossValue
from ode_stopping.flows import AdamFlow, HeavyBallFlow, NesterovFlow
from theory_checks.checks import (
    _flows,
    _from_rest,
    _two_modes,
    _two_modes_runs,
    algorithms,
    dynamics_orders,
    energies,
    oscillation,
)
from theory_checks.context import Context
from theory_checks.registry import REGISTRY, Outcome

NAMES = ("orders-dynamics", "algorithms", "first-crossing-oscillating", "energies")


def measured(outcome: Outcome) -> dict[str, float]:
    assert isinstance(outcome.measured, dict)
    return outcome.measured


def test_the_checks_are_registered() -> None:
    assert set(NAMES) <= {entry.name for entry in REGISTRY}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_quick_profile_holds(name: str) -> None:
    assert REGISTRY[name].function(Context(check=name)).passed


# --- orders ---------------------------------------------------------------------------------------

FEW = {"semi-implicit Euler": (50, 100), "Heun": (30, 80), "Runge-Kutta 4": (20, 40)}


def orders(flows: Sequence[str], rules: Sequence[str]) -> Outcome:
    ranges = {rule: FEW[rule] for rule in rules}
    return dynamics_orders.judge_orders(
        Context(), flows, ranges, levels=3, phases=2, from_rest=False
    )


def test_orders_of_a_flow_of_second_order() -> None:
    outcome = orders(("heavy ball",), tuple(FEW))
    assert outcome.passed
    (table,) = outcome.tables
    assert [row[1] for row in table.rows] == list(FEW)
    assert outcome.details["minima of J before T"]["heavy ball"] >= 1
    (figure,) = outcome.figures
    assert len(figure.figure.axes) == 2 * len(FEW)


def test_a_rule_of_order_1_does_not_pass_for_one_of_order_2(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(_flows.RULES, "Heun", Euler)
    outcome = orders(("gradient flow, preconditioner",), ("Heun",))
    assert not outcome.passed
    assert measured(outcome)["Heun: value"] == pytest.approx(1.0, abs=0.1)
    assert measured(outcome)["Heun: gradient"] == pytest.approx(1.0, abs=0.1)


def test_a_missing_part_of_theta_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start of the high-resolution flow depends on theta; detached, it loses a derivative."""
    assert orders(("high resolution",), ("Heun",)).passed
    true = _flows.measure_index

    def detached(update: Any, state: Any, *arguments: Any, **options: Any) -> Any:
        return true(update, tuple(piece.detach() for piece in state), *arguments, **options)

    monkeypatch.setattr(_flows, "measure_index", detached)
    outcome = orders(("high resolution",), ("Heun",))
    assert not outcome.passed
    assert measured(outcome)["Heun: value"] == pytest.approx(2.0, abs=0.1)
    assert abs(measured(outcome)["Heun: gradient"]) < 0.5


def test_flows_of_second_order_cross_after_a_dip() -> None:
    for name in ("heavy ball", "Nesterov", "NAG-SC", "high resolution", "Hessian damping"):
        assert _flows.minima_before(name) >= 1, name
    assert _flows.minima_before("gradient flow, schedule") == 0


def test_from_rest_rmsprop_loses_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_from_rest, "REST_COUNTS", (20, 40, 80))
    steps, errors = _from_rest.from_rest(("RMSProp", "Runge-Kutta 4"))
    assert dynamics_orders.fit_slope(steps, errors).slope == pytest.approx(1.5, abs=0.1)


# --- algorithms -----------------------------------------------------------------------------------


def iterates(*names: str) -> Outcome:
    return algorithms.judge_algorithms(Context(), names, ("quartic",))


def test_algorithms_hold() -> None:
    outcome = iterates(*algorithms.PAIRS)
    assert outcome.passed
    assert len(outcome.tables[0].rows) == len(algorithms.PAIRS) + len(algorithms.WRONG)
    # Off by percents: torch.optim is none of these.
    shares = outcome.details["wrong orders, relative to the way"]
    assert max(shares.values()) > 0.05


def taus_over_beta(f: Any, lr: float) -> Algorithm:
    """Adam with tau = lr/beta instead of lr/(1 - beta)."""
    flow = AdamFlow(f, tau1=lr / 0.9, tau2=lr / 0.99)
    return Algorithm("", flow, SemiImplicitEuler(flow, step=lr), flow.initial_state)


def damping_without_root(f: Any, lr: float) -> Algorithm:
    """SGD with a = (1 - m)/lr instead of (1 - m)/sqrt(lr)."""
    flow = HeavyBallFlow(f, damping=0.1 / lr)
    rule = SemiImplicitEuler(flow, step=lr**0.5)
    return Algorithm("", flow, rule, lambda x: (x, torch.zeros_like(x)))


@pytest.mark.parametrize(
    ("name", "make"), [("Adam", taus_over_beta), ("SGD, momentum", damping_without_root)]
)
def test_a_wrong_mapping_fails(
    monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[..., Algorithm]
) -> None:
    pair = algorithms.PAIRS[name]
    monkeypatch.setitem(algorithms.PAIRS, name, replace(pair, make=make))
    outcome = iterates(name)
    assert not outcome.passed
    assert measured(outcome)[name] > 1e-3


def test_planted_orders_have_to_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in [name for name, (of, _) in algorithms.WRONG.items() if of == "Adam"]:
        monkeypatch.setitem(algorithms.WRONG, wrong, ("Adam", SemiImplicitEuler))
    assert not iterates("Adam").passed


# --- the first crossing ---------------------------------------------------------------------------


def test_the_closed_form_against_dense_samples() -> None:
    times = np.linspace(0.0, 2.5, 250_001)
    for damping, known in ((0.87, 1.428), (0.88, 1.793), (1.9, 2.165)):
        found = _two_modes.first_crossing(damping)
        values, slopes = _two_modes.criterion(times, damping)
        assert found.time == pytest.approx(times[np.argmax(values <= _two_modes.TARGET)], abs=2e-5)
        assert found.time == pytest.approx(known, abs=5e-4)
        before = values[times < found.time]
        assert found.minima == _two_modes_runs.minima_of(before)
        # J' against central differences.
        differences = (values[2:] - values[:-2]) / (times[2:] - times[:-2])
        np.testing.assert_allclose(slopes[1:-1], differences, atol=1e-5)


@pytest.mark.parametrize("damping", [0.0, 2.0])
def test_the_closed_form_names_its_range(damping: float) -> None:
    with pytest.raises(ValueError, match=r"damping must be in \(0, 2\)"):
        _two_modes.first_crossing(damping)


@pytest.mark.slow
def test_both_sides_meet_the_first_crossing() -> None:
    outcome = oscillation.judge_crossings(
        Context(), [1.5, 1.7, 1.8], step=2e-3, jump_steps=(8e-3, 4e-3, 2e-3)
    )
    assert outcome.passed
    assert measured(outcome)["no warning just above a jump"] == 0
    assert len(outcome.tables[0].rows) == 3 + len(oscillation.JUST_ABOVE)
    # Something was compared, on both sides of the jump.
    assert {row[2] for row in outcome.tables[0].rows} == {4, 5}


class Late(LossValue):
    """Planted: J counts from about t = 1.6 on, which is after the first crossing at 1.4."""

    def forward(self, t: Tensor, state: Any) -> Tensor:
        return super().forward(t, state) + torch.exp(-((t / 1.5) ** 40))


def missed(figures: dict[str, tuple[float, float, float]]) -> set[str]:
    return {name for name, (value, truth, bound) in figures.items() if abs(value - truth) > bound}


def test_the_second_crossing_is_not_taken_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> set[str]:
        rows = oscillation.rows_of(Context(), [0.5, 0.8], [0.8753], 2e-3)
        return missed(oscillation.claims(rows, []))

    assert found() == set()
    monkeypatch.setattr(_two_modes_runs, "LossValue", Late)
    wrong = found()
    assert {"T of the flow: largest error", "largest |h N - T|, in steps"} <= wrong
    assert {"flow on another oscillation", "iteration on another oscillation"} <= wrong


def test_a_grid_without_a_jump_is_refused() -> None:
    with pytest.raises(ValueError, match="does not jump"):
        oscillation.judge_crossings(Context(), [0.5, 0.6], step=4e-3, jump_steps=(4e-3, 2e-3, 1e-3))
    with pytest.raises(ValueError, match="no jump between"):
        _two_modes.jump(lambda damping: 3, 0.5, 0.6, 1e-3)


# --- energies -------------------------------------------------------------------------------------


def fallen(*names: str) -> Outcome:
    return energies.judge_energies(Context(), names)


def test_energies_fall() -> None:
    outcome = fallen("heavy ball", "Nesterov", "Hessian damping", "Adam")
    assert outcome.passed
    assert measured(outcome)["(f - f*)/bound: Nesterov"] > 0.1
    for name, one in ((row[0], row) for row in outcome.tables[0].rows):
        assert one[2] < 0.95, name


def test_too_little_damping_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    weak = _flows.Dynamics(lambda f: NesterovFlow(f, alpha=1.0), t0=1.0)
    monkeypatch.setitem(_flows.FLOWS, "Nesterov", weak)
    outcome = fallen("Nesterov")
    assert not outcome.passed
    assert measured(outcome)["rise: Nesterov"] > 1e-2


@pytest.mark.parametrize(("factor", "holds"), [(0.5, True), (1.0, False)])
def test_a_wrong_factor_in_an_energy_fails(
    monkeypatch: pytest.MonkeyPatch, factor: float, holds: bool
) -> None:
    def energy(self: HeavyBallFlow, t: Any, state: Any) -> Tensor:
        x, v = state
        return self.excess(x) + factor * v.square().sum(-1)

    monkeypatch.setattr(HeavyBallFlow, "energy", energy)
    assert fallen("heavy ball").passed == holds


def test_a_bound_that_is_too_small_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        energies.BOUNDS, "Nesterov", ("E(t0)/t^4", lambda flow, t, start: start / t**4)
    )
    outcome = fallen("Nesterov")
    assert not outcome.passed
    assert measured(outcome)["rise: Nesterov"] < 1e-9
