"""Random stopping times against an oracle: what is said of their gradients, leaf by leaf?

A case is a flow, a criterion, leaves in both, in x0, the target and t0, scales, a method, a
tolerance and a route, all drawn from the seed and the number of the case. The oracle
(`_fuzzing/oracle.py`) has neither torch nor the library in it. The target is J at a random point of
the oracle's path at which J falls below all that it was before, clear of a graze (dips before T;
one that is shallow behind T is let be, and may be refused as DEGENERATE).

The error of a leaf is |g - g*| / max(|g*|, 1/50 of its natural size), the natural size being what g
would be if nothing cancelled (int |F_p^T lam| dt for a parameter, or int |F_p|^T |lam| dt where
nothing arrives at T; max |lam| for x0, max sum_i |lam_i F_i| for t0); the library judges by the
same floor. The promise is 50 rtol, at most 0.1. A leaf is *silently wrong* where its error exceeds
the promise and ten times its estimate, and
no `GradientAccuracyWarning` came; a gradient (one backward call) is *accused* where one came and no
leaf exceeds the promise. Cases on which the oracle itself is not clear to a tenth of the promise
are dropped, and counted.

    python benchmarks/fuzz.py [--cases 100] [--seed 0] [--evidence standard] [--what time]
        [--jumps] [--methods dopri5 dopri8] [--dtypes float64] [--cost] [--jobs 2]
        [--out rows.jsonl] [--table FILE] [--only N]
    python benchmarks/fuzz.py --all [--seed 0] [--jobs 2] [--out rows.jsonl]

`--out` keeps a row a case, and a run that was interrupted goes on where it was; samples of several
settings may share a file, and `--cases 0` makes the table of what a file holds. `--only` runs one
case and shows it whole. `--all` runs the samples of the stored table (an hour and a half of one
core).
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from _fuzzing.cases import (
    COTANGENTS,
    DTYPES,
    LEVELS,
    METHODS,
    ROUTES,
    SAMPLES,
    Case,
    Settings,
    draw,
)
from _fuzzing.operations import TORCH
from _fuzzing.oracle import Answer, answer
from _fuzzing.path import Unusable
from _fuzzing.rows import CRASHED, GRADIENT, Leaf, Row, keep, load
from _fuzzing.table import head, table, title
from torch import Tensor

from ode_stopping import (
    GradientAccuracyWarning,
    GradientError,
    GradientRoute,
    StoppingError,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)
from theory_checks.files import require_output, run_script, write_text

RESULTS = Path(__file__).parent / "results" / "fuzz.md"
FLOOR = 1 / 50
"""Below this share of its natural size a gradient is judged by that share."""
CLEAR = 0.1
"""The oracle has to know a leaf to this share of the promise."""
_LONGEST = 500  # letters of a message
_REPEATS = 3
_MAX_STEPS = 20_000


class Subject:
    """A case in torch: its leaves, and what `stopping_time` takes.

    Args:
        case: The case.
        altered: What flow and criterion see in the place of some leaves, by name (planted errors).
    """

    def __init__(
        self, case: Case, *, altered: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> None:
        problem, dtype = case.problem, DTYPES[case.dtype]
        self.case = case
        p: dict[str, Tensor] = {
            name: torch.tensor(v, dtype=dtype) for name, v in problem.constants.items()
        }
        self.leaves: dict[str, Tensor] = {}
        for name, value in problem.leaves.items():
            p[name] = self.leaves[name] = torch.tensor(value, dtype=dtype, requires_grad=True)
        numbers = {"t0": problem.t0, "target": problem.target}
        for name, number in numbers.items():
            self.leaves[name] = torch.tensor(number, dtype=torch.float64, requires_grad=True)
        self.leaves["x0"] = torch.tensor(problem.x0, dtype=dtype, requires_grad=True)
        self.max_time = case.near + 10 * (case.near - problem.t0)
        self.solver = Torchdiffeq(
            method=case.method, rtol=None if case.default else case.rtol, max_steps=_MAX_STEPS
        )

        def seen() -> dict[str, Tensor]:
            return p | {name: change(p[name]) for name, change in (altered or {}).items()}

        def side(t: Tensor, x: Tensor) -> Any:
            if problem.flow.switch is None:
                return None
            return 2.0 * (problem.switch(TORCH, t, x, p) > 0).to(dtype) - 1.0

        def flow(t: Tensor, x: Tensor) -> Tensor:
            return problem.velocity(TORCH, t, x, seen(), side(t, x))

        def criterion(t: Tensor, x: Tensor) -> Tensor:
            return problem.measure(TORCH, t, x, seen(), side(t, x))

        self.flow, self.criterion = flow, criterion

    def solve(self, evidence: str, gradient: GradientRoute | None = None) -> StoppingResult:
        """The run, forward."""
        leaves = self.leaves
        return stopping_time(
            self.flow,
            leaves["x0"],
            self.criterion,
            leaves["target"],
            t0=leaves["t0"],
            max_time=self.max_time,
            solver=self.solver,
            gradient=gradient or ROUTES[self.case.route],
            evidence=evidence,  # type: ignore[arg-type]
        )

    def backward(self, result: StoppingResult) -> None:
        """One backward pass of the cotangents."""
        case, x = self.case, result.state
        assert isinstance(x, Tensor)
        total = torch.zeros((), dtype=torch.float64)
        if case.on_time:
            total = case.on_time * result.time
        if case.on_state.any():
            total = total + (torch.tensor(case.on_state, dtype=x.dtype) * x).sum()
        total.backward()


def run(settings: Settings, number: int, gradient: GradientRoute | None = None) -> Row:
    """Draw a case, solve it, and hold it against the oracle.

    Args:
        settings: Of the sample.
        number: Of the case.
        gradient: A route in the place of the one that was drawn.
    """
    begin = time.perf_counter()
    torch.set_num_threads(1)
    try:
        case = draw(settings, number)
        row = _described(settings, number, case)
        truth = answer(case.problem, case.near, case.on_time, case.on_state)
        row = judged(row, case, truth, gradient)
    except Unusable as failure:
        row = Row(settings, number, f"unusable: {failure}")
    return replace(row, seconds=time.perf_counter() - begin)


def _described(settings: Settings, number: int, case: Case) -> Row:
    problem = case.problem
    return Row(
        settings,
        number,
        "unusable: not solved",
        flow=case.flow,
        criterion=case.criterion,
        route=case.route,
        method=case.method,
        dtype=case.dtype,
        rtol=case.rtol,
        default=case.default,
        promise=case.promise,
        scales=(problem.state, problem.time, problem.value),
        margin=case.margin,
    )


def judged(row: Row, case: Case, truth: Answer, gradient: GradientRoute | None = None) -> Row:
    """The row of a case whose answer is known."""
    for name, value in truth.gradients.items():
        size = max(float(np.linalg.norm(np.ravel(value))), FLOOR * truth.natural[name])
        if not truth.difference[name] <= CLEAR * case.promise * size:
            return replace(row, outcome="unusable: the oracle is not clear")
    row = replace(row, slope=abs(truth.rate) / truth.rate_scale, switches=truth.switches)
    subject = Subject(case)
    forward: list[warnings.WarningMessage] = []
    backward: list[warnings.WarningMessage] = []
    try:
        with _caught(forward):
            result = subject.solve(row.settings.evidence, gradient)
        if not bool(result.reached) or result.evidence is None:
            return replace(row, outcome=result.status.name)
        with _caught(backward):
            subject.backward(result)
    except (StoppingError, GradientError) as failure:
        return replace(row, outcome=type(failure).__name__, said=str(failure)[:_LONGEST])
    except Exception as failure:  # what the library has no name for
        name = f"{CRASHED}: {type(failure).__name__}"
        return replace(row, outcome=name, said=str(failure)[:_LONGEST])
    row = replace(
        row,
        outcome=GRADIENT,
        error_of_time=abs(float(result.time.detach()) - truth.time)
        / (truth.time - case.problem.t0),
        warned=_accuracy(backward),
        grazing=_accuracy(forward),
        said=" | ".join(str(w.message)[:_LONGEST] for w in (*forward, *backward)),
        leaves=_leaves(subject, result, truth),
        figures=dict(result.evidence.figures),
        taken=result.stats.route or "",
    )
    return replace(row, cost=_cost(case, row.settings.evidence)) if row.settings.cost else row


@contextmanager
def _caught(found: list[warnings.WarningMessage]) -> Iterator[None]:
    """All warnings, put on a list."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found += caught


def _leaves(subject: Subject, result: StoppingResult, truth: Answer) -> dict[str, Leaf]:
    """Every leaf held against the oracle, with the library's estimate for it."""
    own = {leaf.name: leaf.error for leaf in result.evidence.leaves}
    whole = math.inf if result.evidence.estimate is None else result.evidence.estimate
    return {
        name: _leaf(tensor, truth, name, own.get(name, own.get(f"p['{name}']", whole)))
        for name, tensor in subject.leaves.items()
    }


def _accuracy(caught: Iterable[warnings.WarningMessage]) -> bool:
    return any(isinstance(w.message, GradientAccuracyWarning) for w in caught)


def _leaf(tensor: Tensor, truth: Answer, name: str, estimate: float) -> Leaf:
    exact = np.ravel(truth.gradients[name])
    # None says that nothing depends on it.
    grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    found = np.ravel(grad.double().numpy())
    gap, norm = float(np.linalg.norm(found - exact)), float(np.linalg.norm(exact))
    size = max(norm, FLOOR * truth.natural[name])
    error = 0.0 if gap == 0.0 else gap / size if size > 0.0 else math.inf
    return Leaf(error, estimate, float(np.linalg.norm(found)), norm, truth.natural[name])


def _cost(case: Case, evidence: str) -> float:
    """CPU time of value + gradient over that with evidence="light", the least of each."""

    def seconds(level: str) -> float:
        subject = Subject(case)
        begin = time.process_time()
        subject.backward(subject.solve(level))
        return time.process_time() - begin

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = [(seconds(evidence), seconds("light")) for _ in range(_REPEATS)]
    return min(pair[0] for pair in pairs) / min(pair[1] for pair in pairs)


def study(
    settings: Settings, numbers: Iterable[int], *, jobs: int = 1, out: Path | None = None
) -> Iterator[Row]:
    """The rows of cases as they come; those that `out` holds are not run again."""
    known = {} if out is None else load(out)
    wanted = [n for n in numbers if Row(settings, n, "").key not in known]
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    for row in parallel(joblib.delayed(run)(settings, number) for number in wanted):
        if out is not None:
            keep(out, row)
        yield row


def _show(row: Row) -> None:
    print(f"{row.verdict} ({row.outcome})")
    for name, value in asdict(row).items():
        if name not in ("leaves", "settings", "number", "outcome"):
            print(f"  {name}: {value}")
    for name, leaf in row.leaves.items():
        print(f"  {name}: error {leaf.error:.2e}, estimate {leaf.estimate:.2e}, {leaf}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evidence", choices=LEVELS, default="standard")
    parser.add_argument("--what", choices=COTANGENTS, default="time")
    parser.add_argument("--jumps", action="store_true", help="flows that jump in the state")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=Settings.methods)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=Settings.dtypes)
    parser.add_argument("--route", choices=list(ROUTES), help="default: drawn")
    parser.add_argument("--cost", action="store_true", help="measure it over light")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="rows as JSON lines; goes on where it was")
    parser.add_argument("--all", action="store_true", help="the samples of the stored table")
    parser.add_argument(
        "--table", type=Path, help=f"where the table is written; with --all: {RESULTS.name}"
    )
    parser.add_argument("--only", type=int, metavar="N", help="run this one case and show it")
    parser.add_argument(
        "--most",
        type=int,
        metavar="N",
        help="exit with 1 where more than N gradients are silently wrong; those of "
        "evidence=light and of flows that jump are not counted",
    )
    return parser.parse_args()


def _samples(options: argparse.Namespace) -> list[tuple[Settings, int]]:
    """What is to be run, and how many cases of each."""
    if options.all:
        return [(replace(each, seed=each.seed + options.seed), n) for each, n in SAMPLES]
    settings = Settings(
        seed=options.seed,
        evidence=options.evidence,
        what=options.what,
        jumps=options.jumps,
        methods=tuple(options.methods),
        dtypes=tuple(options.dtypes),
        route=options.route,
        cost=options.cost,
    )
    return [(settings, options.cases)]


def main() -> None:
    """Run a sample, or all, and make the table."""
    options = _options()
    samples = _samples(options)
    if options.only is not None:
        _show(run(samples[0][0], options.only))
        return
    written = options.table or (RESULTS if options.all else None)
    for path in (options.out, written):
        if path is not None:
            require_output(path)
    rows = [] if options.out is None else list(load(options.out).values())
    for settings, cases in samples:
        for row in study(settings, range(cases), jobs=options.jobs, out=options.out):
            rows.append(row)
            if row.verdict in ("silently wrong", "accused"):
                print(f"{title(settings)}, {row.number}: {row.verdict}, {row.worst}", flush=True)
    if not rows:
        return
    rows.sort(key=lambda row: (_rank(row.settings, samples), title(row.settings), row.number))
    text = "\n".join([*head(rows), *table(rows), ""])
    print(text)
    if written is not None:
        write_text(written, text)
    silent = [row for row in rows if row.silent and _is_promised(row.settings)]
    if options.most is not None and len(silent) > options.most:
        raise SystemExit(1)


def _is_promised(settings: Settings) -> bool:
    """Whether errors are to be seen: light looks at by-products only, jumps have to be named."""
    return not settings.jumps and settings.evidence != "light"


def _rank(settings: Settings, samples: list[tuple[Settings, int]]) -> int:
    """Place of a sample among those that were asked for; others that a file holds come last."""
    known = [each for each, _ in samples]
    return known.index(settings) if settings in known else len(known)


if __name__ == "__main__":
    run_script(main)
