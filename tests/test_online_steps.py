"""The steps themselves are those of torch.optim; and torch's own tools work with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from online_runs import STILL, Bumpy, D, closure_of, leaf, random
from torch import Tensor, nn

from discrete import SGDOLA, AdamHD, AdamOLA

ADAM: dict[str, dict[str, Any]] = {
    "plain": {},
    "betas": {"betas": (0.5, 0.9), "eps": 1e-3},
    "no averages": {"betas": (0.0, 0.0), "eps": 1e-2},
    "weight decay": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
}
SGD: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
}


def net(dtype: torch.dtype, device: torch.device) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).to(device, dtype)


def distance(
    mine: Callable[[Any], torch.optim.Optimizer],
    theirs: Callable[[Any], torch.optim.Optimizer],
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Between two runs on a small network, relative to how far they went."""
    x, y = random(20, 4, seed=1).to(device, dtype), random(20, 1, seed=2).to(device, dtype)
    models = [net(dtype, device), net(dtype, device)]
    for model, make in zip(models, (mine, theirs), strict=True):
        optimizer = make(model.parameters())
        closure = closure_of(optimizer, lambda m=model: (m(x) - y).square().mean())
        for _ in range(50):
            optimizer.step(closure)
    start, (one, other) = net(dtype, device), models
    gaps = [
        ((a - b).abs().max() / (b - s).abs().max()).item()
        for a, b, s in zip(one.parameters(), other.parameters(), start.parameters(), strict=True)
    ]
    return max(gaps)


@pytest.mark.parametrize("name", ADAM)
@pytest.mark.parametrize(("dtype", "tolerance"), [(D, 1e-14), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", [{}, {"horizon": 2}, {"deterministic": True}])
def test_without_adaptation_it_is_adam(
    name: str, dtype: torch.dtype, tolerance: float, options: dict[str, Any], device: torch.device
) -> None:
    case = dict(ADAM[name])
    decoupled = case.get("decoupled_weight_decay", False)
    named = {n: v for n, v in case.items() if n != "decoupled_weight_decay"}
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    gap = distance(
        lambda p: AdamOLA(p, 0.01, adapt_rate=0.0, **case, **options),
        lambda p: kind(p, 0.01, **named),
        dtype,
        device,
    )
    assert gap < tolerance


@pytest.mark.parametrize("name", SGD)
@pytest.mark.parametrize(("dtype", "tolerance"), [(D, 1e-15), (torch.float32, 1e-6)])
@pytest.mark.parametrize("options", [{}, {"horizon": 2}, {"deterministic": True}])
def test_without_adaptation_it_is_sgd(
    name: str, dtype: torch.dtype, tolerance: float, options: dict[str, Any], device: torch.device
) -> None:
    gap = distance(
        lambda p: SGDOLA(p, 0.02, adapt_rate=0.0, **SGD[name], **options),
        lambda p: torch.optim.SGD(p, 0.02, **SGD[name]),
        dtype,
        device,
    )
    assert gap < tolerance


def test_a_planted_difference_is_seen() -> None:
    def gap(**options: Any) -> float:
        return distance(
            lambda p: AdamOLA(p, 0.01, adapt_rate=0.0, **options),
            lambda p: torch.optim.Adam(p, 0.01),
            D,
            torch.device("cpu"),
        )

    assert gap() < 1e-14
    for wrong in ({"eps": 1e-6}, {"betas": (0.9, 0.998)}, {"weight_decay": 1e-3}):
        assert gap(**wrong) > 1e-6


def test_a_parameter_without_gradient_stays_and_does_not_count() -> None:
    # As in torch: its average starts at the first step that it takes part in.
    pieces, others = [[leaf(random(3, seed=i)) for i in (1, 2)] for _ in range(2)]
    mine = AdamOLA(pieces, 0.02, adapt_rate=0.0, horizon=2)
    theirs = torch.optim.Adam(others, 0.02)
    for k in range(12):
        use = k not in (0, 1, 6)
        for optimizer, (a, b) in ((mine, pieces), (theirs, others)):
            optimizer.step(
                closure_of(optimizer, lambda a=a, b=b, u=use: Bumpy()(a, b if u else b.detach()))
            )
        if k < 2:
            assert torch.equal(pieces[1].detach(), random(3, seed=2))
    for mine_, their in zip(pieces, others, strict=True):
        assert (mine_ - their).abs().max() < 1e-14
    assert [mine.state[p]["step"] for p in pieces] == [12, 9]


def test_mixed_dtypes_and_shapes() -> None:
    # Bundles of their own; one signal.
    pieces = [leaf(1.5), leaf(random(2, 3)), leaf(random(4), torch.float32), leaf([])]
    optimizer = AdamOLA(pieces, 0.01, horizon=3, adapt=("lr", "beta1"))
    loss = lambda: sum(p.double().cosh().sum() for p in pieces)  # noqa: E731
    closure = closure_of(optimizer, loss)
    before = float(loss().detach())
    for _ in range(30):
        optimizer.step(closure)
    assert float(loss().detach()) < before
    assert optimizer.history.counts()["larger"] > 20
    assert [p.dtype for p in pieces] == [D, D, torch.float32, D]


def test_channels_last_and_transposed_parameters() -> None:
    # The layout of a parameter is its buffers', and the gradient's may be another.
    a = leaf(random(2, 3, 4, 4)).detach().to(memory_format=torch.channels_last).requires_grad_()
    b = random(3, 5).t().requires_grad_()
    assert not b.is_contiguous()
    c, d = leaf(a.detach().contiguous()), leaf(b.detach().contiguous())
    found = []
    for one, two in ((a, b), (c, d)):
        optimizer = AdamOLA([one, two], 0.01, horizon=2)
        closure = closure_of(
            optimizer, lambda o=one, t=two: o.cosh().sum() + (t @ t.t()).square().mean()
        )
        for _ in range(6):
            optimizer.step(closure)
        found.append((one.detach(), two.detach(), optimizer.history.rates))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-13)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-13)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-12)


def test_a_rate_that_is_a_tensor() -> None:
    rates = []
    for lr in (0.03, torch.tensor(0.03, dtype=D)):
        x = leaf(random(6, seed=1))
        optimizer = AdamOLA([x], lr)
        closure = closure_of(optimizer, lambda x=x: Bumpy()(x))
        for _ in range(5):
            optimizer.step(closure)
        rates.append(optimizer.history.rates)
    assert rates[0] == rates[1]


# --- torch's own tools ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AdamOLA, SGDOLA, AdamHD])
def test_a_scheduler(kind: type[Any]) -> None:
    x = leaf(random(6, seed=1))
    extra = {"hypergradient_lr": 0.0} if kind is AdamHD else {"adapt_rate": STILL}
    optimizer = kind([x], 0.02, **extra)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    closure = closure_of(optimizer, lambda: Bumpy()(x))
    for _ in range(9):
        optimizer.step(closure)
        scheduler.step()
    expected = [0.02] * 3 + [0.01] * 3 + [0.005] * 3
    assert optimizer.history.rates == pytest.approx(expected, rel=1e-12)


def test_a_scheduler_and_the_adaptation_are_multiplied() -> None:
    # StepLR multiplies the rate that it finds, so both have their say; the signal of a scaled
    # objective tells them apart: at the first step both runs are the same.
    x, y = leaf(random(6, seed=1)), leaf(random(6, seed=1))
    plain, scheduled = AdamOLA([x], 1e-4), AdamOLA([y], 1e-4)
    scheduler = torch.optim.lr_scheduler.StepLR(scheduled, step_size=1, gamma=0.9)
    for optimizer, p in ((plain, x), (scheduled, y)):
        closure = closure_of(optimizer, lambda p=p: Bumpy()(p))
        for _ in range(10):
            optimizer.step(closure)
            if optimizer is scheduled:
                scheduler.step()
    for k, (a, b) in enumerate(zip(plain.history.rates, scheduled.history.rates, strict=True)):
        assert b == pytest.approx(a * 0.9**k, rel=1e-3)


@pytest.mark.parametrize("kind", [AdamOLA, SGDOLA, AdamHD])
def test_hooks_and_zero_grad(kind: type[Any]) -> None:
    x = leaf(random(6, seed=1))
    optimizer = kind([x], 0.01)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step(closure_of(optimizer, lambda: Bumpy()(x)))
    assert calls == ["before", "after"]
    optimizer.zero_grad()
    assert x.grad is None
    assert kind.__name__ in repr(optimizer)


def test_under_no_grad_and_with_grad() -> None:
    found = []
    for context in (torch.no_grad(), torch.enable_grad()):
        x = leaf(random(6, seed=1))
        optimizer = AdamOLA([x], 0.01, horizon=2)
        closure = closure_of(optimizer, lambda x=x: Bumpy()(x))
        with context:
            for _ in range(4):
                optimizer.step(closure)
        assert x.grad is not None
        assert not x.grad.requires_grad
        found.append(x.detach())
    assert torch.equal(found[0], found[1])


def test_what_step_returns() -> None:
    for horizon in (1, 2):
        x = leaf([2.0])
        optimizer = AdamOLA([x], 0.01, horizon=horizon)
        loss = optimizer.step(closure_of(optimizer, lambda x=x: x.square().sum()))
        assert float(loss.detach()) == 4.0
        # With a horizon the graph belongs to the window.
        assert loss.requires_grad == (horizon == 1)


def test_a_number_for_a_loss() -> None:
    x = leaf([2.0])
    optimizer = AdamOLA([x], 0.01)

    def closure() -> float:
        x.grad = 2 * x.detach()
        return x.item() ** 2

    assert optimizer.step(closure) == 4.0
    assert optimizer.history.action == ["larger"]


def test_a_closure_that_hands_in_tensors_of_other_shapes() -> None:
    x = leaf([2.0])
    optimizer = AdamOLA([x], 0.01)
    assert optimizer.step(closure_of(optimizer, lambda: x.square())).shape == (1,)

    def closure() -> Tensor:
        x.grad = 2 * x.detach()
        return x.detach().square().to(torch.bfloat16)

    # In half precision a change of 1 % is within the rounding.
    with pytest.raises(ValueError, match="float32"):
        optimizer.step(closure)
