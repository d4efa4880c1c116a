"""The contract of every update rule: order, states, dtypes, derivatives, bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from iterations import nonlinear_flow, nonlinear_leaves, number
from torch import Tensor, nn

from discrete import Euler, Heun, RungeKutta4, SemiImplicitEuler, UpdateRule, stopping_index
from discrete.rules.updates import combine
from ode_stopping.flows import HeavyBallFlow, InertialHessianFlow

RULES = (Euler, Heun, RungeKutta4, SemiImplicitEuler)
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)


def logistic(t: Tensor, x: Tensor) -> Tensor:
    """x' = x (cos t - x): nonlinear and non-autonomous."""
    return x * (torch.cos(t) - x)


def logistic_solution(t: float, x0: float) -> float:
    """Bernoulli's substitution, with the integral by a Gauss rule of 60 points."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    points = 0.5 * t * (nodes + 1)
    integral = float(0.5 * t * (weights * np.exp(np.sin(points))).sum())
    return math.exp(math.sin(t)) / (1 / x0 + integral)


def walked(rule: UpdateRule, x: Tensor, steps: int, h: float) -> Tensor:
    for k in range(steps):
        x = rule(k, x, torch.tensor(k * h, dtype=x.dtype))
    return x


@every_rule
def test_order_of_convergence(rule: type[UpdateRule]) -> None:
    x0 = torch.tensor([1.7], dtype=torch.float64)
    truth = logistic_solution(2.0, 1.7)
    counts = [20, 40, 80, 160]
    errors = [
        abs(float(walked(rule(logistic, step=2.0 / n), x0, n, 2.0 / n)) - truth) for n in counts
    ]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - rule.order) < 0.12


@pytest.mark.parametrize("rule", RULES[:3], ids=lambda rule: rule.__name__)
def test_tuple_states_move_as_their_concatenation(rule: type[UpdateRule]) -> None:
    leaves = nonlinear_leaves()
    flow = nonlinear_flow(leaves)

    def flat_flow(t: Tensor, y: Tensor) -> Tensor:
        dx, dv = flow(t, (y[:2], y[2:, None]))
        return torch.cat([dx, dv[:, 0]])

    t = number(0.3, grad=False)
    pair = rule(flow, step=0.1)(0, (leaves["x"], leaves["v"]), t)
    flat = rule(flat_flow, step=0.1)(0, torch.cat([leaves["x"], leaves["v"][:, 0]]), t)
    assert isinstance(pair, tuple)
    assert [p.shape for p in pair] == [(2,), (2, 1)]
    torch.testing.assert_close(torch.cat([pair[0], pair[1][:, 0]]), flat, rtol=0, atol=1e-16)


@every_rule
@pytest.mark.parametrize("step", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=type)
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_low_precision_states_keep_their_dtype(
    rule: type[UpdateRule], step: float | Tensor, shape: tuple[int, ...]
) -> None:
    seen = set()

    def flow(t: Tensor, x: Tensor) -> Tensor:
        seen.add((t.dtype, t.shape, x.dtype))
        return -x * (1 + t)

    after = rule(flow, step=step)(0, torch.ones(shape), torch.tensor(0.5))
    assert after.dtype == torch.float32
    assert after.shape == shape
    assert seen == {(torch.float32, (), torch.float32)}


@every_rule
def test_differentiable_to_step_state_time_and_parameter(rule: type[UpdateRule]) -> None:
    theta, h, x, t = number(1.3), number(0.2), number([0.9, -0.4]), number(0.3)

    def stepped(theta: Tensor, h: Tensor, x: Tensor, t: Tensor) -> Tensor:
        after = rule(lambda t, x: -theta * torch.sin(x + t), step=h)(0, x, t)
        assert isinstance(after, Tensor)
        return after

    assert torch.autograd.gradcheck(stepped, (theta, h, x, t), eps=1e-6, atol=1e-9, rtol=1e-7)


@every_rule
def test_increment_is_what_a_step_adds(rule: type[UpdateRule]) -> None:
    leaves = nonlinear_leaves()
    made, t = rule(nonlinear_flow(leaves), step=0.1), number(0.3, grad=False)
    state = leaves["x"], leaves["v"]
    for new, old, added in zip(
        made.advance(t, state, 0.07), state, made.increment(t, state, 0.07), strict=True
    ):
        torch.testing.assert_close(old + added, new, rtol=0, atol=1e-16)


# --- the position last ----------------------------------------------------------------------------


def test_semi_implicit_euler_by_hand() -> None:
    """v first and explicitly, then x with the new v, at the old time."""
    leaves = nonlinear_leaves()
    theta, x, v = (leaves[name].detach() for name in ("theta", "x", "v"))
    h, t = 0.1, number(0.3, grad=False)
    v_next = v + h * (-v + 0.2 * torch.cos(t) * x[:, None])
    x_next = x + h * (-theta * (x + torch.sin(t) * x**3) + 0.1 * v_next[:, 0])
    rule = SemiImplicitEuler(nonlinear_flow(leaves), step=h)
    after = tuple(piece.detach() for piece in rule(0, (x, v), t))
    torch.testing.assert_close(after, (x_next, v_next), rtol=0, atol=1e-16)
    # Planted: the position first, or all at once, is another method.
    explicit = Euler(nonlinear_flow(leaves), step=h)(0, (x, v), t)
    assert float((explicit[0].detach() - x_next).abs().min()) > 1e-4


def test_the_other_states_do_not_see_each_other_move() -> None:
    def flow(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, a, b = state
        return a * b, x + b, x * a

    state = tuple(number([v], grad=False) for v in (2.0, 3.0, 5.0))
    x, a, b = SemiImplicitEuler(flow, step=0.5)(0, state, number(0.0, grad=False))
    assert (float(a), float(b)) == (3 + 0.5 * 7, 5 + 0.5 * 6)
    assert float(x) == 2 + 0.5 * 6.5 * 8


def test_one_tensor_moves_as_with_euler() -> None:
    x, t = number([1.7], grad=False), number(0.3, grad=False)
    assert torch.equal(
        SemiImplicitEuler(logistic, step=0.1)(0, x, t), Euler(logistic, step=0.1)(0, x, t)
    )

    def wrapped(t: Tensor, state: tuple[Tensor]) -> tuple[Tensor]:
        return (logistic(t, state[0]),)

    (alone,) = SemiImplicitEuler(wrapped, step=0.1)(0, (x,), t)
    assert torch.equal(alone, Euler(logistic, step=0.1)(0, x, t))


def oscillator(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return state[1], -state[0]


def test_semi_implicit_euler_on_an_oscillator() -> None:
    """Order 1 against cos t, and an energy that does not grow, as it does with Euler's method."""
    errors = []
    counts = [40, 80, 160, 320]
    start = number([1.0], grad=False), number([0.0], grad=False)
    for n in counts:
        state, rule = start, SemiImplicitEuler(oscillator, step=2.0 / n)
        for k in range(n):
            state = rule(k, state, number(0.0, grad=False))
        errors.append(abs(float(state[0]) - math.cos(2.0)))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - 1) < 0.05
    energies = {}
    for kind in (Euler, SemiImplicitEuler):
        state, rule = start, kind(oscillator, step=0.1)
        for k in range(1000):
            state = rule(k, state, number(0.0, grad=False))
        energies[kind] = float(state[0] ** 2 + state[1] ** 2)
    assert energies[SemiImplicitEuler] == pytest.approx(1.0, abs=0.1)
    assert energies[Euler] > 1e4


def test_semi_implicit_euler_is_differentiable_in_tuples() -> None:
    leaves = nonlinear_leaves()
    given = [leaves[name] for name in ("theta", "x", "v")] + [number(0.3), number(0.2)]

    def stepped(theta: Tensor, x: Tensor, v: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        flow = nonlinear_flow({**leaves, "theta": theta})
        return SemiImplicitEuler(flow, step=h)(0, (x, v), t)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(stepped, given)
    assert torch.autograd.gradgradcheck(stepped, given)


def test_a_flow_that_knows_x_dot_is_evaluated_once_a_step() -> None:
    calls = []

    def objective(x: Tensor) -> Tensor:
        calls.append(x)
        return 0.5 * (x * x).sum(-1)

    flow = HeavyBallFlow(objective, damping=0.5)
    state = number([1.0, 2.0], grad=False), number([0.3, -0.1], grad=False)
    t = number(0.0, grad=False)
    after = SemiImplicitEuler(flow, step=0.1)(0, state, t)
    assert len(calls) == 1
    same = SemiImplicitEuler(lambda t, s: flow(t, s), step=0.1)(0, state, t)  # has no such method
    assert len(calls) == 3
    torch.testing.assert_close(after, same, rtol=0, atol=0)


def test_x_dot_is_taken_at_the_old_time_and_position() -> None:
    """x' = v - beta(t) grad f(x), with beta = t and f = |x|^2/2."""
    flow = InertialHessianFlow(
        lambda x: 0.5 * (x * x).sum(-1), damping=0.5, beta=lambda t: t, gamma=2.0
    )
    x, v, t, h = number([1.0, 2.0], grad=False), number([0.3, -0.1], grad=False), 0.4, 0.1
    after = SemiImplicitEuler(flow, step=h)(0, (x, v), number(t, grad=False))
    v_next = v + h * (-0.5 * (v - t * x) + (1 - 2.0) * x)
    torch.testing.assert_close(after, (x + h * (v_next - t * x), v_next), rtol=1e-15, atol=1e-15)


def test_increments_of_tuples_are_free_of_rounding_in_float32() -> None:
    """x = 1000 with increments of 1e-5: below one unit of rounding of the sum."""
    x, v = torch.tensor([1000.0, -2000.0]), torch.tensor([0.01, 0.03])
    rule = SemiImplicitEuler(lambda t, s: (s[1], -0.5 * s[1]), step=1e-3)
    t = torch.tensor(0.0)
    added = rule.increment(t, (x, v), 1e-3)
    assert {piece.dtype for piece in added} == {torch.float32}
    v_next = v.double() * (1 - 0.5e-3)
    torch.testing.assert_close(added[0].double(), 1e-3 * v_next, rtol=3e-7, atol=0)
    torch.testing.assert_close(added[1].double(), -0.5e-3 * v.double(), rtol=3e-7, atol=0)
    moved = rule.advance(t, (x, v), 1e-3)
    assert torch.equal(moved[0], x)  # the difference of two states would have lost it all


def test_semi_implicit_euler_in_a_stopping_index() -> None:
    """h N tends to T of the oscillator, cos T = 1/(2 x0), and h dN/dx0 to dT/dx0."""
    for h in (0.02, 0.01):
        x0 = number([1.0])
        result = stopping_index(
            SemiImplicitEuler(oscillator, step=h),
            (x0, number([0.0])),
            lambda t, s: s[0].sum(),
            0.5,
            interpolation="partial_step",
        )
        (slope,) = torch.autograd.grad(result.steps, x0)
        assert abs(h * float(result.steps.detach()) - math.pi / 3) < h
        assert abs(h * float(slope) - 0.5 / math.sqrt(0.75)) < h


# --- the base class -------------------------------------------------------------------------------


def test_increment_of_a_rule_that_defines_a_step_only() -> None:
    class Implicit(UpdateRule):
        order = 1

        def advance(self, t: Tensor, x: Tensor, step: float | Tensor) -> Tensor:  # type: ignore[override]
            return x / (1 + step)

    x = number([2.0, 4.0], grad=False)
    made = Implicit(lambda t, x: -x, step=1.0)
    torch.testing.assert_close(made.increment(x[0], x, 1.0), -0.5 * x, rtol=0, atol=0)


@every_rule
def test_a_module_is_registered(rule: type[UpdateRule]) -> None:
    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(1.0))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return -self.rate * x

    made = rule(Decay(), step=nn.Parameter(torch.tensor(0.1)))
    assert sorted(name for name, _ in made.named_parameters()) == ["flow.rate", "step"]


def test_combine() -> None:
    x, a, b = (number(v, grad=False) for v in ([1.0, 2.0], [10.0, 20.0], [1.0, -1.0]))
    expected = torch.tensor([1.0 + 0.5 * (2 * 10 + 3 * 1), 2.0 + 0.5 * (2 * 20 - 3)]).double()
    torch.testing.assert_close(combine(x, 0.5, [(2.0, a), (3.0, b)]), expected, rtol=0, atol=0)
    pair = combine((x, a), 0.5, [(2.0, (a, a)), (3.0, (b, b))])
    assert isinstance(pair, tuple)
    torch.testing.assert_close(pair[0], expected, rtol=0, atol=0)


@every_rule
@pytest.mark.parametrize(
    ("step", "error"),
    [
        (0.0, ValueError),
        (-0.1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        (torch.tensor([0.1]), ValueError),
        ("0.1", TypeError),
        (True, TypeError),
        (None, TypeError),
    ],
    ids=str,
)
def test_bad_step(rule: type[UpdateRule], step: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="step"):
        rule(logistic, step=step)  # type: ignore[arg-type]


@every_rule
def test_bad_flow(rule: type[UpdateRule]) -> None:
    with pytest.raises(TypeError, match="flow"):
        rule(None, step=0.1)  # type: ignore[arg-type]
