"""What a route is: one method that pulls a cotangent back through the flow map at fixed T."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from .problem import StoppingProblem

__all__ = ["GradientRoute", "PullBack"]


@dataclass(frozen=True)
class PullBack:
    """A cotangent lam(T) on x_T, pulled back through x_T = flow map (theta, x0, t0) at fixed T.

    Attributes:
        start: lam(t0), shape (n,): the cotangent on x0.
        leaves: int_{t0}^{T} F_theta^T lam dt, one tensor a leaf.
        time: int_{t0}^{T} F_t^T lam dt, or None where the route does not compute it. It is
            redundant: lam(t0)^T F(t0, x0) = lam(T)^T F(T, x_T) - time, and so it checks lam.
        samples: lam at the times that were asked for, shape (len(times), n); None if none were.
        quadrature_errors: Norm of the difference to a second quadrature of each entry of `leaves`;
            None where there is none.
        defect: Sum over the forward steps of lam^T (error estimate): by how much lam(T)^T x_T is
            wrong; None where no steps were kept.
        departure: Largest departure of lam(t)^T F + int_t^T F_t^T lam from lam(T)^T F(T) over the
            forward steps, relative to sum_i |lam_i F_i|; None where no steps were kept.
    """

    start: Tensor
    leaves: list[Tensor]
    time: float | None = None
    samples: Tensor | None = None
    quadrature_errors: list[float] | None = None
    defect: float | None = None
    departure: float | None = None


class GradientRoute(ABC):
    """A way to differentiate the state at a fixed time; the quotient is none of its business.

    Attributes:
        keeps_trajectory: Whether the forward run has to keep its dense output for this route.
    """

    keeps_trajectory: bool = True

    @abstractmethod
    def pull_back(self, problem: StoppingProblem, cotangent: Tensor) -> PullBack:
        """Pull `cotangent` = lam(T), shape (n,), back to x0 and to the leaves.

        Raises:
            GradientError: The route cannot give this derivative to its accuracy.
        """
