"""What the discrete adjoint costs: time against the forward run, memory against unrolled steps.

Problem: x' = -p * grad f(x), f a dense rotated quadratic with its gradient given, p a learnable
vector of d entries, Euler; J = f, or J the squared gradient norm. The target comes from a pilot
run, so that N is what the table says.

    python benchmarks/discrete_adjoint.py [--repetitions 5] [--sizes 100 1000 5000] [--threads 1]

Time: `stopping_index` with gradient=None is the forward run to N; the backward pass is `.steps`
differentiated to p. Both are timed in turn in one process, and the medians are divided (bar: 2.5).

Memory: sampling the resident set would miss short peaks and see freed pages, so the allocations
themselves are added up, as PyTorch's CPU allocator reports them to `torch.profiler`. Compared are
the peak of the backward pass beyond what was live before it (the stored states were), and the peak
of 64 steps that are unrolled in one graph and differentiated (bar: less than that).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from discrete import DiscreteAdjoint, Euler, StoppingIndexResult, stopping_index
from ode_stopping import GradientNorm, LossValue, PreconditionedFlow, Quadratic
from ode_stopping.problems import random_rotation
from theory_checks.files import require_output, run_script, write_text

STEPS = {100: 2000, 1000: 2000, 5000: 200}
BAR = 2.5
UNROLLED = 64
RESULTS = Path(__file__).resolve().parent / "results" / "discrete_adjoint.md"


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    rule: Euler
    weights: Tensor
    criterion: nn.Module
    x0: Tensor
    target: float

    def run(self, *, gradient: DiscreteAdjoint | None) -> StoppingIndexResult:
        """The stopping index."""
        return stopping_index(
            self.rule, self.x0, self.criterion, self.target, gradient=gradient, evidence="light"
        )


def make_case(dim: int, steps: int, criterion: str) -> Case:
    """A case whose index is `steps`."""
    spectrum = torch.logspace(-2, 0, dim, dtype=torch.float64)
    problem = Quadratic(spectrum, rotation=random_rotation(dim, seed=0))
    weights = torch.ones(dim, dtype=torch.float64, requires_grad=True)
    rule = Euler(PreconditionedFlow(problem, preconditioner=weights), step=0.1)
    judge = LossValue(problem) if criterion == "f" else GradientNorm(problem)
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(dim, generator=generator, dtype=torch.float64)
    pilot = stopping_index(rule, x0, judge, 0.0, max_steps=steps, gradient=None).trajectory.losses
    return Case(rule, weights, judge, x0, 0.5 * float(pilot[-1] + pilot[-2]))


def timed(case: Case, repetitions: int) -> tuple[float, float]:
    """Median seconds of the forward run and of the backward pass."""
    forward, backward = [], []
    for _ in range(repetitions + 1):
        begin = time.perf_counter()
        case.run(gradient=None)
        forward.append(time.perf_counter() - begin)
        result = case.run(gradient=DiscreteAdjoint())
        begin = time.perf_counter()
        torch.autograd.grad(result.steps, case.weights)
        backward.append(time.perf_counter() - begin)
    # The first round warms up.
    return statistics.median(forward[1:]), statistics.median(backward[1:])


def peak_bytes(action: Callable[[], object]) -> int:
    """Largest number of bytes that an action holds at once, beyond what was live before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    return max(itertools.accumulate(change for _, change in changes))


def measured_memory(case: Case) -> tuple[int, int, int]:
    """Bytes of the stored states, and at the peaks of the backward pass and of unrolled steps."""
    result = case.run(gradient=DiscreteAdjoint())
    stored = len(result.trajectory.indices) * case.x0.numel() * case.x0.element_size()
    backward = peak_bytes(lambda: torch.autograd.grad(result.steps, case.weights))

    def unrolled() -> None:
        # The same start as the adjoint's: a state that requires grad.
        x = case.x0.clone().requires_grad_(True)
        t = torch.zeros((), dtype=torch.float64)
        for k in range(UNROLLED):
            x = case.rule(k, x, t)
        torch.autograd.grad(case.criterion(t, x), case.weights)

    return stored, backward, peak_bytes(unrolled)


def row(dim: int, criterion: str, repetitions: int) -> str:
    """One line of the table."""
    case = make_case(dim, STEPS[dim], criterion)
    steps = case.run(gradient=None).index
    forward, backward = timed(case, repetitions)
    stored, peak, unrolled = measured_memory(case)
    cells = [
        str(dim),
        criterion,
        str(steps),
        f"{forward:.3f}",
        f"{backward:.3f}",
        f"{backward / forward:.2f}",
        f"{stored / 2**20:.2f}",
        f"{peak / 2**20:.2f}",
        f"{unrolled / 2**20:.2f}",
        "yes" if backward <= BAR * forward and peak < unrolled else "NO",
    ]
    return "| " + " | ".join(cells) + " |"


COLUMNS = [
    "d",
    "J",
    "N",
    "forward to N (s)",
    "backward (s)",
    f"ratio (bar {BAR})",
    "stored states (MiB)",
    "backward peak beyond them (MiB)",
    f"{UNROLLED} unrolled steps (MiB)",
    "within both bars",
]
HEADER = "| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=sorted(STEPS), choices=STEPS)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    require_output(arguments.out)
    torch.set_num_threads(arguments.threads)
    machine = (
        f"{platform.machine()}, {os.cpu_count()} cores, {arguments.threads} thread(s) used; Python "
        f"{platform.python_version()}, torch {torch.__version__}, float64; median of "
        f"{arguments.repetitions} repetitions."
    )
    print(HEADER, flush=True)
    rows = []
    for dim in arguments.sizes:
        for criterion in ("f", "gradient norm"):
            rows.append(row(dim, criterion, arguments.repetitions))
            print(rows[-1], flush=True)
    title = [
        "# Cost of the discrete adjoint",
        "",
        "By `python benchmarks/discrete_adjoint.py`.",
        "",
    ]
    text = "\n".join([*title, HEADER, *rows, "", machine, ""])
    write_text(arguments.out, text)


if __name__ == "__main__":
    run_script(main)
