"""Rotated quadratics and quartics for the comparison of gradient routes, with their true gradients.

x' = -p grad f(x), J = |grad f|^2, differentiated to p and to x0. The truth of a quadratic is its
eigen-decomposition; the witness is a continuous adjoint by torchdiffeq's `odeint` that uses none of
this library's solves; the plain road is what torchdiffeq gives by itself.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor, nn

from ode_stopping import (
    BacksolveAdjoint,
    BacksolveMismatchError,
    DirectAdjoint,
    ForwardSensitivity,
    GradientNorm,
    GradientRoute,
    InterpolatingAdjoint,
    PreconditionedFlow,
    Quadratic,
    QuarticQuadratic,
    StepAdjoint,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.problems.rotations import geometric_spectrum, random_rotation

from ._odeint_adjoint import odeint_adjoint

ROUTES: dict[str, type[GradientRoute]] = {
    "StepAdjoint": StepAdjoint,
    "InterpolatingAdjoint": InterpolatingAdjoint,
    "DirectAdjoint": DirectAdjoint,
    "ForwardSensitivity": ForwardSensitivity,
    "BacksolveAdjoint": BacksolveAdjoint,
}
WITNESS = "odeint witness"
# The published failure was measured at this tolerance.
PLAIN_RTOL = 1e-6
PLAIN_ATOL = 1e-9
PLAIN_MAX_STEPS = 3000


@dataclass(frozen=True)
class Cell:
    """One problem and one road to its gradient.

    Attributes:
        kind: "quadratic" or "quartic".
        dim: Unknowns.
        condition: Condition number of the quadratic part.
        target: Eps, for J = |grad f|^2.
        seed: Of basis, start and preconditioner.
        road: The name of a route, `WITNESS`, "plain" (torchdiffeq's own), or "truth".
        rtol: Of the solve (the witness has tolerances of its own).
    """

    kind: str
    dim: int
    condition: float
    target: float
    seed: int
    road: str
    rtol: float

    @property
    def problem(self) -> str:
        """The problem, for tables."""
        return f"{self.kind}, d = {self.dim}, condition {self.condition:g}"


@dataclass(frozen=True)
class Answer:
    """T and the gradient (dT/dp, dT/dx0), or what was raised instead.

    Attributes:
        time: T.
        gradient: (2 d,), or empty.
        raised: The name and message of the exception, or "".
        cost: Evaluations of the flow, forward and backward.
        fallback: Why a route gave another one's numbers, or "".
    """

    time: float
    gradient: NDArray[np.float64]
    raised: str = ""
    cost: tuple[int, int] = (0, 0)
    fallback: str = ""

    def error(self, truth: Answer) -> float:
        """Relative error of the gradient, in norm; NaN where there is none."""
        if not self.gradient.size:
            return math.nan
        gap = np.linalg.norm(self.gradient - truth.gradient)
        return float(gap / np.linalg.norm(truth.gradient))


def solve(cell: Cell) -> Answer:
    """The answer of one road."""
    if cell.road == "plain":
        return plain_road(cell)
    if cell.road == WITNESS:
        return by_witness(cell)
    if cell.road == "truth":
        if cell.kind == "quadratic":
            return eigen_truth(cell)
        return by_route(cell, DirectAdjoint(), method="dopri8")
    return by_route(cell, ROUTES[cell.road]())


def make(cell: Cell) -> tuple[Quadratic, Tensor, Tensor]:
    """The objective, p and x0 (both require grad), in float64."""
    spectrum = geometric_spectrum(cell.dim, cell.condition)
    rotation = random_rotation(cell.dim, seed=cell.seed)
    generator = torch.Generator().manual_seed(cell.seed + 1)
    normal = torch.randn(2, cell.dim, generator=generator, dtype=torch.float64)
    x0 = (normal[0] / normal[0].norm()).requires_grad_(True)
    p = torch.exp(0.1 * normal[1]).requires_grad_(True)
    if cell.kind == "quartic":
        return QuarticQuadratic(spectrum, rotation=rotation, quartic=float(cell.dim)), p, x0
    return Quadratic(spectrum, rotation=rotation), p, x0


def by_route(cell: Cell, route: GradientRoute, method: str = "dopri5") -> Answer:
    """The library's answer; a mismatch that `BacksolveAdjoint` found is reported, not raised."""
    objective, p, x0 = make(cell)
    result = stopping_time(
        PreconditionedFlow(objective, preconditioner=p),
        x0,
        GradientNorm(objective),
        cell.target,
        max_time=1e3,
        solver=Torchdiffeq(method=method, rtol=cell.rtol),
        gradient=route,
        evidence="light",
    )
    time = float(result.time.detach())
    try:
        by_p, by_x0 = torch.autograd.grad(result.time, [p, x0])
    except BacksolveMismatchError as error:
        return Answer(time, np.empty(0), f"{type(error).__name__}: {error}")
    cost = (result.stats.nfe_forward, result.stats.nfe_backward or 0)
    gradient = torch.cat([by_p, by_x0]).numpy()
    return Answer(time, gradient, cost=cost, fallback=result.stats.fallback or "")


def by_witness(cell: Cell) -> Answer:
    """The answer of `odeint_adjoint`."""
    objective, p, x0 = make(cell)
    flow = PreconditionedFlow(objective, preconditioner=p)
    found = odeint_adjoint(flow, x0, GradientNorm(objective), cell.target, [p])
    return Answer(found.time, torch.cat([found.gradient, found.start]).numpy(), cost=found.cost)


def eigen_truth(cell: Cell) -> Answer:
    """T, dT/dp and dT/dx0 of a cell by `eigen_gradient`."""
    objective, p, x0 = make(cell)
    time, by_p, by_x0 = eigen_gradient(
        objective.dense().numpy(), p.detach().numpy(), x0.detach().numpy(), cell.target
    )
    return Answer(time, np.concatenate([by_p, by_x0]))


def eigen_gradient(
    matrix: NDArray[np.float64], p: NDArray[np.float64], x0: NDArray[np.float64], target: float
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """T, dT/dp and dT/dx0 of x' = -P Q x, J = |Q x|^2, from one symmetric eigenproblem.

    P Q = S L S^{-1} with S = P^{1/2} V, where P^{1/2} Q P^{1/2} = V L V^T. Then
    x(t) = S exp(-L t) S^{-1} x0, and lam(t) = -S^{-T} exp(-L (T - t)) S^T g / J'. The integral
    dT/dp_i = -int lam_i (Q x)_i dt has the kernel int exp(-a (T - t)) exp(-b t) dt, the divided
    difference of the exponential, which is summed without cancellation.
    """
    root = np.sqrt(p)
    rates, vectors = np.linalg.eigh(root[:, None] * matrix * root)
    basis, inverse = root[:, None] * vectors, vectors.T / root
    start = inverse @ x0

    def gradient(t: float) -> NDArray[np.float64]:
        return np.asarray(matrix @ (basis @ (np.exp(-rates * t) * start)))

    def log_excess(t: float) -> float:
        value = gradient(t)
        # Far beyond T everything underflows.
        return math.log(max(float(value @ value), 1e-300) / target)

    last = 1.0
    while log_excess(last) > 0:
        last *= 2.0
    end = float(brentq(log_excess, 0.0, last, xtol=1e-14, rtol=1e-14))
    at_end = gradient(end)
    cotangent = 2.0 * matrix @ at_end  # g = grad J = 2 Q grad f
    rate = -float(cotangent @ (p * at_end))
    weights = basis.T @ cotangent
    by_x0 = -inverse.T @ (np.exp(-rates * end) * weights) / rate
    least = np.minimum.outer(rates, rates)
    gap = np.abs(np.subtract.outer(rates, rates))
    with np.errstate(invalid="ignore", divide="ignore"):
        quotient = np.where(gap > 0, -np.expm1(-gap * end) / gap, end)
    kernel = np.exp(-least * end) * quotient
    inner = (inverse.T * weights) @ kernel  # (coordinate, mode of x)
    by_p = np.sum(inner * (matrix @ basis * start), axis=1) / rate
    return end, by_p, by_x0


class _PlainFlow(nn.Module):
    """-p grad f(x), written out: torchdiffeq's adjoint wants the parameters registered."""

    def __init__(self, objective: Quadratic, p: Tensor) -> None:
        super().__init__()
        self.objective = objective
        self.p = nn.Parameter(p.detach().clone())

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -self.p * self.objective.gradient(x)


def plain_road(cell: Cell) -> Answer:
    """What `torchdiffeq.odeint_event` with `odeint_adjoint` answers, whatever that is.

    The number of steps is limited in both directions: the backward solve of x may blow up. Any
    exception is the answer.
    """
    from torchdiffeq import odeint_adjoint, odeint_event

    objective, p, x0 = make(cell)
    flow = _PlainFlow(objective, p)
    limits = {"max_num_steps": PLAIN_MAX_STEPS}
    time = math.nan
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            event_time, _ = odeint_event(
                flow,
                x0,
                torch.zeros((), dtype=torch.float64),
                event_fn=lambda t, x: objective.gradient(x).square().sum() - cell.target,
                odeint_interface=odeint_adjoint,
                method="dopri5",
                rtol=PLAIN_RTOL,
                atol=PLAIN_ATOL,
                options=dict(limits),
                adjoint_options=dict(limits),
            )
            time = float(event_time.detach())
            by_p, by_x0 = torch.autograd.grad(event_time, [flow.p, x0])
    except Exception as error:  # whatever it is, it is what this row is there to show
        return Answer(time, np.empty(0), f"{type(error).__name__}: {str(error)[:80]}")
    return Answer(time, torch.cat([by_p, by_x0]).numpy())
