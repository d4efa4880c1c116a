"""The guarded form: its rule, what it does not depend on, its bounds, and what it takes back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import exp, inf, isfinite, log, nan
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from online_runs import SVM, D, closure_of, gap, guarded, leaf, random, run
from torch import Tensor

from discrete import SGDOLA, AdamOLA
from discrete.online import OnlineAdaptation
from discrete.online.rules import Decision, GuardedRule, Observation

RATES = [1e-6, 1e-3, 1e-1, 3e0, 1e2]


def wiggly(x: Tensor) -> Tensor:
    """Not convex, and no step size suits it for long."""
    scale = torch.tensor([1.0, 4.0, 0.3], dtype=x.dtype, device=x.device)
    return (scale * x.square() + torch.cos(3 * x)).sum() + 4.0


def trace(
    optimizer: OnlineAdaptation, loss: Callable[[], Tensor], steps: int, group: int = 0
) -> np.ndarray:
    """The logarithms of the rate."""
    closure = closure_of(optimizer, loss)
    for _ in range(steps):
        optimizer.step(closure)
    return np.log(optimizer.history.values["lr"][group])


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", RATES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapt_rate": 1.0, "caution": 1.0, "settle": 3.0},
        {"max_signal": 0.05, "caution": 0.0},
        {"descent_threshold": 0.5},
    ],
)
def test_iterates_and_rates_are_those_of_numpy(alpha: float, options: dict[str, float]) -> None:
    mine = dict(options)
    threshold = mine.pop("descent_threshold", 0.0)
    iterates, rates, actions = guarded(SVM(), alpha, 60, threshold=threshold, **mine)
    w = leaf(SVM().start)
    optimizer = AdamOLA([w], alpha, **options)
    assert gap(run(optimizer, SVM(), [w], 60), (iterates, rates)) < 1e-11
    assert optimizer.history.action == actions
    twin = leaf(SVM().start)
    once = AdamOLA([twin], alpha, deterministic=True, **options)
    assert gap(run(once, SVM(), [twin], 60), (iterates, rates)) < 1e-11
    assert torch.equal(w, twin)


def test_every_action_is_seen() -> None:
    seen: set[str] = set()
    for alpha in RATES:
        for threshold in (0.0, 0.5):
            seen |= set(guarded(SVM(), alpha, 60, threshold=threshold)[2])
    assert seen == {"larger", "smaller", "backed off", "no decrease"}


class Planted(GuardedRule):
    """One guard less."""

    def __init__(self, missing: str) -> None:
        super().__init__(
            max_signal=inf if missing == "clip" else 0.5,
            caution=1.0 if missing == "caution" else 1.0 / 3.0,
            settle=inf if missing == "settling" else 25.0,
        )
        self.missing = missing

    def decide(self, derivatives: dict[str, float], seen: Observation) -> Decision:
        if self.missing == "sign":
            derivatives = {name: -slope for name, slope in derivatives.items()}
        if self.missing == "back-off" and seen.change > 0:
            return Decision("no decrease", {}, {})
        return super().decide(derivatives, seen)


@pytest.mark.parametrize("missing", ["clip", "caution", "settling", "sign", "back-off", None])
def test_a_planted_error_is_caught(missing: str | None) -> None:
    found = 0.0
    for alpha in RATES:
        w = leaf(SVM().start)
        optimizer = AdamOLA([w], alpha)
        if missing:
            optimizer.rule = Planted(missing)
        found = max(found, gap(run(optimizer, SVM(), [w], 60), guarded(SVM(), alpha, 60)[:2]))
    assert found > 1e-3 if missing else found < 1e-11


def test_the_rule_step_by_step() -> None:
    rule = GuardedRule(threshold=0.1, max_signal=0.5, caution=0.25, settle=1.0)
    fell, rose = Observation(2.0, 1.0, 1e-15), Observation(1.0, 3.0, 1e-15)
    assert rule.decide({"lr": -0.3}, fell) == ("larger", {"lr": 0.3}, {"lr": 0.3})
    # Clipped, weighed by caution and by 1/sqrt(1 + updates); the signal is told as it was.
    decision = rule.decide({"lr": 9.0}, fell)
    assert decision.action == "smaller"
    assert decision.moves["lr"] == pytest.approx(-0.25 * 0.5 / 2**0.5)
    assert decision.signals == {"lr": -9.0}
    decision = rule.decide({"lr": 0.8}, rose)
    assert decision.action == "backed off"
    assert decision.moves["lr"] == pytest.approx(-0.25 * 0.4 / 3**0.5)
    # f rose although a longer step would have been better: nothing to be learned.
    assert rule.decide({"lr": -0.8}, rose) == ("no decrease", {}, {"lr": 0.4})
    assert rule.decide({"lr": -1.0}, Observation(1.0, 0.95, 1e-15)).action == "no decrease"
    assert rule.decide({"lr": 0.0}, fell) == ("no signal", {}, {"lr": 0.0})
    assert rule.decide({"lr": nan}, fell).moves == {}
    assert rule.updates == 3
    # Two hyperparameters, each by its own sign.
    decision = rule.decide({"lr": -0.3, "beta1": 0.4}, fell)
    assert decision.moves == {"lr": 0.3 / 2, "beta1": -0.25 * 0.4 / 2}
    # Several steps: the bound and the move are those of one.
    decision = rule.decide({"lr": -0.6}, fell._replace(steps=3))
    assert decision.moves["lr"] == pytest.approx(0.2 / 5**0.5)
    assert decision.signals == {"lr": 0.6}


@pytest.mark.parametrize("value", [1.0, -1e6, 1e-30])
def test_within_its_rounding_a_change_is_no_signal(value: float) -> None:
    rounding = 4 * np.finfo(float).eps * abs(value)
    for ulps in (-2, -1, 0, 1, 2):
        after = value * (1 + ulps * np.finfo(float).eps)
        seen = Observation(value, after, rounding)
        assert GuardedRule().decide({"lr": -1.0}, seen) == ("no signal", {}, {})
    down = Observation(value, value - 3 * rounding, rounding)
    assert GuardedRule().decide({"lr": -rounding}, down).action == "larger"


def test_float32_has_its_own_rounding() -> None:
    # A constant of 1e4 hides every change of f in single precision, none in double.
    for dtype, expected in ((torch.float32, "no signal"), (D, "larger")):
        w = leaf([1.0, 2.0], dtype)
        optimizer = AdamOLA([w], 1e-5)
        closure = closure_of(optimizer, lambda w=w: w.square().sum() + 1e4)
        for _ in range(5):
            optimizer.step(closure)
        assert set(optimizer.history.action) == {expected}


# --- what it does not depend on -------------------------------------------------------------------


# Powers of four scale every number exactly; of others the rounding grows, slowly at first.
FACTORS = [(4.0**5, 60, 1e-13), (4.0**-5, 60, 1e-13), (1e3, 8, 1e-11), (1e-3, 8, 1e-11)]


@pytest.mark.parametrize("kind", [AdamOLA, SGDOLA])
@pytest.mark.parametrize(("factor", "steps", "tolerance"), FACTORS)
def test_units_of_f_do_not_matter(
    kind: type[Any], factor: float, steps: int, tolerance: float
) -> None:
    # Of SGD the rate has the unit x^2/f itself.
    lr, extra = 0.02, {"eps": 0.0} if kind is AdamOLA else {}
    x, scaled = leaf([0.3, 1.2, -2.0]), leaf([0.3, 1.2, -2.0])
    plain = trace(kind([x], lr, **extra), lambda: wiggly(x), steps)
    by = 1.0 if kind is AdamOLA else factor
    other = trace(kind([scaled], lr / by, **extra), lambda: factor * wiggly(scaled), steps)
    assert abs(plain - other - log(by)).max() < tolerance
    assert np.ptp(plain) > 0.3


@pytest.mark.parametrize("kind", [AdamOLA, SGDOLA])
@pytest.mark.parametrize(("factor", "steps", "tolerance"), FACTORS)
def test_units_of_x_do_not_matter(
    kind: type[Any], factor: float, steps: int, tolerance: float
) -> None:
    lr, extra = 0.02, {"eps": 0.0} if kind is AdamOLA else {}
    x, scaled = leaf([0.3, 1.2, -2.0]), leaf([0.3 * factor, 1.2 * factor, -2.0 * factor])
    plain = trace(kind([x], lr, **extra), lambda: wiggly(x), steps)
    by = factor if kind is AdamOLA else factor**2
    other = trace(kind([scaled], lr * by, **extra), lambda: wiggly(scaled / factor), steps)
    assert abs(plain - other + log(by)).max() < tolerance


@pytest.mark.parametrize("constant", [-50.0, 1e3])
def test_a_constant_added_to_f_does_not_matter(constant: float) -> None:
    x, shifted = leaf([0.3, 1.2, -2.0]), leaf([0.3, 1.2, -2.0])
    plain = trace(AdamOLA([x], 0.02), lambda: wiggly(x), 30)
    other = trace(AdamOLA([shifted], 0.02), lambda: wiggly(shifted) + constant, 30)
    # Df of some 0.1 loses three digits next to 1e3.
    assert abs(plain - other).max() < 1e-9


@pytest.mark.parametrize("kind", [AdamOLA, SGDOLA])
@pytest.mark.parametrize("horizon", [1, 3])
def test_cuts_into_tensors_and_groups_do_not_matter(
    kind: type[Any], horizon: int, device: torch.device
) -> None:
    start = random(7, seed=3).to(device)
    weight = torch.linspace(0.5, 3.0, 7, dtype=D, device=device)

    def loss(*pieces: Tensor) -> Tensor:
        x = torch.cat([p.reshape(-1) for p in pieces])
        return (weight * torch.log(torch.cosh(x - 1))).sum() + 0.1 * x.sum().square()

    whole = leaf(start)
    one = trace(kind([whole], 0.03, horizon=horizon), lambda: loss(whole), 25)
    for groups in (1, 2, 3):
        pieces = [leaf(start[:1]).detach().reshape(()), start[1:5].reshape(2, 2), start[5:]]
        pieces = [leaf(p) for p in pieces]
        split: Any = pieces
        if groups > 1:
            split = [{"params": pieces[:1]}, {"params": pieces[1:]}]
        if groups == 3:
            split = [{"params": [p]} for p in pieces]
        optimizer = kind(split, 0.03, horizon=horizon)
        for group in range(groups):
            other = trace(optimizer, lambda p=pieces: loss(*p), 25 if group == 0 else 0, group)
            assert abs(other - one).max() < 1e-11


def test_a_group_with_rate_zero_stays_and_has_no_say() -> None:
    a, b = leaf([1.0, -2.0]), leaf([0.7])
    alone, still = leaf([1.0, -2.0]), leaf([0.7])
    optimizer = AdamOLA([{"params": [a]}, {"params": [b], "lr": 0.5, "adapt_rate": 0.0}], 0.02)
    rates = trace(optimizer, lambda: a.square().sum() + b.square().sum().sqrt(), 20)
    assert optimizer.history.values["lr"][1] == [0.5] * 20
    # The change of f is that of all, so the signal is smaller than that of the first group alone.
    other = trace(
        AdamOLA([alone], 0.02), lambda: alone.square().sum() + still.square().sum().sqrt(), 20
    )
    assert abs(rates - other).max() > 1e-3
    assert all(s is not None for s in optimizer.history.signals["lr"])


# --- bounds ---------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    exponent=st.floats(-12, 6),
    seed=st.integers(0, 1000),
    momentum=st.booleans(),
    adapt_rate=st.sampled_from([0.25, 3.0]),
)
def test_the_rate_stays_positive_and_bounded(
    exponent: float, seed: int, momentum: bool, adapt_rate: float
) -> None:
    lr = 10.0**exponent
    x = leaf(random(5, seed=seed))
    weight = torch.logspace(-2, 2, 5, dtype=D)
    kind: Any = SGDOLA if momentum else AdamOLA
    optimizer = kind([x], lr, adapt_rate=adapt_rate)
    values = []

    def loss() -> Tensor:
        return (weight * (x.square() + 1).log()).sum() + 0.01 * x.square().sum()

    closure = closure_of(optimizer, loss)
    for _ in range(40):
        values.append(float(optimizer.step(closure).detach()))
    with torch.no_grad():
        values.append(float(loss()))
    rates = optimizer.history.rates
    assert all(lr / 1e6 <= rate <= lr * 1e6 for rate in rates)
    assert all(isfinite(value) for value in values)
    assert isfinite(x.detach().abs().max())


@pytest.mark.parametrize(
    ("name", "first", "low", "high"),
    [
        ("lr", 0.1, 0.1e-6, 0.1e6),
        ("weight_decay", 0.1, 0.1e-6, 0.1e6),
        ("beta1", 0.9, 0.0, 0.99),
        ("beta2", 0.999, 0.99, 0.9999),
    ],
)
def test_bounds_of_every_hyperparameter(name: str, first: float, low: float, high: float) -> None:
    options: dict[str, Any] = {"weight_decay": 0.1} if name == "weight_decay" else {}
    for sign, bound in ((-1.0, low), (1.0, high)):
        optimizer = AdamOLA([leaf([1.0])], 0.1, adapt=(name,), max_signal=1e9, **options)
        optimizer._apply(Decision("larger", {name: 1e6 * sign}, {}))
        coordinate = optimizer._adapted[0]
        assert coordinate.read(optimizer.param_groups[0]) == pytest.approx(bound, rel=1e-12)
        optimizer._apply(Decision("larger", {name: -0.4 * sign}, {}))
        assert abs(coordinate.read(optimizer.param_groups[0]) - bound) > 0
    assert first > 0


def test_a_small_move_is_relative() -> None:
    optimizer = AdamOLA([leaf([1.0])], 0.1, adapt=("lr", "beta1"), adapt_rate=0.5)
    optimizer._apply(Decision("larger", {"lr": 0.2, "beta1": 0.2}, {}))
    group = optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(0.1 * exp(0.1), rel=1e-14)
    assert 1 - group["betas"][0] == pytest.approx(0.1 * exp(-0.1), rel=1e-14)
    assert group["betas"][1] == 0.999


def test_a_rate_set_from_outside_is_no_error() -> None:
    # A scheduler's value beyond the bounds stays until a signal leads back.
    x = leaf([1.0, -1.0])
    optimizer = AdamOLA([x], 1e-3)
    optimizer.param_groups[0]["lr"] = 1e-12
    trace(optimizer, lambda: x.square().sum(), 3)
    assert 1e-12 < optimizer.param_groups[0]["lr"] < 2e-12


@cache
def best_of_adam(steps: int) -> float:
    values = []
    for fixed in (1e-2, 3e-2, 1e-1, 3e-1):
        v = leaf(SVM().start)
        run(torch.optim.Adam([v], fixed), SVM(), [v], steps)
        values.append(SVM().value(v.detach().numpy()))
    return min(values)


@pytest.mark.parametrize("lr", [1e-8, 1e-3, 1e1, 1e4])
def test_neither_collapse_nor_blow_up(lr: float) -> None:
    w = leaf(SVM().start)
    optimizer = AdamOLA([w], lr, deterministic=True)
    run(optimizer, SVM(), [w], 400)
    start = SVM().value(SVM().start)
    reached = SVM().value(w.detach().numpy())
    assert reached - best_of_adam(400) < 1e-2 * (start - best_of_adam(400))
    rates = optimizer.history.rates
    assert rates[-1] > 1e-4
    assert max(rates) < max(1.2 * lr, 1e1)
