"""The closed forms without the library's solver: scipy's T, and derivatives by differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from theory_checks.closed_forms import CLOSED_FORMS, FORMS, ClosedForm, Values

TARGET, START = 1e-2, 0.25


def scipy_time(form: ClosedForm, values: Values) -> float:
    """T of the form's own flow and criterion, by DOP853 and the root of its dense output."""
    leaves = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}
    flow, criterion = form.flow(leaves), form.criterion(leaves)

    def velocity(t: float, x: Any) -> Any:
        return flow(torch.tensor(t), torch.as_tensor(x)).numpy()

    def excess(t: float, x: Any) -> float:
        return float(criterion(torch.tensor(t), torch.as_tensor(x))) - values["eps"]

    excess.terminal = True  # type: ignore[attr-defined]
    run = solve_ivp(
        velocity, (values["t0"], 1e4), values["x0"], "DOP853", rtol=1e-12, atol=1e-14, events=excess
    )
    return float(run.t_events[0][0])


def difference(time: Callable[[Values], float], values: Values, name: str) -> Any:
    """dT/d(name) by central differences, Richardson's to order 4."""
    base = np.asarray(values[name], dtype=float)
    found = np.zeros_like(base)
    for place in np.ndindex(base.shape):
        size = max(abs(float(base[place])), 0.1)

        def moved(by: float, place: tuple[int, ...] = place, size: float = size) -> float:
            at = np.array(values[name], dtype=float)
            at[place] += by * size
            return time({**values, name: at if at.ndim else float(at)})

        coarse, fine = ((moved(h) - moved(-h)) / (2 * h * size) for h in (2e-3, 1e-3))
        found[place] = (4 * fine - coarse) / 3
    return found


def verify(form: ClosedForm) -> None:
    """T is scipy's, and the derivatives are those of T."""
    values = form.values(TARGET, START)
    answer = form.answer(values)
    assert answer["T"] == pytest.approx(scipy_time(form, values), rel=1e-10)
    assert set(answer) == {"T", *values}
    for name in values:
        found = difference(lambda at: float(form.answer(at)["T"]), values, name)
        exact = np.asarray(answer[name], dtype=float)
        np.testing.assert_allclose(found, exact, rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("form", CLOSED_FORMS, ids=lambda form: form.name)
def test_every_form_is_right(form: ClosedForm) -> None:
    verify(form)


@pytest.mark.parametrize("form", CLOSED_FORMS, ids=lambda form: form.name)
def test_a_wrong_entry_of_any_answer_is_noticed(form: ClosedForm) -> None:
    for name in form.answer(form.values(TARGET, START)):

        def wrong(values: Values, name: str = name) -> Values:
            answer = form.answer(values)
            return {**answer, name: (1 + 1e-6) * np.asarray(answer[name])}

        with pytest.raises(AssertionError):
            verify(dataclasses.replace(form, answer=wrong))


def test_a_flow_or_a_criterion_of_another_form_is_noticed() -> None:
    form = FORMS["form1-exponential"]
    for changes in (
        {"flow": lambda v: lambda t, x: -1.001 * v["theta"] * x},
        {"criterion": lambda v: lambda t, x: 0.501 * x.square().sum()},
    ):
        with pytest.raises(AssertionError):
            verify(dataclasses.replace(form, **changes))  # type: ignore[arg-type]
