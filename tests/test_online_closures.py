"""Closures of every kind under a horizon: what they may do, what is refused, what is let go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from online_runs import STILL, SVM, Bumpy, adam_signals, closure_of, last_signals, leaf, random
from torch import Tensor

import discrete.online.closures
from discrete import AdamOLA
from ode_stopping.core.status import MissingGradientError


def signals_of(
    horizon: int, change: Callable[[int, list[Tensor]], Any], *, steps: int = 9, **options: Any
) -> list[float | None]:
    """Of a run over two tensors, with something happening before each step."""
    pieces = [leaf(random(3, seed=1)), leaf(random(3, seed=2))]
    optimizer = AdamOLA(pieces, 0.02, adapt_rate=STILL, horizon=horizon, **options)
    state = {"both": True}

    def loss() -> Tensor:
        a, b = pieces
        return Bumpy()(a, b if state["both"] else b.detach())

    closure = closure_of(optimizer, loss)
    for k in range(steps):
        state["both"] = change(k, pieces) is not False
        optimizer.step(closure)
    return optimizer.history.signals["lr"]


def no_gradient_in_step_four(k: int, pieces: list[Tensor]) -> bool:
    return k != 4


def moved_before_step_five(k: int, pieces: list[Tensor]) -> None:
    if k == 5:
        with torch.no_grad():
            pieces[1].mul_(0.9)


@pytest.mark.parametrize(
    ("change", "deterministic", "starts"),
    [
        # With the second tensor away, and with it back again.
        (no_gradient_in_step_four, False, (4, 5)),
        (moved_before_step_five, False, (5,)),
        (moved_before_step_five, True, (5,)),
    ],
)
def test_the_window_begins_anew_where_steps_do_not_line_up(
    change: Callable[[int, list[Tensor]], Any], deterministic: bool, starts: tuple[int, ...]
) -> None:
    by = {h: signals_of(h, change, deterministic=deterministic) for h in (1, 2, 3, 4, 9)}
    for begin in starts:
        assert by[9][begin] == pytest.approx(by[1][begin], rel=1e-12)
    for j in range(1, 4):
        place = starts[-1] + j
        assert by[9][place] == pytest.approx(by[j + 1][place], rel=1e-12)
        assert by[9][place] != pytest.approx(by[j][place], rel=1e-6)


def test_frozen_parameters() -> None:
    # From the start, by the gradient alone, or midway with a gradient of zero left behind.
    x, frozen, unused = leaf(random(3, seed=1)), random(3, seed=2), leaf([1.0])
    optimizer = AdamOLA([frozen, x, unused], 0.02, adapt_rate=STILL, horizon=3)
    kept = frozen.clone()
    signals, _ = last_signals(optimizer, lambda: Bumpy()(x, frozen), 6)
    options = [{"lr": [0.02] * 6, "betas": (0.9, 0.999)}]
    expected = adam_signals(lambda x: Bumpy()(x, kept), [random(3, seed=1)], options, 6, 3)
    assert signals["lr"] == pytest.approx(expected["lr"], rel=1e-10)
    assert torch.equal(frozen, kept)
    assert unused.item() == 1.0
    assert not optimizer.state.get(frozen)
    assert not optimizer.state.get(unused)

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = Bumpy()(x, frozen) + unused.detach().sum()
        loss.backward()
        return loss

    unused.grad = torch.zeros_like(unused)
    for _ in range(2):
        optimizer.step(closure)
    unused.requires_grad_(False)
    for _ in range(4):
        optimizer.step(closure)
    assert unused.item() == 1.0
    assert len(optimizer.history) == 12


# --- closures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("deterministic", [True, False])
def test_gradients_accumulated_over_parts(set_to_none: bool, deterministic: bool) -> None:
    # Several backward passes in one closure, and gradients that are written over by the next one.
    x = leaf(random(6, seed=1))
    optimizer = AdamOLA(
        [x],
        0.05,
        adapt_rate=STILL,
        horizon=3,
        deterministic=deterministic,
        adapt=("lr", "beta2"),
    )

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        parts = [0.25 * Bumpy()(x), 0.75 * Bumpy()(x)]
        for part in parts:
            part.backward()
        return parts[0] + parts[1]

    for _ in range(7):
        optimizer.step(closure)
    options = [{"lr": [0.05] * 7, "betas": (0.9, 0.999)}]
    expected = adam_signals(Bumpy(), [random(6, seed=1)], options, 7, 3)
    for name in ("lr", "beta2"):
        mine = optimizer.history.signals[name][-1]
        assert mine == pytest.approx(expected[name], rel=1e-10)


@pytest.mark.parametrize(
    "backward",
    [
        lambda loss: loss.backward(None, False, False),
        lambda loss: loss.backward(create_graph=False, retain_graph=True),
        lambda loss: loss.backward(torch.ones(()).double(), inputs=None),
    ],
)
def test_arguments_of_backward(backward: Callable[[Tensor], None]) -> None:
    x = leaf(random(6, seed=1))
    optimizer = AdamOLA([x], 0.05, adapt_rate=STILL, horizon=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = Bumpy()(x)
        backward(loss)
        return loss

    for _ in range(5):
        optimizer.step(closure)
    options = [{"lr": [0.05] * 5, "betas": (0.9, 0.999)}]
    expected = adam_signals(Bumpy(), [random(6, seed=1)], options, 5, 3)
    assert optimizer.history.signals["lr"][-1] == pytest.approx(expected["lr"], rel=1e-10)


def clipped(x: Tensor, loss: Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_([x], 1e-3)


def replaced(x: Tensor, loss: Tensor) -> None:
    loss.backward()
    assert x.grad is not None
    x.grad = x.grad * 0.5


def other_backward(x: Tensor, loss: Tensor) -> None:
    torch.autograd.backward(loss)


@pytest.mark.parametrize(
    ("backward", "message"),
    [
        (clipped, "changes it after loss.backward"),
        (replaced, "changes it after loss.backward"),
        (other_backward, "has to call loss.backward"),
    ],
)
def test_gradients_that_have_no_graph_are_refused(
    backward: Callable[[Tensor, Tensor], None], message: str
) -> None:
    x = leaf(random(6, seed=1))

    def closure() -> Tensor:
        x.grad = None
        loss = Bumpy()(x)
        backward(x, loss)
        return loss

    with pytest.raises(MissingGradientError, match=message):
        AdamOLA([x], 0.05, horizon=2).step(closure)
    # One step needs no graph: it takes what the closure leaves.
    AdamOLA([x], 0.05).step(closure)


# --- memory ---------------------------------------------------------------------------------------


class Marked(torch.autograd.Function):
    """The identity; its node of the graph holds an object that can be watched."""

    alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    class Marker:
        pass

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.marker = Marked.Marker()
        Marked.alive.add(ctx.marker)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@pytest.mark.parametrize(
    ("horizon", "deterministic", "steps", "alive"),
    # That of the loss in the loop; those of K - 1 gradients; and of the one for the next step.
    [(1, False, 100, 1), (3, False, 1000, 2), (3, True, 100, 3)],
)
def test_graphs_are_let_go(horizon: int, deterministic: bool, steps: int, alive: int) -> None:
    x = leaf(random(4, seed=1))
    optimizer = AdamOLA([x], 1e-3, horizon=horizon, deterministic=deterministic)
    closure = closure_of(optimizer, lambda: Marked.apply(x).square().sum())
    kept, counts = [], []
    gc.collect()
    gc.disable()  # what is let go by reference counting alone is let go at once
    try:
        for k in range(steps):
            loss = optimizer.step(closure)
            if horizon > 1:
                kept.append(loss)  # a list of losses keeps no graph of the window alive
            if k in (10, steps - 1):
                counts.append(len(Marked.alive))
    finally:
        gc.enable()
    assert counts == [alive, alive]
    del optimizer, closure, kept, loss
    gc.collect()
    assert not Marked.alive


def test_the_parameters_as_the_graph_saw_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # Saved tensors that are the parameters are copied: the optimiser moves them in place. torch
    # would raise otherwise, and not compute with the moved ones.
    monkeypatch.setattr(discrete.online.closures, "_keeping", lambda mode, _: mode)
    x = leaf(SVM().start)
    optimizer = AdamOLA([x], 0.05, horizon=3)
    closure = closure_of(optimizer, lambda: x.pow(4).sum())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        [optimizer.step(closure) for _ in range(3)]
