"""Convergence studies: discrete against continuous stopping sensitivity, over step sizes.

Theorem 2 of arXiv 2505.22509: |h dN/dtheta - dT/dtheta| <= C h. `convergence_study` measures it on
any problem; `assemble` makes the same of measurements that were taken elsewhere.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from discrete import Euler, UpdateRule
from ode_stopping import Torchdiffeq, stopping_time
from ode_stopping.core.leaves import module_parameters
from ode_stopping.core.validation import Direction

from .measurements import Measurement, measure_index, measure_time
from .slopes import SlopeFit, fit_slope

__all__ = ["ConvergenceStudy", "StudyRow", "assemble", "convergence_study"]

_FEWEST_STEPS = 3


class _Crossing(TypedDict):
    """Which crossing both sides look for."""

    t0: float | Tensor
    direction: Direction
    leave_first: bool


@dataclass(frozen=True)
class StudyRow:
    """One step size.

    Attributes:
        h: Step size, in flow time.
        N: The stopping index.
        steps: N, or the fractional N* where the study interpolates.
        hN: h N, in flow time.
        T: The stopping time of the flow (the same in every row).
        time_error: |t0 + h steps - T| / (T - t0).
        gradient_error: |h dsteps/dtheta - dT/dtheta| / |dT/dtheta|, Euclidean norms over theta.
        bracket: (T - t0 - h N)/h, in steps. Theorem 2's text has it in (-1, 0]; usually it is not.
        decrease: J_N - J_{N-1}.
        nfe_forward: Evaluations of the flow to step N.
        nfe_backward: Evaluations of the flow for the gradient.
        vjps: vector-Jacobian products of the flow.
        seconds: Wall time, both passes.
    """

    h: float
    N: int
    steps: float
    hN: float
    T: float
    time_error: float
    gradient_error: float
    bracket: float
    decrease: float
    nfe_forward: int
    nfe_backward: int
    vjps: int
    seconds: float


@dataclass(frozen=True, repr=False)
class ConvergenceStudy:
    """Rows over step sizes, and the orders that they show.

    Attributes:
        rows: One a step size, the largest first.
        slope: Order of the gradient's error, with its 95 % confidence interval.
        time_slope: Order of the error of the time; None where an error is exactly zero.
        reference: The continuous side.
        t0: Start time.
        update: Name of the update rule.
        interpolation: As given; None is Definition 3.
    """

    rows: tuple[StudyRow, ...]
    slope: SlopeFit
    time_slope: SlopeFit | None
    reference: Measurement
    t0: float
    update: str
    interpolation: str | None

    @property
    def h(self) -> list[float]:
        """The step sizes, descending."""
        return [row.h for row in self.rows]

    @property
    def gradient_errors(self) -> list[float]:
        """The relative errors of the gradient, in the order of `h`."""
        return [row.gradient_error for row in self.rows]

    @property
    def time_errors(self) -> list[float]:
        """The relative errors of the time, in the order of `h`."""
        return [row.time_error for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """Numbers and strings only, as JSON can hold them; gradients as lists."""
        reference = asdict(self.reference)
        reference["gradient"] = self.reference.gradient.tolist()
        return {
            "rows": [asdict(row) for row in self.rows],
            "slope": asdict(self.slope),
            "time_slope": None if self.time_slope is None else asdict(self.time_slope),
            "reference": reference,
            "t0": self.t0,
            "update": self.update,
            "interpolation": self.interpolation,
        }

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame.

        Raises:
            ImportError: Pandas is missing; the message says what to install.
        """
        try:
            pandas = importlib.import_module("pandas")
        except ModuleNotFoundError as error:
            raise ImportError(
                'to_dataframe needs pandas: pip install "ode-stopping[checks]"'
            ) from error
        return pandas.DataFrame([asdict(row) for row in self.rows])

    def plot(self, axes: Any = None) -> Any:
        """The gradient's error over h on log axes, with the fitted line.

        Args:
            axes: Matplotlib axes; None makes a figure.

        Returns:
            The axes.

        Raises:
            ImportError: Matplotlib is missing; the message says what to install.
        """
        from .plotting import new_figure, slope_plot

        if axes is None:
            _, axes = new_figure()
        slope_plot(
            axes,
            self.h,
            {self._method: (self.gradient_errors, self.slope)},
            xlabel=r"step size $h$ (flow time)",
            ylabel=r"relative error of $h\,dN/d\theta$",
            expected=None,
        )
        return axes

    @property
    def _method(self) -> str:
        return self.update if self.interpolation is None else f"{self.update}, {self.interpolation}"

    def __repr__(self) -> str:
        time_slope = "none (an error is zero)" if self.time_slope is None else str(self.time_slope)
        lines = [
            f"ConvergenceStudy({self._method}, T = {self.reference.time:.9g})",
            f"  order of the gradient {self.slope}   (95 % interval)",
            f"  order of the time     {time_slope}",
            "           h        N            hN   err(time)   err(grad)  (T-t0-hN)/h",
        ]
        lines += [
            f"  {row.h:10.4g} {row.N:8d} {row.hN:13.7g}  {row.time_error:10.3e}  "
            f"{row.gradient_error:10.3e}  {row.bracket:11.4f}"
            for row in self.rows
        ]
        return "\n".join(lines)


def convergence_study(
    flow: Callable[..., Any],
    x0: Any,
    criterion: Callable[..., Any],
    target: float | Tensor,
    *,
    steps: Iterable[float],
    update: Callable[..., UpdateRule] = Euler,
    interpolation: str | None = None,
    parameters: Iterable[Tensor] | None = None,
    t0: float | Tensor = 0.0,
    direction: Direction = "falling",
    leave_first: bool = False,
    solver: Torchdiffeq | None = None,
    max_time: float | None = None,
    max_steps: int = 1_000_000,
    confidence: float = 0.95,
) -> ConvergenceStudy:
    """Measure how h dN/dtheta approaches dT/dtheta as h falls (Theorem 2 of arXiv 2505.22509).

    Args:
        flow: (t, x) -> dx/dt.
        x0: The start, as for `stopping_time`.
        criterion: (t, x) -> J.
        target: eps.
        steps: At least 3 different step sizes h, in flow time; their order does not matter.
        update: Makes the iteration, called as update(flow, step=h).
        interpolation: None for Definition 3, or "log", "hermite", "partial_step".
        parameters: theta; None: every tensor that requires grad and is used in flow and criterion,
            parameters of modules and leaves in closures alike, found by one more solve.
        t0: Start time.
        direction: As for `stopping_time`, of both sides.
        leave_first: Likewise.
        solver: Of the reference; None: dopri5 at rtol 1e-10 (1e-5 below float64).
        max_time: Horizon of the reference, in flow time; None: that of `stopping_time`.
        max_steps: Limit on N.
        confidence: Of the intervals of the slopes.

    Raises:
        ValueError: Steps not positive, repeated or fewer than 3; no parameters; dT/dtheta = 0; the
            target is not reached by a crossing on one of the sides, the message says which.
        TypeError: What `stopping_time` and `stopping_index` raise for bad input.
    """
    sizes = _checked_steps(steps)
    crossing: _Crossing = {"t0": t0, "direction": direction, "leave_first": leave_first}
    if parameters is None:
        theta = _found(flow, x0, criterion, target, max_time=max_time, **crossing)
    else:
        theta = _named(parameters)
    reference = measure_time(
        flow,
        x0,
        criterion,
        target,
        parameters=theta,
        solver=solver,
        max_time=max_time,
        **crossing,
    )
    runs = [
        measure_index(
            update(flow, step=h),
            x0,
            criterion,
            target,
            parameters=theta,
            interpolation=interpolation,
            max_steps=max_steps,
            **crossing,
        )
        for h in sizes
    ]
    return assemble(
        reference,
        sizes,
        runs,
        t0=float(t0),
        update=getattr(update, "__name__", type(update).__name__),
        interpolation=interpolation,
        confidence=confidence,
    )


def assemble(
    reference: Measurement,
    steps: Sequence[float],
    runs: Sequence[Measurement],
    *,
    t0: float = 0.0,
    update: str = "Euler",
    interpolation: str | None = None,
    confidence: float = 0.95,
) -> ConvergenceStudy:
    """A study from its measurements, run i with step size steps[i].

    Raises:
        ValueError: Lengths that differ, or what `fit_slope` raises.
    """
    if len(steps) != len(runs):
        raise ValueError(f"runs must be as long as steps ({len(steps)}), got {len(runs)}")
    pairs = sorted(zip(steps, runs, strict=True), key=lambda pair: -pair[0])
    rows = tuple(_row(h, run, reference, t0) for h, run in pairs)
    h = [row.h for row in rows]
    time_errors = [row.time_error for row in rows]
    positive = all(error > 0 for error in time_errors)
    return ConvergenceStudy(
        rows=rows,
        slope=fit_slope(h, [row.gradient_error for row in rows], confidence=confidence),
        time_slope=fit_slope(h, time_errors, confidence=confidence) if positive else None,
        reference=reference,
        t0=t0,
        update=update,
        interpolation=interpolation,
    )


def _row(h: float, run: Measurement, reference: Measurement, t0: float) -> StudyRow:
    assert run.index is not None
    assert run.steps is not None
    gap = float((run.gradient - reference.gradient).norm())
    return StudyRow(
        h=h,
        N=run.index,
        steps=run.steps,
        hN=h * run.index,
        T=reference.time,
        time_error=abs(run.time - reference.time) / (reference.time - t0),
        gradient_error=gap / float(reference.gradient.norm()),
        bracket=(reference.time - t0 - h * run.index) / h,
        decrease=run.decrease,
        nfe_forward=run.nfe_forward,
        nfe_backward=run.nfe_backward,
        vjps=run.vjps,
        seconds=run.seconds_forward + run.seconds_backward,
    )


def _checked_steps(steps: Iterable[float]) -> list[float]:
    sizes = sorted((float(h) for h in steps), reverse=True)
    wrong = [h for h in sizes if not (math.isfinite(h) and h > 0)]
    if wrong:
        raise ValueError(f"steps must be positive and finite, got {wrong[0]:g}")
    if len(set(sizes)) < _FEWEST_STEPS:
        raise ValueError(
            f"steps must hold at least {_FEWEST_STEPS} different step sizes, got {sizes}"
        )
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"steps must not repeat a step size, got {sizes}")
    return sizes


def _named(given: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that were named.

    Raises:
        ValueError: There are none, or one does not require grad.
    """
    found = list(given)
    wrong = [i for i, p in enumerate(found) if not (isinstance(p, Tensor) and p.requires_grad)]
    if wrong:
        raise ValueError(f"parameters[{wrong[0]}] must be a tensor that requires grad")
    if not found:
        raise ValueError("parameters must name at least one tensor to differentiate to; got none")
    return found


def _found(
    flow: Callable[..., Any],
    x0: Any,
    criterion: Callable[..., Any],
    target: float | Tensor,
    *,
    max_time: float | None,
    **crossing: Unpack[_Crossing],
) -> list[Tensor]:
    """All that flow and criterion depend on, closures included, from a run at loose tolerances.

    Raises:
        ValueError: Nothing of it requires grad.
    """
    found = module_parameters(flow, criterion)
    with torch.enable_grad():
        problem = stopping_time(
            flow, x0, criterion, target, max_time=max_time, throw=False, **crossing
        ).problem
    if problem is not None:  # else the target is not reached: the reference run says how
        found = [*found, *problem.leaves.tensors]
    every = list({id(p): p for p in found}.values())
    if problem is not None and not every:
        raise ValueError(
            "parameters: flow and criterion use no tensor that requires grad; make one that does, "
            "or name the tensors to differentiate to"
        )
    return every
