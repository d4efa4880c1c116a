"""One bad sample spoils no other: misses, NaN, divergence and starts at the target in one batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from batches import (
    F64,
    Family,
    adam,
    distance,
    drawn,
    gradients,
    number,
    quadratics,
    require_equal_runs,
)
from torch import Tensor

from discrete import DiscreteAdjoint, StepDecrease, stopping_index
from ode_stopping import (
    DivergedError,
    GradientAccuracyWarning,
    GradientError,
    NotReachedError,
    Status,
)

# What becomes of each sample of `mixture`.
FATES = (
    Status.REACHED,
    Status.REACHED,
    Status.DIVERGED,
    Status.REACHED,
    Status.NOT_REACHED,
    Status.AT_START,
    Status.REACHED,
    Status.REACHED,
)


def mixture(*, nan: bool = False, target: Any = None) -> Family:
    """Quadratics of which one diverges, one is missed, one starts at the target, one may be NaN."""
    family = quadratics(count=8)
    c, x0 = family.leaves["c"].detach().clone(), family.leaves["x0"].detach().clone()
    c[2] = 30.0
    c[4] = 1e-9
    x0[4] = 1e6
    x0[5] = 1e-6
    if nan:
        c[7, 0] = torch.nan
    leaves = {**family.leaves, "c": c.requires_grad_(), "x0": x0.requires_grad_()}
    target = number(1e-3) if target is None else target
    return replace(family, leaves=leaves, target=target, options={"max_steps": 300, "throw": False})


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("memory", [2**26, 1500])
@pytest.mark.parametrize("interpolation", [None, "log"])
def test_a_mixture_is_the_loop_of_single_calls(
    declared: bool, memory: int, interpolation: Any
) -> None:
    family, route = mixture(), DiscreteAdjoint(memory=memory)
    right = family.singles(interpolation=interpolation)
    found = family.batch(declared=declared, interpolation=interpolation, gradient=route)
    assert tuple(found.status) == FATES
    require_equal_runs(found, right)
    weights = drawn(8, seed=20, grad=False)
    met = found.reached
    loss = torch.stack([w * one.steps for w, one in zip(weights, right, strict=True)])[met].sum()
    same = (weights * found.steps)[met].sum() + found.state[met].square().sum()
    loss = loss + torch.stack([one.state for one in right])[met].square().sum()
    for a, b in zip(gradients(same, family.wanted), gradients(loss, family.wanted), strict=True):
        assert bool(torch.isfinite(a).all())
        assert distance(a, b) <= 1e-11


def test_numbers_that_are_no_numbers_stay_where_they_are() -> None:
    family = mixture(nan=True)
    right = family.singles()
    found = family.batch(declared=True)
    assert found.status[7] is Status.DIVERGED
    require_equal_runs(found, right)
    loss = torch.stack([one.steps for one in right])[found.reached].sum()
    same = found.steps[found.reached].sum()
    for a, b in zip(gradients(same, family.wanted), gradients(loss, family.wanted), strict=True):
        assert bool(torch.isfinite(a).all())
        assert distance(a, b) <= 1e-11


def test_numbers_that_are_no_numbers_are_never_silent_where_nothing_is_declared() -> None:
    family = mixture(nan=True)
    with pytest.warns(GradientAccuracyWarning, match=r"sample 7 .* per_sample"):
        found = family.batch()
    require_equal_runs(found, family.singles())
    # Zero times NaN is in the sum over samples of the derivative to what they share.
    with pytest.raises(GradientError, match="per_sample"):
        found.steps[found.reached].sum().backward()


@pytest.mark.parametrize("declared", [False, True])
def test_a_start_at_the_minimum_has_no_infinite_derivative_to_give(declared: bool) -> None:
    # Adam's root at v = 0: zero times its infinite derivative would be NaN in dN/dlr of all.
    family = adam(count=4)
    x0 = family.leaves["x0"].detach().clone()
    x0[1] = 0.0
    family = replace(family, leaves={**family.leaves, "x0": x0.requires_grad_()})
    right = family.singles()
    assert right[1].status is Status.AT_START
    for memory in (2**26, 1000):
        found = family.batch(declared=declared, gradient=DiscreteAdjoint(memory=memory))
        require_equal_runs(found, right)
        loss = torch.stack([one.steps for one in right]).sum()
        for a, b in zip(
            gradients(found.steps.sum(), family.wanted),
            gradients(loss, family.wanted),
            strict=True,
        ):
            assert bool(torch.isfinite(a).all())
            assert distance(a, b) <= 1e-11


def test_several_targets_of_which_some_are_missed() -> None:
    family = mixture(target=number([[0.3, 1e-3, 1e-12]]))
    family = replace(family, options={"max_steps": 40, "throw": False})
    right = family.singles()
    for declared in (False, True):
        found = family.batch(declared=declared)
        require_equal_runs(found, right)
        assert {Status.REACHED, Status.NOT_REACHED} <= {s for some in found.status for s in some}
        loss = torch.stack([one.steps for one in right])[found.reached].sum()
        same = found.steps[found.reached].sum()
        for a, b in zip(
            gradients(same, family.wanted), gradients(loss, family.wanted), strict=True
        ):
            assert distance(a, b) <= 1e-11


@pytest.mark.parametrize("declared", [False, True])
def test_a_miss_raises_where_it_is_differentiated_and_counts_where_it_is_censored(
    declared: bool,
) -> None:
    family = mixture()
    found = family.batch(declared=declared)
    assert int((~found.reached).sum()) == 2
    assert found.steps[4] == float("inf")
    with pytest.raises(NotReachedError, match=r"sample 4: .*NOT_REACHED"):
        found.steps[4].backward(retain_graph=True)
    with pytest.raises(NotReachedError, match=r"sample 2: .*DIVERGED"):
        found.steps[2].backward(retain_graph=True)
    with pytest.raises(NotReachedError, match="sample 4: "):
        found.steps.sum().backward(retain_graph=True)
    censored = family.batch(declared=declared, censored="horizon")
    assert censored.steps[4] == 300.0
    assert censored.index[4] == -1
    both = gradients(censored.steps.sum(), family.wanted)
    only = gradients(found.steps[found.reached].sum(), family.wanted)
    assert all(distance(a, b) <= 1e-13 for a, b in zip(both, only, strict=True))


def test_throwing_comes_after_all_are_solved() -> None:
    family = mixture()
    with pytest.raises(DivergedError, match=r"1 of 8 samples: DIVERGED.*sample 2") as caught:
        family.batch(throw=True)
    result = caught.value.result
    assert tuple(result.status) == FATES
    assert result.index.tolist() == family.batch().index.tolist()


def test_time_is_that_of_a_rule_and_a_miss_does_not_spoil_it() -> None:
    from discrete import Euler
    from ode_stopping import GradientFlow

    c, h = number([1.0, 2.0, 1e-9]), number(0.1)
    flow = GradientFlow(lambda x: (c[:, None] * x * x).sum(-1) / 2)
    x0 = torch.ones(3, 2, dtype=F64)
    found = stopping_index(
        Euler(flow, step=h),
        x0,
        lambda t, x: x.square().sum(-1),
        1e-2,
        t0=0.5,
        batched=True,
        max_steps=60,
    )
    assert found.time is not None
    assert found.time.tolist()[2] == float("inf")
    assert torch.allclose(found.time[:2], 0.5 + 0.1 * found.index[:2].double())
    (gradient,) = gradients(found.time[:2].sum(), [h])
    assert bool(torch.isfinite(gradient))


def test_a_batch_at_rest_ends_before_the_limit() -> None:
    shift = number([0.0, 0.5, 0.0])

    def update(k: int, x: Tensor) -> Tensor:
        return shift[:, None] + 0.5 * (x - shift[:, None])

    x0 = torch.ones(3, 2, dtype=F64)
    found = stopping_index(update, x0, lambda t, x: x.square().sum(-1), 1e-3, batched=True)
    assert found.status == [Status.REACHED, Status.NOT_REACHED, Status.REACHED]
    assert len(found.trajectory.losses) < 5000
    assert "at rest" in found.note
    alone = stopping_index(
        lambda k, x: shift[1] + 0.5 * (x - shift[1]), x0[1], lambda t, x: x.square().sum(), 1e-3
    )
    assert distance(found.state[1], alone.state) <= 1e-12


def test_one_that_moves_keeps_a_batch_from_rest() -> None:
    pace = number([0.5, 0.997])

    def update(k: int, x: Tensor) -> Tensor:
        return 1.0 + pace[:, None] * (x - 1.0)

    def criterion(t: Tensor, x: Tensor) -> Tensor:
        return (x[:, 0] - 1.0).square() + torch.tensor([1.0, 0.0], dtype=F64)

    x0 = torch.full((2, 2), -1.0, dtype=F64)
    found = stopping_index(update, x0, criterion, 1e-9, batched=True, gradient=None)
    assert found.status == [Status.NOT_REACHED, Status.REACHED]
    assert int(found.index[1]) > 3000


def test_step_decrease_refuses_the_samples_that_have_no_decrease() -> None:
    c, lr = number([[1.0], [1.0], [3.2]]), number(0.5)
    criterion = StepDecrease(lambda x: (c * x * x).sum(-1) / 2)
    # The second is met at N = 1, where J_0 is a mark; the third goes up at first.
    start = torch.tensor([[1.0], [1e-3], [1.0]], dtype=F64)
    found = stopping_index(
        criterion.wrap(lambda k, x: x - lr * c * x),
        criterion.initial_state(start, batched=True),
        criterion,
        1e-4,
        batched=True,
        max_steps=60,
        throw=False,
    )
    assert found.index[1] == 1
    (gradient,) = gradients(found.steps[0], [lr])
    assert gradient != 0
    with pytest.raises(GradientError, match=r"sample 1: .* mark"):
        found.steps[1].backward()


def test_low_precision_follows_single_calls() -> None:
    family = quadratics(count=5)
    leaves = {k: v.detach().float().requires_grad_() for k, v in family.leaves.items()}
    family = replace(family, leaves=leaves, target=number(1e-5))
    right = family.singles()
    found = family.batch(declared=True)
    assert found.index.tolist() == [one.index for one in right]
    for sample, one in enumerate(right):
        a, b = (gradients(steps, family.wanted) for steps in (found.steps[sample], one.steps))
        assert all(distance(x, y) <= 1e-4 for x, y in zip(a, b, strict=True))
        assert a[0].dtype == torch.float32
