"""A short run keeps its graph; the gradient is the one that replay gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from iterations import gradients, nonlinear, nonlinear_leaves, number, relative_gap
from torch import Tensor

from discrete import DiscreteAdjoint, StoppingIndexResult, stopping_index
from ode_stopping import NotReproducibleError

REPLAYED = DiscreteAdjoint(chunk=5)


def recorded(result: StoppingIndexResult) -> bool:
    assert result.problem is not None
    return result.problem.run.recording is not None


@pytest.mark.parametrize("interpolation", [None, "log", "hermite", "partial_step"])
def test_equal_to_replay(interpolation: Any) -> None:
    leaves = nonlinear_leaves()
    kept = nonlinear(leaves, interpolation=interpolation)
    replayed = nonlinear(leaves, interpolation=interpolation, gradient=REPLAYED)
    assert recorded(kept)
    assert not recorded(replayed)
    assert torch.equal(kept.trajectory.losses, replayed.trajectory.losses)
    found, truth = gradients(kept.steps, leaves), gradients(replayed.steps, leaves)
    assert relative_gap(found, truth) < 1e-14
    assert kept.stats.vjps == replayed.stats.vjps == kept.index
    assert kept.stats.nfe_forward == kept.index
    assert kept.stats.nfe_backward is not None
    assert kept.stats.nfe_backward < kept.index // 4  # the last step alone
    # The graph is still there for a second pass.
    assert relative_gap(gradients(kept.steps, leaves), truth) < 1e-14


def test_a_graph_beyond_the_budget_is_given_up() -> None:
    leaves = nonlinear_leaves(step=0.002)
    long = nonlinear(leaves, gradient=DiscreteAdjoint(memory=2**20))
    assert not recorded(long)
    assert long.problem is not None
    assert long.problem.run.step_bytes is not None
    truth = gradients(nonlinear(leaves, gradient=REPLAYED).steps, leaves)
    assert relative_gap(gradients(long.steps, leaves), truth) < 1e-13


def test_nothing_is_recorded_that_nobody_wants() -> None:
    x0 = number([1.0, -2.0], grad=False)
    result = stopping_index(lambda k, x: 0.9 * x, x0, lambda t, x: x.square().sum(), 0.5)
    assert not recorded(result)
    assert not result.steps.requires_grad


def test_a_leaf_of_one_step_is_found() -> None:
    early, late = number(1.0), number(1.5)

    def update(k: int, x: Tensor) -> Tensor:
        return x - 0.01 * (late if k == 41 else early) * x

    x0 = number([1.0, -2.0], grad=False)
    result = stopping_index(update, x0, lambda t, x: x.square().sum(), 0.5)
    assert result.index > 60
    found = torch.autograd.grad(result.steps, [early, late])
    x = before = x0
    for k in range(result.index):
        before, x = x, update(k, x)
    excess = x.square().sum()
    truth = torch.autograd.grad(-excess / (excess - before.square().sum()).detach(), [early, late])
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)


def test_other_values_with_a_graph_than_without() -> None:
    theta = number(1.0)

    def update(k: int, x: Tensor) -> Tensor:
        return x * (0.9 if torch.is_grad_enabled() else 0.8) * theta

    x0 = number([1.0, -2.0], grad=False)
    with pytest.raises(NotReproducibleError):
        stopping_index(update, x0, lambda t, x: x.square().sum(), 0.5)
