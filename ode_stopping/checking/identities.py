"""Exact identities of the adjoint: no reference is needed to see that they fail.

- The derivative to the start time has two forms (x0 held fixed),
      dT/dt0 = -lam(t0)^T F(t0, x0) = g^T F(T, x_T)/J'(T) + int lam^T F_t dt,
  and each is a computation of its own.
- Where neither flow nor criterion depends on time explicitly, lam(t)^T x'(t) = -1 at every t.

Both see lam along F only: that they hold proves little about the parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.status import GradientError
from ..gradients import GradientRoute, InterpolatingAdjoint
from ..gradients.problem import StoppingProblem
from ..gradients.quotient import cotangent_at_crossing
from ..solving.interpolation import accurate_path
from .report import Finding

__all__ = ["identity_findings"]

_POINTS = 7
# By how much more the identity may be off where lam is read off dense output of low order.
_DENSE = 20.0
TWO_FORMS = "dT/dt0 two ways"
ALONG = "lam^T x' = -1"


def identity_findings(
    problem: StoppingProblem, route: GradientRoute, promise: float
) -> list[Finding]:
    """The identities that this route can be held against.

    Args:
        problem: The problem as the route solved it.
        route: The route.
        promise: Allowed relative error.
    """
    crossing = problem.crossing
    one = torch.ones((), dtype=problem.x0.dtype, device=problem.x0.device)
    lam, _ = cotangent_at_crossing(crossing, one, torch.zeros_like(problem.x0))
    try:
        findings = [_two_forms(problem, route, lam, promise)]
        if isinstance(route, InterpolatingAdjoint) and _is_autonomous(problem):
            findings.append(_along_the_path(problem, route, lam, promise))
    except GradientError as error:
        nan = float("nan")
        return [Finding(TWO_FORMS, "identity", nan, nan, nan, promise, None, note=str(error))]
    return findings


def _two_forms(
    problem: StoppingProblem, route: GradientRoute, lam: Tensor, promise: float
) -> Finding:
    pulled = route.pull_back(problem, lam)
    crossing = problem.crossing
    by_start = -float(pulled.start @ problem.flow.plain(problem.start, problem.x0))
    if pulled.time is None:
        nan, note = float("nan"), "this route has one form only"
        return Finding(TWO_FORMS, "identity", by_start, nan, nan, promise, None, note=note)
    at_end = float(crossing.gradient @ crossing.velocity) / crossing.rate
    by_path = at_end + pulled.time
    # On the scale of its terms, which may cancel.
    scale = max(abs(at_end) + abs(pulled.time), abs(by_start))
    difference = abs(by_start - by_path) / scale if scale > 0 else 0.0
    passed = difference <= promise
    return Finding(TWO_FORMS, "identity", by_start, by_path, difference, promise, passed)


def _along_the_path(
    problem: StoppingProblem, route: InterpolatingAdjoint, lam: Tensor, promise: float
) -> Finding:
    """The worst of several times."""
    times = torch.linspace(problem.start, problem.end, _POINTS + 1, dtype=torch.float64).tolist()
    samples = route.solve(problem, lam, times=times[1:]).samples
    assert samples is not None
    x = accurate_path(problem.trajectory, problem.flow, problem.segments)
    products = []
    for t, sample in zip(times[1:], samples, strict=True):
        velocity = problem.flow.plain(t, x(t))
        products.append(float(sample @ velocity))
    worst = max(products, key=lambda product: abs(product + 1))
    difference, method = abs(worst + 1), problem.method
    # Between its steps lam is as accurate as dense output: of low order on dopri8's long steps.
    allowed = promise * (_DENSE if method.order > method.dense_order + 1 else 1.0)
    passed = difference <= allowed
    return Finding(ALONG, "identity", worst, -1.0, difference, allowed, passed)


def _is_autonomous(problem: StoppingProblem) -> bool:
    """Whether the flow has no jump in t, and F_t and J_t vanish at several points of the path."""
    if len(problem.segments) > 1:
        return False
    for t in torch.linspace(problem.start, problem.end, _POINTS, dtype=torch.float64).tolist():
        x = problem.trajectory.flat(t)
        cotangent = torch.ones_like(x)
        product = problem.flow.vjp(t, x, cotangent, problem.leaves, look=False)
        _, _, by_time = problem.criterion.gradient(t, x)
        if float(product.time) != 0.0 or by_time != 0.0:
            return False
    return True
