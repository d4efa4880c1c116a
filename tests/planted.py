"""Planted cases for `check_gradient`: functions of two tensors whose verdict is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PlantedCase", "cases", "scaled_gradient"]


@dataclass(frozen=True)
class PlantedCase:
    """One case.

    Attributes:
        kind: The verdict that it has by construction.
        note: What it is.
        f: f() -> 0-d tensor.
        params: The tensors that f uses.
    """

    kind: str
    note: str
    f: Callable[[], Tensor]
    params: list[Tensor]


def scaled_gradient(p: Tensor, factor: float) -> Tensor:
    """p, with a gradient that is wrong by a factor: p + (factor - 1)(p - detached p)."""
    return p + (factor - 1) * (p - Same.apply(p))


class Same(torch.autograd.Function):
    """p without a gradient: moves with p, unlike `detach` under no mode."""

    @staticmethod
    def forward(ctx: object, p: Tensor) -> Tensor:
        return p.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> None:
        return None


class Rounded(torch.autograd.Function):
    """The value to a few digits, with the gradient of the value."""

    @staticmethod
    def forward(ctx: object, value: Tensor, unit: float) -> Tensor:
        return (value / unit).round() * unit

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return (torch.cos(a) * b).sum() + (a * b).square().sum()


def log_sum_exp(a: Tensor, b: Tensor) -> Tensor:
    return torch.logsumexp(torch.cat([3 * a, b]), 0) + 0.1 * (a @ b)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    return (1 + a.square().sum()) / (1 + b.square().sum()).sqrt()


def iterated(a: Tensor, b: Tensor) -> Tensor:
    x = b
    for _ in range(10):
        x = x - 0.1 * torch.tanh(a * x)
    return x.square().sum()


def network(a: Tensor, b: Tensor) -> Tensor:
    """ReLU units: kinks all around, none at the point."""
    inputs = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
    return (torch.relu(inputs * a + b) @ b.sin()).square().mean() + a.square().sum()


FUNCTIONS = (cosines, log_sum_exp, ratio, iterated, network)
KINDS = ("right", "wrong", "kink", "noise", "right", "wrong")


def cases(count: int, first: int = 0) -> Iterator[PlantedCase]:
    """Cases by number, each from its own seed."""
    for seed in range(first, first + count):
        yield _case(seed)


def _case(seed: int) -> PlantedCase:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = FUNCTIONS[seed % len(FUNCTIONS)]
    kind = KINDS[(seed // len(FUNCTIONS)) % len(KINDS)]
    a, b = draw(4).requires_grad_(), draw(4).requires_grad_()
    size = 10.0 ** float(6 * torch.rand((), generator=generator) - 3)
    share = 10.0 ** float(-3 + 2 * torch.rand((), generator=generator))
    gradients = torch.autograd.grad(base(a, b), (a, b))
    odd = bool(gradients[1].norm() > 0) and seed % 2 == 1  # dead units have no gradient to plant in
    note = f"{seed}: {base.__name__}, size {size:.1e}"
    if kind == "wrong":
        sign = 1 if float(draw(1)) > 0 else -1
        note += f", error {sign * share:.1e} in {'ab'[odd]}"

        def f() -> Tensor:
            p, q = a, b
            if odd:
                q = scaled_gradient(b, 1 + sign * share)
            else:
                p = scaled_gradient(a, 1 + sign * share)
            return size * base(p, q)

    elif kind == "kink":
        entry, place = seed % 4, float(a[seed % 4].detach())

        def f() -> Tensor:
            return size * (base(a, b) + (a[entry] - place).abs())

    elif kind == "noise":
        # Of what the value is, so that it is seen through no step that is short.
        unit = 1e-6 * size * abs(float(base(a, b).detach()))

        def f() -> Tensor:
            return Rounded.apply(size * base(a, b), unit)

    else:

        def f() -> Tensor:
            return size * base(a, b)

    return PlantedCase(kind, note, f, [a, b])
