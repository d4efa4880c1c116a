"""What a solver is: a method, which makes steps, and the tolerances that its steps have to keep.

A solver of one's own derives from `Solver` and returns its `Method`; a Runge-Kutta method needs no
class beside its tableau (`runge_kutta.RungeKutta`). Whatever else there is (the size of steps,
errors, crossings, gradients) works with any of them and asks for what they declare.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.status import StoppingWarning
from ..core.validation import require_count
from ..core.warn import warn_user
from .step import Step

__all__ = [
    "LARGEST_PROMISE",
    "PROMISE_PER_RTOL",
    "Dense",
    "Function",
    "Method",
    "Polynomial",
    "Solver",
    "StepFailed",
    "Tolerances",
    "first_entries",
]

_DEFAULT_RTOL = {torch.float64: 1e-7, torch.float32: 1e-4}
# The absolute tolerance that goes with a relative one, in units of the size of the state: what an
# element of the state may err where it passes through zero.
_FLOOR_PER_RTOL = 1e-4
PROMISE_PER_RTOL = 50.0
LARGEST_PROMISE = 0.1

_Size = TypeVar("_Size", float, Tensor)

# (t, y) -> y', t a float (or a 0-d tensor, in a replay), y of shape (n,).
Function = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Tolerances:
    """Relative and absolute tolerance of a solve.

    Attributes:
        rtol: Relative tolerance.
        atol: Absolute tolerance; None: 1e-4 rtol times the root mean square of the piece of the
            state that an element belongs to, at every step anew, so that it never drowns a state
            that has become small on its way to a small target.
    """

    rtol: float
    atol: float | None = None

    def floor(self, size: _Size) -> _Size | float:
        """The absolute tolerance for a state of this size, or for pieces of these sizes."""
        return _FLOOR_PER_RTOL * self.rtol * size if self.atol is None else self.atol

    def finer(self, fraction: float, dtype: torch.dtype) -> Tolerances:
        """Tolerances `fraction` as large, but not below what the dtype can hold."""
        floor = 30 * torch.finfo(dtype).eps
        atol = None if self.atol is None else fraction * self.atol
        return Tolerances(max(fraction * self.rtol, min(floor, self.rtol)), atol)

    def promise(self, dtype: torch.dtype) -> float:
        """The relative error up to which nothing is said of a gradient: 50 rtol, at most 0.1."""
        rtol = max(self.rtol, torch.finfo(dtype).eps)
        return min(PROMISE_PER_RTOL * rtol, LARGEST_PROMISE)


class Method(ABC):
    """Steps of y' = f(t, y): taken, looked into, and taken again under autograd.

    Attributes:
        order: Of the solution that a step goes on with.
        dense_order: Of the dense output: its error in a step of length h is O(h^(dense_order + 1)).
        stiff: Whether it is for stiff problems.
    """

    order: int
    dense_order: int = 3
    stiff: bool = False

    @abstractmethod
    def trial(self, f: Function, t0: float, y0: Tensor, f0: Tensor, t1: float) -> Step:
        """A step from (t0, y0), where y' = f0, to t1, without graph."""

    def dense(self, step: Step) -> Callable[[float], Tensor]:
        """t -> y(t) inside of an accepted step; by default the cubic through both of its ends."""
        h = step.t1 - step.t0
        chord = step.y1 - step.y0
        rows = torch.stack(
            [
                h * step.f0,
                3 * chord - h * (2 * step.f0 + step.f1),
                h * (step.f0 + step.f1) - 2 * chord,
            ]
        )
        return Polynomial(step, rows)

    @abstractmethod
    def replay(self, f: Function, step: Step, y0: Tensor, t0: Any, h: Any) -> Tensor:
        """y1 of the step taken again, from y0 at t0 with the length h, differentiable.

        With the arguments of the step it gives step.y1, to rounding: 100 eps (|y| + h max|k|), k
        the velocities on the way.

        Args:
            f: (t, y) -> y' with a graph.
            step: The accepted step; `step.data` has what the method needs besides.
            y0: Start, shape (n,); may carry a graph.
            t0: Its time, a float or a 0-d tensor that may carry a graph.
            h: Length, likewise.
        """


class Dense(ABC):
    """y(t) in a step; t beyond an end gives the state there.

    Args:
        step: The step.
    """

    __slots__ = ("_step",)

    def __init__(self, step: Step) -> None:
        self._step = step

    def __call__(self, t: float) -> Tensor:
        """y at time t, shape (n,)."""
        step = self._step
        if t <= step.t0:
            return step.y0
        if t >= step.t1:
            return step.y1
        return self.at_fractions(((t - step.t0) / (step.t1 - step.t0),))[0]

    @abstractmethod
    def at_fractions(self, fractions: tuple[float, ...]) -> Sequence[Tensor]:
        """y(t0 + s h) for several fractions s, each of shape (n,)."""

    @abstractmethod
    def first(self, count: int) -> Dense:
        """The dense output of the first entries of y alone."""


class Polynomial(Dense):
    """y(t0 + s h) = y0 + sum_i rows[i] s^(i + 1).

    Args:
        step: The step.
        rows: The coefficients, shape (degree, n).
    """

    __slots__ = ("_rows",)

    def __init__(self, step: Step, rows: Tensor) -> None:
        super().__init__(step)
        self._rows = rows

    def at_fractions(self, fractions: tuple[float, ...]) -> Sequence[Tensor]:
        """See `Dense.at_fractions`."""
        powers = [[s ** (i + 1) for i in range(len(self._rows))] for s in fractions]
        weights = torch.tensor(powers, dtype=self._rows.dtype, device=self._rows.device)
        return torch.addmm(self._step.y0, weights, self._rows).unbind()

    def first(self, count: int) -> Dense:
        """See `Dense.first`."""
        return Polynomial(self._step.first(count), self._rows[:, :count])


def first_entries(dense: Callable[[float], Tensor], count: int) -> Callable[[float], Tensor]:
    """The first entries of a dense output, without the others where it knows how."""
    return dense.first(count) if isinstance(dense, Dense) else lambda t: dense(t)[:count]


class StepFailed(Exception):
    """The step size underflowed. `nonfinite` says whether NaN or inf was the reason."""

    def __init__(self, message: str, *, nonfinite: bool) -> None:
        super().__init__(message)
        self.nonfinite = nonfinite


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """A method with its tolerances and limits; derive from it and write `method`.

    Args:
        rtol: Relative tolerance; None: 1e-7 in float64, 1e-4 in float32.
        atol: Absolute tolerance; None: 1e-4 rtol times the present size of the state (the root mean
            square of each of its tensors), so that it cannot drown a state that becomes small on
            its way to a small target.
        max_steps: Limit on accepted and rejected steps together.
        max_step: Largest step, in flow time.
        first_step: First step, in flow time; None: chosen by scale.

    Raises:
        ValueError: A tolerance, step or limit that is not positive; rtol >= 1.
        TypeError: One that is not a number.
    """

    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 100_000
    max_step: float = inf
    first_step: float | None = None

    def __post_init__(self) -> None:
        _require_number(self.rtol, "rtol", "a number between 0 and 1", below=1.0)
        _require_number(self.atol, "atol", "a non-negative number", or_zero=True)
        require_count(self.max_steps, name="max_steps")
        _require_number(self.max_step, "max_step", "a positive number", finite=False)
        _require_number(self.first_step, "first_step", "a positive number")

    @abstractmethod
    def method(self, dtype: torch.dtype) -> Method:
        """The method for states of this dtype."""

    def tolerances(self, dtype: torch.dtype) -> Tolerances:
        """Tolerances for states of this dtype, with a warning where the dtype cannot hold them."""
        rtol = self.rtol if self.rtol is not None else _DEFAULT_RTOL.get(dtype, 1e-3)
        floor = 10 * torch.finfo(dtype).eps
        if rtol < floor:
            warn_user(
                f"rtol = {rtol:g} is below what {dtype} can hold (about {floor:.1g}); use a "
                "larger rtol or float64",
                StoppingWarning,
            )
        return Tolerances(rtol, self.atol)


def _require_number(
    value: object,
    name: str,
    wanted: str,
    *,
    below: float = inf,
    or_zero: bool = False,
    finite: bool = True,
) -> None:
    """Raise unless `value` is None or a number in (0, below)."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be {wanted} or None; got {type(value).__name__}")
    inside = 0 < value < below or (value == 0 and or_zero) or (value == inf and not finite)
    if not inside:
        raise ValueError(f"{name} must be {wanted}; got {value}")
