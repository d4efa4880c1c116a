"""What an index and its gradient cost beside loops that are written by hand: time, and memory.

Short runs. Problem: x' = -p * grad f(x), f a rotated quadratic with condition 100, p a learnable
vector of d entries, Euler; J = f. The loop by hand keeps one graph of all steps, looks at J after
each, and differentiates J(x_N) through the implicit quotient (Definition 3). Both call the same
flow and criterion.

The long run. d = 10,000, N = 100,000, a diagonal quadratic with p learnable, default options. The
loop by hand has no gradient at all: it takes the steps and looks at J. Memory is the peak of the
resident set beyond what was resident before the call, in a process of its own.

    python benchmarks/stopping_index.py [--repetitions 9] [--sizes 10 100 1000] [--steps 100000]

Times are CPU seconds of the process with one thread. What is compared runs in turn, and each ratio
is the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from discrete import Euler, stopping_index
from ode_stopping import LossValue, PreconditionedFlow, Quadratic
from ode_stopping.problems import random_rotation
from theory_checks.files import require_output, run_script, write_text

STEP = 0.5  # 1 / L is 1
BARS = {10: (1.6, 1.2), 100: (1.6, 1.2), 1000: (1.3, 1.2)}
LONG = 10_000
RESULTS = Path(__file__).resolve().parent / "results" / "stopping_index.md"


@dataclass(frozen=True)
class Case:
    """A preconditioned gradient flow, its loss and a target that step N meets."""

    flow: PreconditionedFlow
    weights: Tensor
    criterion: LossValue
    x0: Tensor
    target: float
    step: float = STEP

    @classmethod
    def rotated(cls, dim: int, eps: float = 1e-5) -> Case:
        """A rotated quadratic with condition 100."""
        spectrum = torch.logspace(-2, 0, dim, dtype=torch.float64)
        problem = Quadratic(spectrum, rotation=random_rotation(dim, seed=0))
        weights = torch.ones(dim, dtype=torch.float64, requires_grad=True)
        generator = torch.Generator().manual_seed(1)
        x0 = torch.randn(dim, generator=generator, dtype=torch.float64)
        flow = PreconditionedFlow(problem, preconditioner=weights)
        return cls(flow, weights, LossValue(problem), x0, eps)

    @classmethod
    def diagonal(cls, dim: int, steps: int) -> Case:
        """A diagonal quadratic whose index is `steps`."""
        problem = Quadratic(torch.logspace(-2, 0, dim, dtype=torch.float64))
        weights = torch.ones(dim, dtype=torch.float64, requires_grad=True)
        x0 = torch.ones(dim, dtype=torch.float64)
        case = cls(
            PreconditionedFlow(problem, preconditioner=weights),
            weights,
            LossValue(problem),
            x0,
            0.0,
            step=1e-3,
        )
        # The iterates are (1 - h a)^k.
        rate = 1 - case.step * problem.gradient(x0)
        losses = [float(problem(rate**k)) for k in (steps - 1, steps)]
        return cls(case.flow, weights, case.criterion, x0, sum(losses) / 2, case.step)

    def library(self) -> tuple[int, Tensor]:
        """N and dN/dp by `stopping_index`."""
        rule = Euler(self.flow, step=self.step)
        result = stopping_index(rule, self.x0, self.criterion, self.target, evidence="light")
        return result.index, torch.autograd.grad(result.steps, self.weights)[0]

    def by_hand(self) -> tuple[int, Tensor]:
        """The same by one graph of the whole loop."""
        t, x = torch.zeros((), dtype=torch.float64), self.x0.clone().requires_grad_(True)
        loss, previous, n = self.criterion(t, x), float("nan"), 0
        value = float(loss.detach())
        while value > self.target:
            x = x + self.step * self.flow(t, x)
            loss, previous, n = self.criterion(t, x), value, n + 1
            value = float(loss.detach())
        (gradient,) = torch.autograd.grad(loss, self.weights)
        return n, -gradient / (value - previous)

    @torch.no_grad()
    def bare(self) -> int:
        """N alone."""
        t, x, n = torch.zeros((), dtype=torch.float64), self.x0, 0
        while float(self.criterion(t, x)) > self.target:
            x = x + self.step * self.flow(t, x)
            n += 1
        return n


def seconds(action: Callable[[], object]) -> float:
    """CPU seconds of an action."""
    begin = time.process_time()
    action()
    return time.process_time() - begin


def ratio(ours: Callable[[], object], other: Callable[[], object], repetitions: int) -> list[float]:
    """Median seconds of both, and the median of the ratios of neighbours."""
    pairs = [(seconds(ours), seconds(other)) for _ in range(repetitions + 1)][1:]
    first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
    return [first, second, statistics.median(a / b for a, b in pairs)]


def short_row(dim: int, repetitions: int) -> str:
    """One line of the first table."""
    case = Case.rotated(dim)
    (n, found), (steps, truth) = case.library(), case.by_hand()
    assert n == steps
    gap = float((found - truth).norm() / truth.norm())
    ours, hand, quotient = ratio(case.library, case.by_hand, repetitions)
    bar, goal = BARS.get(dim, (1.6, 1.2))
    cells = [dim, n, f"{ours:.4f}", f"{hand:.4f}", f"{quotient:.2f}", bar, goal, f"{gap:.1e}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def peak_of_a_run(steps: int) -> float:
    """MiB that the long run adds to the resident set; in a process of its own."""
    torch.set_num_threads(1)
    case = Case.diagonal(LONG, steps)
    Case.diagonal(LONG, 50).library()  # what torch itself loads late
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case.library()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def long_row(steps: int, repetitions: int) -> str:
    """The line of the second table."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(peak_of_a_run, (steps,))
    case = Case.diagonal(LONG, steps)
    assert case.bare() == steps
    ours, bare, quotient = ratio(case.library, case.bare, repetitions)
    cells = [LONG, steps, f"{ours:.2f}", f"{bare:.2f}", f"{quotient:.2f}", f"{peak:.0f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def table(columns: list[str]) -> str:
    """The head of a table."""
    return "| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns)


SHORT_TABLE = table(
    ["d", "N", "library (s)", "by hand (s)", "ratio", "bar", "goal", "gradients apart"]
)
LONG_TABLE = table(
    ["d", "N", "gradient (s)", "bare loop (s)", "ratio (bar 3.5, goal 3)",
     "peak (MiB; bar 300, goal 150)"]
)  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="*", default=sorted(BARS))
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100_000, help="of the long run; 0: none")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    require_output(arguments.out)
    torch.set_num_threads(1)
    lines = ["# Cost of a stopping index and its gradient", ""]
    lines += ["By `python benchmarks/stopping_index.py`.", "", SHORT_TABLE]
    print(SHORT_TABLE, flush=True)
    for dim in arguments.sizes:
        lines.append(short_row(dim, arguments.repetitions))
        print(lines[-1], flush=True)
    if arguments.steps:
        lines += ["", LONG_TABLE, long_row(arguments.steps, max(arguments.repetitions // 3, 1))]
        print("\n".join(lines[-2:]), flush=True)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, one thread; Python "
        f"{platform.python_version()}, torch {torch.__version__}, float64; CPU time, medians of "
        f"{arguments.repetitions} interleaved runs (a third as many of the long one)."
    )
    write_text(arguments.out, "\n".join([*lines, "", machine, ""]))


if __name__ == "__main__":
    run_script(main)
