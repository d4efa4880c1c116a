"""AnyOf and AllOf: what they keep of their members and targets, and their bad input."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from discrete import StepDecrease
from ode_stopping import (
    AllOf,
    AnyOf,
    Criterion,
    GradientNorm,
    LossValue,
    Quadratic,
    RelativeDecrease,
    stopping_time,
)

F64 = torch.float64
NOW = torch.tensor(0.0, dtype=F64)


def half_square(i: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: 0.5 * x[..., i].square()


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


# --- what is kept -------------------------------------------------------------------------------


def test_members_and_targets_are_kept() -> None:
    objective = Quadratic(nn.Parameter(torch.tensor([1.0, 3.0], dtype=F64)))
    loss, bare, tensor, parameter = LossValue(objective), half_square(0), leaf(0.1), leaf(0.2)
    learned = nn.Parameter(parameter.detach())
    criterion = AnyOf(loss, bare, bare, targets=(learned, tensor, 0.3))
    assert criterion.criteria == (loss, bare, bare)
    assert criterion.targets[0] is learned
    assert criterion.targets[1] is tensor
    assert float(criterion.targets[2]) == 0.3
    assert {id(p) for p in criterion.parameters()} == {id(objective.spectrum), id(learned)}
    assert criterion.float().targets[2].dtype == torch.float32
    assert "targets=[0.2" in repr(criterion)


def test_copies_are_independent() -> None:
    objective, x = Quadratic(torch.tensor([1.0, 3.0], dtype=F64)), torch.ones(2, dtype=F64)
    criterion = AllOf(LossValue(objective), GradientNorm(objective), targets=[0.1, 0.2])
    for twin in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(twin(NOW, x), criterion(NOW, x))
        assert twin.criteria[0] is twin.criterion0 is not criterion.criteria[0]


def test_nonnegative_where_all_members_are() -> None:
    objective = Quadratic(torch.tensor([1.0, 3.0], dtype=F64))
    loss, norm = LossValue(objective), GradientNorm(objective)
    unknown = LossValue(lambda x: x.sum(-1))
    for kind in (AnyOf, AllOf):
        assert kind(loss, norm, targets=[1, 1]).nonnegative
        assert not kind(loss, unknown, targets=[1, 1]).nonnegative
        assert not kind(loss, half_square(0), targets=[1, 1]).nonnegative
    with pytest.raises(ValueError, match="target must not be negative: AnyOf is never below 0"):
        stopping_time(lambda t, x: -x, torch.ones(2, dtype=F64), AnyOf(loss, targets=[1]), -1.0)


def test_parameters_of_members_get_their_gradient() -> None:
    """RelativeDecrease with a reference f_ref that requires grad: eps f_ref is what counts."""
    reference, x0 = leaf(2.0), torch.tensor([2.0, 1.0], dtype=F64)
    criterion = AnyOf(
        RelativeDecrease(lambda x: 0.5 * x[..., 0].square(), reference=reference),
        half_square(1),
        targets=[0.1, 1e-9],
    )
    result = stopping_time(lambda t, x: -x * x.new_tensor([0.5, 2.0]), x0, criterion, 1.0)
    assert float(result.time.detach()) == pytest.approx(math.log(10.0), rel=1e-6)
    result.time.backward()
    assert reference.grad is not None
    assert float(reference.grad) == pytest.approx(-1 / 2.0, rel=1e-6)


# --- bad input ----------------------------------------------------------------------------------

ONE = half_square(0)
BAD = {
    "none": (lambda k: k(targets=[]), ValueError, "criteria must be at least one criterion"),
    "too few": (lambda k: k(ONE, ONE, targets=[1.0]), ValueError, "targets must .*1 for 2 crit"),
    "too many": (lambda k: k(ONE, targets=[1.0, 2.0]), ValueError, "targets must .*2 for 1 crit"),
    "number": (lambda k: k(ONE, targets=1.0), TypeError, "targets must be a list of numbers"),
    "tensor": (
        lambda k: k(ONE, targets=torch.ones(1)),
        TypeError,
        r"targets must be a list .*got a Tensor of shape \(1,\)",
    ),
    "vector": (
        lambda k: k(ONE, ONE, targets=[1.0, torch.ones(1)]),
        ValueError,
        r"targets\[1\] must be a number or a 0-d tensor",
    ),
    "zero": (lambda k: k(ONE, targets=[0.0]), ValueError, r"targets\[0\] must be positive"),
    "negative": (
        lambda k: k(ONE, ONE, targets=[1.0, leaf(-2.0)]),
        ValueError,
        r"targets\[1\] must be positive.*got -2",
    ),
    "NaN": (lambda k: k(ONE, targets=[math.nan]), ValueError, r"targets\[0\] must be finite"),
    "infinite": (lambda k: k(ONE, targets=[math.inf]), ValueError, r"targets\[0\] must be finite"),
    "flag": (lambda k: k(ONE, targets=[True]), TypeError, r"targets\[0\] must be a number"),
    "text": (lambda k: k(ONE, targets=["1"]), TypeError, r"targets\[0\] must hold real numbers"),
    "integers": (
        lambda k: k(ONE, targets=[torch.tensor(1)]),
        TypeError,
        r"targets\[0\] must be a floating-point tensor",
    ),
    "not callable": (
        lambda k: k(ONE, 1.0, targets=[1.0, 1.0]),
        TypeError,
        r"criteria\[1\] must be callable, \(t, state\) -> J",
    ),
    "class": (lambda k: k(LossValue, targets=[1.0]), TypeError, r"criteria\[0\].*the class Loss"),
    "marks": (
        lambda k: k(StepDecrease(lambda x: x.sum()), targets=[0.1]),
        TypeError,
        r"criteria\[0\] is a StepDecrease.*by itself",
    ),
    "position": (
        lambda k: k(ONE, targets=[1.0], position=lambda s: s),
        TypeError,
        "unexpected keyword argument 'position'",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("kind", [AnyOf, AllOf])
def test_bad_input_is_named(name: str, kind: type[AnyOf | AllOf]) -> None:
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make(kind)


def test_bad_input_of_a_call_is_named() -> None:
    x, moving = torch.ones(2, dtype=F64), leaf(0.1)
    with pytest.raises(TypeError, match=r"criteria\[1\] must return a floating.*got float 1.0"):
        AnyOf(ONE, lambda t, x: 1.0, targets=[1, 1])(NOW, x)
    criterion: Criterion = AllOf(ONE, ONE, targets=[1.0, moving])
    with torch.no_grad():
        moving.mul_(-1)
    with pytest.raises(ValueError, match=r"targets\[1\] must be positive in torch.float64"):
        criterion(NOW, x)
    with pytest.raises(ValueError, match=r"targets\[0\] must be positive in torch.float32"):
        AnyOf(ONE, targets=[1e-60])(NOW, x.float())
