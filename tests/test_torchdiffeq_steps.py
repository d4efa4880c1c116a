"""Every step of `Torchdiffeq(method)` against torchdiffeq's own, and its replay against autograd.

The lean loop writes the sums of a step in another order, so the two agree to rounding. torchdiffeq
is right but for one thing: where the last stage is not y1 its f1 is the velocity of that stage.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq._impl.interp import _interp_evaluate, _interp_fit
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import _ButcherTableau, _runge_kutta_step

from ode_stopping import RungeKutta, Step, Torchdiffeq
from ode_stopping.solving.torchdiffeq import adaptive_methods

F64 = torch.float64
EPS = torch.finfo(F64).eps
SIZES = (1e-6, 1e-3, 0.02, 0.1, 0.3, 0.7)
every_method = pytest.mark.parametrize("name", adaptive_methods())
every_dimension = pytest.mark.parametrize("dim", [1, 3, 50])


class Flow:
    """y' = tanh(A y) cos(t) - y^3/3 + t y/5, with A a leaf."""

    def __init__(self, dim: int) -> None:
        generator = torch.Generator().manual_seed(dim)
        noise = torch.randn(dim, dim, generator=generator, dtype=F64)
        self.matrix = (noise / dim**0.5).requires_grad_(True)
        self.y0 = torch.randn(dim, generator=generator, dtype=F64)

    def __call__(self, t: Any, y: Tensor, perturb: Any = None) -> Tensor:
        """As both sides call it: t a float or a tensor."""
        time = torch.as_tensor(t, dtype=F64)
        return torch.tanh(self.matrix @ y) * torch.cos(time) - y**3 / 3 + 0.2 * time * y


def method_of(name: str) -> RungeKutta:
    method = Torchdiffeq(method=name).method(F64)
    assert isinstance(method, RungeKutta)
    return method


def theirs(
    name: str, flow: Flow, t0: float, h: float, *, y0: Tensor | None = None, tableau: Any = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """torchdiffeq's own step: y1, f1, error, k; in double precision throughout."""
    times = [torch.tensor(t, dtype=F64) for t in (t0, h, t0 + h)]
    own: Any = SOLVERS[name]
    tableau = own.tableau if tableau is None else tableau
    tableau = _ButcherTableau(
        tableau.alpha.to(F64),
        [row.to(F64) for row in tableau.beta],
        tableau.c_sol.to(F64),
        tableau.c_error.to(F64),
    )
    y0 = flow.y0 if y0 is None else y0
    return _runge_kutta_step(flow, y0, flow(t0, y0), *times, tableau)


def ours(method: RungeKutta, flow: Flow, t0: float, h: float) -> Step:
    with torch.no_grad():
        return method.trial(flow, t0, flow.y0, flow(t0, flow.y0), t0 + h)


def largest(*tensors: Tensor) -> float:
    return max(float(tensor.detach().abs().max()) for tensor in tensors)


def gap(first: Tensor, second: Tensor) -> float:
    return largest(first - second)


@every_dimension
@every_method
def test_every_step_is_theirs(name: str, dim: int) -> None:
    method, flow = method_of(name), Flow(dim)
    for t0, h in product((0.0, -0.7, 1.3), SIZES):
        step = ours(method, flow, t0, h)
        h = (t0 + h) - t0  # the size of the step between the two times as they are
        y1, f1, error, k = theirs(name, flow, t0, h)
        moved = largest(y1) + h * largest(k)
        assert gap(step.y1, y1) <= 1e-14 * moved, (t0, h)
        # The error is a difference of velocities: its rounding is that of h |e| |k|.
        cancelled = h * sum(map(abs, method.error)) * largest(k)
        assert gap(step.error, error) <= 1e-14 * cancelled, (t0, h)
        with torch.no_grad():
            velocity = flow(t0 + h, step.y1)
        assert gap(step.f1, velocity) <= 1e-14 * largest(k)
        if method.ends_on_last_stage:
            assert gap(step.f1, f1) <= 1e-14 * largest(k)


def test_whose_last_velocity_is_theirs() -> None:
    """Where the last stage is y1; the other methods take one evaluation more, and theirs is off."""
    ends = {name for name in adaptive_methods() if method_of(name).ends_on_last_stage}
    assert {"dopri5", "bosh3"} <= ends
    for name in set(adaptive_methods()) - ends:
        flow = Flow(3)
        step, (_, f1, _, _) = ours(method_of(name), flow, 0.0, 0.3), theirs(name, flow, 0.0, 0.3)
        assert gap(step.f1, f1) > 1e-8, name


@every_method
def test_a_planted_weight_is_seen(name: str) -> None:
    """A relative change of 1e-12 in the tableau is above the tolerance of the comparison."""
    own, flow = SOLVERS[name].tableau, Flow(3)
    planted = own._replace(
        c_sol=own.c_sol * (1 + 1e-12), beta=[*own.beta[:-1], own.beta[-1] * (1 + 1e-12)]
    )
    step = ours(method_of(name), flow, 0.0, 0.7)
    y1, _, _, k = theirs(name, flow, 0.0, 0.7, tableau=planted)
    assert gap(step.y1, y1) > 1e-14 * (largest(y1) + 0.7 * largest(k))


@every_method
def test_number_of_evaluations(name: str) -> None:
    """One for every stage after the first, and one for y1 where no stage is there."""
    calls: list[float] = []
    flow, method = Flow(3), method_of(name)

    def counted(t: Any, y: Tensor) -> Tensor:
        calls.append(float(t))
        return flow(t, y)

    with torch.no_grad():
        method.trial(counted, 0.0, flow.y0, flow(0.0, flow.y0), 0.1)
    assert len(calls) == len(method.nodes) + (not method.ends_on_last_stage)
    assert max(calls) == 0.1


@every_dimension
@every_method
def test_dense_output(name: str, dim: int) -> None:
    """torchdiffeq's quartic for methods of order 4 and more, else the cubic through the ends."""
    method, flow = method_of(name), Flow(dim)
    own: Any = SOLVERS[name]
    for h in (0.02, 0.3):
        step = ours(method, flow, 0.4, h)
        h = step.length
        y1, f1, _, k = theirs(name, flow, 0.4, h)
        middle = flow.y0 + torch.sum(k * (h * own.mid.to(F64)), dim=-1)
        quartic = _interp_fit(flow.y0, y1, middle, k[..., 0], f1, torch.tensor(h, dtype=F64))
        dense = method.dense(step)
        # The quartic's weights reach 32.
        allowed = 64 * 1e-14 * (largest(y1) + h * largest(k))
        for s in (0.0, 0.1, 0.36, 0.5, 0.71, 0.95, 1.0):
            t = step.t1 if s == 1.0 else step.t0 + s * h
            if method.order > 3:
                at = [torch.tensor(v, dtype=F64) for v in (step.t0, step.t1, t)]
                expected = _interp_evaluate(quartic, *at)
            else:
                expected = cubic(step, (t - step.t0) / h)
            assert gap(dense(t), expected) <= allowed, (h, s)
        assert method.dense_order == (4 if method.order > 3 else 3)


def cubic(step: Step, s: float) -> Tensor:
    """Hermite's basis."""
    h = step.length
    return (
        (1 + 2 * s) * (1 - s) ** 2 * step.y0
        + s * (1 - s) ** 2 * h * step.f0
        + s**2 * (3 - 2 * s) * step.y1
        + s**2 * (s - 1) * h * step.f1
    )


@every_dimension
@every_method
def test_replay_gives_the_end_again(name: str, dim: int) -> None:
    """To 100 eps (|y| + h max|k|)."""
    method, flow = method_of(name), Flow(dim)
    for t0, h in product((0.0, 1.3), SIZES):
        step = ours(method, flow, t0, h)
        allowed = 100 * EPS * (largest(step.y1) + step.length * largest(step.data))
        zero = torch.zeros((), dtype=F64, requires_grad=True)
        start = flow.y0.clone().requires_grad_(True)
        for shift in (0.0, zero):
            end = method.replay(flow, step, start, t0 + shift, step.length + shift)
            assert end.requires_grad
            assert gap(end, step.y1) <= allowed, (t0, h)


@every_dimension
@every_method
def test_the_derivative_of_a_replay_is_theirs(name: str, dim: int) -> None:
    """To y0, the parameters and t0, by autograd through torchdiffeq's step."""
    method, flow = method_of(name), Flow(dim)
    weights = torch.linspace(-1.0, 1.3, dim, dtype=F64)

    def gradients(end: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        y0 = flow.y0.clone().requires_grad_(True)
        t0 = torch.tensor(0.4, dtype=F64, requires_grad=True)
        return list(torch.autograd.grad(weights @ end(y0, t0), [y0, t0, flow.matrix]))

    own: Any = SOLVERS[name]
    tableau = _ButcherTableau(
        own.tableau.alpha.to(F64),
        [row.to(F64) for row in own.tableau.beta],
        own.tableau.c_sol.to(F64),
        own.tableau.c_error.to(F64),
    )
    for h in (1e-3, 0.1, 0.7):
        step = ours(method, flow, 0.4, h)
        length = torch.tensor(step.length, dtype=F64)

        def replayed(y0: Tensor, t0: Tensor, step: Step = step) -> Tensor:
            return method.replay(flow, step, y0, t0, step.length)

        def stepped(y0: Tensor, t0: Tensor, length: Tensor = length) -> Tensor:
            return _runge_kutta_step(flow, y0, flow(t0, y0), t0, length, t0 + length, tableau)[0]

        for one, other in zip(gradients(replayed), gradients(stepped), strict=True):
            assert gap(one, other) <= 1e-13 * max(largest(other), h), h


@every_method
def test_second_derivatives_of_a_replay(name: str) -> None:
    """Hessian-vector products to y0, against differences of the gradient that fall fourfold."""
    method, flow = method_of(name), Flow(3)
    step = ours(method, flow, 0.4, 0.5)
    weights = torch.tensor([1.0, -0.5, 0.7], dtype=F64)
    direction = torch.tensor([0.4, 1.0, -0.3], dtype=F64)

    def gradient(y0: Tensor, *, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        y0 = y0.detach().requires_grad_(True)
        end = weights @ method.replay(flow, step, y0, step.t0, step.length)
        (found,) = torch.autograd.grad(end, y0, create_graph=create_graph)
        return found, y0

    first, y0 = gradient(flow.y0, create_graph=True)
    (product,) = torch.autograd.grad(first @ direction, y0)
    gaps = []
    for d in (2e-2, 1e-2):
        ahead, behind = (gradient(flow.y0 + s * d * direction)[0] for s in (1, -1))
        gaps.append(gap((ahead - behind) / (2 * d), product))
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.1)
