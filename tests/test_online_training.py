"""What training scripts do besides: weight decay, clipping, zero_grad outside, freezing, ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from online_runs import D, closure_of, leaf, random
from torch import Tensor, nn

from discrete import SGDOLA, AdamOLA

STILL = 1e-300


def curved(x: Tensor) -> Tensor:
    """A convex function with its minimum away from 0."""
    scales = torch.arange(1.0, 6.0, dtype=D)
    return (scales * (x - 1.0) ** 2 + 0.1 * x**4).sum()


@pytest.mark.parametrize("kind", [AdamOLA, SGDOLA])
def test_coupled_weight_decay_is_the_penalty_written_into_the_loss(kind: type[Any]) -> None:
    # In every number: the steps, the signals, the rate.
    found = []
    for decay, written in ((0.3, 0.0), (0.0, 0.3)):
        x = leaf(random(5, seed=1))
        optimizer = kind([x], 0.01, weight_decay=decay)
        closure = closure_of(
            optimizer, lambda x=x, w=written: curved(x) + 0.5 * w * x.square().sum()
        )
        for _ in range(40):
            optimizer.step(closure)
        found.append((x.detach(), optimizer.history))
    (x, mine), (y, other) = found
    torch.testing.assert_close(x, y, rtol=1e-9, atol=0)
    assert mine.action == other.action
    assert mine.rates == pytest.approx(other.rates, rel=1e-9)
    assert mine.signals["lr"] == pytest.approx(other.signals["lr"], rel=1e-6)
    assert mine.loss != pytest.approx(other.loss)  # the history has the loss of the closure


def test_decoupled_weight_decay_is_judged_with_its_metric() -> None:
    x = leaf(random(5, seed=1))
    optimizer = AdamOLA([x], 0.02, weight_decay=0.2, decoupled_weight_decay=True, adapt_rate=STILL)
    closure = closure_of(optimizer, lambda: curved(x))
    for _ in range(7):
        began = x.detach().clone()
        optimizer.step(closure)
    ended, state = x.detach(), optimizer.state[x]
    metric = (state["exp_avg_sq"] / (1 - 0.999**7)).sqrt() + 1e-8
    penalty = 0.1 * (metric * (ended.square() - began.square())).sum()
    change = float(curved(ended) - curved(began) + penalty)
    slope = 2 * torch.arange(1.0, 6.0, dtype=D) * (ended - 1.0) + 0.4 * ended**3
    product = float((slope + 0.2 * metric * ended) @ (began - ended))
    assert optimizer.history.signals["lr"][-1] == pytest.approx(product / abs(change), rel=1e-9)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_rate_does_not_collapse_where_weight_decay_is_what_is_left_to_do(
    deterministic: bool,
) -> None:
    # The start is the minimum of the loss: every useful step raises it.
    x = leaf(torch.ones(5))
    optimizer = AdamOLA([x], 1e-3, weight_decay=1.0, deterministic=deterministic)
    scales = torch.arange(1.0, 6.0, dtype=D)
    closure = closure_of(optimizer, lambda: (scales * (x - 1.0) ** 2).sum())
    for _ in range(60):
        optimizer.step(closure)
    assert optimizer.history.rates[20] > 2e-3
    assert optimizer.history.counts()["larger"] > 15
    # Judged by the loss alone each of the first steps would be backed off.
    history = optimizer.history
    for before, after in zip(history.loss[:9], history.after[:9], strict=True):
        assert after is not None
        assert after > before


def test_clipping_here_leaves_the_signal_whole() -> None:
    x, y = leaf(random(5, seed=1)), leaf(random(5, seed=1))
    clipped = AdamOLA([x], 0.01, max_grad_norm=0.01, adapt_rate=STILL)
    plain = AdamOLA([y], 0.01, adapt_rate=STILL, eps=1e-8)
    for optimizer, z in ((clipped, x), (plain, y)):
        closure = closure_of(optimizer, lambda z=z: curved(z))
        optimizer.step(closure)
    # Adam's first step does not know the length of the gradient (but for eps).
    torch.testing.assert_close(x.detach(), y.detach(), rtol=1e-5, atol=0)
    assert clipped.history.signals["lr"] == pytest.approx(plain.history.signals["lr"], rel=1e-4)
    assert float(clipped.state[x]["exp_avg"].norm()) == pytest.approx(0.1 * 0.01, rel=1e-12)


def test_clipping_is_over_all_parameters_and_groups() -> None:
    x, y = leaf([3.0]), leaf([4.0])
    optimizer = SGDOLA([{"params": [x]}, {"params": [y], "lr": 0.5}], 1.0, max_grad_norm=1.0)
    optimizer.step(closure_of(optimizer, lambda: 0.5 * (x.square() + y.square()).sum()))
    assert x.item() == pytest.approx(3.0 - 0.6)
    assert y.item() == pytest.approx(4.0 - 0.5 * 0.8)
    with pytest.raises(ValueError, match="max_grad_norm with horizon"):
        AdamOLA([x], max_grad_norm=1.0, horizon=2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_zero_grad_may_be_left_to_the_loop(deterministic: bool) -> None:
    found = []
    for inside in (True, False):
        x = leaf(random(5, seed=1))
        optimizer = AdamOLA([x], 0.01, deterministic=deterministic)

        def closure(x: Tensor = x, inside: bool = inside, o: AdamOLA = optimizer) -> Tensor:
            if inside:
                o.zero_grad()
            loss = curved(x)
            loss.backward()
            return loss

        for _ in range(20):
            optimizer.zero_grad()
            optimizer.step(closure)
        found.append((x.detach().clone(), optimizer.history.rates))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_layer_that_is_frozen_stays(deterministic: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(D)
    data = random(20, 3, seed=2)
    optimizer = AdamOLA(model.parameters(), 1e-2, deterministic=deterministic)
    closure = closure_of(optimizer, lambda: model(data).square().mean())
    for _ in range(5):
        optimizer.step(closure)
    model[0].requires_grad_(False)
    frozen = model[0].weight.detach().clone()
    for _ in range(5):
        optimizer.step(closure)
    assert torch.equal(model[0].weight, frozen)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    x = leaf([1.0])
    optimizer = AdamOLA([x])
    with pytest.raises(RuntimeError, match="one process"):
        optimizer.step(closure_of(optimizer, lambda: x.square().sum()))


def test_options_of_torch_that_are_not_here_are_named() -> None:
    with pytest.raises(TypeError, match="AdamOLA has no option 'amsgrad'"):
        AdamOLA([leaf([1.0])], amsgrad=True)
    with pytest.raises(TypeError):  # torch's third and fourth are dampening and weight decay
        SGDOLA([leaf([1.0])], 0.1, 0.9, 0.0, 1e-4)  # type: ignore[misc]
