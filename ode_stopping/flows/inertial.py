"""Flows of second order: x'' + a(t) x' + grad f(x) = 0, as first-order flows of (x, v), v = x'."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ..core.states import State, pieces
from ..problems.base import Objective
from .gradient import GradientFlow
from .hyperparameters import NONNEGATIVE, POSITIVE, Hyperparameter, VanishingDamping, at_time, hold

PhaseState: TypeAlias = tuple[Tensor, Tensor]


class InertialFlow(GradientFlow):
    """x' = v, v' = -a(t) v - grad f(x).

    The state is (x, v), both of shape (..., d).

    Args:
        objective: As for `GradientFlow`.
    """

    @abstractmethod
    def damping_at(self, t: Tensor, like: Tensor) -> Tensor:
        """a(t), 0-d, in the dtype of `like`."""

    def forward(self, t: Tensor, x: State) -> State:
        """(v, -a(t) v - grad f(x))."""
        position, v = pair(x, type(self).__name__)
        # A copy: the state's own tensor would keep its requires_grad under no_grad.
        return v.clone(), -self.damping_at(t, v) * v - self.gradient(position)

    def position_velocity(self, t: Tensor, state: State) -> Tensor:
        """x' = v, without an evaluation of the gradient."""
        return pair(state, type(self).__name__)[1].clone()

    def initial_state(self, x0: Tensor, *, velocity: Tensor | None = None) -> State:
        """(x0, v0); at rest unless a velocity x'(t0) is given, shape of x0."""
        return x0, torch.zeros_like(x0) if velocity is None else checked_velocity(velocity, x0)

    def energy(
        self,
        t: Tensor | float,
        state: State,
        *,
        minimum: float | None = None,
        minimizer: Tensor | None = None,
    ) -> Tensor:
        """The mechanical energy f(x) - f* + |v|^2/2; E' = -a(t) |v|^2.

        Non-increasing for every f where a >= 0.

        Args:
            t: Flow time.
            state: (x, v).
            minimum: f*; default the objective's own, or 0 where it has none.
            minimizer: Not used by this energy.
        """
        x, v = pair(state, type(self).__name__)
        return self.excess(x, minimum) + 0.5 * (v * v).sum(-1)


class HeavyBallFlow(InertialFlow):
    """x'' + a x' + grad f(x) = 0 (Polyak 1964).

    With a = (1 - m)/sqrt(lr), SemiImplicitEuler of step sqrt(lr) and v0 = 0 it is SGD with
    momentum m.

    Args:
        objective: As for `GradientFlow`.
        damping: a >= 0; a number (fixed), a 0-d tensor, or a callable of t (`Positive(0.5)` is
            learnable and stays positive).

    Raises:
        TypeError, ValueError: What `GradientFlow` raises, and for a damping that is negative.
    """

    damping: Any

    def __init__(self, objective: Objective, *, damping: Hyperparameter) -> None:
        super().__init__(objective)
        hold(self, "damping", damping, NONNEGATIVE)

    def damping_at(self, t: Tensor, like: Tensor) -> Tensor:
        """a(t)."""
        return at_time(self.damping, t, like)


class StronglyConvexNesterovFlow(InertialFlow):
    """x'' + 2 sqrt(mu) x' + grad f(x) = 0: the limit of Nesterov's method for mu-convex f, NAG-SC.

    A limit only: no step gives the algorithm back.

    Args:
        objective: As for `GradientFlow`.
        mu: Modulus of strong convexity, > 0; see `HeavyBallFlow` for what it may be.

    Raises:
        TypeError, ValueError: What `GradientFlow` raises, and for mu <= 0.
    """

    mu: Any

    def __init__(self, objective: Objective, *, mu: Hyperparameter) -> None:
        super().__init__(objective)
        hold(self, "mu", mu, POSITIVE)

    def damping_at(self, t: Tensor, like: Tensor) -> Tensor:
        """2 sqrt(mu)."""
        return 2.0 * at_time(self.mu, t, like).sqrt()

    def energy(
        self,
        t: Tensor | float,
        state: State,
        *,
        minimum: float | None = None,
        minimizer: Tensor | None = None,
    ) -> Tensor:
        """f(x) - f* + |v + sqrt(mu) (x - x*)|^2/2; E' <= -sqrt(mu) E for mu-strongly convex f.

        For a constant mu (Wilson, Recht, Jordan, "A Lyapunov analysis of accelerated methods in
        optimization", JMLR 2021).

        Args:
            t: Flow time.
            state: (x, v).
            minimum: f*; default the objective's own, or 0 where it has none.
            minimizer: x*; default the objective's own.

        Raises:
            ValueError: x* is not known.
        """
        x, v = pair(state, type(self).__name__)
        root = at_time(self.mu, torch.as_tensor(t, dtype=x.dtype, device=x.device), x).sqrt()
        moved = v + root * (x - self.known_minimizer(minimizer, x))
        return self.excess(x, minimum) + 0.5 * (moved * moved).sum(-1)


class NesterovFlow(InertialFlow):
    """x'' + (alpha/t) x' + grad f(x) = 0, t0 > 0 (Su, Boyd, Candes, JMLR 2016).

    The limit of Nesterov's method for convex f (alpha = 3), with h = sqrt(step). The method itself
    is a discretisation of `InertialHessianFlow`.

    Args:
        objective: As for `GradientFlow`.
        alpha: > 0; f(x) - f* = O(1/t^2) for convex f where alpha >= 3. See `HeavyBallFlow` for
            what it may be (`AtLeast(3, value=4)` is learnable).

    Raises:
        TypeError, ValueError: What `GradientFlow` raises, for alpha <= 0, and at t <= 0.
    """

    def __init__(self, objective: Objective, *, alpha: Hyperparameter = 3.0) -> None:
        super().__init__(objective)
        self.damping = VanishingDamping(alpha)

    def damping_at(self, t: Tensor, like: Tensor) -> Tensor:
        """alpha/t."""
        return self.damping(t).to(like)

    def energy(
        self,
        t: Tensor | float,
        state: State,
        *,
        minimum: float | None = None,
        minimizer: Tensor | None = None,
    ) -> Tensor:
        """t^2 (f(x) - f*) + |(alpha - 1)(x - x*) + t v|^2/2.

        Non-increasing for convex f and a constant alpha >= 3 (Su, Boyd, Candes 2016, Theorems 3 and
        5, up to a constant factor), so f(x) - f* <= E(t0)/t^2.

        Args:
            t: Flow time.
            state: (x, v).
            minimum: f*; default the objective's own, or 0 where it has none.
            minimizer: x*; default the objective's own.

        Raises:
            ValueError: x* is not known.
        """
        x, v = pair(state, type(self).__name__)
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        alpha = at_time(self.damping.alpha, time, x)
        moved = (alpha - 1) * (x - self.known_minimizer(minimizer, x)) + time * v
        return time.square() * self.excess(x, minimum) + 0.5 * (moved * moved).sum(-1)


def checked_velocity(velocity: Tensor, x0: Tensor) -> Tensor:
    """A velocity x'(t0) in the dtype of x0; raises a ValueError unless it has its shape, too."""
    if velocity.shape != x0.shape:
        raise ValueError(
            f"velocity must have the shape of x0, {tuple(x0.shape)}; got {tuple(velocity.shape)}"
        )
    return velocity.to(x0)


def pair(state: object, name: str) -> PhaseState:
    """The pieces (x, v) of a phase-space state; raises a TypeError for anything else."""
    return cast("PhaseState", pieces(state, 2, name))
