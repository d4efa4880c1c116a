"""T and every derivative against closed forms, by every route."""

from __future__ import annotations

import pytest
import torch
from variants import slow_after

from ode_stopping import (
    BacksolveAdjoint,
    BacksolveMismatchError,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    StepAdjoint,
)
from theory_checks.closed_forms import CLOSED_FORMS, FORMS, ClosedForm, modes_at_target

TARGETS = (1e-1, 1e-4, 1e-8, 1e-12)

ROUTES = (
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
)

by_route = pytest.mark.parametrize(
    "route", slow_after(2, ROUTES), ids=lambda route: type(route).__name__
)
by_case = pytest.mark.parametrize("case", CLOSED_FORMS, ids=lambda case: case.name)


def measured(
    case: ClosedForm,
    route: GradientRoute,
    eps: float,
    rtol: float | None,
    t0: float = 0.0,
    method: str = "dopri5",
) -> tuple[float, float]:
    """Relative error of T, and the largest of those of the derivatives.

    BacksolveAdjoint may refuse to answer instead: then its error counts as none.
    """
    leaves = case.leaves(eps, t0)
    result = case.solve(leaves, route, rtol=rtol, method=method)
    try:
        result.time.backward()
    except BacksolveMismatchError:
        assert isinstance(route, BacksolveAdjoint)
        return 0.0, 0.0
    of_time, of_derivatives = case.errors(result.time, leaves)
    return of_time, max(of_derivatives.values())


@pytest.mark.parametrize("eps", TARGETS)
@by_route
@by_case
@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
def test_tight_tolerance(case: ClosedForm, route: GradientRoute, eps: float) -> None:
    if eps < case.smallest:
        pytest.skip(f"{case.name} is meant for targets down to {case.smallest:g}")
    # The default route goes all the way with the default method; the others take the longer steps
    # of dopri8.
    by_default = isinstance(route, InterpolatingAdjoint) or eps == max(TARGETS)
    method = "dopri5" if by_default else "dopri8"
    of_time, of_derivatives = measured(case, route, eps, 1e-10, t0=0.25, method=method)
    assert of_time < 1e-9
    assert of_derivatives < 1e-7


@pytest.mark.parametrize("eps", [1e-1, 1e-4, 1e-10])
@by_case
@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
def test_default_tolerance(case: ClosedForm, eps: float) -> None:
    if eps < case.smallest:
        pytest.skip(f"{case.name} is meant for targets down to {case.smallest:g}")
    for route in ROUTES:
        _, of_derivatives = measured(case, route, eps, None)
        assert of_derivatives < 1e-3, type(route).__name__


@by_route
@by_case
@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
def test_errors_fall_with_the_tolerance(case: ClosedForm, route: GradientRoute) -> None:
    errors = [max(measured(case, route, 1e-3, rtol)) for rtol in (1e-4, 1e-6, 1e-8)]
    for error, rtol in zip(errors, (1e-4, 1e-6, 1e-8), strict=True):
        assert error < 300 * rtol
    assert errors[2] < max(0.02 * errors[0], 1e-12)


@by_route
def test_negative_and_large_start_times(route: GradientRoute) -> None:
    for case in CLOSED_FORMS:
        for t0 in (-3.0, 2.0):
            of_time, of_derivatives = measured(case, route, 1e-1, 1e-8, t0=t0)
            assert of_time < 1e-7, case.name
            assert of_derivatives < 1e-5, case.name


@by_route
def test_cotangent_on_the_state(route: GradientRoute) -> None:
    """w^T x_T of form 5: x_T moves explicitly and with T."""
    case = FORMS["form5-modes"]
    eps, weights = 1e-3, torch.tensor([0.7, -1.1], dtype=torch.float64)
    leaves = case.leaves(eps, 0.25)
    result = case.solve(leaves, route, rtol=1e-10)
    assert isinstance(result.state, torch.Tensor)
    try:
        (weights @ result.state + 0.3 * result.time).backward()
    except BacksolveMismatchError:
        assert isinstance(route, BacksolveAdjoint)
        return

    values = case.values(eps, 0.25)
    answer = case.answer(values)
    span, x, _ = modes_at_target(values)
    p, curvature = (torch.as_tensor(values[k]) for k in ("p", "curvature"))
    end, x0 = torch.as_tensor(x), torch.as_tensor(values["x0"])
    along = float(weights @ (-p * curvature * end))  # d(w^T x_T)/dT
    explicit = {
        "p": -weights * curvature * span * end,
        "curvature": -weights * p * span * end,
        "x0": weights * end / x0,
        "eps": torch.tensor(0.0),
        "t0": torch.tensor(-along),
    }
    for name, leaf in leaves.items():
        truth = explicit[name] + (along + 0.3) * torch.as_tensor(answer[name])
        assert leaf.grad is not None
        assert float((leaf.grad - truth).norm()) < 1e-7 * float(truth.norm()), name
