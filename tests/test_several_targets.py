"""Targets of shape (K,): T for each from one solve, with one backward pass whose lam jumps."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from rotated import RotatedQuadratic
from torch import Tensor, nn
from variants import slow_after

from ode_stopping import (
    BacksolveAdjoint,
    DegenerateCrossingError,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    HeavyBallFlow,
    InterpolatingAdjoint,
    LossValue,
    NotReachedError,
    Quadratic,
    Status,
    StepAdjoint,
    StoppingResult,
    Torchdiffeq,
    check_stopping_gradient,
    mean_over_reached,
    stopping_time,
)
from theory_checks.closed_forms import CLOSED_FORMS

F64 = torch.float64
ROUTES = (
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
)
# DirectAdjoint comes third: it alone can be differentiated twice.
ROUTES_BY_KIND = (*ROUTES[:2], ROUTES[3], ROUTES[2], ROUTES[4])


def leaf(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


class Cubic:
    """x' = -theta x - x^3 in two coordinates, with everything a leaf."""

    def __init__(self) -> None:
        self.theta, self.weight = leaf([1.0, 2.5]), leaf(0.8)
        self.x0, self.t0 = leaf([1.2, -0.9]), leaf(0.3)
        self.eps = leaf([1e-2, 1e-5, 0.3, 9.9e-3, 1e-3])

    @property
    def leaves(self) -> list[Tensor]:
        return [self.theta, self.weight, self.x0, self.t0, self.eps]

    def run(self, eps: Tensor, **options: Any) -> StoppingResult:
        return stopping_time(
            lambda t, x: -self.theta * x - x**3 * (1 + 0.2 * torch.sin(t)),
            self.x0,
            lambda t, x: self.weight * x.square().sum(),
            eps,
            t0=self.t0,
            **{"solver": Torchdiffeq(rtol=1e-9), "evidence": "light", **options},
        )


def combined(results: list[StoppingResult] | StoppingResult) -> Tensor:
    """A function of all times and states, from one run or from many."""
    if isinstance(results, StoppingResult):
        times, states = results.time, results.state
    else:
        times = torch.stack([result.time for result in results])
        states = torch.stack([result.state for result in results])
    weights = torch.arange(1.0, len(times) + 1, dtype=F64)
    return (weights * times).sum() + (weights[:, None] * states.square()).sum()


# --- closed forms -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "route", slow_after(3, ROUTES_BY_KIND), ids=lambda route: type(route).__name__
)
def test_exponential_decay(route: GradientRoute) -> None:
    """T_k = log(x0^2/(2 eps_k))/(2 theta) with every derivative, and second ones where promised."""
    theta, x0, eps = leaf(0.7), leaf([1.5]), leaf([0.5, 1e-3, 0.02, 1e-2])
    result = stopping_time(
        lambda t, x: -theta * x,
        x0,
        lambda t, x: 0.5 * x.square().sum(),
        eps,
        gradient=route,
        solver=Torchdiffeq(rtol=1e-10),
        evidence="light",
    )
    truth = torch.log(x0**2 / (2 * eps)) / (2 * theta)
    assert result.time.shape == result.rate.shape == result.reached.shape == (4,)
    assert result.state.shape == (4, 1)
    torch.testing.assert_close(result.time, truth, rtol=1e-9, atol=0)
    torch.testing.assert_close(result.rate, -2 * theta.detach() * eps.detach(), rtol=1e-8, atol=0)
    for k in range(4):
        found = torch.autograd.grad(result.time[k], [theta, x0, eps], retain_graph=True)
        known = torch.autograd.grad(truth[k], [theta, x0, eps], retain_graph=True)
        for one, other in zip(found, known, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-8, atol=1e-12)
    total = result.time.sum()
    if isinstance(route, DirectAdjoint):
        (first,) = torch.autograd.grad(total, theta, create_graph=True)
        (second,) = torch.autograd.grad(first, theta)
        expected = 2 * float(truth.detach().sum()) / 0.7**2
        assert float(second) == pytest.approx(expected, rel=1e-6)
    else:
        (first,) = torch.autograd.grad(total, theta, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            torch.autograd.grad(first, theta)


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=lambda case: case.name)
def test_closed_forms_with_three_targets(case: Any) -> None:
    """Every closed form: all derivatives at each of three targets, from one call."""
    targets = [0.05, 0.2, 0.1]
    leaves = case.leaves(targets[0], 0.0)
    leaves["eps"] = leaf(targets)
    result = stopping_time(
        case.flow(leaves),
        leaves["x0"],
        case.criterion(leaves),
        leaves["eps"],
        t0=leaves["t0"],
        evidence="light",
    )
    for k, eps in enumerate(targets):
        truth = case.answer(case.values(eps, 0.0))
        found = torch.autograd.grad(result.time[k], list(leaves.values()), retain_graph=True)
        assert float(result.time[k].detach()) == pytest.approx(truth["T"], rel=1e-6)
        for name, gradient in zip(leaves, found, strict=True):
            own = gradient[k] if name == "eps" else gradient
            known = torch.as_tensor(truth[name], dtype=F64)
            assert float((own - known).norm()) <= 5e-6 * float(known.norm()), name
            if name == "eps":
                assert int((gradient != 0).sum()) == 1


# --- against one call a target ------------------------------------------------------------------


@pytest.mark.parametrize("route", slow_after(2, ROUTES), ids=lambda route: type(route).__name__)
def test_gradients_equal_those_of_single_calls(route: GradientRoute) -> None:
    # x comes back over the whole path to twice rtol only: the tolerance of that route alone.
    many, single = Cubic(), Cubic()
    loose = BacksolveAdjoint(tolerance=1e4) if isinstance(route, BacksolveAdjoint) else route
    together = many.run(many.eps, gradient=loose)
    alone = [single.run(eps, gradient=loose) for eps in single.eps.unbind()]
    limit = 1e-5 if isinstance(route, BacksolveAdjoint) else 1e-8
    found = torch.autograd.grad(combined(together), many.leaves)
    known = torch.autograd.grad(combined(alone), single.leaves)
    for one, other in zip(found, known, strict=True):
        assert float((one - other).norm()) <= limit * float(other.norm())
    # Without a route: the same times.
    plain = many.run(many.eps, gradient=None)
    torch.testing.assert_close(plain.time, together.time.detach(), rtol=1e-12, atol=0)


def test_one_target_in_a_vector_equals_a_scalar() -> None:
    many, single = Cubic(), Cubic()
    together, alone = many.run(many.eps[:1]), single.run(single.eps[0])
    assert together.time.shape == (1,)
    assert torch.equal(together.time[0], alone.time)
    (found,) = torch.autograd.grad(together.time[0], many.theta)
    (known,) = torch.autograd.grad(alone.time, single.theta)
    assert torch.equal(found, known)


def test_one_solve_and_one_backward_pass() -> None:
    """K targets cost the solve to the lowest and a few steps a target, not K solves.

    On the way back lam has new fast modes after every jump, and short steps until they are gone.
    """
    problem = RotatedQuadratic(1e2, dim=20)
    leaves = problem.leaves()
    eps = torch.logspace(0, -6, 7, dtype=F64)
    together = problem.solve(leaves, eps, InterpolatingAdjoint(), None)
    together.time.sum().backward()
    alone = [problem.solve(leaves, float(e), InterpolatingAdjoint(), None) for e in eps]
    for result in alone:
        result.time.backward()
    lowest = alone[-1].stats
    assert together.stats.accepted <= lowest.accepted + 8 * len(eps)
    assert together.stats.nfe_forward <= 1.5 * lowest.nfe_forward
    assert together.stats.nfe_forward <= 0.4 * sum(r.stats.nfe_forward for r in alone)
    assert together.stats.vjps is not None
    assert together.stats.vjps <= 0.6 * sum(r.stats.vjps or 0 for r in alone)


def test_stiff_problem_keeps_the_promise_at_every_target() -> None:
    """Rotated, condition 1e3, against the truth in closed form, target by target."""
    problem = RotatedQuadratic(1e3)
    eps = torch.tensor([1e-3, 1e-1, 1e-2], dtype=F64)
    leaves = problem.leaves()
    result = problem.solve(leaves, eps, InterpolatingAdjoint(), None)
    for k, value in enumerate(eps.tolist()):
        truth = problem.truth(value)
        found = torch.autograd.grad(result.time[k], list(leaves.values()), retain_graph=True)
        assert float(result.time[k].detach()) == pytest.approx(float(truth["T"]), rel=1e-7)
        for name, gradient in zip(leaves, found, strict=True):
            error = float((gradient - truth[name]).norm() / truth[name].norm())
            assert error < 5e-6, (name, value)


def test_an_earlier_target_alone_costs_its_own_part() -> None:
    case = Cubic()
    result = case.run(case.eps)
    total = result.stats
    (gradient,) = torch.autograd.grad(result.time[2], case.theta, retain_graph=True)
    early = total.vjps
    torch.autograd.grad(result.time[1], case.theta)
    assert early is not None
    assert total.vjps is not None
    assert 0 < early < 0.5 * total.vjps
    alone = Cubic()
    (known,) = torch.autograd.grad(alone.run(alone.eps[2]).time, alone.theta)
    torch.testing.assert_close(gradient, known, rtol=1e-8, atol=0)


class JumpingLeaf(nn.Module):
    """A flow whose second parameter acts after t = 1 only."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Parameter(leaf(1.0)), nn.Parameter(leaf(0.5))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -(self.early if t < 1.0 else self.late) * x


def test_breakpoints_and_parameters_of_later_parts() -> None:
    """log x falls by `early` until t = 1, then by `late`: T in closed form on both sides."""
    flow, x0 = JumpingLeaf(), leaf([1.0])
    eps = torch.tensor([math.exp(-2.5), math.exp(-0.5), math.exp(-1.5)], dtype=F64)
    result = stopping_time(flow, x0, lambda t, x: x.sum(), eps, breakpoints=[1.0], evidence="light")
    torch.testing.assert_close(
        result.time.detach(), torch.tensor([4.0, 0.5, 2.0], dtype=F64), rtol=1e-7, atol=0
    )
    rows = [
        torch.autograd.grad(t, [flow.early, flow.late], retain_graph=True, allow_unused=True)
        for t in result.time.unbind()
    ]
    late = [0.0 if row[1] is None else float(row[1]) for row in rows]
    assert [float(row[0]) for row in rows] == pytest.approx([-2.0, -0.5, -2.0], rel=1e-6)
    assert late == pytest.approx([-6.0, 0.0, -2.0], rel=1e-6, abs=1e-9)


# --- statuses -----------------------------------------------------------------------------------


def test_met_at_start_and_missed() -> None:
    theta, x0, t0 = leaf(1.0), leaf([1.0]), leaf(2.0)
    eps = leaf([5.0, 0.1, 1e-30, 0.5, 1e-31])
    result = stopping_time(
        lambda t, x: -theta * x, x0, lambda t, x: x.sum(), eps, t0=t0, max_time=9.0
    )
    reached, missed = Status.REACHED, Status.NOT_REACHED
    assert result.status == [Status.AT_START, reached, missed, reached, missed]
    assert result.reached.tolist() == [True, True, False, True, False]
    assert result.time[0] == 2.0
    assert torch.isinf(result.time[[2, 4]]).all()
    at_start = torch.autograd.grad(result.time[0], [theta, t0], retain_graph=True)
    assert [float(g) for g in at_start] == [0.0, 1.0]
    (gradient,) = torch.autograd.grad(result.time[[0, 1, 3]].sum(), theta, retain_graph=True)
    assert float(gradient) == pytest.approx(-math.log(10) - math.log(2), rel=1e-6)
    with pytest.raises(NotReachedError):
        torch.autograd.grad(result.time[2], theta, retain_graph=True)
    mean = mean_over_reached([result])
    assert (mean.reached, mean.missed) == (3, 2)
    assert "REACHED (2)" in repr(result)


def test_every_miss_refuses_a_gradient() -> None:
    """The second as well as the first, where a closure is all that they depend on."""
    theta = leaf(1.0)
    result = stopping_time(
        lambda t, x: -theta * x,
        torch.ones(1, dtype=F64),
        lambda t, x: x.sum(),
        torch.tensor([1e-30, 1e-31], dtype=F64),
        max_time=9.0,
    )
    for k in range(2):
        with pytest.raises(NotReachedError):
            torch.autograd.grad(result.time[k], theta, retain_graph=True)


def test_censored_misses_have_no_gradient() -> None:
    theta = leaf(1.0)
    result = stopping_time(
        lambda t, x: -theta * x,
        torch.ones(1, dtype=F64),
        lambda t, x: x.sum(),
        torch.tensor([0.5, 1e-30], dtype=F64),
        max_time=9.0,
        censored="horizon",
    )
    assert float(result.time[1].detach()) == 9.0
    (gradient,) = torch.autograd.grad(result.time.sum(), theta)
    assert float(gradient) == pytest.approx(-math.log(2), rel=1e-6)


def test_a_touch_on_the_way_spoils_no_other_target() -> None:
    """J = 2 + cos(t) - ... touches a level, and comes down to others before and after."""

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    shift = leaf(0.0)

    # u = t: J falls to a minimum of 1 at u = 1, rises, and falls to 0 after u = 3.
    def criterion(t: Tensor, u: Tensor) -> Tensor:
        v = (u + shift).sum()
        return 1 + (v - 1) ** 2 * (3.5 - v)

    eps = torch.tensor([0.5, 1.0, 3.0], dtype=F64)
    x0 = torch.zeros(1, dtype=F64)
    result = stopping_time(flow, x0, criterion, eps, max_time=10.0, throw=False)
    assert result.status == [Status.REACHED, Status.DEGENERATE, Status.REACHED]
    first = float(result.time[0].detach())
    assert (first - 1) ** 2 * (3.5 - first) == pytest.approx(-0.5, rel=1e-6)
    (gradient,) = torch.autograd.grad(result.time[[0, 2]].sum(), shift, retain_graph=True)
    assert float(gradient) == pytest.approx(-2.0, rel=1e-6)
    with pytest.raises(NotReachedError, match="DEGENERATE"):
        torch.autograd.grad(result.time[1], shift)
    with pytest.raises(DegenerateCrossingError, match="target 1: ") as caught:
        stopping_time(flow, x0, criterion, eps, max_time=10.0)
    assert caught.value.result.status[2] is Status.REACHED


def test_divergence_ends_what_is_left() -> None:
    result = stopping_time(
        lambda t, x: x.square(),
        torch.ones(1, dtype=F64),
        lambda t, x: 2 - x.sum(),
        torch.tensor([-1.0, -1e300], dtype=F64),
        solver=Torchdiffeq(max_steps=2000),  # x is infinite at t = 1: the steps go to 0
        throw=False,
    )
    assert result.status[0] is Status.REACHED
    assert result.status[1] in (Status.DIVERGED, Status.STALLED)
    assert float(result.time[0]) == pytest.approx(2 / 3, rel=1e-6)


def test_a_jump_over_two_targets_is_said() -> None:
    """J falls by the clock from 1 to 0 at t = 1: both targets in between are jumped over."""
    result = stopping_time(
        lambda t, x: -0.1 * x,
        torch.ones(1, dtype=F64),
        lambda t, x: x.sum() * (1.0 if t < 1.0 else 0.1),
        torch.tensor([0.95, 0.5, 0.3, 0.05], dtype=F64),
        breakpoints=[1.0],
        gradient=None,
        throw=False,
    )
    assert result.status == [
        Status.REACHED,
        Status.DEGENERATE,
        Status.DEGENERATE,
        Status.REACHED,
    ]
    assert float(result.time[1]) == float(result.time[2]) == pytest.approx(1.0, abs=1e-9)


def test_oscillating_criterion_first_crossings() -> None:
    """Heavy ball: every T is the first time, also for targets that J dips below in passing."""
    f = Quadratic(torch.tensor([1.0, 60.0], dtype=F64))
    flow = HeavyBallFlow(f, damping=0.88)
    state = flow.initial_state(torch.tensor([1.0, 0.3], dtype=F64))
    eps = torch.tensor([0.08, 1.0, 0.3, 0.02], dtype=F64)
    with pytest.warns(UserWarning, match="J came within"):
        together = stopping_time(flow, state, LossValue(f), eps, evidence="light")
    with pytest.warns(UserWarning, match="J came within"):
        alone = [
            float(stopping_time(flow, state, LossValue(f), e, evidence="light").time) for e in eps
        ]
    assert together.time.tolist() == pytest.approx(alone, rel=1e-7)


# --- the result ---------------------------------------------------------------------------------


def test_path_counts_and_forms_of_the_result() -> None:
    case = Cubic()
    result = case.run(case.eps)
    path = result.trajectory
    assert bool((path.times.diff() > 0).all())
    order = case.eps.detach().argsort(descending=True)
    for k in order.tolist():
        time = float(result.time[k].detach())
        assert time in path.times.tolist()
        torch.testing.assert_close(path(time), result.state[k].detach(), rtol=1e-12, atol=0)
        at = path.times.tolist().index(time)
        assert float(path.values[at]) == pytest.approx(float(case.eps[k].detach()), rel=1e-12)
    assert result.evidence is not None
    result.time.sum().backward()
    assert all(evidence.passed for evidence in result.evidence)
    table = result.to_dict()
    assert table["status"] == ["REACHED"] * 5
    assert len(table["time"]) == len(table["rate"]) == len(table["evidence"]) == 5
    again = pickle.loads(pickle.dumps(result))
    assert torch.equal(again.time, result.time.detach())
    assert again.stats.nfe_forward == result.stats.nfe_forward > 0


def test_thorough_evidence() -> None:
    case = Cubic()
    result = case.run(case.eps[:2], evidence="thorough")
    result.time.sum().backward()
    for evidence in result.evidence:
        assert evidence.refinement is not None
        assert evidence.refinement < 1e-6


def test_float32_and_tuple_states() -> None:
    x0 = (torch.tensor([1.0]), torch.tensor([[0.0]]))
    eps = torch.tensor([0.5, 0.1])
    result = stopping_time(
        lambda t, s: (s[1][0], -s[0][None] - 0.8 * s[1]),
        x0,
        lambda t, s: s[0].square().sum() + s[1].square().sum(),
        eps,
    )
    assert result.time.dtype == F64
    assert [piece.shape for piece in result.state] == [(2, 1), (2, 1, 1)]
    assert result.state[0].dtype == torch.float32


def test_a_gradient_check_asks_for_one_target() -> None:
    case = Cubic()
    with pytest.raises(ValueError, match="target"):
        check_stopping_gradient(
            lambda t, x: -x, case.x0, lambda t, x: x.square().sum(), case.eps.detach()
        )
