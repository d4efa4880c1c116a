"""Flows of the adaptive methods: RMSProp and Adam."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor

from ..core.states import State, pieces
from ..core.status import GradientError
from ..problems.base import Objective
from .gradient import GradientFlow
from .hyperparameters import NONNEGATIVE, POSITIVE, Hyperparameter, at_time, hold, number
from .roots import root_without_derivative_at_zero

_AGE_ZERO = (
    "the flow starts at age 0, where its velocity has an infinite derivative to the moments: T is "
    "right and has no gradient by any route. Start from flow.initial_state(x0, age=1e-3), say; T "
    "changes by about as much"
)


class RMSPropFlow(GradientFlow):
    """v' = (g^2 - v)/tau, x' = -g/(sqrt(v) + eps), with g = grad f(x), element by element.

    The state is (x, v), both of shape (..., d). Semi-implicit Euler with h = lr and
    tau = lr/(1 - alpha) is `torch.optim.RMSprop`.

    Args:
        objective: As for `GradientFlow`.
        tau: Time constant of the second moment, > 0, in flow time; a number (fixed), a 0-d tensor
            or a callable of t (`Positive(0.1)` is learnable and stays positive).
        eps: Added to the root, >= 0; as for tau.
        inside: Added to v under the root, >= 0. 0 is the algorithm. The root then has the
            derivative 0 at v = 0, and orders of convergence are those of a smooth flow from v0 > 0
            only; a small positive number is another algorithm, smooth everywhere.

    Raises:
        TypeError, ValueError: What `GradientFlow` raises, and for constants out of range.
    """

    tau: Any
    eps: Any
    inside: Any

    def __init__(
        self,
        objective: Objective,
        *,
        tau: Hyperparameter,
        eps: Hyperparameter = 1e-8,
        inside: Hyperparameter = 0.0,
    ) -> None:
        super().__init__(objective)
        hold(self, "tau", tau, POSITIVE)
        hold(self, "eps", eps, NONNEGATIVE)
        hold(self, "inside", inside, NONNEGATIVE)

    def forward(self, t: Tensor, x: State) -> State:
        """The velocity of (x, v)."""
        position, v = pieces(x, 2, type(self).__name__)
        g = self.gradient(position)
        return self._quotient(t, g, v), (g * g - v) / at_time(self.tau, t, v)

    def position_velocity(self, t: Tensor, state: State) -> Tensor:
        """x' = -g/(sqrt(v) + eps)."""
        position, v = pieces(state, 2, type(self).__name__)
        return self._quotient(t, self.gradient(position), v)

    def require_differentiable(self, state: State) -> None:
        """Raise a GradientError at v = 0, where the root has an infinite derivative."""
        x, v = pieces(state, 2, type(self).__name__)
        constant = isinstance(self.inside, Tensor) and bool(self.inside > 0)
        if not constant and bool(((v == 0) & (self.gradient(x) != 0)).any()):
            raise GradientError(_AGE_ZERO)

    def _quotient(self, t: Tensor, g: Tensor, v: Tensor) -> Tensor:
        root = root_without_derivative_at_zero(v + at_time(self.inside, t, v))
        return -g / (root + at_time(self.eps, t, v))

    def initial_state(self, x0: Tensor, *, age: float = 0.0) -> State:
        """(x0, v0), as though the gradient had been g(x0) for the time `age` (0: v0 = 0).

        The algorithm starts at age 0, where the flow moves at the speed g/eps and is not smooth; a
        flow wants an age > 0 (`math.inf`: v0 = g^2).
        """
        return x0, self.gradient(x0).square() * _reached(age, self.tau, "tau", x0)


class AdamFlow(GradientFlow):
    """x' = -(m/c1)/(sqrt(v/c2) + eps), with moments m, v of the gradient, element by element.

        m' = (g - m)/tau1,   v' = (g^2 - v)/tau2,   c_i' = (1 - c_i)/tau_i,   g = grad f(x)

    The state is (x, m, v, c1, c2); x, m, v of shape (..., d), the bias corrections c1, c2 of shape
    (). Semi-implicit Euler with h = lr and tau_i = lr/(1 - beta_i) is `torch.optim.Adam`. As in the
    algorithm m, v and the c_i start from 0; m/c1 and v/c2 are 0/0 there, with the limits g and g^2.

    Args:
        objective: As for `GradientFlow`.
        tau1: Time constant of the first moment, > 0, in flow time; a number (fixed), a 0-d tensor
            or a callable of t (`Positive(0.1)` is learnable and stays positive).
        tau2: Time constant of the second moment, > 0; as for tau1.
        eps: Added to the root, >= 0; as for tau1.
        inside: Added to v/c2 under the root, >= 0. 0 is the algorithm. The root then has the
            derivative 0 at v = 0, and orders of convergence are those of a smooth flow from v0 > 0
            only; a small positive number is another algorithm, smooth everywhere.

    Raises:
        TypeError, ValueError: What `GradientFlow` raises, and for constants out of range.
    """

    tau1: Any
    tau2: Any
    eps: Any
    inside: Any

    def __init__(
        self,
        objective: Objective,
        *,
        tau1: Hyperparameter,
        tau2: Hyperparameter,
        eps: Hyperparameter = 1e-8,
        inside: Hyperparameter = 0.0,
    ) -> None:
        super().__init__(objective)
        hold(self, "tau1", tau1, POSITIVE)
        hold(self, "tau2", tau2, POSITIVE)
        hold(self, "eps", eps, NONNEGATIVE)
        hold(self, "inside", inside, NONNEGATIVE)

    def forward(self, t: Tensor, x: State) -> State:
        """The velocity of (x, m, v, c1, c2)."""
        position, m, v, c1, c2 = pieces(x, 5, type(self).__name__)
        g = self.gradient(position)
        tau1, tau2 = at_time(self.tau1, t, m), at_time(self.tau2, t, v)
        if bool((c1 > 0) & (c2 > 0)):
            velocity = self._quotient(t, m / c1, v / c2)
        else:
            velocity = self._quotient(t, g, g * g)
        return velocity, (g - m) / tau1, (g * g - v) / tau2, (1 - c1) / tau1, (1 - c2) / tau2

    def position_velocity(self, t: Tensor, state: State) -> Tensor:
        """x', without an evaluation of the gradient but at the start."""
        _, m, v, c1, c2 = pieces(state, 5, type(self).__name__)
        if bool((c1 > 0) & (c2 > 0)):
            return self._quotient(t, m / c1, v / c2)
        return super().position_velocity(t, state)

    def require_differentiable(self, state: State) -> None:
        """Raise a GradientError at c = 0, where m/c1 has an infinite derivative to m."""
        *_, c1, c2 = pieces(state, 5, type(self).__name__)
        if not bool((c1 > 0) & (c2 > 0)):
            raise GradientError(_AGE_ZERO)

    def _quotient(self, t: Tensor, m: Tensor, v: Tensor) -> Tensor:
        root = root_without_derivative_at_zero(v + at_time(self.inside, t, v))
        return -m / (root + at_time(self.eps, t, v))

    def initial_state(self, x0: Tensor, *, age: float = 0.0) -> State:
        """(x0, m0, v0, c1, c2), as though the gradient had been g(x0) for the time `age`.

            c_i = 1 - exp(-age/tau_i),   m0 = c1 g,   v0 = c2 g^2

        The algorithm starts at age 0, all zero but x0. There x' has its limit, but m/c1 has an
        infinite derivative to m, and every gradient route raises: for a gradient of T start at a
        small age (T changes by as much), or at `math.inf`, which is m0 = g, v0 = g^2, c_i = 1. The
        flow is smooth from there if no element of g is zero.
        """
        g = self.gradient(x0)
        c1 = _reached(age, self.tau1, "tau1", x0)
        c2 = _reached(age, self.tau2, "tau2", x0)
        return x0, c1 * g, c2 * g * g, c1, c2

    def energy(
        self,
        t: Tensor | float,
        state: State,
        *,
        minimum: float | None = None,
        minimizer: Tensor | None = None,
    ) -> Tensor:
        """f(x) - f* + (tau1/2) sum_i m_i^2/(sqrt(v_i) + eps).

        Non-increasing for every f from a start of infinite age (c1 = c2 = 1) where tau1 <= 4 tau2:
        E' <= -(1 - tau1/(4 tau2)) sum_i m_i^2/(sqrt(v_i) + eps) (after da Silva, Gazeau, "A general
        system of differential equations to model first-order adaptive algorithms", JMLR 2020).

        Args:
            t: Flow time.
            state: (x, m, v, c1, c2).
            minimum: f*; default the objective's own, or 0 where it has none.
            minimizer: Not used by this energy.
        """
        x, m, v, _, _ = pieces(state, 5, type(self).__name__)
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        kinetic = -(m * self._quotient(time, m, v)).sum(-1)
        return self.excess(x, minimum) + 0.5 * at_time(self.tau1, time, x) * kinetic


def _reached(age: float, tau: Hyperparameter, name: str, like: Tensor) -> Tensor:
    """1 - exp(-age/tau), shape (): the part of a constant gradient's moment reached after `age`."""
    if not age >= 0:
        raise ValueError(f"age must be >= 0; got {age}")
    if age == 0 or age == inf:
        return torch.full((), 0.0 if age == 0 else 1.0, dtype=like.dtype, device=like.device)
    constant = torch.as_tensor(number(tau, name), dtype=like.dtype, device=like.device)
    return -torch.expm1(-age / constant)
