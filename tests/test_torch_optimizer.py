"""`TorchOptimizer`: the numbers of torch.optim, and derivatives that differences confirm."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from iterations import number
from optimizer_cases import CASES, IDLE, ROUNDED, Bowl, adapted, leaves, report_of, start
from torch import Tensor, nn

import discrete.rules.torch_optim.traced_step
from discrete import (
    DiscreteAdjoint,
    StepDecrease,
    TorchOptimizer,
    Truncated,
    Unrolled,
    check_index_gradient,
    stopping_index,
)
from ode_stopping import GradientNorm, LossValue
from ode_stopping.core.status import MissingGradientError

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "how-to-torch-optimisers.md"
optim = torch.optim
VARIANTS = (
    "RMSprop-centered",
    "Adam-amsgrad",
    "NAdam-decoupled",
    "Rprop-bounded",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "Rprop",
    "Adafactor",
)
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def beside_torch(name: str, steps: int, x0: Tensor, **more: Any) -> float:
    """The largest distance to a run of the optimiser itself."""
    kind, options, fixed = CASES[name]
    f = Bowl(x0.dtype)
    mine = TorchOptimizer(kind, f, **options, **fixed, **more)
    parameter = nn.Parameter(x0.clone())
    own = {} if kind is optim.Adafactor else {"foreach": False}
    theirs = kind([parameter], **options, **fixed, **more, **own)  # type: ignore[arg-type]
    state, gap = mine.initial_state(x0), 0.0
    with torch.no_grad():
        for k in range(steps):
            with torch.enable_grad():
                (parameter.grad,) = torch.autograd.grad(f(parameter), parameter)
            theirs.step()
            state = mine(k, state)
            gap = max(gap, float((state[0] - parameter).abs().max()))
    assert not torch.equal(parameter.detach(), x0)
    return gap


@pytest.mark.parametrize("name", [name for name in CASES if name not in ROUNDED])
def test_numbers_of_torch(name: str) -> None:
    assert beside_torch(name, 200, start(grad=False)) == 0.0
    assert beside_torch(name, 20, start(grad=False, dtype=torch.float32)) == 0.0


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", ROUNDED)
def test_numbers_of_torch_in_double_precision(name: str) -> None:
    assert beside_torch(name, 200, start(grad=False)) == 0.0


@pytest.mark.parametrize("name", ROUNDED)
def test_numbers_of_torch_up_to_its_single_precision(name: str) -> None:
    assert 0.0 < beside_torch(name, 10, start(grad=False)) < 1e-6
    assert beside_torch(name, 20, start(grad=False, dtype=torch.float32)) == 0.0


def test_other_shapes_and_maximize() -> None:
    matrix = torch.tensor([[1.5, 0.7, 0.0], [0.1, -0.2, 0.3]], dtype=torch.float64)
    for name in ("SGD-momentum", "Adam", "Adafactor", "Rprop"):
        assert beside_torch(name, 20, matrix) == 0.0
    assert beside_torch("Adam", 20, start(grad=False), maximize=True) == 0.0


@every_case
def test_with_a_graph_the_numbers_are_the_same(name: str) -> None:
    update = adapted(name)
    state = update.initial_state(start(grad=False))
    for k in range(40):
        point = tuple(piece.clone().requires_grad_(True) for piece in state)
        traced = update(k, point)
        with torch.no_grad():
            state, again = update(k, state), update(k, state)
        assert traced[0].requires_grad
        for mine, plain, twice in zip(traced, state, again, strict=True):
            assert torch.equal(mine.detach(), plain)
            assert torch.equal(twice, plain)


@pytest.mark.parametrize(
    "name",
    # What the adapter does is the same for all: the variants take three times as long again.
    [pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in CASES],
)
def test_gradient_to_every_hyperparameter(name: str) -> None:
    report = report_of(adapted(name))
    assert report.passed, report
    names = {"x0[0]", "update.objective.theta"}
    for option, value in CASES[name][1].items():
        inside = [f"[{i}]" for i in range(len(value))] if isinstance(value, tuple) else [""]
        names |= {f"update.options[{option!r}]{entry}" for entry in inside}
    assert set(report.subjects) == names
    idle = {f.subject.removeprefix("update.options") for f in report.findings if f.gradient == 0}
    assert idle == IDLE.get(name, set())
    assert report.time > 5


def test_gradient_of_the_mean_of_asgd() -> None:
    update = adapted("ASGD")
    mean = GradientNorm(update.objective, position=lambda state: update.buffer(state, "ax"))
    report = check_index_gradient(
        update, update.initial_state(start()), mean, 1.0, directions=1, max_steps=100
    )
    assert report.passed, report
    assert "update.options['t0']" in report.subjects


def test_gradient_to_the_bounds_of_adafactor() -> None:
    # Down a hill that is flat at the top: the gradient grows, and meets one bound after the other.
    def hill(x: Tensor) -> Tensor:
        return torch.cos(x).sum() + 2.0

    options = {"lr": 0.15, "beta2_decay": -0.8, "eps": (0.35, 2.5), "d": 1.05, "weight_decay": 0.02}
    for x0 in (number([0.3, 0.5]), torch.tensor([[0.3, 0.5], [0.4, 0.2]], dtype=torch.float64)):
        update = TorchOptimizer(optim.Adafactor, hill, **leaves(options))
        state = update.initial_state(x0)
        report = check_index_gradient(update, state, LossValue(hill), x0.numel() - 1.7)
        assert report.passed, report
        assert all(f.gradient != 0 for f in report.findings if x0.ndim == 1)


@pytest.mark.parametrize("formula", ["addcdiv", "lerp", "mul", "div", "addcmul", "add"])
def test_a_planted_sign_is_caught(formula: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = discrete.rules.torch_optim.traced_step._FORMULAS[formula]

    def wrong(t: Tensor, *rest: Any, **more: Any) -> Tensor:
        value = right(t, *rest, **more)
        return 2 * value.detach() - value

    monkeypatch.setitem(discrete.rules.torch_optim.traced_step._FORMULAS, formula, wrong)
    with pytest.raises((MissingGradientError, AssertionError), match=r"wrong|WRONG"):
        assert report_of(adapted("Adam")).passed, "WRONG"


def test_first_momentum_of_sgd_keeps_its_derivative() -> None:
    # torch detaches it, with differentiable=True as well: x_1 = x_0 - lr grad f(x_0) all the same.
    update = adapted("SGD-momentum", grad=False)
    x0 = start()
    (buffer,) = update.initial_state(x0)[1:]
    jacobian = torch.autograd.functional.jacobian(lambda x: update(0, (x, buffer))[0], x0)
    hessian = torch.autograd.functional.hessian(update.objective, x0)
    eye = torch.eye(2, dtype=torch.float64)
    expected = eye - 0.1 * (hessian + 0.02 * eye)
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "route", [Unrolled(), DiscreteAdjoint(memory=300, chunk=3), Truncated(1000)], ids=repr
)
def test_routes_and_a_learning_rate_with_a_history(route: Any) -> None:
    rate = number(-2.3)

    def gradients(lr: Tensor, gradient: Any) -> tuple[Tensor, ...]:
        update, x0 = TorchOptimizer(optim.Adam, f, lr=lr), start()
        criterion = GradientNorm(f)
        run = stopping_index(update, update.initial_state(x0), criterion, 0.3, gradient=gradient)
        assert run.index > 5
        return torch.autograd.grad(run.steps, [lr, x0, f.theta])

    f = Bowl()
    lr = rate.exp()
    expected = gradients(lr.detach().requires_grad_(True), DiscreteAdjoint())
    update, x0 = TorchOptimizer(optim.Adam, f, lr=rate.exp()), start()
    run = stopping_index(update, update.initial_state(x0), GradientNorm(f), 0.3, gradient=route)
    found = torch.autograd.grad(run.steps, [rate, x0, f.theta])
    torch.testing.assert_close(found[0], expected[0] * lr.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-10, atol=0)


def test_float32_mixed_dtypes_and_no_dimensions() -> None:
    def index(x0: Tensor, f: Any, lr: Tensor) -> tuple[Tensor, Tensor]:
        update = TorchOptimizer(optim.Adam, f, lr=lr)
        state = update.initial_state(x0)
        run = stopping_index(update, state, GradientNorm(f), 0.3, interpolation="log")
        (gradient,) = torch.autograd.grad(run.steps, lr)
        return run.steps.detach(), gradient.double()

    exact = index(start(grad=False), Bowl(), number(0.1))
    single = nn.Parameter(torch.tensor(0.1))
    for dtype in (torch.float32, torch.float64):
        found = index(start(grad=False, dtype=dtype), Bowl(dtype), single)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)
    points = [torch.tensor(value, dtype=torch.float64) for value in (1.5, [1.5])]
    for mine, theirs in zip(
        *(index(x, lambda x: x.square().sum(), number(0.1)) for x in points), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)


def test_with_step_decrease() -> None:
    update = adapted("Adam")
    criterion = StepDecrease(update.objective, initial=10.0)
    report = check_index_gradient(
        criterion.wrap(update),
        criterion.initial_state(update.initial_state(start())),
        criterion,
        0.02,
        directions=1,
    )
    assert report.passed, report


def test_a_changed_hyperparameter_takes_effect() -> None:
    lr = number(0.1)
    update, x0 = TorchOptimizer(optim.SGD, Bowl(), lr=lr), start(grad=False)
    with torch.no_grad():
        state = update.initial_state(x0)
        (short,) = update(1, state)
        lr.mul_(2.0)
        (long,) = update(1, state)
    torch.testing.assert_close(long - x0, 2 * (short - x0), rtol=1e-12, atol=0)


def test_copies_and_pickles_go_the_same_way() -> None:
    update = TorchOptimizer(optim.Adam, Bowl(), lr=0.1)
    state = update.initial_state(start(grad=False))
    for other in (copy.deepcopy(update), pickle.loads(pickle.dumps(update))):
        assert torch.equal(other(0, state)[0], update(0, state)[0])


@pytest.mark.parametrize("name", ["Adam", "NAdam", "Rprop", "Adafactor"])
def test_no_graph_waits_for_the_collector(name: str) -> None:
    update = adapted(name)
    state = tuple(p.detach().requires_grad_() for p in update.initial_state(start()))

    def step() -> None:
        after = update(1, update(0, state))
        torch.autograd.grad(torch.cat([p.reshape(-1) for p in after]).sum(), state[0])

    step()
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for _ in range(20):
            step()
        assert len(gc.get_objects()) - before < 20
    finally:
        gc.enable()


def test_nothing_of_the_users_is_changed() -> None:
    class Linear:
        slope = torch.tensor([0.3, -0.2], dtype=torch.float64)

        def __call__(self, x: Tensor) -> Tensor:
            return (self.slope * x).sum()

        def gradient(self, x: Tensor) -> Tensor:
            return self.slope

    f, x0, decay = Linear(), start(), number(0.1)
    update = TorchOptimizer(optim.SGD, f, lr=0.1, momentum=0.9, weight_decay=decay)
    state = update.initial_state(x0)
    assert state[0] is x0
    update(1, update(0, state))
    with torch.no_grad():
        update(1, update(0, state))
    for tensor in (f.slope, x0, decay, *state):
        assert tensor._version == 0
        assert tensor.grad is None


def test_example_of_the_page(tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == printed


def test_tables_say_what_is_tested() -> None:
    tested: dict[str, set[str]] = {}
    for kind, options, _ in CASES.values():
        tested.setdefault(kind.__name__, set()).update(options)
    rows = re.findall(r"^\| (\w+) \| (lr, .*) \|$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    assert {name: set(names.split(", ")) for name, names in rows} == tested
    docstring = re.findall(r"^    ([A-Z][\w, ]+?)  +(lr, .*)$", TorchOptimizer.__doc__ or "", re.M)
    listed = {
        name: set(names.split(", ")) for group, names in docstring for name in group.split(", ")
    }
    assert listed == tested
