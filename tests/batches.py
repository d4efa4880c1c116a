"""Problems in batches that tests share, and the plain loop of single calls that they are held to.

A `Family` builds update and criterion from named leaves. With all rows of the leaves they are those
of a batch, with one row those of one problem: what has one row a sample is in `own`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from discrete import Heun, StepDecrease, StoppingIndexResult, algorithms, stopping_index
from ode_stopping import GradientFlow
from ode_stopping.criteria import LossValue

F64 = torch.float64
Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """A batch of problems.

    Attributes:
        build: Leaves, and the options of one call, to (update, criterion, x0, options).
        leaves: All tensors, with the start as "x0".
        own: Names of those with one row a sample.
        target: As the call takes it.
    """

    build: Callable[[Leaves], tuple[Any, Any, Any, dict[str, Any]]]
    leaves: Leaves
    own: tuple[str, ...]
    target: Any
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """B."""
        return len(self.leaves["x0"])

    @property
    def wanted(self) -> list[Tensor]:
        """What is differentiated to."""
        some = [leaf for leaf in self.leaves.values() if leaf.requires_grad]
        return [*some, self.target] if isinstance(self.target, Tensor) else some

    def batch(self, *, declared: bool = False, **options: Any) -> StoppingIndexResult:
        """All in one call."""
        update, criterion, x0, own = self.build(self.leaves)
        if declared:
            options["per_sample"] = [self.leaves[name] for name in self.own if name != "x0"]
        options = {**own, **self.options, **options}
        return stopping_index(update, x0, criterion, self.target, batched=True, **options)

    def single(self, sample: int, **options: Any) -> StoppingIndexResult:
        """One of them by itself."""
        rows = {k: v[sample] if k in (*self.own, "x0") else v for k, v in self.leaves.items()}
        update, criterion, x0, own = self.build(rows)
        target = self.target
        if isinstance(target, Tensor) and target.ndim:
            target = target[sample if len(target) == self.count else 0]
        options = {**own, **self.options, **options}
        return stopping_index(update, x0, criterion, target, **options)

    def singles(self, **options: Any) -> list[StoppingIndexResult]:
        """Each of them by itself."""
        return [self.single(sample, **options) for sample in range(self.count)]


def drawn(*shape: int, seed: int, grad: bool = True) -> Tensor:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).requires_grad_(grad)


def number(value: float | list[float] | list[list[float]], *, grad: bool = True) -> Tensor:
    """A float64 leaf."""
    return torch.tensor(value, dtype=F64, requires_grad=grad)


def quadratics(count: int = 7, size: int = 3, **options: Any) -> Family:
    """f = sum_i c_i x_i^2 / 2 by gradient descent, J = f: curvatures of each, one rate for all."""
    leaves = {
        "x0": (drawn(count, size, seed=1, grad=False) + 1.0).requires_grad_(),
        "c": (0.3 + drawn(count, size, seed=2, grad=False).abs()).requires_grad_(),
        "lr": number(0.3),
    }
    return Family(_quadratic, leaves, ("c",), number(1e-3), options)


def _quadratic(leaves: Leaves) -> tuple[Any, Any, Any, dict[str, Any]]:
    c, lr = leaves["c"], leaves["lr"]
    return lambda k, x: x - lr * c * x, lambda t, x: (c * x * x).sum(-1) / 2, leaves["x0"], {}


def logistic(count: int = 5, rows: int = 12, size: int = 4) -> Family:
    """Logistic problems with a ridge, Nesterov-like steps that know k, J = |grad f|^2."""
    data = drawn(count, rows, size, seed=3, grad=False)
    signs = torch.sign(drawn(count, rows, seed=4, grad=False))
    leaves = {
        "x0": drawn(count, size, seed=5),
        "A": (data * signs[..., None]).requires_grad_(),
        "ridge": number([0.05 + 0.02 * i for i in range(count)]),
        "lr": number(0.8),
    }
    return Family(_logistic, leaves, ("A", "ridge"), number(2e-4))


def _logistic(leaves: Leaves) -> tuple[Any, Any, Any, dict[str, Any]]:
    data, ridge, lr = leaves["A"], leaves["ridge"], leaves["lr"]

    def slope(x: Tensor) -> Tensor:
        margins = (data * x[..., None, :]).sum(-1)
        weights = -torch.sigmoid(-margins) / margins.shape[-1]
        return (weights[..., None] * data).sum(-2) + ridge[..., None] * x

    def update(k: int, x: Tensor) -> Tensor:
        return x - lr * (1.0 + 1.0 / (k + 1)) * slope(x)

    return update, lambda t, x: slope(x).square().sum(-1), leaves["x0"], {}


def momentum(count: int = 6, size: int = 3) -> Family:
    """The heavy ball with a damping of each, a tuple state, J explicit in t; t0 moves."""
    leaves = {
        "x0": (drawn(count, size, seed=6, grad=False) + 2.0).requires_grad_(),
        "beta": number([0.3 + 0.08 * i for i in range(count)]),
        "lr": number(0.2),
        "t0": number(0.5),
        "scale": number([1.0, 0.6, 1.7][:size]),
    }
    return Family(_momentum, leaves, ("beta",), number([0.02 + 0.01 * i for i in range(count)]))


def _momentum(leaves: Leaves) -> tuple[Any, Any, Any, dict[str, Any]]:
    beta, lr, scale = leaves["beta"], leaves["lr"], leaves["scale"]

    def update(k: int, state: Any) -> Any:
        x, v = state
        v = beta[..., None] * v - lr * scale * torch.tanh(x)
        return x + v, v

    def criterion(t: Tensor, state: Any) -> Tensor:
        x, v = state
        return (scale * x * x).sum(-1) + v.square().sum(-1) / t + 0.05 * torch.exp(-t)

    start = leaves["x0"], torch.zeros_like(leaves["x0"])
    return update, criterion, start, {"t0": leaves["t0"]}


def rule(count: int = 5, size: int = 3) -> Family:
    """Heun's rule on the library's gradient flow, with a step and a t0 that move."""
    family = quadratics(count, size)
    leaves = {**family.leaves, "h": number(0.25), "t0": number(0.2)}
    del leaves["lr"]

    def build(leaves: Leaves) -> tuple[Any, Any, Any, dict[str, Any]]:
        c = leaves["c"]

        def objective(x: Tensor) -> Tensor:
            return (c * x * x).sum(-1) / 2 + 0.1 * (1 - torch.cos(x)).sum(-1)

        update = Heun(GradientFlow(objective), step=leaves["h"])
        return update, LossValue(objective), leaves["x0"], {"t0": leaves["t0"]}

    return Family(build, leaves, ("c",), number(5e-3))


def rmsprop(count: int = 3, size: int = 3) -> Family:
    """RMSprop by the library, from zero moments."""
    family = quadratics(count, size)

    def build(leaves: Leaves) -> tuple[Any, Any, Any, dict[str, Any]]:
        c = leaves["c"]

        def objective(x: Tensor) -> Tensor:
            return (c * x * x).sum(-1) / 2

        method = algorithms.rmsprop(objective, lr=0.2 * leaves["lr"], alpha=0.9, eps=0.2)
        start = method.initial_state(leaves["x0"])
        return method.update, LossValue(objective), start, {"t0": method.t0}

    return Family(build, family.leaves, ("c",), number(2e-2))


def adam(count: int = 4, size: int = 3) -> Family:
    """Adam, whose root has no derivative where the second moment is zero; k corrects its bias."""
    family = quadratics(count, size)

    def build(leaves: Leaves) -> tuple[Any, Any, Any, dict[str, Any]]:
        c, lr, x0 = leaves["c"], leaves["lr"], leaves["x0"]

        def update(k: int, state: Any) -> Any:
            x, m, v = state
            g = c * x
            m, v = 0.6 * m + 0.4 * g, 0.9 * v + 0.1 * g * g
            root = (v / (1 - 0.9 ** (k + 1))).sqrt() + 1e-8
            return x - 0.3 * lr * m / (1 - 0.6 ** (k + 1)) / root, m, v

        zeros = torch.zeros_like(x0)
        return update, lambda t, s: (c * s[0] * s[0]).sum(-1) / 2, (x0, zeros, zeros), {}

    return Family(build, family.leaves, ("c",), number(1e-2))


def decreases(count: int = 5, size: int = 3) -> Family:
    """`StepDecrease` of the quadratics: its mark d has one number a sample."""
    family = quadratics(count, size)

    def build(leaves: Leaves) -> tuple[Any, Any, Any, dict[str, Any]]:
        c, lr = leaves["c"], leaves["lr"]
        criterion = StepDecrease(lambda x: (c * x * x).sum(-1) / 2)
        batched = leaves["x0"].ndim == 2
        start = criterion.initial_state(leaves["x0"], batched=batched)
        return criterion.wrap(lambda k, x: x - lr * c * x), criterion, start, {}

    return Family(build, family.leaves, ("c",), number(1e-4))


FAMILIES: dict[str, Callable[[], Family]] = {
    "quadratics": quadratics,
    "logistic": logistic,
    "momentum": momentum,
    "rule": rule,
    "rmsprop": rmsprop,
    "adam": adam,
    "decreases": decreases,
}


def pieces(state: Any) -> tuple[Tensor, ...]:
    """A state as a tuple."""
    return state if isinstance(state, tuple) else (state,)


def distance(found: Tensor, right: Tensor) -> float:
    """Largest difference relative to the largest value; 0 where both are zero, NaN equals NaN."""
    assert torch.equal(torch.isnan(found), torch.isnan(right))
    gap = (found - right).detach().nan_to_num().abs().max()
    return float(gap / right.detach().nan_to_num().abs().max().clamp(min=1e-300))


def gradients(value: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """Of a value to some tensors; zeros where it does not depend on one."""
    return list(
        torch.autograd.grad(
            value, list(wanted), retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )


def require_equal_runs(found: StoppingIndexResult, right: Sequence[StoppingIndexResult]) -> None:
    """All that is no derivative is what single calls give."""
    several = found.index.ndim == 2
    assert found.index.tolist() == [one.index.tolist() if several else one.index for one in right]
    assert found.status == [one.status for one in right]
    assert torch.equal(found.reached, torch.stack([one.reached for one in right]))
    for name in ("steps", "decrease", *(["time"] if right[0].time is not None else [])):
        own = torch.stack([getattr(one, name) for one in right])
        assert torch.allclose(getattr(found, name), own, rtol=1e-11, atol=0.0, equal_nan=True)
    for place, piece in enumerate(pieces(found.state)):
        for sample, one in enumerate(right):
            assert distance(piece[sample], pieces(one.state)[place]) <= 1e-12
    for sample, one in enumerate(right):
        losses = one.trajectory.losses
        column = found.trajectory.losses[:, sample]
        some = column[: len(losses)]
        assert torch.allclose(some, losses, rtol=1e-11, atol=0.0, equal_nan=True)
        assert bool(column[len(losses) :].isnan().all())
        best = torch.tensor([float(found.best[sample]), one.best])
        assert torch.isclose(best[0], best[1], rtol=1e-11, equal_nan=True)
        assert int(found.best_index[sample]) == one.best_index
