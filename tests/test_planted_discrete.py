"""Wrong formulas, planted one at a time: the comparisons of the other tests must fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from iterations import definition_3, gradients, nonlinear, nonlinear_leaves, relative_gap
from torch import Tensor

import discrete.gradients.index
from discrete import DiscreteAdjoint
from discrete.gradients.adjoint import DiscretePullBack
from discrete.gradients.index import LastStep
from discrete.gradients.problem import IndexProblem
from ode_stopping import GradientAccuracyWarning

BAR = 1e-12  # of Proposition 1


def gap() -> float:
    """What `test_proposition1` holds against its bar."""
    leaves = nonlinear_leaves()
    result = nonlinear(leaves, gradient=DiscreteAdjoint())
    return relative_gap(gradients(result.steps, leaves), definition_3(leaves, result.index))


def one_step_at_a_time(*, early: bool) -> Callable[..., DiscretePullBack]:
    """Algorithm 1 as a route; `early` updates lam before S."""

    def pull_back(_: DiscreteAdjoint, problem: IndexProblem, lam: Tensor) -> DiscretePullBack:
        assert problem.store is not None
        sums = problem.leaves.zeros()
        start_sum = torch.zeros_like(problem.clock.start)
        for k in reversed(range(problem.index - 1)):
            state = problem.store.get(k)
            assert state is not None
            x = state.clone().requires_grad_(True)
            start = problem.clock.start.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                y = problem.update.step_traced(k, x, problem.clock.traced(start)(k))
            inputs = [x, start, *problem.leaves.tensors]

            def pulled(cotangent: Tensor, y: Tensor = y, inputs: list[Tensor] = inputs) -> tuple:
                return torch.autograd.grad(
                    y,
                    inputs,
                    cotangent,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )

            following = pulled(lam)[0]
            _, by_start, *by_leaves = pulled(following if early else lam)
            sums = [total + g for total, g in zip(sums, by_leaves, strict=True)]
            start_sum = start_sum.detach() + by_start
            lam = following
        return DiscretePullBack(lam, start_sum, sums)

    return pull_back


def test_the_right_formulas_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gap() < BAR
    monkeypatch.setattr(DiscreteAdjoint, "pull_back", one_step_at_a_time(early=False))
    assert gap() < BAR


def test_lam_updated_before_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiscreteAdjoint, "pull_back", one_step_at_a_time(early=True))
    with pytest.warns(GradientAccuracyWarning, match="moving"):
        assert gap() > 1e6 * BAR


def test_explicit_term_of_the_criterion_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LastStep.loss

    def wrong(self: LastStep, k: float | Tensor, state: Tensor) -> Tensor:
        value = right(self, k, state)
        (slope,) = torch.autograd.grad(value, state, retain_graph=True)
        return value.detach() + (slope * (state - state.detach())).sum()

    monkeypatch.setattr(LastStep, "loss", wrong)
    assert gap() > 1e6 * BAR


@pytest.mark.parametrize(
    "slope",
    [lambda slope: -slope, lambda slope: slope + 1e-3, lambda slope: slope + 1e-12],
    ids=["sign", "epsilon 1e-3", "epsilon 1e-12"],
)
def test_wrong_denominator(
    monkeypatch: pytest.MonkeyPatch, slope: Callable[[float], float]
) -> None:
    right = discrete.gradients.index._implicit

    def wrong(value: float, excess: Tensor, true_slope: float) -> Tensor:
        return right(value, excess, slope(true_slope))

    monkeypatch.setattr(discrete.gradients.index, "_implicit", wrong)
    assert gap() > 100 * BAR


def test_last_step_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DiscreteAdjoint.pull_back

    def wrong(self: DiscreteAdjoint, problem: IndexProblem, lam: Tensor) -> DiscretePullBack:
        pulled = right(self, problem, lam)
        return DiscretePullBack(pulled.start, pulled.start_time, [2 * g for g in pulled.leaves])

    monkeypatch.setattr(DiscreteAdjoint, "pull_back", wrong)
    with pytest.warns(GradientAccuracyWarning, match="moving"):
        assert gap() > 1e6 * BAR
