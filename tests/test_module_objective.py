"""The training loss of a network as an objective: against torch's own training, and by hand."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from networks import F64, moved, network, objective, regression, slopes_of_torch
from torch import Tensor, nn
from torch.nn import functional

from discrete import Euler, stopping_index
from ode_stopping import (
    GradientFlow,
    LossValue,
    ModuleObjective,
    Status,
    check_stopping_gradient,
    stopping_time,
)
from ode_stopping.problems import objective_gradient

# --- training is a flow --------------------------------------------------------------------------


@pytest.mark.slow
def test_training_has_a_stopping_time_with_its_gradient() -> None:
    f = objective()
    x0 = f.initial_point().requires_grad_()
    flow, criterion = GradientFlow(f), LossValue(f)
    start = float(f(x0).detach())
    result = stopping_time(flow, x0, criterion, 0.8 * start)
    assert result.status is Status.REACHED
    assert float(f(result.state).detach()) == pytest.approx(0.8 * start, rel=1e-6)
    (slope,) = torch.autograd.grad(result.time, x0)
    assert slope.shape == (33,)
    # T is the time still to go, so it falls at rate 1 along the flow: grad T . x0' = -1.
    assert float(slope @ flow(torch.tensor(0.0), x0.detach())) == pytest.approx(-1.0, rel=5e-6)
    report = check_stopping_gradient(flow, x0, criterion, 0.8 * start, directions=1)
    assert report.passed, report
    assert report.subjects == ("x0",)


def test_euler_is_gradient_descent_of_torch() -> None:
    step, count = 0.2, 60
    model = network()
    f = objective(model)
    x0 = f.initial_point()
    optimiser = torch.optim.SGD(model.parameters(), lr=step)
    losses = []
    for _ in range(count + 1):
        optimiser.zero_grad()
        loss = functional.mse_loss(model(f.inputs), f.targets)
        losses.append(float(loss.detach()))
        loss.backward()
        optimiser.step()
    target = 0.5 * (losses[count - 1] + losses[count])
    result = stopping_index(Euler(GradientFlow(f), step=step), x0, LossValue(f), target)
    assert result.index == count == next(k for k, v in enumerate(losses) if v <= target)
    expected = torch.tensor(losses, dtype=F64)
    torch.testing.assert_close(result.trajectory.losses, expected, rtol=1e-12, atol=0)
    # The optimiser has taken one step more.
    after = result.state - step * f.gradient(result.state)
    torch.testing.assert_close(f.initial_point(), after, rtol=1e-12, atol=1e-13)


def test_index_of_a_classifier_is_that_of_torch() -> None:
    torch.manual_seed(2)
    inputs, _ = regression()
    labels = (inputs.prod(1) > 0).long()
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    f = ModuleObjective(model, nn.CrossEntropyLoss(), (inputs, labels))
    result = stopping_index(
        Euler(GradientFlow(f), step=0.5), f.initial_point(), LossValue(f), 0.7, max_steps=500
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    steps = 0
    while (loss := functional.cross_entropy(model(inputs), labels)) > 0.7:
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        steps += 1
    assert result.index == steps > 3


def test_hyperparameters_of_the_loss_get_their_gradient() -> None:
    """A penalty by a closure over the model sees x: f = mse + w |x|^2, so df/dw = |x|^2."""
    model = network()
    weight = torch.tensor(0.01, dtype=F64, requires_grad=True)

    def penalised(output: Tensor, targets: Tensor) -> Tensor:
        squares = torch.stack([p.square().sum() for p in model.parameters()])
        return functional.mse_loss(output, targets) + weight * squares.sum()

    f, bare = objective(model, loss=penalised), objective(model)
    x = moved(f.initial_point())
    (slope,) = torch.autograd.grad(f(x), weight)
    assert float(slope) == pytest.approx(float(x @ x), rel=1e-13)
    expected = bare.gradient(x) + 2 * float(weight.detach()) * x
    torch.testing.assert_close(f.gradient(x).detach(), expected, rtol=1e-12, atol=1e-14)
    x0 = f.initial_point()
    start = float(f(x0).detach())
    report = check_stopping_gradient(GradientFlow(f), x0, LossValue(f), 0.9 * start)
    assert report.passed, report


# --- what x is -----------------------------------------------------------------------------------


def test_points_are_the_parameters() -> None:
    model = network()
    f = objective(model)
    x = f.initial_point()
    assert (f.dim, f.dtype, x.shape, x.requires_grad) == (33, F64, (33,), False)
    assert torch.equal(x, nn.utils.parameters_to_vector(model.parameters()).detach())
    pieces = f.unflatten(x)
    for name, parameter in model.named_parameters():
        assert torch.equal(pieces[name], parameter)
    assert float(f(x)) == float(functional.mse_loss(model(f.inputs), f.targets).detach())
    x.zero_()  # a copy
    assert float(f.initial_point().norm()) > 0
    one = nn.Linear(2, 1, bias=False).double()  # a single parameter needs no cat
    objective(one).initial_point().zero_()
    assert float(one.weight.detach().norm()) > 0


def test_unflatten_carries_the_graph() -> None:
    f = objective()
    x = moved(f.initial_point()).requires_grad_()
    pieces = f.unflatten(x)
    assert {name: p.shape for name, p in pieces.items()} == {
        name: p.shape for name, p in f.model.named_parameters()
    }
    (slope,) = torch.autograd.grad(pieces["2.weight"].sum(), x)
    assert slope.nonzero().flatten().tolist() == list(range(24, 32))


def test_load_trains_the_model() -> None:
    model = network()
    f = objective(model)
    x = moved(f.initial_point()).requires_grad_()
    before = [id(p) for p in model.parameters()]
    f.load(x)
    assert torch.equal(f.initial_point(), x.detach())
    assert [id(p) for p in model.parameters()] == before
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    value = functional.mse_loss(model(f.inputs), f.targets)
    assert float(value.detach()) == float(f(x).detach())
    with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 33\)"):
        f.load(x[:-1])


def test_only_what_requires_grad_is_part_of_x() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    f = objective(model)
    assert f.dim == 33 - 16
    x = moved(f.initial_point())
    torch.testing.assert_close(f.gradient(x), slopes_of_torch(f, x), rtol=1e-12, atol=1e-14)
    before = f(x)
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    assert not torch.equal(f(x), before)


class Tied(nn.Module):
    """w appears twice: in two layers, or in one that is used twice."""

    def __init__(self, *, reused: bool) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, dtype=F64)
        self.second = self.first if reused else nn.Linear(2, 2, dtype=F64)
        self.second.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(inputs))).sum(-1, keepdim=True)


@pytest.mark.parametrize("reused", [False, True])
def test_shared_parameters_are_one(reused: bool) -> None:
    model = Tied(reused=reused)
    f = objective(model)
    assert f.dim == (4 + 2 if reused else 4 + 2 + 2)
    x = moved(f.initial_point())
    torch.testing.assert_close(f.gradient(x), slopes_of_torch(f, x), rtol=1e-12, atol=1e-14)
    w, b, c = x[:4].view(2, 2), x[4:6], x[-2:]
    output = (torch.tanh(f.inputs @ w.T + b) @ w.T + c).sum(-1, keepdim=True)
    assert float(f(x)) == pytest.approx(float(functional.mse_loss(output, f.targets)), rel=1e-13)
    # The model has its own parameters back.
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert model.first.weight is model.second.weight
    assert not torch.equal(f.initial_point(), x)


def test_shared_buffers_are_one() -> None:
    """Two layers that keep their statistics in the same buffers: the second sees the first's."""

    class Shift(nn.Module):
        def __init__(self, mean: Tensor) -> None:
            super().__init__()
            self.register_buffer("mean", mean)

        def forward(self, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                self.mean.add_(1.0)
            return inputs + self.mean

    mean = torch.zeros(1, dtype=F64)
    f = objective(nn.Sequential(Shift(mean), nn.Linear(2, 1, dtype=F64), Shift(mean)))
    x = moved(f.initial_point())
    output = (f.inputs + 1.0) @ x[:2, None] + x[2] + 2.0
    for _ in range(2):
        assert float(f(x)) == pytest.approx(float((output - f.targets).square().mean()), rel=1e-13)
    assert float(mean) == 0.0


@pytest.mark.parametrize("kind", ["LSTM", "spectral_norm", "layer_norm"])
def test_modules_with_a_life_of_their_own(kind: str) -> None:
    """An LSTM keeps its parameters in a list besides; a parametrisation computes them."""
    torch.manual_seed(3)

    class Last(nn.Module):
        def forward(self, both: tuple[Tensor, Any]) -> Tensor:
            return both[0][:, -1].sum(-1, keepdim=True)

    inputs, targets = regression()
    models = {
        "LSTM": lambda: nn.Sequential(
            nn.Unflatten(1, (2, 1)), nn.LSTM(1, 3, batch_first=True), Last()
        ),
        "spectral_norm": lambda: nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(2, 3)), nn.Tanh(), nn.Linear(3, 1)
        ),
        "layer_norm": lambda: nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1)),
    }
    # In eval mode a spectral norm is taken along fixed vectors, which makes it differentiable.
    model = models[kind]().double().eval()
    f = ModuleObjective(model, functional.mse_loss, (inputs, targets))
    x = moved(f.initial_point())
    expected = slopes_of_torch(f, x)
    assert float(expected.norm()) > 1e-3
    torch.testing.assert_close(f.gradient(x), expected, rtol=1e-11, atol=1e-13)
    assert torch.autograd.gradcheck(f.gradient, (x.requires_grad_(),), fast_mode=True)


# --- batches, modes, copies ----------------------------------------------------------------------


@pytest.mark.parametrize("middle", [[], [nn.BatchNorm1d(8)]], ids=["plain", "batch-norm"])
def test_batches_of_points(middle: list[nn.Module]) -> None:
    f = objective(network(*middle))
    x = torch.stack([moved(f.initial_point(), seed) for seed in range(6)]).reshape(2, 3, -1)
    value, slope = f(x), f.gradient(x)
    assert value.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert torch.equal(value[i, j], f(x[i, j]))
            torch.testing.assert_close(slope[i, j], f.gradient(x[i, j]), rtol=1e-13, atol=1e-15)
    assert f(x[:0]).shape == (0, 3)


def test_gradient_is_that_of_torch_in_every_mode() -> None:
    f = objective()
    x = moved(f.initial_point())
    expected = slopes_of_torch(f, x)
    with torch.no_grad():
        quiet = objective_gradient(f, x)
    assert not quiet.requires_grad
    assert not f(x).requires_grad
    loud = f.gradient(x.requires_grad_())
    assert loud.requires_grad
    for slope in (quiet, loud.detach()):
        torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(f.gradient, (x,))


def test_conversion_and_copies() -> None:
    f = objective(network(nn.BatchNorm1d(8)))
    x = moved(f.initial_point())
    for twin in (copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert torch.equal(twin(x), f(x))
        assert twin.model is not f.model
    value = f(x)
    f.float()
    assert f.dtype == f.inputs.dtype == f.initial_point().dtype == torch.float32
    assert f.model[1].running_mean.dtype == torch.float32
    assert f(x.float()).dtype == torch.float32
    assert float(f(x.float())) == pytest.approx(float(value), rel=1e-5)
    labels = torch.zeros(20, dtype=torch.long)
    classes = ModuleObjective(
        nn.Linear(2, 2).double(), nn.CrossEntropyLoss(), (regression()[0], labels)
    )
    assert classes.float().targets.dtype == torch.long
    assert "dim=6" in repr(classes)
