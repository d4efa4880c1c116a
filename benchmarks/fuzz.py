"""Random stopping times against an oracle: what is said of their gradients, leaf by leaf?

A case is a flow, a criterion, leaves in both, in x0, the target and t0, scales, a method, a
tolerance and a route, all drawn from the seed and the number of the case. The oracle
(`_fuzz_oracle.py`) has neither torch nor the library in it. The target is J at a random point of
the oracle's path at which J falls below all that it was before, clear of a graze.

The error of a leaf is |g - g*| / max(|g*|, 1e-3 of its natural size), the natural size being what g
would be if nothing cancelled (int |F_p^T lam| dt for a parameter, max |lam| for x0,
max sum_i |lam_i F_i| for t0); the library judges by the same floor. The promise is 50 rtol, at most
0.1. A leaf is *silently wrong* where its error exceeds the promise and ten times its estimate, and
no `GradientAccuracyWarning` came; a gradient (one backward call) is *accused* where one came and no
leaf exceeds the promise. Cases on which the oracle itself is not clear to a tenth of the promise
are dropped, and counted.

    python benchmarks/fuzz.py [--cases 100] [--seed 0] [--evidence standard] [--what time]
        [--jumps] [--methods dopri5 dopri8] [--dtypes float64] [--cost] [--jobs 2]
        [--out rows.jsonl] [--table FILE] [--only N]

`--out` keeps a row a case, and a run that was interrupted goes on where it was; samples of several
settings may share a file, and `--cases 0` makes the table of what a file holds. `--only` runs one
case and shows it whole.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from _fuzz_families import CRITERIA, FLOWS, JUMPING, TORCH
from _fuzz_oracle import Answer, Problem, Unusable, answer, crossing_rate, explore, values_along
from torch import Tensor

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientAccuracyWarning,
    GradientError,
    GradientRoute,
    InterpolatingAdjoint,
    StepAdjoint,
    StoppingError,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.solving.solver import LARGEST_PROMISE, PROMISE_PER_RTOL
from theory_checks.files import require_output, run_script, write_text

ROUTES: dict[str, GradientRoute] = {
    "StepAdjoint": StepAdjoint(),
    "InterpolatingAdjoint": InterpolatingAdjoint(),
    "DirectAdjoint": DirectAdjoint(),
    "ForwardSensitivity": ForwardSensitivity(),
    "BacksolveAdjoint": BacksolveAdjoint(),
}
_ROUTE_SHARES = (0.5, 0.2, 0.1, 0.1, 0.1)
DTYPES = {"float64": torch.float64, "float32": torch.float32}
METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
LEVELS = ("light", "standard", "thorough")
COTANGENTS = ("time", "state", "both")
FLOOR = 1e-3
"""Below this share of its natural size a gradient is judged by that share."""
CLEAR = 0.1
"""The oracle has to know a leaf to this share of the promise."""
_GRID = 4001
_TRIES = 40
_LOW_ORDER_RTOL = 1e-5  # fehlberg2 at 1e-8 would take a million steps
_SINGLE_RTOL = 3e-5
_LEAST_MARGIN = 0.02  # of dips of J before T, relative to how far it rose again
_LEAST_RATE = 0.02  # of J'(T), relative to its terms
_REPEATS = 3
_MAX_STEPS = 20_000
_GRADIENT = "gradient"


@dataclass(frozen=True)
class Settings:
    """What a sample is of.

    Attributes:
        seed: Of the sample.
        evidence: Level of the evidence.
        what: Where the cotangents are: "time", "state" or "both".
        jumps: Whether the flows jump in the state.
        methods: Among which the method is drawn.
        dtypes: Among which the dtype is drawn.
        route: Name of the route; None: drawn.
        cost: Whether the cost over evidence="light" is measured.
    """

    seed: int = 0
    evidence: str = "standard"
    what: str = "time"
    jumps: bool = False
    methods: tuple[str, ...] = ("dopri5", "dopri8")
    dtypes: tuple[str, ...] = ("float64",)
    route: str | None = None
    cost: bool = False


@dataclass(frozen=True)
class Case:
    """One problem and how it is solved.

    Attributes:
        flow: Name of the family.
        criterion: Name of the criterion.
        method: Method of torchdiffeq.
        rtol: Tolerance.
        default: Whether that is the default of the dtype, and is not passed.
        route: Name of the route.
        dtype: Of the state and the leaves.
        problem: Flow and criterion with numbers, and the target.
        near: T on the oracle's path.
        margin: Of the closest dip of J before T, relative to how far it rose again; inf: none.
        on_time: Cotangent on T, in 1 / time.
        on_state: Cotangent on x_T, in 1 / state, shape (n,).
    """

    flow: str
    criterion: str
    method: str
    rtol: float
    default: bool
    route: str
    dtype: str
    problem: Problem
    near: float
    margin: float
    on_time: float
    on_state: Any

    @property
    def promise(self) -> float:
        """50 rtol, at most 0.1."""
        return min(PROMISE_PER_RTOL * self.rtol, LARGEST_PROMISE)


@dataclass(frozen=True)
class Leaf:
    """One tensor of one gradient.

    Attributes:
        error: Relative.
        estimate: What the library says of it: its own entry where there is one, else the whole.
        norm: Of what came.
        truth: Norm of the oracle's.
        natural: Its natural size.
    """

    error: float
    estimate: float
    norm: float
    truth: float
    natural: float


@dataclass(frozen=True)
class Row:
    """What came of one case; all that is stored.

    Attributes:
        settings: Of the sample.
        number: Of the case.
        outcome: "gradient", the name of an exception, of a status, or "unusable: ...", where there
            is no problem to compare with.
        flow: Name of the family.
        criterion: Name of the criterion.
        route: Name of the route.
        method: Method of torchdiffeq.
        dtype: Of the state.
        rtol: Tolerance.
        default: Whether that is the default of the dtype.
        promise: Relative error up to which nothing is said.
        scales: Of state, time and J.
        margin: Of the closest dip of J before T.
        slope: |J'(T)| over its terms.
        switches: How often the flow changed its formula.
        error_of_time: |T - T*| / (T* - t0).
        warned: Whether a `GradientAccuracyWarning` came in the backward pass.
        grazing: Whether one came in the forward run (a near graze).
        said: First words of the warnings or of the exception.
        leaves: By name.
        figures: Of the evidence.
        taken: Route whose gradient it is, in the end.
        cost: CPU time of value + gradient over that with evidence="light"; None: not measured.
        seconds: Of all, oracle included.
    """

    settings: Settings
    number: int
    outcome: str
    flow: str = ""
    criterion: str = ""
    route: str = ""
    method: str = ""
    dtype: str = ""
    rtol: float = math.nan
    default: bool = False
    promise: float = math.nan
    scales: tuple[float, ...] = ()
    margin: float = math.inf
    slope: float = math.nan
    switches: int = 0
    error_of_time: float = math.nan
    warned: bool = False
    grazing: bool = False
    said: str = ""
    leaves: dict[str, Leaf] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    taken: str = ""
    cost: float | None = None
    seconds: float = 0.0

    @property
    def usable(self) -> bool:
        """Whether there was something to compare with."""
        return not self.outcome.startswith("unusable")

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient came."""
        return self.outcome == _GRADIENT

    @property
    def spoken(self) -> bool:
        """Whether there was any warning of the gradient."""
        return self.warned or self.grazing

    @property
    def bad(self) -> list[str]:
        """Leaves beyond the promise; a NaN counts."""
        return [name for name, leaf in self.leaves.items() if not leaf.error <= self.promise]

    @property
    def silent(self) -> list[str]:
        """Leaves that are wrong beyond promise and ten estimates, without a warning."""
        if not self.has_gradient or self.spoken:
            return []
        leaves = self.leaves
        return [name for name in self.bad if not leaves[name].error <= 10 * leaves[name].estimate]

    @property
    def good(self) -> bool:
        """A gradient all of whose leaves keep the promise."""
        return self.has_gradient and not self.bad

    @property
    def accused(self) -> bool:
        """A good gradient that was warned of."""
        return self.good and self.warned

    @property
    def verdict(self) -> str:
        """One word for the gradient."""
        if not self.has_gradient:
            return "refused" if self.usable else "unusable"
        if self.silent:
            return "silently wrong"
        if self.bad:
            return "warned" if self.spoken else "beyond the promise"
        return "accused" if self.warned else "right"

    @property
    def worst(self) -> str:
        """Name of the worst leaf."""

        def error(name: str) -> float:
            found = self.leaves[name].error
            return found if found == found else math.inf

        return max(self.leaves, key=error, default="")

    @property
    def key(self) -> str:
        """Of the settings and the number."""
        return json.dumps([asdict(self.settings), self.number], sort_keys=True)


def draw(settings: Settings, number: int) -> Case:
    """The case of a number.

    Raises:
        Unusable: No target was found in as many tries as are made.
    """
    reason = "no target"
    for attempt in range(_TRIES):
        rng = np.random.default_rng([settings.seed, number, int(settings.jumps), attempt])
        try:
            return _drawn(settings, rng)
        except Unusable as failure:
            reason = str(failure)
    raise Unusable(reason)


def _drawn(settings: Settings, rng: np.random.Generator) -> Case:
    families = JUMPING if settings.jumps else FLOWS
    family = str(rng.choice(list(families)))
    flow = families[family](rng)
    kinds = [k for k in CRITERIA if k != "speed" or not settings.jumps]  # it would jump itself
    kind = str(rng.choice(kinds))
    criterion = CRITERIA[kind](rng, len(flow.x0))
    scales = [1.0, 1.0, 1.0]
    for index in range(3):
        exponent = rng.uniform(-6, 6)
        if rng.random() < 0.4:
            scales[index] = float(10**exponent)
    exponent, is_default = rng.uniform(-8, -2), bool(rng.random() < 0.3)
    route = settings.route or str(rng.choice(list(ROUTES), p=_ROUTE_SHARES))
    dtype = settings.dtypes[int(rng.integers(1000)) % len(settings.dtypes)]
    method = settings.methods[int(rng.integers(1000)) % len(settings.methods)]
    lowest = _SINGLE_RTOL if dtype == "float32" else 1e-8
    if method not in ("dopri5", "dopri8"):
        lowest, is_default = max(lowest, _LOW_ORDER_RTOL), False
    rtol = max(float(10**exponent), lowest)
    if is_default:
        rtol = Torchdiffeq().tolerances(DTYPES[dtype]).rtol
    held = np.float32 if dtype == "float32" else np.float64

    def rounded(value: Any) -> Any:
        return np.asarray(value, dtype=held).astype(float)

    problem = Problem(
        flow=flow,
        criterion=criterion,
        state=scales[0],
        time=scales[1],
        value=scales[2],
        leaves={name: rounded(v) for name, v in (flow.leaves | criterion.leaves).items()},
        constants={name: rounded(v) for name, v in flow.constants.items()},
        x0=rounded(scales[0] * flow.x0),
        t0=float(rng.uniform(-1, 1)) * scales[1] if rng.random() < 0.7 else 0.0,
    )
    problem, near, margin = _with_target(problem, rng)
    weights = rng.standard_normal(len(problem.x0)) / scales[0]
    on_time = 0.0 if settings.what == "state" else 1.0 / scales[1]
    on_state = weights if settings.what != "time" else np.zeros_like(weights)
    return Case(
        family,
        kind,
        method,
        rtol,
        is_default,
        route,
        dtype,
        problem,
        near,
        margin,
        on_time,
        on_state,
    )


def _with_target(problem: Problem, rng: np.random.Generator) -> tuple[Problem, float, float]:
    """J or -J, and a value that it falls to for the first time at a random point of the path."""
    path = explore(problem)
    latest = min(problem.end, path.parts[-1][1])
    times = np.linspace(problem.t0, latest, _GRID)
    values = values_along(problem, path, times)
    if not np.isfinite(values).all():
        raise Unusable("J is not finite")
    for sign in rng.permutation([1.0, 1.0, -1.0]):
        falling = sign * values
        lowest = np.minimum.accumulate(falling)
        first = np.flatnonzero(falling[1:] < lowest[:-1]) + 1
        first = first[first >= _GRID // 25]
        rng.shuffle(first)
        for index in first[:10]:
            margin = _margin(falling, index)
            share = float(rng.random())
            if margin < _LEAST_MARGIN:
                continue
            near = float(times[index] - share * (times[index] - times[index - 1]))
            found = replace(problem, value=sign * problem.value)
            target = float(values_along(found, path, np.array([near]))[0])
            if not target < lowest[index - 1]:
                continue
            state, side = path.at(np.array([near]), len(problem.x0))
            slope, terms = crossing_rate(found, near, state[:, 0], float(side[0]))
            if -slope > _LEAST_RATE * terms:
                return replace(found, target=target), near, margin
    raise Unusable("no target")


def _margin(values: Any, index: int) -> float:
    """Of the dips before a point: how far above it, over how far J rose behind; the smallest."""
    before = values[: index + 1]
    dips = np.flatnonzero((before[1:-1] < before[:-2]) & (before[1:-1] <= before[2:])) + 1
    if not len(dips):
        return math.inf
    behind = np.maximum.accumulate(before[::-1])[::-1]
    return float(((before[dips] - before[-1]) / (behind[dips] - before[dips] + 1e-300)).min())


class Subject:
    """A case in torch: its leaves, and what `stopping_time` takes."""

    def __init__(self, case: Case) -> None:
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

        def side(t: Tensor, x: Tensor) -> Any:
            if problem.flow.switch is None:
                return None
            return 2.0 * (problem.switch(TORCH, t, x, p) > 0).to(dtype) - 1.0

        def flow(t: Tensor, x: Tensor) -> Tensor:
            return problem.velocity(TORCH, t, x, p, side(t, x))

        def criterion(t: Tensor, x: Tensor) -> Tensor:
            return problem.measure(TORCH, t, x, p, side(t, x))

        self.flow, self.criterion = flow, criterion

    def solve(self, evidence: str, gradient: GradientRoute | None = None) -> StoppingResult:
        """The run, forward."""
        case, leaves = self.case, self.leaves
        return stopping_time(
            self.flow,
            leaves["x0"],
            self.criterion,
            leaves["target"],
            t0=leaves["t0"],
            max_time=case.near + 10 * (case.near - case.problem.t0),
            solver=Torchdiffeq(
                method=case.method, rtol=None if case.default else case.rtol, max_steps=_MAX_STEPS
            ),
            gradient=gradient or ROUTES[case.route],
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
    subject = Subject(case)
    row = replace(row, slope=abs(truth.rate) / truth.rate_scale, switches=truth.switches)
    with warnings.catch_warnings(record=True) as forward:
        warnings.simplefilter("always")
        try:
            result = subject.solve(row.settings.evidence, gradient)
        except (StoppingError, GradientError) as failure:
            return replace(row, outcome=type(failure).__name__, said=str(failure)[:200])
    if not bool(result.reached) or result.evidence is None:
        return replace(row, outcome=result.status.name)
    with warnings.catch_warnings(record=True) as backward:
        warnings.simplefilter("always")
        try:
            subject.backward(result)
        except (StoppingError, GradientError) as failure:
            return replace(row, outcome=type(failure).__name__, said=str(failure)[:200])
    evidence = result.evidence
    span = truth.time - case.problem.t0
    messages = [str(w.message) for w in (*forward, *backward)]
    row = replace(
        row,
        outcome=_GRADIENT,
        error_of_time=abs(float(result.time.detach()) - truth.time) / span,
        warned=_accuracy(backward),
        grazing=_accuracy(forward),
        said=" | ".join(message[:200] for message in messages),
        figures=dict(evidence.figures),
        taken=result.stats.route or "",
    )
    own = {leaf.name: leaf.error for leaf in evidence.leaves}
    whole = math.inf if evidence.estimate is None else evidence.estimate
    leaves = {}
    for name, tensor in subject.leaves.items():
        known = own.get(name, own.get(f"p['{name}']", whole))
        leaves[name] = _leaf(tensor, truth, name, known)
    row = replace(row, leaves=leaves)
    return replace(row, cost=_cost(case, row.settings.evidence)) if row.settings.cost else row


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


def load(path: Path) -> dict[str, Row]:
    """Stored rows by their key; a line that was cut off is left out."""
    rows: dict[str, Row] = {}
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            held = json.loads(line)
            settings = held.pop("settings")
            for name in ("methods", "dtypes"):
                settings[name] = tuple(settings[name])
            leaves = {name: Leaf(**leaf) for name, leaf in held.pop("leaves").items()}
            scales = tuple(held.pop("scales"))
            row = Row(settings=Settings(**settings), leaves=leaves, scales=scales, **held)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        rows[row.key] = row
    return rows


def study(
    settings: Settings, numbers: Iterable[int], *, jobs: int = 1, out: Path | None = None
) -> Iterator[Row]:
    """The rows of cases as they come; those that `out` holds are not run again."""
    known = {} if out is None else load(out)
    wanted = [n for n in numbers if Row(settings, n, "").key not in known]
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    for row in parallel(joblib.delayed(run)(settings, number) for number in wanted):
        if out is not None:
            with out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(row)) + "\n")
        yield row


def counts(rows: Sequence[Row]) -> dict[str, str]:
    """What is counted, over rows of one sample."""
    usable = [row for row in rows if row.usable]
    gradients = [row for row in usable if row.has_gradient]
    leaves = sum(len(row.leaves) for row in gradients)
    good = [row for row in gradients if row.good]
    bad = [row for row in gradients if not row.good]
    silent = [row for row in gradients if row.silent]
    bad_leaves = sum(len(row.bad) for row in bad)
    beyond = [row for row in gradients if any(_beyond(row, leaf) for leaf in row.leaves.values())]
    default = [row for row in gradients if row.default]
    refused = Counter(row.outcome for row in usable if not row.has_gradient)
    dropped = Counter(row.outcome for row in rows if not row.usable)
    unwarned = [row for row in bad if not row.spoken]
    found = {
        "cases; without an oracle": f"{len(rows)}; {_listed(dropped)}",
        "refused by name": f"{_listed(refused)}",
        "gradients; leaves": f"{len(gradients)}; {leaves}",
        "right, nothing said": f"{sum(not row.warned for row in good)}",
        "wrong (a leaf beyond the promise) and warned": f"{sum(row.spoken for row in bad)}",
        "wrong, unwarned, within ten estimates": f"{sum(not row.silent for row in unwarned)}",
        "**silently wrong**: gradients; leaves; of the leaves that are wrong": (
            f"**{len(silent)}**; {sum(len(row.silent) for row in silent)}; "
            f"{_share(sum(len(row.silent) for row in silent), bad_leaves)}"
        ),
        "**accused**: of the good ones": (
            f"**{sum(row.accused for row in good)}** of {len(good)}, "
            f"{_share(sum(row.accused for row in good), len(good))}"
        ),
        "good, and told of a near graze": f"{sum(row.grazing for row in good)}",
        "beyond 50 rtol": (
            f"{len(beyond)} of {len(gradients)}, {_share(len(beyond), len(gradients))}"
        ),
        "the same at the default tolerance": (
            f"{sum(row in beyond for row in default)} of {len(default)}, "
            f"{_share(sum(row in beyond for row in default), len(default))}"
        ),
    }
    ratios = [
        leaf.estimate / leaf.error
        for row in gradients
        for leaf in row.leaves.values()
        if leaf.error > row.rtol and math.isfinite(leaf.estimate) and math.isfinite(leaf.error)
    ]
    if ratios:
        low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
        found["estimate / error of a leaf that is above rtol, 5, 50, 95 %"] = (
            f"{low:.2g}, {middle:.2g}, {high:.2g}"
        )
    costs = [row.cost for row in gradients if row.cost is not None]
    if costs:
        of_default = [row.cost for row in default if row.cost is not None] or [math.nan]
        found["cost over light, median and mean; at the default tolerance"] = (
            f"{statistics.median(costs):.2f}, {statistics.fmean(costs):.2f}; "
            f"{statistics.median(of_default):.2f}, {statistics.fmean(of_default):.2f}"
        )
    return found


def _beyond(row: Row, leaf: Leaf) -> bool:
    return not leaf.error <= PROMISE_PER_RTOL * row.rtol


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _listed(found: Counter[str]) -> str:
    names = ", ".join(f"{n} {name.removeprefix('unusable: ')}" for name, n in found.most_common())
    return f"{found.total()} ({names})" if found else "0"


def table(rows: Sequence[Row]) -> list[str]:
    """Counts of every sample side by side, and the cases that are to be looked at."""
    samples: dict[Settings, list[Row]] = {}
    for row in rows:
        samples.setdefault(row.settings, []).append(row)
    columns = [(title(settings), counts(group)) for settings, group in samples.items()]
    names = list(dict.fromkeys(name for _, found in columns for name in found))
    lines = ["| | " + " | ".join(head for head, _ in columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for name in names:
        cells = [found.get(name, "") for _, found in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for settings, group in samples.items():
        lines += ["", f"## {title(settings)}", ""]
        lines += [f"`python benchmarks/fuzz.py {command(settings)} --cases {len(group)}`", ""]
        for name, of in (("family", "flow"), ("route", "route"), ("method", "method")):
            lines += [*_by(group, name, of), ""]
        lines += _cases(group)
    return lines


def _by(rows: Sequence[Row], name: str, of: str) -> list[str]:
    lines = [
        f"| {name} | gradients | refused | wrong and warned | wrong, unwarned | silently wrong | "
        "accused | median error / rtol |",
        "| --- |" + " --- |" * 7,
    ]
    usable = [row for row in rows if row.usable]
    for value in sorted({getattr(row, of) for row in usable}):
        group = [row for row in usable if getattr(row, of) == value]
        said = Counter(row.verdict for row in group)
        per_rtol = [
            leaf.error / row.rtol
            for row in group
            for leaf in row.leaves.values()
            if math.isfinite(leaf.error)
        ]
        median = f"{statistics.median(per_rtol):.2g}" if per_rtol else ""
        lines.append(
            f"| {value} | {sum(row.has_gradient for row in group)} | {said['refused']} | "
            f"{said['warned']} | {said['beyond the promise']} | {said['silently wrong']} | "
            f"{said['accused']} | {median} |"
        )
    return lines


def _cases(rows: Sequence[Row]) -> list[str]:
    wanted = ("silently wrong", "accused", "beyond the promise")
    found = [row for row in rows if row.verdict in wanted]
    if not found:
        return ["No gradient is silently wrong, wrong without a warning, or accused."]
    lines = [
        "To be looked at (`--only` with the number runs one again):",
        "",
        "| case | verdict | flow, criterion | route, method, rtol | leaf: error, estimate, promise "
        "| error of T | largest figure |",
        "| --- |" + " --- |" * 6,
    ]
    for row in sorted(found, key=lambda row: (wanted.index(row.verdict), row.number)):
        name = (row.silent or row.bad or [row.worst])[0]
        leaf = row.leaves[name]
        figure = max(row.figures, key=row.figures.__getitem__, default="")
        size = f" {row.figures[figure]:.1e}" if figure else ""
        taken = "" if row.taken in ("", row.route) else f" (by {row.taken})"
        lines.append(
            f"| {row.number} | {row.verdict} | {row.flow}, {row.criterion} | "
            f"{row.route}{taken}, {row.method}, {row.rtol:.1e} | "
            f"{name}: {leaf.error:.1e}, {leaf.estimate:.1e}, {row.promise:.1e} | "
            f"{row.error_of_time:.1e} | {figure}{size} |"
        )
    return lines


def title(settings: Settings) -> str:
    """A sample in a few words."""
    words = [f"{settings.evidence}, cotangents on {settings.what}"]
    if settings.jumps:
        words.append("flows that jump")
    if settings.methods != Settings.methods:
        words.append("/".join(settings.methods))
    if settings.dtypes != Settings.dtypes:
        words.append("/".join(settings.dtypes))
    if settings.route is not None:
        words.append(settings.route)
    return ", ".join(words) + (f", seed {settings.seed}" if settings.seed else "")


def command(settings: Settings) -> str:
    """The options that make a sample."""
    words = [f"--seed {settings.seed} --evidence {settings.evidence} --what {settings.what}"]
    if settings.jumps:
        words.append("--jumps")
    if settings.methods != Settings.methods:
        words.append(f"--methods {' '.join(settings.methods)}")
    if settings.dtypes != Settings.dtypes:
        words.append(f"--dtypes {' '.join(settings.dtypes)}")
    if settings.route is not None:
        words.append(f"--route {settings.route}")
    if settings.cost:
        words.append("--cost")
    return " ".join(words)


def _head(rows: Sequence[Row]) -> list[str]:
    seconds = sum(row.seconds for row in rows)
    return [
        "# Random stopping times against an oracle",
        "",
        f"By `benchmarks/fuzz.py`, which says how errors are counted: {len(rows)} cases, "
        f"{seconds:.0f} s of one core, {platform.processor() or platform.machine()}, Python "
        f"{platform.python_version()}, torch {version('torch')}, torchdiffeq "
        f"{version('torchdiffeq')}, SciPy {version('scipy')}. Promise: {PROMISE_PER_RTOL:g} rtol, "
        f"at most {LARGEST_PROMISE:g}. Counts are of gradients unless it says leaves.",
        "",
    ]


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
    parser.add_argument("--table", type=Path, help="where the table is written")
    parser.add_argument("--only", type=int, metavar="N", help="run this one case and show it")
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 where a gradient is silently wrong"
    )
    return parser.parse_args()


def main() -> None:
    """Run a sample and make the table."""
    options = _options()
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
    if options.only is not None:
        _show(run(settings, options.only))
        return
    for path in (options.out, options.table):
        if path is not None:
            require_output(path)
    rows = [] if options.out is None else list(load(options.out).values())
    for row in study(settings, range(options.cases), jobs=options.jobs, out=options.out):
        rows.append(row)
        if row.verdict in ("silently wrong", "accused"):
            print(f"{row.number}: {row.verdict}, {row.flow}, {row.worst}", flush=True)
    if not rows:
        return
    rows.sort(key=lambda row: (title(row.settings), row.number))
    text = "\n".join([*_head(rows), *table(rows), ""])
    print(text)
    if options.table is not None:
        write_text(options.table, text)
    if options.strict and any(row.silent for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    run_script(main)
