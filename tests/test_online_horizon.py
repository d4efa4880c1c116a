"""Sensitivities through K steps are those of the truncated stopping index, on every route."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from online_runs import STILL, Bumpy, D, adam_signals, last_signals, leaf, random
from torch import Tensor

import discrete.online.window
from discrete import SGDOLA, AdamOLA, TorchOptimizer, Truncated, stopping_index
from ode_stopping import LossValue

HORIZONS = [1, 2, 3, 5, 20]


def truncated(
    kind: type[torch.optim.Optimizer],
    start: Tensor,
    losses: list[float],
    horizon: int,
    options: dict[str, Any],
) -> dict[str, float]:
    """-dN/du from Definition 3, at a target between the last two losses."""
    numbers = {
        name: tuple(map(leaf, value)) if isinstance(value, tuple) else leaf(value)
        for name, value in options.items()
        if not isinstance(value, bool)
    }
    fixed = {name: value for name, value in options.items() if isinstance(value, bool)}
    update = TorchOptimizer(kind, Bumpy(), **numbers, **fixed)
    found = stopping_index(
        update,
        update.initial_state(start),
        LossValue(Bumpy(), position=update.position),
        (losses[-1] + losses[-2]) / 2,
        gradient=Truncated(steps=horizon),
    )
    assert found.index == len(losses) - 1
    flat = {n: v for n, v in numbers.items() if not isinstance(v, tuple)}
    flat |= {f"beta{i + 1}": beta for i, beta in enumerate(numbers.get("betas", ()))}
    slopes = torch.autograd.grad(found.steps, list(flat.values()))
    by_u = {
        name: (1 - value) if name.startswith("beta") or name == "momentum" else value
        for name, value in flat.items()
    }
    return {
        name: -float(slope) * float(by_u[name].detach())
        for name, slope in zip(flat, slopes, strict=True)
    }


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_against_the_stopping_index(horizon: int, decay: float, decoupled: bool) -> None:
    start, names = random(6, seed=1), ("lr", "beta1", "beta2")
    options: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.999)}
    if decay:
        options["weight_decay"] = decay
        names = (*names, "weight_decay")
    elif decoupled:
        options["weight_decay"] = 0.3  # AdamW's own default is not 0
        names = (*names, "weight_decay")
    x = leaf(start)
    optimizer = AdamOLA(
        [x],
        adapt=names,
        adapt_rate=STILL,
        horizon=horizon,
        decoupled_weight_decay=decoupled,
        **options,
    )
    signals, losses = last_signals(optimizer, lambda: Bumpy()(x), 9)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    expected = truncated(kind, start, losses, horizon, options)
    assert set(signals) == set(expected) == set(names)
    for name in names:
        assert signals[name] == pytest.approx(expected[name], rel=1e-10), name
    # Longer than the run so far is the run so far.
    if horizon == 20:
        assert signals == pytest.approx(truncated(kind, start, losses, 9, options), rel=1e-10)


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_sgd_against_the_stopping_index(horizon: int, nesterov: bool, decay: float) -> None:
    start, names = random(6, seed=1), ("lr", "momentum")
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.8, "nesterov": nesterov}
    if decay:
        options["weight_decay"] = decay
        names = (*names, "weight_decay")
    x = leaf(start)
    optimizer = SGDOLA([x], adapt=names, adapt_rate=STILL, horizon=horizon, **options)
    signals, losses = last_signals(optimizer, lambda: Bumpy()(x), 9)
    expected = truncated(torch.optim.SGD, start, losses, horizon, options)
    assert set(signals) == set(expected) == set(names)
    for name in names:
        # d/d momentum is 0 through one step but for the buffer, which was none at the start.
        assert signals[name] == pytest.approx(expected[name], rel=1e-10), name


def test_gradient_descent_without_momentum() -> None:
    start, x = random(6, seed=1), leaf(random(6, seed=1))
    optimizer = SGDOLA([x], 0.05, momentum=0.0, adapt_rate=STILL, horizon=4)
    signals, losses = last_signals(optimizer, lambda: Bumpy()(x), 9)
    expected = truncated(torch.optim.SGD, start, losses, 4, {"lr": 0.05})
    assert signals["lr"] == pytest.approx(expected["lr"], rel=1e-10)


def test_one_step_of_the_rate_is_the_product_and_the_window_alike() -> None:
    # Without window, and with one: ("lr", "beta1") over one step needs it.
    found = []
    for names in (("lr",), ("lr", "beta1")):
        x = leaf(random(6, seed=1))
        optimizer = AdamOLA([x], 0.05, adapt=names, adapt_rate=STILL, weight_decay=0.1)
        found.append(last_signals(optimizer, lambda x=x: Bumpy()(x), 9)[0]["lr"])
    assert found[0] == pytest.approx(found[1], rel=1e-12)


# --- several tensors, groups, moving hyperparameters: against plain autograd ----------------------


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_two_groups_that_the_hessian_couples(
    horizon: int, decoupled: bool, deterministic: bool, device: torch.device
) -> None:
    starts = [p.to(device) for p in (random(2, 2, seed=1), random(1, seed=2), random(1, seed=3))]
    pieces = [leaf(s) for s in starts]
    # Rates of their own, and a third group that is not adapted but through which the others act.
    optimizer = AdamOLA(
        [
            {"params": pieces[:1], "lr": 0.03, "weight_decay": 0.1},
            {"params": pieces[1:2], "betas": (0.7, 0.95)},
            {"params": pieces[2:], "lr": 0.1, "adapt_rate": 0.0},
        ],
        lr=0.05,
        adapt=("lr", "beta1", "beta2"),
        adapt_rate=STILL,
        horizon=horizon,
        decoupled_weight_decay=decoupled,
        deterministic=deterministic,
    )
    signals, _ = last_signals(optimizer, lambda: Bumpy()(*pieces), 8)
    common = {"betas": (0.9, 0.999), "decoupled": decoupled}
    options = [
        {**common, "lr": [0.03] * 8, "weight_decay": 0.1},
        {**common, "lr": [0.05] * 8, "betas": (0.7, 0.95)},
        {**common, "lr": [0.1] * 8, "active": False},
    ]
    # Weight decay is fixed, so that what it descends is part of f.
    expected = adam_signals(Bumpy(), starts, options, 8, min(horizon, 8), penalised=True)
    for name in ("lr", "beta1", "beta2"):
        assert signals[name] == pytest.approx(expected[name], rel=1e-10), name


@pytest.mark.parametrize("horizon", [1, 3, 5])
def test_every_step_has_its_own_rate(horizon: int) -> None:
    start = random(6, seed=1)
    x = leaf(start)
    optimizer = AdamOLA([x], 0.02, adapt_rate=2.0, horizon=horizon)
    last_signals(optimizer, lambda: Bumpy()(x), 12)
    rates = [0.02, *optimizer.history.rates]
    assert max(rates) > 1.5 * min(rates)
    for steps in (2, 7, 12):
        options = [{"lr": rates, "betas": (0.9, 0.999)}]
        expected = adam_signals(Bumpy(), [start], options, steps, min(horizon, steps))["lr"]
        assert optimizer.history.signals["lr"][steps - 1] == pytest.approx(expected, rel=1e-9)


def test_a_part_with_a_linear_loss() -> None:
    # Its gradient has no graph: no second derivative, but the other part has one.
    starts = [random(3, seed=1), random(2, seed=2)]
    x, y = leaf(starts[0]), leaf(starts[1])
    slope = torch.tensor([0.3, -0.2], dtype=D)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return torch.log(torch.cosh(x)).sum() + slope @ y + 10.0

    for alone in (False, True):
        pieces = [leaf(starts[1])] if alone else [x, y]
        optimizer = AdamOLA(pieces, 0.02, adapt_rate=STILL, horizon=4)
        whole = (lambda p=pieces: slope @ p[0]) if alone else (lambda p=pieces: loss(*p))
        signals, _ = last_signals(optimizer, whole, 7)
        begin = starts[1:] if alone else starts
        options = [{"lr": [0.02] * 7, "betas": (0.9, 0.999)}] * len(begin)
        # Plain autograd has to be shown a graph: 0 y^2.
        full = (
            (lambda y: slope @ y + 0 * y.square().sum())
            if alone
            else (lambda x, y: loss(x, y) + 0 * y.square().sum())
        )
        expected = adam_signals(full, begin, options, 7, 4)
        assert signals["lr"] == pytest.approx(expected["lr"], rel=1e-10)


# --- planted errors -------------------------------------------------------------------------------


def adam_gap(horizon: int) -> float:
    x = leaf(random(6, seed=1))
    names = ("lr", "beta1", "beta2")
    optimizer = AdamOLA([x], 0.05, adapt=names, adapt_rate=STILL, horizon=horizon)
    signals, _ = last_signals(optimizer, lambda: Bumpy()(x), 9)
    options = [{"lr": [0.05] * 9, "betas": (0.9, 0.999)}]
    expected = adam_signals(Bumpy(), [random(6, seed=1)], options, 9, horizon)
    return max(abs(signals[n] / expected[n] - 1) for n in names)


def test_a_planted_error_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    assert adam_gap(3) < 1e-10
    step = discrete.online.window._Step
    right = step.curvature

    def no_curvature(self: Any, vectors: Any) -> list[Tensor]:
        return [torch.zeros_like(v) for v in vectors]

    def wrong_sign(self: Any, vectors: Any) -> list[Tensor]:
        return [-v for v in right(self, vectors)]

    for wrong in (no_curvature, wrong_sign):
        monkeypatch.setattr(step, "curvature", wrong)
        assert adam_gap(1) < 1e-10  # no Hessian in it
        assert adam_gap(3) > 1e-3
    monkeypatch.setattr(step, "curvature", right)
    old = AdamOLA.step_map

    def forgets_the_buffers(*args: Any, **named: Any) -> Any:
        x, buffers = old(*args, **named)
        return x, tuple(b.detach() + 0 * x.sum() for b in buffers)

    monkeypatch.setattr(AdamOLA, "step_map", staticmethod(forgets_the_buffers))
    assert adam_gap(3) > 1e-3
