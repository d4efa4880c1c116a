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

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Crossing"]


@dataclass(frozen=True)
class Crossing:
    """Everything that the quotient needs, at the crossing.

    Attributes:
        time: T.
        state: x_T, shape (n,).
        value: J(T, x_T).
        velocity: F(T, x_T), shape (n,).
        gradient: g = grad J, shape (n,).
        explicit_rate: dJ/dt at fixed x.
    """

    time: float
    state: Tensor
    value: float
    velocity: Tensor
    gradient: Tensor
    explicit_rate: float

    @property
    def rate(self) -> float:
        """J'(T) = g^T F + J_t."""
        return float(self.gradient @ self.velocity) + self.explicit_rate

    @property
    def rate_scale(self) -> float:
        """sum_i |g_i F_i| + |J_t|: what J'(T) would be without cancellation."""
        return float((self.gradient * self.velocity).abs().sum()) + abs(self.explicit_rate)

    def is_transversal(self, rtol: float) -> bool:
        """Whether |J'(T)| stands clear of the cancellation in it: > 10 rtol times its scale."""
        rate = self.rate
        return rate == rate and abs(rate) > 10 * rtol * self.rate_scale
