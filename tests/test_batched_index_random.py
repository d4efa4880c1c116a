"""Random batches against the loop of single calls: families, targets, fates, budgets, options."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import F64, FAMILIES, Family, distance, drawn, gradients, pieces, require_equal_runs
from torch import Tensor

from discrete import DiscreteAdjoint


def drawn_case(seed: int) -> tuple[Family, dict[str, Any]]:
    """A family with starts of any fate, and how it is solved."""
    dice = random.Random(seed)
    name = dice.choice(list(FAMILIES))
    family = FAMILIES[name]()
    leaves = dict(family.leaves)
    x0 = leaves["x0"].detach().clone()
    for row in x0 if name != "decreases" else ():
        row *= 1e-6 if dice.random() < 0.15 else 1.0
    leaves["x0"] = x0.requires_grad_()
    if name == "quadratics":
        c = leaves["c"].detach().clone()
        for row in c:
            row *= 1e3 if dice.random() < 0.1 else 1.0
        leaves["c"] = c.requires_grad_()
    shape = dice.choice([(), (family.count,), (1, 3), (family.count, 2)])
    factors = 0.3 + drawn(*shape, seed=seed, grad=False).abs()
    target = (family.target.detach().max() * factors).requires_grad_()
    options = {
        "max_steps": dice.choice([15, 60, 300]),
        "throw": False,
        "interpolation": dice.choice([None, "log"]),
        "leave_first": name not in ("adam", "decreases") and dice.random() < 0.2,
        "at": dice.choice([(), (0, 2, 9)]),
    }
    ways = {
        "declared": dice.random() < 0.6,
        "gradient": DiscreteAdjoint(
            memory=dice.choice([2**26, 2000, 700]), chunk=dice.choice([None, None, 3, 50])
        ),
    }
    return replace(family, leaves=leaves, target=target, options=options), ways


def total(steps: Tensor, state: Any, states_at: Any, counts: Tensor) -> Tensor:
    """A random sum of everything that is differentiable; `counts` says which hits have a part."""
    result = (drawn(*steps.shape, seed=1, grad=False) * steps)[counts].sum()
    for place, piece in enumerate(pieces(state)):
        result = result + (drawn(*piece.shape, seed=2 + place, grad=False) * piece)[counts].sum()
    for place, piece in enumerate(pieces(states_at)):
        weights = drawn(*piece.shape, seed=5 + place, grad=False)
        result = result + (weights * piece)[torch.isfinite(piece)].sum()
    return result


@pytest.mark.parametrize("seed", range(30))
def test_random_batches_are_loops_of_single_calls(seed: int) -> None:
    family, ways = drawn_case(seed)
    with warnings.catch_warnings():
        # A fraction of a step from a start, a flat end: what single calls warn of as well.
        warnings.simplefilter("ignore")
        right, found = family.singles(), family.batch(**ways)
    require_equal_runs(found, right)
    # N = 1 of a StepDecrease, or a hit after a rise, has no derivative.
    counts = found.reached & (found.index != 1) & (found.decrease < 0).logical_or(found.index == 0)
    steps = torch.stack([one.steps for one in right])
    states, at = (
        tuple(
            torch.stack(list(some), dim=axis)
            for some in zip(*(pieces(getattr(one, name)) for one in right), strict=True)
        )
        for name, axis in (("state", 0), ("states_at", 1))
    )
    loss = total(steps, states, at, counts)
    if not loss.requires_grad or not (bool(counts.any()) or family.options["at"]):
        return
    same = total(found.steps, found.state, found.states_at, counts)
    assert loss.dtype == F64
    for a, b in zip(gradients(same, family.wanted), gradients(loss, family.wanted), strict=True):
        assert bool(torch.isfinite(a).all())
        assert distance(a, b) <= 1e-9
