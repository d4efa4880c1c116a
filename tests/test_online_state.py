"""Saved, loaded and copied: the continuation is the same to the last bit."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from online_runs import STILL, Bumpy, D, closure_of, leaf, random
from torch import Tensor, nn

from discrete import SGDOLA, AdamOLA
from discrete.online import AdamHD, OnlineAdaptation
from ode_stopping.core.status import StoppingWarning

BEFORE, AFTER = 7, 8
CASES: dict[str, dict[str, Any]] = {
    "guarded": {},
    "deterministic": {"deterministic": True},
    "paper": {"variant": "paper", "adapt_rate": 1e-5},
    "paper, deterministic": {"variant": "paper", "adapt_rate": 1e-5, "deterministic": True},
    "horizon": {"horizon": 3},
    "horizon, deterministic": {"horizon": 3, "deterministic": True},
    "horizon longer than the run": {"horizon": 20},
    "every": {"every": 3},
    "every, horizon": {"every": 3, "horizon": 4},
    "all": {"adapt": ("lr", "beta1", "beta2", "weight_decay"), "horizon": 2, "weight_decay": 0.1},
    "one step, all": {"adapt": ("lr", "beta2"), "descent_threshold": 1e-3},
    "rule": {"settle": 2.0, "caution": 0.7, "max_signal": 0.1, "record_every": 2},
}


def made(kind: type[Any], options: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """Two groups, one with a rate of adaptation of its own."""
    pieces = [leaf(random(2, 2, seed=1)), leaf(random(1, seed=2)), leaf(random(1, seed=3))]
    groups = [{"params": pieces[:2]}, {"params": pieces[2:], "lr": 0.05, "adapt_rate": 1e-6}]
    return kind(groups, 0.02, **options), pieces


def go(optimizer: Any, pieces: list[Tensor], steps: int) -> None:
    closure = closure_of(optimizer, lambda: Bumpy()(*pieces))
    for _ in range(steps):
        optimizer.step(closure)


def file_of(state: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def assert_same(one: Any, ones: list[Tensor], other: Any, others: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))
    assert one.history == other.history
    for mine, their in zip(one.param_groups, other.param_groups, strict=True):
        assert {n: v for n, v in mine.items() if n != "params"} == {
            n: v for n, v in their.items() if n != "params"
        }
    if isinstance(one, OnlineAdaptation):
        assert one.rule == other.rule
        assert one.options == other.options


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", [AdamOLA, SGDOLA])
def test_the_continuation_is_the_same(name: str, kind: type[Any]) -> None:
    options = dict(CASES[name])
    if kind is SGDOLA and "adapt" in options:
        options["adapt"] = ("lr", "momentum")
    through, pieces = made(kind, options)
    go(through, pieces, BEFORE + AFTER)
    first, firsts = made(kind, options)
    go(first, firsts, BEFORE)
    file = file_of({"pieces": [p.detach() for p in firsts], "optimizer": first.state_dict()})
    stored = torch.load(file, weights_only=True)
    # Built with other options: all come from the state.
    second, seconds = made(kind, {"horizon": 2, "adapt_rate": 9.0, "max_signal": 3.0})
    with torch.no_grad():
        for p, value in zip(seconds, stored["pieces"], strict=True):
            p.copy_(value)
    second.load_state_dict(stored["optimizer"])
    assert second.options == first.options
    assert second.history == first.history
    go(second, seconds, AFTER)
    assert_same(second, seconds, through, pieces)
    assert len(second.history) == (BEFORE + AFTER) // options.get("record_every", 1)
    # Saving changes nothing for the one that was saved.
    go(first, firsts, AFTER)
    assert_same(first, firsts, through, pieces)


@pytest.mark.parametrize("name", ["guarded", "deterministic", "horizon", "all", "paper"])
@pytest.mark.parametrize("by", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_pickles(name: str, by: Any) -> None:
    first, firsts = made(AdamOLA, CASES[name])
    go(first, firsts, BEFORE)
    twin, twins = by((first, firsts))
    assert twin.param_groups[0]["params"][0] is twins[0]
    assert twins[0] is not firsts[0]
    go(first, firsts, AFTER)
    assert twins[0].ne(firsts[0]).any()
    go(twin, twins, AFTER)
    assert_same(twin, twins, first, firsts)


def test_a_copy_of_one_that_has_not_begun() -> None:
    first, firsts = made(AdamOLA, {"horizon": 3})
    twin, twins = copy.deepcopy((first, firsts))
    fresh, others = made(AdamOLA, {})
    fresh.load_state_dict(first.state_dict())
    for optimizer, pieces in ((first, firsts), (twin, twins), (fresh, others)):
        go(optimizer, pieces, 4)
        assert_same(optimizer, pieces, first, firsts)


def test_a_stop_right_after_a_step_was_taken_back() -> None:
    def barrier(x: Tensor) -> Tensor:
        # Infinite outside, not NaN, which is never equal.
        return -torch.log((1 - x.square()).clamp(min=0)).sum() + 0.3 * x.sum()

    x, y = leaf([0.4, -0.6]), leaf([0.4, -0.6])
    one, other = AdamOLA([x], 1e2, adapt=("lr", "beta1")), AdamOLA([y], 1.0)
    closure = closure_of(one, lambda: barrier(x))
    one.step(closure)
    assert one.history.action == ["undone"]
    other.load_state_dict(torch.load(file_of(one.state_dict()), weights_only=True))
    for optimizer, p in ((one, x), (other, y)):
        closure = closure_of(optimizer, lambda p=p: barrier(p))
        for _ in range(6):
            optimizer.step(closure)
    assert_same(one, [x], other, [y])


# --- fresh batches --------------------------------------------------------------------------------


def batches(optimizer: Any, model: nn.Module, begin: int, end: int) -> None:
    data = random(200, 4, seed=5)
    for k in range(begin, end):
        rows = torch.randint(200, (20,), generator=torch.Generator().manual_seed(k))
        optimizer.step(
            closure_of(optimizer, lambda r=rows: (model(data[r]) - data[r].sin()).square().mean())
        )


def model_of(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    parts = [nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 4)]
    return nn.Sequential(*parts).double()


def stored_and_loaded(options: dict[str, Any]) -> tuple[Any, nn.Module, Any, nn.Module]:
    one, other = model_of(), model_of()
    first = AdamOLA(one.parameters(), 0.01, **options)
    batches(first, one, 0, BEFORE)
    second = AdamOLA(other.parameters(), 0.3)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(torch.load(file_of(first.state_dict()), weights_only=True))
    return first, one, second, other


@pytest.mark.parametrize("options", [{}, {"every": 2}, {"held_out": False}])
def test_on_fresh_batches(options: dict[str, Any]) -> None:
    first, one, second, other = stored_and_loaded(options)
    for optimizer, model in ((first, one), (second, other)):
        batches(optimizer, model, BEFORE, BEFORE + AFTER)
    assert_same(first, list(one.parameters()), second, list(other.parameters()))


def test_a_window_on_fresh_batches_begins_anew() -> None:
    first, one, second, other = stored_and_loaded({"horizon": 3})
    # At the kept points the closure has another batch now. The warning stands where step is called.
    with pytest.warns(StoppingWarning, match="another loss now") as caught:
        batches(second, other, BEFORE, BEFORE + 1)
    assert caught[0].filename == __file__
    batches(first, one, BEFORE, BEFORE + 1)
    assert second.history.loss[-1] == first.history.loss[-1]
    assert second.history.after[-1] == first.history.after[-1]
    assert second.history.signals != first.history.signals
    batches(second, other, BEFORE + 1, BEFORE + AFTER)
    assert len(second.history) == BEFORE + AFTER


def test_a_window_that_comes_back_draws_no_random_numbers() -> None:
    # The closure is called at the kept points, and the next step has the masks that it would have.
    states = []
    for reload in (False, True):
        model = model_of(dropout=0.5)
        optimizer: Any = AdamOLA(model.parameters(), 0.01, horizon=3)
        closure = closure_of(
            optimizer, lambda m=model: (m(random(20, 4)) - random(20, 4)).square().mean()
        )
        for _ in range(4):
            optimizer.step(closure)
        torch.manual_seed(7)
        if reload:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            with pytest.warns(StoppingWarning):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
        states.append((optimizer.history.loss[-1], torch.get_rng_state()))
    assert states[0][0] == states[1][0]
    assert torch.equal(states[0][1], states[1][1])


def test_a_gradient_that_is_small_is_not_the_same() -> None:
    # Scaled to 1e-9 every gradient is within 1e-8 of every other.
    x = leaf([1.0, -2.0])
    optimizer: Any = AdamOLA([x], 0.01, horizon=3, eps=1e-20)
    for _ in range(4):
        optimizer.step(closure_of(optimizer, lambda: 1e-9 * x.square().sum()))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.warns(StoppingWarning, match="another loss now"):
        optimizer.step(closure_of(optimizer, lambda: 1e-9 * (x - 1).square().sum()))


def test_it_goes_where_the_parameters_are(device: torch.device) -> None:
    # map_location="cpu", and the model elsewhere or in another dtype: buffers follow the
    # parameters in torch, and so does the window.
    first, firsts = made(AdamOLA, CASES["all"])
    go(first, firsts, BEFORE)
    for dtype in (D, torch.float32):
        second, _ = made(AdamOLA, {})
        moved = [leaf(p.detach().to(device), dtype) for p in firsts]
        for group, where in zip(second.param_groups, (moved[:2], moved[2:]), strict=True):
            group["params"] = where
        second.load_state_dict(torch.load(file_of(first.state_dict()), weights_only=True))
        go(second, moved, 1)
        assert len(second.history) == BEFORE + 1
        assert second.state[moved[0]]["exp_avg"].dtype == dtype
        for snapshot in second._window._steps[0].snapshots:
            kept = (snapshot.x, snapshot.gradient, *snapshot.buffers)
            assert {(t.dtype, t.device) for t in kept} == {(dtype, moved[0].device)}


def test_a_loss_of_numpy_is_saved_as_a_number() -> None:
    # Anything else than plain numbers in a file is refused with weights_only=True.
    x = leaf([2.0])
    optimizer = AdamOLA([x], 0.01)

    def closure() -> np.float64:
        x.grad = 2 * x.detach()
        return np.float64(x.item() ** 2)

    for _ in range(3):
        optimizer.step(closure)
    stored = torch.load(file_of(optimizer.state_dict()), weights_only=True)
    assert stored["adaptation"]["history"]["loss"] == optimizer.history.loss


# --- what does not fit ----------------------------------------------------------------------------


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    optimizer, pieces = made(AdamOLA, {})
    go(optimizer, pieces, 3)
    before = copy.deepcopy(optimizer.state_dict())
    others: list[Any] = [
        torch.optim.Adam(pieces, 0.5),
        SGDOLA(pieces, 0.5),
        AdamHD(pieces, 0.5),
        AdamOLA(pieces, 0.5),  # another number of groups
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"not one of AdamOLA|number of parameter groups"):
            optimizer.load_state_dict(other.state_dict())
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert after["adaptation"] == before["adaptation"]


def test_the_state_is_a_copy() -> None:
    optimizer, pieces = made(AdamOLA, {"horizon": 2})
    go(optimizer, pieces, 3)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state["adaptation"])
    go(optimizer, pieces, 3)
    assert state["adaptation"]["history"] == kept["history"]
    assert state["adaptation"]["rule"] == kept["rule"]
    for one, other in zip(state["adaptation"]["window"], kept["window"], strict=True):
        for a, b in zip(one["snapshots"], other["snapshots"], strict=True):
            assert torch.equal(a["x"], b["x"])


# --- groups that come later -----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"horizon": 3}, {"deterministic": True}])
def test_a_group_added_later(options: dict[str, Any]) -> None:
    a, b = leaf(random(3, seed=1)), leaf(random(3, seed=2))
    optimizer: Any = AdamOLA([a], 0.02, adapt=("lr", "beta1"), **options)
    loss = closure_of(optimizer, lambda: Bumpy()(a, b))
    for _ in range(4):
        optimizer.step(loss)
    b.grad = None
    optimizer.add_param_group({"params": [b], "lr": 0.5, "betas": (0.5, 0.9)})
    assert torch.equal(b.detach(), random(3, seed=2))
    for _ in range(4):
        optimizer.step(loss)
    for name, first in (("lr", 0.5), ("beta1", 0.5)):
        old, new = optimizer.history.values[name]
        assert len(old) == len(new) == len(optimizer.history) == 8
        # Before there was such a group its column repeats the first value.
        assert new[:4] == [new[4]] * 4
        assert new[4] == pytest.approx(first, rel=0.2)
        assert new[-1] != new[4]
    state = torch.load(file_of(optimizer.state_dict()), weights_only=True)
    c, d = leaf(a), leaf(b)
    other = AdamOLA([{"params": [c]}, {"params": [d]}])
    other.load_state_dict(state)
    for one, pieces in ((optimizer, (a, b)), (other, (c, d))):
        closure = closure_of(one, lambda p=pieces: Bumpy()(*p))
        for _ in range(3):
            one.step(closure)
    assert_same(optimizer, [a, b], other, [c, d])


def test_a_group_that_is_refused_leaves_no_trace() -> None:
    optimizer, pieces = made(AdamOLA, {"adapt_rate": STILL})
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"adapt_rate": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            optimizer.add_param_group({"params": [leaf([1.0])], **wrong})
        assert len(optimizer.param_groups) == 2
    go(optimizer, pieces, 2)
