"""Cost and error of the gradient routes, and of the plain road through torchdiffeq, in one run.

A rotated quadratic f = x^T Q x / 2 with x' = -p grad f (p a vector of d learnable rates, all 1), J
= |grad f|^2. With p = 1 the truth is closed: everything follows from the eigen-decomposition of Q.
Each row is one condition number and route; times are medians over repetitions in this process, and
only their ratios are meant to be quoted.

    python benchmarks/gradient_routes.py [--dim 50] [--target 1e-3] [--rtol 1e-7] [--repeats 3]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint, odeint_event

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    GradientError,
    GradientNorm,
    GradientRoute,
    InterpolatingAdjoint,
    PreconditionedFlow,
    Quadratic,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.problems import geometric_spectrum, random_rotation
from theory_checks.files import require_output, run_script, write_text

RESULTS = Path(__file__).parent / "results" / "gradient_routes.md"
ROUTES: list[GradientRoute] = [InterpolatingAdjoint(), BacksolveAdjoint(), DirectAdjoint()]
COLUMNS = (
    "condition",
    "route",
    "error of T",
    "error of dT/dp",
    "forward evaluations",
    "vjps",
    "vjps/evaluations",
    "accepted steps",
    "forward (s)",
    "backward (s)",
)


class Case:
    """One rotated quadratic with its closed-form stopping time and gradient."""

    def __init__(self, dim: int, condition: float, target: float) -> None:
        generator = torch.Generator().manual_seed(1)
        self.target = target
        self.spectrum = geometric_spectrum(dim, condition)
        self.rotation = random_rotation(dim, seed=0)
        self.objective = Quadratic(self.spectrum, rotation=self.rotation)
        self.x0 = torch.randn(dim, generator=generator, dtype=torch.float64)
        self.rates = torch.ones(dim, dtype=torch.float64, requires_grad=True)
        self.flow = PreconditionedFlow(self.objective, preconditioner=self.rates)
        self.criterion = GradientNorm(self.objective)
        self.time, self.gradient = self._truth()

    def _truth(self) -> tuple[float, Tensor]:
        """T by bisection on the eigen-expansion, and dT/dp_j = -int lam_j (Q x)_j dt."""
        curvature, r = self.spectrum, self.rotation
        z = r.T @ self.x0

        def criterion(t: float) -> float:
            return float((curvature * z * torch.exp(-curvature * t)).square().sum())

        low, high = 0.0, 1.0
        while criterion(high) > self.target:
            high *= 2
        for _ in range(200):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if criterion(middle) > self.target else (low, middle)
        end = 0.5 * (low + high)
        decayed = z * torch.exp(-curvature * end)
        rate = -2 * float((curvature.pow(3) * decayed.square()).sum())
        lam = -2 * curvature.square() * decayed / rate  # in the eigenbasis, at T
        # int_0^T exp(-l_a (T - t)) exp(-l_b t) dt for every pair (a, b): symmetric, and written
        # without overflow.
        gap = (curvature[:, None] - curvature[None, :]).abs()
        same = gap * end < 1e-9
        ratio = torch.where(
            same, torch.full_like(gap, end), -torch.expm1(-gap * end) / gap.clamp_min(1e-300)
        )
        kernel = torch.exp(-torch.minimum(curvature[:, None], curvature[None, :]) * end) * ratio
        weights = lam[:, None] * (curvature * z)[None, :] * kernel
        return end, -torch.einsum("ja,ab,jb->j", r, weights, r)


def row_of(
    case: Case, name: str, run: Callable[[], tuple[float, Tensor, list[float]]], repeats: int
) -> list[object]:
    """Errors and counts of the last repetition, medians of the times."""
    forward, backward = [], []
    try:
        for _ in range(repeats):
            start = time.perf_counter()
            value, gradient, numbers = run()
            total = time.perf_counter() - start
            forward.append(numbers[-1])
            backward.append(total - numbers[-1])
    except (GradientError, AssertionError, RuntimeError) as error:
        return [name, f"raised {type(error).__name__}", *["-"] * 7]
    of_time = abs(value / case.time - 1)
    of_gradient = float((gradient - case.gradient).norm() / case.gradient.norm())
    evaluations, vjps, accepted = numbers[:3]
    return [
        name,
        f"{of_time:.1e}",
        f"{of_gradient:.1e}",
        int(evaluations),
        int(vjps),
        f"{vjps / evaluations:.2f}",
        int(accepted) if accepted == accepted else "-",
        f"{statistics.median(forward):.3f}",
        f"{statistics.median(backward):.3f}",
    ]


def ours(case: Case, route: GradientRoute, rtol: float) -> tuple[float, Tensor, list[float]]:
    """T, its gradient and the counts, by one of the library's routes."""
    start = time.perf_counter()
    result = stopping_time(
        case.flow,
        case.x0,
        case.criterion,
        case.target,
        gradient=route,
        solver=Torchdiffeq(rtol=rtol),
        evidence="light",
    )
    elapsed = time.perf_counter() - start
    (gradient,) = torch.autograd.grad(result.time, case.rates)
    stats = result.stats
    return (
        float(result.time.detach()),
        gradient,
        [stats.nfe_forward, stats.vjps or 0, stats.accepted, elapsed],
    )


class Counted(nn.Module):
    """A flow that counts its evaluations, for the plain road."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow
        self.calls = 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx/dt, counted."""
        self.calls += 1
        return self.flow(t, x)


def plain(case: Case, rtol: float) -> tuple[float, Tensor, list[float]]:
    """odeint_event with odeint_adjoint as documented; the backward steps are limited."""
    flow = Counted(
        PreconditionedFlow(case.objective, preconditioner=nn.Parameter(case.rates.detach().clone()))
    )
    (rates,) = flow.parameters()
    start = time.perf_counter()
    event, _ = odeint_event(
        flow,
        case.x0,
        torch.tensor(0.0, dtype=torch.float64),
        event_fn=lambda t, x: case.criterion(t, x) - case.target,
        odeint_interface=odeint_adjoint,
        rtol=rtol,
        atol=rtol * 1e-4,
        adjoint_options={"max_num_steps": 20_000},
    )
    elapsed = time.perf_counter() - start
    calls = flow.calls
    (gradient,) = torch.autograd.grad(event, rates)
    return float(event.detach()), gradient, [calls, flow.calls - calls, float("nan"), elapsed]


def main() -> None:
    """Measure every case, print the rows and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=50)
    parser.add_argument("--target", type=float, default=1e-3)
    parser.add_argument("--rtol", type=float, default=1e-7)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--conditions", type=float, nargs="+", default=[10.0, 100.0, 1000.0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    require_output(options.out)
    torch.set_num_threads(1)
    rows: list[list[object]] = []
    for condition in options.conditions:
        case = Case(options.dim, condition, options.target)
        for route in ROUTES:
            name = type(route).__name__
            rows.append(
                [
                    f"{condition:g}",
                    *row_of(
                        case,
                        name,
                        lambda r=route, c=case: ours(c, r, options.rtol),
                        options.repeats,
                    ),
                ]
            )
        rows.append(
            [
                f"{condition:g}",
                *row_of(
                    case, "odeint_event + odeint_adjoint", lambda c=case: plain(c, options.rtol), 1
                ),
            ]
        )
        for row in rows[-len(ROUTES) - 1 :]:
            print(*row, sep=" | ", flush=True)
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join("---" for _ in COLUMNS) + " |"]
    lines += ["| " + " | ".join(str(entry) for entry in row) + " |" for row in rows]
    command = (
        f"python benchmarks/gradient_routes.py --dim {options.dim} --target {options.target:g} "
        f"--rtol {options.rtol:g}"
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchdiffeq"))
    heading = (
        "# Gradient routes on a rotated quadratic\n\n"
        f"`{command}`, one thread, {platform.machine()}, Python {platform.python_version()}, "
        f"{versions}. Errors are relative, against the eigen-expansion; times are medians of "
        f"{options.repeats} runs.\n\n"
    )
    write_text(options.out, heading + "\n".join(lines) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_script(main)
