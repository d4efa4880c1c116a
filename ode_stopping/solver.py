"""torchdiffeq behind one adapter: adaptive Runge-Kutta steps, one at a time.

The public `odeint` hides what a stopping time needs: each accepted step with its dense output, a
stop in the middle, a bound on the times at which the flow is evaluated, and an end other than an
assertion when the step size underflows. All of torchdiffeq's internals that this library touches
are in this file, and their presence is tested by feature, never by version.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from .status import StoppingWarning

try:
    from torchdiffeq._impl.odeint import SOLVERS
    from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver, _runge_kutta_step
except ImportError as error:  # pragma: no cover - depends on the installed torchdiffeq
    raise ImportError(
        "this torchdiffeq has no adaptive Runge-Kutta solvers where ode-stopping looks for them; "
        "torchdiffeq 0.2.5 is the version that is tested"
    ) from error

__all__ = [
    "Step",
    "StepFailed",
    "Stepper",
    "Tolerances",
    "Torchdiffeq",
    "adaptive_methods",
    "needs_wide_interpolation",
]

_DEFAULT_RTOL = {torch.float64: 1e-7, torch.float32: 1e-4}
# The absolute tolerance must be small against x_T, which a small target makes small: sqrt(1e-12) is
# 1e-6.
_ATOL_PER_RTOL = 1e-4
_CUBIC_UP_TO_ORDER = 3
_QUARTIC_UP_TO_ORDER = 5


def adaptive_methods() -> list[str]:
    """Names of the adaptive Runge-Kutta methods of the installed torchdiffeq."""
    return [
        name
        for name, solver in SOLVERS.items()
        if isinstance(solver, type) and issubclass(solver, RKAdaptiveStepsizeODESolver)
    ]


@dataclass(frozen=True)
class Tolerances:
    """Relative and absolute tolerance of a solve."""

    rtol: float
    atol: float


@dataclass(frozen=True)
class Torchdiffeq:
    """An adaptive method of torchdiffeq with its tolerances and limits.

    Args:
        method: Name of an adaptive Runge-Kutta method (see `adaptive_methods`).
        rtol: Relative tolerance; None: 1e-7 in float64, 1e-4 in float32.
        atol: Absolute tolerance; None: 1e-4 rtol, small so that it does not drown the state near a
            small target.
        max_steps: Limit on accepted and rejected steps together.
        max_step: Largest step, in flow time.
        first_step: First step, in flow time; None: chosen by the solver.

    Raises:
        ValueError: Unknown method, or a tolerance, step or limit that is not positive.
    """

    method: str = "dopri5"
    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 100_000
    max_step: float = inf
    first_step: float | None = None

    def __post_init__(self) -> None:
        if self.method not in adaptive_methods():
            raise ValueError(
                f"method must be one of the adaptive methods {adaptive_methods()}; got "
                f"{self.method!r}"
            )
        if self.rtol is not None and not (isfinite(self.rtol) and self.rtol > 0):
            raise ValueError(f"rtol must be a positive number; got {self.rtol}")
        if self.atol is not None and not (isfinite(self.atol) and self.atol >= 0):
            raise ValueError(f"atol must be a non-negative number; got {self.atol}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1; got {self.max_steps}")
        if not self.max_step > 0:
            raise ValueError(f"max_step must be positive; got {self.max_step}")
        if self.first_step is not None and not self.first_step > 0:
            raise ValueError(f"first_step must be positive; got {self.first_step}")

    def tolerances(self, dtype: torch.dtype) -> Tolerances:
        """Tolerances for states of this dtype, with a warning where the dtype cannot hold them."""
        rtol = self.rtol if self.rtol is not None else _DEFAULT_RTOL.get(dtype, 1e-3)
        floor = 10 * torch.finfo(dtype).eps
        if rtol < floor:
            warnings.warn(
                f"rtol = {rtol:g} is below what {dtype} can hold (about {floor:.1g}); use a "
                "larger rtol "
                "or float64",
                StoppingWarning,
                stacklevel=4,
            )
        atol = self.atol if self.atol is not None else rtol * _ATOL_PER_RTOL
        return Tolerances(rtol, atol)


def needs_wide_interpolation(method: str) -> bool:
    """Whether a method's steps are more accurate than the quartic that comes with them."""
    return bool(SOLVERS[method].order > _QUARTIC_UP_TO_ORDER)


@dataclass(frozen=True)
class Step:
    """One accepted step with its dense output.

    The state at t0 + s (t1 - t0), s in [0, 1], is the polynomial sum_i coefficients[i] s^i.
    """

    t0: float
    t1: float
    y0: Tensor
    y1: Tensor
    coefficients: tuple[Tensor, ...] = field(repr=False)

    def at(self, t: float) -> Tensor:
        """Dense output at time t in [t0, t1], shape (n,)."""
        if t <= self.t0:
            return self.y0
        if t >= self.t1:
            return self.y1
        return self.at_fraction((t - self.t0) / (self.t1 - self.t0))

    def at_fraction(self, s: float) -> Tensor:
        """Dense output at the fraction s of the step."""
        value = self.coefficients[-1]
        for coefficient in reversed(self.coefficients[:-1]):
            value = torch.add(coefficient, value, alpha=s)
        return value

    def velocity(self, s: float) -> Tensor:
        """Derivative of the dense output at the fraction s, in flow time."""
        value = (len(self.coefficients) - 1) * self.coefficients[-1]
        for i in range(len(self.coefficients) - 2, 0, -1):
            value = torch.add(i * self.coefficients[i], value, alpha=s)
        return value / (self.t1 - self.t0)


def _hermite(y0: Tensor, f0: Tensor, y1: Tensor, f1: Tensor, length: float) -> tuple[Tensor, ...]:
    """Coefficients of the cubic through states and velocities at both ends."""
    chord = y1 - y0
    return y0, length * f0, 3 * chord - length * (2 * f0 + f1), length * (f0 + f1) - 2 * chord


class StepFailed(Exception):
    """The step size underflowed. `nonfinite` says whether NaN or inf was the reason."""

    def __init__(self, message: str, *, nonfinite: bool) -> None:
        super().__init__(message)
        self.nonfinite = nonfinite


class _SolverFunction:
    """What a torchdiffeq solver expects to be called as: (t, y, perturb=...) and callbacks."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function
        self.finite = True

    def __call__(self, t: Tensor, y: Tensor, *, perturb: object = None) -> Tensor:
        return self.function(t, y)

    def callback_step(self, *_: object) -> None: ...
    def callback_accept_step(self, *_: object) -> None: ...
    def callback_reject_step(self, *_: object) -> None: ...


class Stepper:
    """Adaptive steps of y' = f(s, y) from s0 up to s_end, one call a step.

    Args:
        settings: Method and limits.
        function: (s, y) -> y', s a 0-d tensor, y of shape (n,).
        start: s0.
        end: s_end; the function is never stepped beyond it.
        y0: Initial value, shape (n,).
        rtol: Relative tolerance (elementwise, in the norm below).
        atol: Absolute tolerance.
        norm: From (error / tolerance) of shape (n,) to a scalar; a step is accepted where it is <=
            1.

    Attributes:
        accepted: Number of accepted steps.
        rejected: Number of rejected steps.
    """

    def __init__(
        self,
        settings: Torchdiffeq,
        function: Callable[[Tensor, Tensor], Tensor],
        start: float,
        end: float,
        y0: Tensor,
        *,
        rtol: float,
        atol: float,
        norm: Callable[[Tensor], Tensor],
        first_step: float | None = None,
    ) -> None:
        self.end = end
        self.accepted = 0
        self.rejected = 0
        self._function = _SolverFunction(function)
        first = first_step if first_step is not None else settings.first_step
        s0 = torch.tensor(start, dtype=torch.float64, device=y0.device)
        self._solver: Any = SOLVERS[settings.method](
            func=self._function,
            y0=y0,
            rtol=rtol,
            atol=atol,
            norm=norm,
            max_step=min(settings.max_step, max(end - start, 0.0) or inf),
            first_step=None if first is None else min(first, end - start),
            step_t=torch.tensor([end], dtype=torch.float64, device=y0.device),
            # A tamer growth than torchdiffeq's 10: the criterion is watched between steps.
            ifactor=5.0,
        )
        self._solver._before_integrate(s0.reshape(1))
        dt = float(self._solver.rk_state.dt)
        if not (isfinite(dt) and dt > 0):
            self._set_dt(1e-6 * max(abs(end - start), 1e-300))
        self._nonfinite = False
        self._before: Any = None

    @property
    def time(self) -> float:
        """Where the integration stands."""
        return float(self._solver.rk_state.t1)

    @property
    def value(self) -> Tensor:
        """y at `time`."""
        return self._solver.rk_state.y1

    @property
    def derivative(self) -> Tensor:
        """y' at `time`."""
        return self._solver.rk_state.f1

    @property
    def next_step(self) -> float:
        """The size that is tried next."""
        return float(self._solver.rk_state.dt)

    @property
    def done(self) -> bool:
        """Whether the end has been reached, to rounding."""
        return self.time >= self.end - 4 * _spacing(self.end)

    def _set_dt(self, dt: float) -> None:
        state = self._solver.rk_state
        self._solver.rk_state = state._replace(
            dt=torch.as_tensor(dt, dtype=state.dt.dtype).to(state.dt.device)
        )

    def attempt(self) -> Step | None:
        """Try one step: the step if it was accepted, None if it was rejected (call again).

        Raises:
            StepFailed: The step size underflowed.
        """
        old = self._solver.rk_state
        t, dt = float(old.t1), float(old.dt)
        # The last step may be short because the end is near; a step that was *reduced* to this is a
        # failure.
        if min(dt, self.end - t) <= 2 * _spacing(t):
            reason = "non-finite values" if self._nonfinite else "the error estimate"
            raise StepFailed(
                f"step size underflow at t = {t:.9g} ({reason})", nonfinite=self._nonfinite
            )
        new = self._solver._adaptive_step(old)
        accepted = float(new.t1) > t
        finite = isfinite(float(new.dt))
        if accepted:
            finite = bool(torch.isfinite(new.y1).all() and torch.isfinite(new.f1).all())
        if not finite:
            # NaN in the error ratio, or an infinite state that divides its own error away: try a
            # tenth.
            self._solver.rk_state = old
            self._set_dt(0.1 * min(dt, self.end - t))
            self._nonfinite = True
            self.rejected += 1
            return None
        self._solver.rk_state = new
        if not accepted:
            self.rejected += 1
            return None
        self._nonfinite = False
        self.accepted += 1
        self._before = old
        return self._step(t, float(new.t1), old.y1, old.f1, new.y1, new.f1, new.interp_coeff)

    def _step(
        self, t0: float, t1: float, y0: Tensor, f0: Tensor, y1: Tensor, f1: Tensor, native: Any
    ) -> Step:
        """A step with the dense output that suits the method.

        torchdiffeq makes a quartic for every method, from a midpoint that is of low order for the
        methods of
        order 2 and 3: there the cubic through both ends is the better one.
        """
        if self._solver.order <= _CUBIC_UP_TO_ORDER:
            return Step(t0, t1, y0, y1, _hermite(y0, f0, y1, f1, t1 - t0))
        return Step(t0, t1, y0, y1, tuple(native))

    def take_back(self, fraction: float) -> None:
        """Undo the latest accepted step; the next attempt is `fraction` of its length."""
        length = self.time - float(self._before.t1)
        self._solver.rk_state = self._before
        self._set_dt(fraction * length)
        self.accepted -= 1
        self.rejected += 1

    def limit_next_step(self, size: float) -> None:
        """Make the next attempt no longer than `size`."""
        if size < self.next_step:
            self._set_dt(size)

    def integrate(
        self, max_steps: int, *, after_step: Callable[[Step], None] | None = None
    ) -> Tensor:
        """Step to the end and return y there.

        Raises:
            StepFailed: The step size underflowed, or `max_steps` was used up.
        """
        while not self.done:
            if self.accepted + self.rejected >= max_steps:
                raise StepFailed(
                    f"no end after {max_steps} steps, at {self.time:.6g}", nonfinite=False
                )
            step = self.attempt()
            if step is not None and after_step is not None:
                after_step(step)
        return self.value

    def shortened(self, step: Step, derivative: Tensor, t1: float) -> tuple[Step, Tensor]:
        """The last step again, to t1 only: a proper step, more accurate than dense output.

        Args:
            step: The step, from step.t0.
            derivative: y' at step.t0.
            t1: New end, in (step.t0, step.t1].

        Returns:
            The shorter step, and y' at t1.
        """
        solver = self._solver
        like = solver.rk_state.t1
        start, end = (torch.tensor(s, dtype=like.dtype, device=like.device) for s in (step.t0, t1))
        dt = end - start
        y1, f1, _, k = _runge_kutta_step(
            self._function, step.y0, derivative, start, dt, end, tableau=solver.tableau
        )
        native = solver._interp_fit(step.y0, y1, k, dt)
        return self._step(step.t0, t1, step.y0, derivative, y1, f1, native), f1


def replay_step(
    settings: Torchdiffeq,
    function: Callable[[Tensor, Tensor], Tensor],
    t0: Tensor,
    t1: Tensor,
    y0: Tensor,
    f0: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of the method from t0 to t1, differentiable to everything: (y1, y'(t1))."""
    tableau = _tableau(settings.method, y0)
    y1, f1, _, _ = _runge_kutta_step(
        _SolverFunction(function), y0, f0, t0, t1 - t0, t1, tableau=tableau
    )
    return y1, f1


def _tableau(method: str, like: Tensor) -> Any:
    tableau = SOLVERS[method].tableau
    convert = {"dtype": like.dtype, "device": like.device}
    return type(tableau)(
        alpha=tableau.alpha.to(**convert),
        beta=[b.to(**convert) for b in tableau.beta],
        c_sol=tableau.c_sol.to(**convert),
        c_error=tableau.c_error.to(**convert),
    )


def _spacing(t: float) -> float:
    """Distance from |t| to the next float64."""
    return 2.0**-52 * max(abs(t), 1e-300)
