"""A continuous adjoint by torchdiffeq's public `odeint` alone: the independent witness.

Theorem 1 of arXiv 2505.22509, written out once more. x(t) is kept from the forward solve; with
g = grad J(T, x_T) and J' = g^T F + J_t at the crossing J(T, x_T) = eps,

    lam(T) = -g / J',      d lam/ds = F_x^T lam,      dq/ds = F_theta^T lam      over s = T - t,
    dT/dx0 = lam(t0),      dT/dtheta = q(T - t0) - J_theta / J'.

Nothing of ode_stopping is used but the flow and the criterion that are handed over: not its loop,
its dense output, its search for the crossing, its quotient or its vector-Jacobian products.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor

__all__ = ["Witness", "odeint_adjoint"]

Function = Callable[[Tensor, Tensor], Tensor]
# The noise of fast modes at x_T is weighed by their curvature in grad J, so the forward solve is
# the tighter one. lam and q are solved with lam(T) scaled to length one.
FORWARD: dict[str, Any] = {"method": "dopri5", "rtol": 1e-11, "atol": 1e-14}
BACKWARD: dict[str, Any] = {"method": "dopri8", "rtol": 1e-9, "atol": 1e-12}
MAX_STEPS = 100_000


@dataclass(frozen=True)
class Witness:
    """What this adjoint gives.

    Attributes:
        time: T, in flow time.
        start: dT/dx0, shape (d,).
        parameters: dT/dtheta, one tensor a parameter.
        cost: Evaluations of the flow, forward and backward.
    """

    time: float
    start: Tensor
    parameters: tuple[Tensor, ...]
    cost: tuple[int, int]

    @property
    def gradient(self) -> Tensor:
        """dT/dtheta as one vector over all parameters."""
        return torch.cat([gradient.reshape(-1) for gradient in self.parameters])


def odeint_adjoint(
    flow: Function,
    x0: Tensor,
    criterion: Function,
    target: float,
    parameters: Sequence[Tensor],
    *,
    t0: float = 0.0,
) -> Witness:
    """T, and its derivatives to x0 and to parameters of flow and criterion.

    Args:
        flow: (t, x) -> dx/dt.
        x0: Start, shape (d,), in float64.
        criterion: (t, x) -> J, above the target at the start.
        target: Eps.
        parameters: Theta.
        t0: Start time.

    Raises:
        AssertionError: The target is not met in `MAX_STEPS` steps.
    """
    counted = _Recorder(flow)
    with torch.no_grad():
        times, states = _forward(counted, x0.detach(), criterion, target, t0)
    path, end, evaluations = _path(flow, times, states), times[-1], 0
    g, by_time, explicit = _products(criterion, end, states[-1], parameters)
    rate = (g * flow(_time(end), states[-1]).detach()).sum() + by_time  # J'
    lam = -g / rate
    size = lam.norm()

    def backward(s: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal evaluations
        evaluations += 1
        t = end - float(s)
        by_state, _, by_parameters = _products(flow, t, path(t), parameters, state[0])
        return (by_state, *by_parameters)

    zeros = [torch.zeros_like(p.detach()) for p in parameters]
    first, *sums = _solved(backward, (lam / size, *zeros), 0.0, end - t0, BACKWARD)
    found = [size * q - of_j / rate for q, of_j in zip(sums, explicit, strict=True)]
    return Witness(end, size * first, tuple(found), (counted.calls, evaluations))


class _Recorder:
    """A flow that counts its evaluations and keeps the accepted steps: times, states, lengths."""

    def __init__(self, flow: Function) -> None:
        self.flow = flow
        self.calls = 0
        self.steps: list[tuple[float, Tensor, float]] = []

    def __call__(self, t: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return self.flow(t, x)

    def callback_accept_step(self, t: Tensor, x: Tensor, length: Tensor) -> None:
        """Called by torchdiffeq with the start of a step."""
        self.steps.append((float(t), x, float(length)))


def _forward(
    flow: _Recorder, x0: Tensor, criterion: Function, target: float, t0: float
) -> tuple[list[float], list[Tensor]]:
    """Times and states from t0 to T.

    `odeint` stops after the step in which J falls to the target. T is the root of J(x(t)) - eps
    there, x(t) being solved from the start of that step every time.
    """
    from torchdiffeq import odeint

    odeint(
        flow,
        x0,
        torch.tensor([t0, t0 + 1.0], dtype=torch.float64),
        event_fn=lambda t, x: criterion(t, x) - target,
        options={"max_num_steps": MAX_STEPS},
        **FORWARD,
    )
    kept = list(flow.steps)
    begin, x_begin, length = kept[-1]

    def state(t: float) -> Tensor:
        return x_begin if t == begin else _solved(flow, (x_begin,), begin, t, FORWARD)[0]

    def excess(t: float) -> float:
        return float(criterion(_time(t), state(t))) - target

    end = float(brentq(excess, begin, begin + length, xtol=1e-15, rtol=1e-14))
    return [*(t for t, _, _ in kept), end], [*(x for _, x, _ in kept), state(end)]


def _path(flow: Function, times: list[float], states: list[Tensor]) -> Callable[[float], Tensor]:
    """x(t) between the nodes: x, x' = F and x'' = F_x F + F_t at both ends of a step of length h.

    They make a polynomial of degree 5, whose error is at most h^6 |x^(6)| / 46080.
    """
    rates = [_rates(flow, t, x) for t, x in zip(times, states, strict=True)]
    tables = []
    for i, (begin, end) in enumerate(pairwise(times)):
        (v0, a0), (v1, a1), h = rates[i], rates[i + 1], end - begin
        tables.append(
            torch.stack([states[i], h * v0, h * h * a0, states[i + 1], h * v1, h * h * a1])
        )

    def path(t: float) -> Tensor:
        i = min(max(bisect_right(times, t) - 1, 0), len(tables) - 1)
        s = (t - times[i]) / (times[i + 1] - times[i])
        r = 1.0 - s
        rising = s**3 * (10.0 - 15.0 * s + 6.0 * s * s)
        weights = [
            1.0 - rising,
            s * r**3 * (1.0 + 3.0 * s),
            0.5 * s * s * r**3,
            rising,
            -r * s**3 * (1.0 + 3.0 * r),
            0.5 * r * r * s**3,
        ]
        return torch.tensordot(torch.tensor(weights, dtype=torch.float64), tables[i], dims=1)

    return path


def _rates(flow: Function, t: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """F, and its derivative along the path: the product with (1, F), from the transposed one."""
    now, at = _time(t).requires_grad_(True), x.detach().requires_grad_(True)
    velocity = flow(now, at)
    rate = torch.zeros_like(velocity.detach())
    if velocity.requires_grad:
        weights = torch.zeros_like(velocity, requires_grad=True)
        pulled = torch.autograd.grad(
            velocity, [now, at], weights, create_graph=True, allow_unused=True
        )
        directions = [torch.ones_like(now), velocity.detach()]
        for gradient, direction in zip(pulled, directions, strict=True):
            if gradient is not None:
                rate = (
                    rate + torch.autograd.grad(gradient, weights, direction, retain_graph=True)[0]
                )
    return velocity.detach(), rate


def _products(
    function: Function,
    t: float,
    x: Tensor,
    parameters: Sequence[Tensor],
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Products of `weights` with the derivatives of F or J to x, t and the parameters."""
    inputs = [x.detach().requires_grad_(True), _time(t).requires_grad_(True), *parameters]
    with torch.enable_grad():
        value = function(inputs[1], inputs[0])
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if value.requires_grad:
        found = torch.autograd.grad(value, inputs, weights, allow_unused=True)
    by_state, by_time, *others = [
        torch.zeros_like(p.detach()) if gradient is None else gradient
        for gradient, p in zip(found, inputs, strict=True)
    ]
    return by_state, by_time, others


def _solved(
    function: Callable[..., Any],
    state: tuple[Tensor, ...],
    begin: float,
    end: float,
    settings: dict[str, Any],
) -> tuple[Tensor, ...]:
    """The state at the end; a step ends there, for `odeint` would go past it and interpolate."""
    from torchdiffeq import odeint

    times = torch.tensor([begin, end], dtype=torch.float64)
    options = {"step_t": times[1:], "max_num_steps": MAX_STEPS}
    single = len(state) == 1
    found = odeint(function, state[0] if single else state, times, options=options, **settings)
    return (found[-1],) if single else tuple(piece[-1] for piece in found)


def _time(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)
