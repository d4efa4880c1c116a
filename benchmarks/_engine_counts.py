"""What `engine.py` counts and times beyond the user's functions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from time import process_time
from typing import Any

import torch
from _engine_cases import RotatedQuadratic, Subject
from _engine_runs import Sample, solve
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = frozenset({"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select"})
_COPIES = frozenset({"tolist", "numpy", "__array__"})  # reads that no operation shows


class Counter(TorchDispatchMode):
    """Counts host reads and other operations, but for those inside `theirs()`."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = self.operations = 0
        self._counting = True

    @contextmanager
    def theirs(self) -> Iterator[None]:
        """What runs in here is the user's."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def wrapped(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The user's function, its operations not counted."""

        def inner(t: Tensor, y: Tensor) -> Tensor:
            with self.theirs():
                return function(t, y)

        return inner

    def read(self) -> None:
        """A host read that is no operation of its own."""
        self.reads += self._counting

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count an operation and run it."""
        if self._counting:
            name = func.overloadpacket.__name__
            self.reads += name in _READS
            self.operations += name not in _READS
        return func(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note what copies a tensor to the host, and run it."""
        if getattr(func, "__name__", "") in _COPIES:
            self.counter.read()
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Counts:
    """Reads and own operations of both passes, with the steps and products they are spread over."""

    forward: tuple[int, int]
    backward: tuple[int, int]
    tried: int
    accepted: int
    products: int


def counted(subject: Subject) -> Counts:
    """Counts of one run by the default route.

    Backward, the operations of an eager product (the backward half of the flow's graph) are taken
    off once a product; the flow's forward half is not counted in the first place.
    """
    _product(subject)  # what is set up once is not counted
    pull, counter = Counter(), Counter()
    _product(subject, pull)
    flow, criterion = counter.wrapped(subject.flow), counter.wrapped(subject.criterion)
    with counter, _Copies(counter):
        result = solve(replace(subject, flow=flow, criterion=criterion))
        reads, operations = counter.reads, counter.operations
        result.time.backward()
    stats = result.stats
    products = stats.vjps or 0
    return Counts(
        (reads, operations),
        (counter.reads - reads, counter.operations - operations - products * pull.operations),
        stats.accepted + stats.rejected,
        stats.accepted,
        products,
    )


def _product(subject: Subject, counter: Counter | None = None) -> None:
    """One eager vector-Jacobian product of the flow; only its backward half is counted."""
    y = subject.x0.detach().requires_grad_()
    value = subject.flow(torch.zeros((), dtype=y.dtype), y)
    with counter if counter is not None else nullcontext():
        torch.autograd.grad(value, [y, *subject.leaves[:-1]], torch.ones_like(y))


def microseconds_beyond(
    case: RotatedQuadratic, run: Callable[[], Sample], rounds: int
) -> tuple[float, float]:
    """CPU microseconds beyond F: forward per evaluation, backward per product (medians).

    Forward, flow and criterion are called alone as often as the run did, and that is taken off;
    backward, an eager product for each one.
    """
    forward, backward = [], []
    for turn in range(rounds + 1):
        sample, subject = run(), case.closures()
        assert sample.result is not None
        stats = sample.result.stats
        evaluations, products = stats.nfe_forward, stats.vjps or 1
        state = torch.zeros((), dtype=subject.x0.dtype), subject.x0.detach()
        with torch.no_grad():
            alone = _seconds(partial(subject.flow, *state), evaluations)
            alone += _seconds(partial(subject.criterion, *state), stats.criterion_calls)
        eager = _seconds(partial(_product, subject), products)
        if turn:  # the first round warms up
            forward.append((sample.forward - alone) / evaluations)
            backward.append((sample.backward - eager) / products)
    return 1e6 * statistics.median(forward), 1e6 * statistics.median(backward)


def _seconds(action: Callable[[], object], times: int) -> float:
    begin = process_time()
    for _ in range(times):
        action()
    return process_time() - begin
