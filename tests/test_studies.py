"""`convergence_study`: rows against closed form 5, slopes, manners, and wrong formulas."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from discrete import Heun
from ode_stopping import ExponentialSchedule, GradientFlow, GradientNorm, Quadratic, Torchdiffeq
from ode_stopping import PreconditionedFlow as Preconditioned
from ode_stopping import RescaledGradientFlow as Rescaled
from theory_checks import ConvergenceStudy, convergence_study, measurements
from theory_checks.closed_forms import modes_at_target

CURVATURE = np.array([1.0, 2.0, 4.0])
DIAGONAL = np.array([0.9, 1.2, 0.7])
START = np.array([1.0, -0.8, 0.5])
TARGET = 1e-2
STEPS = [0.1 / 2 ** (k / 2) for k in range(8)]
SOLVER = Torchdiffeq(rtol=1e-8)


def study(**changes: Any) -> ConvergenceStudy:
    """The study of form 5, small enough for a test; `changes` go to `convergence_study`."""
    objective = Quadratic(torch.tensor(CURVATURE))
    theta = torch.tensor(DIAGONAL, requires_grad=True)
    flow = Preconditioned(objective, preconditioner=theta)
    arguments: dict[str, Any] = {
        "steps": STEPS,
        "parameters": [theta],
        "solver": SOLVER,
        **changes,
    }
    x0 = torch.tensor(START)
    target = arguments.pop("target", TARGET)
    return convergence_study(flow, x0, GradientNorm(objective), target, **arguments)


@pytest.fixture(scope="module")
def found() -> ConvergenceStudy:
    """The study as it is, for tests that only look at it."""
    return study()


def continuous() -> tuple[float, np.ndarray]:
    """T - t0 and dT/dp of form 5."""
    values = {"p": DIAGONAL, "curvature": CURVATURE, "x0": START, "eps": TARGET}
    span, x, rate = modes_at_target(values)
    return span, 2 * span * DIAGONAL**0 * CURVATURE**3 * x**2 / rate


def discrete(h: float) -> tuple[int, float, np.ndarray]:
    """N, J_N - J_{N-1} and dN/dp (Definition 3), from x_k = (1 - h p l)^k x0."""
    factor = 1 - h * DIAGONAL * CURVATURE
    values = [float(((CURVATURE * START) ** 2).sum())]
    k = 0
    while values[-1] > TARGET:
        k += 1
        values.append(float(((CURVATURE * factor**k * START) ** 2).sum()))
    x = factor**k * START
    by_p = -h * CURVATURE * k * factor ** (k - 1) * START
    decrease = values[-1] - values[-2]
    return k, decrease, -2 * CURVATURE**2 * x * by_p / decrease


@pytest.mark.parametrize("t0", [0.0, 2.5])
def test_rows_are_those_of_the_closed_form(t0: float) -> None:
    found = study(t0=t0, solver=None)
    span, gradient = continuous()
    assert found.t0 == t0
    assert found.reference.time == pytest.approx(t0 + span, rel=1e-9)
    np.testing.assert_allclose(found.reference.gradient, gradient, rtol=1e-7)
    assert [row.h for row in found.rows] == sorted(STEPS, reverse=True)
    for row in found.rows:
        n, decrease, by_p = discrete(row.h)
        error = np.linalg.norm(row.h * by_p - gradient) / np.linalg.norm(gradient)
        assert (row.N, row.steps) == (n, n)
        assert row.hN == row.h * n
        assert found.reference.time == row.T
        assert row.time_error == pytest.approx(abs(row.h * n - span) / span, rel=1e-5)
        assert row.gradient_error == pytest.approx(error, rel=1e-5)
        assert row.bracket == pytest.approx((span - row.h * n) / row.h, abs=1e-6)
        assert row.decrease == pytest.approx(decrease, rel=1e-9)
        assert (row.nfe_forward, row.vjps) == (n, n)
        assert row.seconds > 0


def test_slope_is_one_with_an_interval_about_it(found: ConvergenceStudy) -> None:
    assert found.slope.slope == pytest.approx(1.0, abs=0.1)
    assert 0.7 < found.slope.low < 1.0 < found.slope.high
    assert found.time_slope is not None


def test_higher_order_rule_and_its_evaluations() -> None:
    found = study(update=Heun, interpolation="partial_step", steps=STEPS[:6])
    assert found.slope.slope > 1.85
    assert (found.update, found.interpolation) == ("Heun", "partial_step")
    for row in found.rows:
        assert row.N - 1 < row.steps <= row.N
        assert row.nfe_forward == 2 * row.N


def test_parameters_are_those_of_the_modules_by_default() -> None:
    objective = Quadratic(torch.tensor(CURVATURE))
    flow = Rescaled(objective, schedule=ExponentialSchedule(1.0, 0.1))
    found = convergence_study(
        flow, torch.tensor(START), GradientNorm(objective), TARGET, steps=STEPS[:4], solver=SOLVER
    )
    assert found.reference.gradient.shape == (2,)
    assert found.slope.slope == pytest.approx(1.0, abs=0.2)


def test_leaves_in_closures_are_found() -> None:
    """x' = -theta x, J = a x^2/2: T = ln(a x0^2/(2 eps))/(2 theta), dT = (-T/theta, 1/(2 theta a)).

    The criterion is a module with a parameter of its own, so that both kinds are there.
    """
    theta = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.a * 0.5 * x.square().sum()

    found = convergence_study(
        lambda t, x: -theta * x,
        torch.tensor([2.0], dtype=torch.float64),
        Scaled(),
        TARGET,
        steps=[0.05, 0.02, 0.01, 0.005],
    )
    time = math.log(2.0 * 4.0 / (2 * TARGET)) / (2 * 1.3)
    expected = [1 / (2 * 1.3 * 2.0), -time / 1.3]
    assert found.reference.gradient.tolist() == pytest.approx(expected, rel=1e-7)
    assert found.slope.slope == pytest.approx(1.0, abs=0.3)


def test_a_parameter_of_the_criterion_counts() -> None:
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    found = convergence_study(
        lambda t, x: -x,
        torch.tensor([2.0], dtype=torch.float64),
        lambda t, x: scale * 0.5 * x.square().sum(),
        TARGET,
        steps=[0.05, 0.02, 0.01, 0.005],
        parameters=[scale],
        solver=SOLVER,
    )
    # J = scale x^2/2 gives T = ln(scale x0^2/(2 eps))/2, so dT/dscale = 1/(2 scale).
    assert float(found.reference.gradient) == pytest.approx(0.25, rel=1e-7)
    assert found.slope.slope == pytest.approx(1.0, abs=0.1)


def test_shown_stored_and_drawn(found: ConvergenceStudy) -> None:
    text = repr(found)
    assert "order of the gradient" in text
    assert len(text.splitlines()) == 4 + len(STEPS)
    stored = json.loads(json.dumps(found.to_dict()))
    assert stored["rows"][0]["N"] == found.rows[0].N
    assert stored["slope"]["slope"] == found.slope.slope
    frame = found.to_dataframe()
    assert list(frame["h"]) == found.h
    assert {"N", "hN", "T", "time_error", "gradient_error", "bracket", "decrease"} <= set(frame)
    axes = found.plot()
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert found.plot(axes) is axes


def test_without_pandas_the_extra_is_named(
    found: ConvergenceStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"ode-stopping\[checks\]"):
        found.to_dataframe()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"steps": [0.1, -0.1, 0.05]}, "steps must be positive"),
        ({"steps": [0.1, math.nan, 0.05]}, "steps must be positive"),
        ({"steps": [0.1, 0.05]}, "at least 3"),
        ({"steps": [0.1, 0.05, 0.1]}, "at least 3"),
        ({"steps": [0.1, 0.05, 0.02, 0.1]}, "repeat"),
        ({"parameters": []}, "parameters"),
        ({"parameters": None}, "parameters"),
        ({"parameters": [torch.ones(3)]}, r"parameters\[0\]"),
        ({"max_time": 0.1}, "the flow does not cross"),
        ({"max_steps": 5}, "iteration with h = 0.1 does not cross"),
        ({"target": 1e3}, "AT_START"),
        ({"steps": [0.9, 0.1, 0.05], "max_steps": 5000}, "iteration with h = 0.9"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], match: str) -> None:
    if changes.get("parameters", 0) is None:
        # A tensor preconditioner is a parameter of nobody's module here.
        objective = Quadratic(torch.tensor(CURVATURE))
        with pytest.raises(ValueError, match=match):
            convergence_study(
                GradientFlow(objective),
                torch.tensor(START),
                GradientNorm(objective),
                TARGET,
                steps=STEPS,
            )
        return
    with pytest.raises(ValueError, match=match):
        study(**changes)


def test_a_gradient_of_zero_has_no_relative_error() -> None:
    unused = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="dT/dtheta is zero"):
        study(parameters=[unused])


def test_missing_factor_h_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurements, "in_flow_time", lambda steps, h: steps)
    assert abs(study().slope.slope - 1.0) > 0.5


def test_wrong_sign_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    true = measurements.in_flow_time
    monkeypatch.setattr(measurements, "in_flow_time", lambda steps, h: -true(steps, h))
    found = study()
    assert min(found.gradient_errors) > 1.0
    assert abs(found.slope.slope - 1.0) > 0.5
