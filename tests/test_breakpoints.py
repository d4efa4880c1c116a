"""Flows that jump in t: with `breakpoints=` every derivative is that of the jumping flow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientAccuracyWarning,
    GradientRoute,
    InterpolatingAdjoint,
    StepAdjoint,
    Torchdiffeq,
    stopping_time,
)

JUMP, FIRST, SECOND, START, TARGET = 1.0, 1.0, 3.0, 0.2, 1e-3
ROUTES = [
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
]


class Switched:
    """x' = -r(t) (1 + t/10) x, r jumping from `first` to `second` at t = 1; J = |x|^2/2."""

    def __init__(self, *, left_closed: bool = False) -> None:
        self.first = _leaf(FIRST)
        self.second = _leaf(SECOND)
        self.x0 = _leaf([2.0])
        self.t0 = _leaf(START)
        self.target = _leaf(TARGET)
        self.seen: list[float] = []
        self._left_closed = left_closed

    def flow(self, t: Tensor, x: Tensor) -> Tensor:
        self.seen.append(float(t.detach()))
        early = bool(t <= JUMP) if self._left_closed else bool(t < JUMP)
        return -(self.first if early else self.second) * (1 + 0.1 * t) * x

    def leaves(self) -> list[Tensor]:
        return [self.first, self.second, self.x0, self.t0, self.target]

    def solve(
        self,
        route: GradientRoute,
        *,
        breakpoints: Sequence[float] | None = (JUMP,),
        rtol: float = 1e-9,
        method: str = "dopri5",
    ) -> tuple[float, list[float]]:
        result = stopping_time(
            self.flow,
            self.x0,
            lambda t, x: 0.5 * x.square().sum(),
            self.target,
            t0=self.t0,
            gradient=route,
            breakpoints=breakpoints,
            solver=Torchdiffeq(rtol=rtol, method=method),
        )
        gradients = torch.autograd.grad(result.time, self.leaves())
        return result.time.item(), [float(g) for g in gradients]

    @staticmethod
    def truth() -> tuple[float, list[float]]:
        """int r (1 + t/10) over [t0, T] is ln(x0^2/(2 eps))/2, a quadratic equation for T."""
        whole = math.log(4 / (2 * TARGET)) / 2
        before = (JUMP - START) + 0.05 * (JUMP**2 - START**2)
        after = (whole - FIRST * before) / SECOND + JUMP + 0.05 * JUMP**2
        end = (-1 + math.sqrt(1 + 0.2 * after)) / 0.1
        rate = SECOND * (1 + 0.1 * end)
        later = (end - JUMP) + 0.05 * (end**2 - JUMP**2)
        by_start = FIRST * (1 + 0.1 * START)
        return end, [
            -before / rate,
            -later / rate,
            0.5 / rate,
            by_start / rate,
            -0.5 / (TARGET * rate),
        ]


def _leaf(value: object) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: type(route).__name__)
def test_every_derivative_across_a_jump(route: GradientRoute, method: str) -> None:
    rtol, allowed = (1e-7, 2e-6) if method == "bosh3" else (1e-9, 1e-8)
    time, gradients = Switched().solve(route, rtol=rtol, method=method)
    truth, derivatives = Switched.truth()
    assert time == pytest.approx(truth, rel=allowed)
    assert gradients == pytest.approx(derivatives, rel=allowed)


@pytest.mark.parametrize("left_closed", [False, True])
def test_each_side_sees_its_own_limit(left_closed: bool) -> None:
    """Whether the flow writes t < 1 or t <= 1 makes no difference: t = 1 is never evaluated."""
    problem = Switched(left_closed=left_closed)
    _, gradients = problem.solve(InterpolatingAdjoint())
    assert gradients == pytest.approx(Switched.truth()[1], rel=1e-8)
    assert JUMP not in problem.seen


def test_fewer_steps_than_without() -> None:
    """An adaptive solver finds a jump by itself, in many small steps, and T with it."""
    told, alone = Switched(), Switched()
    told.solve(InterpolatingAdjoint())
    with pytest.warns(GradientAccuracyWarning, match="breakpoints="):
        alone.solve(InterpolatingAdjoint(), breakpoints=None)
    assert len(told.seen) < len(alone.seen)


def test_breakpoints_outside_do_not_matter() -> None:
    plain, more = Switched(), Switched()
    expected = plain.solve(InterpolatingAdjoint())
    found = more.solve(InterpolatingAdjoint(), breakpoints=[-3.0, JUMP, 5e3, 1e9, JUMP])
    assert found == expected


def test_a_jump_at_the_start_itself() -> None:
    """The flow is on the right of it from the beginning."""
    x0 = _leaf([2.0])
    result = stopping_time(
        lambda t, x: torch.where(t <= 0.0, 1.0, -1.0) * x,
        x0,
        lambda t, x: x.sum(),
        1.0,
        breakpoints=[0.0],
    )
    result.time.backward()
    assert result.time.item() == pytest.approx(math.log(2), rel=1e-7)
    assert x0.grad is not None
    assert x0.grad.item() == pytest.approx(0.5, rel=1e-6)


def test_a_parameter_between_two_jumps_is_found() -> None:
    """It acts on a hundredth of the path, where no sampled evaluation would meet it."""
    kick = _leaf(0.7)
    result = stopping_time(
        lambda t, x: -x - (kick if 1.0 < float(t.detach()) < 1.01 else 0.0) * x,
        torch.tensor([2.0], dtype=torch.float64),
        lambda t, x: x.sum(),
        1e-2,
        breakpoints=[1.0, 1.01],
    )
    result.time.backward()
    assert kick.grad is not None
    assert kick.grad.item() == pytest.approx(-0.01, rel=1e-5)


def test_single_precision_clock() -> None:
    """Both sides of a jump stay apart in the dtype in which the flow sees t."""
    seen: list[float] = []

    def flow(t: Tensor, x: Tensor) -> Tensor:
        seen.append(t.item())
        return torch.where(t < 1.1, -1.0, -2.0) * x

    result = stopping_time(
        flow, torch.tensor([2.0]), lambda t, x: x.sum(), 1e-2, breakpoints=torch.tensor([1.1])
    )
    assert result.time.item() == pytest.approx(1.1 + (math.log(200) - 1.1) / 2, rel=1e-4)
    assert torch.tensor(1.1).item() not in seen


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ("1.0", TypeError, "collection of times; got str"),
        (1.0, TypeError, "collection of times; got float"),
        (["a"], TypeError, "must hold numbers; got str"),
        ([math.nan], ValueError, "must be finite; got nan"),
        ([math.inf], ValueError, "must be finite; got inf"),
        ([1.0, 1.0 + 1e-9], ValueError, "told apart"),
    ],
)
def test_bad_breakpoints(given: object, error: type[Exception], words: str) -> None:
    dtype = torch.float32 if words == "told apart" else torch.float64
    x0 = torch.tensor([2.0], dtype=dtype)
    with pytest.raises(error, match=words):
        stopping_time(lambda t, x: -x, x0, lambda t, x: x.sum(), 0.1, breakpoints=given)  # type: ignore[arg-type]
