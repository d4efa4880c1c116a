"""Solvers of a user's own: the page that shows how, and what they do with every route."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import blocks, missing_targets, printed
from torch import Tensor
from variants import slow_after

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    Method,
    RungeKutta,
    Solver,
    Step,
    StepAdjoint,
    stopping_time,
)
from theory_checks.closed_forms import CLOSED_FORMS, ClosedForm

PAGE = Path(__file__).resolve().parents[1] / "docs" / "how-to-own-solver.md"
ROUTES = (
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
)
every_route = pytest.mark.parametrize(
    "route", slow_after(2, ROUTES), ids=lambda route: type(route).__name__
)
every_form = pytest.mark.parametrize("case", CLOSED_FORMS[:3], ids=lambda case: case.name)


def of_the_page() -> dict[str, Any]:
    """Everything that the code on the page defines."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(PAGE, "python"):
        exec(compile(block, "how-to", "exec"), namespace)
    return namespace


DEFINED = of_the_page()
CASH_KARP: RungeKutta = DEFINED["CASH_KARP"]


def broken() -> RungeKutta:
    weights = list(CASH_KARP.weights)
    weights[2] += 1e-3
    return RungeKutta(
        order=5,
        nodes=CASH_KARP.nodes,
        matrix=CASH_KARP.matrix,
        weights=weights,
        error=CASH_KARP.error,
    )


# --- the page -----------------------------------------------------------------------------------


def test_example_prints_what_is_printed_below_it() -> None:
    assert printed(blocks(PAGE, "python")[0], "how-to") == blocks(PAGE, "text")[0]


def test_links_lead_somewhere() -> None:
    assert missing_targets(PAGE) == []


def test_a_tableau_is_under_forty_lines() -> None:
    """From the numbers to the solver."""
    code = blocks(PAGE, "python")[0].split("rate = ")[0]
    assert len([line for line in code.splitlines() if line.strip()]) < 40


# --- the methods --------------------------------------------------------------------------------


def flow(t: Any, y: Tensor) -> Tensor:
    """y' = -y^2 cos t: y = 1/(c + sin t), c = 1/y(0)."""
    return -(y**2) * torch.cos(torch.as_tensor(t, dtype=y.dtype))


def error_of(method: Method, count: int) -> tuple[float, float]:
    """Error at t = 1 after `count` equal steps, and largest error of the dense output."""
    t, y = 0.0, torch.tensor([1.0, 0.6], dtype=torch.float64)
    start, worst = 1 / y, 0.0
    for k in range(count):
        end = (k + 1) / count
        step = method.trial(flow, t, y, flow(t, y), end)
        middle = 0.5 * (t + end)
        inside = method.dense(step)(middle) - 1 / (start + math.sin(middle))
        worst = max(worst, float(inside.abs().max()))
        t, y = end, step.y1
    return float((y - 1 / (start + math.sin(1.0))).abs().max()), worst


@pytest.mark.parametrize(
    ("method", "order"), [(CASH_KARP, 5), (DEFINED["HeunSteps"](), 2)], ids=["cash-karp", "heun"]
)
def test_order_as_a_slope(method: Method, order: int) -> None:
    """The error of y falls as h^order, that of the cubic in between no slower than h^4."""
    assert method.order == order
    errors = [error_of(method, count) for count in (16, 32, 64)]
    slope = math.log2(errors[0][0] / errors[2][0]) / 2
    assert slope == pytest.approx(order, abs=0.35)
    assert math.log2(errors[0][1] / errors[2][1]) / 2 > min(order, 4) - 0.35


def test_a_wrong_weight_has_no_order() -> None:
    errors = [error_of(broken(), count)[0] for count in (16, 64)]
    assert math.log2(errors[0] / errors[1]) / 2 < 1


@pytest.mark.parametrize("method", [CASH_KARP, DEFINED["HeunSteps"]()], ids=["cash-karp", "heun"])
def test_replay_and_its_derivative(method: Method) -> None:
    """The kept end to rounding; the derivative against differences that fall fourfold."""
    y, t0, t1 = torch.tensor([1.0, 0.6], dtype=torch.float64), 0.3, 0.55
    step = method.trial(flow, t0, y, flow(t0, y), t1)
    x = y.clone().requires_grad_(True)
    time = torch.tensor(t0, dtype=torch.float64, requires_grad=True)
    length = torch.tensor(t1 - t0, dtype=torch.float64, requires_grad=True)
    end = method.replay(flow, step, x, time, length)
    size = float(step.y1.abs().max()) + step.length * float(step.f0.abs().max())
    assert float((end.detach() - step.y1).abs().max()) < 100 * 2.0**-52 * size
    weights = torch.tensor([0.8, -1.3], dtype=torch.float64)
    found = torch.autograd.grad(weights @ end, [x, time, length])

    def along(shift: float, which: int) -> float:
        moved = [y, t0, t1 - t0]
        moved[which] = moved[which] + shift
        start, begin, h = moved
        taken = method.trial(flow, begin, start, flow(begin, start), begin + h)
        return float(weights @ taken.y1)

    for which in range(3):
        known = float(found[which].sum())
        gaps = [abs((along(d, which) - along(-d, which)) / (2 * d) - known) for d in (2e-2, 1e-2)]
        assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)


# --- in stopping_time ---------------------------------------------------------------------------


def errors(
    case: ClosedForm, solver: Solver, route: GradientRoute, eps: float = 1e-2
) -> tuple[float, float, Any]:
    """Relative error of T, the largest of those of the derivatives, and the result."""
    leaves = case.leaves(eps, 0.25)
    result = stopping_time(
        case.flow(leaves),
        leaves["x0"],
        case.criterion(leaves),
        leaves["eps"],
        t0=leaves["t0"],
        max_time=1e5,
        solver=solver,
        gradient=route,
    )
    result.time.backward()
    of_time, of_derivatives = case.errors(result.time, leaves)
    return of_time, max(of_derivatives.values()), result


@every_route
@every_form
def test_a_tableau_with_every_route(case: ClosedForm, route: GradientRoute) -> None:
    of_time, of_derivatives, result = errors(case, DEFINED["CashKarp"](rtol=1e-9), route)
    assert of_time < 1e-8
    assert of_derivatives < 1e-6
    assert result.evidence.passed
    assert result.stats.fallback is None


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@every_route
@every_form
def test_a_method_by_hand_with_every_route(case: ClosedForm, route: GradientRoute) -> None:
    """Its error estimate is that of Euler's step, far above its error: hence the warnings."""
    of_time, of_derivatives, result = errors(case, DEFINED["Heun"](rtol=1e-5), route)
    assert of_time < 1e-4
    assert of_derivatives < 1e-3
    assert of_derivatives < 10 * result.evidence.estimate


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize("name", ["CashKarp", "Heun"])
def test_errors_follow_the_tolerance(name: str) -> None:
    case, tolerances = CLOSED_FORMS[2], (1e-4, 1e-6) if name == "Heun" else (1e-5, 1e-9)
    coarse, fine = (
        max(errors(case, DEFINED[name](rtol=rtol), StepAdjoint())[:2]) for rtol in tolerances
    )
    assert fine < 0.1 * coarse


def test_the_other_settings_of_a_solver() -> None:
    """Limits and tolerances are those of `Solver`."""
    solver = DEFINED["CashKarp"](rtol=1e-6, max_step=0.05)
    _, _, result = errors(CLOSED_FORMS[0], solver, StepAdjoint())
    times = result.trajectory.times
    assert float((times[1:] - times[:-1]).max()) <= 0.05 * (1 + 1e-12)
    with pytest.raises(ValueError, match="rtol must be"):
        DEFINED["CashKarp"](rtol=2.0)


@every_route
def test_several_targets_and_a_breakpoint(route: GradientRoute) -> None:
    """x' = -r x, r = a before t = 1 and b after it: T_k from log x, with all its derivatives."""
    leaves = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in {"a": 0.9, "b": 2.0, "x0": [2.0], "eps": [0.7, 0.1, 1e-3]}.items()
    }
    a, b, x0, eps = leaves.values()
    result = stopping_time(
        lambda t, x: -(a if bool(t < 1) else b) * x,
        x0,
        lambda t, x: x.sum(),
        eps,
        breakpoints=[1.0],
        solver=DEFINED["CashKarp"](rtol=1e-9),
        gradient=route,
    )
    distance = torch.log(x0 / eps)
    truth = 1 + (distance - a) / b
    truth = torch.where(distance < a, distance / a, truth)
    torch.testing.assert_close(result.time, truth, rtol=1e-8, atol=0)
    weights = torch.tensor([1.0, -0.4, 0.7], dtype=torch.float64)
    found = torch.autograd.grad(weights @ result.time, [*leaves.values()])
    known = torch.autograd.grad(weights @ truth, [*leaves.values()])
    for one, other in zip(found, known, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_a_replay_that_is_another_step_is_refused() -> None:
    """Its derivative would belong to another path."""

    class Crooked(DEFINED["HeunSteps"]):  # type: ignore[misc]
        def replay(self, f: Any, step: Step, y0: Tensor, t0: Any, h: Any) -> Tensor:
            return super().replay(f, step, y0, t0, 1.01 * h)

    class Solving(Solver):
        def method(self, dtype: torch.dtype) -> Method:
            return Crooked()

    with pytest.raises(RuntimeError, match="does not give the state"):
        errors(CLOSED_FORMS[0], Solving(rtol=1e-4), StepAdjoint())
