"""Low precision: the decrease J_N - J_{N-1} cancels, the derivative must not feel it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from discrete import Euler, StoppingIndexResult, stopping_index
from ode_stopping import PreconditionedFlow, QuarticQuadratic
from ode_stopping.problems import random_rotation

DIM = 10


def run(
    dtype: torch.dtype, h: float, target: float, **keywords: object
) -> tuple[StoppingIndexResult, Tensor]:
    spectrum = torch.linspace(0.5, 4.0, DIM, dtype=dtype)
    problem = QuarticQuadratic(spectrum, rotation=random_rotation(DIM, seed=3, dtype=dtype))
    weights = torch.linspace(0.5, 1.5, DIM, dtype=dtype).requires_grad_(True)
    rule = Euler(PreconditionedFlow(problem, preconditioner=weights), step=h)
    x0 = torch.cos(torch.arange(DIM)).to(dtype)
    criterion = lambda t, x: problem(x)  # noqa: E731
    result = stopping_index(rule, x0, criterion, target, **keywords)  # type: ignore[arg-type]
    (found,) = torch.autograd.grad(result.steps, weights)
    return result, found.double()


def middle_of_a_step(h: float, steps: int) -> float:
    """A target half-way between two losses, so that both precisions have the same index."""
    spectrum = torch.linspace(0.5, 4.0, DIM, dtype=torch.float64)
    problem = QuarticQuadratic(spectrum, rotation=random_rotation(DIM, seed=3))
    weights = torch.linspace(0.5, 1.5, DIM, dtype=torch.float64)
    rule = Euler(PreconditionedFlow(problem, preconditioner=weights), step=h)
    x0 = torch.cos(torch.arange(DIM)).double()
    losses = stopping_index(
        rule, x0, lambda t, x: problem(x), 0.0, max_steps=steps, gradient=None
    ).trajectory.losses
    return 0.5 * float(losses[-1] + losses[-2])


def decreases(result: StoppingIndexResult) -> Tensor:
    """J_{k+1} - J_k over the last hundred steps."""
    return result.trajectory.losses[-101:].diff()


@pytest.mark.parametrize("interpolation", [None, "log", "hermite", "partial_step"])
@pytest.mark.parametrize(
    ("h", "steps"), [(1e-4, 600), pytest.param(1e-5, 2000, marks=pytest.mark.slow)]
)
def test_small_steps(h: float, steps: int, interpolation: str | None) -> None:
    """Trap 22: the plain difference is wrong by 1e-3, what is used by the rounding of float32."""
    target = middle_of_a_step(h, steps)
    exact, truth = run(torch.float64, h, target, interpolation=interpolation)
    result, found = run(torch.float32, h, target, interpolation=interpolation)
    assert result.index == exact.index == steps
    error = float((found - truth).norm() / truth.norm())
    # Of many last steps: a single difference may be right by chance.
    plain = float((decreases(result) / decreases(exact) - 1).square().mean().sqrt())
    assert error < 2e-5
    assert plain > 20 * error


@pytest.mark.parametrize("h", [0.05, 0.01])
def test_large_steps_use_the_difference(h: float) -> None:
    # There the trapezoidal form would be off by its own error, O(h^2), which is more than rounding.
    target = middle_of_a_step(h, 8)
    exact, truth = run(torch.float64, h, target)
    result, found = run(torch.float32, h, target)
    assert result.index == exact.index == 8
    assert float((found - truth).norm() / truth.norm()) < 2e-5


def test_losses_and_the_index_are_float64() -> None:
    result, _ = run(torch.float32, 0.01, middle_of_a_step(0.01, 8))
    assert result.trajectory.losses.dtype == torch.float64
    assert result.steps.dtype == torch.float64
    assert isinstance(result.state, Tensor)
    assert result.state.dtype == torch.float32


def test_a_clock_that_float32_would_round() -> None:
    # k h is formed in float64: forward and replay have the same times, or the replay would differ.
    h = torch.tensor(1e-3, requires_grad=True)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -x * (1 + torch.sin(300.0 * t))

    x0 = torch.tensor([1.0, 2.0], requires_grad=True)
    result = stopping_index(Euler(flow, step=h), x0, lambda t, x: x.square().sum(), 0.5, t0=1.0)
    result.steps.backward()
    assert h.grad is not None
    assert h.grad.dtype == torch.float32
    assert bool(h.grad.isfinite())
