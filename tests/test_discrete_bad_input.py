"""Bad input is answered at entry, by an error that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discrete import DiscreteAdjoint, Euler, Truncated, UpdateRule, stopping_index
from ode_stopping import GradientNorm, Quadratic

GOOD: dict[str, Any] = {
    "update": Euler(lambda t, x: -x, step=0.1),
    "x0": torch.ones(2, dtype=torch.float64),
    "criterion": lambda t, x: x.square().sum(),
    "target": 0.1,
}


def bare(k: int, x: Tensor) -> Tensor:
    return 0.9 * x


BAD = [
    ("x0", torch.ones(2, dtype=torch.int64), TypeError),
    ("x0", [1.0, 2.0], TypeError),
    ("x0", (), ValueError),
    ("x0", torch.zeros(0), ValueError),
    ("x0", torch.tensor([1.0, math.nan]), ValueError),
    ("x0", torch.tensor([1.0, math.inf]), ValueError),
    ("x0", (torch.ones(2), torch.ones(2, dtype=torch.float64)), TypeError),
    ("target", math.nan, ValueError),
    ("target", math.inf, ValueError),
    ("target", "0.1", TypeError),
    ("target", torch.ones(2, 2), ValueError),
    ("target", None, TypeError),
    ("t0", math.nan, ValueError),
    ("t0", torch.tensor([0.0]), ValueError),
    ("update", None, TypeError),
    ("update", Euler, TypeError),
    ("max_steps", 0, ValueError),
    ("max_steps", -1, ValueError),
    ("max_steps", 10.0, TypeError),
    ("max_steps", True, TypeError),
    ("gradient", "adjoint", TypeError),
    ("gradient", DiscreteAdjoint, TypeError),
    ("interpolation", "linear", ValueError),
    ("interpolation", ["log"], ValueError),
    ("censored", "never", TypeError),
    ("censored", math.nan, ValueError),
    ("censored", True, TypeError),
    ("params", [1.0], TypeError),
    ("params", [torch.ones(2)], ValueError),
]


def message(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(("name", "value", "error"), BAD, ids=lambda value: str(value)[:30])
def test_the_argument_is_named(name: str, value: object, error: type[Exception]) -> None:
    assert name in message(error, lambda: stopping_index(**{**GOOD, name: value}))


@pytest.mark.parametrize(
    ("output", "error"),
    [
        (lambda x: x[:1], ValueError),
        (lambda x: x.float(), TypeError),
        (lambda x: (x, x), TypeError),
        (lambda x: None, TypeError),
        (lambda x: x.tolist(), TypeError),
    ],
    ids=["shape", "dtype", "tuple", "None", "list"],
)
def test_wrong_output_of_the_update(
    output: Callable[[Tensor], object], error: type[Exception]
) -> None:
    text = message(error, lambda: stopping_index(**{**GOOD, "update": lambda k, x: output(x)}))
    assert "update" in text


@pytest.mark.parametrize(
    ("output", "error"),
    [(lambda x: x, ValueError), (lambda x: 1.0, TypeError), (lambda x: x[None], ValueError)],
    ids=["vector", "float", "matrix"],
)
def test_wrong_output_of_the_criterion(
    output: Callable[[Tensor], object], error: type[Exception]
) -> None:
    text = message(error, lambda: stopping_index(**{**GOOD, "criterion": lambda t, x: output(x)}))
    assert "criterion" in text


def test_negative_target_of_a_nonnegative_criterion() -> None:
    criterion = GradientNorm(Quadratic(torch.ones(2, dtype=torch.float64)))
    call = {**GOOD, "criterion": criterion, "target": -0.1}
    assert "target" in message(ValueError, lambda: stopping_index(**call))


@pytest.mark.parametrize("interpolation", ["hermite", "partial_step"])
def test_interpolation_without_a_flow(interpolation: str) -> None:
    call = {**GOOD, "update": bare, "interpolation": interpolation}
    text = message(ValueError, lambda: stopping_index(**call))
    assert interpolation in text
    assert "flow" in text


@pytest.mark.parametrize("target", [0.0, -0.1])
def test_log_of_a_target_that_is_not_positive(target: float) -> None:
    call = {**GOOD, "target": target, "interpolation": "log"}
    text = message(ValueError, lambda: stopping_index(**call))
    assert '"log"' in text
    assert "target" in text


def test_log_of_a_criterion_that_is_not_positive() -> None:
    call = {**GOOD, "criterion": lambda t, x: x.sum() - 1.5, "interpolation": "log"}
    text = message(ValueError, lambda: stopping_index(**call))
    assert '"log"' in text
    assert "criterion" in text


def test_step_that_was_trained_below_zero() -> None:
    step = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
    rule = Euler(lambda t, x: -x, step=step)
    step.data.fill_(-0.1)
    assert "step" in message(ValueError, lambda: stopping_index(**{**GOOD, "update": rule}))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda bad: DiscreteAdjoint(memory=bad), "memory"),
        (lambda bad: DiscreteAdjoint(chunk=bad), "chunk"),
        (lambda bad: Truncated(steps=bad), "steps"),
    ],
    ids=["memory", "chunk", "steps"],
)
def test_routes(make: Callable[[Any], object], name: str) -> None:
    for bad, error in ((0, ValueError), (-3, ValueError), (2.5, TypeError), (True, TypeError)):
        assert name in message(error, lambda bad=bad: make(bad))


def test_functional_transforms_name_the_batched_form() -> None:
    def steps(x0: Tensor) -> Tensor:
        return stopping_index(**{**GOOD, "x0": x0}).steps

    x0 = torch.ones(3, 2, dtype=torch.float64)
    assert "batched" in message(RuntimeError, lambda: torch.func.vmap(steps)(x0))


def test_errors_of_the_user_pass_through() -> None:
    class Broken(UpdateRule):
        order = 1

        def advance(self, t: Tensor, x: Any, step: float | Tensor) -> Any:
            raise KeyError("mine")

    rule = Broken(lambda t, x: -x, step=0.1)
    assert "mine" in message(KeyError, lambda: stopping_index(**{**GOOD, "update": rule}))
