"""Proposition 1: Algorithm 1, with any chunks and memory, is differentiation of the loop."""

from __future__ import annotations

import pytest
import torch
from iterations import (
    Leaves,
    definition_3,
    gradients,
    nonlinear,
    nonlinear_flow,
    nonlinear_leaves,
    number,
    relative_gap,
    weighted_norm,
)
from torch import Tensor

from discrete import DiscreteAdjoint, IndexRoute, Unrolled

ONE_STATE = 4 * 8  # bytes
ROUTES = [
    Unrolled(),
    DiscreteAdjoint(),
    DiscreteAdjoint(chunk=1),
    DiscreteAdjoint(chunk=7),
    DiscreteAdjoint(chunk=10_000),
    DiscreteAdjoint(memory=ONE_STATE, chunk=1),
    DiscreteAdjoint(memory=ONE_STATE, chunk=5),
    DiscreteAdjoint(memory=5 * ONE_STATE, chunk=3),
    DiscreteAdjoint(memory=20 * ONE_STATE, chunk=16),
]


def literal_algorithm_1(leaves: Leaves, steps: int) -> Leaves:
    """Algorithm 1 as printed, one step at a time, with the explicit terms of t0, h and phi."""
    flow, criterion = nonlinear_flow(leaves), weighted_norm(leaves)
    h, t0 = leaves["h"], leaves["t0"]

    def step(k: int, x: Tensor, v: Tensor, t0: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        dx, dv = flow(t0 + k * h, (x, v))
        return x + h * dx, v + h * dv

    path = [(leaves["x"].detach(), leaves["v"].detach())]
    with torch.no_grad():
        for k in range(steps):
            path.append(step(k, *path[-1], t0, h))
    x, v = (piece.clone().requires_grad_(True) for piece in path[steps])
    loss = criterion(t0 + steps * h, (x, v))
    others = [leaves[name] for name in ("phi", "t0", "h")]
    lam_x, lam_v, by_phi, by_t0, by_h = torch.autograd.grad(loss, [x, v, *others])
    sums = {"theta": torch.zeros(2, dtype=torch.float64), "phi": by_phi, "t0": by_t0, "h": by_h}
    for k in reversed(range(steps)):
        x, v = (piece.clone().requires_grad_(True) for piece in path[k])
        after = step(k, x, v, t0, h)
        names = ["theta", "t0", "h"]
        grads = torch.autograd.grad(after, [x, v, *(leaves[n] for n in names)], [lam_x, lam_v])
        # The sum uses lam before lam is updated.
        sums.update({n: sums[n] + g for n, g in zip(names, grads[2:], strict=True)})
        lam_x, lam_v = grads[:2]
    before = criterion(t0 + (steps - 1) * h, path[steps - 1])
    decrease = (loss - before).detach()
    totals = {**sums, "x": lam_x, "v": lam_v, "eps": torch.tensor(-1.0, dtype=torch.float64)}
    return {name: -total.detach() / decrease for name, total in totals.items()}


@pytest.mark.parametrize("route", ROUTES, ids=repr)
def test_equals_the_unrolled_loop_and_the_printed_algorithm(route: IndexRoute) -> None:
    leaves = nonlinear_leaves()
    result = nonlinear(leaves, gradient=route)
    assert result.index == 74
    found = gradients(result.steps, leaves)
    assert relative_gap(found, definition_3(leaves, result.index)) < 1e-12
    assert relative_gap(found, literal_algorithm_1(leaves, result.index)) < 1e-12


@pytest.mark.parametrize("route", ROUTES, ids=repr)
def test_final_state_and_index_share_one_backward_pass(route: IndexRoute) -> None:
    leaves = nonlinear_leaves()
    result = nonlinear(leaves, gradient=route)
    x, v = result.state
    weights = number([0.3, -1.2], grad=False)
    found = gradients(2.0 * result.steps + (weights * x).sum() - 3.0 * v.sum(), leaves)

    flow, h, t0 = nonlinear_flow(leaves), leaves["h"], leaves["t0"]
    x, v = leaves["x"], leaves["v"]
    for k in range(result.index):
        dx, dv = flow(t0 + k * h, (x, v))
        x, v = x + h * dx, v + h * dv
    of_state = gradients((weights * x).sum() - 3.0 * v.sum(), leaves)
    of_index = definition_3(leaves, result.index)
    truth = {name: 2.0 * of_index[name] + of_state[name] for name in leaves}
    assert relative_gap(found, truth) < 1e-12


@pytest.mark.parametrize("interpolation", ["log", "hermite", "partial_step"])
def test_routes_agree_on_fractional_indices(interpolation: str) -> None:
    leaves = nonlinear_leaves()
    found = [
        gradients(nonlinear(leaves, gradient=route, interpolation=interpolation).steps, leaves)
        for route in ROUTES
    ]
    assert max(relative_gap(gradient, found[0]) for gradient in found[1:]) < 1e-12


def test_checkpoints_were_replayed() -> None:
    # The routes above would prove little if the small budgets kept every state after all.
    leaves = nonlinear_leaves()
    result = nonlinear(leaves, gradient=DiscreteAdjoint(memory=5 * ONE_STATE, chunk=3))
    assert len(result.trajectory.indices) <= 5
    result.steps.backward()
    # One traced replay of the steps before the last, two plain ones of the stretches in between.
    assert result.stats.vjps == result.index
    assert result.stats.nfe_backward is not None
    assert 1.5 * result.index < result.stats.nfe_backward < 4 * result.index
