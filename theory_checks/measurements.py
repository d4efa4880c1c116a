"""One side of the comparison, measured: where it stops, its gradient, and what that cost.

`measure_time` is the continuous side at one tolerance, `measure_index` the discrete one at one
step size. What they return is plain and picklable, so that runs can be spread over processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discrete import UpdateRule, stopping_index
from ode_stopping import InterpolatingAdjoint, Status, StoppingResult, Torchdiffeq, stopping_time
from ode_stopping.core.validation import Direction

__all__ = ["Measurement", "in_flow_time", "measure_index", "measure_time"]


@dataclass(frozen=True)
class Measurement:
    """One side at one accuracy: where it stopped, its gradient, and what that cost.

    Attributes:
        time: T, or t0 + h N* (N* = N under Definition 3), in flow time.
        gradient: dT/dtheta, or h dN*/dtheta, in flow time: one float64 vector over all of theta.
        index: N; None on the continuous side.
        steps: N*; None on the continuous side.
        decrease: J_N - J_{N-1}; on the continuous side J'(T).
        nfe_forward: Evaluations of the flow until the target was met.
        nfe_backward: Evaluations of the flow for the gradient.
        vjps: Vector-Jacobian products of the flow for the gradient.
        stored_bytes: Memory of the states that were kept for the gradient.
        seconds_forward: Wall time to the target, tracing and consistency tests included.
        seconds_backward: Wall time of the gradient.
    """

    time: float
    gradient: Tensor
    index: int | None
    steps: float | None
    decrease: float
    nfe_forward: int
    nfe_backward: int
    vjps: int
    stored_bytes: int
    seconds_forward: float
    seconds_backward: float


def measure_time(
    flow: Callable[..., Any],
    x0: Any,
    criterion: Callable[..., Any],
    target: float | Tensor,
    *,
    parameters: Sequence[Tensor],
    t0: float | Tensor = 0.0,
    direction: Direction = "falling",
    leave_first: bool = False,
    solver: Torchdiffeq | None = None,
    max_time: float | None = None,
) -> Measurement:
    """The continuous side: T and dT/dtheta by the continuous adjoint, `InterpolatingAdjoint`.

    The default route is the transpose of the solver's steps, hence of a discrete iteration itself;
    the theorems compare iterations with the derivative of the flow.

    Raises:
        ValueError: The target is not reached by a crossing, or dT/dtheta = 0.
    """
    settings = solver if solver is not None else _reference_solver(x0)
    begin = time.perf_counter()
    result = stopping_time(
        flow,
        x0,
        criterion,
        target,
        t0=t0,
        direction=direction,
        leave_first=leave_first,
        max_time=max_time,
        solver=settings,
        gradient=InterpolatingAdjoint(),
        params=parameters,
        throw=False,
        evidence="light",
    )
    _require_crossing(result.status, "the flow", f"up to t = {result.trajectory.end:.6g}")
    middle = time.perf_counter()
    gradient = _gradient(result.time, parameters)
    end = time.perf_counter()
    if not float(gradient.norm()) > 0:
        raise ValueError("parameters: dT/dtheta is zero, so there is no relative error to measure")
    stats = result.stats
    return Measurement(
        time=float(result.time.detach()),
        gradient=gradient,
        index=None,
        steps=None,
        decrease=float(result.rate),
        nfe_forward=stats.nfe_forward,
        nfe_backward=stats.nfe_backward or 0,
        vjps=stats.vjps or 0,
        stored_bytes=_kept_bytes(result),
        seconds_forward=middle - begin,
        seconds_backward=end - middle,
    )


def measure_index(
    update: UpdateRule,
    x0: Any,
    criterion: Callable[..., Any],
    target: float | Tensor,
    *,
    parameters: Sequence[Tensor],
    t0: float | Tensor = 0.0,
    direction: Direction = "falling",
    leave_first: bool = False,
    interpolation: str | None = None,
    max_steps: int = 1_000_000,
) -> Measurement:
    """The discrete side: t0 + h N and h dN/dtheta by Algorithm 1.

    Raises:
        ValueError: The target is not reached by a crossing.
    """
    begin = time.perf_counter()
    result = stopping_index(
        update,
        x0,
        criterion,
        target,
        t0=t0,
        direction=direction,
        leave_first=leave_first,
        max_steps=max_steps,
        interpolation=interpolation,  # type: ignore[arg-type]
        params=parameters,
        throw=False,
        evidence="light",
    )
    h = float(update.step)
    _require_crossing(result.status, f"the iteration with h = {h:g}", f"in {max_steps} steps")
    middle = time.perf_counter()
    gradient = in_flow_time(_gradient(result.steps, parameters), h)
    end = time.perf_counter()
    stages = _stages(update, x0, t0)
    stats = result.stats
    kept = result.trajectory.indices
    pieces = x0 if isinstance(x0, tuple) else (x0,)
    return Measurement(
        time=float(t0) + in_flow_time(float(result.steps.detach()), h),
        gradient=gradient,
        index=result.index,
        steps=float(result.steps.detach()),
        decrease=float(result.decrease),
        nfe_forward=stages * stats.nfe_forward,
        nfe_backward=stages * (stats.nfe_backward or 0),
        vjps=stages * (stats.vjps or 0),
        stored_bytes=len(kept) * sum(p.numel() * p.element_size() for p in pieces),
        seconds_forward=middle - begin,
        seconds_backward=end - middle,
    )


def in_flow_time(steps: Any, h: float) -> Any:
    """A quantity in steps, converted to flow time: T is about t0 + h N, so h dN meets dT."""
    return h * steps


def _reference_solver(x0: Any) -> Torchdiffeq:
    first = x0[0] if isinstance(x0, tuple) else x0
    return Torchdiffeq(rtol=1e-10 if getattr(first, "dtype", None) == torch.float64 else 1e-5)


def _require_crossing(status: Status, who: str, limit: str) -> None:
    if status is Status.REACHED:
        return
    raise ValueError(f"target: {who} does not cross it ({limit}): {status.name}, {status.value}")


def _gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient over all parameters as one float64 vector on the CPU."""
    found = torch.autograd.grad(value, list(parameters), allow_unused=True)
    pieces = [
        torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)
    ]
    return torch.cat([piece.detach().reshape(-1).to("cpu", torch.float64) for piece in pieces])


def _stages(update: UpdateRule, x0: Any, t0: float | Tensor) -> int:
    """How often the update evaluates its flow in one step."""
    calls = 0

    def counted(t: Tensor, x: Any) -> Any:
        nonlocal calls
        calls += 1
        return update.flow(t, x)

    time_tensor = torch.as_tensor(float(t0), dtype=torch.float64)
    same = type(update)(counted, step=float(update.step))
    leaves = tuple(p.detach().requires_grad_() for p in x0) if isinstance(x0, tuple) else None
    same(0, x0.detach().requires_grad_() if leaves is None else leaves, time_tensor)
    return calls


def _kept_bytes(result: StoppingResult) -> int:
    """Memory of the dense output, tensors that steps share counted once."""
    stores: dict[int, int] = {}
    for step in result.trajectory.steps:
        for tensor in (step.y0, step.y1, step.f0, step.f1, step.error):
            storage = tensor.untyped_storage()
            stores[storage.data_ptr()] = storage.nbytes()
    return sum(stores.values())
