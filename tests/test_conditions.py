"""The conditions of convergence and stability: by hand, by differences, and in use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from augmented import hessian_damped, plain, points, problem
from torch import Tensor

from discrete import Euler
from ode_stopping.flows import (
    AtLeast,
    InertialHessianFlow,
    Margins,
    NetworkSchedule,
    PolynomialSchedule,
    Positive,
    VanishingDamping,
    convergence_margins,
    hessian_norm,
    stability_margins,
)
from ode_stopping.problems import Quadratic, QuarticQuadratic, Rosenbrock

ALPHA, B, C = 3.7, 0.4, 1.3
TIMES = torch.tensor([0.5, 1.0, 2.5, 40.0], dtype=torch.float64)
NETWORK = NetworkSchedule(0.4, hidden=4, seed=3, spread=2.0)


def flow_with(**schedules: Any) -> InertialHessianFlow:
    given = {"damping": VanishingDamping(ALPHA), "beta": B, "gamma": C, **schedules}
    return hessian_damped(plain, **given)


def margins_at(flow: InertialHessianFlow, t: float) -> list[float]:
    return convergence_margins(flow, t).values.detach().tolist()


# --- convergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("t", TIMES.tolist())
def test_convergence_margins_of_constants(t: float) -> None:
    """w = c - b/t, t w' = b/t."""
    w = C - B / t
    expected = [w, (ALPHA - 3) * w - B / t]
    for beta, gamma in ((B, C), (Positive(B), Positive(C)), (lambda s: B, lambda s: C)):
        assert margins_at(flow_with(beta=beta, gamma=gamma), t) == pytest.approx(expected, 1e-13)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0, -1.5])
@pytest.mark.parametrize("t", TIMES.tolist())
def test_convergence_margins_of_powers(power: float, t: float) -> None:
    """beta = b t^p: w = c - b (p + 1) t^(p - 1), w' = -b (p + 1)(p - 1) t^(p - 2)."""
    w = C - B * (power + 1) * t ** (power - 1)
    rate = -B * (power + 1) * (power - 1) * t ** (power - 2)
    expected = [w, (ALPHA - 3) * w - t * rate]
    flow = flow_with(beta=lambda s: B * s**power)
    assert margins_at(flow, t) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "schedules",
    [
        {"beta": PolynomialSchedule(B, 0.5), "gamma": PolynomialSchedule(C, -0.3, scale=2.0)},
        {"beta": NETWORK, "gamma": NetworkSchedule(C, hidden=4, seed=9, spread=2.0)},
    ],
    ids=["polynomial", "network"],
)
def test_the_rate_of_w_by_central_differences(schedules: dict[str, Any]) -> None:
    """The error of a difference falls fourfold as its step halves."""
    flow = flow_with(**schedules)
    t = torch.tensor(1.2, dtype=torch.float64)
    with torch.no_grad():
        weight, second = convergence_margins(flow, t).values
        rate = float(((ALPHA - 3) * weight - second) / t)

        def error(step: float) -> float:
            up, down = (float(flow.weight(t + s * step, t)) for s in (1, -1))
            return (up - down) / (2 * step) - rate

        assert abs(rate) > 0.05
        assert error(0.02) / error(0.01) == pytest.approx(4.0, abs=0.02)
        assert abs(error(1e-3)) < 1e-5 * abs(rate)


def test_alpha_is_t_times_the_damping() -> None:
    """For a damping that is not alpha/t, too."""
    _, second = margins_at(flow_with(damping=2.0), 2.5)
    assert second == pytest.approx((2.5 * 2.0 - 3) * (C - B / 2.5) - B / 2.5, rel=1e-13)


# --- stability ------------------------------------------------------------------------------------


def stability(flow: InertialHessianFlow, t: Any, x: Tensor, step: float = 0.2) -> Margins:
    return stability_margins(flow, t, x, step=step, curvature=lambda x: 9.0)


def test_stability_margins_of_constants() -> None:
    for t in (2.5, 40.0):
        spare = C - ALPHA / t * B
        roots = math.sqrt(C) + math.sqrt(spare)
        expected = [spare, B / 0.2 - C, roots / B - 3.0]
        values = stability(flow_with(), t, points()).values
        assert values.tolist() == pytest.approx(expected, rel=1e-13)


def test_stability_margins_of_powers() -> None:
    """beta = b t^p: gamma - beta' = c - b p t^(p - 1)."""
    t, power = 2.5, 0.5
    beta, drive = B * t**power, C - B * power * t ** (power - 1)
    spare = drive - ALPHA / t * beta
    expected = [spare, beta / 0.2 - drive, (math.sqrt(drive) + math.sqrt(spare)) / beta - 3.0]
    values = stability(flow_with(beta=lambda s: B * s**power), t, points()).values
    assert values.tolist() == pytest.approx(expected, rel=1e-13)


def test_roots_of_negative_numbers_count_as_zero() -> None:
    """Derivatives stay finite there."""
    t, alpha = 0.5, Positive(ALPHA)
    spare = C - ALPHA / t * B
    assert spare < 0
    margins = stability(flow_with(damping=VanishingDamping(alpha)), t, points())
    expected = [spare, B / 0.2 - C, math.sqrt(C) / B - 3.0]
    assert margins.values.tolist() == pytest.approx(expected, rel=1e-13)
    (slope,) = torch.autograd.grad(margins.violation(), alpha.raw)
    # The violated one is the first: d/draw of alpha b/t.
    assert float(slope) == pytest.approx(ALPHA * B / t, rel=1e-13)


def test_the_curvature_is_asked_at_the_position() -> None:
    x = points()
    margins = stability_margins(
        flow_with(), 2.5, x, step=0.2, curvature=lambda y: y.square().sum() + 1
    )
    again = stability_margins(flow_with(), 2.5, x, step=0.2, curvature=lambda y: 0.0)
    gap = again.values - margins.values
    assert gap.tolist() == pytest.approx([0.0, 0.0, math.sqrt(float(x @ x) + 1)], rel=1e-13)


# --- both -----------------------------------------------------------------------------------------


def learnable() -> InertialHessianFlow:
    return flow_with(
        damping=VanishingDamping(AtLeast(3, value=ALPHA)),
        beta=NETWORK,
        gamma=PolynomialSchedule(C, 0.2),
    )


def at_times(kind: str, flow: InertialHessianFlow, t: Any, x: Tensor) -> Margins:
    return convergence_margins(flow, t) if kind == "convergence" else stability(flow, t, x)


@pytest.mark.parametrize("kind", ["convergence", "stability"])
def test_a_vector_of_times_equals_a_loop(kind: str) -> None:
    flow, x = learnable(), points(4)
    margins = at_times(kind, flow, TIMES, x)
    assert margins.values.shape == (len(margins.names), 4)
    assert margins.violation().shape == (4,)
    for i, t in enumerate(TIMES.tolist()):
        single = at_times(kind, flow, t, x[i])
        assert torch.equal(single.values, margins.values[:, i])
        by_hand = sum(max(-value, 0.0) for value in single.values.tolist())
        assert float(margins.violation()[i].detach()) == pytest.approx(by_hand, rel=1e-14)
    assert margins.hold == bool((margins.values >= 0).all())
    # Whole numbers are times, too.
    whole = torch.tensor([1, 2])
    both = at_times(kind, flow, whole, x[:2]), at_times(kind, flow, whole.double(), x[:2])
    assert torch.equal(both[0].values, both[1].values)


@pytest.mark.parametrize("kind", ["convergence", "stability"])
def test_margins_are_differentiable_to_schedules_and_time(kind: str) -> None:
    flow, x = learnable(), points()
    named = dict(flow.named_parameters())
    t = torch.tensor(2.5, dtype=torch.float64)
    inputs = tuple(v.detach().clone().requires_grad_() for v in (t, *named.values()))

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flow = flow

        def forward(self, t: Tensor) -> Tensor:
            return at_times(kind, self.flow, t, x).values

    def values(t: Tensor, *parameters: Tensor) -> Tensor:
        swapped = {f"flow.{n}": p for n, p in zip(named, parameters, strict=True)}
        return torch.func.functional_call(Wrapped(), swapped, (t,))

    assert torch.autograd.gradcheck(values, inputs)
    with torch.no_grad():
        assert not at_times(kind, flow, t, x).values.requires_grad
    # Nothing to learn, nothing that asks for a gradient.
    assert not at_times(kind, flow_with(), t, x).values.requires_grad


def test_hold_and_violation() -> None:
    margins = Margins(("a", "b"), torch.tensor([[1.0, 0.0, -2.0], [0.0, -1.0, -3.0]]))
    assert margins.violation().tolist() == [0.0, 1.0, 5.0]
    assert not margins.hold
    assert Margins(("a",), torch.zeros(1)).hold
    assert not Margins(("a",), torch.tensor([math.nan])).hold


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "step": (lambda: stability(flow_with(), 1.0, points(), step=0.0), "step must be positive"),
    "beta": (lambda: stability(flow_with(beta=0.0), 1.0, points()), "need beta > 0.*at t = 1"),
    "rows": (lambda: stability(flow_with(), TIMES, points(3)), r"x must have shape \(4, d\)"),
    "one point": (lambda: stability(flow_with(), TIMES[:3], points()), "x must have shape"),
    "times": (lambda: convergence_margins(flow_with(), TIMES[None]), "t must be 0-d or of shape"),
    "no time": (lambda: convergence_margins(flow_with(), TIMES[:0]), "t must be 0-d or of shape"),
    "zero": (lambda: convergence_margins(flow_with(damping=1.0), 0.0), "t must be > 0; got 0"),
    "alpha/t": (lambda: stability(flow_with(), 0.0, points()), "t0 must be positive"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


# --- the norm of the Hessian ----------------------------------------------------------------------


def exact_norm(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    matrix = torch.autograd.functional.hessian(f, x, create_graph=True)
    return torch.linalg.matrix_norm(matrix, ord=2)


def saddle(x: Tensor) -> Tensor:
    """Eigenvalues of both signs, the largest ones of nearly the same size."""
    return 5.0 * x[0] ** 2 - 4.99 * x[1] ** 2 + 0.1 * torch.sin(x).sum() * x[2]


@pytest.mark.parametrize("f", [problem(), plain, Rosenbrock(dim=3)], ids=["p", "autograd", "r"])
def test_hessian_norm(f: Callable[[Tensor], Tensor]) -> None:
    for seed in range(3):
        x = points(seed=seed)
        truth = float(exact_norm(f, x).detach())
        quick = [float(hessian_norm(f, iterations=n)(x)) for n in (1, 3, 20)]
        assert all(value <= truth * (1 + 1e-14) for value in quick)
        assert quick[0] < quick[1] <= quick[2] * (1 + 1e-12)
        assert float(hessian_norm(f, iterations=300)(x)) == pytest.approx(truth, rel=1e-9)
        assert quick[2] == pytest.approx(truth, rel=2e-2)


def test_hessian_norm_of_a_saddle() -> None:
    """A Rayleigh quotient would be near zero: its two signs cancel."""
    x = points()
    truth = float(exact_norm(saddle, x).detach())
    for seed in range(5):
        assert float(hessian_norm(saddle, seed=seed)(x)) == pytest.approx(truth, rel=1e-2)


def test_hessian_norm_of_a_linear_function_is_zero() -> None:
    x = points().requires_grad_()
    value = hessian_norm(lambda y: 2 * y.sum())(x)
    assert float(value.detach()) == 0


def test_the_derivative_of_the_hessian_norm() -> None:
    """Against that of the exact norm, and central differences."""
    f = problem()
    x = points().requires_grad_()
    norm = hessian_norm(f, iterations=300)
    (slope,) = torch.autograd.grad(norm(x), x)
    (truth,) = torch.autograd.grad(exact_norm(f, x), x)
    torch.testing.assert_close(slope, truth, rtol=1e-8, atol=1e-10)
    direction = points(seed=7)
    h = 1e-5
    with torch.no_grad():
        difference = float((norm(x + h * direction) - norm(x - h * direction)) / (2 * h))
    assert float(slope @ direction) == pytest.approx(difference, rel=1e-7)


def test_the_hessian_norm_knows_parameters_and_modes() -> None:
    quartic = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    f = QuarticQuadratic([1.0, 2.0, 3.0], quartic=quartic)
    x = torch.tensor([0.1, 0.2, 2.0], dtype=torch.float64)
    value = hessian_norm(f, iterations=200)(x)
    assert float(value.detach()) == pytest.approx(3 + 3 * 0.5 * 4, rel=1e-12)
    (slope,) = torch.autograd.grad(value, quartic)
    assert float(slope) == pytest.approx(12.0, rel=1e-10)
    with torch.no_grad():
        assert not hessian_norm(f)(x).requires_grad
    assert not hessian_norm(problem())(x).requires_grad
    assert hessian_norm(problem())(x.float().double()).dtype == torch.float64
    before = torch.get_rng_state()
    hessian_norm(f)(x)
    assert torch.equal(before, torch.get_rng_state())


# --- in use ---------------------------------------------------------------------------------------


def walked(beta: float, step: float, steps: int) -> tuple[Margins, Tensor]:
    """Euler's method on a quadratic with curvatures up to 10: its margins, and f(x_k)."""
    f = Quadratic([0.5, 3.0, 10.0])
    flow = hessian_damped(f, damping=VanishingDamping(3.5), beta=beta, gamma=4.0)
    rule = Euler(flow, step=step)
    times = 2.0 + step * torch.arange(steps, dtype=torch.float64)
    state = flow.initial_state(points(), t0=2.0)
    positions = []
    with torch.no_grad():
        for k, t in enumerate(times):
            positions.append(state[0])
            state = rule(k, state, t)
        x = torch.stack(positions)
        margins = stability_margins(flow, times, x, step=step, curvature=hessian_norm(f))
        return margins, f(x)


def test_where_the_margins_hold_euler_s_method_converges() -> None:
    margins, values = walked(beta=0.5, step=0.1, steps=200)
    assert margins.hold
    k = torch.arange(1, 201)
    assert bool((values * k < 20 * values[0]).all())  # O(1/k)
    assert float(values[-1]) < 1e-4 * float(values[0])


@pytest.mark.parametrize(
    ("beta", "step", "violated"), [(0.05, 0.1, 1), (3.0, 0.1, 2)], ids=["second", "third"]
)
def test_where_they_are_grossly_violated_it_diverges(
    beta: float, step: float, violated: int
) -> None:
    margins, values = walked(beta=beta, step=step, steps=200)
    assert bool((margins.values[violated] < -0.5).all())
    assert float(values[-1]) > 1e6 * float(values[0])
