"""`check_index_gradient`: the twin of `check_stopping_gradient` on the discrete side."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from iterations import nonlinear_flow, nonlinear_leaves, number, weighted_norm
from torch import Tensor
from variants import slow_after

from discrete import (
    DiscreteAdjoint,
    Euler,
    Heun,
    IndexRoute,
    RungeKutta4,
    Truncated,
    Unrolled,
    stopping_index,
)
from discrete.check import check_index_gradient
from discrete.gradients.adjoint import DiscretePullBack
from discrete.gradients.problem import IndexProblem
from discrete.stopping import Interpolation
from ode_stopping.checking.report import GradientReport

CURVATURE = torch.tensor([1.0, 4.0, 15.0], dtype=torch.float64)
INTERPOLATIONS = ("log", "hermite", "partial_step")


def squared_gradient(t: Tensor, x: Tensor) -> Tensor:
    return (CURVATURE * x).square().sum()


def quadratic(
    rule: Callable[..., Any] = Euler,
    interpolation: str = "log",
    route: IndexRoute | None = None,
) -> GradientReport:
    """x' = -theta L x, with every kind of leaf."""
    theta, step = number(0.8), number(0.05)
    return check_index_gradient(
        rule(lambda t, x: -theta * CURVATURE * x, step=step),
        number([1.0, -0.6, 0.3]),
        squared_gradient,
        1e-2,
        gradient=route if route is not None else DiscreteAdjoint(),
        interpolation=cast("Interpolation", interpolation),
        directions=1,
    )


def nonlinear(route: IndexRoute, *, start: bool = True) -> GradientReport:
    """A pair of tensors, a driven flow, a criterion with its own leaf, t0, and the step."""
    leaves = nonlinear_leaves()
    pair = tuple(p if start else p.detach() for p in (leaves["x"], leaves["v"]))
    return check_index_gradient(
        Euler(nonlinear_flow(leaves), step=leaves["h"]),
        pair,
        weighted_norm(leaves),
        leaves["eps"],
        t0=leaves["t0"],
        gradient=route,
        directions=1,
    )


@dataclass(frozen=True)
class Planted(DiscreteAdjoint):
    """The default route with one of its results scaled: leaf `leaf`, or x0 (leaf None)."""

    leaf: int | None = None
    factor: float = 1.01

    def pull_back(self, problem: IndexProblem, cotangent: Tensor) -> DiscretePullBack:
        pulled = super().pull_back(problem, cotangent)
        if self.leaf is None:
            assert pulled.start is not None
            return replace(pulled, start=self.factor * pulled.start)
        leaves = list(pulled.leaves)
        leaves[self.leaf] = self.factor * leaves[self.leaf]
        return replace(pulled, leaves=leaves)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("rule", [Euler, RungeKutta4])
def test_quadratics_pass(rule: Callable[..., Any], interpolation: str) -> None:
    report = quadratic(rule, interpolation)
    assert report.passed, report
    assert set(report.subjects) == {"x0", "update.step", "theta"}
    assert all(finding.passed for finding in report.findings), report
    assert report.kinks == ()


def test_other_rules_and_routes_pass() -> None:
    assert quadratic(Heun, "partial_step").passed
    report = quadratic(route=Unrolled())
    assert report.passed, report
    assert {f.road for f in report.findings} == {"finite differences", "discrete adjoint"}


@pytest.mark.parametrize("route", [DiscreteAdjoint(memory=64, chunk=8), Truncated(steps=10_000)])
def test_every_kind_of_leaf(route: IndexRoute) -> None:
    report = nonlinear(route)
    assert report.passed, report
    names = {"x0[0]", "x0[1]", "target", "t0", "update.step", "theta", "phi"}
    assert set(report.subjects) == names
    assert report.time == pytest.approx(73.45, abs=0.01)
    assert report.rate < 0


@pytest.mark.parametrize("factor", slow_after(2, [1.0001, -1.0, 1.01]))
def test_planted_error_in_one_leaf(factor: float) -> None:
    leaves = nonlinear_leaves()
    update, criterion = Euler(nonlinear_flow(leaves), step=leaves["h"]), weighted_norm(leaves)
    state = (leaves["x"].detach(), leaves["v"].detach())
    problem = stopping_index(update, state, criterion, 0.11, t0=0.4, interpolation="log").problem
    assert problem is not None
    (position,) = (i for i, p in enumerate(problem.leaves.tensors) if p is leaves["theta"])
    report = check_index_gradient(
        update,
        state,
        criterion,
        0.11,
        t0=0.4,
        gradient=Planted(leaf=position, factor=factor),
        directions=1,
    )
    assert not report.passed
    assert report.wrong == ("theta",)
    roads = {f.road for f in report.findings if f.passed is False}
    assert roads == {"finite differences", "unrolled loop"}


def test_planted_error_in_the_start() -> None:
    report = quadratic(route=Planted())
    assert not report.passed
    assert report.wrong == ("x0",)


def test_truncated_sum_is_found_wrong_unless_full() -> None:
    report = nonlinear(Truncated(steps=5), start=False)
    assert not report.passed
    assert {"theta", "t0", "update.step"} <= set(report.wrong)
    assert "on purpose" in report.warnings[0]
    refused = nonlinear(Truncated(steps=5))
    assert not refused.passed
    assert refused.error.startswith("GradientError: a truncated sum does not reach x0")


def test_kink_where_the_index_jumps() -> None:
    """The target is J(x_N) itself: N* = N, with the slope of one step on either side."""
    theta = number(0.8)
    update = Euler(lambda t, x: -theta * CURVATURE * x, step=0.1)
    x0 = number([1.0, -0.6, 0.3], grad=False)
    losses = stopping_index(update, x0, squared_gradient, 1e-2).trajectory.losses
    before, at, after = losses[9:12].tolist()
    eps = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    report = check_index_gradient(update, x0, squared_gradient, eps)
    assert report.passed, report
    assert report.time == pytest.approx(10.0, abs=1e-9)
    assert set(report.kinks) == {"target", "theta"}
    rows = [f for f in report.findings if f.subject == "target" and f.sides is not None]
    # dN*/d log eps on a step is -1 over what log J falls by on it; a smaller eps is a later step.
    by_step = [-1 / float(torch.log(torch.tensor(a / b))) for a, b in ((at, after), (before, at))]
    assert rows[0].sides == pytest.approx(by_step, rel=1e-5)


def test_float32_and_bare_callables() -> None:
    theta = torch.tensor(0.08, requires_grad=True)
    curvature = CURVATURE.float()
    report = check_index_gradient(
        lambda k, x: x - theta * curvature * x,
        torch.tensor([1.0, -0.6, 0.3], requires_grad=True),
        lambda t, x: (curvature * x).square().sum(),
        1e-2,
        directions=2,
    )
    assert report.passed, report
    assert report.subjects == ("x0", "theta")


def test_too_long_for_the_unrolled_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("discrete.check._UNROLLED_STEPS", 10)
    report = quadratic()
    assert report.passed, report
    rows = [f for f in report.findings if f.road == "unrolled loop"]
    assert rows
    assert all(row.passed is None and "too many" in row.note for row in rows)


def test_parameters_are_put_back_exactly() -> None:
    leaves = nonlinear_leaves()
    before = {name: (p.detach().clone(), p._version) for name, p in leaves.items()}
    report = check_index_gradient(
        Euler(nonlinear_flow(leaves), step=leaves["h"]),
        (leaves["x"], leaves["v"]),
        weighted_norm(leaves),
        leaves["eps"],
        directions=1,
    )
    assert report.passed, report
    for name, leaf in leaves.items():
        assert torch.equal(leaf.detach(), before[name][0])
        assert leaf._version == before[name][1]
        assert leaf.grad is None


def test_report_is_a_table_and_a_dictionary() -> None:
    report = quadratic()
    lines = repr(report).splitlines()
    assert lines[0] == "GradientReport of N* by DiscreteAdjoint: passed"
    assert "N* = " in lines[1]
    assert "J_N - J_(N-1)" in lines[1]
    assert lines[2].split()[:2] == ["subject", "road"]
    assert len(lines) == 3 + len(report.findings)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["passed"] is True
    assert plain["quantity"] == "N*"


def test_a_whole_index_has_no_differences() -> None:
    with pytest.raises(ValueError, match="N is a step function"):
        check_index_gradient(lambda k, x: 0.5 * x, number([1.0]), squared, 0.1, interpolation=None)


def squared(t: Tensor, x: Tensor) -> Tensor:
    return x.square().sum()


@pytest.mark.parametrize(
    ("target", "options", "status"),
    [(2.0, {}, "AT_START"), (1e-6, {"max_steps": 3}, "NOT_REACHED")],
)
def test_no_index_no_check(target: float, options: dict[str, int], status: str) -> None:
    with pytest.raises(ValueError, match=f"no gradient to check: {status}"):
        check_index_gradient(
            lambda k, x: 0.5 * x,
            number([1.0]),
            squared,
            target,
            **options,  # type: ignore[arg-type]
        )


def test_bad_arguments() -> None:
    def check(grad: bool = True, **options: object) -> GradientReport:
        return check_index_gradient(
            lambda k, x: 0.5 * x,
            number([1.0], grad=grad),
            squared,
            0.1,
            **options,  # type: ignore[arg-type]
        )

    with pytest.raises(ValueError, match=r"nothing that N\* depends on requires grad"):
        check(grad=False)
    with pytest.raises(TypeError, match="gradient must be a route"):
        check(gradient=None)
    with pytest.raises(ValueError, match="directions must be at least 1; got 0"):
        check(directions=0)
