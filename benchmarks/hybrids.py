"""Random hybrid problems against an oracle: what is said of the gradients of `integrate`?

A problem is a flow with events (surfaces that are crossed, known times), resets, perhaps jumps of
the flow at learned times, values at fixed times and an end, all drawn from the seed and the number;
L is a random combination of times of hits, states on both sides of them, states at the fixed times
and at the end. Everything is a leaf: parameters of flow, criteria and resets, targets, x0, t0, the
fixed times, `until`, the times of doses, the breakpoints. The oracle (`_hybrids/oracle.py`) has
neither torch nor the library in it, and no formula of a jump: it runs SciPy's DOP853 with events of
its own and takes differences of whole runs.

The error of a leaf is |g - g*| / max(|g*|, 1/50 of its natural size), the natural size being what
g would be if nothing cancelled; units of state, time and J are drawn. The promise is 50 rtol, at
most 0.1. A leaf is *silently wrong* where its error exceeds the promise and ten times its estimate
(where there is one), and no `GradientAccuracyWarning` or `KinkWarning` came; a gradient is
*accused* where one came in the backward pass and no leaf exceeds the promise; *other hits* where
the run passes through other hits than the oracle's. Problems on which the oracle does not agree
with itself to 1e-6 are dropped and counted, as are those whose hits change under its differences,
are next to each other, or nearly touch; a leaf of which it is not clear to a tenth of the promise
is left out and counted.

    python benchmarks/hybrids.py [--cases 100] [--seed 0] [--evidence LEVEL] [--route NAME]
        [--family NAME] [--jobs 1] [--out rows.jsonl] [--table FILE] [--only N] [--oracle]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from _fuzzing.cases import LEVELS, ROUTES
from _hybrids.drawing import draw
from _hybrids.oracle import Answer, answer
from _hybrids.problem import Hybrid, Unusable
from _hybrids.rows import CRASHED, GRADIENT, ORACLE, OTHER, Leaf, Row, keep, load
from _hybrids.subject import OtherHitsError, Subject
from _hybrids.table import table

from ode_stopping import (
    GradientAccuracyWarning,
    GradientError,
    KinkWarning,
    StoppingError,
    Torchdiffeq,
)
from ode_stopping.solving.solver import LARGEST_PROMISE, PROMISE_PER_RTOL
from theory_checks.files import require_output, run_script, write_text

CLEAR = 0.1
"""The oracle has to know a leaf to this share of the promise."""
METHODS = ("dopri5", "dopri8")
_ROUTE_SHARES = (0.5, 0.2, 0.1, 0.1, 0.1)  # of `ROUTES`, in order
_LONGEST = 500  # letters of a message
_DEFAULT = "default"


def described(seed: int, number: int, evidence: str, route: str | None, family: str | None) -> Row:
    """How the problem of a number is solved; nothing of what comes of it."""
    rng = np.random.default_rng([seed, number, 1_000_000])
    drawn = str(rng.choice(list(ROUTES), p=_ROUTE_SHARES))
    method = str(rng.choice(METHODS))
    rtol, default = float(10 ** rng.uniform(-9, -3)), bool(rng.random() < 0.3)
    if default:
        rtol = Torchdiffeq().tolerances(torch.float64).rtol
    exponents, scaled = rng.uniform(-6, 6, 3), rng.random(3) < 0.4
    scales = tuple(float(10**e) if on else 1.0 for e, on in zip(exponents, scaled, strict=True))
    return Row(
        seed,
        number,
        evidence,
        _chosen(route, family),
        "unusable: not solved",
        route=route or drawn,
        method=method,
        rtol=rtol,
        default=default,
        promise=min(PROMISE_PER_RTOL * rtol, LARGEST_PROMISE),
        scales=scales,
    )


def _chosen(route: str | None, family: str | None) -> str:
    return " ".join(name for name in (family, route) if name is not None)


def run(
    seed: int,
    number: int,
    evidence: str = _DEFAULT,
    route: str | None = None,
    *,
    family: str | None = None,
    oracle_only: bool = False,
) -> Row:
    """Draw a problem, solve it, and hold it against the oracle."""
    begin = time.perf_counter()
    torch.set_num_threads(1)
    row = described(seed, number, evidence, route, family)
    dropped: list[str] = []
    try:
        problem = draw(seed, number, dropped, family=family)
        row = replace(row, family=problem.family)
        truth = answer(problem)
        row = replace(row, hits=len(truth.run.hits), oracle_seconds=time.perf_counter() - begin)
        if oracle_only:
            row = replace(row, outcome=ORACLE, leaves=_leaves(None, truth, {}, math.nan))
        else:
            subject = _subject(row, problem)
            row = judged(row, subject, truth)
    except Unusable as failure:
        row = replace(row, outcome=f"unusable: {failure}")
    return replace(row, dropped=dropped, seconds=time.perf_counter() - begin)


def _subject(row: Row, problem: Hybrid) -> Subject:
    state, clock, value = row.scales
    return Subject(problem, row.method, None if row.default else row.rtol, (state, clock, value))


def judged(row: Row, subject: Subject, truth: Answer) -> Row:
    """The row of a problem whose answer is known."""
    forward: list[warnings.WarningMessage] = []
    backward: list[warnings.WarningMessage] = []
    more: dict[str, Any] = {} if row.evidence == _DEFAULT else {"evidence": row.evidence}
    hits = [(hit.event, hit.count) for hit in truth.run.hits]
    try:
        with _caught(forward):
            solution = subject.solve(ROUTES[row.route], **more)
            row = replace(row, status=str(getattr(solution.status, "name", solution.status)))
            subject.require_same_hits(solution, hits)
            total = subject.total(solution)
        with _caught(backward):
            total.backward()
    except OtherHitsError as failure:
        return replace(row, outcome=OTHER, said=str(failure)[:_LONGEST])
    except (StoppingError, GradientError) as failure:
        return replace(row, outcome=type(failure).__name__, said=str(failure)[:_LONGEST])
    except Exception as failure:  # what the library has no name for
        name = f"{CRASHED}: {type(failure).__name__}"
        return replace(row, outcome=name, said=str(failure)[:_LONGEST])
    evidence = getattr(solution, "evidence", None)
    own = {leaf.name: leaf.error for leaf in getattr(evidence, "leaves", ())}
    estimate = getattr(evidence, "estimate", None)
    whole = math.nan if estimate is None else float(estimate)
    leaves = _leaves(subject, truth, own, whole)
    unclear = [n for n, leaf in leaves.items() if not leaf.clear <= CLEAR * row.promise]
    known = sum(abs(w * v) for (w, _), v in zip(subject.problem.terms, truth.terms, strict=True))
    return replace(
        row,
        outcome=GRADIENT,
        error_of_value=abs(float(total.detach()) - truth.value) / float(known),
        warned=_told(backward),
        told=_told(forward),
        said=" | ".join(str(w.message)[:_LONGEST] for w in (*forward, *backward)),
        leaves={name: leaf for name, leaf in leaves.items() if name not in unclear},
        unclear=unclear,
    )


@contextmanager
def _caught(found: list[warnings.WarningMessage]) -> Iterator[None]:
    """All warnings, put on a list."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    found += caught


def _told(caught: Iterable[warnings.WarningMessage]) -> bool:
    return any(isinstance(w.message, GradientAccuracyWarning | KinkWarning) for w in caught)


def _leaves(
    subject: Subject | None, truth: Answer, own: dict[str, float], whole: float
) -> dict[str, Leaf]:
    """Every leaf held against the oracle, with the library's estimate for it."""
    found = {}
    for name, value in truth.gradients.items():
        exact, size = np.ravel(value), truth.size(name)
        # None says that nothing depends on it.
        grad = None if subject is None else subject.leaves[name].grad
        came = np.zeros_like(exact)
        if subject is not None and grad is not None:
            came = np.ravel(grad.double().numpy()) * subject.unit(name)
        gap = 0.0 if subject is None else float(np.linalg.norm(came - exact))
        error = 0.0 if gap == 0.0 else gap / size if size > 0.0 else math.inf
        named = [e for n, e in own.items() if n == name or n.endswith(f"['{name}']")]
        estimate = named[0] if named else whole
        found[name] = Leaf(
            error,
            estimate,
            float(np.linalg.norm(came)),
            float(np.linalg.norm(exact)),
            truth.natural[name],
            truth.clear(name),
        )
    return found


def study(
    seed: int,
    numbers: Iterable[int],
    *,
    evidence: str = _DEFAULT,
    route: str | None = None,
    family: str | None = None,
    oracle_only: bool = False,
    jobs: int = 1,
    out: Path | None = None,
) -> Iterator[Row]:
    """The rows of problems as they come; those that `out` holds are not run again."""
    known = {} if out is None else load(out)
    wanted = [
        n for n in numbers if Row(seed, n, evidence, _chosen(route, family), "").key not in known
    ]
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    calls = (
        joblib.delayed(run)(seed, n, evidence, route, family=family, oracle_only=oracle_only)
        for n in wanted
    )
    for row in parallel(calls):
        if out is not None:
            keep(out, row)
        yield row


def _show(row: Row) -> None:
    print(f"{row.verdict} ({row.outcome})")
    for name, value in asdict(row).items():
        if name not in ("leaves", "outcome"):
            print(f"  {name}: {value}")
    for name, leaf in row.leaves.items():
        print(f"  {name}: error {leaf.error:.2e}, estimate {leaf.estimate:.2e}, {leaf}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evidence", choices=(_DEFAULT, *LEVELS), default=_DEFAULT)
    parser.add_argument("--route", choices=list(ROUTES), help="default: drawn")
    parser.add_argument("--family", help="draw of this family only")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="rows as JSON lines; goes on where it was")
    parser.add_argument("--table", type=Path, help="where the table is written")
    parser.add_argument("--only", type=int, metavar="N", help="run this one problem and show it")
    parser.add_argument("--oracle", action="store_true", help="the oracle only, no `integrate`")
    parser.add_argument(
        "--most", type=int, metavar="N", help="exit with 1 where more than N are silently wrong"
    )
    return parser.parse_args()


def main() -> None:
    """Run a sample and make the table."""
    options = _options()
    settings: dict[str, Any] = {"evidence": options.evidence, "route": options.route}
    settings |= {"family": options.family, "oracle_only": options.oracle}
    if options.only is not None:
        _show(run(options.seed, options.only, **settings))
        return
    for path in (options.out, options.table):
        if path is not None:
            require_output(path)
    rows = [] if options.out is None else list(load(options.out).values())
    numbers = range(options.cases)
    for row in study(options.seed, numbers, **settings, jobs=options.jobs, out=options.out):
        rows.append(row)
        if row.verdict in ("silently wrong", "accused", OTHER, "crashed"):
            leaf = row.leaves.get(row.worst)
            error = "" if leaf is None else f"{row.worst} {leaf.error:.1e} "
            print(f"{row.number} {row.family}: {row.verdict}, {error}{row.said[:80]}", flush=True)
    if not rows:
        return
    rows.sort(key=lambda row: (row.seed, row.evidence, row.number))
    text = "\n".join([*table(rows), ""])
    print(text)
    if options.table is not None:
        write_text(options.table, text)
    if options.most is not None and sum(bool(row.silent) for row in rows) > options.most:
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
