"""Integrals along a path: exact balances, derivatives, and that the path does not notice."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from augmented import Pieces, WeightedSpeed, hessian_damped, points, problem
from torch import Tensor, nn

from discrete import SemiImplicitEuler
from ode_stopping import LossValue, Torchdiffeq, stopping_time
from ode_stopping.flows import (
    GradientFlow,
    HeavyBallFlow,
    NesterovFlow,
    PolynomialSchedule,
    Positive,
    VanishingDamping,
    WithIntegrals,
    convergence_margins,
    stability_margins,
)

SOLVER = Torchdiffeq(rtol=1e-9)
F = problem()
LOSS = LossValue(F)
X0 = 2.0 * points(seed=2)


def lost_power(a: Any) -> Any:
    """a |v|^2."""
    return lambda t, s: a * s[1].square().sum()


def integral_at_target(damping: float) -> float:
    """The integral of |v|^2 until f = 0.5, found anew for this damping."""
    flow = WithIntegrals(HeavyBallFlow(F, damping=damping), lost_power(1.0))
    result = stopping_time(flow, flow.initial_state(X0), LOSS, 0.5, solver=SOLVER, gradient=None)
    return float(flow.integrals(result.state)[0])


def test_the_power_lost_to_friction_is_the_energy_lost() -> None:
    flow = WithIntegrals(HeavyBallFlow(F, damping=0.8), lost_power(0.8))
    inner = flow.flow
    start = flow.initial_state(X0)
    result = stopping_time(flow, start, LOSS, 0.1, solver=SOLVER)
    before, after = (float(inner.energy(0.0, flow.inner(s))) for s in (start, result.state))
    (spent,) = flow.integrals(result.state)
    assert before - after > 1.0
    assert float(spent) == pytest.approx(before - after, rel=1e-7)


def test_along_gradient_flow_the_squared_gradient_is_what_f_loses() -> None:
    """A state that is one tensor, and any callable as a flow."""

    def plain_flow(t: Tensor, x: Tensor) -> Tensor:
        return -F.gradient(x)

    def squared(t: Tensor, x: Tensor) -> Tensor:
        assert isinstance(x, Tensor)
        return F.gradient(x).square().sum()

    for inner in (GradientFlow(F), plain_flow):
        flow = WithIntegrals(inner, squared, lambda t, x: 1.0)
        start = flow.initial_state(X0)
        assert start[0] is X0
        result = stopping_time(flow, start, LOSS, 0.1, solver=SOLVER)
        spent, time = flow.integrals(result.state)
        assert float(spent) == pytest.approx(float(F(X0)) - 0.1, rel=1e-7)
        assert float(time) == pytest.approx(float(result.time), rel=1e-9)


def test_the_derivative_of_an_integral_at_the_target() -> None:
    """Total: T moves with the damping, too. Against central differences."""
    damping = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    flow = WithIntegrals(HeavyBallFlow(F, damping=damping), lost_power(1.0))
    result = stopping_time(flow, flow.initial_state(X0), LOSS, 0.5, solver=SOLVER)
    (slope,) = torch.autograd.grad(flow.integrals(result.state)[0], damping)
    assert float(flow.integrals(result.state)[0].detach()) == pytest.approx(
        integral_at_target(0.8), rel=1e-9
    )
    first, second = (
        (integral_at_target(0.8 + h) - integral_at_target(0.8 - h)) / (2 * h) - float(slope)
        for h in (0.02, 0.01)
    )
    assert first / second == pytest.approx(4.0, abs=0.1)
    assert abs(second) < 1e-3 * abs(float(slope))


def test_the_derivative_of_a_weight_is_the_integral() -> None:
    """q is linear in the integrand's parameter, on which T does not depend."""
    weighted = WeightedSpeed()
    flow = WithIntegrals(HeavyBallFlow(F, damping=0.8), weighted)
    assert [name for name, _ in flow.named_parameters()] == ["modules_of_integrands.0.weight"]
    result = stopping_time(flow, flow.initial_state(X0), LOSS, 0.5, solver=SOLVER)
    (integral,) = flow.integrals(result.state)
    (slope,) = torch.autograd.grad(integral, weighted.weight, retain_graph=True)
    assert float(slope) == pytest.approx(float(integral.detach()) / 0.4, rel=1e-7)
    (to_time,) = torch.autograd.grad(result.time, weighted.weight, allow_unused=True)
    assert to_time is None or float(to_time) == pytest.approx(0.0, abs=1e-12)


def test_the_path_does_not_notice() -> None:
    """T and its derivatives are those without the extra states, to the tolerance."""
    answers = []
    for add in (False, True):
        damping, x0 = Positive(0.8), X0.clone().requires_grad_()
        inner = HeavyBallFlow(F, damping=damping)
        flow = WithIntegrals(inner, lost_power(1e3), lambda t, s: t) if add else inner
        result = stopping_time(flow, flow.initial_state(x0), LOSS, 0.5)
        grads = torch.autograd.grad(result.time, [damping.raw, x0])
        answers.append((result.time.detach(), *grads))
    for without, with_them in zip(*answers, strict=True):
        # The default rtol is 1e-6, and the promise for gradients 50 times that.
        assert float((without - with_them).norm()) < 5e-5 * float(without.norm())


def test_nested_integrals() -> None:
    inner = WithIntegrals(HeavyBallFlow(F, damping=0.8), lost_power(0.8))
    flow = WithIntegrals(inner, lambda t, s: s[2] + 0 * t, lambda t, s: t)
    start = flow.initial_state(X0, velocity=points())
    assert [tuple(piece.shape) for piece in start] == [(3,), (3,), (), (), ()]
    assert torch.equal(start[1], points())
    assert flow.position(start) is X0
    assert [id(piece) for piece in flow.inner(start)] == [id(piece) for piece in start[:3]]
    result = stopping_time(flow, start, LOSS, 0.5, solver=SOLVER)
    spent, (doubly, half_square) = result.state[2], flow.integrals(result.state)
    time = float(result.time)
    energy = inner.flow.energy(0.0, start[:2]) - inner.flow.energy(0.0, result.state[:2])
    assert float(spent) == pytest.approx(float(energy), rel=1e-7)
    assert float(half_square) == pytest.approx(0.5 * time**2, rel=1e-8)
    # The integral of a growing integral is less than its last value times the time.
    assert 0 < float(doubly) < float(spent) * time


def test_starts() -> None:
    flow = WithIntegrals(NesterovFlow(F), lost_power(1.0))
    for start in (flow.initial_state(X0), flow.initial_state((X0, torch.zeros(3).double()))):
        assert start[0] is X0
        assert float(start[2]) == 0
        assert start[2].dtype == torch.float64
    two = WithIntegrals(NesterovFlow(F), lost_power(1.0), lost_power(2.0)).initial_state(X0)
    assert two[2] is not two[3]
    damped = WithIntegrals(hessian_damped(F, beta=PolynomialSchedule(0.4, 0.5)), lost_power(1.0))
    torch.testing.assert_close(
        damped.initial_state(X0, t0=1.0)[1].detach(), 0.4 * 2**-0.5 * F.gradient(X0)
    )
    for given in ((X0, X0), X0):
        tuple_or_callable = (
            flow if isinstance(given, tuple) else WithIntegrals(lambda t, x: -x, lambda t, x: t)
        )
        with pytest.raises(TypeError, match="initial_state got velocity, but the state is given"):
            tuple_or_callable.initial_state(given, velocity=X0)


def test_the_position_moves_without_the_integrands() -> None:
    def forbidden(t: Tensor, s: Pieces) -> Tensor:
        raise AssertionError("not needed for x'")

    flow = WithIntegrals(HeavyBallFlow(F, damping=0.8), forbidden)
    state = flow.initial_state(X0, velocity=points())
    assert torch.equal(flow.position_velocity(torch.tensor(0.0), state), points())
    plain = WithIntegrals(lambda t, x: -x, forbidden)
    assert torch.equal(plain.position_velocity(torch.tensor(0.0), plain.initial_state(X0)), -X0)
    # So semi-implicit Euler takes the integrand at (x_k, v_k), and the flow's own step.
    times = torch.tensor(0.5, dtype=torch.float64)
    with_integral = WithIntegrals(HeavyBallFlow(F, damping=0.8), lost_power(1.0))
    after = SemiImplicitEuler(with_integral, step=0.1)(0, state, times)
    own = SemiImplicitEuler(with_integral.flow, step=0.1)(0, state[:2], times)
    assert torch.equal(after[0], own[0])
    assert torch.equal(after[1], own[1])
    assert float(after[2]) == pytest.approx(0.1 * float(points().square().sum()), rel=1e-14)


def test_numbers_and_dtypes_of_integrands() -> None:
    flow = WithIntegrals(
        lambda t, x: -x, lambda t, x: 2, lambda t, x: x.double().sum(), lambda t, x: t.double()
    )
    state = flow.initial_state(torch.ones(3))
    assert {v.dtype for v in flow(torch.tensor(0.5), state)} == {torch.float32}
    assert [float(v) for v in flow(torch.tensor(0.5), state)[1:]] == [2.0, 3.0, 0.5]


def test_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match="flow must be callable"):
        WithIntegrals(1.0, lost_power(1.0))
    with pytest.raises(ValueError, match="integrands must name at least one"):
        WithIntegrals(GradientFlow(F))
    with pytest.raises(TypeError, match=r"integrands must be callable.*got float"):
        WithIntegrals(GradientFlow(F), 1.0)
    flow = WithIntegrals(GradientFlow(F), lambda t, x: t, lambda t, x: x)
    with pytest.raises(ValueError, match=r"number 1 gave shape \(3,\)"):
        flow(torch.tensor(0.0), flow.initial_state(X0))


def test_modules_move_and_copies_are_whole() -> None:
    flow = WithIntegrals(HeavyBallFlow(problem(), damping=0.8), WeightedSpeed())
    store = io.BytesIO()
    torch.save(flow, store)
    store.seek(0)
    loaded = torch.load(store, weights_only=False)
    with torch.no_grad():
        next(loaded.parameters()).fill_(2.0)
    state = flow.initial_state(X0, velocity=points())
    # The loaded module's parameter is the one that its integrand reads.
    velocity = loaded(torch.tensor(0.0), state)
    assert float(velocity[2].detach()) == pytest.approx(2 * float(points().square().sum()))
    assert next(flow.float().parameters()).dtype == torch.float32


class Violation(nn.Module):
    """The penalties of StoPM: violated stability and convergence at (t, x)."""

    def __init__(self, flow: Any, step: float) -> None:
        super().__init__()
        self.flow, self.step = flow, step

    def forward(self, t: Tensor, state: Pieces) -> Tensor:
        stable = stability_margins(self.flow, t, state[0], step=self.step, curvature=lambda x: 60.0)
        return stable.violation() + convergence_margins(self.flow, t).violation()


def test_penalties_on_violated_conditions() -> None:
    """Their integral along the path, differentiable to the schedules that are learned.

    Two of the five margins are violated all the way: where one changes its sign, the penalty has a
    kink and the flow is not smooth.
    """

    def penalised(beta: Positive) -> tuple[WithIntegrals, Any]:
        inner = hessian_damped(F, damping=VanishingDamping(3.5), beta=beta, gamma=1.2)
        flow = WithIntegrals(inner, Violation(inner, 0.5))
        start = flow.initial_state(X0)
        return flow, stopping_time(flow, start, LOSS, 0.5, t0=2.0, solver=SOLVER)

    def value(raw: float) -> float:
        beta = Positive(math.exp(raw))
        flow, result = penalised(beta)
        return float(flow.integrals(result.state)[0].detach())

    beta = Positive(0.4)
    flow, result = penalised(beta)
    (penalty,) = flow.integrals(result.state)
    assert float(penalty.detach()) > 0.1
    (slope,) = torch.autograd.grad(penalty, beta.raw)
    h = 1e-3
    difference = (value(math.log(0.4) + h) - value(math.log(0.4) - h)) / (2 * h)
    assert float(slope) == pytest.approx(difference, rel=1e-4)
