"""Rotated, preconditioned quadratics with their stopping time and gradient in closed form.

x' = -s P Q x with P = diag(p), and J = |Q x|^2. With y = P^(-1/2) x the flow is y' = -s M y, where
M = P^(1/2) Q P^(1/2) = V diag(m) V^T is symmetric, so x(t), lam(t) and int lam (x) Qx dt are sums
of exponentials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from torch import Tensor

from ode_stopping import GradientRoute, StoppingResult, Torchdiffeq, stopping_time


@dataclass(frozen=True)
class RotatedQuadratic:
    """One problem: the largest curvature is 10, the smallest 10/condition."""

    condition: float
    dim: int = 50
    speed: float = 0.9

    def data(self) -> tuple[Tensor, Tensor, Tensor]:
        """Q, p and x0."""
        generator = torch.Generator().manual_seed(7)
        spectrum = torch.logspace(1 - math.log10(self.condition), 1, self.dim, dtype=torch.float64)
        noise = torch.randn(self.dim, self.dim, generator=generator, dtype=torch.float64)
        rotation, _ = torch.linalg.qr(noise)
        p = 0.5 + torch.rand(self.dim, generator=generator, dtype=torch.float64)
        x0 = torch.randn(self.dim, generator=generator, dtype=torch.float64)
        return (rotation * spectrum) @ rotation.T, p, x0

    def leaves(self) -> dict[str, Tensor]:
        """The leaves to differentiate to."""
        _, p, x0 = self.data()
        leaves = {"p": p, "x0": x0, "speed": torch.tensor(self.speed, dtype=torch.float64)}
        return {name: leaf.requires_grad_() for name, leaf in leaves.items()}

    def solve(
        self, leaves: dict[str, Tensor], eps: float, route: GradientRoute, rtol: float | None
    ) -> StoppingResult:
        """The library's answer."""
        q, _, _ = self.data()
        return stopping_time(
            lambda t, x: -leaves["speed"] * leaves["p"] * (q @ x),
            leaves["x0"],
            lambda t, x: (q @ x).square().sum(),
            eps,
            gradient=route,
            solver=Torchdiffeq(rtol=rtol),
            evidence="light",
        )

    def truth(self, eps: float) -> dict[str, Tensor]:
        """T under "T", and dT/dleaf under the name of every leaf."""
        q, p, x0 = self.data()
        root, s = p.sqrt(), self.speed
        m, v = torch.linalg.eigh(root[:, None] * q * root)
        start = v.T @ (x0 / root)

        def state(t: float) -> Tensor:
            return root * (v @ (torch.exp(-s * m * t) * start))

        def log_excess(t: float) -> float:
            return math.log(float((q @ state(t)).square().sum()) / eps)

        span = 1.0
        while log_excess(span) > 0:
            span *= 2
        span = brentq(log_excess, 0.0, span, xtol=1e-14, rtol=1e-14)
        x = state(span)
        g = 2 * q @ (q @ x)
        end = -g / float(g @ (-s * p * (q @ x)))  # lam(T)
        beta = v.T @ (root * end)
        gap = m[:, None] - m
        decay = torch.exp(-s * m * span)
        # int_0^T exp(-s m_i (T - t)) exp(-s m_j t) dt
        integral = torch.where(
            gap == 0, decay * span, (decay - decay[:, None]) / (s * torch.where(gap == 0, 1.0, gap))
        )
        by_p = -s / p * torch.einsum("ki,ij,kj->k", v * beta, integral, v * (m * start))
        return {
            "T": torch.tensor(span, dtype=torch.float64),
            "p": by_p,
            "speed": -(beta * m * start * decay * span).sum(),
            "x0": (v @ (decay * beta)) / root,
        }
