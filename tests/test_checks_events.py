"""The checks of events: they hold, their truths hold elsewhere, planted errors fail."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import brentq
from torch import Tensor

from ode_stopping import integrate
from ode_stopping.crossing.point import Crossing
from ode_stopping.gradients import backward, chain
from theory_checks.checks import events_ball, events_discrete, events_dosing, events_spikes
from theory_checks.checks._events import errors_of, jacobian, leaves_of
from theory_checks.context import Context
from theory_checks.registry import REGISTRY, Outcome

NAMES = ("events-ball", "events-dosing", "events-spikes", "events-discrete")
DEFAULT = "StepAdjoint"
wrong_on_purpose = pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")


def measured(outcome: Outcome) -> dict[str, float]:
    assert isinstance(outcome.measured, dict)
    return outcome.measured


def without_saltation(crossing: Crossing, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The state at an event as if the time of the event did not move."""
    scale = -c / crossing.rate
    return w + scale * crossing.gradient, scale


def plant_saltation(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (backward, chain):
        monkeypatch.setattr(module, "cotangent_at_crossing", without_saltation)


def test_the_checks_are_one_group() -> None:
    assert [entry.name for entry in REGISTRY.select(["events"])] == list(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_quick_profile_holds(name: str) -> None:
    assert REGISTRY[name].function(Context(check=name)).passed


def test_errors_hand_on_what_is_no_number() -> None:
    leaves = leaves_of({"a": 1.0, "b": [1.0, 2.0]})
    exact = np.array([[1.0, 3.0, 4.0], [0.0, 0.3, 0.4]])
    found = exact + np.array([[0.1, 0.0, 0.5], [0.2, 0.0, 0.05]])
    assert errors_of(found, exact, leaves) == pytest.approx({"a": 0.2, "b": 0.1})
    assert errors_of(found, exact, leaves, by_column=True) == pytest.approx({"a": 0.2, "b": 0.1})
    found[1, 0] = math.nan
    assert math.isnan(errors_of(found, exact, leaves)["a"])


# --- bouncing ball --------------------------------------------------------------------------------


def ball(*outputs: int) -> Outcome:
    return events_ball.judge_ball(Context(), [events_ball.Cell(DEFAULT, outputs)])


def test_the_closed_form_of_the_ball() -> None:
    leaves = events_ball.ball_leaves()
    times = events_ball.impact_times(leaves, 8).detach().numpy()
    fall = math.sqrt(2 * 2.0 / 9.81)
    known = [0.25 + fall * (1 + 2 * sum(0.8**k for k in range(1, n))) for n in range(1, 9)]
    np.testing.assert_allclose(times, known, rtol=1e-14)
    # The same thrown upward over a floor that is not at zero, flight by flight by DOP853.
    thrown = {**leaves, **leaves_of({"v0": 1.5, "floor": -0.3})}
    times = events_ball.impact_times(thrown, 5).detach().numpy()
    thrown["at"] = torch.tensor(0.5 * (times[3] + times[4]))

    def below(t: float, s: Any) -> float:
        return float(s[0]) + 0.3

    below.terminal, below.direction = True, -1.0  # type: ignore[attr-defined]
    t, state, found, middle = 0.25, [2.0, 1.5], [], 0.0
    for n in range(5):
        run = solve_ivp(
            lambda t, s: [s[1], -9.81],
            (t, t + 10.0),
            state,
            method="DOP853",
            rtol=1e-12,
            events=below,
            dense_output=True,
        )
        if n == 4:
            middle = run.sol(float(thrown["at"]))[0]
        t, (y, v) = float(run.t_events[0][0]), run.y_events[0][0]
        state = [y, -0.8 * v]
        found.append(t)
    np.testing.assert_allclose(times, found, rtol=1e-11)
    assert float(events_ball.height(thrown, 4).detach()) == pytest.approx(middle, rel=1e-10)


def test_the_ball_holds() -> None:
    outcome = ball(0, 3, 8)
    assert outcome.passed
    assert measured(outcome)[f"derivatives: {DEFAULT}"] < 1e-11
    assert len(outcome.tables[0].rows[0]) == 1 + 7


@wrong_on_purpose
def test_the_ball_notices_a_missing_saltation_term(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_saltation(monkeypatch)
    assert ball(0).passed  # nothing is behind an event there
    outcome = ball(3)
    assert not outcome.passed
    assert measured(outcome)[f"derivatives: {DEFAULT}"] > 1e-2
    assert measured(outcome)["values"] < 1e-12


def test_the_ball_notices_a_lost_derivative_of_the_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    right = events_ball.bounce

    def detached(leaves: dict[str, Tensor], *others: Any) -> Any:
        return right({**leaves, "e": leaves["e"].detach()}, *others)

    monkeypatch.setattr(events_ball, "bounce", detached)
    outcome = ball(3)
    assert not outcome.passed
    assert measured(outcome)[f"derivatives: {DEFAULT}"] == pytest.approx(1.0)


def test_the_ball_notices_an_end_that_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events_ball, "ZENO_RESTITUTION", 0.99)
    outcome = ball(0)
    assert not outcome.passed
    assert measured(outcome)["Zeno sequences that are not told"] == 1.0


# --- infusions ------------------------------------------------------------------------------------


def dosing() -> Outcome:
    return events_dosing.judge_dosing(Context(), (DEFAULT,))


def test_the_superposition_against_dop853() -> None:
    leaves = events_dosing.schedule(0)
    starts, spans, rates = (
        leaves[name].detach().numpy() for name in ("starts", "durations", "rates")
    )
    nodes = np.sort(np.concatenate([starts, starts + spans, [0.0, events_dosing.END]]))
    level = 0.2
    for begin, end in pairwise(nodes.tolist()):
        middle = 0.5 * (begin + end)
        rate = rates[(starts < middle) & (middle < starts + spans)].sum()
        run = solve_ivp(
            lambda t, x, rate=rate: rate - 0.9 * x,
            (begin, end),
            [level],
            method="DOP853",
            rtol=1e-12,
            atol=1e-14,
        )
        level = run.y[0, -1]
        exact = float(
            events_dosing.concentration(leaves, torch.tensor(end, dtype=torch.float64)).detach()
        )
        assert exact == pytest.approx(level, rel=1e-10)
    # The derivative of a crossing to one start, against differences of its own roots.
    times = events_dosing.true_crossings(leaves)
    (slope,) = torch.autograd.grad(times[9], leaves["starts"])
    errors = []
    for move in (2e-3, 1e-3):
        ends = []
        for sign in (1, -1):
            other = dict(leaves)
            other["starts"] = leaves["starts"].detach().clone()
            other["starts"][2] += sign * move
            ends.append(float(events_dosing.true_crossings(other)[9].detach()))
        errors.append(abs((ends[0] - ends[1]) / (2 * move) - float(slope[2])))
    assert errors[1] < 1e-5 * abs(float(slope[2]))
    assert errors[0] / errors[1] == pytest.approx(4.0, abs=0.2)


def test_dosing_holds() -> None:
    outcome = dosing()
    assert outcome.passed
    assert outcome.details["crossings"] >= 2 * 10
    assert len(outcome.tables[0].rows) == 2


@wrong_on_purpose
@pytest.mark.parametrize("what", ["breakpoints", "end"])
def test_dosing_notices(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Times that are plain numbers, and a solve that ends too early."""

    def planted(*arguments: Any, **options: Any) -> Any:
        if what == "end":
            options["until"] = 9.0
        else:
            options["breakpoints"] = options["breakpoints"].detach()
        return integrate(*arguments, **options)

    monkeypatch.setattr(events_dosing, "integrate", planted)
    outcome = dosing()
    assert not outcome.passed
    if what == "end":
        assert measured(outcome)["crossings too few or too many"] > 0
    else:
        assert outcome.tables[0].rows[0][2] == pytest.approx(1.0)
        assert measured(outcome)["times of the crossings"] < 1e-7


# --- spikes ---------------------------------------------------------------------------------------


def test_the_spikes_of_dop853_against_the_solution_of_the_linear_equation() -> None:
    values = events_spikes.neuron("sinusoidal")
    tau, omega, phase = (values[name] for name in ("tau", "omega", "phase"))

    def forced(t: float) -> float:
        """The solution that stays, of tau v' = -v + I0 + A sin(omega t + phase)."""
        turned = math.sin(omega * t + phase) - omega * tau * math.cos(omega * t + phase)
        return values["I0"] + values["A"] * turned / (1 + (omega * tau) ** 2)

    t, v, times = values["t0"], values["v0"], []
    for _ in range(events_spikes.SPIKES):

        def excess(s: float, t: float = t, v: float = v) -> float:
            decay = (v - forced(t)) * math.exp(-(s - t) / tau)
            return forced(s) + decay - values["threshold"]

        grid = np.linspace(t, t + 5.0, 1000)
        first = int(np.argmax([excess(s) > 0 for s in grid]))
        t, v = float(brentq(excess, grid[first - 1], grid[first], xtol=1e-15)), values["reset"]
        times.append(t)
    np.testing.assert_allclose(events_spikes.simulated(values), times, atol=1e-11)


def test_the_differences_against_a_closed_form() -> None:
    flat = {**events_spikes.neuron("sinusoidal"), "A": 0.0}
    leaves = leaves_of(events_spikes.neuron("constant"))
    times = events_spikes.constant_truth(leaves)
    np.testing.assert_allclose(events_spikes.simulated(flat), times.detach(), rtol=1e-11)
    found = events_spikes.differences(flat)
    columns = [list(flat).index(name) for name in leaves]
    np.testing.assert_allclose(found[:, columns], jacobian(times, leaves), atol=2e-8)


spike_truth = functools.cache(events_spikes.truth_of)


def spikes(monkeypatch: pytest.MonkeyPatch, drive: str, *numbers: int) -> Outcome:
    monkeypatch.setattr(events_spikes, "NUMBERS", numbers)
    monkeypatch.setattr(events_spikes, "truth_of", spike_truth)
    return events_spikes.judge_spikes(Context(), (drive,), (DEFAULT,))


@pytest.mark.parametrize("drive", ["sinusoidal", "constant"])
def test_spikes_hold(monkeypatch: pytest.MonkeyPatch, drive: str) -> None:
    assert spikes(monkeypatch, drive, 1, 5).passed


@wrong_on_purpose
def test_spikes_notice_a_missing_saltation_term(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_saltation(monkeypatch)
    # The reset forgets v, so only the clock carries the time of a spike on: nothing is lost there.
    name = f"derivatives, constant input: {DEFAULT}"
    assert measured(spikes(monkeypatch, "constant", 1))[name] < 1e-6

    def still(self: Any, problem: Any, *others: Any) -> None:
        right(self, problem, *others)
        self._tau = torch.zeros_like(self._tau)

    right = chain._Back._through_problem
    monkeypatch.setattr(chain._Back, "_through_problem", still)
    outcome = spikes(monkeypatch, "constant", 5)
    assert not outcome.passed
    assert measured(outcome)[name] > 0.1


def test_spikes_notice_a_reset_that_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    right = events_spikes.spikes

    def off(leaves: dict[str, Tensor], route: str) -> Tensor:
        return right({**leaves, "reset": leaves["reset"] + 1e-4}, route)

    monkeypatch.setattr(events_spikes, "spikes", off)
    outcome = spikes(monkeypatch, "sinusoidal", 5)
    assert not outcome.passed
    assert measured(outcome)["spike times"] > 1e-4


# --- the discrete counterpart ---------------------------------------------------------------------


def discrete() -> Outcome:
    return events_discrete.judge_discrete(Context(), (40, 160), levels=3, phases=6)


def test_the_discrete_counterpart_holds() -> None:
    outcome = discrete()
    assert outcome.passed
    assert len(outcome.tables[0].rows) == 3
    assert measured(outcome)["linear: value"] == pytest.approx(1.0, abs=0.05)


def planted_cells(change: Callable[[events_discrete.Cell], events_discrete.Cell]) -> Any:
    right = events_discrete.iterate

    def iterate(cell: events_discrete.Cell) -> events_discrete.Measured:
        return right(change(cell))

    return iterate


@pytest.mark.parametrize("saltation", [False, True])
def test_the_two_kinds_of_iteration_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, saltation: bool
) -> None:
    monkeypatch.setattr(
        events_discrete,
        "iterate",
        planted_cells(lambda cell: replace(cell, saltation=saltation)),
    )
    outcome = discrete()
    assert not outcome.passed
    if saltation:
        assert measured(outcome)["a gap without the saltation term"] == 0.0
        assert measured(outcome)["linear: gradient"] == pytest.approx(1.0, abs=0.2)
    else:
        assert abs(measured(outcome)["linear: gradient"]) < 0.2
        assert measured(outcome)["linear: value"] == pytest.approx(1.0, abs=0.05)


def test_the_iteration_against_differences_of_itself() -> None:
    """Autograd through the iteration is the derivative of the iteration, for both ways."""
    values = dict(events_discrete.BALL)
    for way in events_discrete.WAYS:
        cell = events_discrete.Cell(way, 0.0171)
        found = events_discrete.iterate(cell).gradient
        for index, name in enumerate(values):
            move = 1e-6 * abs(values[name])
            with pytest.MonkeyPatch.context() as patch:
                times = []
                for sign in (1, -1):
                    patch.setitem(events_discrete.BALL, name, values[name] + sign * move)
                    times.append(events_discrete.iterate(cell).time)
            slope = (times[0] - times[1]) / (2 * move)
            assert found[index] == pytest.approx(slope, rel=1e-6, abs=1e-8), (way, name)
