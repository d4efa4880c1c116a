"""How fast the continuous side is: value and gradient of a stopping time, over its peers.

    python benchmarks/engine.py [--rows a b ...] [--repetitions 5] [--quick] [--out FILE]

float64, one thread, CPU time; ours and the peers take turns, and a ratio is the median over the
rounds. rtol is 1e-6, atol 1e-10. Every gradient is compared with a truth that none of them computes
(`_engine_cases.py`), so that a fast wrong one shows. The rows:

    a  value and gradient on a rotated quadratic (condition 100, eps 1e-5), over torchdiffeq's
       `odeint_event` differentiated through; with plain closures, and (ours) the library's objects
    b  the same over diffrax (extra `bench`): jit, Tsit5, an `Event` with Newton, default adjoint
    c  the backward pass alone with 1e5 and 1e6 parameters, over torchdiffeq's
    d  microseconds beyond the user's own functions, per evaluation and per product
    e  a call that ends in its first steps, value and gradient, over torchdiffeq's
    f  30 targets 1 .. 1e-8 in one call over the lowest alone: evaluations and products
    g  host reads and own operations, per tried step forward, per product backward
    h  `InterpolatingAdjoint` over torchdiffeq: value and gradient as in a, backward as in c
    i  where the time of a and e goes, by the profiler (which makes small functions look larger)
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import argparse
import cProfile
import platform
import pstats
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from _engine_cases import DTYPE, Decay, Network, RotatedQuadratic
from _engine_counts import counted, microseconds_beyond
from _engine_runs import (
    Run,
    Sample,
    error,
    has_diffrax,
    median,
    ours,
    race,
    ratios,
    solve,
    through_diffrax,
    through_torchdiffeq,
)

import ode_stopping
from ode_stopping import InterpolatingAdjoint
from theory_checks.files import require_output, run_script, write_text

RESULTS = Path(__file__).resolve().parent / "results" / "engine.md"
ROWS = "abcdefghi"
COLUMNS = ["row", "case", "figure", "quartiles", "bar", "goal", "errors", "CPU ms"]
# Parts of a call, the functions that they are and that call one another only across parts.
PARTS = {
    "leaves looked for": ("gradients/tracing.py", "trace_leaves"),
    "derivatives compared with differences": ("gradients/tracing.py", "check_functions"),
    "forward, all": ("crossing/run.py", "find_crossings"),
    "forward, steps": ("solving/stepper.py", "attempt"),
    "forward, J inside the steps": ("crossing/run.py", "_look"),
    "backward, steps": ("gradients/steps.py", "pull_back_path"),
    "backward, autograd's products": ("core/sweep.py", "_products"),
    "evidence": ("gradients/judge.py", "judge"),
}
Line = list[str]
Row = Callable[[int, bool], Iterator[Line]]


def total(sample: Sample) -> float:
    """Seconds of both passes."""
    return sample.total


def backward(sample: Sample) -> float:
    """Seconds of the backward pass."""
    return sample.backward


class Race:
    """Runs of one case taken in turns, and the lines that compare two of them."""

    def __init__(self, case: RotatedQuadratic | Network | Decay, runs: dict[str, Run], rounds: int):
        self.truth = case.truth()
        self.samples = race(runs, rounds)

    def line(
        self,
        row: str,
        case: str,
        own: str,
        peer: str,
        bars: tuple[str, str],
        seconds: Callable[[Sample], float] = total,
    ) -> Line:
        """Ratio of `own` to `peer`, with the errors of both gradients and the times."""
        pair = self.samples[own], self.samples[peer]
        ratio, spread = ratios(*pair, seconds)
        errors = ", ".join(f"{error(each, self.truth):.0e}" for each in pair)
        times = ", ".join(f"{1e3 * median(each, seconds):.4g}" for each in pair)
        return [row, case, f"{ratio:.2f}", spread, *bars, errors, times]


def quadratics(wanted: str, rounds: int, quick: bool) -> Iterator[Line]:
    """Rows a and b, and the first half of h: one race a dimension."""
    bars_a = {10: ("0.85", "0.6"), 100: ("0.85", "0.6"), 1000: ("1.5", "0.8")}
    bars_b = {100: ("14", "6"), 1000: ("1.7", "0.9")}
    # 0.6 and 0.4 of what this engine's predecessor took: 2.15, 2.15 and 1.65.
    bars_h = {10: ("1.3", "0.86"), 100: ("1.3", "0.86"), 1000: ("1.0", "0.66")}
    for dim in (10, 100) if quick else (10, 100, 1000):
        case = RotatedQuadratic(dim)
        runs = {"closures": ours(case.closures), "torchdiffeq": through_torchdiffeq(case.closures)}
        if "a" in wanted:
            runs["objects"] = ours(case.objects)
        with_diffrax = "b" in wanted and dim in bars_b
        if with_diffrax and has_diffrax():
            runs["diffrax"] = through_diffrax(case)
        if "h" in wanted:
            runs["interpolating"] = ours(case.closures, InterpolatingAdjoint())
        # Short runs are noisy on a shared machine, and many of them are soon done.
        outcome = Race(case, runs, rounds if dim == 1000 else 3 * rounds)
        if "a" in wanted:
            for kind in ("closures", "objects"):
                name = f"d = {dim}, {kind}, over torchdiffeq"
                yield outcome.line("a", name, kind, "torchdiffeq", bars_a[dim])
        if "diffrax" in runs:
            yield outcome.line("b", f"d = {dim}, over diffrax", "closures", "diffrax", bars_b[dim])
        elif with_diffrax:
            bars = bars_b[dim]
            yield ["b", f"d = {dim}, over diffrax", "not installed", "", *bars, "", ""]
        if "h" in wanted:
            name = f"d = {dim}, InterpolatingAdjoint over torchdiffeq"
            yield outcome.line("h", name, "interpolating", "torchdiffeq", bars_h[dim])


def networks(wanted: str, rounds: int, quick: bool) -> Iterator[Line]:
    """Row c and the second half of h: backward passes with many parameters."""
    for parameters, bars in ((10**5, ("2", "1")), (10**6, ("2.5", "1"))):
        large = parameters == 10**6
        if large and (quick or "c" not in wanted):
            continue
        case = Network(parameters)
        runs = {"closures": ours(case.closures), "torchdiffeq": through_torchdiffeq(case.closures)}
        if "h" in wanted and not large:
            runs["interpolating"] = ours(case.closures, InterpolatingAdjoint())
        outcome = Race(case, runs, min(rounds, 3) if large else rounds)
        name = f"{parameters:.0e} parameters, backward"
        if "c" in wanted:
            yield outcome.line(
                "c", f"{name} over torchdiffeq's", "closures", "torchdiffeq", bars, backward
            )
        if "interpolating" in runs:
            name += " by InterpolatingAdjoint over torchdiffeq's"
            yield outcome.line("h", name, "interpolating", "torchdiffeq", ("4", "2"), backward)


def overhead(rounds: int, quick: bool) -> Iterator[Line]:
    """Row d."""
    for dim in (10, 100):
        case = RotatedQuadratic(dim)
        forward, back = microseconds_beyond(case, ours(case.closures), 3 * rounds)
        yield [
            "d",
            f"d = {dim}, forward per evaluation",
            f"{forward:.0f} us",
            "",
            "60",
            "30",
            "",
            "",
        ]
        yield ["d", f"d = {dim}, backward per product", f"{back:.0f} us", "", "80", "40", "", ""]


def one_step(rounds: int, quick: bool) -> Iterator[Line]:
    """Row e."""
    case = Decay()
    runs = {"closures": ours(case.closures), "torchdiffeq": through_torchdiffeq(case.closures)}
    outcome = Race(case, runs, 20 * rounds)
    sample = outcome.samples["closures"][-1].result
    assert sample is not None
    steps = f"a call of {sample.stats.accepted} step(s), over torchdiffeq"
    yield outcome.line("e", steps, "closures", "torchdiffeq", ("1.3", "1"))


def several_targets(rounds: int, quick: bool) -> Iterator[Line]:
    """Row f."""
    targets = torch.logspace(0, -8, 30, dtype=DTYPE)
    many, lowest = RotatedQuadratic(50, targets), RotatedQuadratic(50, float(targets[-1]))
    samples = [ours(case.closures)() for case in (many, lowest)]
    errors = ", ".join(
        f"{error([sample], case.truth()):.0e}"
        for sample, case in zip(samples, (many, lowest), strict=True)
    )
    stats = [sample.result.stats for sample in samples if sample.result is not None]
    forward = [each.nfe_forward for each in stats]
    products = [each.vjps or 0 for each in stats]
    for name, (of_many, of_lowest), bars in (
        ("evaluations forward", forward, ("1.35", "1.1")),
        ("products backward", products, ("1.2", "1.1")),
    ):
        case_name = f"30 targets over the lowest, {name} ({of_many}, {of_lowest})"
        times = ", ".join(f"{1e3 * sample.total:.4g}" for sample in samples)
        yield ["f", case_name, f"{of_many / of_lowest:.2f}", "", *bars, errors, times]


def reads_and_operations(rounds: int, quick: bool) -> Iterator[Line]:
    """Row g."""
    case = RotatedQuadratic(100)
    solve(case.closures())  # what is looked up once is not counted
    counts = counted(case.closures())
    # A second run, to a lower target: what one more step costs, without what a call costs.
    longer = counted(RotatedQuadratic(100, 1e-7).closures())
    names, bars = ("host reads", "own operations"), (("2", "1"), ("80", "40"))
    for index, (name, both) in enumerate(zip(names, bars, strict=True)):
        each = counts.forward[index] / counts.tried
        more = longer.forward[index] - counts.forward[index]
        more_each = more / (longer.tried - counts.tried)
        yield ["g", f"{name} a tried step, forward", f"{each:.1f}", "", *both, "", ""]
        yield ["g", f"{name} a further tried step", f"{more_each:.1f}", "", "", "", "", ""]
    reads, operations = counts.backward
    products, accepted = counts.products, counts.accepted
    for name, number in (("host reads", reads), ("own operations", operations)):
        figure = f"{number / products:.2f}; {number / accepted:.1f}"
        yield ["g", f"{name} backward, a product; an accepted step", figure, "", "", "", "", ""]


def where_it_goes(rounds: int, quick: bool) -> Iterator[Line]:
    """Row i."""
    cases = {"two steps": (Decay().closures, 50), "d = 100": (RotatedQuadratic(100).closures, 2)}
    for name, (make, count) in cases.items():
        run = ours(make)
        run()  # what is looked up once
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(count * rounds):
            run()
        profiler.disable()
        stats: Any = pstats.Stats(profiler)
        for part, (file, function) in PARTS.items():
            spent = sum(
                entry[3]
                for (path, _, called), entry in stats.stats.items()
                if path.endswith(file) and called == function
            )
            share = f"{100 * spent / stats.total_tt:.0f} %"
            yield ["i", f"{name}: {part}", share, "", "", "", "", ""]


def lines(wanted: str, rounds: int, quick: bool) -> Iterator[Line]:
    """All lines of the wanted rows, as they come."""
    if set(wanted) & set("abh"):
        yield from quadratics(wanted, rounds, quick)
    if set(wanted) & set("ch"):
        yield from networks(wanted, rounds, quick)
    others: dict[str, Row] = {
        "d": overhead,
        "e": one_step,
        "f": several_targets,
        "g": reads_and_operations,
        "i": where_it_goes,
    }
    for row, measure in others.items():
        if row in wanted:
            yield from measure(rounds, quick)


def machine() -> str:
    """Processor, cores and versions, in a sentence."""
    described = Path("/proc/cpuinfo")
    text = described.read_text(encoding="utf-8") if described.exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    packages = []
    for name in ("torch", "torchdiffeq", "jax", "diffrax"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"{name} not installed")
    model = models[0] if models else platform.machine()
    python = platform.python_version()
    return f"{model}, {os.cpu_count()} cores, one used; Python {python}, {', '.join(packages)}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--repetitions", type=int, default=5, help="at least 2")
    parser.add_argument("--quick", action="store_true", help="small sizes, two repetitions")
    parser.add_argument("--out", type=Path, help=f"default, where all is measured: {RESULTS.name}")
    arguments = parser.parse_args()
    complete = len(arguments.rows) == len(ROWS) and not arguments.quick
    out = arguments.out or (RESULTS if complete else None)
    if out is not None:
        require_output(out)
    torch.set_num_threads(1)
    # Loose tolerances may raise a warning each time; the errors stand in the table.
    warnings.simplefilter("once")
    rounds = 2 if arguments.quick else arguments.repetitions
    print(f"measuring {Path(ode_stopping.__file__).parent}", flush=True)
    table = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    print(*table, sep="\n", flush=True)
    for line in lines("".join(arguments.rows), rounds, arguments.quick):
        table.append("| " + " | ".join(line) + " |")
        print(table[-1], flush=True)
    text = [
        "# Speed of the continuous side",
        "",
        f"By `python benchmarks/engine.py --repetitions {rounds}`: float64, one thread, rtol 1e-6. "
        f"{machine()}. A figure is a ratio of CPU times (ours over the peer's; the median over "
        "interleaved rounds, with quartiles) unless it names a unit. Errors: largest relative "
        "error of a leaf's gradient, ours and the peer's. The times are for orientation; only "
        "ratios are meant to be quoted.",
        "",
        *table,
        "",
    ]
    if out is not None:
        write_text(out, "\n".join(text))
        print(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
