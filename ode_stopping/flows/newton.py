"""Newton's flow: a preconditioner that knows the whole Hessian."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..problems.base import Objective, gradient_and_batch_dims
from .gradient import GradientFlow
from .hyperparameters import NONNEGATIVE, Hyperparameter, at_time, hold


class NewtonFlow(GradientFlow):
    """x' = -(hess f(x) + lam I)^{-1} grad f(x).

    With lam = 0 the gradient falls along a ray, grad f(x(t)) = exp(-(t - t0)) grad f(x0), whatever
    the condition number (Smale 1976): T = log(|g0|/eps) for J = |grad f|. Euler with step 1 is
    Newton's method, with lam > 0 that of Levenberg and Marquardt.

    The Hessian is dense and by autograd: d gradients of the gradient an evaluation, d^2 numbers;
    for d up to some hundreds. The energy f(x) - f* does not rise where hess f(x) + lam I is
    positive definite: for f that is not convex it may.

    Args:
        objective: As for `GradientFlow`.
        damping: lam >= 0: a number (fixed), a 0-d tensor, or a callable of t.

    Raises:
        TypeError, ValueError: What `GradientFlow` raises, and for a negative damping; at a call,
            where x has no coordinates or f is not one number a sample.
        RuntimeError: The Hessian is singular at a point of the path (`torch.linalg.LinAlgError`).
    """

    damping: Any

    def __init__(self, objective: Objective, *, damping: Hyperparameter = 0.0) -> None:
        super().__init__(objective)
        hold(self, "damping", damping, NONNEGATIVE)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """The Newton direction, shape (..., d)."""
        if x.ndim == 0:
            raise ValueError("x must have shape (..., d), got a number: write x.reshape(1)")
        g, hessian = self._gradient_and_hessian(x)
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return -torch.linalg.solve(hessian + at_time(self.damping, t, x) * eye, g)

    def _gradient_and_hessian(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of shapes (..., d) and (..., d, d), in every autograd mode."""
        keep_graph = torch.is_grad_enabled()
        through = keep_graph and x.requires_grad
        if keep_graph and not through:
            # Does a graph lead anywhere but to the leaf below, which is none of the user's?
            keep_graph = self.gradient(x).requires_grad
        with torch.enable_grad():
            # An alias: were x itself used inside f, only the path through the argument counts.
            point = x.view_as(x) if through else x.detach().requires_grad_()
            g, batch_dims = gradient_and_batch_dims(self.objective, point)
            if batch_dims != x.ndim - 1:
                raise ValueError(
                    "objective must return one value a sample: its Hessian couples the rows of x, "
                    f"shape {tuple(x.shape)}, which is solved for row by row"
                )
            rows = [_row(g, i, point, keep_graph) for i in range(x.shape[-1])]
        hessian = torch.stack(rows, dim=-2)
        if not through:
            point.requires_grad_(False)
        return (g, hessian) if keep_graph else (g.detach(), hessian.detach())


def _row(g: Tensor, i: int, point: Tensor, keep_graph: bool) -> Tensor:
    """Derivative of the i-th element of the gradient, one row a sample."""
    if not g.requires_grad:
        return torch.zeros_like(point)
    (row,) = torch.autograd.grad(
        g[..., i].sum(), point, create_graph=keep_graph, retain_graph=True, allow_unused=True
    )
    return torch.zeros_like(point) if row is None else row
