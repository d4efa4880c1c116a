"""The checks of Theorem 1: they hold, and a planted wrong formula makes each of them fail."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ode_stopping import BacksolveAdjoint
from ode_stopping.core.functions import CriterionMap, Vjp
from ode_stopping.crossing.point import Crossing
from ode_stopping.gradients import judge as backward
from ode_stopping.gradients import quotient as implicit
from ode_stopping.solving.flow_map import FlowMap
from theory_checks.checks import theorem1_closed_forms
from theory_checks.checks._rotated import ROUTES, Answer, Cell, eigen_truth, make, plain_road
from theory_checks.checks.theorem1_closed_forms import judge_closed_forms
from theory_checks.checks.theorem1_finite_differences import derivatives, judge_differences
from theory_checks.checks.theorem1_identities import CLOSED, SCHEDULED, judge_identities
from theory_checks.checks.theorem1_routes import MILD_TARGET, RTOL, judge_routes
from theory_checks.closed_forms import FORMS
from theory_checks.context import Context
from theory_checks.registry import REGISTRY, Outcome

DEFAULT = "InterpolatingAdjoint"
right_quotient = implicit.cotangent_at_crossing


def wrong_sign(crossing: Crossing, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    _, scale = right_quotient(crossing, c, w)
    return w - scale * crossing.gradient, -scale


def epsilon_below(crossing: Crossing, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    scale = -(w @ crossing.velocity + c) / (crossing.rate + 1e-12)
    return w + scale * crossing.gradient, scale


def plant(monkeypatch: pytest.MonkeyPatch, quotient: Callable[..., Any]) -> None:
    """Replace the quotient where it is defined and where it is used."""
    for module in (implicit, backward):
        monkeypatch.setattr(module, "cotangent_at_crossing", quotient)


def measured(outcome: Outcome) -> dict[str, float]:
    assert isinstance(outcome.measured, dict)
    return outcome.measured


# --- closed forms ---------------------------------------------------------------------------------


def closed(*forms: str, eps: float = 1e-1, routes: tuple[str, ...] = (DEFAULT,)) -> Outcome:
    ladder = (1e-6, 1e-10)
    names = [name for form in forms for name in FORMS if name.startswith(form)]
    by_route = dict.fromkeys(routes, (eps,))
    return judge_closed_forms(Context(), names, by_route, ladder, routes[:1])


def test_closed_forms_hold_by_every_route() -> None:
    outcome = closed("form", routes=tuple(ROUTES))
    assert outcome.passed
    assert set(measured(outcome)) >= {
        "T", "dT/dtheta", "dT/dphi", "dT/d(theta = phi)", "dT/dx0", "dT/deps", "dT/dt0",
    }  # fmt: skip
    assert measured(outcome)["T"] > 0.0
    assert len(outcome.tables[0].rows) == 6 * (1 + len(ROUTES))


def test_closed_forms_notice_a_wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, wrong_sign)
    outcome = closed("form1")
    assert not outcome.passed
    assert measured(outcome)["dT/dtheta"] > 1.0


def test_closed_forms_notice_a_missing_explicit_term(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CriterionMap.vjp

    def without_parameters(self: CriterionMap, *args: Any, **options: Any) -> Vjp:
        product = right(self, *args, **options)
        zeros = [torch.zeros_like(g) for g in product.leaves]
        return Vjp(product.value, product.state, product.time, zeros)

    monkeypatch.setattr(CriterionMap, "vjp", without_parameters)
    outcome = closed("form2", "form6")
    assert not outcome.passed
    assert measured(outcome)["dT/dphi"] == pytest.approx(1.0)
    assert measured(outcome)["dT/d(theta = phi)"] > 1e-2
    assert measured(outcome)["dT/deps"] < 1e-7


def test_closed_forms_notice_an_epsilon_in_the_denominator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, epsilon_below)
    # 1e-12 / |J'| is 4e-12 at the largest target, and 0.4 at the smallest.
    assert closed("form1", eps=1e-1).passed
    outcome = closed("form1", eps=1e-12)
    assert not outcome.passed
    assert measured(outcome)["dT/dtheta"] > 0.1


def test_a_route_that_always_refuses_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    # No mismatch is below a negative tolerance.
    never = functools.partial(BacksolveAdjoint, tolerance=-1.0)
    monkeypatch.setitem(theorem1_closed_forms.ROUTES, "BacksolveAdjoint", never)
    outcome = closed("form1", routes=(DEFAULT, "BacksolveAdjoint"))
    assert not outcome.passed
    assert measured(outcome)["refusals where an answer is due"] == 1.0


# --- routes on rotated problems -------------------------------------------------------------------


def rotated(*roads: str, condition: float = 3.0, target: float = MILD_TARGET) -> Outcome:
    problem = ("quadratic", 6, condition, target, 0)
    return judge_routes(Context(), [Cell(*problem, road, RTOL) for road in (*roads, "truth")], [])


def test_routes_hold_on_a_mild_problem() -> None:
    outcome = rotated(*ROUTES)
    assert outcome.passed
    assert max(measured(outcome).values()) < 1e-7
    assert len(measured(outcome)) == len(ROUTES) + 1


def test_backsolve_may_refuse_a_stiff_problem_only() -> None:
    assert rotated("BacksolveAdjoint", DEFAULT, condition=100.0, target=1e-4).passed
    assert not rotated("BacksolveAdjoint", condition=100.0).passed


def test_routes_notice_a_wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, wrong_sign)
    assert not rotated(DEFAULT).passed


def test_the_eigen_truth_is_the_derivative_of_its_own_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cell = Cell("quadratic", 4, 10.0, 1e-2, 0, "truth", RTOL)
    exact = eigen_truth(cell).gradient
    objective, p, x0 = make(cell)
    joined = torch.cat([p, x0]).detach()

    def time_at(point: Tensor) -> float:
        new_p, new_x0 = point[:4].clone().requires_grad_(), point[4:].clone().requires_grad_()
        monkeypatch.setitem(eigen_truth.__globals__, "make", lambda _: (objective, new_p, new_x0))
        return eigen_truth(cell).time

    unit, h = torch.eye(8, dtype=torch.float64), 1e-4
    found = [(time_at(joined + h * e) - time_at(joined - h * e)) / (2 * h) for e in unit]
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-7)


def test_the_plain_road_is_a_diagnostic_and_never_judged() -> None:
    problem = ("quadratic", 6, 30.0, 1e-4, 0)
    cells = [Cell(*problem, road, RTOL) for road in (DEFAULT, "truth")]
    outcome = judge_routes(Context(), cells, [Cell(*problem, "plain", 1e-6)])
    assert outcome.passed
    assert not any("plain" in name or "torchdiffeq" in name for name in measured(outcome))
    # It is there to be seen, though: T is right and its gradient is not.
    shown = next(row for row in outcome.tables[0].rows if row[1] == "torchdiffeq alone")
    assert shown[3] < 1e-5
    assert not shown[4] < 1e-3


def test_the_plain_road_says_what_it_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise AssertionError("underflow in dt")

    monkeypatch.setattr("torchdiffeq.odeint_event", fails)
    answer = plain_road(Cell("quadratic", 4, 2.0, 1e-2, 0, "plain", 1e-6))
    assert isinstance(answer, Answer)
    assert answer.raised == "AssertionError: underflow in dt"
    assert not answer.gradient.size


# --- finite differences ---------------------------------------------------------------------------


def test_differences_hold() -> None:
    outcome = judge_differences(Context(), ("decay", "t0"), (8, 16), derivatives)
    assert outcome.passed
    assert measured(outcome)["slope: decay"] == pytest.approx(2.0, abs=0.01)


def test_differences_notice_a_gradient_that_is_off_by_a_millionth() -> None:
    def off(seed: int) -> dict[str, float]:
        return {name: (1 + 1e-6) * value for name, value in derivatives(seed).items()}

    outcome = judge_differences(Context(), ("t0",), (8, 16), off)
    assert not outcome.passed
    assert measured(outcome)["smallest error: t0"] > 1e-7


# --- identities -----------------------------------------------------------------------------------

SMALL = {"quartic": {"dim": 5, "condition": 5.0, "target": 1e-2}}


def test_identities_hold() -> None:
    outcome = judge_identities(Context(), SMALL, (CLOSED, SCHEDULED), (1e-6, 1e-9))
    assert outcome.passed
    loose, tight = outcome.tables[0].rows[0][1:]
    assert tight < 0.1 * loose


def test_identities_notice_a_wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, wrong_sign)
    outcome = judge_identities(Context(), SMALL, (CLOSED,), (1e-6,))
    assert not outcome.passed
    assert measured(outcome)["lam^T x' + 1: quartic"] == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize(("of_state", "of_time"), [(1.001, 1.0), (1.0, 0.0)])
def test_identities_notice_a_wrong_adjoint(
    monkeypatch: pytest.MonkeyPatch, of_state: float, of_time: float
) -> None:
    """F_x^T lam off by a thousandth breaks both identities; a lost F_t breaks the second."""
    right = FlowMap.pull

    def wrong(self: FlowMap, *args: Any, **options: Any) -> Vjp:
        product = right(self, *args, **options)
        state, time = of_state * product.state, of_time * product.time
        return Vjp(product.value, state, time, product.leaves)

    monkeypatch.setattr(FlowMap, "pull", wrong)
    outcome = judge_identities(Context(), SMALL, (CLOSED,), (1e-6,))
    assert not outcome.passed
    assert measured(outcome)[f"two forms of dT/dt0: {CLOSED}"] > 1e-4
    assert (measured(outcome)["lam^T x' + 1: quartic"] > 1e-4) == (of_state != 1.0)


# --- the checks as they are run -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry.name for entry in REGISTRY.select(["theorem-1"])])
def test_the_quick_profile_holds(name: str) -> None:
    assert REGISTRY[name].function(Context(check=name)).passed
