"""What the adapting optimisers refuse: each by name, with what it got."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest
import torch
from online_runs import closure_of, leaf
from torch import Tensor

from discrete import SGDOLA, AdamHD, AdamOLA
from discrete.online import AdaptationOptions
from ode_stopping.core.status import MissingGradientError

BOTH = [AdamOLA, SGDOLA]

OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"variant": "printed"}, ValueError, "variant must be .* got 'printed'"),
    ({"horizon": 0}, ValueError, "horizon must be an integer, at least 1; got 0"),
    ({"horizon": 2.0}, ValueError, "horizon must be an integer"),
    ({"horizon": True}, ValueError, "horizon must be an integer"),
    ({"every": 0}, ValueError, "every must be an integer, at least 1; got 0"),
    ({"record_every": -1}, ValueError, "record_every must be an integer, at least 0; got -1"),
    ({"deterministic": 1}, TypeError, "deterministic must be True or False; got 1"),
    ({"held_out": "no"}, TypeError, "held_out must be True or False; got 'no'"),
    ({"descent_threshold": -1e-9}, ValueError, "descent_threshold must be finite and not negative"),
    ({"descent_threshold": nan}, ValueError, "descent_threshold must be finite"),
    ({"descent_threshold": inf}, ValueError, "descent_threshold must be finite"),
    ({"max_signal": 0.0}, ValueError, "max_signal must be positive; got 0.0"),
    ({"max_signal": nan}, ValueError, "max_signal must be positive"),
    ({"caution": -0.1}, ValueError, "caution must be between 0 and 1; got -0.1"),
    ({"caution": 1.5}, ValueError, "caution must be between 0 and 1; got 1.5"),
    ({"caution": nan}, ValueError, "caution must be between 0 and 1"),
    ({"settle": 0.0}, ValueError, "settle must be positive; got 0.0"),
    ({"max_rise": 1.0}, ValueError, "max_rise must be greater than 1; got 1.0"),
    ({"max_rise": nan}, ValueError, "max_rise must be greater than 1"),
    ({"adapt": "lr"}, TypeError, r"adapt must be a tuple of names, as in \('lr',\)"),
    ({"adapt": ()}, ValueError, "can adapt .*'lr'.*; got"),
    ({"adapt": ("lr", "eps")}, ValueError, r"can adapt .*; got \['lr', 'eps'\]"),
    ({"adapt_rate": -0.1}, ValueError, "adapt_rate must be finite and not negative; got -0.1"),
    ({"adapt_rate": nan}, ValueError, "adapt_rate must be finite and not negative; got nan"),
    ({"adapt_rate": inf}, ValueError, "adapt_rate must be finite"),
    ({"lr": 0.0}, ValueError, "lr must be positive; got 0"),
    ({"lr": -1e-3}, ValueError, "lr must be positive; got -0.001"),
    ({"lr": nan}, ValueError, "lr must be positive; got nan"),
    ({"lr": inf}, ValueError, "lr must be positive to be adapted .*; got inf"),
    ({"weight_decay": -1.0}, ValueError, "weight_decay must not be negative; got -1.0"),
    ({"adapt": ("weight_decay",)}, ValueError, "weight_decay must be positive to be adapted .* 0"),
    ({"rate": 1.0}, TypeError, "rate"),
]

ADAM_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"betas": (1.0, 0.9)}, r"beta1 must be in \[0, 1\); got 1.0"),
    ({"betas": (0.9, -0.1)}, r"beta2 must be in \[0, 1\); got -0.1"),
    ({"betas": (nan, 0.9)}, r"beta1 must be in \[0, 1\); got nan"),
    ({"eps": -1e-8}, "eps must not be negative; got -1e-08"),
    ({"lr": -1.0}, "lr must be positive; got -1.0"),
    ({"weight_decay": nan}, "weight_decay must not be negative; got nan"),
]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize(("options", "error", "message"), OPTIONS)
def test_options(
    kind: type[Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kind([leaf([1.0])], **options)


@pytest.mark.parametrize("kind", [AdamOLA, AdamHD])
@pytest.mark.parametrize(("options", "message"), ADAM_OPTIONS)
def test_options_of_adam(kind: type[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([leaf([1.0])], **options)
    optimizer = kind([leaf([1.0])])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [leaf([1.0])], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\); got 1.0"),
        ({"momentum": -0.5}, r"momentum must be in \[0, 1\); got -0.5"),
        ({"adapt": ("beta1",)}, r"SGDOLA can adapt \['lr', 'momentum', 'weight_decay'\]"),
    ],
)
def test_options_of_sgd(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGDOLA([leaf([1.0])], **options)


def test_options_of_adamhd() -> None:
    for value in (-1e-9, nan):
        with pytest.raises(ValueError, match="hypergradient_lr must not be negative"):
            AdamHD([leaf([1.0])], hypergradient_lr=value)
    optimizer = AdamHD([leaf([1.0])])
    with pytest.raises(ValueError, match="hypergradient_lr"):
        optimizer.add_param_group({"params": [leaf([1.0])], "hypergradient_lr": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", BOTH)
def test_the_printed_form_adapts_the_rate_alone(kind: type[Any]) -> None:
    with pytest.raises(ValueError, match="adapts the learning rate alone"):
        kind([leaf([1.0])], variant="paper", adapt=("lr", "weight_decay"), weight_decay=0.1)


def test_options_by_themselves() -> None:
    options = AdaptationOptions()
    assert options == AdaptationOptions.from_dict(options.to_dict())
    with pytest.raises(ValueError, match="adapts the learning rate alone"):
        AdaptationOptions(variant="paper", adapt=("beta1",))


@pytest.mark.parametrize("kind", BOTH)
def test_a_fixed_group_may_have_what_cannot_be_adapted(kind: type[Any]) -> None:
    # No logarithm of a weight decay of 0, but none is asked for.
    a, b = leaf([1.0]), leaf([2.0])
    optimizer = kind(
        [{"params": [a], "weight_decay": 0.1}, {"params": [b], "adapt_rate": 0.0}],
        adapt=("lr", "weight_decay"),
    )
    optimizer.step(closure_of(optimizer, lambda: a.square().sum() + b.square().sum()))
    assert optimizer.param_groups[0]["weight_decay"] != 0.1
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    with pytest.raises(ValueError, match="weight_decay must be positive to be adapted"):
        optimizer.add_param_group({"params": [leaf([1.0])]})
    assert len(optimizer.param_groups) == 2


# --- closures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BOTH)
def test_no_closure(kind: type[Any]) -> None:
    with pytest.raises(TypeError, match=f"{kind.__name__}.step needs a closure"):
        kind([leaf([1.0])]).step()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "one number; got None"),
        ("0.5", "one number; got '0.5'"),
        (3, "one number; got 3"),
        (torch.ones(2), r"one number; got a tensor of shape \(2,\)"),
        (torch.ones((), dtype=torch.int64), "one number; got a tensor"),
        (torch.ones((), dtype=torch.complex64), "one number; got a tensor"),
    ],
)
@pytest.mark.parametrize("horizon", [1, 2])
def test_what_the_closure_returns(returned: Any, message: str, horizon: int) -> None:
    x = leaf([1.0])
    optimizer = AdamOLA([x], horizon=horizon)

    def closure() -> Any:
        optimizer.zero_grad()
        x.square().sum().backward()
        return returned

    with pytest.raises(TypeError, match=message):
        optimizer.step(closure)
    assert torch.equal(x.detach(), leaf([1.0]).detach())


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("horizon", [1, 2])
def test_a_closure_without_backward(kind: type[Any], horizon: int) -> None:
    x = leaf([1.0])
    with pytest.raises(MissingGradientError, match=r"call loss.backward\(\)"):
        kind([x], horizon=horizon).step(lambda: x.square().sum())


def test_gradients_of_all_kinds() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True).double()
    optimizer = AdamOLA(table.parameters())
    with pytest.raises(ValueError, match="takes dense real gradients; got a sparse one"):
        optimizer.step(closure_of(optimizer, lambda: table(torch.tensor([1, 2])).square().sum()))


@pytest.mark.parametrize("kind", BOTH)
def test_complex_parameters(kind: type[Any]) -> None:
    z = torch.ones(2, dtype=torch.complex128, requires_grad=True)
    with pytest.raises(ValueError, match="takes real parameters; got a complex one"):
        kind([z])
    optimizer = kind([leaf([1.0])])
    with pytest.raises(ValueError, match="takes real parameters"):
        optimizer.add_param_group({"params": [z]})
    assert len(optimizer.param_groups) == 1


def test_a_second_derivative_that_there_is_not() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.square().sum()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient * torch.ones(2, dtype=torch.float64)

    # torch itself has a Hessian of zero for it, silently, where the parameters are named.
    x = leaf([1.0, 2.0])
    optimizer = AdamOLA([x], horizon=2)
    with pytest.raises(MissingGradientError, match="once_differentiable"):
        optimizer.step(closure_of(optimizer, lambda: Once.apply(x).square()))
