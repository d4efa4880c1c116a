"""The well-known optimisers as flow + discretisation + step, exactly.

Each function returns an `Algorithm`: the flow that the algorithm discretises, the update rule whose
iterates are those of the algorithm to rounding, and the start. So one object gives N and dN of the
algorithm, and T and dT of its flow. Hyperparameters are numbers, or 0-d tensors that may require
grad: the mappings to dampings, time constants and steps are differentiable.

Not in this list, because no discretisation gives the algorithm back: `NesterovFlow`,
`StronglyConvexNesterovFlow` and `HighResolutionFlow` are limits of Nesterov's methods only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import TypeAlias

import torch
from torch import Tensor

from ode_stopping.core.states import State
from ode_stopping.flows import (
    AdamFlow,
    Flow,
    GradientFlow,
    HeavyBallFlow,
    InertialHessianFlow,
    NewtonFlow,
    RMSPropFlow,
    VanishingDamping,
)
from ode_stopping.problems.base import Objective

from .updates import Euler, SemiImplicitEuler, UpdateRule

__all__ = ["Algorithm", "adam", "gradient_descent", "nesterov", "newton", "rmsprop", "sgd"]

Scalar: TypeAlias = float | Tensor


@dataclass(frozen=True)
class Algorithm:
    """An optimiser, as the discretisation of a flow.

    RMSprop and Adam start from zero moments, where their flows have a T without a gradient. For a
    gradient of T start the flow from ``flow.initial_state(x0, age=...)``.

        run = stopping_index(a.update, a.initial_state(x0), criterion, eps, t0=a.t0)
        flow = stopping_time(a.flow, a.initial_state(x0), criterion, eps, t0=a.t0)

    Attributes:
        name: For tables and legends.
        flow: x' = F(t, x).
        update: One step of the algorithm; `update.step` is h in flow time.
        initial_state: x0 -> the state that the algorithm starts from.
        t0: Start time, in flow time.
    """

    name: str
    flow: Flow
    update: UpdateRule
    initial_state: Callable[[Tensor], State]
    t0: Scalar = 0.0


def gradient_descent(objective: Objective, *, lr: Scalar) -> Algorithm:
    """x+ = x - lr grad f(x): Euler with h = lr on x' = -grad f(x)."""
    flow = GradientFlow(objective)
    return Algorithm("gradient descent", flow, Euler(flow, step=lr), flow.initial_state)


def sgd(
    objective: Objective, *, lr: Scalar, momentum: Scalar = 0.0, nesterov: bool = False
) -> Algorithm:
    """`torch.optim.SGD` (full gradient, dampening 0): buf+ = m buf + g, x+ = x - lr buf+.

    Heavy ball: semi-implicit Euler with h = sqrt(lr) on x'' + a x' + grad f(x) = 0, with
    a = (1 - m)/sqrt(lr), v0 = 0 and buf = -v/h. With `nesterov` (x+ = x - lr (g + m buf+)): on
    x'' + a x' + h hess f x' + grad f = 0, written in v = x' + h grad f, v0 = 0.

    Args:
        objective: f.
        lr: learning rate, > 0.
        momentum: m in [0, 1].
        nesterov: as in torch.
    """
    h = lr.sqrt() if isinstance(lr, Tensor) else sqrt(lr)
    damping = (1 - momentum) / h
    if nesterov:
        hessian = InertialHessianFlow(objective, damping=damping, beta=h, gamma=1.0)
        update = SemiImplicitEuler(hessian, step=h)
        return Algorithm("SGD, Nesterov momentum", hessian, update, _at_rest)
    flow = HeavyBallFlow(objective, damping=damping)
    return Algorithm("SGD, momentum", flow, SemiImplicitEuler(flow, step=h), _at_rest)


def nesterov(objective: Objective, *, lr: Scalar, alpha: Scalar = 3.0) -> Algorithm:
    """Nesterov's method for convex f, at its look-ahead points y_k.

        x_{k+1} = y_k - lr grad f(y_k),   y_{k+1} = x_{k+1} + k/(k + 3) (x_{k+1} - x_k)

    Semi-implicit Euler with h = sqrt(lr) from t0 = alpha h on
    x'' + (alpha/t) x' + h hess f x' + grad f = 0, in v = x' + h grad f, v0 = 0; alpha = 3 is the
    method (k/(k + alpha) in general).

    Args:
        objective: f.
        lr: step of the gradient, > 0, at most 1/L.
        alpha: of the damping.
    """
    h = lr.sqrt() if isinstance(lr, Tensor) else sqrt(lr)
    flow = InertialHessianFlow(objective, damping=VanishingDamping(alpha), beta=h, gamma=1.0)
    update = SemiImplicitEuler(flow, step=h)
    return Algorithm("Nesterov's method", flow, update, _at_rest, t0=alpha * h)


def rmsprop(
    objective: Objective, *, lr: Scalar, alpha: Scalar = 0.99, eps: Scalar = 1e-8
) -> Algorithm:
    """`torch.optim.RMSprop` (neither centred nor with momentum).

    Semi-implicit Euler with h = lr on v' = (g^2 - v)/tau, x' = -g/(sqrt(v) + eps), with
    tau = lr/(1 - alpha) and v0 = 0.

    Args:
        objective: f.
        lr: learning rate, > 0.
        alpha: smoothing constant in [0, 1).
        eps: added to the root.
    """
    flow = RMSPropFlow(objective, tau=lr / (1 - alpha), eps=eps)
    return Algorithm("RMSprop", flow, SemiImplicitEuler(flow, step=lr), flow.initial_state)


def adam(
    objective: Objective,
    *,
    lr: Scalar,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: Scalar = 1e-8,
) -> Algorithm:
    """`torch.optim.Adam` (no weight decay, no amsgrad).

    Semi-implicit Euler with h = lr on `AdamFlow` with tau_i = lr/(1 - beta_i), from zero moments.

    Args:
        objective: f.
        lr: learning rate, > 0.
        betas: each in [0, 1).
        eps: added to the root.
    """
    tau1, tau2 = (lr / (1 - beta) for beta in betas)
    flow = AdamFlow(objective, tau1=tau1, tau2=tau2, eps=eps)
    return Algorithm("Adam", flow, SemiImplicitEuler(flow, step=lr), flow.initial_state)


def newton(objective: Objective, *, lr: Scalar = 1.0, damping: Scalar = 0.0) -> Algorithm:
    """Newton's method, x+ = x - lr (hess f + damping I)^{-1} grad f: Euler on `NewtonFlow`.

    Args:
        objective: f.
        lr: 1 is the full step.
        damping: that of Levenberg and Marquardt, >= 0.
    """
    flow = NewtonFlow(objective, damping=damping)
    return Algorithm("Newton's method", flow, Euler(flow, step=lr), flow.initial_state)


def _at_rest(x0: Tensor) -> State:
    """v = 0, which is the empty momentum buffer."""
    return x0, torch.zeros_like(x0)
