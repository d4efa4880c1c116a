"""StoPM: iterations of the learned inertial method before and after training, on many data sets.

Logistic problems, J = |grad f| <= 3e-4, alpha = 6, t0 = 1, h = 0.04 (arXiv 2406.02006). Constants
beta(t), gamma(t) are trained on one problem from one start, by descending T + 3 (P + Q), and then
counted as the algorithm: N of Euler with the step h, on every data set and from starts that were
not trained on. Beside them stand Nesterov's constants (beta = h, gamma = 1), those that training
starts from, and the largest ones that the condition of stability admits with Lambda = L, by hand.

    python benchmarks/stopm.py [--quick]

The sets a1a, a2a, a3a and w3a join in where the environment variable ODE_STOPPING_DATA names their
folder.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from discrete import Euler, stopping_index
from ode_stopping import (
    GradientAccuracyWarning,
    GradientNorm,
    InertialHessianFlow,
    LogisticRegression,
    StoPMConstants,
    TuningHistory,
    VanishingDamping,
    learned_ishd,
    stopm_task,
    train_stopm,
)
from ode_stopping.problems import available_libsvm, breast_cancer, libsvm, synthetic_logistic
from theory_checks.files import require_output, run_script, write_text

RESULTS = Path(__file__).parent / "results" / "stopm.md"
STEP, ALPHA, T0, TARGET = 0.04, 6.0, 1.0, 3e-4
MAX_STEPS = 5000
ROWS = 300  # of a real data set, to train on
TIMES = (1.0, 1.5, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class Trained:
    """Constants, and how they came about."""

    name: str
    constants: StoPMConstants
    history: TuningHistory
    warned: int
    seconds: float


def decaying(samples: int, dim: int, seed: int) -> LogisticRegression:
    """Normal columns with standard deviations 1, 1/2, 1/3, ..., 5 % of the labels flipped."""
    X, y = synthetic_logistic(samples=samples, dim=dim, seed=seed)
    return LogisticRegression(X / torch.arange(1, dim + 1, dtype=torch.float64), y)


def data_sets(*, quick: bool) -> dict[str, LogisticRegression]:
    """The problems, by name; columns of real data sets as they are (breast cancer standardised)."""
    sets = {
        "decaying, d = 20": decaying(200, 20, 1),
        "decaying, d = 40": decaying(300, 40, 0),
        "normal, d = 64": LogisticRegression(*synthetic_logistic(samples=256, dim=64, seed=64)),
        "normal, d = 120": LogisticRegression(*synthetic_logistic(samples=300, dim=120, seed=120)),
        "breast cancer": LogisticRegression(*breast_cancer()),
    }
    if not quick:
        sets |= {name: LogisticRegression(*libsvm(name)) for name in available_libsvm()}
    return sets


def some_rows(f: LogisticRegression, seed: int) -> LogisticRegression:
    """The problem of a few of its rows."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(f.samples, generator=generator)[:ROWS]
    return LogisticRegression(f.features[chosen], f.labels[chosen])


def starts(f: LogisticRegression, count: int) -> list[Tensor]:
    """0, and standard normal points of their own (training starts from another one)."""
    generator = torch.Generator().manual_seed(100)
    shape = (count - 1, f.dim)
    return [
        torch.zeros(f.dim, dtype=torch.float64),
        *torch.randn(shape, generator=generator, dtype=torch.float64),
    ]


def train(
    name: str, f: LogisticRegression, *, seed: int, iterations: int, target: float
) -> Trained:
    """Constants trained on one problem, from one start."""
    constants = StoPMConstants(step=STEP, t0=T0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(f.dim, generator=generator, dtype=torch.float64)
    flow = learned_ishd(f, constants, alpha=ALPHA)
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GradientAccuracyWarning)
        history = train_stopm(stopm_task(flow, x0, target=target), constants, iterations=iterations)
    seconds = time.perf_counter() - begin
    warned = sum(issubclass(w.category, GradientAccuracyWarning) for w in caught)
    print(f"trained on {name}, seed {seed}: {seconds:.0f} s", file=sys.stderr)
    return Trained(name, constants, history, warned, seconds)


def largest_beta(t: Tensor) -> Tensor:
    """The largest beta with sqrt(L) <= (sqrt(beta/h) + sqrt(beta/h - alpha beta/t))/beta.

    For F = f/(h^2 L), whose constant is 1/h^2, and gamma - beta' = beta/h.
    """
    return STEP**2 * (sqrt(1 / STEP) + (1 / STEP - ALPHA / t).sqrt()) ** 2


def largest_gamma(t: Tensor) -> Tensor:
    """beta/h + beta'."""
    root = (1 / STEP - ALPHA / t).sqrt()
    rate = STEP**2 * 2 * (sqrt(1 / STEP) + root) * ALPHA / t**2 / (2 * root)
    return largest_beta(t) / STEP + rate


def iterations_of(
    f: LogisticRegression, beta: Any, gamma: Any, points: list[Tensor]
) -> list[int | None]:
    """N of Euler from every start; None where the target is not met."""
    flow = learned_ishd(f, StoPMConstants(step=STEP)).flow
    flow = InertialHessianFlow(
        flow.objective, damping=VanishingDamping(ALPHA), beta=beta, gamma=gamma
    )
    counts: list[int | None] = []
    for x0 in points:
        run = stopping_index(
            Euler(flow, step=STEP),
            flow.initial_state(x0, t0=T0),
            GradientNorm(f, squared=False),
            TARGET,
            t0=T0,
            gradient=None,
            max_steps=MAX_STEPS,
            throw=False,
        )
        counts.append(run.index if bool(run.reached) else None)
    return counts


def shown(counts: list[int | None]) -> str:
    """Median (least to largest) of the runs that ended, and how many did not."""
    ended = [count for count in counts if count is not None]
    lost = len(counts) - len(ended)
    if not ended:
        return f"none of {len(counts)}"
    text = f"{statistics.median_low(ended)}"
    if len(ended) > 1:
        text += f" ({min(ended)} to {max(ended)})"
    return text + (f", {lost} not met" if lost else "")


def ratio(after: list[int | None], before: list[int | None]) -> float:
    """Mean of after/before, start by start; NaN where a run did not end."""
    pairs = zip(after, before, strict=True)
    return statistics.fmean(a / b if a and b else float("nan") for a, b in pairs)


def iterations_table(
    sets: dict[str, LogisticRegression], trained: list[Trained], count: int
) -> list[str]:
    """N on every data set, with all constants."""
    start = StoPMConstants(step=STEP, t0=T0)
    columns: dict[str, list[tuple[Callable[[Tensor], Tensor] | float, Any]]] = {
        "Nesterov's": [(STEP, 1.0)],
        "untrained": [(start.beta, start.gamma)],
        "largest, by hand": [(largest_beta, largest_gamma)],
    }
    for one in trained:
        pair = (one.constants.beta, one.constants.gamma)
        columns.setdefault(f"trained on {one.name}", []).append(pair)
    head = ["data", "d", "L", *columns]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, f in sets.items():
        points = starts(f, count)
        row, first = [name, str(f.dim), f"{f.lipschitz():.3g}"], None
        for pairs in columns.values():
            counts = [n for beta, gamma in pairs for n in iterations_of(f, beta, gamma, points)]
            first = counts if first is None else first
            quotient = ratio(counts, first * len(pairs))
            row.append(shown(counts) + ("" if counts is first else f": {quotient:.2f}"))
        lines.append(f"| {' | '.join(row)} |")
        print(f"counted on {name}", file=sys.stderr)
    return lines


def training_table(trained: list[Trained]) -> list[str]:
    """How training went, and what was learned."""
    lines = [
        "| trained on | T before | T after | P + Q after | iteration of the best | warned | s |"
        f" beta/h at t = {', '.join(f'{t:g}' for t in TIMES)} | gamma |",
        f"|{' --- |' * 9}",
    ]
    for one in trained:
        records, best = one.history.records, one.history.best
        after = records[best.iteration]
        times = [torch.tensor(t, dtype=torch.float64) for t in TIMES]
        with torch.no_grad():
            beta = ", ".join(f"{one.constants.beta(t).item() / STEP:.2f}" for t in times)
            gamma = ", ".join(f"{one.constants.gamma(t).item():.2f}" for t in times)
        lines.append(
            f"| {one.name} | {records[0].mean:.2f} | {after.mean:.2f} | {after.penalty:.3f} | "
            f"{best.iteration} of {len(records) - 1} | {one.warned} | {one.seconds:.0f} | {beta} | "
            f"{gamma} |"
        )
    by_hand = [torch.tensor(t, dtype=torch.float64) for t in TIMES]
    beta = ", ".join(f"{largest_beta(t).item() / STEP:.2f}" for t in by_hand)
    gamma = ", ".join(f"{largest_gamma(t).item():.2f}" for t in by_hand)
    lines.append(f"| (largest, by hand) | | | | | | | {beta} | {gamma} |")
    return lines


def plan(sets: dict[str, LogisticRegression], *, quick: bool) -> list[Trained]:
    """All training runs."""
    first = "decaying, d = 20"
    if quick:
        return [train(first, sets[first], seed=0, iterations=15, target=3e-3)]
    runs = [train(first, sets[first], seed=s, iterations=30, target=TARGET) for s in range(3)]
    name = "breast cancer"
    # T at the target itself is seven times as long, and training takes that much longer.
    runs.append(train(name, sets[name], seed=0, iterations=40, target=3e-3))
    if "a1a" in sets:
        small = some_rows(sets["a1a"], 0)
        runs.append(train(f"a1a, {ROWS} rows", small, seed=0, iterations=30, target=TARGET))
    return runs


def main() -> None:
    """Train, count, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short training, bundled data")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    require_output(options.out)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    sets = data_sets(quick=options.quick)
    trained = plan(sets, quick=options.quick)
    count = 2 if options.quick else 3
    lines = [
        "# StoPM",
        "",
        f"`python benchmarks/stopm.py{' --quick' if options.quick else ''}` on "
        f"{platform.processor() or platform.machine()}, one thread, Python "
        f"{platform.python_version()}, torch {version('torch')}, torchdiffeq "
        f"{version('torchdiffeq')}.",
        "",
        f"Iterations of Euler (EIGAC) with h = {STEP:g} to |grad f| <= {TARGET:g}: median (least to"
        f" largest) over {count} starts (0 and normal points), and over the seeds of the networks "
        "where there are several; then the mean quotient to Nesterov's constants.",
        "",
        *iterations_table(sets, trained, count),
        "",
        "Training: one problem, one start, T + 3 (P + Q), Adam. The constants are those of "
        'F = f/(h^2 L). "warned" counts gradients with a warning about their accuracy (rtol 1e-5).',
        "",
        *training_table(trained),
        "",
    ]
    write_text(options.out, "\n".join(lines))
    print(f"{time.perf_counter() - begin:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    run_script(main)
