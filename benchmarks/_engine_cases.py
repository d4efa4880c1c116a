"""Problems of `engine.py`, each with its leaves and the derivatives of T to them.

A case makes a fresh subject for every run, so that no run finds what the one before has left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor
from torchdiffeq import odeint, odeint_event

from ode_stopping import GradientNorm, PreconditionedFlow, Quadratic
from ode_stopping.problems import random_rotation

DTYPE = torch.float64


@dataclass(frozen=True)
class Subject:
    """One problem, ready to run; `leaves` require grad, the start is the last of them."""

    flow: Callable[[Tensor, Tensor], Tensor]
    criterion: Callable[[Tensor, Tensor], Tensor]
    target: Any
    leaves: tuple[Tensor, ...]

    @property
    def x0(self) -> Tensor:
        """The start, shape (d,)."""
        return self.leaves[-1]


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


class RotatedQuadratic:
    """x' = -theta * Q x and J = |Q x|^2, theta = 1 of shape (d,); leaves (theta, x0).

    Q = R diag(l) R^T with l from 1e-2 to 1 (condition 100). With theta = 1 all is known from the
    eigen-decomposition.

    Args:
        dim: d.
        target: eps, one number or several, shape (K,).
    """

    def __init__(self, dim: int, target: float | Tensor = 1e-5) -> None:
        self.dim, self.target = dim, target
        self.spectrum = torch.logspace(-2, 0, dim, dtype=DTYPE)
        self.rotation = random_rotation(dim, seed=0)
        matrix = (self.rotation * self.spectrum) @ self.rotation.mT
        self.matrix = (matrix + matrix.mT) / 2
        self.theta = torch.ones(dim, dtype=DTYPE)
        self.start = _normal(dim, seed=1)

    def closures(self) -> Subject:
        """Flow and criterion as a user writes them."""
        theta, x0, matrix = _leaf(self.theta), _leaf(self.start), self.matrix

        def criterion(t: Tensor, y: Tensor) -> Tensor:
            gradient = matrix @ y
            return gradient @ gradient

        return Subject(lambda t, y: -theta * (matrix @ y), criterion, self.target, (theta, x0))

    def objects(self) -> Subject:
        """The same of the library's classes."""
        theta, x0, problem = _leaf(self.theta), _leaf(self.start), Quadratic(self.matrix)
        flow = PreconditionedFlow(problem, preconditioner=theta)
        return Subject(flow, GradientNorm(problem), self.target, (theta, x0))

    def truth(self) -> list[Tensor]:
        """Derivatives of T (of the sum of the T_k) to the leaves."""
        targets = torch.as_tensor(self.target, dtype=DTYPE).reshape(-1).tolist()
        each = [self._truth(target) for target in targets]
        return [torch.stack(parts).sum(0) for parts in zip(*each, strict=True)]

    def _truth(self, target: float) -> tuple[Tensor, Tensor]:
        """dT/dtheta_j = -int_0^T lam_j (Q x)_j dt and dT/dx0 = lam(0), lam(T) = -grad J / J'."""
        curvature, r = self.spectrum, self.rotation
        z = r.mT @ self.start

        def distance(t: float) -> float:
            squares = (curvature * z * torch.exp(-curvature * t)).square().sum()
            return float(torch.log(squares / target))

        end = brentq(distance, 0.0, 1e5, xtol=1e-12, rtol=1e-15)
        decay = torch.exp(-curvature * end)
        slope = -2 * (curvature.pow(3) * (z * decay).square()).sum()
        lam = -2 * curvature.square() * z * decay / slope  # at T, in the eigenbasis
        # int_0^T exp(-l_a (T - t) - l_b t) dt for all pairs, written so that nothing cancels.
        gap = end * (curvature[:, None] - curvature[None, :]).abs()
        mean = torch.where(gap > 0, -torch.expm1(-gap) / gap.clamp_min(1e-300), 1.0)
        kernel = (
            end * torch.exp(-end * torch.minimum(curvature[:, None], curvature[None, :])) * mean
        )
        weights = lam[:, None] * (curvature * z)[None, :] * kernel
        return -((r @ weights) * r).sum(1), r @ (decay * lam)


class Network:
    """x' = -(1 + tanh(W2 tanh(W1 x))) * Q x and J = |Q x|^2; leaves (W1, W2, x0).

    d = 20, W1 of shape (w, d), W2 of shape (d, w), 2 w d parameters; Q rotated, spectrum 0.1 to 1.

    Args:
        parameters: How many.
        target: eps.
    """

    def __init__(self, parameters: int, target: float = 1e-4) -> None:
        dim = 20
        width = parameters // (2 * dim)
        rotation = random_rotation(dim, seed=1)
        self.target = target
        self.matrix = (rotation * torch.logspace(-1, 0, dim, dtype=DTYPE)) @ rotation.mT
        self.weights = (
            _normal(width, dim, seed=3) / math.sqrt(dim),
            0.3 * _normal(dim, width, seed=4) / math.sqrt(width),
        )
        self.start = _normal(dim, seed=0)

    def closures(self) -> Subject:
        """Flow and criterion as a user writes them."""
        first, second = (_leaf(weight) for weight in self.weights)
        x0, matrix = _leaf(self.start), self.matrix

        def flow(t: Tensor, y: Tensor) -> Tensor:
            return -(1 + torch.tanh(second @ torch.tanh(first @ y))) * (matrix @ y)

        def criterion(t: Tensor, y: Tensor) -> Tensor:
            gradient = matrix @ y
            return gradient @ gradient

        return Subject(flow, criterion, self.target, (first, second, x0))

    def truth(self) -> list[Tensor]:
        """-J_x x_theta(T) / J' by torchdiffeq's dopri8 at rtol 1e-10, without its event rule."""
        subject = self.closures()
        tight: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13, "method": "dopri8"}
        start = torch.zeros((), dtype=DTYPE)
        with torch.no_grad():
            end, _ = odeint_event(
                subject.flow,
                subject.x0,
                start,
                event_fn=lambda t, y: subject.criterion(t, y) - subject.target,
                odeint_interface=odeint,
                **tight,
            )
        state = odeint(subject.flow, subject.x0, torch.stack([start, end]), **tight)[-1]
        normal = 2 * self.matrix @ (self.matrix @ state.detach())
        slope = normal @ subject.flow(end, state).detach()
        return list(torch.autograd.grad(state, subject.leaves, -normal / slope))


class Decay:
    """x' = -p x and J = x^2 / 2 from x = p = 1, met after a time of 0.01; leaves (p, x0)."""

    time = 0.01

    def closures(self) -> Subject:
        """Flow and criterion as a user writes them."""
        rate, x0 = _leaf(torch.ones(1, dtype=DTYPE)), _leaf(torch.ones(1, dtype=DTYPE))
        target = 0.5 * math.exp(-2 * self.time)
        return Subject(lambda t, y: -rate * y, lambda t, y: 0.5 * (y * y).sum(), target, (rate, x0))

    def truth(self) -> list[Tensor]:
        """dT/dp = -T and dT/dx0 = 1."""
        return [torch.tensor([-self.time], dtype=DTYPE), torch.ones(1, dtype=DTYPE)]
