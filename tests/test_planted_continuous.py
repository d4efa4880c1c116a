"""Planted errors in the quotient: the closed forms and the differences must notice each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ode_stopping import InterpolatingAdjoint
from ode_stopping.core.functions import CriterionMap, Vjp
from ode_stopping.crossing.point import Crossing
from ode_stopping.gradients import backward
from ode_stopping.gradients.quotient import cotangent_at_crossing
from theory_checks.closed_forms import CLOSED_FORMS

EXPONENTIAL, CLOCK, *_, SHARED = CLOSED_FORMS
Quotient = Callable[[Crossing, Tensor, Tensor], tuple[Tensor, Tensor]]


def worst(case: Any, eps: float) -> float:
    leaves = case.leaves(eps, 0.25)
    result = case.solve(leaves, InterpolatingAdjoint(), rtol=1e-9)
    result.time.backward()
    return float(max(case.errors(result.time, leaves)[1].values()))


def wrong_sign(crossing: Crossing, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    _, scale = cotangent_at_crossing(crossing, c, w)
    return w - scale * crossing.gradient, -scale


def epsilon_in_the_denominator(crossing: Crossing, c: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    scale = -(w @ crossing.velocity + c) / (crossing.rate + 1e-12)
    return w + scale * crossing.gradient, scale


@pytest.mark.parametrize("case", [EXPONENTIAL, CLOCK, SHARED], ids=lambda case: case.name)
def test_the_right_quotient_passes(case: Any) -> None:
    assert worst(case, 1e-4) < 1e-6


@pytest.mark.parametrize("case", [EXPONENTIAL, CLOCK, SHARED], ids=lambda case: case.name)
def test_a_wrong_sign_is_noticed(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "cotangent_at_crossing", wrong_sign)
    assert worst(case, 1e-4) > 0.5


def test_an_epsilon_in_the_denominator_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst(EXPONENTIAL, 1e-7) < 1e-6
    monkeypatch.setattr(backward, "cotangent_at_crossing", epsilon_in_the_denominator)
    assert worst(EXPONENTIAL, 1e-7) > 1e-6


def test_a_missing_explicit_term_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CriterionMap.vjp

    def without_parameters(self: CriterionMap, *args: Any, **options: Any) -> Vjp:
        product = right(self, *args, **options)
        zeros = [torch.zeros_like(g) for g in product.leaves]
        return Vjp(product.value, product.state, product.time, zeros)

    monkeypatch.setattr(CriterionMap, "vjp", without_parameters)
    for case in (CLOCK, SHARED):
        assert worst(case, 1e-4) > 1e-2
