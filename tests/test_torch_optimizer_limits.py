"""`TorchOptimizer` where there is no derivative, and with classes from elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from iterations import number
from optimizer_cases import Bowl, adapted, leaves, report_of, start
from torch import Tensor
from torch.optim import Optimizer

from discrete import DiscreteAdjoint, TorchOptimizer, check_index_gradient, stopping_index
from ode_stopping import GradientNorm, LossValue, Quadratic
from ode_stopping.core.status import GradientError, MissingGradientError

optim = torch.optim


# Coordinates whose gradient is zero, and other singular places.


def test_a_coordinate_that_is_dead_changes_nothing() -> None:
    def gradients(f: Any, x0: Tensor, criterion: Any, kind: Any) -> list[Tensor]:
        lr = number(0.1)
        update = TorchOptimizer(kind, f, lr=lr)
        run = stopping_index(update, update.initial_state(x0), criterion, 0.3)
        return list(torch.autograd.grad(run.steps, [lr, x0]))

    f = Bowl()
    longer = torch.tensor([1.5, 0.7, 1.0], dtype=torch.float64, requires_grad=True)
    for kind in (optim.Adam, optim.RMSprop, optim.Adagrad, optim.Adamax):
        short = gradients(f, start(), GradientNorm(f), kind)
        long = gradients(f, longer, GradientNorm(f), kind)  # Bowl looks at two entries only
        torch.testing.assert_close(long[0], short[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(long[1][:2], short[1], rtol=1e-12, atol=0)
        assert long[1][2] == 0.0


@pytest.mark.parametrize("kind", [optim.Adam, optim.RMSprop])
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
        update, update.initial_state(x0), criterion, 1.0, directions=3, max_steps=200
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
    name = next(key for key, value in options.items() if isinstance(value, Tensor))
    update = TorchOptimizer(kind, Bowl(), **options)
    with pytest.raises(GradientError, match=f"no derivative to {name} at a branch"):
        update.initial_state(start())
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in options.items()}
    TorchOptimizer(kind, Bowl(), **detached).initial_state(start())


def test_adafactor_on_a_vector() -> None:
    """With d = 1 the first step is on a kink for every start; a d beside it gives the same run.

    As the page on torch's optimisers says.
    """
    objective = Quadratic(torch.tensor([1.0, 30.0], dtype=torch.float64))

    def steps(lr: Any, d: float, gradient: Any = DiscreteAdjoint()) -> Tensor:  # noqa: B008
        update = TorchOptimizer(optim.Adafactor, objective, lr=lr, d=d)
        with torch.set_grad_enabled(gradient is not None):
            state = update.initial_state(torch.tensor([1.3, 0.7], dtype=torch.float64))
        criterion = LossValue(objective)
        return stopping_index(
            update, state, criterion, 1e-2, gradient=gradient, interpolation="log"
        ).steps

    with pytest.raises(GradientError, match="branch"):
        steps(number(0.02), 1.0)
    beside = 1 + 1e-9
    assert steps(0.02, beside, None).item() == pytest.approx(steps(0.02, 1.0, None).item())
    lr = number(0.02)
    (found,) = torch.autograd.grad(steps(lr, beside), lr)
    far, near = (
        (steps(0.02 + h, 1.0, None) - steps(0.02 - h, 1.0, None)).item() / (2 * h)
        for h in (1e-5, 5e-6)
    )
    assert found.item() == pytest.approx(near, rel=1e-5)
    # A difference that has settled.
    assert near == pytest.approx(far, rel=1e-4)


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
    with pytest.raises(TypeError, match=r"derived from torch\.optim\.Optimizer; got type"):
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
