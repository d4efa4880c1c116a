"""One step of an adaptive Runge-Kutta method of torchdiffeq, with its dense output.

All of torchdiffeq's internals that this library touches are in this file, and their presence is
tested by feature, never by version.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import Trial
from .step import Step

__all__ = ["Method", "adaptive_methods", "needs_wide_interpolation", "replay_step"]

try:
    from torchdiffeq._impl.odeint import SOLVERS
    from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, _runge_kutta_step
except ImportError as error:  # pragma: no cover - depends on the installed torchdiffeq
    raise ImportError(
        "this torchdiffeq has no adaptive Runge-Kutta solvers where ode-stopping looks for them; "
        "torchdiffeq 0.2.5 is the version that is tested"
    ) from error

_CUBIC_UP_TO_ORDER = 3

_QUARTIC_UP_TO_ORDER = 5


def adaptive_methods() -> list[str]:
    """Names of the adaptive Runge-Kutta methods of the installed torchdiffeq."""
    return [
        name
        for name, solver in SOLVERS.items()
        if isinstance(solver, type) and issubclass(solver, RKAdaptiveStepsizeODESolver)
    ]


def needs_wide_interpolation(method: str) -> bool:
    """Whether a method's steps are more accurate than the quartic that comes with them."""
    return bool(SOLVERS[method].order > _QUARTIC_UP_TO_ORDER)


def _hermite(y0: Tensor, f0: Tensor, y1: Tensor, f1: Tensor, length: float) -> tuple[Tensor, ...]:
    """Coefficients of the cubic through states and velocities at both ends."""
    chord = y1 - y0
    return y0, length * f0, 3 * chord - length * (2 * f0 + f1), length * (f0 + f1) - 2 * chord


class _SolverFunction:
    """What a torchdiffeq solver expects to be called as: (t, y, perturb=...) and callbacks."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, t: Tensor, y: Tensor, *, perturb: object = None) -> Tensor:
        return self.function(t, y)

    def callback_step(self, *_: object) -> None: ...
    def callback_accept_step(self, *_: object) -> None: ...
    def callback_reject_step(self, *_: object) -> None: ...


class Method:
    """One adaptive Runge-Kutta method of torchdiffeq on one function: its steps, nothing kept."""

    def __init__(
        self, name: str, function: Callable[[Tensor, Tensor], Tensor], like: Tensor
    ) -> None:
        self._function = _SolverFunction(function)
        solver: Any = SOLVERS[name](
            func=self._function, y0=like, rtol=0.0, atol=1.0, norm=torch.linalg.vector_norm
        )
        self._interpolation = solver._interp_fit
        self._tableau = solver.tableau
        self._device = like.device
        self.order = int(solver.order)

    def _time(self, t: float) -> Tensor:
        return torch.tensor(t, dtype=torch.float64, device=self._device)

    def __call__(self, t: float, y: Tensor) -> Tensor:
        """y' at (t, y)."""
        return self._function(self._time(t), y)

    def step(self, t0: float, t1: float, y0: Tensor, f0: Tensor) -> tuple[Trial, Tensor]:
        """One step, and the velocities at its stages, shape (n, stages)."""
        start, end = self._time(t0), self._time(t1)
        y1, f1, error, stages = _runge_kutta_step(
            self._function, y0, f0, start, end - start, end, tableau=self._tableau
        )
        if not _ends_on_last_stage(self._tableau):
            f1 = self._function(end, y1)
        return Trial(t0, t1, y0, f0, y1, f1, error.to(y1.dtype)), stages

    def dense(self, trial: Trial, stages: Tensor) -> Step:
        """A step with the dense output that suits the method.

        torchdiffeq makes a quartic for every method, from a midpoint that is of low order for the
        methods of order 2 and 3: there the cubic through both ends is the better one.
        """
        length = trial.t1 - trial.t0
        if self.order <= _CUBIC_UP_TO_ORDER:
            native = _hermite(trial.y0, trial.f0, trial.y1, trial.f1, length)
        else:
            native = self._interpolation(trial.y0, trial.y1, stages, self._time(length))
        return Step(trial.t0, trial.t1, trial.y0, trial.y1, tuple(native), trial.error)


def _ends_on_last_stage(tableau: Any) -> bool:
    """Whether the last stage is y1 itself; for the others torchdiffeq's y'(t1) is that of a stage.

    (Its `_runge_kutta_step` hands out the last stage's velocity for every method.)
    """
    last = tableau.c_sol[-1] == 0 and (tableau.c_sol[:-1] == tableau.beta[-1]).all()
    return bool(last)


def replay_step(
    method: str,
    function: Callable[[Tensor, Tensor], Tensor],
    t0: Tensor,
    t1: Tensor,
    y0: Tensor,
    f0: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of the method from t0 to t1, differentiable to everything: (y1, y'(t1))."""
    tableau = _tableau(method, y0)
    solver_function = _SolverFunction(function)
    y1, f1, _, _ = _runge_kutta_step(solver_function, y0, f0, t0, t1 - t0, t1, tableau=tableau)
    return y1, f1 if _ends_on_last_stage(tableau) else solver_function(t1, y1)


def _tableau(method: str, like: Tensor) -> Any:
    tableau = SOLVERS[method].tableau
    convert = {"dtype": like.dtype, "device": like.device}
    return type(tableau)(
        alpha=tableau.alpha.to(**convert),
        beta=[b.to(**convert) for b in tableau.beta],
        c_sol=tableau.c_sol.to(**convert),
        c_error=tableau.c_error.to(**convert),
    )
