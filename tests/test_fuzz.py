"""`benchmarks/fuzz.py`: the oracle is right, planted errors are seen, a small sample is clean."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ode_stopping import StepAdjoint, StoppingResult
from ode_stopping.gradients import PullBack

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
D = torch.float64
SILENT = "**silently wrong**: gradients; leaves; of the leaves that are wrong"
# State, time and J in units, J with either sign.
UNITS = [(1.0, 1.0, 1.0), (1e5, 1e-3, 1e2), (1e-6, 1e4, -1.0)]


Script = SimpleNamespace  # `fuzz.py` and its parts, by name
PARTS = ("cases", "operations", "oracle", "path", "rows", "table")


@pytest.fixture(scope="module", name="script")
def make_script() -> Iterator[Script]:
    sys.path.insert(0, str(FOLDER))
    try:
        parts = {name: importlib.import_module(f"_fuzzing.{name}") for name in PARTS}
        yield Script(fuzz=importlib.import_module("fuzz"), **parts)
    finally:
        sys.path.remove(str(FOLDER))
        for name in [n for n in sys.modules if n == "fuzz" or n.partition(".")[0] == "_fuzzing"]:
            del sys.modules[name]


def problem_of(
    script: Script, flow: Any, criterion: Any, leaves: dict[str, Any], x0: list[float], **more: Any
) -> Any:
    """A problem whose numbers are without dimension, but for its units."""
    s, tau, c = more.get("units", (1.0, 1.0, 1.0))
    start, target = more.get("t0", 0.0), more["target"]
    of = script.operations
    return script.path.Problem(
        flow=of.Flow(flow, {}, np.array(x0), 50.0, switch=more.get("switch")),
        criterion=of.Criterion(criterion, {}),
        state=s,
        time=tau,
        value=c,
        leaves=leaves,
        constants={},
        x0=s * np.array(x0),
        t0=tau * start,
        target=c * target,
    )


def gradients_of(script: Script, problem: Any, time: float, c: float, w: list[float]) -> Any:
    """The oracle's answer, in units of the problem; its two halves agree."""
    found = script.oracle.answer(problem, time, c, np.array(w))
    for name, value in found.gradients.items():
        size = max(float(np.linalg.norm(value)), 1e-3 * found.natural[name])
        assert found.difference[name] <= 1e-8 * size, name
    return found


@pytest.mark.parametrize("units", UNITS)
def test_oracle_on_a_decay(script: Script, units: tuple[float, float, float]) -> None:
    """x' = -a x, J = phi x^2: T = t0 + log(phi x0^2 / eps) / (2 a), x_T = sqrt(eps / phi)."""
    (s, tau, c), a, phi, x, eps, t0 = units, 1.3, 0.7, 2.0, 0.3, 0.2
    problem = problem_of(
        script,
        lambda xp, t, x, p, side: -p["a"] * x,
        lambda xp, t, x, p, velocity: p["phi"] * xp.dot(x, x),
        {"a": a, "phi": phi},
        [x],
        units=units,
        t0=t0,
        target=eps,
    )
    length = math.log(phi * x * x / eps) / (2 * a)
    time = tau * (t0 + length)
    found = gradients_of(script, problem, time * (1 + 1e-11), 1.0, [0.0])
    assert found.time == pytest.approx(time, rel=1e-12)
    exact = {
        "a": -tau * length / a,
        "phi": tau / (2 * a * phi),
        "x0": tau / (a * x * s),
        "target": -tau / (2 * a * eps * c),
        "t0": 1.0,
    }
    for name, value in exact.items():
        assert found.gradients[name] == pytest.approx(value, rel=1e-10), name
    found = gradients_of(script, problem, time, 0.0, [1.0])
    end = s * math.sqrt(eps / phi)
    assert found.gradients["target"] == pytest.approx(end / (2 * eps * c), rel=1e-10)
    assert found.gradients["phi"] == pytest.approx(-end / (2 * phi), rel=1e-10)
    for name in ("a", "x0", "t0"):  # where x_T does not move, and only the natural size tells
        assert abs(float(np.ravel(found.gradients[name])[0])) < 1e-9 * found.natural[name], name


def test_oracle_on_the_state_and_a_clock(script: Script) -> None:
    """x_i' = -a_i x_i (1 + b cos t) to x_1 = eps: x_2(T) = x_20 (eps / x_10)^(a_2 / a_1)."""
    a, b, x, eps = np.array([1.2, 0.5]), 0.4, [1.5, -0.8], 0.4
    problem = problem_of(
        script,
        lambda xp, t, x, p, side: -p["a"] * x * (1 + p["b"] * xp.cos(t)),
        lambda xp, t, x, p, velocity: x[0],
        {"a": a, "b": b},
        x,
        target=eps,
        t0=0.3,
    )
    length = math.log(x[0] / eps) / a[0]  # = T - t0 + b (sin T - sin t0)
    time = 0.3 + length
    for _ in range(50):
        gap = time - 0.3 + b * (math.sin(time) - math.sin(0.3)) - length
        time -= gap / (1 + b * math.cos(time))
    rate = 1 + b * math.cos(time)
    found = gradients_of(script, problem, time, 1.0, [0.0, 0.0]).gradients
    assert found["b"] == pytest.approx(-(math.sin(time) - math.sin(0.3)) / rate, rel=1e-10)
    assert found["a"] == pytest.approx([-length / a[0] / rate, 0.0], rel=1e-10, abs=1e-13)
    assert found["t0"] == pytest.approx((1 + b * math.cos(0.3)) / rate, rel=1e-10)
    found = gradients_of(script, problem, time, 0.0, [0.0, 1.0]).gradients
    q, log = a[1] / a[0], math.log(eps / x[0])
    end = x[1] * (eps / x[0]) ** q
    assert found["a"] == pytest.approx([-end * log * q / a[0], end * log / a[0]], rel=1e-10)
    assert found["x0"] == pytest.approx([-end * q / x[0], end / x[1]], rel=1e-10)
    assert found["target"] == pytest.approx(end * q / eps, rel=1e-10)
    assert abs(float(found["t0"])) < 1e-11


def test_oracle_across_a_jump(script: Script) -> None:
    """x' = -a x above c and -b x below: T = log(x0 / c) / a + log(c / eps) / b."""
    a, b, c, x, eps = 0.8, 2.0, 0.9, 2.0, 0.3
    problem = problem_of(
        script,
        lambda xp, t, x, p, side: -((1 + side) / 2 * p["a"] + (1 - side) / 2 * p["b"]) * x,
        lambda xp, t, x, p, velocity: xp.dot(x, x),
        {"a": a, "b": b, "c": c},
        [x],
        target=eps**2,
        switch=lambda xp, t, x, p: x[0] - p["c"],
    )
    first, second = math.log(x / c) / a, math.log(c / eps) / b
    found = gradients_of(script, problem, first + second, 1.0, [0.0])
    assert found.switches == 1
    exact = {"a": -first / a, "b": -second / b, "c": (1 / b - 1 / a) / c, "x0": 1 / (a * x)}
    for name, value in exact.items():
        assert found.gradients[name] == pytest.approx(value, rel=1e-9), name


def every_problem(script: Script, jumps: bool) -> Iterator[tuple[str, Any]]:
    """A problem of every family and of every criterion, without a target."""
    cases, rng = script.cases, np.random.default_rng(0)
    criteria = list(cases.CRITERIA)
    families = cases.JUMPING if jumps else cases.FLOWS | cases.DESCENTS
    for index, (name, make) in enumerate(families.items()):
        flow, kind = make(rng), criteria[index % len(criteria)]
        criterion = cases.CRITERIA[kind](rng, len(flow.x0))
        leaves = {k: np.asarray(v) for k, v in (flow.leaves | criterion.leaves).items()}
        constants = {k: np.asarray(v) for k, v in flow.constants.items()}
        yield (
            f"{name}, {kind}",
            script.path.Problem(
                flow, criterion, 30.0, 0.1, -2.0, leaves, constants, 30.0 * flow.x0, 0.05
            ),
        )


@pytest.mark.parametrize("jumps", [False, True])
def test_torch_and_the_oracle_see_one_function(script: Script, jumps: bool) -> None:
    """Values agree, and autograd with complex steps: all are analytic."""
    names = []
    for name, problem in every_problem(script, jumps):
        names.append(name)
        solver = script.path.Solver(problem, columns=True)
        y, side = solver.start()
        p = {k: torch.tensor(v, dtype=D) for k, v in (problem.leaves | problem.constants).items()}
        for key in problem.leaves:
            p[key].requires_grad_(True)
        x = torch.tensor(problem.x0, dtype=D, requires_grad=True)
        t = torch.tensor(problem.t0, dtype=D)
        weights = torch.linspace(0.3, 1.1, len(x), dtype=D)
        for what in (problem.velocity, problem.measure):
            value, along = solver.derivative(what, problem.t0, y, side)
            here = what(script.operations.TORCH, t, x, p, torch.tensor(side, dtype=D))
            assert here.shape == (x.shape if what == problem.velocity else ())
            assert here.detach().numpy() == pytest.approx(value, rel=1e-12, abs=1e-12), name
            total = (weights * here).sum() if here.ndim else here
            inputs = [x, *(p[key] for key in problem.leaves)]
            found = torch.autograd.grad(total, inputs, allow_unused=True)
            row = weights.numpy() @ along if here.ndim else np.ravel(along)
            exact = solver.directions.split(row)
            size = max(float(np.abs(np.ravel(v)).max()) for v in exact.values())
            for key, grad in zip(["x0", *problem.leaves], found, strict=True):
                mine = np.zeros(np.shape(exact[key])) if grad is None else grad.numpy()
                assert mine == pytest.approx(exact[key], rel=1e-10, abs=1e-12 * size), (name, key)
    assert len(names) == (5 if jumps else 30)


@pytest.fixture(scope="module", name="sample")
def make_sample(script: Script) -> list[Any]:
    return list(script.fuzz.study(script.cases.Settings(seed=7), range(12)))


def test_a_sample_is_clean(script: Script, sample: list[Any]) -> None:
    assert sum(row.has_gradient for row in sample) >= 10
    assert not [row.number for row in sample if row.silent]
    assert sum(row.accused for row in sample) <= 1
    assert len({row.flow for row in sample}) > 6
    text = "\n".join(script.table.table(sample))
    assert (
        "| **silently wrong**: gradients; leaves; of the leaves that are wrong | **0**; 0;" in text
    )


class TooLarge(StepAdjoint):
    """The transpose, 3 % too large: a route of a stranger that vouches for itself."""

    def pull_back_path(self, path: Any, jumps: Any) -> PullBack:
        found = super().pull_back_path(path, jumps)
        return replace(found, leaves=[1.03 * leaf for leaf in found.leaves])


def test_a_route_that_is_wrong_is_counted(script: Script) -> None:
    settings = script.cases.Settings(seed=7, evidence="light", route="StepAdjoint")
    right, wrong = (script.fuzz.run(settings, 4, route) for route in (None, TooLarge()))
    assert right.verdict == "right"
    explicit = {"phi", "slope"}  # of the criterion: no route pulls them back
    of_flow = set(right.leaves) - {"x0", "t0", "target"} - explicit
    assert of_flow
    for name in of_flow:
        assert wrong.leaves[name].error == pytest.approx(0.03, rel=1e-2)
    assert set(wrong.bad) == of_flow
    assert wrong.verdict in ("silently wrong", "warned")


class Scaled(torch.autograd.Function):
    """x, with a derivative that is 3 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.03 * grad


def test_a_gradient_that_is_wrong_in_silence_is_counted(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the library's back: T itself has the wrong function on it."""
    solve = script.fuzz.Subject.solve

    def planted(self: Any, evidence: str, gradient: Any = None) -> StoppingResult:
        result = solve(self, evidence, gradient)
        return replace(result, time=Scaled.apply(result.time))

    monkeypatch.setattr(script.fuzz.Subject, "solve", planted)
    row = script.fuzz.run(script.cases.Settings(seed=7), 4)
    assert row.verdict == "silently wrong"
    assert set(row.silent) == set(row.leaves)
    assert row.leaves["target"].error == pytest.approx(0.03, rel=1e-3)
    assert script.table.counts([row])[SILENT] == f"**1**; {len(row.leaves)}; 100.0 %"


def test_verdicts(script: Script) -> None:
    rows = script.rows
    base = rows.Row(script.cases.Settings(), 0, "gradient", rtol=1e-6, promise=5e-5)

    def verdict(error: float, estimate: float, **more: Any) -> str:
        leaf = rows.Leaf(error, estimate, 1.0, 1.0, 1.0)
        return str(replace(base, leaves={"a": leaf}, **more).verdict)

    assert verdict(4e-5, 0.0) == "right"
    assert verdict(4e-5, 1e-3, warned=True) == "accused"
    assert verdict(4e-5, 1e-3, grazing=True) == "right"
    assert verdict(1e-3, 2e-4) == "beyond the promise"
    assert verdict(1e-3, 1e-5) == "silently wrong"
    assert verdict(math.nan, math.inf) == "silently wrong"
    assert verdict(math.inf, 1.0) == "silently wrong"
    assert verdict(1e-3, 1e-5, warned=True) == "warned"
    assert verdict(1e-3, 1e-5, grazing=True) == "warned"
    assert replace(base, outcome="StalledError").verdict == "refused"
    assert replace(base, outcome="crashed: ValueError").verdict == "crashed"
    assert replace(base, outcome="unusable: no target").verdict == "unusable"


def test_what_accuses_is_told_apart(script: Script) -> None:
    """Other steps, another figure, and a gradient that is next to nothing of its natural size."""
    rows = script.rows

    def accused(truth: float, **figures: float) -> Any:
        leaves = {
            "a": rows.Leaf(1e-9, 0.5, truth, truth, 1.0),
            "b": rows.Leaf(1e-8, 1e-9, 1.0, 1.0, 1.0),
        }
        settings = script.cases.Settings()
        row = rows.Row(settings, 0, "gradient", rtol=1e-6, promise=5e-5, warned=True)
        return replace(row, leaves=leaves, figures=figures)

    found = [accused(0.1, refinement=0.5), accused(1e-7, refinement=0.5), accused(0.1, identity=1)]
    assert script.table.counts(found)["accused by"] == (
        "3 (1 other steps, 1 a gradient that vanishes, 1 identity)"
    )
    text = "\n".join(script.table.table(found))
    assert "a: 1.0e-09, 5.0e-01, 5.0e-05 | 1e-07 |" in text


def test_an_error_without_a_name_is_no_refusal(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr(script.fuzz.Subject, "backward", fails)
    row = script.fuzz.run(script.cases.Settings(seed=7), 4)
    assert (row.verdict, row.outcome) == ("crashed", "crashed: IndexError")
    found = script.table.counts([row])
    assert found["ended by an exception that is not the library's"] == "1 (1 out of range)"
    assert found["refused by name"] == "0"


def test_every_leaf_has_an_estimate_of_its_own(script: Script) -> None:
    """By its name: else the whole gradient's would stand for it, which hides what a leaf says."""
    fuzz, settings = script.fuzz, script.cases.Settings(seed=7)
    case = script.cases.draw(settings, 4)
    subject = fuzz.Subject(case)
    result = subject.solve("standard")
    subject.backward(result)
    names = {leaf.name for leaf in result.evidence.leaves}
    plain = {"x0", "t0", "target"}
    assert names == {n if n in plain else f"p['{n}']" for n in subject.leaves}


def test_an_oracle_that_is_not_clear_is_no_judge(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = script.fuzz.answer

    def unclear(*arguments: Any) -> Any:
        found = answer(*arguments)
        size = float(np.linalg.norm(found.gradients["x0"]))
        return replace(found, difference=found.difference | {"x0": 0.2 * 50 * 1e-2 * size})

    monkeypatch.setattr(script.fuzz, "answer", unclear)
    assert script.fuzz.run(script.cases.Settings(seed=7), 4).outcome == (
        "unusable: the oracle is not clear"
    )


def test_a_run_goes_on_where_it_was(
    script: Script, sample: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept rows come back as they were; a line that was cut off is run again, and alone."""
    fuzz, out = script.fuzz, tmp_path / "rows.jsonl"
    ran: list[int] = []

    def run(settings: Any, number: int) -> Any:
        ran.append(number)
        return sample[number]

    monkeypatch.setattr(fuzz, "run", run)
    settings = sample[0].settings
    assert len(list(fuzz.study(settings, range(4), out=out))) == 4
    lines = out.read_text(encoding="utf-8").splitlines()
    out.write_text("\n".join([*lines[:3], lines[3][:50]]), encoding="utf-8")
    kept = script.rows.load(out)
    assert [kept[row.key] for row in sample[:3]] == sample[:3]
    ran.clear()
    assert [row.number for row in fuzz.study(settings, range(5), out=out)] == [3, 4]
    assert ran == [3, 4]
    assert len(script.rows.load(out)) == 5
    other = replace(settings, evidence="light")
    assert not [row for row in kept.values() if row.settings == other]
    assert len(list(fuzz.study(other, range(1), out=out))) == 1


def test_a_case_is_that_of_its_number(script: Script) -> None:
    """Whatever ran before, and at every level of evidence."""
    draw, settings = script.cases.draw, script.cases.Settings(seed=7)
    first = draw(settings, 3)
    draw(settings, 4)
    again = draw(replace(settings, evidence="thorough", what="state"), 3)
    for name in ("flow", "criterion", "method", "rtol", "route", "near"):
        assert getattr(again, name) == getattr(first, name)
    assert again.problem.target == first.problem.target
    assert first.on_time != 0.0
    assert not first.on_state.any()
    assert again.on_time == 0.0
    assert again.on_state.all()


def test_one_case_is_shown_whole(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--seed", "7", "--only", "4"])
    script.fuzz.main()
    shown = capsys.readouterr().out
    assert shown.startswith("right (gradient)\n")
    for name in ("x0", "t0", "target"):
        assert f"\n  {name}: error " in shown


def test_all_samples_and_how_many_errors_are_let_pass(
    script: Script, sample: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent errors count, but for evidence="light" and flows that jump."""
    fuzz, settings = script.fuzz, script.cases.Settings
    leaf = script.rows.Leaf(1.0, 1e-9, 1.0, 1.0, 1.0)
    wrong = replace(next(row for row in sample if row.good), leaves={"x0": leaf}, warned=False)
    asked = [(settings(), 2), (settings(jumps=True), 2), (settings(evidence="light"), 1)]
    monkeypatch.setattr(fuzz, "SAMPLES", asked)
    monkeypatch.setattr(
        fuzz, "run", lambda settings, number: replace(wrong, settings=settings, number=number)
    )
    page = tmp_path / "fuzz.md"
    monkeypatch.setattr(fuzz, "RESULTS", page)
    for most, status in ((2, None), (1, 1)):
        monkeypatch.setattr(sys, "argv", ["fuzz.py", "--all", "--jobs", "1", "--most", str(most)])
        if status is None:
            fuzz.main()
        else:
            with pytest.raises(SystemExit) as ending:
                fuzz.main()
            assert ending.value.code == status
        text = page.read_text(encoding="utf-8")
        assert f"| {SILENT} | **2**; 2; 100.0 % | **2**; 2; 100.0 % | **1**; 1; 100.0 % |" in text
        assert "`python benchmarks/fuzz.py --seed 0 --evidence light --what time --cases 1`" in text


@pytest.mark.slow
@pytest.mark.parametrize("what", ["time", "state"])
def test_a_larger_sample(script: Script, what: str) -> None:
    rows = list(script.fuzz.study(script.cases.Settings(seed=8, what=what), range(60)))
    good = [row for row in rows if row.good]
    assert len(good) > 45
    assert not [row.number for row in rows if row.silent]
    assert sum(row.accused for row in good) <= 0.05 * len(good)
