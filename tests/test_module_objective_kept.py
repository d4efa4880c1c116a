"""`ModuleObjective`: what it leaves alone, what its parameters are, and its bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from networks import F64, moved, network, objective, regression
from torch import Tensor, nn
from torch.nn import functional

from discrete import Euler, stopping_index
from ode_stopping import GradientFlow, LossValue, NotReproducibleError, Status, stopping_time

# --- what an evaluation leaves behind ------------------------------------------------------------


def test_running_statistics_are_left_alone() -> None:
    model = network(nn.BatchNorm1d(8))
    f = objective(model)
    before = {name: b.clone() for name, b in model.named_buffers()}
    x0 = f.initial_point()
    assert model.training
    assert torch.equal(f(x0), f(x0))
    result = stopping_time(GradientFlow(f), x0.requires_grad_(), LossValue(f), 0.3)
    result.time.backward()
    assert x0.grad is not None
    assert float(x0.grad.norm()) > 0
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    model(f.inputs)  # the model's own call does change them
    assert not torch.equal(dict(model.named_buffers())["1.running_mean"], before["1.running_mean"])


def test_parameters_are_left_alone() -> None:
    model = network()
    f = objective(model)
    x0 = f.initial_point().requires_grad_()
    versions = [(id(p), p._version) for p in model.parameters()]
    stopping_time(GradientFlow(f), x0, LossValue(f), 0.9 * float(f(x0).detach())).time.backward()
    assert [(id(p), p._version) for p in model.parameters()] == versions
    assert all(p.grad is None for p in model.parameters())


def test_dropout_is_refused_in_train_mode() -> None:
    model = network(nn.Dropout(0.3))
    f = objective(model)
    x0 = f.initial_point()
    for run in (
        lambda: stopping_time(GradientFlow(f), x0, LossValue(f), 0.3),
        lambda: stopping_index(Euler(GradientFlow(f), step=0.1), x0, LossValue(f), 0.3),
    ):
        with pytest.raises(NotReproducibleError, match="dropout"):
            run()
    f.eval()
    assert not model[1].training
    start = float(f(x0))
    assert stopping_time(GradientFlow(f), x0, LossValue(f), 0.9 * start).status is Status.REACHED
    GradientFlow(f).train()
    assert model[1].training


# --- what is a parameter of the objective --------------------------------------------------------


class Weighted(nn.Module):
    """A loss with a parameter, and possibly with the model for a penalty."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.log_weight = nn.Parameter(torch.tensor(0.5, dtype=F64))
        self.model = model

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        value = self.log_weight.exp() * functional.mse_loss(output, targets)
        if self.model is not None:
            value = value + sum(p.square().sum() for p in self.model.parameters())
        return value


def test_the_model_s_parameters_are_not_the_objective_s() -> None:
    assert list(objective().parameters()) == []
    loss = Weighted()
    f = objective(loss=loss)
    assert [id(p) for p in f.parameters()] == [id(loss.log_weight)]
    x = moved(f.initial_point())
    f(x).backward()
    assert loss.log_weight.grad is not None
    assert float(loss.log_weight.grad) == pytest.approx(float(f(x).detach()), rel=1e-13)


def test_a_loss_module_that_holds_the_model_sees_x() -> None:
    model = network()
    loss = Weighted(model)
    f = objective(model, loss=loss)
    assert list(f.parameters()) == []
    assert f.loss is loss
    x = moved(f.initial_point())
    expected = math.exp(0.5) * float(objective(model)(x)) + float(x @ x)
    assert float(f(x).detach()) == pytest.approx(expected, rel=1e-13)
    by_hand = math.exp(0.5) * objective(model).gradient(x) + 2 * x
    torch.testing.assert_close(f.gradient(x).detach(), by_hand, rtol=1e-12, atol=1e-14)
    (slope,) = torch.autograd.grad(f(x), loss.log_weight)
    assert float(slope) == pytest.approx(expected - float(x @ x), rel=1e-12)
    f.float()
    assert loss.log_weight.dtype == torch.float32


def test_data_are_kept_and_get_their_gradient() -> None:
    inputs, targets = regression()
    learned, shifted = nn.Parameter(inputs), targets.requires_grad_()
    f = objective(data=(learned, shifted))
    assert f.inputs is learned
    assert f.targets is shifted
    assert [id(p) for p in f.parameters()] == [id(learned)]
    f(f.initial_point()).backward()
    output = f.model(inputs).detach()
    assert shifted.grad is not None
    torch.testing.assert_close(shifted.grad, 2 * (targets.detach() - output) / len(targets))
    assert learned.grad is not None


def test_stale_references_are_refused() -> None:
    model = network()
    held = list(model.parameters())

    def penalised(output: Tensor, targets: Tensor) -> Tensor:
        return functional.mse_loss(output, targets) + held[2].square().sum()

    with pytest.raises(ValueError, match=r"model or loss uses the parameter 2\.weight through"):
        objective(model, loss=penalised)


# --- bad input -----------------------------------------------------------------------------------


def frozen() -> nn.Module:
    return network().requires_grad_(False)


def mixed() -> nn.Module:
    model = network()
    model[2].float()
    return model


def scattered() -> nn.Module:
    model = network()
    model[2].to("meta")
    return model


BAD: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "model": (lambda: objective(functional.tanh), TypeError, "model must be an nn.Module"),
    "model class": (lambda: objective(nn.Linear), TypeError, "model must be an nn.Module"),
    "nothing trained": (
        lambda: objective(frozen()),
        ValueError,
        "model must have parameters that require grad",
    ),
    "no parameters": (lambda: objective(nn.Tanh()), ValueError, "model must have parameters"),
    "lazy": (
        lambda: objective(nn.Sequential(nn.LazyLinear(1))),
        ValueError,
        r"model must be initialised, 0\.weight has no shape yet",
    ),
    "mixed": (
        lambda: objective(mixed()),
        ValueError,
        r"one dtype, got torch\.float32, torch\.float64",
    ),
    "devices": (lambda: objective(scattered()), ValueError, "on one device, got cpu, meta"),
    "complex": (
        lambda: objective(nn.Linear(2, 1, dtype=torch.complex128)),
        ValueError,
        r"real parameters, got dtype torch\.complex128",
    ),
    "loss": (lambda: objective(loss=1.0), TypeError, "loss must be callable, "),
    "loss class": (lambda: objective(loss=nn.MSELoss), TypeError, "loss .*the class MSELoss"),
    "loss without reduction": (
        lambda: objective(loss=nn.MSELoss(reduction="none")),
        ValueError,
        r"loss must return one number.*shape \(20, 1\).*reduction=",
    ),
    "loss a number": (
        lambda: objective(loss=lambda output, targets: 1.0),
        TypeError,
        "loss must return a floating-point tensor, got float 1.0",
    ),
    "data": (lambda: objective(data=torch.ones(2)), TypeError, "data must be a pair"),
    "data of three": (lambda: objective(data=(1, 2, 3)), TypeError, "data must be a pair"),
    "data of lists": (
        lambda: objective(data=(regression()[0], [1.0])),
        TypeError,
        "data must hold tensors, targets is list",
    ),
    "batch": (
        lambda: objective().unflatten(torch.zeros(2, 33, dtype=F64)),
        ValueError,
        r"x must be one point of shape \(33,\), got \(2, 33\)",
    ),
    "dtype": (
        lambda: objective().load(torch.zeros(33)),
        ValueError,
        r"x has dtype torch\.float32",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_bad_input_is_named(name: str) -> None:
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
