"""Newton's flow: a preconditioner that knows the whole Hessian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ode_stopping.flows.gradient import GradientFlow
from ode_stopping.flows.hyperparameters import NONNEGATIVE, Hyperparameter, at_time, hold
from ode_stopping.problems.base import Objective


class NewtonFlow(GradientFlow):
    """x' = -(hess f(x) + lam I)^{-1} grad f(x).

    With lam = 0 the gradient falls along a ray, grad f(x(t)) = exp(-(t - t0)) grad f(x0), whatever
    the condition number (Smale 1976): T = log(|g0|/eps) for J = |grad f|. Euler with step 1 is
    Newton's method, with lam > 0 that of Levenberg and Marquardt.

    The Hessian is dense and by autograd: d gradients of the gradient an evaluation, d^2 numbers;
    for d up to some hundreds.

    Args:
        objective: as for `GradientFlow`.
        damping: lam >= 0: a number (fixed), a 0-d tensor, or a callable of t.

    Raises:
        TypeError, ValueError: what `GradientFlow` raises, and for a negative damping.
        RuntimeError: the Hessian is singular at a point of the path (`torch.linalg.LinAlgError`).
    """

    damping: Any

    def __init__(self, objective: Objective, *, damping: Hyperparameter = 0.0) -> None:
        super().__init__(objective)
        hold(self, "damping", damping, NONNEGATIVE)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The Newton direction, shape (..., d)."""
        keep_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            point = x if x.requires_grad and keep_graph else x.detach().requires_grad_()
            g = self.gradient(point)
            columns = [_row(g, i, point, keep_graph) for i in range(x.shape[-1])]
        hessian = torch.stack(columns, dim=-2)
        if point is not x:
            point.requires_grad_(False)
        if not keep_graph:
            g, hessian = g.detach(), hessian.detach()
        shift = at_time(self.damping, t, x) * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return -torch.linalg.solve(hessian + shift, g)


def _row(g: Tensor, i: int, point: Tensor, keep_graph: bool) -> Tensor:
    """Derivative of the i-th element of the gradient, one row a sample."""
    if not g.requires_grad:
        return torch.zeros_like(point)
    (row,) = torch.autograd.grad(
        g[..., i].sum(), point, create_graph=keep_graph, retain_graph=True, allow_unused=True
    )
    return torch.zeros_like(point) if row is None else row
