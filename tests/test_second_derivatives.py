"""Second derivatives: right through `DirectAdjoint`, an error on every other road, never a zero.

More of `DirectAdjoint` on forms 1 and 4 stands in test_routes_agree.py.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from iterations import number
from torch import Tensor
from torch.autograd import functional, gradgradcheck
from variants import slow_after

from discrete import DiscreteAdjoint, Heun, IndexRoute, Truncated, Unrolled, stopping_index
from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    Torchdiffeq,
    stopping_time,
)

TIGHT = Torchdiffeq(rtol=1e-10)
Leaves = tuple[Tensor, ...]
FIRST_ONLY = (InterpolatingAdjoint(), BacksolveAdjoint(), ForwardSensitivity())
INDEX_ROUTES = (DiscreteAdjoint(), Unrolled(), Truncated(steps=1000))
INTERPOLATIONS = (None, "log", "hermite", "partial_step")


def half_square(t: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


# Each case: leaves (theta, x0, eps, t0), the flow, the criterion, and T in closed form.


def exponential() -> Leaves:
    return number([1.3]), number([2.0]), number(0.05), number(0.3)


def exponential_flow(theta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: -theta * x


def exponential_time(theta: Tensor, x0: Tensor, eps: Tensor, t0: Tensor) -> Tensor:
    return t0 + (torch.log(x0**2 / (2 * eps)) / (2 * theta)).sum()


def cubic() -> Leaves:
    return number([0.8]), number([1.5]), number(0.2), number(0.3)


def cubic_flow(theta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: -theta * x**3


def cubic_time(theta: Tensor, x0: Tensor, eps: Tensor, t0: Tensor) -> Tensor:
    return t0 + ((1 / (2 * eps) - x0**-2) / (2 * theta)).sum()


def schedule() -> Leaves:
    """Form 3, with theta = (rate, decay): T depends on t0 in earnest."""
    return number([1.2, 0.3]), number([1.5]), number(0.3), number(0.4)


def schedule_flow(theta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: -theta[0] * torch.exp(-theta[1] * t) * x


def schedule_time(theta: Tensor, x0: Tensor, eps: Tensor, t0: Tensor) -> Tensor:
    rate, decay = theta
    s = torch.log(x0[0] ** 2 / (2 * eps)) / 2
    return -torch.log(torch.exp(-decay * t0) - decay * s / rate) / decay


def quadratic() -> Leaves:
    return number([0.9, 2.5]), number([1.0, -0.8]), number(0.2), number(0.3)


def quadratic_time(theta: Tensor, x0: Tensor, eps: Tensor, t0: Tensor) -> Tensor:
    """Newton on the exact solution; two steps with a graph after convergence are right to O(3)."""

    def excess(span: Tensor) -> Tensor:
        return 0.5 * (x0 * torch.exp(-theta * span)).square().sum() - eps

    def slope(span: Tensor) -> Tensor:
        return -(theta * (x0 * torch.exp(-theta * span)).square()).sum()

    span = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for _ in range(50):
            span = span - excess(span) / slope(span)
    for _ in range(2):
        span = span - excess(span) / slope(span)
    return t0 + span


CASES: dict[str, tuple[Any, Any, Any]] = {
    "form 1": (exponential, exponential_flow, exponential_time),
    "form 3": (schedule, schedule_flow, schedule_time),
    "form 4": (cubic, cubic_flow, cubic_time),
    "quadratic": (quadratic, exponential_flow, quadratic_time),
}


def solved(
    flow: Any,
    leaves: Leaves,
    route: GradientRoute,
    of: str = "time",
    solver: Torchdiffeq | None = None,
) -> Tensor:
    theta, x0, eps, t0 = leaves
    solver = TIGHT if solver is None and isinstance(route, DirectAdjoint) else solver
    result = stopping_time(
        flow(theta), x0, half_square, eps, t0=t0, gradient=route, solver=solver, max_time=50.0
    )
    value: Tensor = getattr(result, of)
    return value if value.ndim == 0 else value[0]


def hessian(value: Tensor, leaves: Leaves) -> Tensor:
    """All second derivatives, mixed ones included, as one matrix."""
    first = torch.autograd.grad(value, leaves, create_graph=True)
    rows = []
    for entry in torch.cat([g.reshape(-1) for g in first]):
        row = torch.autograd.grad(
            entry, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.reshape(-1) for g in row]))
    return torch.stack(rows)


class TestDirectAdjoint:
    @pytest.mark.parametrize("name", CASES)
    def test_the_whole_hessian(self, name: str) -> None:
        leaves, flow, closed = CASES[name]
        point = leaves()
        truth = hessian(closed(*point), point)
        found = hessian(solved(flow, point, DirectAdjoint()), point)
        assert float((found - truth).abs().max()) < 1e-7 * float(truth.abs().max())
        assert float((found - found.T).abs().max()) < 1e-7 * float(truth.abs().max())

    @pytest.mark.parametrize("name", ["form 1", "quadratic"])
    def test_the_hessian_of_the_state(self, name: str) -> None:
        leaves, flow, closed = CASES[name]
        point = leaves()
        theta, x0, _, t0 = point
        span = closed(*point) - t0
        truth = hessian((x0 * torch.exp(-theta * span))[0], point)
        found = hessian(solved(flow, point, DirectAdjoint(), "state"), point)
        scale = max(float(truth.abs().max()), 1.0)
        assert float((found - truth).abs().max()) < 1e-7 * scale

    @pytest.mark.parametrize("name", slow_after(1, ["quadratic", "form 1", "form 4"]))
    def test_gradgradcheck(self, name: str) -> None:
        leaves, flow, _ = CASES[name]

        def time(*point: Tensor) -> Tensor:
            return solved(flow, point, DirectAdjoint(), solver=Torchdiffeq())

        assert gradgradcheck(time, leaves(), eps=1e-4, atol=1e-4, rtol=1e-5, fast_mode=True)

    def test_functional_hessian_of_a_closure(self) -> None:
        leaves, flow, closed = CASES["form 4"]
        _, *rest = (leaf.detach() for leaf in leaves())
        theta = leaves()[0].detach()
        found = functional.hessian(lambda th: solved(flow, (th, *rest), DirectAdjoint()), theta)
        truth = functional.hessian(lambda th: closed(th, *rest), theta)
        torch.testing.assert_close(found, truth, rtol=1e-7, atol=0.0)

    def test_a_penalty_on_the_gradient(self) -> None:
        """d/dtheta (T + (dT/dtheta)^2) for form 1."""
        point = exponential()
        time = solved(exponential_flow, point, DirectAdjoint())
        (slope,) = torch.autograd.grad(time, point[0], create_graph=True)
        (found,) = torch.autograd.grad(time + slope.square().sum(), point[0])
        span, theta = (time - point[3]).detach(), point[0].detach()
        truth = -span / theta + 2 * (-span / theta) * (2 * span / theta**2)
        torch.testing.assert_close(found, truth, rtol=1e-8, atol=0.0)


Function = Callable[..., Tensor]


def continuous(route: GradientRoute, of: str) -> tuple[Function, Leaves]:
    def function(*leaves: Tensor) -> Tensor:
        return solved(exponential_flow, leaves, route, of)

    return function, quadratic()


def iterated(route: IndexRoute, interpolation: Any, of: str) -> tuple[Function, Leaves]:
    def function(theta: Tensor, x0: Tensor, eps: Tensor, t0: Tensor, h: Tensor) -> Tensor:
        rule = Heun(exponential_flow(theta), step=h)
        result = stopping_index(
            rule, x0, half_square, eps, t0=t0, gradient=route, interpolation=interpolation
        )
        value: Tensor = getattr(result, of)
        return value if value.ndim == 0 else value[0]

    return function, (*quadratic(), number(0.1))


ROADS = [
    *(
        pytest.param(
            continuous(route, of),
            id=f"{type(route).__name__}-{of}",
            marks=pytest.mark.slow if isinstance(route, ForwardSensitivity) else (),
        )
        for route, of in product(FIRST_ONLY, ("time", "state"))
    ),
    *(
        pytest.param(
            iterated(route, way, of),
            id=f"{type(route).__name__}-{way}-{of}",
            # What raises is one place for all interpolations.
            marks=pytest.mark.slow if route is not INDEX_ROUTES[0] and way is not None else (),
        )
        for route, way, of in product(INDEX_ROUTES, INTERPOLATIONS, ("steps", "time", "state"))
        # One interpolation will do where it is not in the graph.
        if of != "state" or way is None
    ),
]
ONCE = "differentiated again"


@pytest.mark.parametrize("road", ROADS)
class TestOtherRoutesRaise:
    def test_differentiating_twice(self, road: tuple[Function, Leaves]) -> None:
        function, leaves = road
        value = function(*leaves)
        plain = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True)
        first = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
        for gradient, once in zip(first, plain, strict=True):
            if gradient is None:
                continue
            torch.testing.assert_close(gradient.detach(), once)
            assert gradient.requires_grad
            for leaf in leaves:
                with pytest.raises(RuntimeError, match=ONCE):
                    torch.autograd.grad(gradient.sum(), leaf, retain_graph=True, allow_unused=True)

    def test_penalty(self, road: tuple[Function, Leaves]) -> None:
        function, leaves = road
        value = function(*leaves)
        (first,) = torch.autograd.grad(value, leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match=ONCE):
            (value + first.square().sum()).backward()

    def test_gradgradcheck(self, road: tuple[Function, Leaves]) -> None:
        function, leaves = road
        # On the leaves that the value has a gradient to.
        value = function(*leaves)
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        moving = [grad is not None for grad in grads]

        def of_moving(*some: Tensor) -> Tensor:
            given = iter(some)
            pairs = zip(leaves, moving, strict=True)
            return function(*(next(given) if moves else p.detach() for p, moves in pairs))

        with pytest.raises(RuntimeError, match=ONCE):
            gradgradcheck(
                of_moving,
                [p for p, m in zip(leaves, moving, strict=True) if m],
                fast_mode=True,
            )

    @pytest.mark.parametrize("position", range(5))
    def test_functional_hessian(self, road: tuple[Function, Leaves], position: int) -> None:
        """Also to a tensor that is used in a closure only: there it was zero, silently."""
        function, leaves = road
        if position >= len(leaves):
            return

        def of_one(leaf: Tensor) -> Tensor:
            others = [p.detach() for p in leaves]
            return function(*others[:position], leaf, *others[position + 1 :])

        with pytest.raises(RuntimeError, match=f"{ONCE}|params="):
            functional.hessian(of_one, leaves[position].detach())


def test_functional_jacobian_with_a_graph_names_params() -> None:
    """First derivatives of a closure over a view: right if it is named, refused if it is not."""
    theta, *rest = (leaf.detach() for leaf in quadratic())
    theta.requires_grad_()

    def time(th: Tensor, params: Any = None) -> Tensor:
        return stopping_time(
            exponential_flow(th), rest[0], half_square, rest[1], params=params
        ).time

    def steps(th: Tensor, params: Any = None) -> Tensor:
        rule = Heun(exponential_flow(th), step=0.1)
        return stopping_index(rule, rest[0], half_square, rest[1], params=params).steps

    for function in (time, steps):
        truth = functional.jacobian(function, theta)
        assert float(truth.abs().min()) > 0
        with pytest.raises(RuntimeError, match="params="):
            functional.jacobian(function, theta, create_graph=True)
        named = functional.jacobian(lambda th, f=function: f(th, [th]), theta, create_graph=True)
        torch.testing.assert_close(named.detach(), truth)


@pytest.mark.parametrize("side", ["continuous", "discrete"])
def test_batches_of_cotangents_are_refused_by_name(side: str) -> None:
    theta = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def criterion(t: Tensor, x: Tensor) -> Tensor:
        return x.square().sum()

    if side == "continuous":
        value = stopping_time(lambda t, x: -theta * x, start, criterion, 0.1).time
    else:
        value = stopping_index(lambda k, x: x - 0.1 * theta * x, start, criterion, 0.1).steps
    rows = torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="once a row"):
        torch.autograd.grad(value, theta, rows, is_grads_batched=True)
