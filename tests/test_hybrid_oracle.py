"""The oracle of `benchmarks/hybrids.py` against closed forms; it has no torch in it."""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hybrid_reference import Reference

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
Script = SimpleNamespace
OURS = ("_hybrids", "_fuzzing", "hybrids")
PARTS = ("drawing", "oracle", "path", "problem")


@pytest.fixture(scope="module", name="script")
def make_script() -> Iterator[Script]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield Script(**{name: importlib.import_module(f"_hybrids.{name}") for name in PARTS})
    finally:
        sys.path.remove(str(FOLDER))
        for name in [n for n in sys.modules if n.partition(".")[0] in OURS]:
            del sys.modules[name]


def relative(found: Any, exact: Any) -> float:
    found, exact = np.asarray(found, float), np.asarray(exact, float)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def gradients(script: Script, problem: Any, *terms: Any) -> Any:
    """The answer for a sum of terms."""
    observables = tuple((1.0, script.problem.Observable(*term)) for term in terms)
    fields = {name: getattr(problem, name) for name in problem.__dataclass_fields__}
    return script.oracle.answer(script.problem.Hybrid(**fields | {"terms": observables}))


def ball(script: Script, *, until: float | None = None, at: Any = None) -> Any:
    """A ball that falls from h0 at rest, without drag; it ends at the eighth impact."""
    leaves: dict[str, Any] = {"x0": np.array([1.3, 0.0]), "t0": 0.4, "g": 9.81, "e": 0.8}
    leaves["floor"] = 0.0
    if until is not None:
        leaves["until"] = until
    if at is not None:
        leaves["at"] = np.array(at)
    bounce = script.problem.Watch(
        lambda xp, t, x, p: x[0],
        "floor",
        reset=lambda xp, t, x, p: xp.stack([x[0], -p["e"] * x[1]]),
        count=8,
    )
    return script.problem.Hybrid(
        "ball",
        lambda xp, t, x, p, on: xp.stack([x[1], 0.0 * x[1] - p["g"]]),
        leaves,
        (bounce,),
    )


@pytest.mark.parametrize("n", [1, 3, 6])
def test_impacts_of_a_ball(script: Script, n: int) -> None:
    """T_n = t0 + sqrt(2 h0 / g) (1 + 2 sum_{k < n} e^k)."""
    found = gradients(script, ball(script), ("time", 0, n))
    h0, g, e, k = 1.3, 9.81, 0.8, np.arange(1, n)
    fall, sum_ = np.sqrt(2 * h0 / g), 1 + 2 * np.sum(e**k)
    assert found.value == pytest.approx(0.4 + fall * sum_, abs=1e-12)
    assert relative(found.gradients["g"], -fall * sum_ / (2 * g)) < 1e-9
    assert relative(found.gradients["x0"][0], fall * sum_ / (2 * h0)) < 1e-9
    assert relative(found.gradients["t0"], 1.0) < 1e-9
    by_e = fall * 2 * np.sum(k * e ** (k - 1))
    assert abs(float(found.gradients["e"]) - by_e) < 1e-9
    # A floor that is lifted shortens the fall alone: as h0 does, with the other sign.
    assert relative(found.gradients["floor"], -found.gradients["x0"][0]) < 1e-8


def test_height_behind_an_impact(script: Script) -> None:
    """h = v (t - T) - g (t - T)^2 / 2, v = g fall e^n behind the n-th impact; and its slope."""
    h0, g, e, n = 1.3, 9.81, 0.8, 5
    fall = np.sqrt(2 * h0 / g)
    impact = lambda h0, g, e: 0.4 + np.sqrt(2 * h0 / g) * (1 + 2 * sum(e**k for k in range(1, n)))  # noqa: E731
    late = 0.35 * 2 * fall * e**n
    when = float(impact(h0, g, e)) + late

    def height(h0: Any, g: Any, e: Any, t: Any) -> Any:
        since = t - impact(h0, g, e)
        return g * np.sqrt(2 * h0 / g) * e**n * since - g * since**2 / 2

    found = gradients(script, ball(script, at=[when], until=when + 0.1), ("at", -1, 0, 0))
    assert found.value == pytest.approx(float(height(h0, g, e, when)), abs=1e-11)
    step = 1e-20j  # the closed form is analytic: a complex step has no error of cancellation
    exact = {
        "g": height(h0, g + step, e, when),
        "e": height(h0, g, e + step, when),
        "at": height(h0, g, e, when + step),
    }
    for name, value in exact.items():
        assert relative(np.ravel(found.gradients[name])[0], value.imag / 1e-20) < 1e-8, name
    assert float(found.gradients["until"]) == 0.0


@pytest.mark.parametrize("n", [1, 4, 10])
def test_spikes_of_a_neuron(script: Script, n: int) -> None:
    """tau V' = I - V, V -> r at c: T_n = tau ln((I - v0) / (I - c)) + (n-1) tau ln((I-r)/(I-c))."""
    leaves = {"x0": np.array([0.1]), "t0": 0.0, "tau": 0.7, "I": 1.6, "r": 0.05, "c": 1.0}
    fire = script.problem.Watch(
        lambda xp, t, x, p: x[0],
        "c",
        "rising",
        reset=lambda xp, t, x, p: xp.stack([0.0 * x[0] + p["r"]]),
        count=n,
    )
    problem = script.problem.Hybrid(
        "neuron", lambda xp, t, x, p, on: (p["I"] - x) / p["tau"], leaves, (fire,)
    )
    found = gradients(script, problem, ("end_time",))
    tau, i, r, c, v0, m = 0.7, 1.6, 0.05, 1.0, 0.1, n - 1
    first, between = np.log((i - v0) / (i - c)), np.log((i - r) / (i - c))
    assert found.value == pytest.approx(tau * (first + m * between), abs=1e-11)
    exact = {
        "tau": first + m * between,
        "I": tau * (1 / (i - v0) - 1 / (i - c) + m * (1 / (i - r) - 1 / (i - c))),
        "c": tau * n / (i - c),
        "r": -tau * m / (i - r),
        "x0": -tau / (i - v0),
    }
    for name, value in exact.items():
        gap = abs(float(np.ravel(found.gradients[name])[0]) - value)
        assert gap < 1e-8 * max(abs(value), 0.1), name


def test_doses_by_superposition(script: Script) -> None:
    """c(t) = sum_k d_k exp(-ke (t - t_k)), and when it falls to a level behind the last."""
    times, amounts, ke = np.array([0.3, 1.1, 2.4]), np.array([1.0, 0.7, 1.2]), 0.6
    leaves: dict[str, Any] = {"x0": np.array([0.2]), "t0": 0.0, "ke": ke, "d": amounts}
    leaves |= {"level": 0.5, "at": np.array([2.0, 0.7]), "until": 6.0}
    leaves |= {f"time{k}": float(t) for k, t in enumerate(times)}
    watch = script.problem.Watch

    def dose(k: int) -> Any:
        return lambda xp, t, x, p: xp.stack([x[0] + p["d"][k]])

    watches = [watch(None, f"time{k}", reset=dose(k)) for k in range(3)]
    watches.append(watch(lambda xp, t, x, p: x[0], "level", leave_first=True))
    problem = script.problem.Hybrid(
        "doses", lambda xp, t, x, p, on: -p["ke"] * x, leaves, tuple(watches)
    )

    def amount(t: Any, upto: int, ke: Any, d: Any, given: Any) -> Any:
        return 0.2 * np.exp(-ke * t) + sum(d[k] * np.exp(-ke * (t - given[k])) for k in range(upto))

    found = gradients(script, problem, ("at", -1, 0, 0))
    exact = amount(2.0, 2, ke, amounts, times)
    assert found.value == pytest.approx(exact, abs=1e-12)
    parts = [amounts[k] * np.exp(-ke * (2.0 - times[k])) for k in range(2)]
    assert relative(found.gradients["time0"], ke * parts[0]) < 1e-9
    assert relative(found.gradients["time1"], ke * parts[1]) < 1e-9
    assert float(found.gradients["time2"]) == 0.0
    assert relative(found.gradients["d"], [*(parts / amounts[:2]), 0.0]) < 1e-9
    assert relative(found.gradients["at"], [-ke * exact, 0.0]) < 1e-9

    level = [h for h in found.run.hits if h.event == 3]
    falls = gradients(script, problem, ("time", 3, len(level)))
    total = 0.5 * np.exp(ke * level[-1].time)  # sum_k d_k exp(ke t_k), and what was there at t0
    assert total == pytest.approx(0.2 + float(np.sum(amounts * np.exp(ke * times))), rel=1e-11)
    assert relative(falls.gradients["level"], -1 / (ke * 0.5)) < 1e-9
    for k in range(3):
        shift = amounts[k] * np.exp(ke * times[k]) / total
        assert relative(falls.gradients[f"time{k}"], shift) < 1e-9
        assert relative(falls.gradients["d"][k], shift / (ke * amounts[k])) < 1e-9


def test_a_jump_of_the_velocity(script: Script) -> None:
    """x' = a, behind tau a + b (t - tau): both ways in which tau acts add."""
    leaves: dict[str, Any] = {"x0": np.array([0.0]), "t0": 0.1, "a": 1.0, "b": 0.7, "k": 0.5}
    leaves |= {"tau": 0.9, "c": 2.0, "until": 9.0}
    watch = script.problem.Watch(lambda xp, t, x, p: x[0], "c", "rising", terminal=True)

    def velocity(xp: Any, t: Any, x: Any, p: Any, on: Any) -> Any:
        return xp.stack([0.0 * x[0] + p["a"] + on[0] * (p["k"] + p["b"] * (t - p["tau"]))])

    problem = script.problem.Hybrid("jump", velocity, leaves, (watch,), breakpoints=("tau",))
    found = gradients(script, problem, ("end_time",))
    s = found.value - 0.9  # a (T - t0) + k s + b s^2 / 2 = c
    assert 1.0 * (found.value - 0.1) + 0.5 * s + 0.35 * s * s == pytest.approx(2.0, abs=1e-12)
    rate = 1.0 + 0.5 + 0.7 * s
    exact = {"tau": (0.5 + 0.7 * s) / rate, "c": 1 / rate, "b": -s * s / 2 / rate, "t0": 1 / rate}
    for name, value in exact.items():
        assert relative(found.gradients[name], value) < 1e-9, name


def test_a_reset_past_another_surface(script: Script) -> None:
    """It is taken at once, at the time of the first, from the state that the first one left."""
    watch = script.problem.Watch
    leaves = {"x0": np.array([0.0, 0.6]), "t0": 0.0, "full": 1.0, "level": 1.0, "until": 1.7}
    one = watch(
        lambda xp, t, x, p: x[0],
        "full",
        "rising",
        reset=lambda xp, t, x, p: xp.stack([0.0 * x[0], x[1] + x[0]]),
    )
    two = watch(
        lambda xp, t, x, p: x[1],
        "level",
        "rising",
        reset=lambda xp, t, x, p: xp.stack([x[0], 0.25 * x[1]]),
    )
    for watches, first in (((one, two), 0), ((two, one), 1)):
        problem = script.problem.Hybrid(
            "cascade", lambda xp, t, x, p, on: xp.stack([1 + 0 * x[0], 0 * x[1]]), leaves, watches
        )
        found = gradients(script, problem, ("after", 1 - first, 1, 1))
        hits = found.run.hits
        assert [hit.event for hit in hits] == [first, 1 - first]
        assert hits[0].time == hits[1].time == pytest.approx(1.0, abs=1e-12)
        assert hits[1].state == pytest.approx([0.0, 1.6])
        assert found.value == pytest.approx(0.4)
        assert relative(found.gradients["full"], 0.25) < 1e-9
        assert float(found.gradients["level"]) == 0.0


def test_what_the_contract_ends_is_no_problem(script: Script) -> None:
    """A reset that lands on its own surface with J still on its way through it."""
    leaves = {"x0": np.array([1.0]), "t0": 0.0, "c": 0.0, "until": 3.0}
    watch = script.problem.Watch(lambda xp, t, x, p: x[0], "c", reset=lambda xp, t, x, p: 1.0 * x)
    problem = script.problem.Hybrid(
        "through", lambda xp, t, x, p, on: 0.0 * x - 1.0, leaves, (watch,)
    )
    with pytest.raises(script.problem.Unusable, match="goes on through it"):
        script.path.Walk(problem).go()


def test_the_oracle_has_no_torch_in_it() -> None:
    code = "import sys, _hybrids.oracle; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=FOLDER, check=True)


def test_a_number_is_one_problem(script: Script) -> None:
    one, two = (script.drawing.draw(0, 5) for _ in range(2))
    assert one.family == two.family
    assert one.terms == two.terms
    for name, value in one.leaves.items():
        assert np.array_equal(value, two.leaves[name])


FAMILIES = (
    "bouncing_ball",
    "ball_on_moving_floor",
    "integrate_and_fire",
    "pendulum",
    "thermostat",
    "two_tanks",
    "doses",
    "kicked_oscillator",
    "predator_prey",
    "network",
    "switched",
    "cascade",
)


def test_every_family_is_listed(script: Script) -> None:
    assert tuple(importlib.import_module("_hybrids.families").FAMILIES) == FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_road(script: Script, family: str, number: int) -> None:
    """Autograd through Runge-Kutta steps along the same hits, extrapolated in their size."""
    subject_part = importlib.import_module("_hybrids.subject")
    problem = script.drawing.draw(7, number, family=family)
    truth = script.oracle.answer(problem)
    grads, values = [], []
    for halved in (False, True):
        subject = subject_part.Subject(problem, "dopri5", None, (1e3, 1e-2, 30.0))
        solution = Reference(subject, subject_part.TORCH, halved=halved).solution(truth.run)
        subject.require_same_hits(solution, [(h.event, h.count) for h in truth.run.hits])
        total = subject.total(solution)
        total.backward()
        values.append(float(total.detach()))
        grads.append(
            {
                name: np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
                for name, leaf in subject.leaves.items()
            }
        )
    assert (16 * values[1] - values[0]) / 15 == pytest.approx(truth.value, abs=1e-8)
    for name, exact in truth.gradients.items():
        found = (16 * grads[1][name] - grads[0][name]) / 15 * subject.unit(name)
        gap = float(np.linalg.norm(np.ravel(found - exact)))
        # A hit that changes nothing and is not in L moves the steps, and by them their error.
        assert gap <= 1e-6 * truth.size(name) + 1e-9, name


def judged(script: Script, number: int, change: Any = None) -> Any:
    """The row of a ball whose gradients come from the other road, changed where wanted."""
    hybrids, subject_part = (importlib.import_module(n) for n in ("hybrids", "_hybrids.subject"))
    problem = script.drawing.draw(7, number, family="bouncing_ball")
    truth = script.oracle.answer(problem)
    row = hybrids.described(7, number, "default", None, "bouncing_ball")
    row = dataclasses.replace(row, family=problem.family, rtol=1e-6, promise=5e-5)
    subject = subject_part.Subject(problem, "dopri5", None)

    def solve(gradient: Any, **more: Any) -> Any:
        reference = Reference(subject, subject_part.TORCH)
        return (change or (lambda reference, run: reference.solution(run)))(reference, truth.run)

    subject.solve = solve
    return hybrids.judged(row, subject, truth)


def test_right_gradients_are_right(script: Script) -> None:
    row = judged(script, 1)
    assert (row.verdict, row.outcome) == ("right", "gradient")
    assert {"x0", "t0", "g", "drag", "e", "floor"} <= set(row.leaves)
    assert row.error_of_value < 1e-8


def test_a_planted_error_is_silently_wrong(script: Script) -> None:
    """A restitution whose derivative is a percent too large."""

    def planted(reference: Any, run: Any) -> Any:
        e = reference.p["e"]
        reference.p = reference.p | {"e": e + 0.01 * (e - e.detach())}
        return reference.solution(run)

    row = judged(script, 1, planted)
    assert (row.verdict, row.silent) == ("silently wrong", ["e"])
    assert row.leaves["e"].error == pytest.approx(0.01, rel=1e-2)


def test_a_lost_hit_is_seen(script: Script) -> None:
    def lost(reference: Any, run: Any) -> Any:
        solution = reference.solution(run)
        del solution.hits[0]
        return solution

    assert judged(script, 1, lost).verdict == "other hits"


def test_rows_come_back(script: Script, tmp_path: Path) -> None:
    rows, table = (importlib.import_module(f"_hybrids.{name}") for name in ("rows", "table"))
    row = judged(script, 1)
    rows.keep(tmp_path / "rows.jsonl", row)
    (held,) = rows.load(tmp_path / "rows.jsonl").values()
    assert repr(held) == repr(row)  # with its NaNs
    text = "\n".join(table.table([held]))
    assert "| bouncing_ball | 1 | 0 |" in text
