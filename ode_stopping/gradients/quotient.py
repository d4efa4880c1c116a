"""The implicit-function quotient, written once (Theorem 1 of arXiv 2505.22509).

The stopping time solves J(T, x(T)) = eps. With g = grad J(x_T), F = F(T, x_T) and the transversal
rate J' = g^T F + J_t, a cotangent c on T and a cotangent w on x_T pull back to

    lam(T) = w + scale g,     scale = -(w^T F + c) / J',

after which the flow map at fixed T does the rest, and to `scale dJ/dphi` on the criterion's
parameters and `-scale` on the target. There is no epsilon in the denominator: whether J' is large
enough is decided by the transversality test, on a scale of its own, and a crossing that fails it
has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.functions import CriterionMap
from ..crossing.point import Crossing
from ..solving.flow_map import FlowMap

__all__ = ["cotangent_at_crossing", "differentiable_crossing"]


def cotangent_at_crossing(
    crossing: Crossing, on_time: Tensor, on_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Start value of the adjoint, and the scale of the explicit terms.

    On a run with several targets this is what lam jumps by at each of their crossings.

    Args:
        crossing: The crossing.
        on_time: Cotangent c on T, shape ().
        on_state: Cotangent w on x_T, shape (n,).

    Returns:
        lam(T), shape (n,), and scale = -(w^T F + c)/J', shape ().
    """
    scale = -(on_state @ crossing.velocity + on_time) / crossing.rate
    return on_state + scale * crossing.gradient, scale


def differentiable_crossing(
    flow: FlowMap,
    criterion: CriterionMap,
    time: Tensor,
    state: Tensor,
    target: Tensor,
    *,
    aside: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """T and x_T as differentiable functions of a state that was solved to the fixed time `time`.

    Two Newton steps in the time shift dt, with the path beyond the fixed time continued by its
    Taylor polynomial x + dt F + dt^2/2 (F_x F + F_t). One step is right to first order only; two
    give the second derivative.

    Args:
        flow: The flow.
        criterion: J.
        time: T0, numerically the stopping time, shape (), float64; it may have a graph, too.
        state: x(T0) with its graph, shape (n,).
        target: eps, shape ().
        aside: How long before T the criterion is looked at (`Crossing.aside`).

    Returns:
        T, shape (), and x_T, shape (n,); their values are T0 and x(T0).
    """
    shift = torch.zeros_like(target.detach(), dtype=state.dtype)
    base = flow.time_tensor(time)
    velocity = flow.traced(base, state)
    acceleration = _total_derivative(flow, base, state, velocity)

    def path(dt: Tensor) -> Tensor:
        return state + dt * velocity + 0.5 * dt.square() * acceleration

    for _ in range(2):
        # On a kink, from the side of the run; the path there is a straight line.
        x = _requiring_grad(path(shift) - aside * velocity.detach())
        t = _requiring_grad(base + shift - aside)
        value = criterion.traced(t, x)
        g, explicit = torch.autograd.grad(value, [x, t], create_graph=True, allow_unused=True)
        speed = velocity + shift * acceleration
        rate = (g * speed).sum() if g is not None else torch.zeros_like(value)
        if explicit is not None:
            rate = rate + explicit
        # (What J has fallen by since then is no error of T.)
        fallen = (value - target).detach() if aside > 0.0 else 0.0
        shift = shift - (value - target - fallen) / rate
    # The values are T0 and x(T0) exactly; what the shift holds beyond its derivatives is rounding.
    shift = shift - shift.detach()
    return time + shift, path(shift)


def _requiring_grad(tensor: Tensor) -> Tensor:
    """The tensor itself if it has a graph, else a fresh leaf with its value."""
    return tensor if tensor.requires_grad else tensor.detach().clone().requires_grad_(True)


def _total_derivative(flow: FlowMap, t: Tensor, x: Tensor, velocity: Tensor) -> Tensor:
    """dF/dt along the path, F_x F + F_t, by differentiating a vector-Jacobian product."""
    time, state = _requiring_grad(t), _requiring_grad(x)
    value = flow.traced(time, state)
    total = torch.zeros_like(value)
    if not value.requires_grad:
        return total
    dummy = torch.zeros_like(value, requires_grad=True)
    pulled = torch.autograd.grad(value, [state, time], dummy, create_graph=True, allow_unused=True)
    for gradient, direction in zip(pulled, [velocity, torch.ones_like(time)], strict=True):
        if gradient is not None and gradient.requires_grad:
            (part,) = torch.autograd.grad(
                gradient, dummy, direction, create_graph=True, allow_unused=True
            )
            total = total if part is None else total + part
    return total
