"""The evidence on a result: figures that follow the true error, and warnings with a reason."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from rotated import RotatedQuadratic
from torch import Tensor
from variants import slow_after

from ode_stopping import (
    BacksolveAdjoint,
    BacksolveMismatchError,
    DirectAdjoint,
    ForwardSensitivity,
    GradientAccuracyWarning,
    GradientRoute,
    InterpolatingAdjoint,
    StepAdjoint,
    StoppingResult,
    StoppingWarning,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.crossing.near_miss import Dips
from ode_stopping.gradients import PullBack
from ode_stopping.gradients.problem import StoppingProblem
from ode_stopping.solving.solver import PROMISE_PER_RTOL
from theory_checks.closed_forms import CLOSED_FORMS, ClosedForm

EXPONENTIAL = CLOSED_FORMS[0]
ROUTES = [
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
]
ONE = torch.ones(1, dtype=torch.float64)


def solved(case: ClosedForm, route: GradientRoute, eps: float = 1e-4) -> StoppingResult:
    leaves = case.leaves(eps, 0.25)
    result = case.solve(leaves, route)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientAccuracyWarning)
        result.time.backward()
    return result


def largest_error(case: ClosedForm, route: GradientRoute, rtol: float) -> tuple[float, float]:
    """(true error, estimate) of a gradient."""
    leaves = case.leaves(1e-3, 0.25)
    result = case.solve(leaves, route, rtol=rtol)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientAccuracyWarning)
        result.time.backward()
    assert result.evidence is not None
    assert result.evidence.estimate is not None
    return max(case.errors(result.time, leaves)[1].values()), result.evidence.estimate


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: type(route).__name__)
@pytest.mark.parametrize("case", CLOSED_FORMS, ids=lambda case: case.name)
def test_every_route_leaves_evidence(case: ClosedForm, route: GradientRoute) -> None:
    if isinstance(route, BacksolveAdjoint) and case.name == "form4-cubic":
        pytest.skip("x does not come back over so long a path: BacksolveAdjoint raises")
    evidence = solved(case, route).evidence
    assert evidence is not None
    assert evidence.estimate is not None
    assert evidence.promise == pytest.approx(PROMISE_PER_RTOL * 1e-7)
    assert {"identity", "noise", "rounding"} <= set(evidence.figures)
    assert evidence.estimate < 1e-4


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=lambda case: case.name)
def test_the_estimate_is_no_smaller_than_a_tenth_of_the_error(case: ClosedForm) -> None:
    for rtol in (1e-3, 1e-5, 1e-7, 1e-9):
        error, estimate = largest_error(case, InterpolatingAdjoint(), rtol)
        assert error <= max(10 * estimate, PROMISE_PER_RTOL * rtol)


def test_the_cost_of_the_evidence_is_not_the_cost_of_the_route() -> None:
    """DirectAdjoint is checked by a backward solve of its own; its count is that of the replay."""
    result = solved(EXPONENTIAL, DirectAdjoint())
    before = result.stats.checks
    # And the velocity and its derivative at the crossing.
    assert result.stats.vjps == 6 * result.stats.accepted + 2
    assert before > result.stats.accepted


def test_before_a_backward_pass_there_is_none() -> None:
    leaves = EXPONENTIAL.leaves(1e-4, 0.0)
    result = EXPONENTIAL.solve(leaves, InterpolatingAdjoint())
    assert result.evidence is not None
    assert result.evidence.estimate is None
    assert result.evidence.passed is None
    assert "no gradient yet" in repr(result.evidence)
    result.time.backward()
    assert result.evidence.passed
    assert "estimated error" in repr(result)


def test_no_evidence_without_a_gradient() -> None:
    result = EXPONENTIAL.solve(EXPONENTIAL.leaves(1e-4, 0.0), None)
    assert result.evidence is None


def test_evidence_survives_json_and_pickle() -> None:
    result = solved(EXPONENTIAL, InterpolatingAdjoint())
    assert result.evidence is not None
    figures = json.loads(json.dumps(result.to_dict()))["evidence"]
    assert figures["estimate"] == result.evidence.estimate
    assert pickle.loads(pickle.dumps(result)).evidence == result.evidence


class Wrong(InterpolatingAdjoint):
    """The default route with an error in lam or in a parameter integral."""

    spoil: Callable[[PullBack], PullBack]

    def pull_back(self, problem: StoppingProblem, cotangent: Tensor) -> PullBack:
        return type(self).spoil(super().pull_back(problem, cotangent))


class WrongIntegral(Wrong):
    """Its parameter integrals are 1 % off."""

    @staticmethod
    def spoil(pulled: PullBack) -> PullBack:
        return replace(pulled, leaves=[1.01 * leaf for leaf in pulled.leaves])


def test_the_former_name_of_light() -> None:
    with pytest.warns(DeprecationWarning, match='"cheap" is called "light"'):
        result = stopping_time(
            lambda t, x: -x, ONE, lambda t, x: x.sum(), 0.1, evidence="cheap", gradient=None
        )
    assert float(result.time) == pytest.approx(2.302585, rel=1e-5)


def test_unknown_evidence() -> None:
    with pytest.raises(ValueError, match='must be "light", "standard" or "thorough"; got \'full\''):
        stopping_time(lambda t, x: -x, ONE, lambda t, x: x.sum(), 0.1, evidence="full")  # type: ignore[arg-type]


def test_single_precision_on_a_stiff_flow_is_named() -> None:
    """At condition 3e3 and a small target one rounding of x_T is seen in grad J."""
    problem = RotatedQuadratic(condition=3e3, dim=5)
    matrix, p, x0 = (tensor.float() for tensor in problem.data())
    x0.requires_grad_()
    result = stopping_time(
        lambda t, x: -p * (matrix @ x),
        x0,
        lambda t, x: (matrix @ x).square().sum(),
        1e-8,
        evidence="light",
    )
    with pytest.warns(GradientAccuracyWarning, match=r"float32 .* Use float64") as caught:
        result.time.backward()
    assert "promises" in str(caught[0].message)


def test_a_loose_tolerance_on_a_stiff_flow_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the finer last steps the error of the last ones is what lam(T) is made of."""
    monkeypatch.setattr("ode_stopping.crossing.run._POLISH_AFTER", 10**9)
    monkeypatch.setattr(
        "ode_stopping.solving.errors.VelocityError._ratio", lambda self, *lists: 0.0
    )
    problem = RotatedQuadratic(condition=1e3, dim=5)
    leaves = problem.leaves()
    result = problem.solve(leaves, 1e-5, InterpolatingAdjoint(), 1e-4)
    with pytest.warns(GradientAccuracyWarning, match="stiff and the tolerance loose"):
        result.time.backward()


def kinked(x0: Tensor, route: GradientRoute) -> StoppingResult:
    """The velocity jumps where x passes 1: lam has a jump there that no adjoint equation has."""
    return stopping_time(
        lambda t, x: -torch.where(x > 1, 1.0, 3.0) * x,
        x0,
        lambda t, x: x.sum(),
        0.1,
        gradient=route,
    )


@pytest.mark.parametrize("route", slow_after(2, ROUTES), ids=lambda route: type(route).__name__)
def test_a_jump_in_the_state_is_warned_about(route: GradientRoute) -> None:
    """dT/dx0 = 1/x0, and every route gives a third of it: the warning says by how much."""
    x0 = (3 * ONE).requires_grad_()
    result = kinked(x0, route)
    with pytest.warns(GradientAccuracyWarning, match="flow jumps"):
        result.time.backward()
    assert x0.grad is not None
    assert x0.grad.item() == pytest.approx(1 / 9, rel=1e-4)
    assert result.evidence is not None
    assert result.evidence.estimate == pytest.approx(2 / 3, rel=0.1)


def relu_flow() -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
    """x' = -W2 relu(W1 x) - x: continuous, with kinks."""
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_()
    return lambda t, x: -first.T @ torch.relu(first @ x) - 0.1 * x, first


RELU_START = torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64)


@cache
def relu_difference() -> float:
    """dT/dW_11 by a central difference."""
    flow, weights = relu_flow()
    times = []
    for shift in (1e-5, -2e-5):
        with torch.no_grad():
            weights[0, 0] += shift
        solver = Torchdiffeq(rtol=1e-11)
        times.append(stopping_time(flow, RELU_START, _size, 1e-2, gradient=None, solver=solver))
    return (times[0].time.item() - times[1].time.item()) / 2e-5


@pytest.mark.parametrize(
    "route",
    [
        StepAdjoint(),
        InterpolatingAdjoint(),
        pytest.param(ForwardSensitivity(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_relu_networks_are_differentiated_along_the_path(route: GradientRoute) -> None:
    """The velocity is continuous, so its kinks do little harm; differences agree.

    Steps over a kink are less accurate than their tolerance, by a factor of some ten to hundred:
    whether that is just below the promise or above it, the estimate says how much it is.
    """
    flow, weights = relu_flow()
    solver = Torchdiffeq(rtol=1e-8)
    result = stopping_time(flow, RELU_START, _size, 1e-2, gradient=route, solver=solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientAccuracyWarning)
        (gradient,) = torch.autograd.grad(result.time, weights)
    assert gradient[0, 0].item() == pytest.approx(relu_difference(), rel=1e-5)
    assert result.evidence is not None
    assert result.evidence.estimate is not None
    assert result.evidence.estimate < 1e-5


@pytest.mark.parametrize("route", [DirectAdjoint(), BacksolveAdjoint()])
def test_routes_that_are_worse_at_kinks_say_so(route: GradientRoute) -> None:
    """A solver that is differentiated steps over a kink; x that goes backward misses x0."""
    flow, weights = relu_flow()
    solver = Torchdiffeq(rtol=1e-8)
    result = stopping_time(flow, RELU_START, _size, 1e-2, gradient=route, solver=solver)
    if isinstance(route, BacksolveAdjoint):
        with pytest.raises(BacksolveMismatchError):
            result.time.backward()
        return
    with pytest.warns(GradientAccuracyWarning):
        (gradient,) = torch.autograd.grad(result.time, weights)
    assert result.evidence is not None
    assert result.evidence.estimate is not None
    error = abs(gradient[0, 0].item() / relu_difference() - 1)
    assert 1e-6 < error < 10 * result.evidence.estimate


def _size(t: Tensor, x: Tensor) -> Tensor:
    return x.square().sum()


def test_the_largest_of_several_losses() -> None:
    """J = max(J1, J2): smooth at the crossing, whichever is the larger one there."""
    rates = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([1.0, 3.0], dtype=torch.float64)
    result = stopping_time(lambda t, x: -rates * x, start, lambda t, x: x.abs().max(), 0.1)
    (gradient,) = torch.autograd.grad(result.time, rates)
    slow = torch.log(torch.tensor(10.0, dtype=torch.float64))
    assert gradient[0].item() == pytest.approx(-slow.item(), rel=1e-6)
    assert gradient[1].item() == 0.0


@pytest.fixture
def two_modes() -> Callable[[float], tuple[StoppingResult, list[str]]]:
    """Closed form 7: heavy ball on two modes, whose T jumps between the dampings 0.87 and 0.88."""
    curvatures = torch.tensor([1.0, 60.0], dtype=torch.float64)
    start = (torch.tensor([1.0, 0.3], dtype=torch.float64), torch.zeros(2, dtype=torch.float64))

    def solve(damping: float) -> tuple[StoppingResult, list[str]]:
        a = torch.tensor(damping, dtype=torch.float64, requires_grad=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = stopping_time(
                lambda t, s: (s[1], -a * s[1] - curvatures * s[0]),
                start,
                lambda t, s: 0.5 * (curvatures * s[0] ** 2).sum(),
                0.08,
            )
        return result, [str(w.message) for w in caught]

    return solve


def test_a_grazing_crossing(
    two_modes: Callable[[float], tuple[StoppingResult, list[str]]],
) -> None:
    before, quiet = two_modes(0.87)
    after, loud = two_modes(0.88)
    assert before.time.item() == pytest.approx(1.428, abs=5e-4)
    assert after.time.item() == pytest.approx(1.793, abs=5e-4)
    # The dip that was the crossing before is a near miss now.
    assert after.near_miss is not None
    assert after.near_miss.time == pytest.approx(1.4317, abs=1e-3)
    assert 0 < after.near_miss.margin < 1e-3
    assert "the stopping time jumps there" in loud[0]
    assert not quiet
    assert "near miss" in repr(after)


def test_the_margin_is_measured_from_the_dip(
    two_modes: Callable[[float], tuple[StoppingResult, list[str]]],
) -> None:
    """Against J on a fine grid."""
    result, _ = two_modes(1.0)
    assert result.near_miss is not None
    times = torch.linspace(1.3, 1.6, 3001, dtype=torch.float64)
    position = result.trajectory(times)[0]
    curvatures = torch.tensor([1.0, 60.0], dtype=torch.float64)
    lowest = float((0.5 * (curvatures * position**2).sum(-1)).min()) - 0.08
    assert result.near_miss.margin == pytest.approx(lowest, rel=1e-2)


def test_a_falling_criterion_has_no_near_miss() -> None:
    assert solved(EXPONENTIAL, InterpolatingAdjoint()).near_miss is None


def test_dips_among_points_that_the_clock_cannot_tell_apart() -> None:
    """Steps may be so short that two samples of J have the same time."""
    dips = Dips()
    dips.add([(1.0, 3.0), (1.0, 2.0), (2.0, 1.0), (2.0, 5.0), (3.0, 2.0)])
    closest = dips.near_miss(0.0)
    assert closest is not None
    assert closest.margin == pytest.approx(0.9, abs=0.11)


@pytest.mark.parametrize("to", ["target", "rate", "x0"])
@pytest.mark.parametrize("evidence", ["light", "standard"])
def test_a_criterion_that_is_flat_in_its_dtype(evidence: Any, to: str) -> None:
    """J = 1 + c x with c = 1e-11: its rounding moves T by 7e-5, and so dT/deps = -1/(c r x_T).

    dT/dr = -T/r feels it as T does; dT/dx0 = 1/(r x0) is the same to any target.
    """
    values = {"rate": 1.3, "x0": 2.0, "target": 1 + 0.3e-11}
    leaves = {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
    leaf = leaves[to].requires_grad_()
    rate, x0, target = leaves.values()
    with pytest.warns(StoppingWarning, match="too flat at the target"):
        result = stopping_time(
            lambda t, x: -rate * x, x0, lambda t, x: 1 + 1e-11 * x, target, evidence=evidence
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (gradient,) = torch.autograd.grad(result.time, leaf)
    time = math.log(2.0 / 0.3) / 1.3
    exact = {"target": -1 / (1e-11 * 1.3 * 0.3), "rate": -time / 1.3, "x0": 1 / 2.6}[to]
    error = abs(float(gradient) / exact - 1.0)
    assert bool(caught) == (to != "x0"), [str(w.message) for w in caught]
    assert error < (1e-3 if to == "target" else 2e-4)
