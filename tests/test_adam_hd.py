"""`AdamHD` is Adam-HD of Baydin et al. (2018), by NumPy."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from online_runs import SVM, Bumpy, D, NumpyAdam, closure_of, gap, leaf, random, run

from discrete import AdamHD

# alpha_0 and the step on it, which is in units of alpha^2/f.
SETTINGS = [(1e-3, 1e-6), (1e-2, 1e-5), (1e-1, 1e-7), (1e-2, 1e-3)]


def baydin(
    problem: SVM,
    alpha: float,
    beta: float,
    steps: int,
    plant: Callable[[float, float], float] = lambda alpha, rise: alpha + rise,
) -> tuple[np.ndarray, np.ndarray]:
    """alpha += beta grad f(x_k) . d_{k-1}, with d_{-1} = 0; then a step of Adam."""
    x, adam = problem.start.copy(), NumpyAdam(len(problem.start))
    d = np.zeros_like(x)
    iterates, rates = [], []
    for _ in range(steps):
        g = problem.gradient(x)
        alpha = plant(alpha, beta * float(g @ d))
        d = adam.direction(g)
        x = x - alpha * d
        iterates.append(x)
        rates.append(alpha)
    return np.array(iterates), np.array(rates)


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_iterates_and_rates_are_those_of_numpy(alpha: float, beta: float) -> None:
    w = leaf(SVM().start)
    optimizer = AdamHD([w], alpha, hypergradient_lr=beta)
    mine = run(optimizer, SVM(), [w], 150)
    assert gap(mine, baydin(SVM(), alpha, beta, 150)) < 1e-12
    assert optimizer.history.rates == list(mine[1])
    assert optimizer.history.action[0] == "no signal"


def test_the_settings_show_both_directions() -> None:
    rates = [baydin(SVM(), alpha, beta, 150)[1] for alpha, beta in SETTINGS]
    changes = np.concatenate([np.diff(np.log(trace)) for trace in rates])
    assert changes.max() > 1e-3
    assert changes.min() < -1e-3


def test_a_planted_sign_is_caught() -> None:
    for alpha, beta in SETTINGS:
        w = leaf(SVM().start)
        mine = run(AdamHD([w], alpha, hypergradient_lr=beta), SVM(), [w], 150)
        other = baydin(SVM(), alpha, beta, 150, lambda alpha, rise: alpha - rise)
        assert gap(mine, other) > 1e-5


@pytest.mark.parametrize("groups", [1, 2])
def test_many_tensors_are_one(groups: int, device: torch.device) -> None:
    start = torch.tensor(SVM().start, dtype=D, device=device)
    pieces = [leaf(piece) for piece in start.split([1, 3, 2])]
    given: Any = pieces
    if groups == 2:
        given = [{"params": pieces[:1]}, {"params": pieces[1:]}]
    optimizer = AdamHD(given, 1e-2, hypergradient_lr=1e-5)
    closure = closure_of(optimizer, lambda: SVM()(*pieces))
    for _ in range(40):
        optimizer.step(closure)
    iterates, rates = baydin(SVM(), 1e-2, 1e-5, 40)
    there = torch.cat([p.detach() for p in pieces]).cpu().numpy()
    assert abs(there - iterates[-1]).max() < 1e-12 * abs(iterates[-1]).max()
    for trace in optimizer.history.values["lr"]:
        assert abs(np.array(trace) - rates).max() < 1e-12 * rates.max()


@pytest.mark.parametrize(
    ("options", "dtype", "tolerance"),
    [
        ({}, D, 1e-13),
        ({"weight_decay": 0.1}, D, 1e-13),
        ({"betas": (0.5, 0.9), "eps": 1e-3}, D, 1e-13),
        ({}, torch.float32, 1e-5),
    ],
)
def test_with_a_step_of_zero_it_is_adam(
    options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    ends = []
    for make in (
        lambda p: AdamHD(p, 0.02, hypergradient_lr=0.0, **options),
        lambda p: torch.optim.Adam(p, 0.02, **options),
    ):
        x = leaf(random(6, seed=1), dtype)
        optimizer = make([x])
        closure = closure_of(optimizer, lambda x=x: Bumpy()(x))
        for _ in range(50):
            optimizer.step(closure)
        ends.append(x.detach())
    assert (ends[0] - ends[1]).abs().max() < tolerance


def test_with_and_without_closure() -> None:
    ends = []
    for given in (True, False):
        x = leaf(random(6, seed=1))
        optimizer = AdamHD([x], 0.02, hypergradient_lr=1e-3, record_every=2)
        closure = closure_of(optimizer, lambda x=x: Bumpy()(x))
        for _ in range(10):
            if given:
                loss = optimizer.step(closure)
                assert loss is not None
            else:
                closure()
                assert optimizer.step() is None
        ends.append(x.detach())
        assert optimizer.history.step == [2, 4, 6, 8, 10]
        assert np.isnan(optimizer.history.loss[0]) == (not given)
    assert torch.equal(*ends)


def test_the_scheduler_of_a_group_and_its_own_step() -> None:
    a, b = leaf(random(3, seed=1)), leaf(random(3, seed=2))
    optimizer = AdamHD(
        [{"params": [a]}, {"params": [b], "lr": 0.1, "hypergradient_lr": 0.0}],
        0.02,
        hypergradient_lr=1e-3,
    )
    closure = closure_of(optimizer, lambda: Bumpy()(a, b))
    for _ in range(5):
        optimizer.step(closure)
    first, second = optimizer.history.values["lr"]
    assert second == [0.1] * 5
    assert len(set(first[1:])) == 4


def test_what_has_not_moved_has_no_direction() -> None:
    # b takes no part in step 3, so f(x_4) does not depend on the rate through it.
    a, b = leaf(random(3, seed=1)), leaf(random(3, seed=2))
    optimizer = AdamHD([a, b], 0.02, hypergradient_lr=1e-12)
    older, expected = [torch.zeros(3, dtype=D)] * 2, []
    for k in range(5):
        closure = closure_of(optimizer, lambda k=k: Bumpy()(a, b.detach() if k == 2 else b))
        before = [p.detach().clone() for p in (a, b)]
        optimizer.step(closure)
        pairs = [(p.grad, d) for p, d in zip((a, b), older, strict=True)]
        expected.append(sum(float(g @ d) for g, d in pairs if g is not None))
        rate = optimizer.param_groups[0]["lr"]
        older = [(q - p.detach()) / rate for p, q in zip((a, b), before, strict=True)]
        assert bool(older[1].any()) == (k != 2)
    assert optimizer.history.signals["lr"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("by", ["file", "copy", "pickle"])
def test_the_continuation_is_the_same(by: str) -> None:
    def go(optimizer: AdamHD, x: torch.Tensor, steps: int) -> None:
        closure = closure_of(optimizer, lambda: Bumpy()(x))
        for _ in range(steps):
            optimizer.step(closure)

    x = leaf(random(6, seed=1))
    first = AdamHD([x], 0.02, hypergradient_lr=1e-3, record_every=2)
    go(first, x, 5)
    if by == "file":
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        y = leaf(x)
        second = AdamHD([y], 0.5)
        second.load_state_dict(torch.load(file, weights_only=True))
    elif by == "copy":
        second, y = copy.deepcopy((first, x))
    else:
        second, y = pickle.loads(pickle.dumps((first, x)))
    for optimizer, p in ((first, x), (second, y)):
        go(optimizer, p, 6)
    assert torch.equal(x, y)
    assert first.history == second.history
    assert first.history.step == [2, 4, 6, 8, 10]


def test_a_state_of_plain_adam() -> None:
    # No direction in it: it would fail at the first step, so it is told at once.
    x = leaf(random(6, seed=1))
    adam = torch.optim.Adam([x], 0.02)
    adam.step(closure_of(adam, lambda: Bumpy()(x)))
    with pytest.raises(ValueError, match="not one of AdamHD"):
        AdamHD([x]).load_state_dict(adam.state_dict())
