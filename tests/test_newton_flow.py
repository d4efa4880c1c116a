"""Newton's flow: grad f falls along a ray, so T is known for any f and any condition number."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from augmented import plain, points, problem, rate_along
from scipy.optimize import brentq
from torch import Tensor

from discrete import Euler
from ode_stopping import GradientNorm, Torchdiffeq, stopping_time
from ode_stopping.flows import NewtonFlow, Positive
from ode_stopping.problems import Quadratic, QuarticQuadratic, Rosenbrock, random_rotation

TIME = torch.tensor(0.7, dtype=torch.float64)
TIGHT = Torchdiffeq(rtol=1e-8)


def stiff() -> QuarticQuadratic:
    """Condition number 1e4."""
    spectrum = torch.logspace(0, 4, 3, dtype=torch.float64)
    return QuarticQuadratic(spectrum, rotation=random_rotation(3, seed=1), quartic=0.5)


def leaf(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).clone().requires_grad_()


OBJECTIVES = {"quartic": problem(), "stiff": stiff(), "autograd": plain}


# --- formulas -------------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("f", [problem(), plain, Rosenbrock(dim=3)], ids=["q", "autograd", "r"])
def test_the_velocity_solves_newton_s_equation(
    f: Callable[[Tensor], Tensor], damping: float
) -> None:
    x = points(4)
    velocity = NewtonFlow(f, damping=damping)(TIME, x)
    for row, v in zip(x, velocity, strict=True):
        hessian = torch.autograd.functional.hessian(f, row)
        g = torch.autograd.functional.jacobian(f, row)
        assert float((hessian @ v + damping * v + g).abs().max()) < 1e-11 * float(g.norm())


@pytest.mark.parametrize("f", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_gradient_falls_along_a_ray(f: Callable[[Tensor], Tensor]) -> None:
    """d/dt grad f = -grad f, by the chain rule."""
    flow, x = NewtonFlow(f), points()
    g, rate = rate_along(
        lambda t, s: flow.gradient(s[0]), lambda t, s: (flow(t, s[0]),), TIME, (x,)
    )
    torch.testing.assert_close(rate, -g, rtol=1e-9, atol=0)


def test_a_step_of_one_is_newton_s_method() -> None:
    f, x = problem(), points()
    hessian = torch.autograd.functional.hessian(f, x)
    expected = x - torch.linalg.solve(hessian, f.gradient(x))
    torch.testing.assert_close(Euler(NewtonFlow(f), step=1.0)(0, x, TIME), expected)
    quadratic = Quadratic([1.0, 1e3, 1e6])
    assert float(Euler(NewtonFlow(quadratic), step=1.0)(0, x, TIME).abs().max()) < 1e-15


def test_where_x_is_used_inside_the_objective_too() -> None:
    """f(y) = |y - x|^2/2 + sum y^4/4 with x the very tensor: only y counts."""
    x = points().requires_grad_()
    anchored = NewtonFlow(lambda y: 0.5 * (y - x).square().sum() + 0.25 * (y**4).sum())
    expected = -(x**3) / (1 + 3 * x**2)
    torch.testing.assert_close(anchored(TIME, x), expected, rtol=1e-13, atol=0)


def test_a_start_without_grad_leaves_no_graph_of_its_own() -> None:
    assert not NewtonFlow(problem())(TIME, points()).requires_grad
    damped = NewtonFlow(problem(), damping=Positive(0.1))
    (slope,) = torch.autograd.grad(damped(TIME, points()).sum(), damped.damping.raw)
    assert float(slope) != 0
    quartic = leaf(0.5)
    (slope,) = torch.autograd.grad(
        NewtonFlow(QuarticQuadratic([1.0, 2.0, 3.0], quartic=quartic))(TIME, points()).sum(),
        quartic,
    )
    assert float(slope) != 0


# --- stopping times -------------------------------------------------------------------------------


@pytest.mark.parametrize("f", OBJECTIVES.values(), ids=OBJECTIVES)
def test_the_stopping_time_in_closed_form(f: Callable[[Tensor], Tensor]) -> None:
    """T = t0 + log(|g0|/eps), with every derivative."""
    x0, eps, t0 = leaf(points(seed=2)), leaf(1e-2), leaf(0.25)
    criterion = GradientNorm(f, squared=False)
    result = stopping_time(NewtonFlow(f), x0, criterion, eps, t0=t0, solver=TIGHT)
    g = torch.autograd.functional.jacobian(f, x0.detach())
    hessian = torch.autograd.functional.hessian(f, x0.detach())
    truth = 0.25 + math.log(float(g.norm()) / 1e-2)
    assert float(result.time.detach()) == pytest.approx(truth, rel=1e-7)
    to_x0, to_eps, to_t0 = torch.autograd.grad(result.time, [x0, eps, t0])
    assert float(to_eps) == pytest.approx(-1e2, rel=1e-6)
    assert float(to_t0) == pytest.approx(1.0, rel=1e-6)
    expected = hessian @ g / g.square().sum()
    assert float((to_x0 - expected).norm()) < 1e-6 * float(expected.norm())


def test_the_squared_norm_halves_the_time() -> None:
    f, x0 = problem(), points(seed=2)
    result = stopping_time(NewtonFlow(f), x0, GradientNorm(f), 1e-6, solver=TIGHT)
    assert float(result.time) == pytest.approx(math.log(float(f.gradient(x0).norm()) * 1e3), 1e-8)


def test_levenberg_marquardt_on_a_quadratic_in_closed_form() -> None:
    """x_i(t) = exp(-l_i/(l_i + lam) t) x_i(0), T by a scalar root."""
    spectrum, start, eps = [0.3, 2.0, 50.0], [1.0, -0.7, 0.4], 1e-2

    def crossing(lam: float, x0: list[float]) -> float:
        def norm(t: float) -> float:
            parts = (
                (l * x * math.exp(-l / (l + lam) * t)) ** 2
                for l, x in zip(spectrum, x0, strict=True)  # noqa: E741
            )
            return 0.5 * math.log(sum(parts)) - math.log(eps)

        return brentq(norm, 0.0, 200.0, xtol=1e-13, rtol=1e-14)

    lam, x0 = leaf(0.8), leaf(start)
    flow = NewtonFlow(Quadratic(spectrum), damping=lam)
    criterion = GradientNorm(Quadratic(spectrum), squared=False)
    result = stopping_time(flow, x0, criterion, eps, solver=TIGHT)
    assert float(result.time.detach()) == pytest.approx(crossing(0.8, start), rel=1e-7)
    to_lam, to_x0 = torch.autograd.grad(result.time, [lam, x0])
    h = 1e-5
    slope = (crossing(0.8 + h, start) - crossing(0.8 - h, start)) / (2 * h)
    assert float(to_lam) == pytest.approx(slope, rel=1e-6)
    assert float(to_lam) > 1.0
    for i in range(3):
        up, down = (
            crossing(0.8, [x + s * h * (i == j) for j, x in enumerate(start)]) for s in (1, -1)
        )
        assert float(to_x0[i]) == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-6)


# --- bad input ------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="damping must be >= 0; got -1"):
        NewtonFlow(problem(), damping=-1.0)
    with pytest.raises(TypeError, match="objective must be callable"):
        NewtonFlow(1.0)
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., d\)"):
        NewtonFlow(lambda x: x * x)(TIME, torch.tensor(1.0))
    with pytest.raises(ValueError, match="objective must return one value a sample"):
        NewtonFlow(lambda x: (x.sum(0) ** 4).sum())(TIME, points(2))


def test_a_singular_hessian_raises() -> None:
    flow = NewtonFlow(Quadratic([1.0, 0.0, 2.0]))
    with pytest.raises(RuntimeError, match="singular"):
        flow(TIME, points())
    with pytest.raises(RuntimeError, match="singular"):
        stopping_time(flow, points(), GradientNorm(flow.objective), 1e-3)
    # So does a linear function, whose gradient has no graph at all.
    with pytest.raises(RuntimeError, match="singular"):
        NewtonFlow(lambda x: x.sum(-1))(TIME, points())
    damped = NewtonFlow(lambda x: x.sum(-1), damping=0.5)(TIME, points())
    torch.testing.assert_close(damped, torch.full((3,), -2.0, dtype=torch.float64))
