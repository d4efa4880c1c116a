"""Every tensor that requires grad gets its gradient, or is named in an error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientFlow,
    GradientNorm,
    GradientRoute,
    InterpolatingAdjoint,
    LossValue,
    MissingGradientError,
    NotReproducibleError,
    StepAdjoint,
    UntrackedTensorError,
    stopping_time,
)

ROUTES = (
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
)
by_route = pytest.mark.parametrize("route", ROUTES, ids=lambda route: type(route).__name__)
X0 = torch.tensor([2.0], dtype=torch.float64)
EPS = 0.02
SPAN = math.log(4 / (2 * EPS)) / 2  # T = SPAN/theta on x' = -theta x


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def half_square(t: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


def close(gradient: Tensor | None, truth: float) -> bool:
    assert gradient is not None
    return abs(gradient.item() - truth) < 1e-5 * abs(truth)


@by_route
def test_closures_over_leaf_tensors(route: GradientRoute) -> None:
    theta, a = leaf(1.3), leaf(0.7)
    stopping_time(
        lambda t, x: -theta * x, X0, lambda t, x: a * half_square(t, x), EPS, gradient=route
    ).time.backward()
    assert close(theta.grad, -(SPAN + math.log(0.7) / 2) / 1.3**2)
    assert close(a.grad, 1 / (2 * 1.3 * 0.7))


@by_route
def test_registered_parameters(route: GradientRoute) -> None:
    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
            self.unused = nn.Parameter(torch.tensor(5.0, dtype=torch.float64))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return -self.theta * x

    flow = Decay()
    stopping_time(flow, X0, half_square, EPS, gradient=route).time.backward()
    assert close(flow.theta.grad, -SPAN / 1.3**2)
    assert flow.unused.grad is None or flow.unused.grad.item() == 0.0


@by_route
def test_hyper_network_through_its_history(route: GradientRoute) -> None:
    z = leaf(0.4)
    theta = torch.exp(z)
    time = stopping_time(lambda t, x: -theta * x, X0, half_square, EPS, gradient=route).time
    time.backward()
    assert close(z.grad, -SPAN / math.exp(0.4))


@by_route
def test_hyper_network_named_in_params(route: GradientRoute) -> None:
    z = leaf(0.4)
    theta = torch.exp(z)
    time = stopping_time(
        lambda t, x: -theta * x, X0, half_square, EPS, gradient=route, params=[theta]
    ).time
    (to_theta,) = torch.autograd.grad(time, theta, retain_graph=True)
    assert close(to_theta, -SPAN / math.exp(0.8))
    time.backward()
    assert close(z.grad, -SPAN / math.exp(0.4))


@by_route
@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
def test_parameter_of_a_late_branch(route: GradientRoute) -> None:
    """x' = -th1 x before t = 1 and -th2 x after: th1 + th2 (T - 1) = SPAN."""
    first, second = leaf(1.0), leaf(0.5)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -(first if t.item() < 1.0 else second) * x

    stopping_time(flow, X0, half_square, EPS, gradient=route).time.backward()
    assert first.grad is not None
    assert second.grad is not None
    # A flow that jumps is not what the solvers are made for: three digits.
    assert first.grad.item() == pytest.approx(-1 / 0.5, rel=1e-3)
    assert second.grad.item() == pytest.approx(-(SPAN - 1) / 0.5**2, rel=1e-3)


def test_parameter_of_a_branch_that_no_trace_has_met() -> None:
    """Used in a sliver of time only: found by nobody on the way forward, named on the way back."""
    theta, hidden = leaf(1.0), leaf(0.0)
    backward = False

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -(theta + hidden if backward else theta) * x

    time = stopping_time(flow, X0, half_square, EPS).time
    backward = True
    with pytest.raises(UntrackedTensorError, match="params="):
        time.backward()


def without_create_graph(x: Tensor, theta: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((y**4 / 4 + y**2 / 2).sum(), y)
    return theta * gradient


def test_flow_without_create_graph_is_noticed() -> None:
    theta = leaf(1.0)
    with pytest.raises(MissingGradientError, match="create_graph=True"):
        stopping_time(lambda t, x: -without_create_graph(x, theta), X0, half_square, EPS)


def test_a_parameter_that_is_lost_with_the_whole_graph_is_noticed() -> None:
    # theta stands inside the differentiated loss only, so no evaluation ever shows it.
    theta = leaf(1.0)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x if x.requires_grad else x.detach().requires_grad_(True)
            return -torch.autograd.grad((theta * y.square()).sum(), y)[0]

    with pytest.raises(MissingGradientError, match="create_graph=True"):
        stopping_time(flow, X0, half_square, EPS)
    # A flow that is constant by right has no graph either.
    result = stopping_time(lambda t, x: -torch.ones_like(x), X0, half_square, EPS)
    assert result.time.item() == pytest.approx(2 - math.sqrt(2 * EPS), rel=1e-9)


def test_partly_missing_derivative_is_noticed() -> None:
    theta = leaf(1.0)
    with pytest.raises(MissingGradientError, match="the state in the flow"):
        stopping_time(
            lambda t, x: -0.1 * without_create_graph(x, theta) - theta * x, X0, half_square, EPS
        )


def test_missing_derivative_to_a_parameter_is_noticed() -> None:
    theta = leaf(1.0)
    module = nn.Module()
    module.theta = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = module.theta

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return -theta * self.theta.item() * x

    with pytest.raises(MissingGradientError, match="parameters of the flow"):
        stopping_time(Flow(), X0, half_square, EPS)


def test_criterion_without_create_graph_is_noticed() -> None:
    theta = leaf(1.0)

    def criterion(t: Tensor, x: Tensor) -> Tensor:
        return without_create_graph(x, theta).square().sum()

    with pytest.raises(MissingGradientError, match="criterion"):
        stopping_time(lambda t, x: -theta * x, X0, criterion, EPS)


def test_a_random_flow_is_noticed() -> None:
    theta = leaf(1.0)
    with pytest.raises(NotReproducibleError, match="flow"):
        stopping_time(lambda t, x: -theta * x * (1 + 1e-3 * torch.rand(())), X0, half_square, EPS)


def test_change_in_place_between_forward_and_backward_raises() -> None:
    theta = leaf(1.3)
    time = stopping_time(lambda t, x: -theta * x, X0, half_square, EPS).time
    with torch.no_grad():
        theta.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        time.backward()


@by_route
def test_frozen_parameters(route: GradientRoute) -> None:
    frozen = torch.tensor(1.3, dtype=torch.float64)
    x0 = X0.clone().requires_grad_()
    time = stopping_time(lambda t, x: -frozen * x, x0, half_square, EPS, gradient=route).time
    time.backward()
    assert close(x0.grad, 1 / (1.3 * 2.0))
    assert frozen.grad is None


def test_nothing_requires_grad() -> None:
    result = stopping_time(lambda t, x: -x, X0, half_square, EPS)
    assert result.time.item() == pytest.approx(SPAN, rel=1e-6)
    assert result.stats.checks < 40


@by_route
def test_objective_only(route: GradientRoute) -> None:
    """f and nothing else: T = ln(a x0^2/(2 eps))/(2 a)."""
    a = leaf(1.3)

    def objective(x: Tensor) -> Tensor:
        return 0.5 * a * x.square().sum()

    stopping_time(
        GradientFlow(objective), X0, LossValue(objective), EPS, gradient=route
    ).time.backward()
    span = math.log(1.3 * 4 / (2 * EPS)) / (2 * 1.3)
    assert close(a.grad, 1 / (2 * 1.3**2) - span / 1.3)


def test_any_autograd_mode() -> None:
    def objective(x: Tensor) -> Tensor:
        return 0.5 * x.square().sum() + 0.25 * x.pow(4).sum()

    arguments = (GradientFlow(objective), X0, GradientNorm(objective), EPS)
    plain = stopping_time(*arguments).time.item()
    with torch.no_grad():
        assert stopping_time(*arguments).time.item() == plain
    with torch.inference_mode():
        assert stopping_time(*arguments, gradient=None).time.item() == plain


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1e3, 1e8])
def test_no_false_alarm_at_unusual_scales(scale: float, dtype: torch.dtype) -> None:
    theta = torch.tensor(1.3, dtype=dtype, requires_grad=True)
    x0 = scale * torch.tensor([1.0, -2.0, 0.0], dtype=dtype)
    target = 1e-2 * scale**2
    time = stopping_time(lambda t, x: -theta * x, x0, half_square, target).time
    time.backward()
    span = math.log(2.5 / 1e-2) / 2
    assert theta.grad is not None
    assert theta.grad.item() == pytest.approx(-span / 1.3**2, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_false_alarm_on_a_network_with_kinks(dtype: torch.dtype) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
        x0 = torch.randn(4, dtype=dtype, requires_grad=True)
        target = 0.3 * half_square(torch.zeros(()), x0.detach()).item()

        def flow(t: Tensor, x: Tensor, net: nn.Module = net) -> Tensor:
            return -x + 0.1 * net(x)

        stopping_time(
            flow,
            x0,
            half_square,
            target,
            params=list(net.parameters()),
            evidence="light",  # at kinks steps are of second order, as "standard" says
        ).time.backward()
        assert all(p.grad is not None for p in net.parameters())


def test_a_result_with_a_graph_can_be_drawn() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    theta = leaf(1.3)
    result = stopping_time(lambda t, x: -theta * x, X0, half_square, EPS)
    axes = pyplot.figure().add_subplot()
    labels = [text.get_text() for text in result.plot(axes).get_legend().get_texts()]
    pyplot.close(axes.figure)
    assert labels[-1] == f"T = {SPAN / 1.3:.5g}"
