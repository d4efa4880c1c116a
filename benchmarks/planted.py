"""Does `check_stopping_gradient` tell right from wrong? Random cases with known verdicts.

Flows, criteria, scales, tolerances and routes are those of `fuzz.py`, drawn from the
seed and the number of the case; a case is used where the gradient is right by the oracle. Of ten,
four stay as they are, five get a gradient that is wrong in one leaf by .1 to 10 % of itself (the
value is as before), and in one J has a kink in a leaf. Only a leaf that matters is made wrong: its
gradient is above a hundredth of its natural size.

    python benchmarks/planted.py [--cases 100] [--seed 3] [--jobs 2] [--directions 1] [--only N]
        [--out planted.md]

The exit status is 1 if a wrong gradient was called right.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import torch
from _fuzzing.cases import ROUTES, Settings, draw
from _fuzzing.oracle import answer
from _fuzzing.rows import GRADIENT
from joblib import Parallel, delayed
from torch import Tensor

from ode_stopping import GradientReport, StoppingError, check_stopping_gradient
from theory_checks.files import require_output, run_script, write_text

KINDS = ("right", "wrong") * 4 + ("wrong", "kink")
_LEAST_SHARE = 0.01  # of its natural size: a gradient that is made wrong
_RIGHT = 0.5  # of the promise: the error of a gradient that counts as right
Criterion = Callable[[Tensor, Tensor], Tensor]
_KINK = 0.3  # slope of the kink, over that of J along the leaf


@dataclass(frozen=True)
class Verdict:
    """What came of a case: its kind, the verdict, what was planted, and the seconds."""

    number: int
    kind: str
    verdict: str
    note: str = ""
    seconds: float = 0.0


class _Wrong(torch.autograd.Function):
    """p as it is, with a gradient that is wrong by a factor."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return p.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * grad, None


def run(seed: int, number: int, directions: int, *, show: bool = False) -> Verdict:
    """One case; its report is printed with `show`."""
    begin, kind = time.perf_counter(), KINDS[number % len(KINDS)]
    settings = Settings(seed=seed)
    row = fuzz.run(settings, number)
    worst = max((leaf.error for leaf in row.leaves.values()), default=0.0)
    if row.outcome != GRADIENT or worst > _RIGHT * row.promise:
        return Verdict(number, "unusable", f"{row.outcome}, or not right by the oracle")
    case, note = draw(settings, number), f"{row.flow}, {row.criterion}, {row.route}, {row.method}"
    rng = np.random.default_rng([seed, number])
    matter = [
        name
        for name in case.problem.leaves
        if row.leaves[name].truth > _LEAST_SHARE * row.leaves[name].natural
    ]
    if not matter:
        return Verdict(number, "unusable", "no leaf matters")
    altered: dict[str, Callable[[Tensor], Tensor]] = {}
    name = str(rng.choice(matter))
    if kind == "wrong":
        error = 10.0 ** rng.uniform(-3, -1) * rng.choice([-1, 1])
        altered[name] = lambda p: _Wrong.apply(p, 1.0 + error)
        note += f", {name} by {error:.1e}"
    subject = fuzz.Subject(case, altered=altered)
    criterion = subject.criterion
    if kind == "kink":
        known = answer(case.problem, case.near, case.on_time, case.on_state)
        slope = _KINK * abs(known.rate / case.on_time) * row.leaves[name].truth
        criterion = _kinked(criterion, subject.leaves[name], slope)
        note += f", {name}"
    try:
        report = _report(subject, criterion, directions)
        verdict = report.verdict
        if show:
            print(report)
    except (StoppingError, ValueError) as failure:
        verdict = f"refused: {failure}"[:200]
    return Verdict(number, kind, verdict, note, time.perf_counter() - begin)


def _kinked(criterion: Criterion, leaf: Tensor, slope: float) -> Criterion:
    """J plus slope |p - p0| in the first element of a leaf, p0 where it is."""
    place = float(leaf.detach().reshape(-1)[0])

    def kinked(t: Tensor, x: Tensor) -> Tensor:
        return criterion(t, x) + slope * (leaf.reshape(-1)[0] - place).abs()

    return kinked


def _report(subject: fuzz.Subject, criterion: Criterion, directions: int) -> GradientReport:
    case, leaves = subject.case, subject.leaves
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check_stopping_gradient(
            subject.flow,
            leaves["x0"],
            criterion,
            leaves["target"],
            gradient=ROUTES[case.route],
            solver=subject.solver,
            t0=leaves["t0"],
            max_time=subject.max_time,
            directions=directions,
        )


def table(verdicts: list[Verdict]) -> str:
    """Markdown: verdicts by kind, and every case with another verdict than its kind."""
    used = [v for v in verdicts if v.kind != "unusable"]
    counts = Counter((v.kind, v.verdict.partition(":")[0]) for v in used)
    columns = sorted({verdict for _, verdict in counts})
    lines = [f"| planted | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for kind in dict.fromkeys(KINDS):
        lines.append(f"| {kind} | {' | '.join(str(counts[kind, c]) for c in columns)} |")
    lines += ["", f"{len(verdicts) - len(used)} more were drawn and could not be used.", ""]
    others = [v for v in used if v.verdict != v.kind]
    if others:
        lines += ["| case | planted | verdict | of |", "| --- | --- | --- | --- |"]
        lines += [f"| {v.number} | {v.kind} | {v.verdict} | {v.note} |" for v in others]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--directions", type=int, default=1)
    parser.add_argument("--only", type=int, help="one case, with its whole report")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.out is not None:
        require_output(options.out)
    numbers = [options.only] if options.only is not None else range(options.cases)
    verdicts: list[Verdict] = []
    found = Parallel(n_jobs=options.jobs, return_as="generator")(
        delayed(run)(options.seed, number, options.directions, show=options.only is not None)
        for number in numbers
    )
    for verdict in found:
        verdicts.append(verdict)
        if verdict.kind not in ("unusable", verdict.verdict) or options.only is not None:
            print(verdict, flush=True)
    command = f"python benchmarks/planted.py --cases {options.cases} --seed {options.seed}"
    seconds = sum(v.seconds for v in verdicts)
    text = f"# Planted errors in gradients\n\nBy `{command} --directions {options.directions}`: "
    text += f"{seconds:.0f} s of one core.\n\n{table(verdicts)}\n"
    print(text)
    if options.out is not None:
        write_text(options.out, text)
    raise SystemExit(any((v.kind, v.verdict) == ("wrong", "right") for v in verdicts))


if __name__ == "__main__":
    run_script(main)
