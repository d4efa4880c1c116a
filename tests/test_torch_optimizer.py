"""`TorchOptimizer`: the numbers of torch.optim, and derivatives that differences confirm."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from iterations import number
from torch import Tensor, nn
from torch.optim import Optimizer

import discrete.traced_step
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
from ode_stopping.status import GradientError, MissingGradientError

ROOT = Path(__file__).resolve().parents[1]
optim = torch.optim
MOMENTS = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.02}

# Optimiser, hyperparameters that are differentiated, options that are not.
CASES: dict[str, tuple[type[Optimizer], dict[str, Any], dict[str, Any]]] = {
    "SGD": (optim.SGD, {"lr": 0.1, "weight_decay": 0.02}, {}),
    "SGD-momentum": (
        optim.SGD,
        {"lr": 0.1, "momentum": 0.7, "dampening": 0.3, "weight_decay": 0.02},
        {},
    ),
    "SGD-nesterov": (
        optim.SGD,
        {"lr": 0.05, "momentum": 0.7, "weight_decay": 0.02},
        {"nesterov": True},
    ),
    "Adam": (optim.Adam, MOMENTS, {}),
    "Adam-amsgrad": (optim.Adam, MOMENTS, {"amsgrad": True}),
    "AdamW": (optim.AdamW, MOMENTS, {}),
    "NAdam": (optim.NAdam, {**MOMENTS, "momentum_decay": 0.004}, {}),
    "NAdam-decoupled": (
        optim.NAdam,
        {"lr": 0.1, "weight_decay": 0.02},
        {"decoupled_weight_decay": True},
    ),
    "RAdam": (optim.RAdam, MOMENTS, {}),
    "RMSprop": (optim.RMSprop, {"lr": 0.05, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.02}, {}),
    "RMSprop-centered": (
        optim.RMSprop,
        {"lr": 0.03, "alpha": 0.9, "eps": 0.1, "weight_decay": 0.02, "momentum": 0.5},
        {"centered": True},
    ),
    "Adagrad": (
        optim.Adagrad,
        {
            "lr": 0.4,
            "lr_decay": 0.01,
            "weight_decay": 0.02,
            "initial_accumulator_value": 0.1,
            "eps": 1e-3,
        },
        {},
    ),
    "Adadelta": (optim.Adadelta, {"lr": 1.2, "rho": 0.9, "eps": 1e-2, "weight_decay": 0.02}, {}),
    "Adamax": (optim.Adamax, MOMENTS, {}),
    "Adafactor": (
        optim.Adafactor,
        {"lr": 0.1, "beta2_decay": -0.8, "eps": (1e-3, 1e-3), "d": 1.1, "weight_decay": 0.02},
        {},
    ),
    "ASGD": (
        optim.ASGD,
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.7, "t0": 2.5, "weight_decay": 0.02},
        {},
    ),
    "Rprop": (optim.Rprop, {"lr": 0.02, "etas": (0.5, 1.2), "step_sizes": (1e-4, 0.3)}, {}),
}
# They keep numbers in single precision, unless the default dtype is double.
ROUNDED = ("NAdam", "NAdam-decoupled", "ASGD")
every_case = pytest.mark.parametrize("name", CASES)


class Bowl:
    """A quartic bowl in two coupled unknowns, with a leaf."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.theta = torch.tensor(1.3, dtype=dtype, requires_grad=True)

    def __call__(self, x: Tensor) -> Tensor:
        a, b = x.reshape(-1)[:2]
        return self.theta * (a**2 + 0.4 * a * b + 0.6 * b**2) + 0.1 * a**4 - a + 2.0 * b


def start(*, grad: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([1.5, 0.7], dtype=dtype, requires_grad=grad)


def leaves(options: dict[str, Any]) -> dict[str, Any]:
    """Every number as a leaf."""
    return {
        name: tuple(number(v) for v in value) if isinstance(value, tuple) else number(value)
        for name, value in options.items()
    }


def adapted(name: str, *, grad: bool = True) -> TorchOptimizer:
    kind, options, fixed = CASES[name]
    return TorchOptimizer(kind, Bowl(), **(leaves(options) if grad else options), **fixed)


def report_of(update: TorchOptimizer, target: float = 0.3) -> Any:
    criterion = GradientNorm(update.objective)
    return check_index_gradient(
        update, update.initial_state(start()), criterion, target, directions=1
    )


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


@every_case
def test_gradient_to_every_hyperparameter(name: str) -> None:
    report = report_of(adapted(name))
    assert report.passed, report
    names = {"x0[0]", "theta"}
    for option, value in CASES[name][1].items():
        inside = [f"[{i}]" for i in range(len(value))] if isinstance(value, tuple) else [""]
        names |= {f"update.options[{option!r}]{entry}" for entry in inside}
    # What acts on the mean of ASGD only, x does not depend on.
    assert {subject.removesuffix(")") for subject in report.subjects} >= names - {
        "update.options['t0']"
    }
    assert 5 < report.time < 60


def test_gradient_of_the_mean_of_asgd() -> None:
    update = adapted("ASGD")
    mean = GradientNorm(update.objective, position=lambda state: update.buffer(state, "ax"))
    report = check_index_gradient(
        update, update.initial_state(start()), mean, 1.0, directions=1, max_steps=100
    )
    assert report.passed, report
    assert "update.options['t0']" in report.subjects


@pytest.mark.parametrize("formula", ["addcdiv", "lerp", "mul", "div", "addcmul", "add"])
def test_a_planted_sign_is_caught(formula: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = discrete.traced_step._FORMULAS[formula]

    def wrong(t: Tensor, *rest: Any, **more: Any) -> Tensor:
        value = right(t, *rest, **more)
        return 2 * value.detach() - value

    monkeypatch.setitem(discrete.traced_step._FORMULAS, formula, wrong)
    try:
        assert not report_of(adapted("Adam")).passed
    except MissingGradientError as error:
        assert "wrong or missing" in str(error)


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
    update = TorchOptimizer(optim.SGD, Bowl(), lr=lr)
    with torch.no_grad():
        state = update(1, (start(grad=False),))
        lr.mul_(2.0)
        further = update(1, (start(grad=False),)) if update._names is not None else None
    assert further is None or state is not None


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


# Coordinates whose gradient is zero, and other singular places.


def test_a_coordinate_that_is_dead_changes_nothing() -> None:
    def gradients(f: Any, x0: Tensor, criterion: Any, kind: Any) -> list[Tensor]:
        lr = number(0.1)
        update = TorchOptimizer(kind, f, lr=lr)
        run = stopping_index(update, update.initial_state(x0), criterion, 0.3)
        return list(torch.autograd.grad(run.steps, [lr, x0]))

    f = Bowl()
    longer = torch.tensor([1.5, 0.7, 1.0], dtype=torch.float64, requires_grad=True)
    for kind in (optim.Adam, optim.RMSprop, optim.Adagrad, optim.NAdam, optim.Adamax):
        short = gradients(f, start(), GradientNorm(f), kind)
        long = gradients(f, longer, GradientNorm(f), kind)  # Bowl looks at two entries only
        torch.testing.assert_close(long[0], short[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(long[1][:2], short[1], rtol=1e-12, atol=0)
        assert long[1][2] == 0.0


@pytest.mark.parametrize("kind", [optim.Adam, optim.RMSprop, optim.Adamax, optim.RAdam])
def test_a_coordinate_that_would_wake_up(kind: type[Optimizer]) -> None:
    # grad_2 = x_2 + w x_0 is zero all the way, and its derivative to w is not: v = 0 throughout.
    w = number(0.0)

    def f(x: Tensor) -> Tensor:
        return x[0] ** 2 + 0.3 * x[1] ** 2 + 0.5 * x[2] ** 2 + w * x[0] * x[2]

    def criterion(t: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        x = state[0]
        return x[0] ** 2 + x[1] ** 2 + 0.3 * x[2]

    x0 = number([1.5, 0.7, 0.0])
    update = TorchOptimizer(kind, f, lr=number(0.03), eps=0.1)
    report = check_index_gradient(
        update, update.initial_state(x0), criterion, 0.3, directions=3, max_steps=200
    )
    assert report.passed, report
    assert "w" in report.subjects


def test_a_root_at_zero_raises() -> None:
    # The gradient 1e-200 is not zero, its square is: sqrt(v) has no finite derivative.
    def f(x: Tensor) -> Tensor:
        return x[0] ** 2 + 1e-200 * x[1]

    x0, lr = number([1.0, 1.0]), number(0.1)
    update = TorchOptimizer(optim.Adam, f, lr=lr)
    with torch.no_grad():
        state = update.initial_state(x0)
    with pytest.raises(GradientError, match="square root of a number that is exactly zero"):
        torch.autograd.grad(sum(update(0, state)[0]), x0)


class FromElsewhere(Optimizer):
    """What optimisers from elsewhere look like: no `differentiable`, `.data`, no_grad."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9, decay: float = 0.01):
        super().__init__(params, {"lr": lr, "beta": beta, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                    state["step"] = 0
                state["step"] += 1
                self.move(p, p.grad, state, group)

    def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        p.data.mul_(1 - group["lr"] * group["decay"])
        state["mean"].mul_(group["beta"]).add_(g, alpha=1 - group["beta"])
        size = 1.0 + g.norm().item() ** 2
        correction = 1 - group["beta"] ** state["step"]
        p.data.add_(state["mean"].div(correction).tanh_(), alpha=-group["lr"] / size**0.5)


def test_a_class_from_elsewhere() -> None:
    options = {"lr": 0.2, "beta": 0.8, "decay": 0.02}
    report = report_of(TorchOptimizer(FromElsewhere, Bowl(), **leaves(options)))
    assert report.passed, report
    assert len(report.subjects) == 5


def move_by(step: Any) -> type[Optimizer]:
    class Moved(FromElsewhere):
        def move(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
            step(self, p, g, state, group)

    return Moved


def hidden(self: Any, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
    self.count = getattr(self, "count", 0) + 1
    p.add_(g, alpha=-group["lr"] / self.count)


def in_group(self: Any, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
    group["count"] = group.get("count", 0) + 1
    p.add_(g, alpha=-group["lr"] / group["count"])


def no_tensor(self: Any, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
    state["size"] = float(g.norm())
    p.add_(g, alpha=-group["lr"] / state["size"])


def own_counter(self: Any, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
    state["step"] += 1
    p.add_(g, alpha=-group["lr"])


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (hidden, "remembers something outside of it"),
        (in_group, "changes its parameter group"),
        (no_tensor, "keeps size"),
        (own_counter, "counts steps in its own way"),
    ],
)
def test_classes_that_cannot_be_updates(step: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TorchOptimizer(move_by(step), Bowl()).initial_state(start())


def test_a_closure_is_refused() -> None:
    class Closed(FromElsewhere):
        def step(self, closure: Any) -> None:  # type: ignore[override]
            closure()

    with pytest.raises(TypeError, match="needs a closure"):
        TorchOptimizer(Closed, Bowl()).initial_state(start())


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda _, p, g, s, o: p.add_(g, alpha=-math.sqrt(o["lr"])), "step 0 of Moved"),
        (lambda _, p, g, s, o: p.add_(g, alpha=-float(o["lr"])), "turns lr into a plain number"),
        (lambda _, p, g, s, o: p.sub_(g * round(o["lr"], 3)), "turns lr into a plain number"),
        (lambda _, p, g, s, o: p.sub_(g.clip(-o["lr"], o["lr"])), "torch's clip"),
        (lambda _, p, g, s, o: p.sub_(torch.from_numpy(g.numpy()) * 0.1), "out of torch"),
        (lambda _, p, g, s, o: p.add_(g, alpha=-float(g.norm())), "out of torch"),
    ],
    ids=["math", "float", "round", "clip", "numpy", "float of a tensor"],
)
def test_a_lost_derivative_is_found(step: Any, message: str) -> None:
    with pytest.raises(MissingGradientError, match=message):
        TorchOptimizer(move_by(step), Bowl(), lr=number(0.1)).initial_state(start())
    with torch.no_grad():
        TorchOptimizer(move_by(step), Bowl(), lr=number(0.1)).initial_state(start())


def test_a_lost_derivative_after_the_start_is_found() -> None:
    def late(self: Any, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
        rate = group["lr"] if state["step"] < 4 else math.sqrt(group["lr"] ** 2)
        p.add_(g, alpha=-rate)

    update = TorchOptimizer(move_by(late), Bowl(), lr=number(0.1))
    state = update.initial_state(start())
    with pytest.raises(MissingGradientError, match="parameters of the update"):
        stopping_index(update, state, GradientNorm(update.objective), 0.3)


def test_a_derivative_that_is_not_finite_raises() -> None:
    def step(self: Any, p: Tensor, g: Tensor, state: Any, group: Any) -> None:
        p.sub_(group["lr"] * g / (g.square().pow(0.5) + 0.1))

    x0 = number([1.0, 0.0])
    update = TorchOptimizer(move_by(step), lambda x: x.square().sum(), lr=number(0.1))
    with torch.no_grad():
        state = update.initial_state(x0)
    with pytest.raises(GradientError, match="derivative of step 0 of Moved is not finite"):
        torch.autograd.grad(sum(update(0, state)[0]), x0)


# What is refused, and why.


@pytest.mark.parametrize("kind", [optim.LBFGS, optim.SparseAdam, optim.Muon])
def test_refused_classes(kind: type[Optimizer]) -> None:
    with pytest.raises(TypeError, match=f"{kind.__name__} cannot be an update: it "):
        TorchOptimizer(kind, Bowl(), lr=0.1)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (optim.SGD, {"lr": 0.1, "momentum": number(0.0)}),
        (optim.SGD, {"lr": 0.1, "weight_decay": number(0.0)}),
        (optim.RMSprop, {"lr": 0.1, "momentum": number(0.0)}),
        (optim.Adam, {"lr": 0.1, "weight_decay": number(0.0)}),
        (optim.ASGD, {"lr": 0.1, "t0": number(-1.0)}),
    ],
)
def test_a_hyperparameter_at_a_branch(kind: type[Optimizer], options: dict[str, Any]) -> None:
    name = [key for key, value in options.items() if isinstance(value, Tensor)][0]
    update = TorchOptimizer(kind, Bowl(), **options)
    with pytest.raises(GradientError, match=f"no derivative to {name} at a branch"):
        update.initial_state(start())
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in options.items()}
    TorchOptimizer(kind, Bowl(), **detached).initial_state(start())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, "Invalid learning rate"),
        ({"speed": 0.1}, TypeError, "speed"),
        ({"lr": torch.tensor([0.1])}, ValueError, "lr must be a number or a 0-d tensor"),
        ({"lr": torch.tensor(1)}, TypeError, "lr must be floating-point"),
        ({"betas": (0.9, torch.ones(2))}, ValueError, r"betas\[1\] must be a number"),
        *(
            ({name: True}, ValueError, f"{name} is set by TorchOptimizer")
            for name in ("foreach", "fused", "capturable", "differentiable")
        ),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TorchOptimizer(optim.Adam, Bowl(), **options)


def test_bad_arguments() -> None:
    object_ = optim.SGD([start()])
    with pytest.raises(TypeError, match=r"Give the class: TorchOptimizer\(torch.optim.SGD"):
        TorchOptimizer(object_, Bowl())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="derived from torch.optim.Optimizer; got type"):
        TorchOptimizer(Bowl, Bowl())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="objective must be callable"):
        TorchOptimizer(optim.SGD, 3.0)  # type: ignore[arg-type]
    update = adapted("Adam")
    with pytest.raises(ValueError, match=r"call initial_state\(x0\) before"):
        update(0, (start(),))
    with pytest.raises(TypeError, match="x0 must be a tensor"):
        update.initial_state([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="floating-point"):
        update.initial_state(torch.tensor([1, 2]))
    state = update.initial_state(start())
    with pytest.raises(TypeError, match=r"the tuple \(x, exp_avg, exp_avg_sq\)"):
        update(1, state[:2])
    assert update.position(state) is state[0]
    assert update.buffer(state, "exp_avg_sq") is state[2]
    with pytest.raises(KeyError, match="no buffer 'momentum'"):
        update.buffer(state, "momentum")
    assert "Adam, lr=0.1, betas=(0.8, 0.95)" in repr(update)


def test_options_that_change_what_is_kept() -> None:
    update = TorchOptimizer(optim.SGD, Bowl(), lr=0.1)
    state = update.initial_state(start())
    update.options["momentum"] = 0.9
    with torch.no_grad(), pytest.raises(ValueError, match="call initial_state"):
        update(0, state)


# The documentation.

PAGE = ROOT / "docs" / "how-to-torch-optimisers.md"


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
