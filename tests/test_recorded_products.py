"""Recorded products of `InterpolatingAdjoint` and `StepAdjoint`: autograd's, or autograd itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ode_stopping import GradientRoute, InterpolatingAdjoint, StepAdjoint, stopping_time
from ode_stopping.gradients import staged, steps
from ode_stopping.gradients.recording import Recording
from tests.recorded_cases import (
    DIM,
    MATRIX,
    RECORDED,
    SPECTRUM,
    START,
    Case,
    Found,
    found,
    leaf,
    rotated,
)

# None of these is about accuracy.
pytestmark = pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
SHARE = staged._LARGEST_SHARE
ROUTES = [InterpolatingAdjoint(), StepAdjoint()]
each_route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: type(route).__name__)


@pytest.fixture(autouse=True)
def wherever_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record small states, and flows of which no product is saved."""
    monkeypatch.setattr(steps, "_LARGE_STATE", DIM)
    monkeypatch.setattr(staged, "_LARGEST_SHARE", 9.0)


@pytest.fixture
def eagerly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Found]:
    """The gradient with no recording at all."""

    def run(make: Callable[[], Case], route: GradientRoute, **options: Any) -> Found:
        with monkeypatch.context() as patch:
            patch.setattr(staged, "_MANY_STEPS", 10**9)
            return found(make, route, **options)

    return run


@each_route
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_agrees(
    name: str, route: GradientRoute, eagerly: Callable[..., Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every step is compared with autograd, to rounding: where one is not, all is done by autograd.
    monkeypatch.setattr(staged, "_ONE_IN", 1)
    one, other = found(RECORDED[name], route), eagerly(RECORDED[name], route)
    assert one.recorded_beside(other)
    # Of the backward solve, roundings change the steps, and these the gradient by its error.
    share = 1e-8 if isinstance(route, InterpolatingAdjoint) else 1e-11
    for a, b in zip(one.gradients, other.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=share * float(b.abs().max()))


@pytest.mark.parametrize(("name", "pays"), [("rotated", True), ("network", False)])
def test_recorded_where_it_pays(
    name: str, pays: bool, eagerly: Callable[..., Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged, "_LARGEST_SHARE", SHARE)
    one, other = (run(RECORDED[name], InterpolatingAdjoint()) for run in (found, eagerly))
    assert one.recorded_beside(other) is pays


@each_route
def test_recorded_gradient_of_a_closed_form(route: GradientRoute) -> None:
    # |x|^2 = |x0|^2 exp(-2 a T), so dT/da = -T/a.
    rate = leaf(torch.tensor(0.7, dtype=torch.float64))
    one = found(lambda: Case(lambda t, x: -rate * x, [rate], rtol=1e-10), route)
    time = float(torch.log((START @ START) / 1e-3)) / (2 * 0.7)
    assert one.products > 3 * one.evaluations
    assert float(one.gradients[0]) == pytest.approx(-time / 0.7, rel=1e-8)
    torch.testing.assert_close(one.gradients[1], START / (START @ START) / 0.7, rtol=1e-8, atol=0)


@each_route
def test_single_precision(route: GradientRoute, eagerly: Callable[..., Found]) -> None:
    matrix = MATRIX.float()

    def make() -> Case:
        theta = leaf(torch.ones(DIM))
        return Case(lambda t, x: -theta * (matrix @ x), [theta], START.float(), rtol=3e-6)

    one, other = found(make, route), eagerly(make, route)
    for a, b in zip(one.gradients, other.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


class Signed(torch.autograd.Function):
    """x, with a derivative of its own before t = 1, chosen in Python in the backward pass."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (t,) = ctx.saved_tensors
        return None, gradients[0] * (1.0 if t.numpy() > 0.05 else 1.01)


class Counting(nn.Module):
    """A flow that counts its evaluations in a buffer."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(SPECTRUM.clone())
        self.register_buffer("count", torch.zeros(()))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.count += 1
        return -self.rate * x


def with_theta(flow: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Case]:
    def make() -> Case:
        theta = leaf(SPECTRUM)
        return Case(lambda t, x: flow(theta, t, x), [theta])

    return make


def counting() -> Case:
    flow = Counting()
    return Case(flow, [flow.rate])


def written(theta: Tensor, t: Tensor, x: Tensor) -> Tensor:
    velocity = torch.empty_like(x)
    velocity[: DIM // 2] = -(theta * x)[: DIM // 2]
    velocity[DIM // 2 :] = -(theta * x)[DIM // 2 :]
    return velocity


NOT_RECORDED = {
    "if t": with_theta(lambda p, t, x: -p * x if t < 0.3 else -p * x - 0.0 * x),
    "float(t)": with_theta(lambda p, t, x: -p * x * (1.0 + 0.0 * float(t.detach()))),
    "numpy": with_theta(lambda p, t, x: -p * x if t.detach().numpy() < 0.3 else -(x * p)),
    "if x": with_theta(lambda p, t, x: -p * x if x.norm() > 1.0 else -(x * p)),
    "tolist": with_theta(lambda p, t, x: -p * x if x.tolist()[0] > 0.1 else -(x * p)),
    "print": with_theta(lambda p, t, x: -p * x if "0." in str(t) else -(x * p)),
    "mask": with_theta(lambda p, t, x: -p * x - 0.0 * x[x > 0].sum()),
    "in place": with_theta(written),
    "Python backward": with_theta(lambda p, t, x: -p * Signed.apply(t, x)),
    "counter": counting,
}


@each_route
@pytest.mark.parametrize("name", NOT_RECORDED)
def test_what_cannot_be_recorded_goes_to_autograd(
    name: str, route: GradientRoute, eagerly: Callable[..., Found]
) -> None:
    one, other = found(NOT_RECORDED[name], route), eagerly(NOT_RECORDED[name], route)
    assert one.products == other.products
    # One evaluation is the attempt; a route may hand over to the other one.
    assert one.evaluations <= other.evaluations + 2
    for a, b in zip(one.gradients, other.gradients, strict=True):
        assert torch.equal(a, b)


def test_flow_that_cannot_be_recorded_is_not_left_half_way() -> None:
    entered: list[int] = [0, 0]

    def flow(p: Tensor, t: Tensor, x: Tensor) -> Tensor:
        entered[0] += 1
        velocity = -p * x * (1.0 + 0.0 * float(t.detach()))
        entered[1] += 1
        return velocity

    found(with_theta(flow), InterpolatingAdjoint())
    assert entered[0] == entered[1] > 100


def test_flow_that_changed_since_the_forward_run_goes_to_autograd(
    eagerly: Callable[..., Found],
) -> None:
    gain = [1.0]

    def flow(p: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return -gain[0] * p * x

    def results(run: Callable[..., Found]) -> Found:
        gain[0] = 1.0
        return run(
            with_theta(flow), InterpolatingAdjoint(), between=lambda: gain.__setitem__(0, 1.001)
        )

    one, other = results(found), results(eagerly)
    assert one.products == other.products
    for a, b in zip(one.gradients, other.gradients, strict=True):
        assert torch.equal(a, b)


def test_global_that_the_flow_reads_is_read_as_it_is(
    eagerly: Callable[..., Found],
) -> None:
    for value in (1.0, 0.5):

        def flow(p: Tensor, t: Tensor, x: Tensor, value: float = value) -> Tensor:
            return -value * p * x

        one, other = (run(with_theta(flow), InterpolatingAdjoint()) for run in (found, eagerly))
        assert one.recorded_beside(other)
        torch.testing.assert_close(one.gradients, other.gradients, rtol=1e-12, atol=1e-14)


@each_route
@pytest.mark.parametrize("part", ["_of_state", "_of_rest"])
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 99.0), (0.0, 1e-12), (10.0, 20.0), (35.0, 99.0)], ids=str
)
def test_planted_disagreement_goes_to_autograd(
    route: GradientRoute,
    part: str,
    low: float,
    high: float,
    eagerly: Callable[..., Found],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products that are wrong on a stretch of t, F being right: a detach on one branch."""
    planted = 0

    class Wrong(Recording):
        def run(self, *inputs: Tensor) -> list[Tensor]:
            nonlocal planted
            bad = (inputs[0] >= low) & (inputs[0] <= high)
            planted += int(bad.any())
            factor = 1 + 1e-9 * bad.to(inputs[0])
            return [
                (one.T * factor).T if one.dim() == 2 else one * factor.max()
                for one in super().run(*inputs)
            ]

    class Planted(staged.Products):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            right = getattr(self, part)
            setattr(self, part, Wrong(right.operations, right.outputs, right.size))

    monkeypatch.setattr("ode_stopping.gradients.interpolating.Products", Planted)
    monkeypatch.setattr("ode_stopping.gradients.steps.Products", Planted)
    one, other = found(rotated, route), eagerly(rotated, route)
    assert planted > 0
    for a, b in zip(one.gradients, other.gradients, strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_are_refused_as_ever() -> None:
    case = rotated()
    result = stopping_time(
        case.flow, START, case.criterion, case.target, gradient=InterpolatingAdjoint()
    )
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(
            torch.autograd.grad(result.time, case.leaves, create_graph=True)[0].sum(), case.leaves
        )
