"""The study of learned optimisers: what the stopping time in the loss does, over seeds.

    python benchmarks/learning.py [--seeds 0 1 2 3 4] [--variants NAME ...] [--folder DIR]
                                  [--out FILE]

One configuration (`_learning/setup.py`) for all rows. Each pair of variant and seed is trained once
and tried on problems that it has not seen, at the trained size and beyond; what is in the folder
already is not done again, and a training that was killed goes on (a folder belongs to one
configuration). One thread. The table:

- N to |grad f| <= 1e-3, median over seeds and problems, misses as 1001; its ratio to that of
  lambda = 0 and of the control log f with 95 % intervals (seeds are drawn anew, then problems);
  share that reached it, and share of problems whose f rose above 10 times its lowest
- rivals by hand with the rate that is best on other problems of the trained size, Adam with online
  adaptation among them
- effective step sizes |u_k| / |g_k| over time
- to 2,000 steps, ten times the longest horizon of the training: shares that reached it and blew up
- Figure 3 as printed: N, the share met by a rise, and f there
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _learning.online import adam_ola
from _learning.rivals import RATES, RIVALS
from _learning.setup import (
    HORIZON,
    PRINTED,
    PRINTED_VARIANTS,
    PROBLEMS,
    RIDGE,
    TESTING,
    TRAINING,
    TUNING,
    VARIANTS,
    printed,
    tests,
)

from discrete.learned import LearnedOptimizer
from discrete.learned.evaluation import Evaluation, evaluate
from discrete.learned.training import meta_train
from theory_checks.files import require_output, run_script, write_text

Row = dict[str, Any]
# Steps at which the effective step size is told.
LOOKED_AT = [0, 9, 49, 99, 199, -1]
# How far these go, where the stopping time is compared with what it adds to.
LONGEST = 2_000
GO_ON = ("lambda 0", "lambda 1", "log f")
PLACES = tuple(tests())


def stem_of(name: str, seed: int) -> str:
    """Of the files of a training."""
    return f"{name.replace(' ', '_').replace(',', '')}-{seed}"


def trained(name: str, seed: int, folder: Path) -> LearnedOptimizer:
    """A variant of a seed, from its file where it was trained before."""
    make, tasks, options = (VARIANTS | PRINTED_VARIANTS)[name]
    stem = folder / stem_of(name, seed)
    done = stem.with_suffix(".safetensors")
    torch.manual_seed(seed)
    learned = make()
    if done.exists():
        return type(learned).load(done)
    settings = TRAINING | options | {"seed": seed}
    state = stem.with_suffix(".state")
    meta_train(learned, tasks, checkpoint=state, log=stem.with_suffix(".jsonl"), **settings)
    learned.save(done)
    state.unlink()
    return learned


def figures(found: Evaluation) -> Row:
    """What is kept of an evaluation, for the last target."""
    samples = found.outcomes
    return {
        "index": samples.index[:, -1].tolist(),
        "rises": samples.rises[:, -1].tolist(),
        "at_index": samples.at_index[:, -1].tolist(),
        "blown": samples.blown().tolist(),
        "steps": found.steps.double().nanmedian(dim=1).values[LOOKED_AT].tolist(),
    }


def tried(
    learned: LearnedOptimizer, places: Sequence[str] = PLACES, horizon: int = HORIZON
) -> dict[str, Row]:
    """On the test problems of these places."""
    families = tests()
    return {
        place: figures(
            evaluate(learned, families[place].draw(PROBLEMS, seed=TESTING), horizon=horizon)
        )
        for place in places
    }


def longest(learned: LearnedOptimizer) -> dict[str, Row]:
    """The trained size and beyond, to the longest horizon."""
    return tried(learned, PLACES[:4], LONGEST)


def rival(name: str) -> tuple[float, dict[str, Row]]:
    """A rule by hand: its best rate on the tuning problems, and how it does with it."""
    task = RIDGE.draw(PROBLEMS, seed=TUNING)
    means = {
        rate: float(
            evaluate(RIVALS[name](rate), task, horizon=HORIZON).index[:, -1].double().mean()
        )
        for rate in RATES[name]
    }
    best = min(means, key=lambda rate: means[rate])
    return best, tried(RIVALS[name](best))


def as_printed(learned: LearnedOptimizer) -> Row:
    """Figure 3's criterion on unseen problems, over its K = 100 and 400 steps more."""
    tasks, _ = printed(PRINTED, 0.0)
    return figures(evaluate(learned, tasks(PROBLEMS, TESTING), horizon=HORIZON))


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, or what is made and written there."""
    if not file.exists():
        write_text(file, json.dumps(make()))
    return json.loads(file.read_text(encoding="utf-8"))


def require_configuration(folder: Path) -> None:
    """Refuse a folder whose results are of another configuration."""
    sources = [Path(__file__).parent / "_learning" / name for name in ("setup.py", "rivals.py")]
    now = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    if kept(folder / "configuration.json", lambda: now) != now:
        raise SystemExit(
            f"{folder} holds results of another configuration (benchmarks/_learning has changed "
            "since); take another --folder"
        )


def counted(row: Row) -> np.ndarray[Any, Any]:
    """N of every problem, misses as horizon + 1."""
    index = np.asarray(row["index"], dtype=float)
    return np.where(index < 0, HORIZON + 1, index)


def interval(
    rows: list[np.ndarray[Any, Any]], others: list[np.ndarray[Any, Any]]
) -> tuple[float, float, float]:
    """Ratio of the medians over all seeds and problems, and its 95 % interval."""
    draw = np.random.default_rng(0)

    def median(parts: list[np.ndarray[Any, Any]]) -> float:
        return float(np.median(np.concatenate(parts)))

    def again(parts: list[np.ndarray[Any, Any]], problems: Any) -> float:
        chosen = draw.integers(0, len(parts), len(parts))
        return median([parts[k][problems] for k in chosen])

    ratios = []
    for _ in range(2000):
        problems = draw.integers(0, len(rows[0]), len(rows[0]))
        ratios.append(again(rows, problems) / again(others, problems))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return median(rows) / median(others), float(low), float(high)


def shares(rows: list[Row]) -> list[str]:
    """How many reached the target, and blew up, over all seeds."""
    reached = np.mean([np.asarray(row["index"]) >= 0 for row in rows])
    blown = np.mean([row["blown"] for row in rows])
    return [f"{100 * reached:.0f} %", f"{100 * blown:.1f} %"]


def table(results: dict[str, list[dict[str, Row]]], rivals: dict[str, Any]) -> Iterable[str]:
    """One line a variant and place."""
    yield "| optimiser | problems | median N | reached | blown up | over lambda = 0 | over log f |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, seeds in results.items():
        for place in PLACES:
            rows = [counted(one[place]) for one in seeds]
            cells = [name, place, f"{np.median(np.concatenate(rows)):.0f}"]
            cells += shares([one[place] for one in seeds])
            for other in ("lambda 0", "log f"):
                if other in results and other != name:
                    against = [counted(one[place]) for one in results[other]]
                    ratio, low, high = interval(rows, against)
                    cells.append(f"{ratio:.2f} [{low:.2f}, {high:.2f}]")
                else:
                    cells.append("")
            yield "| " + " | ".join(cells) + " |"
    for name, (rate, places) in rivals.items():
        for place, row in places.items():
            cells = [f"{name}, rate {rate:g}", place, f"{np.median(counted(row)):.0f}"]
            yield "| " + " | ".join(cells + shares([row])) + " | | |"


def step_sizes(results: dict[str, list[dict[str, Row]]], places: Sequence[str]) -> Iterable[str]:
    """|u_k| / |g_k| over time, median over problems, then over seeds."""
    steps = [step if step >= 0 else HORIZON + step for step in LOOKED_AT]
    yield "| optimiser | problems | " + " | ".join(f"step {step}" for step in steps) + " |"
    yield "| --- | --- | " + " | ".join("---" for _ in steps) + " |"
    for name, seeds in results.items():
        for place in places:
            sizes = np.median([one[place]["steps"] for one in seeds], axis=0)
            cells = " | ".join(f"{size:.2g}" for size in sizes)
            yield f"| {name} | {place} | {cells} |"


def further(results: dict[str, list[dict[str, Row]]]) -> Iterable[str]:
    """Shares at the longest horizon."""
    yield f"| optimiser | problems | reached within {LONGEST} | blown up |"
    yield "| --- | --- | --- | --- |"
    for name, seeds in results.items():
        for place in seeds[0]:
            cells = [name, place, *shares([one[place] for one in seeds])]
            yield "| " + " | ".join(cells) + " |"


def rises(results: dict[str, list[Row]]) -> Iterable[str]:
    """Figure 3 as printed."""
    yield "| f(x_{k-1}) - f(x_k) <= 1e-5 | median N | met | of these by a rise | median f there |"
    yield "| --- | --- | --- | --- | --- |"
    for name, seeds in results.items():
        index = np.concatenate([row["index"] for row in seeds])
        met = index >= 0
        up = np.concatenate([row["rises"] for row in seeds])[met]
        value = np.concatenate([row["at_index"] for row in seeds])[met]
        median = np.median(np.where(met, index, HORIZON + 1))
        yield (
            f"| {name} | {median:.0f} | {100 * met.mean():.0f} % | {100 * up.mean():.0f} % | "
            f"{np.median(value):.2g} |"
        )


def main() -> None:
    """Train, try, tabulate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS, *PRINTED_VARIANTS])
    parser.add_argument("--folder", type=Path, default=Path("learning-study"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.out is not None:
        require_output(options.out)
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    require_configuration(folder)
    rivals = {name: kept(folder / f"{name}.json", lambda n=name: rival(n)) for name in RIVALS}
    rivals["Adam-OLA"] = kept(folder / "Adam-OLA.json", adam_ola)
    results: dict[str, list[dict[str, Row]]] = {}
    gone_on: dict[str, list[dict[str, Row]]] = {}
    gamed: dict[str, list[Row]] = {}
    for seed in options.seeds:
        for name in options.variants:
            looks: list[tuple[str, Callable[[LearnedOptimizer], Any], dict[str, list[Any]]]] = (
                [("", as_printed, gamed)] if name in PRINTED_VARIANTS else [("", tried, results)]
            )
            if name in GO_ON:
                looks.append(("-longest", longest, gone_on))
            for suffix, look, rows in looks:
                found = kept(
                    folder / f"{stem_of(name, seed)}{suffix}.json",
                    lambda n=name, s=seed, act=look: act(trained(n, s, folder)),
                )
                rows.setdefault(name, []).append(found)
            print(f"{name}, seed {seed}: done", flush=True)
    lines = [
        "# Learned optimisers",
        "",
        f"By `python benchmarks/learning.py`: {len(options.seeds)} seeds, {PROBLEMS} problems a "
        f"size, horizon {HORIZON}, trained on d = 32 with K drawn from {TRAINING['horizon']}.",
        "",
        *table(results, rivals),
        "",
        *step_sizes(results, PLACES[:3:2]),
        "",
        *further(gone_on),
        "",
        *rises(gamed),
        "",
    ]
    print("\n".join(lines))
    if options.out is not None:
        write_text(options.out, "\n".join(lines))


if __name__ == "__main__":
    run_script(main)
