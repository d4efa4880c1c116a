"""Memory: budgets are kept, and nothing stays behind after a call."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from iterations import nonlinear, nonlinear_leaves
from torch import Tensor, nn

from discrete import DiscreteAdjoint, Euler, stopping_index
from discrete.store import CheckpointStore, RecentStore

STATE = torch.zeros(4, dtype=torch.float64)
BYTES = 32


def filled(store: CheckpointStore, count: int) -> CheckpointStore:
    for k in range(count):
        store.add(k, STATE + k)
        assert len(store.indices()) <= 10
    return store


def test_budget_and_doubling_of_the_stride() -> None:
    store = CheckpointStore(10 * BYTES)
    assert filled(store, 10).indices() == list(range(10))
    assert store.stride == 1
    store.add(10, STATE + 10)
    assert store.stride == 2
    assert store.indices() == [0, 2, 4, 6, 8, 10]
    store = filled(CheckpointStore(10 * BYTES), 1000)
    assert store.stride == 128
    assert store.indices() == list(range(0, 1000, 128))
    for k in store.indices():
        kept = store.get(k)
        assert kept is not None
        assert torch.equal(kept, STATE + k)
    assert store.get(1) is None


@pytest.mark.parametrize("memory", [1, BYTES, 2 * BYTES])
def test_two_states_are_always_kept(memory: int) -> None:
    store = filled(CheckpointStore(memory), 100)
    assert store.indices() == [0, 64]


def test_a_store_that_starts_with_a_stride() -> None:
    store = filled(CheckpointStore(10 * BYTES, stride=7), 50)
    assert store.indices() == list(range(0, 50, 7))


def test_recent_states() -> None:
    store = RecentStore(3)
    for k in range(10):
        store.add(k, STATE + k)
    assert store.indices() == [7, 8, 9]
    assert store.get(6) is None
    assert store.get(8) is not None


def test_budget_holds_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches between checkpoints are replayed within the budget as well, level by level."""
    alive: list[weakref.ref[CheckpointStore]] = []
    most = 0
    add = CheckpointStore.add

    def counted(self: CheckpointStore, k: int, state: Tensor) -> None:
        nonlocal most
        if not any(reference() is self for reference in alive):
            alive.append(weakref.ref(self))
        add(self, k, state)
        stores = [store for reference in alive if (store := reference()) is not None]
        assert all(len(store.indices()) <= 8 for store in stores)
        most = max(most, sum(len(store.indices()) for store in stores))

    monkeypatch.setattr(CheckpointStore, "add", counted)
    leaves = nonlinear_leaves(step=0.001)
    result = nonlinear(leaves, gradient=DiscreteAdjoint(memory=8 * BYTES, chunk=4))
    result.steps.backward()
    # 1500 steps in chunks of 4 would be 375 states.
    assert result.index > 1400
    assert most <= 4 * 8
    assert result.stats.nfe_backward is not None
    assert result.stats.nfe_backward < 5 * result.index


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("interpolation", [None, "log", "hermite", "partial_step"])
def test_a_result_is_freed_at_once(interpolation: str | None) -> None:
    """No reference cycles: when the last name is gone, states and graphs are."""
    leaves = nonlinear_leaves()
    result = nonlinear(leaves, interpolation=interpolation)
    result.steps.backward()
    assert result.problem is not None
    watched = [weakref.ref(result), weakref.ref(result.problem), weakref.ref(result.problem.update)]
    watched.append(weakref.ref(result.problem.previous))
    del result
    assert [reference() for reference in watched] == [None] * 4


def test_fifty_calls_leave_nothing() -> None:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.ones(50, dtype=torch.float64))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return -self.rate * x

    flow = Flow()
    x0 = torch.ones(50, dtype=torch.float64, requires_grad=True)

    def call() -> None:
        result = stopping_index(
            Euler(flow, step=0.05), x0, lambda t, x: x.square().sum(), 1.0, interpolation="log"
        )
        (result.steps + result.state.sum()).backward()

    def live() -> tuple[int, int]:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
        return len(tensors), sum(tensor.numel() for tensor in tensors)

    for _ in range(3):
        call()
    before = live()
    for _ in range(50):
        call()
    assert live() == before
