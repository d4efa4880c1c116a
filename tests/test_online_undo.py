"""Steps that are taken back, and what is told where that does not help."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from typing import Any

import pytest
import torch
from online_runs import D, closure_of, leaf, random
from torch import Tensor

from discrete import SGDOLA, AdamOLA
from discrete.online.closures import evaluate
from discrete.online.rules import Observation
from ode_stopping.core.status import DivergedError


def barrier(*pieces: Tensor) -> Tensor:
    """NaN outside of (-1, 1)."""
    return sum((-torch.log(1 - p.square()).sum() + 0.3 * p.sum() for p in pieces), torch.zeros(()))


def everything(optimizer: Any) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("kind", [AdamOLA, SGDOLA])
@pytest.mark.parametrize("options", [{}, {"deterministic": True}, {"horizon": 3}])
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_a_step_out_of_the_domain_is_taken_back(
    kind: type[Any], options: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> None:
    # 1/3 and 0.7 are no binary fractions: x - d + d would not be x.
    a, b = leaf(torch.tensor([1 / 3, -0.7], device=device), dtype), leaf(random(2, 2) / 9, dtype)
    b = leaf(b.detach().to(device), dtype)
    optimizer = kind([a, b], 1e3, **options)
    closure = closure_of(optimizer, lambda: barrier(a, b))
    before = everything(optimizer)
    undone = 0
    while not undone or optimizer.history.action[-1] == "undone":
        loss = optimizer.step(closure)
        if optimizer.history.action[-1] == "undone":
            undone += 1
            assert all(map(torch.equal, everything(optimizer), before))
            assert optimizer.history.rates[-1] == pytest.approx(1e3 * 0.1**undone, rel=1e-12)
            assert optimizer.history.loss[-1] == float(loss.detach())
            assert optimizer.history.signals["lr"][-1] is None
    assert undone >= 3
    for _ in range(20):
        optimizer.step(closure)
    assert barrier(a.detach(), b.detach()) < barrier(*before)
    assert optimizer.history.action[-1] != "undone"


def test_nothing_is_left_of_x_after_a_step_to_infinity() -> None:
    # x - lr d is infinite, so that no sum with it gives x back.
    x = leaf([1.25, -0.3], torch.float32)
    start = x.detach().clone()
    optimizer = SGDOLA([x], 1e38)
    optimizer.step(closure_of(optimizer, lambda: (10 * torch.cosh(x)).sum()))
    assert optimizer.history.action == ["undone"]
    assert torch.equal(x.detach(), start)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_window_begins_anew(deterministic: bool) -> None:
    # f is infinite in one evaluation: the signals of the next steps go back to that step only.
    def signals(horizon: int, *, blow_up: bool) -> list[float | None]:
        x = leaf([0.4, -0.6, 0.1])
        optimizer = AdamOLA(
            [x], 1e-3, adapt_rate=1e-300, horizon=horizon, deterministic=deterministic
        )
        calls = 0

        def loss() -> Tensor:
            nonlocal calls
            calls += 1
            # The last evaluation of the fourth step.
            bad = calls == (6 if deterministic else 8)
            return torch.cosh(x).sum() * (inf if blow_up and bad else 1.0)

        closure = closure_of(optimizer, loss)
        for _ in range(8):
            optimizer.step(closure)
        assert (optimizer.history.action[3] == "undone") == blow_up
        return optimizer.history.signals["lr"]

    after = {horizon: signals(horizon, blow_up=True)[4:] for horizon in (1, 2, 3, 8)}
    assert after[8][0] == pytest.approx(after[1][0], rel=1e-12)
    assert after[8][1] == pytest.approx(after[2][1], rel=1e-12)
    assert after[8][2] == pytest.approx(after[3][2], rel=1e-12)
    assert after[8][1] != pytest.approx(after[1][1], rel=1e-3)
    without = signals(8, blow_up=False)[4:]
    assert without[0] != pytest.approx(after[8][0], rel=1e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: SGDOLA([x], 1e3, momentum=0.0),
        lambda x: AdamOLA([x], 1e3, adapt=("lr", "beta1")),
    ],
)
def test_the_batch_is_no_other_after_a_step_was_taken_back(make: Callable[[Tensor], Any]) -> None:
    # The loss before the next step is not the one that the last one ended with, but that of before:
    # taken for a fresh batch, both would raise.
    x = leaf([0.3, -0.2])
    optimizer = make(x)
    closure = closure_of(optimizer, lambda: barrier(x))
    for _ in range(12):
        optimizer.step(closure)
    assert optimizer.history.action[0] == "undone"
    assert optimizer.history.action[-1] != "undone"


@pytest.mark.parametrize("value", [nan, inf])
def test_a_loss_that_is_not_finite_at_entry(value: float) -> None:
    x = leaf([1.0])
    optimizer = AdamOLA([x], 0.1)
    closure = closure_of(optimizer, lambda: x.square().sum())
    for _ in range(3):
        optimizer.step(closure)
    before = x.detach().clone()
    with pytest.raises(DivergedError, match="before step 4") as caught:
        optimizer.step(closure_of(optimizer, lambda: x.square().sum() * value))
    assert caught.value.step == 3
    assert torch.equal(x.detach(), before)
    assert len(optimizer.history) == 3
    optimizer.step(closure)
    assert optimizer.history.step == [1, 2, 3, 4]


def test_a_gradient_that_is_not_finite_is_told() -> None:
    # sqrt at 0: finite loss, infinite gradient. No rate is small enough.
    x = leaf([1.0, 0.0])
    optimizer = AdamOLA([x], 0.1)
    before = x.detach().clone()
    with pytest.raises(DivergedError, match="direction of the step is not finite"):
        optimizer.step(closure_of(optimizer, lambda: x.abs().sqrt().sum()))
    assert torch.equal(x.detach(), before)


def test_eps_zero_and_a_gradient_of_zero_is_told() -> None:
    x = leaf([1.0, 2.0])
    optimizer = AdamOLA([x], 0.1, eps=0.0)
    with pytest.raises(DivergedError, match="average of its squares is 0 and eps too"):
        optimizer.step(closure_of(optimizer, lambda: x[0].square() + 0.0 * x[1]))


def test_no_smaller_rate_is_told() -> None:
    # Infinite wherever one goes: seven steps back, and then the rate is at its bound.
    x = leaf([1.0])
    start = x.detach().clone()
    optimizer = AdamOLA([x], 1.0)

    def loss() -> Tensor:
        return x.square().sum() * (1.0 if torch.equal(x.detach(), start) else inf)

    closure = closure_of(optimizer, loss)
    for _ in range(7):
        optimizer.step(closure)
    with pytest.raises(DivergedError, match="smallest learning rate"):
        optimizer.step(closure)
    assert optimizer.history.action == ["undone"] * 7
    assert optimizer.history.rates[-1] == pytest.approx(1e-6)
    assert torch.equal(x.detach(), start)


@pytest.mark.parametrize("options", [{"adapt": ("beta1",)}, {"adapt_rate": 0.0}])
def test_without_an_adapted_rate_it_is_told_at_the_next_step(options: dict[str, Any]) -> None:
    x = leaf([0.3, -0.2])
    optimizer = AdamOLA([x], 1e3, **options)
    closure = closure_of(optimizer, lambda: barrier(x))
    optimizer.step(closure)
    with pytest.raises(DivergedError, match="before step 2"):
        optimizer.step(closure)


def test_groups_with_a_rate_of_their_own() -> None:
    a, b = leaf([0.3]), leaf([0.5])
    optimizer = AdamOLA([{"params": [a]}, {"params": [b], "lr": 1e-3, "adapt_rate": 0.0}], 1e3)
    optimizer.step(closure_of(optimizer, lambda: barrier(a, b)))
    assert [g["lr"] for g in optimizer.param_groups] == [pytest.approx(1e2), 1e-3]
    # All parameters are back, also those whose rate stays.
    assert (a.item(), b.item()) == (0.3, 0.5)


# --- finite, but much too large a rise ------------------------------------------------------------


def curved(x: Tensor) -> Tensor:
    weight = torch.logspace(0, 1, x.numel(), dtype=x.dtype, device=x.device)
    return 0.5 * (weight * x.square()).sum() + 1.0


@pytest.mark.parametrize(("lr", "back"), [(0.05, 0), (0.2, 0), (0.35, 0), (1.0, 1), (100.0, 3)])
def test_a_large_rise_is_taken_back_by_sgd(lr: float, back: int) -> None:
    # L = 10: rates of 2/L and less cannot rise so much; those of 3.8/L and more diverge.
    x = leaf(random(4, seed=1))
    optimizer = SGDOLA([x], lr)
    closure = closure_of(optimizer, lambda: curved(x))
    for _ in range(400):
        optimizer.step(closure)
    assert optimizer.history.counts().get("undone", 0) == back
    assert max(optimizer.history.loss) < 30
    assert curved(x.detach()) - 1.0 < 1e-8
    if back:
        # Without the guard f would grow by a power, faster than the rate gets smaller.
        x = leaf(random(4, seed=1))
        free = SGDOLA([x], lr, max_rise=inf)
        closure = closure_of(free, lambda: curved(x))
        for _ in range(100):
            free.step(closure)
        assert max(free.history.loss) > 1e20


@pytest.mark.parametrize("seed", range(3))
def test_momentum_through_a_minimum_is_no_blow_up(seed: int) -> None:
    # Next to the minimum |g| is small, and f rises by L (lr |d|)^2/2 whatever the rate; and once
    # there, by rounding.
    x = leaf(random(1, seed=seed))
    optimizer = SGDOLA([x], 0.05)
    closure = closure_of(optimizer, lambda: curved(x))
    for _ in range(400):
        optimizer.step(closure)
    assert "undone" not in optimizer.history.counts()
    assert optimizer.history.counts()["no signal"] > 10


def test_a_closure_that_writes_over_its_gradients() -> None:
    # zero_grad(set_to_none=False): the gradient at x_k is gone when the rise is judged.
    actions, rates = [], []
    for keep in (True, False):
        x = leaf(random(4, seed=1))
        optimizer = SGDOLA([x], 1.0)

        def closure(x: Tensor = x, optimizer: Any = optimizer, keep: bool = keep) -> Tensor:
            optimizer.zero_grad(set_to_none=keep)
            loss = curved(x)
            loss.backward()
            return loss

        for _ in range(60):
            optimizer.step(closure)
        actions.append(optimizer.history.action)
        rates.append(optimizer.history.rates)
    assert actions[0] == actions[1]
    assert rates[0] == rates[1]


def test_adam_takes_only_steps_back_that_are_not_finite() -> None:
    x = leaf(random(4, seed=1))
    optimizer = AdamOLA([x], 1e3)
    optimizer.step(closure_of(optimizer, lambda: curved(x)))
    assert optimizer.history.action == ["backed off"]
    y = leaf(random(4, seed=1))
    strict = AdamOLA([y], 1e3, max_rise=2.0)
    strict.step(closure_of(strict, lambda: curved(y)))
    assert strict.history.action == ["undone"]


def test_the_bound_on_the_rise() -> None:
    x = leaf([3.0, 4.0])
    optimizer = AdamOLA([x], 1.0, max_rise=2.0)
    seen = evaluate(closure_of(optimizer, lambda: x.sum() * 5), [x], name="AdamOLA")
    bundles = optimizer._bundles(seen)
    retreat = optimizer._retreat(bundles)
    assert retreat is not None
    with torch.no_grad():
        moved = [optimizer.move(bundle, held_out=False) for bundle in bundles]
    # |g| = sqrt(50), lr |d| = sqrt(2): the bound is 2 * 10.
    for rise, expected in ((19.9, False), (20.1, True), (nan, True), (-30.0, False)):
        assert retreat.blew_up(moved, Observation(1.0, 1.0 + rise, 1e-15)) is expected
    assert not retreat.blew_up(moved, Observation(1.0, 22.0, 25.0))
