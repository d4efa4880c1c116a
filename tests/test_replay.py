"""The adjoint replays steps: what it cannot replay or see is an error, never a wrong gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from iterations import number
from torch import Tensor, nn

from discrete import (
    DiscreteAdjoint,
    Euler,
    IndexRoute,
    StoppingIndexResult,
    Truncated,
    Unrolled,
    stopping_index,
)
from ode_stopping import MissingGradientError, NotReproducibleError, UntrackedTensorError

Update = Callable[[int, Tensor], Tensor]
ROUTES = [DiscreteAdjoint(), DiscreteAdjoint(memory=1, chunk=3), Unrolled(), Truncated(steps=1)]
every_route = pytest.mark.parametrize("route", ROUTES, ids=repr)
X0 = [1.0, -2.0]


def square(t: Tensor, x: Tensor) -> Tensor:
    return x.square().sum()


def run(update: Any, *, dtype: torch.dtype = torch.float64, **keywords: Any) -> StoppingIndexResult:
    return stopping_index(update, torch.tensor(X0, dtype=dtype), square, 0.5, **keywords)


def unrolled(update: Update, steps: int) -> Tensor:
    """Definition 3 by the plain loop."""
    x = before = number(X0, grad=False)
    for k in range(steps):
        before, x = x, update(k, x)
    excess = x.square().sum()
    return -excess / (excess - before.square().sum()).detach()


class TestStochastic:
    @staticmethod
    def noisy(theta: Tensor, *, size: float, seeded: bool) -> Update:
        generator = torch.Generator().manual_seed(1)

        def update(k: int, x: Tensor) -> Tensor:
            if seeded:
                generator.manual_seed(k)
            noise = torch.randn(2, generator=generator, dtype=x.dtype)
            return x - 0.05 * (theta * x + size * noise)

        return update

    @pytest.mark.parametrize("route", ROUTES[:3], ids=repr)
    def test_seeded_by_the_step_works(self, route: IndexRoute) -> None:
        theta = number(1.0)
        update = self.noisy(theta, size=0.3, seeded=True)
        result = run(update, gradient=route)
        (found,) = torch.autograd.grad(result.steps, theta)
        (truth,) = torch.autograd.grad(unrolled(update, result.index), theta)
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)

    @every_route
    @pytest.mark.parametrize("size", [0.3, 1e-8])
    def test_unseeded_raises(self, route: IndexRoute, size: float) -> None:
        update = self.noisy(number(1.0), size=size, seeded=False)
        with pytest.raises(NotReproducibleError, match="seed"):
            run(update, gradient=route).steps.backward()

    @every_route
    def test_unseeded_raises_in_float32(self, route: IndexRoute) -> None:
        theta = torch.tensor(1.0, requires_grad=True)
        update = self.noisy(theta, size=2e-3, seeded=False)
        with pytest.raises(NotReproducibleError, match="seed"):
            run(update, gradient=route, dtype=torch.float32).steps.backward()

    def test_without_a_gradient_anything_goes(self) -> None:
        update = self.noisy(number(1.0), size=0.3, seeded=False)
        assert run(update, gradient=None).index > 0


class TestHiddenState:
    @every_route
    def test_counter(self, route: IndexRoute) -> None:
        theta, calls = number(1.0), [0]

        def update(k: int, x: Tensor) -> Tensor:
            calls[0] += 1
            return x - theta * x / (10 + calls[0])

        with pytest.raises(NotReproducibleError, match="state"):
            run(update, gradient=route).steps.backward()

    @every_route
    def test_momentum_buffer(self, route: IndexRoute) -> None:
        theta, buffer = number(0.1), [torch.zeros(2, dtype=torch.float64)]

        def update(k: int, x: Tensor) -> Tensor:
            buffer[0] = (0.5 * buffer[0] + theta * x).detach()
            return x - 0.1 * buffer[0]

        with pytest.raises((NotReproducibleError, MissingGradientError)):
            run(update, gradient=route).steps.backward()

    def test_a_schedule_that_moves_between_forward_and_backward(self) -> None:
        theta, rate = number(1.0), [0.1]
        result = run(lambda k, x: x - rate[0] * theta * x)
        rate[0] = 0.2
        with pytest.raises(NotReproducibleError, match="backward"):
            result.steps.backward()


class TestInPlace:
    def assert_refused(self, update: Any, **keywords: Any) -> None:
        x0 = torch.tensor(X0, dtype=torch.float64)
        for gradient in (DiscreteAdjoint(), None):
            with pytest.raises(ValueError, match=r"in place.*new tensor"):
                stopping_index(update, x0, square, 0.5, gradient=gradient, **keywords)
            assert x0.tolist() == X0

    def test_plain(self) -> None:
        self.assert_refused(lambda k, x: x.mul_(0.9))

    def test_by_data_and_numpy(self) -> None:
        def by_data(k: int, x: Tensor) -> Tensor:
            x.data.mul_(0.9)
            return x

        def by_numpy(k: int, x: Tensor) -> Tensor:
            view = x.detach().numpy()
            view *= 0.9
            return x.clone()

        self.assert_refused(by_data)
        self.assert_refused(by_numpy)

    def test_by_an_update_that_differentiates(self) -> None:
        def update(k: int, x: Tensor) -> Tensor:
            x = x if x.requires_grad else x.requires_grad_(True)
            (gradient,) = torch.autograd.grad(x.square().sum(), x, create_graph=True)
            if k == 2:
                x.sub_(0.1 * gradient)
            return x - 0.1 * gradient

        self.assert_refused(update)

    def test_in_a_flow(self) -> None:
        def flow(t: Tensor, x: Tensor) -> Tensor:
            return x.neg_()

        self.assert_refused(Euler(flow, step=0.1))

    def test_a_buffer_that_is_written_again(self) -> None:
        buffer = torch.zeros(2, dtype=torch.float64)
        self.assert_refused(lambda k, x: torch.mul(x, 0.9, out=buffer))

    def test_one_piece_of_a_pair(self) -> None:
        def update(k: int, state: Any) -> Any:
            x, v = state
            return x + 0.1 * v, v.mul_(0.9)

        start = number(X0, grad=False), number(X0, grad=False)
        with pytest.raises(ValueError, match="in place"):
            stopping_index(update, start, lambda t, s: s[0].sum(), -10.0)


class TestParameters:
    def test_used_at_one_late_step_only(self) -> None:
        early, late = number(1.0), number(1.5)

        def update(k: int, x: Tensor) -> Tensor:
            return x - 0.01 * (late if k == 41 else early) * x

        result = run(update)
        assert result.index > 60
        try:
            found = torch.autograd.grad(result.steps, [early, late])
        except UntrackedTensorError as error:
            assert "params=" in str(error)  # noqa: PT017 - either outcome is right
        else:
            truth = torch.autograd.grad(unrolled(update, result.index), [early, late])
            torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)
        # Named, it works for certain.
        result = run(update, params=[late])
        found = torch.autograd.grad(result.steps, [early, late])
        truth = torch.autograd.grad(unrolled(update, result.index), [early, late])
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("route", ROUTES[:3], ids=repr)
    def test_used_at_the_last_step_or_the_first(self, route: IndexRoute) -> None:
        theta, first, last = number(1.0), number(1.5), number(1.2)

        def update(k: int, x: Tensor) -> Tensor:
            return x - 0.05 * {0: first, 21: last}.get(k, theta) * x

        result = run(update, gradient=route)
        assert result.index == 22
        found = torch.autograd.grad(result.steps, [theta, first, last])
        truth = torch.autograd.grad(unrolled(update, result.index), [theta, first, last])
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("route", ROUTES[:3], ids=repr)
    @pytest.mark.parametrize("named", [False, True])
    def test_outputs_of_a_hyper_network(self, route: IndexRoute, *, named: bool) -> None:
        raw = number([0.3, -0.2])
        rates = torch.nn.functional.softplus(raw)

        def update(k: int, x: Tensor) -> Tensor:
            return x - 0.05 * (rates if k % 7 else rates.flip(0)) * x

        result = run(update, gradient=route, params=[rates] if named else None)
        # Its history is alive afterwards, for a loss that uses it as well.
        (found,) = torch.autograd.grad(result.steps + rates.sum(), raw, retain_graph=True)
        truth = unrolled(update, result.index) + torch.nn.functional.softplus(raw).sum()
        (expected,) = torch.autograd.grad(truth, raw)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)

    def test_hyper_network_on_an_early_branch_only(self) -> None:
        raw, theta = number(0.3), number(1.0)
        rate = torch.exp(raw)

        def update(k: int, x: Tensor) -> Tensor:
            return x - 0.05 * (rate if k < 2 else theta) * x

        result = run(update, gradient=DiscreteAdjoint(chunk=1))
        found = torch.autograd.grad(result.steps, [raw, theta])
        truth = torch.autograd.grad(unrolled(update, result.index), [raw, theta])
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)

    def test_changed_in_place_before_the_backward_pass(self) -> None:
        theta = number(1.0)
        result = run(lambda k, x: x - 0.05 * theta * x)
        with torch.no_grad():
            theta.mul_(1.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.steps.backward()

    def test_a_constant_step_cuts_the_chain(self) -> None:
        before, after, x0 = number(1.0), number(0.5), number(X0)

        def update(k: int, x: Tensor) -> Tensor:
            return torch.full_like(x, 1.5) if k == 3 else x - 0.1 * (before, after)[k > 3] * x

        result = stopping_index(update, x0, square, 0.5)
        found = torch.autograd.grad(result.steps, [before, after, x0])
        assert float(found[0]) == 0.0
        assert not bool(found[2].any())
        (truth,) = torch.autograd.grad(unrolled(update, result.index), after)
        torch.testing.assert_close(found[1], truth, rtol=1e-12, atol=0)


class TestMissingCreateGraph:
    @staticmethod
    def descent(theta: Tensor, *, h: float, right: bool) -> Any:
        def slope(x: Tensor) -> Tensor:
            x = x if x.requires_grad else x.detach().requires_grad_(True)
            loss = 0.5 * (theta * x.square()).sum() + 0.25 * x.pow(4).sum()
            return torch.autograd.grad(loss, x, create_graph=right)[0]

        return slope, (lambda k, x: x - h * slope(x))

    @pytest.mark.parametrize("h", [0.1, 1e-3, 1e-4])
    def test_in_an_update(self, h: float) -> None:
        theta = number(1.0)
        _, update = self.descent(theta, h=h, right=False)
        x0 = number([1.0, -0.5])
        start = float(square(x0, x0.detach()))
        with pytest.raises(MissingGradientError, match="create_graph"):
            stopping_index(update, x0, square, start * max(1 - 20 * h, 0.5))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    @pytest.mark.parametrize("h", [0.1, 1e-3, 1e-5])
    def test_in_the_flow_of_a_rule(self, h: float, dtype: torch.dtype) -> None:
        theta = torch.tensor(1.0, dtype=dtype, requires_grad=True)
        slope, _ = self.descent(theta, h=h, right=False)
        x0 = torch.tensor([1.0, -0.5], dtype=dtype, requires_grad=True)
        target = 1.25 * (1 - 10 * h) if h < 0.1 else 0.5
        with pytest.raises(MissingGradientError, match="create_graph"):
            stopping_index(Euler(lambda t, x: -slope(x), step=h), x0, square, target)

    def test_right_ones_pass(self) -> None:
        for h in (0.1, 1e-3, 1e-4, 1e-6):
            theta = number(1.0)
            slope, update = self.descent(theta, h=h, right=True)
            target = 1.25 * (1 - 10 * h) if h < 0.1 else 0.5
            rule = Euler(lambda t, x, slope=slope: -slope(x), step=h)
            for function in (update, rule):
                result = stopping_index(function, number([1.0, -0.5]), square, target)
                (found,) = torch.autograd.grad(result.steps, theta)
                assert float(found) < 0


def test_modules_get_their_gradients() -> None:
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, k: int, x: Tensor) -> Tensor:
            return 0.9 * x + 0.01 * self.network(x)

    result = run(Learned())
    result.steps.backward()
    truth = torch.autograd.grad(
        unrolled(lambda k, x: 0.9 * x + 0.01 * network(x), result.index),
        list(network.parameters()),
    )
    for parameter, expected in zip(network.parameters(), truth, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-11, atol=1e-14)


def test_a_derivative_lost_in_the_first_step_only() -> None:
    """torch's SGD with differentiable=True copies its first momentum without its graph."""
    x0 = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)

    def update(k: int, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, buffer = state
        g = curvature * x
        following = 0.9 * buffer + g if k else g.detach().clone()
        return x - 0.05 * following, following

    start = (x0, torch.zeros(2, dtype=torch.float64))
    with pytest.raises(MissingGradientError, match="update"):
        stopping_index(update, start, lambda t, s: (curvature * s[0] ** 2).sum(), 1e-2)
