"""A schedule of ten rates for a network, trained by the derivative of the stopping index alone.

    python benchmarks/learned_schedule.py [--momentum 0.7 0] [--targets 0.2] [--out FILE]

A network with one hidden layer on scikit-learn's digits, full gradients; N counts the steps until
the loss on validation data is down to a target. A seed draws which samples train and which
validate, and the start. The rates descend the mean of the fractional N over the training seeds,
from .8 times the constant rate that is best there, of a grid in steps of the root of 2. (At that
rate itself some iterates jump about so much that N's derivative points nowhere.) The best constant
rate and the schedule are then tried on seeds that neither has seen. One thread, float64.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from discrete import StoppingIndexTask, minimise_stopping_index, stopping_index
from discrete.learned import LearnedSchedule
from discrete.learned.networks import NetworkBatch
from theory_checks.files import require_output, run_script, write_text

RESULTS = Path(__file__).parent / "results" / "learned_schedule.md"
HIDDEN, SAMPLES, VALIDATING = 32, 1000, 400
LONGEST = 150
TRAINED = range(100, 140)
HELD_OUT = range(1000, 1010)
RATES = [2.0 ** (e / 2) for e in range(-6, 7)]
# Each round begins at the best rates so far, with smaller steps.
ROUNDS, ITERATIONS = 4, 10


class Problem:
    """Training and validation loss of one seed, and a start.

    Args:
        seed: Of the split and the start.
        target: Of the validation loss.
    """

    def __init__(self, seed: int, target: float) -> None:
        self.target = target
        bunch = load_digits()
        inputs = torch.as_tensor(bunch.data / 16.0, dtype=torch.float64)
        labels = torch.as_tensor(bunch.target, dtype=torch.int64)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=generator)

        def on(rows: Tensor) -> NetworkBatch:
            return NetworkBatch(inputs[rows][None], labels[rows][None], hidden=HIDDEN, classes=10)

        self.loss = on(order[:SAMPLES])
        self.validation = on(order[SAMPLES : SAMPLES + VALIDATING])
        draw = torch.randn(1, self.loss.dim, generator=generator, dtype=torch.float64)
        self.x0 = draw * self.loss.initial_sizes

    def criterion(self, t: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """The loss on the validation data, shape ()."""
        return self.validation(state[0])[0]

    def task(self, schedule: LearnedSchedule) -> StoppingIndexTask:
        """N of a schedule here."""
        update = schedule.update(self.loss)
        return StoppingIndexTask(
            update,
            update.initial_state(self.x0),
            self.criterion,
            self.target,
            max_steps=LONGEST,
            interpolation="log",
            evidence="light",
        )

    def steps(self, schedule: LearnedSchedule) -> int:
        """N, a miss as one more than the longest run."""
        task = self.task(schedule)
        run = stopping_index(
            task.update,
            task.x0,
            task.criterion,
            self.target,
            max_steps=LONGEST,
            gradient=None,
            throw=False,
        )
        return int(run.index) if bool(run.reached) else LONGEST + 1


def counts(schedule: LearnedSchedule, problems: Iterable[Problem]) -> list[int]:
    """N on each."""
    return [problem.steps(schedule) for problem in problems]


def best_constant(momentum: float, problems: list[Problem]) -> tuple[float, float]:
    """The rate of the grid with the least mean N, and that mean."""
    means = {
        rate: float(np.mean(counts(LearnedSchedule([rate], momentum=momentum), problems)))
        for rate in RATES
    }
    best = min(means, key=lambda rate: means[rate])
    return best, means[best]


def interval(ratios: Callable[[np.ndarray], float], count: int) -> tuple[float, float]:
    """95 % of a figure of rows that are drawn anew."""
    draw = np.random.default_rng(0)
    found = [ratios(draw.integers(0, count, count)) for _ in range(4000)]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def study(momentum: float, target: float) -> Iterable[str]:
    """The rows of one momentum and target."""
    train = [Problem(seed, target) for seed in TRAINED]
    test = [Problem(seed, target) for seed in HELD_OUT]
    rate, mean = best_constant(momentum, train)
    every = max(1, round(mean / 10))
    schedule = LearnedSchedule([0.8 * rate] * 10, every=every, momentum=momentum)
    histories = [
        minimise_stopping_index(
            [problem.task(schedule) for problem in train],
            schedule,
            optimizer=lambda p, step=0.05 * 0.85**number: torch.optim.Adam(p, lr=step),
            iterations=ITERATIONS,
            clip=10.0,
            censored=float(LONGEST + 1),
            progress=False,
        )
        for number in range(ROUNDS)
    ]
    learned = np.asarray(counts(schedule, test), dtype=float)
    constant = np.asarray(counts(LearnedSchedule([rate], momentum=momentum), test), dtype=float)
    own, own_mean = best_constant(momentum, test)
    ratio = learned.mean() / constant.mean()
    low, high = interval(lambda k: learned[k].mean() / constant[k].mean(), len(learned))
    rates = " ".join(f"{one:.2g}" for one in schedule.rates.tolist())
    yield (
        f"| {target:g} | {momentum:g} | {rate:.3g}: {constant.mean():.1f} | "
        f"{own:.3g}: {own_mean:.1f} | "
        f"{learned.mean():.1f} | {ratio:.2f} [{low:.2f}, {high:.2f}] | "
        f"{learned.mean() / own_mean:.2f} | {int((learned <= LONGEST).sum())} of {len(learned)} |"
    )
    yield (
        f"\nTarget {target:g}, momentum {momentum:g}: mean N* in training "
        f"{histories[0].records[0].objective:.1f} to {histories[-1].best.objective:.1f}; "
        f"rates, {every} steps each: {rates}. N on the held-out seeds: "
        f"{' '.join(f'{n:.0f}' for n in learned)}; of the constant rate: "
        f"{' '.join(f'{n:.0f}' for n in constant)}."
    )


def main() -> None:
    """Train, try, tabulate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--momentum", type=float, nargs="+", default=[0.7, 0.0])
    parser.add_argument("--targets", type=float, nargs="+", default=[0.2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    require_output(options.out)
    rows: list[str] = []
    notes: list[str] = []
    for target, momentum in product(options.targets, options.momentum):
        row, note = study(momentum, target)
        rows.append(row)
        notes.append(note)
        text = page(rows, notes)
        write_text(options.out, text)
    print(text)


def page(rows: list[str], notes: list[str]) -> str:
    """The table."""
    lines = [
        "# A schedule of ten rates by dN/dtheta",
        "",
        f"`python benchmarks/learned_schedule.py`: a 64-{HIDDEN}-10 network on digits, full "
        f"gradients on {SAMPLES} samples, N steps to a target of the loss on {VALIDATING} others. "
        f"Trained on {len(TRAINED)} seeds (split and start) in {ROUNDS} rounds of "
        f"{ITERATIONS} steps of Adam, tried on {len(HELD_OUT)} others; a miss counts "
        f"{LONGEST + 1}. The interval (95 %) draws the held-out seeds anew.",
        "",
        "| target | momentum | best constant rate in training: its mean N on held-out seeds | best "
        "constant rate on the held-out seeds themselves | ten rates | over the first | "
        "over the second | reached |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *rows,
        *notes,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
