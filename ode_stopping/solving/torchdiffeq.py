"""The adaptive Runge-Kutta methods of torchdiffeq, as a solver.

Their tableaus and midpoints are read from the installed package and run by this library's own loop,
which makes the same steps (a test compares each with torchdiffeq's own, to 1e-14). All of
torchdiffeq's internals that this library touches are in this file, and their presence is tested by
feature, never by version.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

try:
    from torchdiffeq._impl.odeint import SOLVERS
    from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
except ImportError as error:  # pragma: no cover - depends on the installed torchdiffeq
    raise ImportError(
        "this torchdiffeq has no adaptive Runge-Kutta solvers where ode-stopping looks for them; "
        "torchdiffeq 0.2.5 is the version that is tested"
    ) from error

from .runge_kutta import RungeKutta
from .solver import Method, Solver

__all__ = ["Torchdiffeq", "adaptive_methods"]

# torchdiffeq makes a quartic for every method, from a midpoint that is of low order for the methods
# of order 2 and 3: there the cubic through both ends is the better one.
_CUBIC_UP_TO_ORDER = 3


def adaptive_methods() -> list[str]:
    """Names of the adaptive Runge-Kutta methods of the installed torchdiffeq."""
    return [
        name
        for name, solver in SOLVERS.items()
        if isinstance(solver, type) and issubclass(solver, RKAdaptiveStepsizeODESolver)
    ]


@dataclass(frozen=True)
class Torchdiffeq(Solver):
    """An adaptive method of torchdiffeq with its tolerances and limits.

    Args:
        method: Name of an adaptive Runge-Kutta method (see `adaptive_methods`).
        rtol: Relative tolerance; this and the others by keyword, see `Solver`.
        atol: Absolute tolerance.
        max_steps: Limit on all steps.
        max_step: Largest step, in flow time.
        first_step: First step, in flow time.

    Raises:
        ValueError: Unknown method; otherwise see `Solver`.
        TypeError: See `Solver`.
    """

    method: str = "dopri5"  # type: ignore[assignment]  # called, it gives the method itself

    def __post_init__(self) -> None:
        if self.method not in adaptive_methods():
            raise ValueError(
                f"method must be one of the adaptive methods {adaptive_methods()}; got "
                f"{self.method!r}"
            )
        object.__setattr__(self, "method", _Name(self.method))
        super().__post_init__()


class _Name(str):
    """The name of a method, which gives the method where a solver is asked for it."""

    __slots__ = ()

    def __call__(self, dtype: torch.dtype) -> Method:
        return _method(str(self))


@cache
def _method(name: str) -> Method:
    solver: Any = SOLVERS[name]
    tableau, order = solver.tableau, int(solver.order)
    weights = tableau.c_sol.tolist()
    dense = None
    if order > _CUBIC_UP_TO_ORDER:
        dense = _quartic(tableau.c_sol, solver.mid).tolist()
    return RungeKutta(
        order=order,
        nodes=tableau.alpha.tolist(),
        matrix=[row.tolist() for row in tableau.beta],
        weights=weights,
        error=tableau.c_error.tolist(),
        dense_weights=dense,
        dense_order=3 if dense is None else 4,
    )


def _quartic(solution: Any, midpoint: Any) -> Any:
    """The quartic through both ends and the midpoint, by the velocities: rows s, s^2, s^3, s^4."""
    first, last = torch.zeros_like(solution), torch.zeros_like(solution)
    first[0], last[-1] = 1.0, 1.0
    mid = midpoint.to(solution)
    return torch.stack(
        [
            first,
            last - 4 * first - 5 * solution + 16 * mid,
            5 * first - 3 * last + 14 * solution - 32 * mid,
            2 * (last - first) - 8 * solution + 16 * mid,
        ]
    )
