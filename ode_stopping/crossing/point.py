"""What is known at a crossing: everything that a derivative of its time needs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..core.functions import CriterionMap
from ..solving.flow_map import FlowMap

__all__ = ["Crossing", "delay_changes", "lam_change"]


@dataclass(frozen=True)
class Crossing:
    """A point (T, x_T) at which the criterion meets its target.

    Signs are those of a J that falls (`core.functions.CriterionMap`), whatever the user's does.

    Attributes:
        criterion: J.
        time: T.
        state: x_T, shape (n,).
        value: J(T, x_T).
        velocity: F(T, x_T), shape (n,).
        gradient: g = grad J, shape (n,).
        explicit_rate: dJ/dt at fixed x.
        aside: How long before T, in flow time, g and dJ/dt were taken, on the line along F: > 0
            where J has a kink, so that they are those of one side.
    """

    criterion: CriterionMap
    time: float
    state: Tensor
    value: float
    velocity: Tensor
    gradient: Tensor
    explicit_rate: float
    aside: float = 0.0

    @classmethod
    def at(cls, criterion: CriterionMap, time: float, state: Tensor, velocity: Tensor) -> Crossing:
        """The point, with the criterion evaluated and differentiated there."""
        value, gradient, explicit = criterion.gradient(time, state)
        return cls(criterion, time, state, value, velocity, gradient, explicit)

    @property
    def seen_at(self) -> tuple[float, Tensor]:
        """Where the derivatives were taken: at T, or just before it on the side of a kink."""
        if self.aside == 0.0:
            return self.time, self.state
        return self.time - self.aside, self.state - self.aside * self.velocity

    @cached_property
    def rate(self) -> float:
        """J'(T) = g^T F + J_t."""
        return float(self.gradient @ self.velocity) + self.explicit_rate

    @cached_property
    def rate_scale(self) -> float:
        """sum_i |g_i F_i| + |J_t|: what J'(T) would be without cancellation."""
        return float((self.gradient * self.velocity).abs().sum()) + abs(self.explicit_rate)

    @cached_property
    def rounding(self) -> float:
        """Rounding of J at x_T: eps_machine (|J| + sum_i |g_i x_i|), for x is rounded, too."""
        size = abs(self.value) + float((self.gradient * self.state).abs().sum())
        return torch.finfo(self.state.dtype).eps * size

    def is_transversal(self, rtol: float) -> bool:
        """Whether |J'(T)| stands clear of the cancellation in it: > 10 rtol times its scale."""
        rate = self.rate
        return rate == rate and abs(rate) > 10 * rtol * self.rate_scale

    def is_finite(self) -> bool:
        """Whether value, velocity and gradient are."""
        parts = torch.cat([self.velocity, self.gradient]).isfinite().all()
        return self.value - self.value == 0.0 and bool(parts)


def lam_change(flow: FlowMap, crossing: Crossing, state_error: Tensor) -> float:
    """Relative change of lam(T) = -g / J' if x_T errs by `state_error`, shape (n,).

    J(x_T) = eps holds in spite of the error, as T gives way: so the error is moved along the path
    back to the level set.
    """
    delay = -float(crossing.gradient @ state_error) / crossing.rate
    t, x = crossing.time + delay, crossing.state + state_error + delay * crossing.velocity
    moved = Crossing.at(crossing.criterion, t, x, flow.plain(t, x))
    if moved.rate == 0.0:
        return float("inf")
    lam = crossing.gradient / crossing.rate
    change = float((moved.gradient / moved.rate - lam).norm())
    size = float(lam.norm())
    return change / size if size > 0 else 0.0


def delay_changes(flow: FlowMap, crossing: Crossing, start: float) -> tuple[float, float, float]:
    """Relative changes of lam(T), of J'(T) and of T - t0 if T errs by the rounding of J.

    The gradient of T is then that to another target. lam is taken back to T by the adjoint
    equation, for a change along the path is none.
    """
    late = crossing.rounding / abs(crossing.rate)
    t, x = crossing.time + late, crossing.state + late * crossing.velocity
    moved = Crossing.at(crossing.criterion, t, x, flow.plain(t, x))
    if moved.rate == 0.0:
        return float("inf"), float("inf"), float("inf")
    time, state = flow.inputs(t, x)
    value = flow.traced(time, state)
    lam, later = crossing.gradient / crossing.rate, moved.gradient / moved.rate
    back = torch.zeros_like(lam)
    if value.requires_grad:
        (found,) = torch.autograd.grad(value, state, later, allow_unused=True)
        back = back if found is None else late * found
    size = float(lam.norm())
    change = float((later + back - lam).norm())
    of_lam, of_rate = change / size if size > 0 else 0.0, abs(moved.rate / crossing.rate - 1.0)
    return of_lam, of_rate, late / (crossing.time - start)
