"""Nothing of the user's is changed, not for a moment: threads give the bits of one thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discrete import Euler, TorchOptimizer, check_index_gradient, stopping_index
from ode_stopping import (
    GradientFlow,
    InterpolatingAdjoint,
    LossValue,
    ModuleObjective,
    PreconditionedFlow,
    Quadratic,
    StepAdjoint,
    Torchdiffeq,
    check_stopping_gradient,
    stopping_time,
)
from ode_stopping.core.substitution import Substitution

F64 = torch.float64
THREADS = 4
ROUNDS = 3

Work = Callable[[], list[Tensor]]


def closures() -> tuple[Work, list[Tensor]]:
    """A flow and a criterion over two tensors that everybody shares."""
    rates = torch.tensor([1.0, 0.3], dtype=F64, requires_grad=True)
    weights = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    x0 = torch.tensor([1.0, -2.0], dtype=F64)

    def work() -> list[Tensor]:
        result = stopping_time(
            lambda t, x: -rates * x - 0.1 * x**3, x0, lambda t, x: (weights * x * x).sum(), 1e-2
        )
        return [result.time, *torch.autograd.grad(result.time, [rates, weights])]

    return work, [rates, weights]


def modules() -> tuple[Work, list[Tensor]]:
    """The library's objects, by the continuous adjoint."""
    problem = Quadratic(torch.tensor([1.0, 0.2, 0.05], dtype=F64))
    flow = PreconditionedFlow(problem, preconditioner=nn.Parameter(torch.ones(3, dtype=F64)))
    criterion, x0 = LossValue(problem), torch.ones(3, dtype=F64)

    def work() -> list[Tensor]:
        result = stopping_time(flow, x0, criterion, 1e-2, gradient=InterpolatingAdjoint())
        return [result.time, *torch.autograd.grad(result.time, list(flow.parameters()))]

    return work, list(flow.parameters())


def network() -> tuple[Work, list[Tensor]]:
    """The training of one network, into which torch puts the entries of x for every call."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    inputs = torch.randn(8, 2, generator=generator, dtype=F64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=F64))
    objective = ModuleObjective(model, nn.functional.mse_loss, data=(inputs, inputs[:, :1]))
    x0 = objective.initial_point()
    start = float(objective(x0))

    def work() -> list[Tensor]:
        flow = GradientFlow(objective)
        result = stopping_time(
            flow,
            x0.clone().requires_grad_(),
            LossValue(objective),
            0.5 * start,
            gradient=StepAdjoint(),
            solver=Torchdiffeq(rtol=1e-4),
        )
        return [result.time, result.state, result.rate]

    return work, list(model.parameters())


def index() -> tuple[Work, list[Tensor]]:
    """The discrete side: an update rule whose step requires grad."""
    rates = torch.tensor([1.0, 0.3], dtype=F64, requires_grad=True)
    step = torch.tensor(0.05, dtype=F64, requires_grad=True)
    x0 = torch.tensor([1.0, -2.0], dtype=F64)

    def work() -> list[Tensor]:
        rule = Euler(lambda t, x: -rates * x, step=step)
        result = stopping_index(rule, x0, lambda t, x: (x * x).sum(), 1e-2, interpolation="log")
        return [result.steps, *torch.autograd.grad(result.steps, [rates, step])]

    return work, [rates, step]


def optimizer() -> tuple[Work, list[Tensor]]:
    """One `TorchOptimizer` for all threads."""
    rate = torch.tensor(0.1, dtype=F64, requires_grad=True)
    problem = Quadratic(torch.tensor([1.0, 0.2], dtype=F64))
    rule = TorchOptimizer(torch.optim.Adam, problem, lr=rate)
    x0 = torch.tensor([1.0, -2.0], dtype=F64)
    criterion = LossValue(problem, position=rule.position)

    def work() -> list[Tensor]:
        result = stopping_index(rule, rule.initial_state(x0), criterion, 1e-2)
        return [result.steps, *torch.autograd.grad(result.steps, [rate])]

    return work, [rate]


CASES = [closures, modules, network, index, optimizer]


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns a thousand times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("case", CASES)
def test_threads_give_the_bits_of_one_thread(
    case: Callable[[], tuple[Work, list[Tensor]]],
) -> None:
    work, shared = case()
    before = [(p.detach().clone(), p._version, p.data_ptr()) for p in shared]
    alone = work()
    start = threading.Barrier(THREADS)

    def together(_: int) -> list[list[Tensor]]:
        start.wait()
        return [work() for _ in range(ROUNDS)]

    with ThreadPoolExecutor(THREADS) as pool:
        found = [one for many in pool.map(together, range(THREADS)) for one in many]
    for answers in found:
        for own, single in zip(answers, alone, strict=True):
            assert torch.equal(own, single)
    for p, (value, version, address) in zip(shared, before, strict=True):
        assert torch.equal(p, value)
        assert (p._version, p.data_ptr()) == (version, address)
        assert p.grad is None


@pytest.mark.usefixtures("eager_switching")
def test_a_check_beside_a_solve() -> None:
    """The check moves the parameters that the other thread solves with: for itself alone."""
    work, shared = closures()
    (rates, weights), alone = shared, work()
    x0 = torch.tensor([1.0, -2.0], dtype=F64)
    done = threading.Event()

    def checked() -> bool:
        try:
            report = check_stopping_gradient(
                lambda t, x: -rates * x - 0.1 * x**3,
                x0,
                lambda t, x: (weights * x * x).sum(),
                1e-2,
                directions=1,
            )
            return report.passed
        finally:
            done.set()

    def solved() -> list[list[Tensor]]:
        answers = [work()]
        while not done.is_set():
            answers.append(work())
        return answers

    with ThreadPoolExecutor(2) as pool:
        check, solve = pool.submit(checked), pool.submit(solved)
        assert check.result()
        for answers in solve.result():
            assert all(torch.equal(own, single) for own, single in zip(answers, alone, strict=True))


class Interrupt(KeyboardInterrupt):
    """Ctrl-C at a place that the test chooses."""


@pytest.mark.parametrize("side", ["time", "index", "check time", "check index"])
def test_an_interrupt_leaves_everything_as_it_was(side: str) -> None:
    """At any evaluation, the n-th for every n that there is (in a check: some of them)."""
    theta = torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    x0 = torch.tensor([1.0, 2.0], dtype=F64)
    before, version, address = theta.detach().clone(), theta._version, theta.data_ptr()
    calls = 0
    at = 0

    def flow(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Interrupt
        return -theta * x

    def criterion(t: Tensor, x: Tensor) -> Tensor:
        return (x * x).sum()

    def run() -> None:
        rule = Euler(flow, step=0.1)
        if side == "time":
            stopping_time(flow, x0, criterion, 0.1).time.backward()
        elif side == "index":
            stopping_index(rule, x0, criterion, 0.1).steps.backward()
        elif side == "check time":
            check_stopping_gradient(flow, x0, criterion, 0.1, directions=1)
        else:
            check_index_gradient(rule, x0, criterion, 0.1, directions=1)

    run()
    total = calls
    theta.grad = None
    stride = 1 if total < 400 else total // 8
    assert total > 20
    for n in range(1, total + 1, stride):
        calls, at = 0, n
        with pytest.raises(Interrupt):
            run()
        assert torch.equal(theta, before)
        assert (theta._version, theta.data_ptr(), theta.requires_grad) == (version, address, True)
        assert theta.grad is None
        assert torch.is_grad_enabled()


# --- the substitution itself --------------------------------------------------------------------


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        a, b = ctx.saved_tensors
        return g * b, g * a


USES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "operator": lambda p, x: p * x,
    "operator from the right": lambda p, x: x * p,
    "method": lambda p, x: x.add(p),
    "entry": lambda p, x: p[0] * x,
    "iteration": lambda p, x: sum(list(p)) * x,
    "list": lambda p, x: torch.stack([p, x]),
    "tuple": lambda p, x: torch.cat((p, x)),
    "keyword": lambda p, x: torch.mul(input=x, other=p),
    "number": lambda p, x: x * p[0].item(),
    "float": lambda p, x: x * float(p.detach().sum()),
    "data": lambda p, x: p.data * x,
    "numpy": lambda p, x: torch.as_tensor(p.detach().numpy()) * x,
    "branch": lambda p, x: x if bool(p.sum() > 5.0) else -x,
    "function of one's own": lambda p, x: _Product.apply(p, x),
    "derivative inside": lambda p, x: torch.autograd.grad((p * p * x).sum(), p)[0],
    "vmap": lambda p, x: torch.func.vmap(lambda a: a * p)(x),
    "in place": lambda p, x: x.clone().mul_(p),
}


@pytest.mark.parametrize("use", USES)
def test_whatever_torch_is_asked_for_sees_the_other_value(use: str) -> None:
    p = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    other = torch.tensor([3.0, 5.0], dtype=F64, requires_grad=True)
    x = torch.tensor([0.5, -1.0], dtype=F64)
    with Substitution([p], [other]) as looked:
        found = USES[use](p, x)
        assert p.requires_grad
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(USES[use](other, x)))
    assert not torch.equal(torch.as_tensor(found), torch.as_tensor(USES[use](p, x)))
    assert looked.met == [True]
    assert p.tolist() == [1.0, 2.0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_a_scripted_function_holds_is_not_met() -> None:
    module = torch.jit.trace(nn.Linear(2, 2).double(), torch.ones(2, dtype=F64))
    p = next(module.parameters())
    with Substitution([p], [p + 1.0]) as looked:
        module(torch.ones(2, dtype=F64))
    assert looked.met == [False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_flow_is_not_accused() -> None:
    """Its parameters cannot be moved for a comparison: nothing is said against a right gradient."""
    inner = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        inner.weight.fill_(-0.7)
    module = torch.jit.trace(inner, torch.ones(1, dtype=F64))
    x0 = torch.ones(1, dtype=F64)
    result = stopping_time(lambda t, x: module(x), x0, lambda t, x: x.sum(), 0.1)
    (gradient,) = torch.autograd.grad(result.time, list(module.parameters()))
    # T = log(x0/eps)/a for x' = -a x, and the weight is -a.
    truth = torch.log(torch.tensor(10.0, dtype=F64)) / 0.7**2
    assert gradient.item() == pytest.approx(float(truth), rel=1e-6)
