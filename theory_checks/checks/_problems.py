"""The standard problems of the checks, built from plain data so that a cell can be cached.

Paper: "Accelerating Optimization via Differentiable Stopping Time" (arXiv 2505.22509). Where it is
silent the choice is ours: starts of length one (so that the stopping time hardly depends on d),
spectra spaced evenly on a logarithmic axis, and the seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ode_stopping import (
    CoordinatewisePreconditioner,
    Criterion,
    DiagonalPreconditioner,
    Flow,
    GradientNorm,
    LogisticRegression,
    LossValue,
    PolynomialSchedule,
    PreconditionedFlow,
    Quadratic,
    QuarticQuadratic,
    SmoothSVM,
)
from ode_stopping.problems.datasets import breast_cancer, digits
from ode_stopping.problems.rotations import HouseholderRotation, geometric_spectrum, random_rotation

from ..context import Context

# A dense basis of d = 1e4 would take 800 MB.
_LARGEST_DENSE = 2000


@dataclass(frozen=True)
class Setup:
    """A problem as plain data; `build` makes it.

    Attributes:
        kind: "quadratic", "quartic", "logistic" or "svm".
        target: eps.
        dim: Unknowns, for the synthetic kinds.
        condition: Condition number of the spectrum, for the synthetic kinds.
        seed: Of basis, start and preconditioner.
        dtype: Of all tensors.
        device: Where they live.
    """

    kind: str
    target: float
    dim: int = 0
    condition: float = 1.0
    seed: int = 0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    @classmethod
    def of(cls, context: Context, kind: str, target: float, **others: float) -> Setup:
        """A setup with the seed, dtype and device of the run."""
        where = {"seed": context.seed, "dtype": context.dtype, "device": str(context.device)}
        return cls(kind, target, **{**where, **others})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Instance:
    """A problem ready to be solved.

    Attributes:
        flow: F.
        x0: The start, shape (d,).
        criterion: J.
        target: eps.
        stiffness: A bound L p on the norm of the velocity's Jacobian near the path, per unit of
            flow time: Euler is stable for h L p < 2 and free of oscillation for h L p < 1.
        description: One line for tables and captions.
        parameters: theta.
    """

    flow: Flow
    x0: Tensor
    criterion: Criterion
    target: float
    stiffness: float
    description: str
    parameters: list[nn.Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        found = [p for p in self.flow.parameters() if p.requires_grad]
        object.__setattr__(self, "parameters", found)


class ScheduledDiagonal(nn.Module):
    """p_i(t) = exp(values_i) alpha(t): a diagonal preconditioner and a learning-rate schedule.

    Args:
        values: Logarithms, shape (d,).
        schedule: t -> alpha.
    """

    def __init__(self, values: Tensor, schedule: nn.Module) -> None:
        super().__init__()
        self.diagonal = DiagonalPreconditioner(nn.Parameter(values), log=True)
        self.schedule = schedule

    def forward(self, x: Tensor, grad: Tensor, t: Tensor) -> Tensor:
        """p, shape (d,)."""
        alpha: Tensor = self.schedule(t)
        return self.diagonal(x, grad, t) * alpha.to(x.dtype)


def build(setup: Setup) -> Instance:
    """The problem of a setup.

    Raises:
        KeyError: An unknown kind.
    """
    return _BUILDERS[setup.kind](setup)


def quadratic(setup: Setup) -> Quadratic:
    """x^T Q x / 2 with a rotated basis: dense up to d = 2000, four reflections beyond."""
    spectrum = geometric_spectrum(setup.dim, setup.condition, dtype=setup.dtype)
    return Quadratic(spectrum, rotation=_rotation(setup)).to(setup.device)


def unit_start(setup: Setup) -> Tensor:
    """A random direction, shape (d,), of length one."""
    return _on_device(_normal(setup, setup.dim, stream=1, normalise=True), setup)


def preconditioned_quadratic(setup: Setup) -> Instance:
    """Figure 2's problem: a rotated quadratic, J = |grad f|^2, ten parameters a coordinate."""
    objective = quadratic(setup)
    own = CoordinatewisePreconditioner(setup.dim, seed=setup.seed + 2, dtype=setup.dtype)
    own = own.to(setup.device)
    x0 = unit_start(setup)
    with torch.no_grad():
        largest = float(own(x0, objective.gradient(x0), torch.zeros_like(x0[0])).max())
    return Instance(
        PreconditionedFlow(objective, preconditioner=own),
        x0,
        GradientNorm(objective),
        setup.target,
        setup.condition * largest,
        f"rotated quadratic, d = {setup.dim}, condition {setup.condition:g}",
    )


def _quartic(setup: Setup) -> Instance:
    spectrum = geometric_spectrum(setup.dim, setup.condition, dtype=setup.dtype)
    objective = QuarticQuadratic(spectrum, rotation=_rotation(setup), quartic=1.0).to(setup.device)
    x0 = _on_device(_normal(setup, setup.dim, stream=1), setup)
    values = _on_device(0.1 * _normal(setup, setup.dim, stream=2), setup)
    # hess f = Q + 3 diag(x^2), largest where the path starts.
    curvature = setup.condition + 3.0 * float(x0.abs().max()) ** 2
    return Instance(
        PreconditionedFlow(
            objective, preconditioner=DiagonalPreconditioner(nn.Parameter(values), log=True)
        ),
        x0,
        GradientNorm(objective),
        setup.target,
        curvature * float(values.exp().max()),
        f"quartic, d = {setup.dim}, condition {setup.condition:g} of the quadratic part",
    )


def _logistic(setup: Setup) -> Instance:
    features, labels = breast_cancer(dtype=setup.dtype)
    objective = LogisticRegression(features, labels, regularization=1e-2, intercept=True)
    objective = objective.to(setup.device)
    x0 = torch.zeros(objective.dim, dtype=setup.dtype, device=setup.device)
    values = _on_device(0.1 * _normal(setup, objective.dim, stream=2), setup)
    # alpha falls from 1, so that its start is its largest value.
    own = ScheduledDiagonal(values, PolynomialSchedule(1.0, 0.25)).to(setup.device)
    return Instance(
        PreconditionedFlow(objective, preconditioner=own),
        x0,
        GradientNorm(objective),
        setup.target,
        objective.lipschitz() * float(values.exp().max()),
        f"logistic regression, breast cancer (569 x {objective.dim}, intercept included)",
    )


def _svm(setup: Setup) -> Instance:
    features, labels = digits(classes=(0, 1), dtype=setup.dtype)
    objective = SmoothSVM(features, labels).to(setup.device)
    x0 = torch.zeros(objective.dim, dtype=setup.dtype, device=setup.device)
    values = _on_device(0.1 * _normal(setup, objective.dim, stream=2), setup)
    return Instance(
        PreconditionedFlow(
            objective, preconditioner=DiagonalPreconditioner(nn.Parameter(values), log=True)
        ),
        x0,
        # |grad f|^2 has kinks where a margin passes 1 (f is C1, not C2); f itself is C1.
        LossValue(objective),
        setup.target,
        objective.lipschitz() * float(values.exp().max()),
        f"smooth SVM, digits 0 and 1 (360 x {objective.dim}, intercept included)",
    )


_BUILDERS = {
    "quadratic": preconditioned_quadratic,
    "quartic": _quartic,
    "logistic": _logistic,
    "svm": _svm,
}


def _rotation(setup: Setup) -> Tensor | HouseholderRotation:
    if setup.dim <= _LARGEST_DENSE:
        return random_rotation(setup.dim, seed=setup.seed, dtype=setup.dtype)
    return HouseholderRotation.random(setup.dim, seed=setup.seed, dtype=setup.dtype)


def _normal(setup: Setup, size: int, *, stream: int, normalise: bool = False) -> Tensor:
    """Standard normal numbers, drawn in float64 on the CPU: one seed, one problem everywhere."""
    generator = torch.Generator().manual_seed(1000 * setup.seed + stream)
    values = torch.randn(size, generator=generator, dtype=torch.float64)
    return values / values.norm() if normalise else values


def _on_device(values: Tensor, setup: Setup) -> Tensor:
    return values.to(dtype=setup.dtype, device=setup.device)
