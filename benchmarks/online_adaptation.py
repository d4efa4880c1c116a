"""What online adaptation costs a step, and what it does on minibatches.

Time of a step of `AdamOLA` over that of `torch.optim.Adam` with the same closure (bars: 1.4 with a
deterministic closure, whose gradient is used again; 2.2 on minibatches, where a second call is made
on the same batch), on small and larger networks. Then a network on the digits that come with
scikit-learn, minibatches of 64: loss, accuracy and learning rate after 20 epochs, from initial
rates over five decades, with each guard switched off in turn.

    python benchmarks/online_adaptation.py [--quick] [--device cuda]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from discrete import SGDOLA, AdamOLA
from theory_checks.files import require_output, run_script, write_text

RESULTS = Path(__file__).parent / "results" / "online_adaptation.md"
Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
TRAIN = 1400  # of 1797
TWICE = "Adam, twice the epochs"  # as many evaluations as AdamOLA's


class Data(NamedTuple):
    """The digits, shuffled once."""

    x: Tensor
    y: Tensor


def digits_data(device: torch.device) -> Data:
    """All ten digits, pixels in [0, 1]."""
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(bunch.data / 16.0, dtype=torch.float32)[order]
    return Data(x.to(device), torch.tensor(bunch.target)[order].to(device))


def network(hidden: int, layers: int, seed: int, device: torch.device) -> nn.Sequential:
    """A multilayer perceptron."""
    torch.manual_seed(seed)
    sizes = [64] + [hidden] * layers
    parts: list[nn.Module] = []
    for before, after in pairwise(sizes):
        parts += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(sizes[-1], 10)).to(device)


def stepper(data: Data, make: Make, batch: int, hidden: int, layers: int) -> Callable[[], None]:
    """A function that makes one step, on the next batch or on all data."""
    model = network(hidden, layers, 0, data.x.device)
    optimizer = make(model.parameters())
    place = 0

    def step() -> None:
        nonlocal place
        rows = slice(place, place + batch)
        place = (place + batch) % (TRAIN - batch + 1) if batch < TRAIN else 0

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.x[rows]), data.y[rows])
            loss.backward()
            return loss

        optimizer.step(closure)

    return step


def seconds_of(step: Callable[[], None], count: int, device: torch.device) -> float:
    """Time of `count` steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def timing_table(data: Data, *, rounds: int) -> list[str]:
    """Ratios of the times of a step, medians over interleaved rounds."""
    variants: dict[str, Make] = {
        "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
        "deterministic": lambda p: AdamOLA(p, lr=1e-3, deterministic=True),
        "two calls": lambda p: AdamOLA(p, lr=1e-3),
        "every 5": lambda p: AdamOLA(p, lr=1e-3, every=5),
        "horizon 3": lambda p: AdamOLA(p, lr=1e-3, horizon=3),
    }
    lines = [
        "| network | batch | Adam, ms a step | deterministic=True | two calls | every=5 | "
        "horizon=3 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for hidden, layers in ((64, 1), (256, 2), (1024, 2)):
        for batch in (64, TRAIN):
            steps = {
                name: stepper(data, make, batch, hidden, layers)
                for name, make in variants.items()
                if batch == TRAIN or name != "deterministic"
            }
            count = 20 if hidden > 256 else 100
            ratios: dict[str, list[float]] = {name: [] for name in steps}
            base = []
            for step in steps.values():
                seconds_of(step, 5, data.x.device)
            for _ in range(rounds):
                reference = seconds_of(steps["Adam"], count, data.x.device)
                base.append(1e3 * reference / count)
                for name, step in steps.items():
                    ratios[name].append(seconds_of(step, count, data.x.device) / reference)
            row = [
                f"{statistics.median(ratios[name]):.2f}" if name in ratios else "-"
                for name in variants
                if name != "Adam"
            ]
            lines.append(
                f"| 64-{'-'.join([str(hidden)] * layers)}-10 | {batch} | "
                f"{statistics.median(base):.2f} | {' | '.join(row)} |"
            )
    return [*lines, ""]


def train(data: Data, make: Make, *, seed: int, epochs: int, batch: int) -> tuple[float, ...]:
    """(training loss, test loss, test accuracy, last rate) after some epochs."""
    model = network(64, 1, seed, data.x.device)
    optimizer = make(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN, generator=generator).split(batch):

            def closure(rows: Tensor = rows) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(data.x[rows]), data.y[rows])
                loss.backward()
                return loss

            optimizer.step(closure)
    with torch.no_grad():
        scores = model(data.x)
        losses = [
            nn.functional.cross_entropy(scores[part], data.y[part]).item()
            for part in (slice(0, TRAIN), slice(TRAIN, None))
        ]
        right = (scores[TRAIN:].argmax(1) == data.y[TRAIN:]).float().mean().item()
    return (*losses, right, float(optimizer.param_groups[0]["lr"]))


def training_table(
    data: Data, *, batch: int, seeds: int, epochs: int, only: list[str] | None
) -> list[str]:
    """Medians over seeds, by optimiser and initial rate."""

    def adam(lr: float) -> Make:
        return lambda p: torch.optim.Adam(p, lr=lr)

    def adapted(**options: Any) -> Callable[[float], Make]:
        return lambda lr: lambda p: AdamOLA(p, lr=lr, **options)

    optimisers: dict[str, Callable[[float], Make]] = {
        "Adam": adam,
        TWICE: adam,
        "AdamOLA": adapted(),
        "AdamOLA, every=5": adapted(every=5),
        "AdamOLA, horizon=3": adapted(horizon=3),
        "AdamOLA, held_out=False": adapted(held_out=False),
        "AdamOLA, caution=1": adapted(caution=1.0),
        "SGD, momentum 0.9": lambda lr: lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
        "SGDOLA": lambda lr: lambda p: SGDOLA(p, lr=lr),
    }
    rates = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    lines = [
        f"### Batches of {batch}",
        "",
        "| optimiser | " + " | ".join(f"from {rate:g}" for rate in rates) + " |",
        f"|{' --- |' * (len(rates) + 1)}",
    ]
    for name, of_rate in optimisers.items():
        if only is not None and name not in only:
            continue
        row = []
        for rate in rates:
            length = 2 * epochs if name == TWICE else epochs
            runs = [
                train(data, of_rate(rate), seed=s, epochs=length, batch=batch) for s in range(seeds)
            ]
            loss, test, right, last = (statistics.median(c) for c in zip(*runs, strict=True))
            row.append(f"{loss:.1e}, {test:.2f}, {100 * right:.1f} %, {last:.0e}")
        lines.append(f"| {name} | {' | '.join(row)} |")
    return [*lines, ""]


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and seeds")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--only", nargs="+", help="these optimisers in training, and no timing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    require_output(options.out)
    torch.set_num_threads(1)
    data = digits_data(options.device)
    seeds, epochs, rounds = (1, 5, 3) if options.quick else (3, 20, 7)
    where = platform.processor() or platform.machine()
    if options.device.type == "cuda":
        where = torch.cuda.get_device_name(options.device)
    lines = [
        "# Online adaptation",
        "",
        f"`python benchmarks/online_adaptation.py{' --quick' if options.quick else ''}` on "
        f"{where}, one thread, Python {platform.python_version()}, torch {version('torch')}.",
        "",
        "## Time of a step over Adam's",
        "",
        "The closure is the same, gradients included; medians over interleaved rounds. Bars: 1.4 "
        "for deterministic=True, 2.2 for two calls.",
        "",
        *([] if options.only else timing_table(data, rounds=rounds)),
        "## A network on digits, minibatches",
        "",
        f"64-64-10, {epochs} epochs: loss on the training data, loss and accuracy on the rest, and "
        f"the learning rate at the end; medians over {seeds} seeds.",
        "",
        *training_table(data, batch=64, seeds=seeds, epochs=epochs, only=options.only),
        *training_table(data, batch=16, seeds=seeds, epochs=epochs // 3 or 1, only=options.only),
    ]
    write_text(options.out, "\n".join(lines))


if __name__ == "__main__":
    run_script(main)
