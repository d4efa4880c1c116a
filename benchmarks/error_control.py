"""What the control of the velocity buys on stiff flows, what it costs, and what the evidence costs.

Rotated, preconditioned quadratics x' = -p Q x with the default settings (the bar: the gradient
within 1e-3, or warned about): the error of the gradient against the eigen-expansion, with and
without the control (the velocity's error measure, and the finer last steps). Then other criteria
on one stiff problem, against a run at a far tighter tolerance; and the time of a backward pass
with and without the figures that it leaves on `result.evidence`.

    python benchmarks/error_control.py [--largest 1e4]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ode_stopping import (
    GradientAccuracyWarning,
    GradientNorm,
    InterpolatingAdjoint,
    LossValue,
    PreconditionedFlow,
    Quadratic,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.core.stats import Stats
from ode_stopping.problems import geometric_spectrum, random_rotation
from theory_checks.checks._rotated import eigen_gradient
from theory_checks.files import require_output, run_script, write_text

RESULTS = Path(__file__).parent / "results" / "error_control.md"
TARGETS = (1e-3, 1e-5, 1e-8)
REPEATS = 5


@dataclass(frozen=True)
class Found:
    """A gradient, its true error, and what it took."""

    error: float
    result: StoppingResult
    warned: bool
    forward: float
    backward: float


class Rotated:
    """x' = -p grad f, f = x^T Q x / 2 with curvatures from 10/condition to 10."""

    def __init__(self, dim: int, condition: float) -> None:
        self.objective = Quadratic(
            10 / condition * geometric_spectrum(dim, condition),
            rotation=random_rotation(dim, seed=5),
        )
        generator = torch.Generator().manual_seed(6)
        normal = torch.randn(2, dim, generator=generator, dtype=torch.float64)
        self.p = torch.exp(0.2 * normal[0]).requires_grad_(True)
        self.x0 = normal[1].clone().requires_grad_(True)

    def truth(self, target: float) -> list[np.ndarray]:
        """dT/dp and dT/dx0 for J = |grad f|^2."""
        matrix = self.objective.dense().numpy()
        _, by_p, by_x0 = eigen_gradient(
            matrix, self.p.detach().numpy(), self.x0.detach().numpy(), target
        )
        return [by_p, by_x0]

    def solve(
        self,
        target: float,
        truth: list[np.ndarray],
        *,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        rtol: float | None = None,
    ) -> Found:
        """One gradient."""
        begin = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = stopping_time(
                PreconditionedFlow(self.objective, preconditioner=self.p),
                self.x0,
                criterion if criterion is not None else GradientNorm(self.objective),
                target,
                gradient=InterpolatingAdjoint(),
                solver=Torchdiffeq(rtol=rtol),
                evidence="light",
            )
            middle = time.perf_counter()
            gradients = torch.autograd.grad(result.time, [self.p, self.x0])
        end = time.perf_counter()
        errors = [
            float(np.linalg.norm(g.numpy() - t) / np.linalg.norm(t))
            for g, t in zip(gradients, truth, strict=True)
        ]
        warned = any(issubclass(w.category, GradientAccuracyWarning) for w in caught)
        return Found(max(errors), result, warned, middle - begin, end - middle)


@contextmanager
def without_control() -> Iterator[None]:
    """The state's error measure alone, and no finer last steps."""
    with (
        mock.patch("ode_stopping.solving.errors.VelocityError._ratio", return_value=0.0),
        mock.patch("ode_stopping.crossing.run._POLISH_AFTER", 10**9),
    ):
        yield


@contextmanager
def without_evidence() -> Iterator[None]:
    """Backward passes that leave no figures."""
    with (
        mock.patch("ode_stopping.gradients.attach.judge", return_value=([], Stats())),
        mock.patch("ode_stopping.gradients.backward_solve.Residuals.step"),
    ):
        yield


def stiff_table(largest: float) -> list[str]:
    """The bar, problem by problem."""
    lines = [
        "| condition | d | eps | error | estimate | warned | error without control | evaluations | "
        "without control | of them for the control |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for condition in (1e2, 1e3, 1e4):
        if condition > largest:
            continue
        for dim in (50, 200):
            problem = Rotated(dim, condition)
            for target in TARGETS:
                truth = problem.truth(target)
                found = problem.solve(target, truth)
                with without_control():
                    plain = problem.solve(target, truth)
                evidence, stats = found.result.evidence, found.result.stats
                assert evidence is not None
                lines.append(
                    f"| {condition:g} | {dim} | {target:g} | {found.error:.1e} | "
                    f"{evidence.estimate:.1e} | {'yes' if found.warned else 'no'} | "
                    f"{plain.error:.1e} | {stats.nfe_forward} | "
                    f"{plain.result.stats.nfe_forward} | {stats.control} |"
                )
                print(lines[-1], flush=True)
    return lines


def criteria_table() -> list[str]:
    """Other criteria than |grad f|^2, at a loose tolerance."""
    problem = Rotated(50, 1e3)
    objective = problem.objective
    criteria: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
        "squared norm of the gradient": (GradientNorm(objective), 1e-4),
        "norm of the gradient": (GradientNorm(objective, squared=False), 1e-2),
        "largest entry of the gradient": (
            GradientNorm(objective, squared=False, ord=float("inf")),
            3e-3,
        ),
        "loss": (LossValue(objective), 1e-3),
        "distance": (lambda t, x: x.square().sum(), 1.0),
    }
    lines = [
        "| criterion | error at rtol 1e-4 | error without control |",
        "| --- | --- | --- |",
    ]
    for name, (criterion, target) in criteria.items():
        truth = _gradients(problem, criterion, target)
        found = problem.solve(target, truth, criterion=criterion, rtol=1e-4)
        with without_control():
            plain = problem.solve(target, truth, criterion=criterion, rtol=1e-4)
        lines.append(f"| {name} | {found.error:.1e} | {plain.error:.1e} |")
        print(lines[-1], flush=True)
    return lines


def _gradients(
    problem: Rotated, criterion: Callable[[Tensor, Tensor], Tensor], target: float
) -> list[np.ndarray]:
    """dT/dp and dT/dx0 at a far tighter tolerance."""
    result = stopping_time(
        PreconditionedFlow(problem.objective, preconditioner=problem.p),
        problem.x0,
        criterion,
        target,
        solver=Torchdiffeq(rtol=1e-10),
        evidence="light",
    )
    return [g.numpy() for g in torch.autograd.grad(result.time, [problem.p, problem.x0])]


def evidence_table() -> list[str]:
    """Time of a backward pass with its evidence over that without, in pairs."""
    lines = ["| d | condition | backward with / without evidence |", "| --- | --- | --- |"]
    for dim, condition in ((2, 10.0), (50, 100.0), (1000, 100.0)):
        problem = Rotated(dim, condition)
        truth = problem.truth(1e-4)
        ratios = []
        for _ in range(REPEATS):
            with without_evidence():
                bare = problem.solve(1e-4, truth)
            ratios.append(problem.solve(1e-4, truth).backward / bare.backward)
        lines.append(
            f"| {dim} | {condition:g} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Run all three and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=float, default=1e4, help="largest condition number")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    require_output(options.out)
    torch.set_num_threads(1)
    lines = [
        "# Error control",
        "",
        f"`python benchmarks/error_control.py --largest {options.largest:g}` on "
        f"{platform.processor() or platform.machine()}, one thread, Python "
        f"{platform.python_version()}, torch {version('torch')}, torchdiffeq "
        f"{version('torchdiffeq')}.",
        "",
        "Default settings, J = |grad f|^2. The error is the larger one of dT/dp and dT/dx0.",
        "",
        *stiff_table(options.largest),
        "",
        "Condition 1e3, d = 50, against the same at rtol 1e-10:",
        "",
        *criteria_table(),
        "",
        f"Medians (least to largest) of {REPEATS} pairs:",
        "",
        *evidence_table(),
        "",
    ]
    write_text(options.out, "\n".join(lines))


if __name__ == "__main__":
    run_script(main)
