"""Memory: budgets are kept, and nothing stays behind after a call."""

from __future__ import annotations

import gc
import math
import resource
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from iterations import nonlinear, nonlinear_leaves
from torch import Tensor, nn
from variants import slow_after

from discrete import DiscreteAdjoint, Euler, IndexRoute, Truncated, Unrolled, stopping_index
from discrete.iterating.store import CheckpointStore, RecentStore
from discrete.rules.step_decrease import StepDecrease
from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    NotReachedError,
    StepAdjoint,
    stopping_time,
)

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
    leaves = nonlinear_leaves(step=0.002)
    result = nonlinear(leaves, gradient=DiscreteAdjoint(memory=8 * BYTES, chunk=4))
    result.steps.backward()
    # 750 steps in chunks of 4 would be 188 states.
    assert result.index > 700
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


CALLS = 50
WIDTH = 10_000  # of a state, 80 kB
KEPT = 12 * 2**20  # bytes; a trajectory a call would be several times that
TIME_ROUTES = (
    StepAdjoint(),
    InterpolatingAdjoint(),
    DirectAdjoint(),
    BacksolveAdjoint(),
    ForwardSensitivity(),
)
INDEX_ROUTES = (
    DiscreteAdjoint(),
    DiscreteAdjoint(memory=3 * 8 * WIDTH, chunk=2),
    Unrolled(),
    Truncated(steps=3),
)


class Decay(nn.Module):
    """x' = -rate x."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -self.rate * x


def mean_square(t: Tensor, x: Tensor) -> Tensor:
    return x.square().mean()


def live() -> tuple[int, int]:
    """Number and total size of the tensors that Python knows of."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return len(tensors), sum(tensor.numel() for tensor in tensors)


def resident() -> int:
    """Bytes in memory, saved tensors of graphs included, which Python does not see; 0: unknown."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.exists() else 0


def require_no_growth(call: Callable[[], object], calls: int = CALLS) -> None:
    """Repeated calls leave no tensors and no memory."""
    for _ in range(3):
        call()
    before, start = live(), resident()
    for _ in range(calls):
        call()
    assert live() == before
    assert resident() - start < KEPT


@pytest.mark.parametrize(
    "route", slow_after(3, TIME_ROUTES), ids=lambda route: type(route).__name__
)
def test_repeated_stopping_times_leave_nothing(route: GradientRoute) -> None:
    flow = Decay()
    # Forward sensitivity has a column for every number in x0.
    width = 20 if isinstance(route, ForwardSensitivity) else WIDTH
    x0 = torch.ones(width, dtype=torch.float64)

    def call() -> None:
        stopping_time(flow, x0, mean_square, 0.98, gradient=route, evidence="light").time.backward()

    require_no_growth(call)
    assert flow.rate.grad is not None
    expected = (CALLS + 3) * math.log(0.98) / 2
    assert flow.rate.grad.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("route", "interpolation"),
    [
        *((route, None) for route in INDEX_ROUTES),
        (DiscreteAdjoint(), "log"),
        *(
            pytest.param(DiscreteAdjoint(), way, marks=pytest.mark.slow)
            for way in ("hermite", "partial_step")
        ),
    ],
    ids=str,
)
def test_repeated_stopping_indices_leave_nothing(route: IndexRoute, interpolation: Any) -> None:
    flow = Decay()
    x0 = torch.ones(WIDTH, dtype=torch.float64)

    def call() -> None:
        rule = Euler(flow, step=0.1)
        result = stopping_index(
            rule, x0, mean_square, 0.4, interpolation=interpolation, gradient=route
        )
        assert isinstance(result.state, Tensor)
        (result.steps + result.state.sum()).backward()

    require_no_growth(call)


@pytest.mark.parametrize("kind", ["miss", "start", "error", "unused", "second", "step decrease"])
def test_other_ways_to_end_leave_nothing(kind: str) -> None:
    """Misses, errors in the backward pass, results that nobody differentiates."""
    flow = Decay()
    x0 = torch.ones(WIDTH, dtype=torch.float64)
    criterion = StepDecrease(lambda x: x.square().mean())

    def call() -> None:
        if kind == "step decrease":
            state = criterion.initial_state(x0)
            update = criterion.wrap(Euler(flow, step=0.05))
            stopping_index(update, state, criterion, 0.07).steps.backward()
            return
        target = {"start": 2.0, "miss": 0.5, "error": 0.5}.get(kind, 0.9)
        result = stopping_time(flow, x0, mean_square, target, max_time=0.1, throw=False)
        index = stopping_index(Euler(flow, step=0.05), x0, mean_square, target, max_steps=4)
        for value in (result.time, index.steps):
            if kind == "second":
                (first,) = torch.autograd.grad(value, flow.rate, create_graph=True)
                with pytest.raises(RuntimeError, match="differentiated again"):
                    first.backward()
            elif kind == "error":
                with pytest.raises(NotReachedError):
                    value.backward()
            elif kind == "start":
                value.backward()

    require_no_growth(call, 20)


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("route", TIME_ROUTES, ids=lambda route: type(route).__name__)
@pytest.mark.parametrize("differentiated", [True, False])
def test_a_stopping_time_is_freed_at_once(route: GradientRoute, differentiated: bool) -> None:
    flow = Decay()
    x0 = torch.ones(3, dtype=torch.float64)
    result = stopping_time(flow, x0, mean_square, 0.1, gradient=route)
    if differentiated:
        result.time.backward()
    assert result.problem is not None
    watched: list[weakref.ref[Any]] = [
        weakref.ref(thing)
        for thing in (result, result.problem, result.problem.flow, result.trajectory, result.time)
    ]
    del result
    assert [reference() for reference in watched] == [None] * 5


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("route", [*TIME_ROUTES, None], ids=lambda route: type(route).__name__)
def test_no_cycle_holds_a_state(route: GradientRoute | None) -> None:
    """Nothing of the size of a state waits for the collector (SciPy's brentq leaves a cycle)."""
    flow = Decay()
    x0 = torch.ones(37, dtype=torch.float64)

    def call() -> None:
        result = stopping_time(flow, x0, mean_square, 0.1, gradient=route)
        if route is not None:
            result.time.backward()

    def states() -> int:
        things = gc.get_objects()
        return sum(issubclass(type(thing), Tensor) and thing.numel() == 37 for thing in things)

    call()
    gc.collect()
    before = states()
    call()
    assert states() == before
