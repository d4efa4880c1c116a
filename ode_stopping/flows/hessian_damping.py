"""Inertial flows with Hessian-driven damping, written without the Hessian.

    x'' + a(t) x' + beta(t) hess f(x) x' + gamma(t) grad f(x) = 0

With v = x' + beta grad f(x) this is of first order in (x, v) and needs gradients only (Attouch,
Chbani, Fadili, Riahi, "First-order optimization algorithms via inertial systems with Hessian driven
damping", Math. Program. 2022):

    x' = v - beta g,   v' = -a (v - beta g) + (beta' - gamma) g,   g = grad f(x)
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.states import State
from ..problems.base import Objective
from .gradient import GradientFlow
from .hyperparameters import (
    NONNEGATIVE,
    POSITIVE,
    Hyperparameter,
    at_time,
    hold,
    is_constant,
    number,
    rate_at_time,
)
from .inertial import checked_velocity, pair


@dataclass(frozen=True)
class Coefficients:
    """a, beta, beta' and gamma at one time, each 0-d."""

    damping: Tensor
    beta: Tensor
    beta_rate: Tensor
    gamma: Tensor

    def weight(self, t: Tensor) -> Tensor:
        """w = gamma - beta' - beta/t."""
        return self.gamma - self.beta_rate - self.beta / t


class HessianDampedFlow(GradientFlow):
    """x' = v - beta g, v' = -a (v - beta g) + (beta' - gamma) g, with g = grad f(x).

    The state is (x, v), both of shape (..., d); v is x' + beta g and not the velocity.
    """

    @abstractmethod
    def coefficients(self, t: Tensor, like: Tensor) -> Coefficients:
        """The coefficients at time t, in the dtype of `like`."""

    def forward(self, t: Tensor, x: State) -> State:
        """The velocity of (x, v)."""
        position, v = pair(x, type(self).__name__)
        return self.velocity(position, v, self.coefficients(t, v))

    def velocity(self, position: Tensor, v: Tensor, now: Coefficients) -> tuple[Tensor, Tensor]:
        """(x', v') with the coefficients given."""
        g = self.gradient(position)
        velocity = v - now.beta * g
        return velocity, -now.damping * velocity + (now.beta_rate - now.gamma) * g

    def position_velocity(self, t: Tensor, state: State) -> Tensor:
        """x' = v - beta g."""
        position, v = pair(state, type(self).__name__)
        return v - self.coefficients(t, v).beta * self.gradient(position)


class InertialHessianFlow(HessianDampedFlow):
    """x'' + a(t) x' + beta(t) hess f x' + gamma(t) grad f = 0 (ISHD).

    Semi-implicit Euler with constant beta = h, gamma = 1 and v0 = 0 is SGD with nesterov=True
    (a = (1 - m)/h), and with a = 3/t, t0 = 3h, Nesterov's method, the look-ahead iterates. Euler
    with step h is EIGAC (Xie, Yin, Wen, arXiv 2406.02006).

    Args:
        objective: As for `GradientFlow`.
        damping: a >= 0: a number (fixed), a 0-d tensor, or a callable of t; `VanishingDamping(a)`
            is a/t.
        beta: Of the Hessian-driven damping, >= 0; as for damping. beta' is taken by autograd.
        gamma: Of the gradient, > 0; as for damping.

    Raises:
        TypeError, ValueError: What `GradientFlow` raises, for constants out of range, and what the
            damping raises at a call.
    """

    damping: Any
    beta: Any
    gamma: Any

    def __init__(
        self,
        objective: Objective,
        *,
        damping: Hyperparameter,
        beta: Hyperparameter,
        gamma: Hyperparameter,
    ) -> None:
        super().__init__(objective)
        hold(self, "damping", damping, NONNEGATIVE)
        hold(self, "beta", beta, NONNEGATIVE)
        hold(self, "gamma", gamma, POSITIVE)

    def coefficients(self, t: Tensor, like: Tensor) -> Coefficients:
        """The coefficients at time t, in the dtype of `like`."""
        beta, beta_rate = rate_at_time(self.beta, t, like)
        damping, gamma = at_time(self.damping, t, like), at_time(self.gamma, t, like)
        return Coefficients(damping, beta, beta_rate, gamma)

    def initial_state(
        self,
        x0: Tensor,
        *,
        t0: float | Tensor | None = None,
        velocity: Tensor | None = None,
    ) -> State:
        """(x0, v0) with the velocity x'(t0), zero by default: v0 = x'(t0) + beta(t0) grad f(x0).

        Args:
            x0: Start, shape (..., d).
            t0: Start time; needed where beta depends on time.
            velocity: x'(t0), shape of x0.

        Raises:
            ValueError: beta is a schedule and no t0 is given; velocity of another shape.
        """
        if t0 is None and not is_constant(self.beta):
            raise ValueError("initial_state needs t0=, the start time: beta is a function of time")
        start = 0.0 if t0 is None else t0
        time = torch.as_tensor(start, dtype=x0.dtype, device=x0.device)
        v0 = at_time(self.beta, time, x0) * self.gradient(x0)
        return x0, v0 if velocity is None else v0 + checked_velocity(velocity, x0)

    def weight(self, t: Tensor, like: Tensor) -> Tensor:
        """w = gamma - beta' - beta/t, 0-d: the weight of f in the energy, over t^2.

        Raises:
            ValueError: t <= 0.
        """
        if not bool(t > 0):
            raise ValueError(f"w has a term beta/t: t must be > 0; got {float(t.detach()):g}")
        return self.coefficients(t, like).weight(t.to(like))

    def energy(
        self,
        t: Tensor | float,
        state: State,
        *,
        minimum: float | None = None,
        minimizer: Tensor | None = None,
    ) -> Tensor:
        """t^2 w (f(x) - f*) + |(alpha - 1)(x - x*) + t v|^2/2.

        With alpha = t a(t) and w = gamma - beta' - beta/t. For convex f and a damping alpha/t

            E' <= -t ((alpha - 3) w - t w') (f(x) - f*) - t^2 w beta |g|^2   (alpha >= 1, w >= 0),

        so E does not rise where t w' <= (alpha - 3) w, too (see `convergence_margins`), and
        f(x) - f* <= E(t0)/(t^2 w) (arXiv 2406.02006, with kappa = 1, lambda = alpha - 1).

        Args:
            t: Flow time, > 0.
            state: (x, v).
            minimum: f*; default the objective's own, or 0 where it has none.
            minimizer: x*; default the objective's own.

        Raises:
            ValueError: x* is not known; t <= 0.
        """
        x, v = pair(state, type(self).__name__)
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        alpha = time * at_time(self.damping, time, x)
        moved = (alpha - 1) * (x - self.known_minimizer(minimizer, x)) + time * v
        weight = time.square() * self.weight(time, x)
        return weight * self.excess(x, minimum) + 0.5 * (moved * moved).sum(-1)


class HighResolutionFlow(HessianDampedFlow):
    """x'' + 2 sqrt(mu) x' + sqrt(s) hess f x' + (1 + sqrt(mu s)) grad f = 0.

    The high-resolution limit of NAG-SC with step s (Shi, Du, Jordan, Su, Math. Program. 2022): it
    keeps the gradient correction, which the limit of first order loses. A limit only: no step gives
    the algorithm back.

    Args:
        objective: As for `GradientFlow`.
        mu: Modulus of strong convexity, > 0: a number (fixed), a 0-d tensor, or a learnable
            constant such as `Positive`, but no function of time.
        s: Step of the algorithm, > 0 (there at most 1/L); as for mu.

    Raises:
        TypeError, ValueError: What `GradientFlow` raises, and for mu or s <= 0 or schedules.
    """

    mu: Any
    s: Any

    def __init__(self, objective: Objective, *, mu: Hyperparameter, s: Hyperparameter) -> None:
        super().__init__(objective)
        hold(self, "mu", mu, POSITIVE)
        hold(self, "s", s, POSITIVE)
        self._constants(torch.zeros(()))

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        # The equation with mu(t) or s(t) would have further terms, beta' for one.
        mu, s = number(self.mu, "mu"), number(self.s, "s")
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        return torch.as_tensor(mu, **options), torch.as_tensor(s, **options)

    def coefficients(self, t: Tensor, like: Tensor) -> Coefficients:
        """The coefficients; constants."""
        mu, s = self._constants(like)
        return Coefficients(2 * mu.sqrt(), s.sqrt(), torch.zeros_like(s), 1 + (mu * s).sqrt())

    def initial_state(self, x0: Tensor, *, velocity: Tensor | None = None) -> State:
        """(x0, v0) with x'(0) = -2 sqrt(s) grad f(x0)/(1 + sqrt(mu s)), or the velocity given."""
        mu, s = self._constants(x0)
        g = self.gradient(x0)
        if velocity is None:
            velocity = -2 * s.sqrt() / (1 + (mu * s).sqrt()) * g
        return x0, checked_velocity(velocity, x0) + s.sqrt() * g

    def energy(
        self,
        t: Tensor | float,
        state: State,
        *,
        minimum: float | None = None,
        minimizer: Tensor | None = None,
    ) -> Tensor:
        """(1 + sqrt(mu s))(f - f*) + |x'|^2/4 + |x' + 2 sqrt(mu)(x - x*) + sqrt(s) g|^2/4.

        E' <= -sqrt(mu)/4 E for mu-strongly convex f (Shi, Du, Jordan, Su 2022, Lemma 1).

        Args:
            t: Flow time.
            state: (x, v); x' = v - sqrt(s) g.
            minimum: f*; default the objective's own, or 0 where it has none.
            minimizer: x*; default the objective's own.

        Raises:
            ValueError: x* is not known.
        """
        x, v = pair(state, type(self).__name__)
        mu, s = self._constants(x)
        velocity = v - s.sqrt() * self.gradient(x)
        mixed = v + 2 * mu.sqrt() * (x - self.known_minimizer(minimizer, x))
        kinetic = 0.25 * (velocity.square().sum(-1) + mixed.square().sum(-1))
        return (1 + (mu * s).sqrt()) * self.excess(x, minimum) + kinetic
