"""A linear flow of chosen condition: its true gradient, and both libraries on it."""

from __future__ import annotations

import warnings
from math import log
from typing import Any

import numpy as np
import torch
from outcomes import gradient_of
from peers import Field, peer_time
from problems import F64, Function
from torch import Tensor, nn

from ode_stopping import (
    GradientRoute,
    InterpolatingAdjoint,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)


class Rotated:
    """x' = -p (Q x), J = |Q x|^2: Q rotated, curvatures from 10/condition to 10, d = 50."""

    def __init__(self, condition: float, target: float = 1e-3, dtype: torch.dtype = F64) -> None:
        generator = torch.Generator().manual_seed(7)
        spectrum = torch.logspace(1 - np.log10(condition), 1, 50, dtype=F64)
        rotation, _ = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=F64))
        p = 0.5 + torch.rand(50, generator=generator, dtype=F64)
        x0 = torch.randn(50, generator=generator, dtype=F64)
        # The truth is that of the rounded data.
        self.q, self.p, self.x0 = (
            tensor.to(dtype) for tensor in ((rotation * spectrum) @ rotation.T, p, x0)
        )
        self.target = target

    def flow(self, p: Tensor) -> Function:
        """(t, x) -> dx/dt."""
        return lambda t, x: -p * (self.q @ x)

    def criterion(self, t: Tensor, x: Tensor) -> Tensor:
        """J."""
        return (self.q @ x).square().sum()

    def truth(self, near: float) -> tuple[float, Tensor]:
        """T and dT/dp, through the exponential of the matrix, from a guess of T."""
        p = self.p.detach().clone().double().requires_grad_()
        q, x0 = self.q.double(), self.x0.double()
        end = near
        for _ in range(30):  # Newton on log J
            x = torch.linalg.matrix_exp(-p[:, None] * q * end) @ x0
            r = q @ x
            r, fixed = r.detach(), p.detach()
            rate = float(-2 * (q @ r) @ (fixed * r))
            move = float(r @ r) / rate * log(float(r @ r) / self.target)
            if abs(move) < 1e-13 * end:
                break
            end -= max(min(move, 0.3 * end), -0.3 * end)
        (by_p,) = torch.autograd.grad((q @ x).square().sum(), p)
        return end, -by_p / rate

    def ours(
        self, rtol: float | None, route: GradientRoute | None = None, **options: Any
    ) -> tuple[StoppingResult, Tensor, bool]:
        """The result, dT/dp, and whether a warning came."""
        p = self.p.clone().requires_grad_()
        result = stopping_time(
            self.flow(p),
            self.x0,
            self.criterion,
            self.target,
            solver=Torchdiffeq(rtol=rtol),
            gradient=route or InterpolatingAdjoint(),
            **options,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (gradient,) = torch.autograd.grad(result.time, p)
        return result, gradient, bool(caught)

    def peer(self, rtol: float, *, adjoint: bool, limit: int = 3000) -> tuple[float, Tensor, Field]:
        """T, dT/dp and the counted flow of torchdiffeq; the backward steps are limited."""
        p = nn.Parameter(self.p.clone())
        flow = Field(self.flow(p), [p])
        options = {"adjoint_options": {"max_num_steps": limit}} if adjoint else {}
        event = peer_time(
            flow,
            self.x0,
            self.criterion,
            self.target,
            adjoint=adjoint,
            rtol=rtol,
            atol=1e-4 * rtol,
            **options,
        )
        gradient = gradient_of(event, p)
        assert gradient is not None
        return float(event.detach()), gradient, flow
