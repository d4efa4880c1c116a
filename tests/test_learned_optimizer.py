"""Learned rules as optimisers of torch's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from learned_loops import CURVATURE, X0, quadratic, rnnprop_path, trained
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from discrete.learned import (
    CoordinateLSTM,
    LearnedOptimizer,
    LearnedPreconditioner,
    LearnedSchedule,
    LearnedTorchOptimizer,
    RNNprop,
)

Memory = tuple[Tensor, ...]


def rules() -> dict[str, LearnedOptimizer]:
    return {
        "schedule": LearnedSchedule([0.1, 0.3, 0.2], every=2, momentum=0.4),
        "preconditioner": LearnedPreconditioner(3, rate=0.2),
        "lstm": trained(CoordinateLSTM),
        "rnnprop": trained(RNNprop),
    }


NAMES = ("schedule", "preconditioner", "lstm", "rnnprop")


def iterates(learned: LearnedOptimizer, steps: int) -> list[Tensor]:
    """Of the update on the quadratic."""
    f = quadratic()
    update = learned.update(f)
    state, path = update.initial_state(X0), []
    for k in range(steps):
        state = update(k, state)
        path.append(state[0].detach())
    return path


def descend(optimizer: LearnedTorchOptimizer, tensors: list[Tensor], steps: int) -> list[Tensor]:
    """Steps on the quadratic of all tensors side by side, and what they are after each."""
    f, path = quadratic(), []
    for _ in range(steps):
        optimizer.zero_grad()
        f(torch.cat([p.double().reshape(-1) for p in tensors])).backward()
        optimizer.step()
        path.append(torch.cat([p.detach().double().reshape(-1) for p in tensors]))
    return path


def pieces(dtypes: tuple[torch.dtype, torch.dtype] = (torch.float64, torch.float64)) -> Any:
    """X0 as a parameter of shape (2, 1) and one of shape ()."""
    return [
        nn.Parameter(X0[:2].clone().reshape(2, 1).to(dtypes[0])),
        nn.Parameter(X0[2].clone().to(dtypes[1])),
    ]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 1)
            self.inputs = torch.randn(20, 4)

    def loss(self) -> Tensor:
        found: Tensor = self.second(torch.tanh(self.first(self.inputs)))
        return (found[:, 0] - self.inputs.sum(1)).square().mean()


def train(net: Net, optimizer: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = net.loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- The same iterates ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_iterates_are_those_of_the_update(name: str) -> None:
    learned = rules()[name]
    p = nn.Parameter(X0.clone())
    found = descend(learned.optimizer([p]), [p], 6)
    for ours, theirs in zip(found, iterates(learned, 6), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-13)
    assert not any(q.grad is not None for q in learned.parameters())


@pytest.mark.parametrize("name", ["schedule", "lstm", "rnnprop"])
def test_several_parameters_are_one_problem(name: str) -> None:
    """Also in two groups, and of two types: then to the digits of the coarser one."""
    learned = rules()[name]
    tensors = pieces()
    groups = [{"params": [tensors[0]]}, {"params": [tensors[1]]}]
    found = descend(learned.optimizer(groups), tensors, 6)
    for ours, theirs in zip(found, iterates(learned, 6), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-13)
    tensors = pieces((torch.float32, torch.float64))
    optimizer = learned.optimizer(tensors)
    found = descend(optimizer, tensors, 6)
    torch.testing.assert_close(found[-1], iterates(learned, 6)[-1], rtol=0.0, atol=1e-5)
    for p in tensors:
        memory = [v for name, v in optimizer.state[p].items() if name.startswith("memory")]
        assert memory
        assert all(v.dtype == p.dtype and v.shape[: p.ndim] == p.shape for v in memory)
        assert not any(v.requires_grad for v in memory)


def test_parameters_without_gradient_stay_and_count_later() -> None:
    tensors = pieces()
    optimizer = LearnedSchedule([0.1, 0.5]).optimizer(tensors)
    tensors[0].grad = torch.ones(2, 1).double()
    optimizer.step()
    assert torch.equal(tensors[1].detach(), X0[2])
    torch.testing.assert_close(tensors[0].detach(), X0[:2].reshape(2, 1) - 0.1)
    tensors[1].grad = torch.ones(()).double()
    optimizer.step()
    # The second is at its first step, and the first at its second.
    torch.testing.assert_close(tensors[1].detach(), X0[2] - 0.1)
    torch.testing.assert_close(tensors[0].detach(), X0[:2].reshape(2, 1) - 0.6)
    before = [p.detach().clone() for p in tensors]
    optimizer.zero_grad()
    assert optimizer.step() is None
    assert all(torch.equal(p, q) for p, q in zip(tensors, before, strict=True))


def test_group_added_later() -> None:
    tensors = pieces()
    optimizer = trained(RNNprop).optimizer(tensors[:1])
    descend(optimizer, tensors, 2)
    assert torch.equal(tensors[1].detach(), X0[2])
    optimizer.add_param_group({"params": tensors[1:], "lr": 0.5})
    descend(optimizer, tensors, 1)
    assert not torch.equal(tensors[1].detach(), X0[2])
    assert [optimizer.state[p]["step"] for p in tensors] == [3, 1]
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]


def test_closure() -> None:
    p, f, calls = nn.Parameter(X0.clone()), quadratic(), []
    optimizer = LearnedSchedule([0.1]).optimizer([p])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = f(p)
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == f(X0).item()
    assert len(calls) == 1
    torch.testing.assert_close(p.detach(), (1 - 0.1 * CURVATURE) * X0)


# --- The factor lr --------------------------------------------------------------------------------


def test_factor_of_the_step_and_schedulers() -> None:
    """x <- (1 - lr r q) x, with the lr of torch's scheduler at each step."""
    p = nn.Parameter(X0.clone())
    optimizer = LearnedSchedule([0.1]).optimizer([p])
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    expected = X0
    for k in range(4):
        optimizer.zero_grad()
        quadratic()(p).backward()
        optimizer.step()
        scheduler.step()
        expected = (1 - 0.5**k * 0.1 * CURVATURE) * expected
        torch.testing.assert_close(p.detach(), expected, rtol=1e-13, atol=0.0)
    half = LearnedTorchOptimizer([nn.Parameter(X0)], learned=LearnedSchedule([0.1]), lr=0.5)
    assert half.param_groups[0]["lr"] == 0.5


# --- States and copies ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["schedule", "lstm", "rnnprop"])
def test_state_dict_goes_on_bit_by_bit(name: str) -> None:
    learned, net = rules()[name], Net()
    straight = train(net, learned.optimizer(net.parameters()), 8)
    net = Net()
    optimizer = learned.optimizer(net.parameters())
    begun = train(net, optimizer, 4)
    stored, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    other = Net()
    other.load_state_dict(weights)
    resumed = learned.optimizer(other.parameters())
    resumed.load_state_dict(stored)
    assert begun + train(other, resumed, 4) == straight
    assert len(set(straight)) == 8


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_bring_their_rule(how: str) -> None:
    p = nn.Parameter(X0.clone())
    optimizer = trained(RNNprop).optimizer([p])
    descend(optimizer, [p], 3)
    other: Any = (
        copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    )
    (q,) = other.param_groups[0]["params"]
    assert q is not p
    expected = descend(optimizer, [p], 3)[-1]
    assert torch.equal(descend(other, [q], 3)[-1], expected)


@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_network_in_float32(weights: torch.dtype) -> None:
    """All weights of a network are the coordinates of one problem, held against the plain loop."""
    net, learned = Net(), trained(RNNprop, weights)
    wide = copy.deepcopy(net).double()
    wide.inputs = wide.inputs.double()

    def gradient(flat: Tensor) -> Tensor:
        vector_to_parameters(flat.detach(), wide.parameters())
        return parameters_to_vector(torch.autograd.grad(wide.loss(), list(wide.parameters())))

    start = parameters_to_vector(net.parameters()).detach().double()
    expected = rnnprop_path(trained(RNNprop), gradient, start, 4)[-1].detach()
    train(net, learned.optimizer(net.parameters()), 4)
    found = parameters_to_vector(net.parameters()).detach().double()
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4)
    assert float((expected - start).abs().max()) > 0.1


# --- Bad input ------------------------------------------------------------------------------------


def test_whole_vectors_only() -> None:
    learned = LearnedPreconditioner(3)
    with pytest.raises(ValueError, match=r"one parameter of shape \(d,\); got shapes \[\(2, 1\)"):
        learned.optimizer(pieces())
    optimizer = learned.optimizer([nn.Parameter(X0.clone())])
    with pytest.raises(ValueError, match="takes whole vectors"):
        optimizer.add_param_group({"params": [nn.Parameter(X0.clone())]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="parameters must be dense and of float32 or float64"):
        trained(RNNprop).optimizer([nn.Parameter(X0.to(dtype))])


@pytest.mark.parametrize(("lr", "error"), [(-1.0, ValueError), ("1", TypeError)])
def test_bad_factor(lr: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="lr must be"):
        LearnedTorchOptimizer([nn.Parameter(X0)], learned=LearnedSchedule([0.1]), lr=lr)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = LearnedSchedule([0.1]).optimizer(table.parameters())
    table(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(TypeError, match="dense gradients"):
        optimizer.step()


def test_step_of_another_shape_is_refused() -> None:
    class Narrow(LearnedOptimizer):
        def step(
            self, k: int, gradient: Tensor, memory: Memory, norm: Tensor
        ) -> tuple[Tensor, Memory]:
            return -gradient.sum(-1, keepdim=True), ()

    p = nn.Parameter(X0.clone())
    optimizer = Narrow().optimizer([p])
    p.grad = torch.ones(3).double()
    with pytest.raises(ValueError, match=r"a step of the shape of the gradient, \(3,\)"):
        optimizer.step()
    assert torch.equal(p.detach(), X0)
