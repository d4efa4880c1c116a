"""Iterations that the tests of the discrete side share, and other roads to their derivatives.

`nonlinear` is the standard case: a non-autonomous, nonlinear flow on a pair of tensors, with every
kind of leaf that an index can depend on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from discrete import Euler, StoppingIndexResult, UpdateRule, stopping_index

Leaves = dict[str, Tensor]


def number(value: float | list[float], *, grad: bool = True) -> Tensor:
    """A float64 leaf."""
    return torch.tensor(value, dtype=torch.float64, requires_grad=grad)


def nonlinear_leaves(step: float = 0.02) -> Leaves:
    """The leaves of `nonlinear_flow` and `weighted_norm`, with start, target, t0 and step."""
    return {
        "theta": number([0.7, 1.1]),
        "phi": number(1.3),
        "x": number([1.0, -0.5]),
        "v": number([[0.3], [0.2]]),
        "eps": number(0.11),
        "t0": number(0.4),
        "h": number(step),
    }


def nonlinear_flow(leaves: Leaves) -> Callable[[Tensor, Any], Any]:
    """x' = -theta (x + sin(t) x^3) + v/10, v' = -v + cos(t) x/5; shapes (2,) and (2, 1)."""
    theta = leaves["theta"]

    def flow(t: Tensor, state: Any) -> Any:
        x, v = state
        return (
            -theta * (x + torch.sin(t) * x**3) + 0.1 * v[:, 0],
            -v + 0.2 * torch.cos(t) * x[:, None],
        )

    return flow


def weighted_norm(leaves: Leaves) -> Callable[[Tensor, Any], Tensor]:
    """J = |x|^2 + phi |v|^2 exp(-t/10) + 1/20 exp(-t): explicit in t and in phi."""
    phi = leaves["phi"]

    def criterion(t: Tensor, state: Any) -> Tensor:
        x, v = state
        weight = phi * torch.exp(-0.1 * t)
        return x.square().sum() + weight * v.square().sum() + 0.05 * torch.exp(-t)

    return criterion


def nonlinear(
    leaves: Leaves, rule: type[UpdateRule] = Euler, **keywords: Any
) -> StoppingIndexResult:
    """The stopping index of the standard case."""
    return stopping_index(
        rule(nonlinear_flow(leaves), step=leaves["h"]),
        (leaves["x"], leaves["v"]),
        weighted_norm(leaves),
        leaves["eps"],
        t0=leaves["t0"],
        **keywords,
    )


def gradients(value: Tensor, leaves: Leaves) -> Leaves:
    """d value / d leaf for every leaf, zeros included."""
    found = torch.autograd.grad(
        value,
        list(leaves.values()),
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, found, strict=True))


def relative_gap(found: Leaves, truth: Leaves) -> float:
    """Largest error over the leaves, each relative to the norm of its gradient."""
    return max(float((found[n] - truth[n]).norm() / truth[n].norm()) for n in truth)


def perturbed(leaves: Leaves, name: str, shift: Tensor) -> Leaves:
    """Fresh leaves, one of them moved."""
    return {
        n: (p.detach() + (shift if n == name else 0.0)).requires_grad_(True)
        for n, p in leaves.items()
    }


def central_differences(function: Callable[[Leaves], float], leaves: Leaves, size: float) -> Leaves:
    """d function / d leaf by central differences with relative perturbations of `size`."""
    found = {}
    for name, leaf in leaves.items():
        gradient = torch.zeros(leaf.numel(), dtype=torch.float64)
        for i in range(leaf.numel()):
            shift = torch.zeros(leaf.numel(), dtype=torch.float64)
            shift[i] = size * (1.0 if name != "h" else float(leaf.detach()))
            up, down = (
                function(perturbed(leaves, name, sign * shift.reshape(leaf.shape)))
                for sign in (1.0, -1.0)
            )
            gradient[i] = (up - down) / (2 * shift[i])
        found[name] = gradient.reshape(leaf.shape)
    return found


def unrolled_loss(leaves: Leaves, steps: int) -> Tensor:
    """J(x_N) - eps after Euler steps of the standard case, in plain PyTorch."""
    flow, criterion, h, t0 = (
        nonlinear_flow(leaves),
        weighted_norm(leaves),
        leaves["h"],
        leaves["t0"],
    )
    x, v = leaves["x"], leaves["v"]
    for k in range(steps):
        dx, dv = flow(t0 + k * h, (x, v))
        x, v = x + h * dx, v + h * dv
    return criterion(t0 + steps * h, (x, v)) - leaves["eps"]


def definition_3(leaves: Leaves, steps: int) -> Leaves:
    """dN = -d(J(x_N) - eps) / (J(x_N) - J(x_{N-1})) by differentiating the plain loop."""
    loss = unrolled_loss(leaves, steps)
    decrease = float((loss - unrolled_loss(leaves, steps - 1)).detach())
    return {name: -g / decrease for name, g in gradients(loss, leaves).items()}
