"""Runs of the adapting optimisers, and independent routes to the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from discrete.online import OnlineAdaptation

D = torch.float64
Loss = Callable[..., Tensor]
# Adapted, and moves nothing: exp(1e-300) is 1.
STILL = 1e-300


def closure_of(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> Callable[[], Any]:
    """The closure that the documentation shows."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return closure


def leaf(values: Any, dtype: torch.dtype = D) -> Tensor:
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=dtype)
    return values.detach().to(dtype).clone().requires_grad_(True)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


class SVM:
    """f(w) = 1/2 sum max(0, 1 - y_i (x_i . w' - w_0))^2, in torch and, by other code, in NumPy."""

    def __init__(self, samples: int = 50, features: int = 5, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.y = np.where(rng.random(samples) < 0.5, -1.0, 1.0)
        middle = rng.standard_normal(features)
        points = rng.standard_normal((samples, features)) + 0.3 * self.y[:, None] * middle
        self.x = np.hstack([points, -np.ones((samples, 1))])
        self.start = 0.3 * rng.standard_normal(features + 1)
        self._x, self._y = torch.from_numpy(self.x), torch.from_numpy(self.y)

    def __call__(self, *pieces: Tensor) -> Tensor:
        w = torch.cat([piece.reshape(-1) for piece in pieces])
        x, y = self._x.to(w), self._y.to(w)
        return 0.5 * (1 - y * (x @ w)).clamp(min=0).square().sum()

    def value(self, w: np.ndarray) -> float:
        slack = np.maximum(0.0, 1.0 - (self.x @ w) * self.y)
        return float(slack @ slack) / 2.0

    def gradient(self, w: np.ndarray) -> np.ndarray:
        slack = np.maximum(0.0, 1.0 - (self.x @ w) * self.y)
        return -(self.x * self.y[:, None]).T @ slack


class NumpyAdam:
    """The direction mhat / (sqrt(vhat) + eps)."""

    def __init__(self, size: int, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.m, self.v, self.k = np.zeros(size), np.zeros(size), 0
        self.betas, self.eps = betas, eps

    def direction(self, g: np.ndarray) -> np.ndarray:
        self.k += 1
        first, second = self.betas
        self.m = first * self.m + (1.0 - first) * g
        self.v = second * self.v + (1.0 - second) * g**2
        return (self.m / (1.0 - first**self.k)) / (
            np.sqrt(self.v / (1.0 - second**self.k)) + self.eps
        )


class Bumpy:
    """Not quadratic, the Hessian dense."""

    def __init__(self, size: int = 6) -> None:
        self.matrix = random(2 * size, size, seed=5) / size**0.5
        self.shift = random(2 * size, seed=6)

    def __call__(self, *pieces: Tensor) -> Tensor:
        x = torch.cat([p.reshape(-1) for p in pieces])
        y = self.matrix.to(x) @ x - self.shift.to(x)
        return torch.log(torch.cosh(y)).sum() + 0.05 * x.pow(4).sum()


def last_signals(
    optimizer: OnlineAdaptation, loss: Callable[[], Tensor], steps: int
) -> tuple[dict[str, float], list[float]]:
    """The signals of the last step, and the losses at all points."""
    closure = closure_of(optimizer, loss)
    for _ in range(steps):
        optimizer.step(closure)
    last = {name: column[-1] for name, column in optimizer.history.signals.items()}
    assert all(value is not None for value in last.values())
    after = optimizer.history.after[-1]
    assert after is not None
    return last, [*optimizer.history.loss, after]  # type: ignore[return-value]


def algorithm2(
    problem: SVM, alpha: float, eta: float, threshold: float, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Algorithm 2 as printed: iterates (steps, n) and rates (steps,), both after each step."""
    x, adam = problem.start.copy(), NumpyAdam(len(problem.start))
    f, g = problem.value(x), problem.gradient(x)
    reference, updates = f, 0
    iterates, rates = [], []
    for _ in range(steps):
        d = adam.direction(g)
        x = x - alpha * d
        following, g = problem.value(x), problem.gradient(x)
        if reference - following > threshold * updates:
            if following - f != 0:
                alpha = alpha - eta * float(g @ d) / (following - f)
            reference, updates = following, updates + 1
        f = following
        iterates.append(x)
        rates.append(alpha)
    return np.array(iterates), np.array(rates)


def guarded(
    problem: SVM,
    alpha: float,
    steps: int,
    *,
    adapt_rate: float = 0.25,
    threshold: float = 0.0,
    max_signal: float = 0.5,
    caution: float = 1.0 / 3.0,
    settle: float = 25.0,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The guarded form, from its documentation: iterates, rates and what was done."""
    x, adam, first, updates = problem.start.copy(), NumpyAdam(len(problem.start)), alpha, 0
    f, g = problem.value(x), problem.gradient(x)
    iterates, rates, actions = [], [], []
    for _ in range(steps):
        d = adam.direction(g)
        x = x - alpha * d
        following, g = problem.value(x), problem.gradient(x)
        change = following - f
        move, action = 0.0, "no signal"
        if abs(change) > 4 * np.finfo(float).eps * max(abs(f), abs(following)):
            r = float(np.clip(alpha * float(g @ d) / abs(change), -max_signal, max_signal))
            fell = change < 0
            if fell and -change <= threshold:
                action = "no decrease"
            elif r < 0 and caution:
                move, action = caution * r, "smaller" if fell else "backed off"
            elif fell and r > 0:
                move, action = r, "larger"
            elif not fell:
                action = "no decrease"
        if move != 0.0:
            alpha *= np.exp(adapt_rate / np.sqrt(1 + updates / settle) * move)
            alpha, updates = float(np.clip(alpha, 1e-6 * first, 1e6 * first)), updates + 1
        f = following
        iterates.append(x)
        rates.append(alpha)
        actions.append(action)
    return np.array(iterates), np.array(rates), actions


def adam_signals(
    loss: Loss | Sequence[Loss],
    starts: Sequence[Tensor],
    options: Sequence[dict[str, Any]],
    steps: int,
    horizon: int,
    *,
    penalised: bool = False,
) -> dict[str, float]:
    """-(df/du)/|Df| through the last steps of Adam, by plain autograd through the whole of them.

    Args:
        loss: Of all tensors; a list has one a step.
        starts: One a tensor.
        options: One a tensor: "lr" (one a step), "betas", "weight_decay", "decoupled", "active",
            "held_out" (in the last step the rate sees a direction without the gradient).
        steps: How many are made.
        horizon: How many of them are differentiated.
        penalised: Whether f is the loss and wd/2 |x|^2, weighed by the root of the last step where
            the decay is decoupled.
    """
    names = ("lr", "beta1", "beta2", "weight_decay")
    u = {name: torch.zeros((), dtype=D, requires_grad=True) for name in names}
    still = dict.fromkeys(names, torch.zeros((), dtype=D))
    x = list(starts)
    mean, square = [torch.zeros_like(s) for s in x], [torch.zeros_like(s) for s in x]
    before = 0.0
    for k in range(steps):
        traced = k >= steps - horizon
        if not traced or k in (0, steps - horizon):
            x = [p.detach().requires_grad_() for p in x]
        of_step = loss if callable(loss) else loss[k]
        value = of_step(*x)
        gradients = torch.autograd.grad(value, x, create_graph=traced)
        before, began, weights = value.item(), [p.detach() for p in x], []
        with torch.set_grad_enabled(traced):
            for i, (g, o) in enumerate(zip(gradients, options, strict=True)):
                shift = u if o.get("active", True) else still
                lr = o["lr"][k] * torch.exp(shift["lr"])
                beta1 = 1 - (1 - o["betas"][0]) * torch.exp(-shift["beta1"])
                beta2 = 1 - (1 - o["betas"][1]) * torch.exp(-shift["beta2"])
                decay = o.get("weight_decay", 0.0) * torch.exp(shift["weight_decay"])
                newest = o.get("held_out", False) and k == steps - 1
                own = (1 - beta1) * g if newest else 0.0 * g
                if not o.get("decoupled", False):
                    g = g + decay * x[i]
                mean[i] = beta1 * mean[i] + (1 - beta1) * g
                square[i] = beta2 * square[i] + (1 - beta2) * g * g
                root = (square[i] / (1 - beta2 ** (k + 1))).sqrt() + 1e-8
                metric = root.detach() if o.get("decoupled", False) else torch.ones_like(root)
                weights.append(o.get("weight_decay", 0.0) * metric)
                d, own = (part / (1 - beta1 ** (k + 1)) / root for part in (mean[i], own))
                if o.get("decoupled", False):
                    d = d + decay * x[i]
                x[i] = x[i] - lr * d + (lr - o["lr"][k]) * own
    value = of_step(*x)
    if penalised:
        value = value + sum(0.5 * (w * p * p).sum() for w, p in zip(weights, x, strict=True))
        before += sum(0.5 * (w * p * p).sum().item() for w, p in zip(weights, began, strict=True))
    slopes = torch.autograd.grad(value, list(u.values()), allow_unused=True)
    size = abs(value.item() - before)
    return {n: 0.0 if s is None else -s.item() / size for n, s in zip(u, slopes, strict=True)}


def run(
    optimizer: torch.optim.Optimizer, loss: Loss, pieces: Sequence[Tensor], steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Iterates (steps, n) and rates of the first group (steps,), both after each step."""
    closure = closure_of(optimizer, lambda: loss(*pieces))
    iterates, rates = [], []
    for _ in range(steps):
        optimizer.step(closure)
        iterates.append(torch.cat([p.detach().reshape(-1) for p in pieces]).numpy())
        rates.append(optimizer.param_groups[0]["lr"])
    return np.array(iterates), np.array(rates)


def gap(mine: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """The largest difference, relative to the size of iterates and of rates."""
    return max(
        float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(mine, other, strict=True)
    )
