"""A tensor that moves a jump of the flow, which a comparison hides from autograd, is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientAccuracyWarning,
    GradientRoute,
    InterpolatingAdjoint,
    StepAdjoint,
    stopping_time,
)

F64 = torch.float64
ROUTES = [
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
]


def leaf(value: Any, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


class Switched(nn.Module):
    """x' = -a x before tau, and -b x after it."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0, dtype=dtype))
        self.b = nn.Parameter(torch.tensor(2.0, dtype=dtype))
        self.tau = nn.Parameter(torch.tensor(0.4, dtype=dtype))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -torch.where(t < self.tau, self.a, self.b) * x


def said(call: Callable[[], object]) -> list[str]:
    """The warnings that a call gives."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in seen]


def decayed(t: Tensor, x: Tensor) -> Tensor:
    return x.sum()


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: type(route).__name__)
@pytest.mark.parametrize("evidence", ["light", "standard"])
def test_a_number_in_the_place_of_a_learned_time(route: GradientRoute, evidence: Any) -> None:
    flow = Switched()
    with pytest.warns(GradientAccuracyWarning, match=r"moving flow\.tau moves the jump .*t = 0.4"):
        stopping_time(
            flow,
            leaf([2.0]),
            decayed,
            0.5,
            breakpoints=[0.4],
            gradient=route,
            evidence=evidence,
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_a_closure_and_in_single_precision(dtype: torch.dtype) -> None:
    a, times = leaf(1.0, dtype), [leaf(0.4, dtype), leaf(0.7, dtype)]

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -a * x * (1.0 + (t > times[0]) + (t > times[1]))

    numbers = [float(p.detach()) for p in times]
    texts = said(lambda: stopping_time(flow, leaf([2.0], dtype), decayed, 0.1, breakpoints=numbers))
    assert [text[:25] for text in texts] == [
        "moving times[0] moves the",
        "moving times[1] moves the",
    ]


def test_without_a_breakpoint_at_all() -> None:
    flow = Switched()
    result = stopping_time(flow, leaf([2.0, 1.0]), decayed, 0.5, evidence="standard")
    texts = said(result.time.backward)
    assert "moving flow.tau moves the jump of the flow at t = 0.4" in texts[0]


def test_a_threshold_in_the_state() -> None:
    a, edge = leaf(1.0), leaf(1.0)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -a * torch.where(x[0] > edge, 1.0, 2.0) * x

    result = stopping_time(flow, leaf([2.0, 1.0]), decayed, 0.5, evidence="standard")
    assert "moving edge moves the jump of the flow" in said(result.time.backward)[0]


@pytest.mark.parametrize("kind", ["fixed", "tensor", "smooth", "far"])
def test_no_accusation(kind: str) -> None:
    flow = Switched()
    options: dict[str, Any] = {"breakpoints": [0.4], "evidence": "standard"}
    if kind == "fixed":
        flow.tau.requires_grad_(False)
    if kind == "tensor":
        options["breakpoints"] = [flow.tau]
    if kind == "smooth":
        flow.tau.requires_grad_(False)
        flow.b.data.fill_(float(flow.a.detach()) * (1 + 1e-6))
    if kind == "far":
        # A time that lies elsewhere moves nothing here.
        flow.tau.data.fill_(50.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = stopping_time(flow, leaf([2.0]), decayed, 0.5, **options)
        result.time.backward()
