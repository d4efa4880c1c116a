"""What 50 hits cost: a run with events over the same run without them.

    python benchmarks/events.py [--repetitions 5] [--out FILE]

float64, one thread, CPU time; the runs take turns, and a ratio is the median over the rounds. Five
oscillators with cubic springs, 3,000 accepted steps and more at the default tolerance, no resets.
Three events take turns with none: one that is looked for and never comes, the passages of one entry
through zero in one direction (about 50), and in both. The backward pass is of the sum of all times
and of the state at the end, with evidence="light", so that the same steps are compared, and with
"standard", which holds the gradient against other steps: how far it goes there depends on the
error, and so on what is asked for.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ode_stopping import Event, Solution, integrate
from theory_checks.files import require_output, run_script, write_text

RESULTS = Path(__file__).resolve().parent / "results" / "events.md"
DTYPE = torch.float64
UNTIL = 150.0


class Oscillators:
    """q'' = -w^2 q - 0.02 q^3."""

    def __init__(self) -> None:
        self.w = torch.linspace(1, 3, 5, dtype=DTYPE).requires_grad_()
        self.start = torch.linspace(0.5, 1.5, 10, dtype=DTYPE).requires_grad_()

    def flow(self, t: Tensor, x: Tensor) -> Tensor:
        """x' of x = (q, q')."""
        q, v = x[:5], x[5:]
        return torch.cat([v, -(self.w**2) * q - 0.02 * q**3])

    def run(self, events: list[Event], evidence: Any) -> tuple[float, float, Solution]:
        """Seconds of the solve and of the backward pass."""
        begin = time.process_time()
        solution = integrate(
            self.flow, self.start, until=UNTIL, at=[UNTIL], events=events, evidence=evidence
        )
        solved = time.process_time()
        total = solution.states.sum() + sum(hit.time for hit in solution.hits)
        total.backward()
        return solved - begin, time.process_time() - solved, solution


def cases() -> dict[str, list[Event]]:
    """What is looked for, by name."""

    def third(t: Tensor, x: Tensor) -> Tensor:
        return x[2]

    return {
        "none": [],
        "one that never comes": [Event(third, -100.0)],
        "falling": [Event(third, leave_first=True)],
        "either": [Event(third, direction="either", leave_first=True)],
    }


def table(repetitions: int) -> str:
    """The rows, as they are measured."""
    problem, lines = Oscillators(), []
    for evidence in ("light", "standard"):
        rows: dict[str, list[tuple[float, float]]] = {name: [] for name in cases()}
        counts = {}
        for _ in range(repetitions):
            for name, events in cases().items():
                forward, backward, solution = problem.run(events, evidence)
                rows[name].append((forward, backward))
                counts[name] = (len(solution.hits), solution.stats.accepted)
        for name, found in rows.items():
            hits, steps = counts[name]
            medians = [statistics.median(one[k] for one in found) for k in (0, 1)]
            over = {
                other: [
                    statistics.median(a[k] / b[k] for a, b in zip(found, rows[other], strict=True))
                    for k in (0, 1)
                ]
                for other in ("none", "one that never comes")
            }
            cells = [f"{value:.2f}" for value in medians]
            for ratio in over.values():
                cells += [f"{value:.2f}" for value in ratio]
            lines.append(f"| {evidence} | {name} | {hits} | {steps} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    require_output(options.out)
    rows = table(options.repetitions)
    text = (
        "# What 50 hits cost\n\n"
        f"`benchmarks/events.py --repetitions {options.repetitions}`; {platform.machine()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, one thread, CPU seconds.\n\n"
        "| evidence | event | hits | steps | forward | backward | forward over none | backward | "
        "forward over one that never comes | backward |\n"
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n" + rows + "\n"
    )
    write_text(options.out, text)


if __name__ == "__main__":
    run_script(main)
