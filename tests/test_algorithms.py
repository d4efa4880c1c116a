"""Which flow + discretisation + step is which algorithm: 200 steps beside torch.optim, to 1e-12."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from discrete import Algorithm, stopping_index
from discrete.rules import algorithms
from ode_stopping import GradientNorm, LogisticRegression, Problem, QuarticQuadratic
from ode_stopping.problems import random_rotation

F64 = torch.float64
STEPS = 200


def quartic() -> Problem:
    return QuarticQuadratic(
        torch.tensor([1.0, 3.0, 10.0], dtype=F64), rotation=random_rotation(3, seed=4)
    )


def logistic() -> Problem:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(40, 3, generator=generator, dtype=F64)
    y = torch.sign(X @ torch.tensor([1.0, -2.0, 0.5], dtype=F64))
    return LogisticRegression(X, y, regularization=0.01)


X0 = torch.tensor([1.0, -0.5, 0.7], dtype=F64)
every_problem = pytest.mark.parametrize("problem", [quartic, logistic])

# algorithm, torch's optimiser and its options
PAIRS: dict[str, tuple[Callable[[Problem], Algorithm], type[torch.optim.Optimizer], Any]] = {
    "gradient descent": (
        lambda f: algorithms.gradient_descent(f, lr=0.05),
        torch.optim.SGD,
        {"lr": 0.05},
    ),
    "SGD without momentum": (lambda f: algorithms.sgd(f, lr=0.05), torch.optim.SGD, {"lr": 0.05}),
    "SGD, momentum": (
        lambda f: algorithms.sgd(f, lr=0.01, momentum=0.9),
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9},
    ),
    "SGD, nesterov": (
        lambda f: algorithms.sgd(f, lr=0.01, momentum=0.9, nesterov=True),
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.9, "nesterov": True},
    ),
    "RMSprop": (
        lambda f: algorithms.rmsprop(f, lr=0.003, alpha=0.98),
        torch.optim.RMSprop,
        {"lr": 0.003, "alpha": 0.98},
    ),
    "Adam": (lambda f: algorithms.adam(f, lr=0.01), torch.optim.Adam, {"lr": 0.01}),
    "Adam, other betas": (
        lambda f: algorithms.adam(f, lr=0.03, betas=(0.8, 0.95), eps=1e-3),
        torch.optim.Adam,
        {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3},
    ),
}


def by_torch(f: Problem, kind: type[torch.optim.Optimizer], options: dict[str, Any]) -> Tensor:
    point = X0.clone().requires_grad_()
    optimizer = kind([point], **options)
    path = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        f(point).backward()
        optimizer.step()
        path.append(point.detach().clone())
    return torch.stack(path)


def by_flow(algorithm: Algorithm, update: Any = None) -> Tensor:
    """Positions after each step, t_k = t0 + k h."""
    rule = algorithm.update if update is None else update
    state, path = algorithm.initial_state(X0), []
    for k in range(STEPS):
        time = torch.as_tensor(algorithm.t0 + k * rule.step, dtype=F64)
        state = rule(k, state, time)
        path.append(algorithm.flow.position(state).detach())
    return torch.stack(path)


@every_problem
@pytest.mark.parametrize("name", PAIRS)
def test_iterates_are_those_of_torch(name: str, problem: Callable[[], Problem]) -> None:
    make, kind, options = PAIRS[name]
    found, known = by_flow(make(problem())), by_torch(problem(), kind, options)
    assert float((found - known).abs().max()) < 1e-12
    # Something moved: the comparison is one.
    assert float((known[-1] - X0).norm()) > 0.1


@every_problem
def test_nesterov_s_method_at_its_look_ahead_points(problem: Callable[[], Problem]) -> None:
    f, lr = problem(), 0.02
    x, y, path = X0, X0, []
    for k in range(STEPS):
        following = y - lr * f.gradient(y)
        y = following + k / (k + 3) * (following - x)
        x = following
        path.append(y)
    found = by_flow(algorithms.nesterov(f, lr=lr))
    assert float((found - torch.stack(path)).abs().max()) < 1e-12


def test_newton_s_method() -> None:
    f = quartic()
    x = X0
    for _ in range(6):
        hessian = torch.autograd.functional.hessian(f, x)
        x = x - torch.linalg.solve(hessian + 0.1 * torch.eye(3, dtype=F64), f.gradient(x))
    algorithm = algorithms.newton(f, damping=0.1)
    state: Any = X0
    for k in range(6):
        state = algorithm.update(k, state, torch.tensor(float(k), dtype=F64))
    torch.testing.assert_close(state, x, rtol=1e-12, atol=1e-14)


# --- planted: the orders of update that are not the algorithm -------------------------------------


class _PositionFirst:
    """x moves with the old velocity, then v with the gradient at the new place."""

    def __init__(self, flow: Any, step: float) -> None:
        self.flow, self.step = flow, step

    def __call__(self, k: int, state: Any, t: Tensor) -> Any:
        x, v = state
        moved = x + self.step * self.flow(t, state)[0]
        return moved, v + self.step * self.flow(t, (moved, v))[1]


class _Explicit(_PositionFirst):
    """Euler: Adam with the old moments."""

    def __call__(self, k: int, state: Any, t: Tensor) -> Any:
        return tuple(p + self.step * q for p, q in zip(state, self.flow(t, state), strict=True))


@pytest.mark.parametrize(
    ("name", "wrong", "least"),
    [("SGD, momentum", _PositionFirst, 1e-2), ("Adam", _Explicit, 1e-3)],
)
def test_other_orders_of_update_are_another_algorithm(name: str, wrong: Any, least: float) -> None:
    make, kind, options = PAIRS[name]
    algorithm = make(quartic())
    rule = wrong(algorithm.flow, float(algorithm.update.step))
    gap = (by_flow(algorithm, rule) - by_torch(quartic(), kind, options)).abs().max()
    assert float(gap) > least


# --- derivatives go through the mapping -----------------------------------------------------------

LEARNABLE: dict[str, tuple[Callable[..., Algorithm], list[float]]] = {
    "gradient descent": (lambda f, lr: algorithms.gradient_descent(f, lr=lr), [0.05]),
    "SGD": (lambda f, lr, m: algorithms.sgd(f, lr=lr, momentum=m), [0.01, 0.9]),
    "SGD, nesterov": (
        lambda f, lr, m: algorithms.sgd(f, lr=lr, momentum=m, nesterov=True),
        [0.01, 0.9],
    ),
    "Nesterov": (lambda f, lr: algorithms.nesterov(f, lr=lr), [0.02]),
    "RMSprop": (
        lambda f, lr, a, e: algorithms.rmsprop(f, lr=lr, alpha=a, eps=e),
        [0.01, 0.9, 1e-3],
    ),
    "Adam": (
        lambda f, lr, a, b, e: algorithms.adam(f, lr=lr, betas=(a, b), eps=e),
        [0.03, 0.8, 0.95, 1e-3],
    ),
}


@pytest.mark.parametrize("name", LEARNABLE)
def test_gradients_to_the_hyperparameters(name: str) -> None:
    """dN*/d(lr, momentum, betas, ...) by the discrete adjoint against central differences."""
    make, values = LEARNABLE[name]
    f = quartic()

    def steps(*hyperparameters: Any) -> Tensor:
        algorithm = make(f, *hyperparameters)
        return stopping_index(
            algorithm.update,
            algorithm.initial_state(X0),
            GradientNorm(f),
            0.5,
            t0=algorithm.t0,
            interpolation="log",
        ).steps

    leaves = [torch.tensor(v, dtype=F64, requires_grad=True) for v in values]
    found = torch.autograd.grad(steps(*leaves), leaves)
    for i, gradient in enumerate(found):
        # Below this the rounding of 65 steps shows in the difference: N* depends on eps weakly.
        h = 1e-3 * values[i]
        high, low = ([*values[:i], values[i] + s * h, *values[i + 1 :]] for s in (1, -1))
        with torch.no_grad():
            slope = float(steps(*high) - steps(*low)) / (2 * h)
        assert float(gradient) == pytest.approx(slope, rel=5e-4)
