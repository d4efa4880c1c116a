"""Derivatives that get lost somewhere on the path: one difference of the result sees them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from ode_stopping import (
    GradientAccuracyWarning,
    GradientRoute,
    InterpolatingAdjoint,
    StepAdjoint,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.gradients.chain import Arriving, Chain, pulled_back
from ode_stopping.gradients.directional import contradictions
from ode_stopping.gradients.steps import Transpose
from theory_checks.closed_forms import CLOSED_FORMS

F64 = torch.float64
MATRIX = torch.tensor([[1.0, 0.3], [0.0, 2.0]], dtype=F64)


def leaf(value: Any, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


class Tripled(torch.autograd.Function):
    """The identity, with three times its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 3.0 * grads[0]


def early(t: Tensor) -> bool:
    return float(t.detach()) < 0.3


def at_the_edge(x: Tensor) -> bool:
    """A little of the path only: steps in the middle do not come there."""
    return 1.6 < float(x.detach()[0]) < 1.8


Lose = Callable[[Tensor], Tensor]
LOST: dict[str, Lose] = {
    "detached": lambda p: p.detach(),
    "numpy": lambda p: torch.as_tensor(p.detach().numpy().copy()),
    "tripled": Tripled.apply,
}


class Planted:
    """x' = -theta A x, J = phi |x|^2, where something is lost of `what` where `where` is true."""

    def __init__(self, what: str, lose: Lose, where: Callable[[Tensor, Tensor], bool]) -> None:
        self.theta, self.phi, self.x0 = leaf(0.7), leaf(1.3), leaf([2.0, 1.0])
        self.what, self.lose, self.where = what, lose, where

    def flow(self, t: Tensor, x: Tensor) -> Tensor:
        theta = self.theta
        if self.where(t, x):
            theta = self.lose(theta) if self.what == "theta" else theta
            x = self.lose(x) if self.what == "x" else x
        return -theta * (MATRIX @ x)

    def solve(self, route: GradientRoute, evidence: Any, target: Any = 1e-3) -> StoppingResult:
        return stopping_time(
            self.flow,
            self.x0,
            lambda t, x: self.phi * (x**2).sum(),
            target,
            gradient=route,
            evidence=evidence,
        )


PLACES = ("early", "a stretch of the path")


@pytest.mark.parametrize(
    ("place", "what", "lose", "evidence"),
    [
        *product(PLACES, ("theta", "x"), ("detached", "tripled"), ["standard"]),
        ("early", "theta", "numpy", "standard"),
        ("early", "theta", "detached", "thorough"),
        # What is lost is the same, by another call and at another cost.
        *(
            pytest.param(place, what, *how, marks=pytest.mark.slow)
            for how in (("numpy", "standard"), ("detached", "thorough"))
            for place, what in [*product(PLACES, ("theta", "x"))][1:]
        ),
    ],
)
def test_what_is_lost_on_a_branch_is_named(what: str, lose: str, place: str, evidence: str) -> None:
    where = (lambda t, x: early(t)) if place == "early" else (lambda t, x: at_the_edge(x))
    planted = Planted(what, LOST[lose], where)
    result = planted.solve(StepAdjoint(), evidence)
    with pytest.warns(GradientAccuracyWarning, match="lost or wrong somewhere on the path"):
        result.time.backward()
    assert result.evidence is not None
    lost = {entry.name for entry in result.evidence.leaves if entry.cause == "lost"}
    assert ("theta" if what == "theta" else "x0") in "".join(lost)
    assert "phi" not in "".join(lost)


@pytest.mark.parametrize("route", [StepAdjoint(), InterpolatingAdjoint()], ids=lambda r: str(r))
def test_on_every_route_and_several_targets(route: GradientRoute) -> None:
    planted = Planted("theta", LOST["detached"], lambda t, x: early(t))
    result = planted.solve(route, "standard", torch.tensor([1e-1, 1e-3], dtype=F64))
    with pytest.warns(GradientAccuracyWarning, match="theta a little changes"):
        result.time.sum().backward()


def test_the_criterion_on_a_branch() -> None:
    """Detached where x is, but not where the derivative is looked at before."""
    a, x0 = leaf(0.7), leaf([2.0, 1.0])

    def criterion(t: Tensor, x: Tensor) -> Tensor:
        return torch.where(x[0] < 1e9, (x**2).sum(), x.sum())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = stopping_time(lambda t, x: -a * x, x0, criterion, 1e-2, evidence="standard")
        result.time.backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, torch.log(torch.tensor(500.0, dtype=F64)) / (-2 * 0.49))


@pytest.mark.parametrize(
    ("rtol", "cotangent"), [(1e-2, "both"), (1e-3, "time"), (1e-3, "state"), (1e-6, "both")]
)
@pytest.mark.parametrize("case", range(len(CLOSED_FORMS)))
def test_right_gradients_are_not_contradicted(case: int, rtol: float, cotangent: str) -> None:
    """On the steps themselves there is no error of the solver: 1e-5 holds at any tolerance."""
    form = CLOSED_FORMS[case]
    leaves = form.leaves(1e-3, 0.25)
    result = stopping_time(
        form.flow(leaves),
        leaves["x0"],
        form.criterion(leaves),
        leaves["eps"],
        t0=leaves["t0"],
        solver=Torchdiffeq(rtol=rtol),
        evidence="light",
    )
    problem = result.problem
    assert problem is not None
    n = problem.x0.numel()
    times = torch.ones(1, dtype=F64) if cotangent != "state" else torch.zeros(1, dtype=F64)
    states = torch.linspace(1, 2, n, dtype=F64).reshape(1, n)
    states = states if cotangent != "time" else torch.zeros_like(states)
    chain = Chain.of(problem)
    given = Arriving(times, states, None, (True,) * (3 + len(problem.leaves.tensors)))
    with torch.no_grad():
        gradients = pulled_back(chain, Transpose(), given)
        assert max(contradictions(chain, gradients, given)) == 0.0


@pytest.mark.parametrize("part", [0, 3, 4])
@pytest.mark.parametrize("share", [1e-4, 1e-2, 1.0])
def test_each_part_that_is_off_is_found(part: int, share: float) -> None:
    """The figure alone: a right gradient, of which one part is changed."""
    planted = Planted("nothing", LOST["detached"], lambda t, x: False)
    problem = planted.solve(StepAdjoint(), "light").problem
    assert problem is not None
    chain = Chain.of(problem)
    given = Arriving(torch.ones(1, dtype=F64), torch.zeros((1, 2), dtype=F64), None, (True,) * 5)
    with torch.no_grad():
        gradients = pulled_back(chain, Transpose(), given)
        assert max(contradictions(chain, gradients, given)) == 0.0
        gradients.parts[part].mul_(1.0 - share)
        found = contradictions(chain, gradients, given)
    assert found[part] == pytest.approx(share, rel=0.02)
    assert all(error == 0.0 for i, error in enumerate(found) if i != part)


def test_low_precision_and_a_history() -> None:
    """Leaves of bfloat16 and float32, and a hyper-network: nothing is lost there."""
    coarse, single = leaf(0.7, torch.bfloat16), leaf([1.1, 0.9], torch.float32)
    weight, x0 = leaf(0.4), leaf([2.0, 1.0])
    made = torch.nn.functional.softplus(weight) * torch.ones(2, dtype=F64)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -coarse.double() * single.double() * made * x

    result = stopping_time(
        flow, x0, lambda t, x: (x**2).sum(), 1e-2, params=[made], evidence="standard"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result.time.backward()
    assert result.evidence is not None
    assert all(entry.cause == "steps" for entry in result.evidence.leaves)
