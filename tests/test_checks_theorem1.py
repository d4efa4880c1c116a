"""The checks of Theorem 1: they hold, and a planted wrong formula makes each of them fail."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from variants import slow_after

from ode_stopping import BacksolveAdjoint
from ode_stopping.core.functions import CriterionMap, Vjp
from ode_stopping.core.sweep import Sweep
from ode_stopping.crossing.point import Crossing
from ode_stopping.gradients import backward
from ode_stopping.gradients import quotient as implicit
from ode_stopping.gradients.route import PullBack
from ode_stopping.solving.flow_map import FlowMap
from theory_checks.checks import _rotated, theorem1_closed_forms
from theory_checks.checks._odeint_adjoint import odeint_adjoint
from theory_checks.checks._rotated import (
    ROUTES,
    WITNESS,
    Answer,
    Cell,
    eigen_truth,
    make,
    plain_road,
)
from theory_checks.checks.theorem1_closed_forms import judge_closed_forms
from theory_checks.checks.theorem1_finite_differences import derivatives, judge_differences
from theory_checks.checks.theorem1_identities import CLOSED, SCHEDULED, judge_identities
from theory_checks.checks.theorem1_routes import MILD_TARGET, RTOL, judge_routes
from theory_checks.closed_forms import FORMS
from theory_checks.context import Context
from theory_checks.registry import REGISTRY, Outcome

DEFAULT = "StepAdjoint"
CONTINUOUS = "InterpolatingAdjoint"
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
    outcome = rotated(*ROUTES, WITNESS)
    assert outcome.passed
    assert max(measured(outcome).values()) < 1e-7
    # T twice, since the witness has one of its own; and whether StepAdjoint fell back.
    assert len(measured(outcome)) == len(ROUTES) + 4


def test_the_five_routes_are_compared() -> None:
    assert set(ROUTES) == {
        "StepAdjoint", "InterpolatingAdjoint", "BacksolveAdjoint", "DirectAdjoint",
        "ForwardSensitivity",
    }  # fmt: skip


@pytest.mark.parametrize("part", ["time", "start", "parameters"])
def test_routes_notice_a_witness_that_is_off_by_a_thousandth(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def off(*arguments: Any, **options: Any) -> Any:
        found = odeint_adjoint(*arguments, **options)
        value = getattr(found, part)
        scaled = tuple(1.001 * v for v in value) if part == "parameters" else 1.001 * value
        return replace(found, **{part: scaled})

    monkeypatch.setattr(_rotated, "odeint_adjoint", off)
    outcome = rotated(WITNESS)
    assert not outcome.passed
    assert max(measured(outcome).values()) > 1e-4


@pytest.mark.parametrize("route", slow_after(2, ROUTES))
def test_routes_notice_a_route_that_is_off_by_a_thousandth(
    monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    right = _rotated.by_route

    def off(cell: Cell, chosen: Any) -> Answer:
        found = right(cell, chosen)
        return replace(found, gradient=1.001 * found.gradient)

    monkeypatch.setattr(_rotated, "by_route", off)
    outcome = rotated(route, WITNESS)
    assert not outcome.passed
    name = next(name for name in measured(outcome) if name.startswith(f"{route}: "))
    assert measured(outcome)[name] == pytest.approx(1e-3, rel=1e-3)


def off_by_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk of steps hands on 1.001 lam."""
    right = Sweep.through

    def through(self: Sweep, *arguments: Any, **options: Any) -> list[Tensor]:
        found = right(self, *arguments, **options)
        self.lam = [1.001 * lam for lam in self.lam]
        return found

    monkeypatch.setattr(Sweep, "through", through)


def not_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi_y lam in the place of Phi_y^T lam."""
    right = Sweep.through

    def through(
        self: Sweep, end: Any, start: Any, extra: Any = (), *, keep: bool = False
    ) -> list[Tensor]:
        lams, (first,) = self.lam, start
        found = right(self, end, start, extra, keep=True)
        total = torch.zeros_like(first)
        for piece, lam in zip(end, lams, strict=True):
            dummy = torch.zeros_like(piece, requires_grad=True)
            (row,) = torch.autograd.grad(piece, first, dummy, create_graph=True)
            total = total + torch.autograd.grad(row, dummy, lam, retain_graph=True)[0]
        self.lam = [total]
        return found

    monkeypatch.setattr(Sweep, "through", through)


@pytest.mark.parametrize("planted", [off_by_a_thousandth, not_transposed])
def test_routes_notice_a_wrong_transposition(
    monkeypatch: pytest.MonkeyPatch, planted: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """StepAdjoint then hands over to the continuous adjoint, whose right numbers do not hide it."""
    planted(monkeypatch)
    outcome = rotated(DEFAULT)
    assert not outcome.passed
    fell_back = next(name for name in measured(outcome) if "fell back" in name)
    assert measured(outcome)[fell_back] == 1.0
    assert outcome.tables[0].rows[0][-1] == "fell back"


def test_closed_forms_notice_a_wrong_transposition(monkeypatch: pytest.MonkeyPatch) -> None:
    off_by_a_thousandth(monkeypatch)
    outcome = closed("form5")
    assert not outcome.passed
    assert measured(outcome)["answers by another route"] > 0.0


def test_routes_notice_wrong_sums_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """lam is right, so that the identity has nothing to say."""
    right = Sweep.through

    def through(self: Sweep, *arguments: Any, **options: Any) -> list[Tensor]:
        found = right(self, *arguments, **options)
        self.sums = [1.001 * total for total in self.sums]
        return found

    monkeypatch.setattr(Sweep, "through", through)
    outcome = rotated(DEFAULT)
    assert not outcome.passed
    assert sum(v > 1e-4 for v in measured(outcome).values()) == 1


def test_routes_notice_a_wrong_continuous_adjoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The witness stays right: nothing of the library's backward solve is in it."""
    right = ROUTES[CONTINUOUS].pull_back_path

    def wrong(self: Any, *arguments: Any) -> PullBack:
        found = right(self, *arguments)
        return replace(found, leaves=[1.001 * leaf for leaf in found.leaves])

    monkeypatch.setattr(ROUTES[CONTINUOUS], "pull_back_path", wrong)
    outcome = rotated(CONTINUOUS, WITNESS)
    assert not outcome.passed
    assert [name.split(":")[0] for name, v in measured(outcome).items() if v > 1e-4] == [CONTINUOUS]


@pytest.mark.parametrize("form", list(FORMS))
def test_the_witness_knows_every_closed_form(form: str) -> None:
    """Among them a flow that depends on t, and parameters of the criterion alone and of both."""
    case = FORMS[form]
    leaves, answer = case.leaves(1e-2, 0.25), case.answer(case.values(1e-2, 0.25))
    names = list(case.parameters)
    found = odeint_adjoint(
        case.flow(leaves),
        leaves["x0"],
        case.criterion(leaves),
        1e-2,
        [leaves[name] for name in names],
        t0=0.25,
    )
    assert found.time == pytest.approx(answer["T"], rel=1e-8)
    for name, gradient in zip([*names, "x0"], [*found.parameters, found.start], strict=True):
        np.testing.assert_allclose(gradient, answer[name], rtol=1e-6, atol=1e-9, err_msg=name)


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
