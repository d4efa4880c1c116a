"""The race on the smooth SVM: problems, runs, and the verdicts of its two checks."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import optimize

from discrete import AdamOLA
from discrete.online.rules import PaperRule
from ode_stopping.problems import SmoothSVM, synthetic_logistic
from theory_checks.checks import figure4, figure6
from theory_checks.registry import Context
from theory_checks.smooth_svm import problems, race
from theory_checks.smooth_svm.algorithm2 import algorithm_2
from theory_checks.smooth_svm.methods import METHODS, Setting, available_methods
from theory_checks.smooth_svm.problems import REFERENCE, from_data, newton_minimum, start
from theory_checks.smooth_svm.race import Race
from theory_checks.smooth_svm.study import (
    Study,
    grid_table,
    profile,
    ratio_in_words,
    ratio_to,
    tuned_table,
)

pytestmark = pytest.mark.usefixtures("small_problems")


@pytest.fixture(scope="module")
def small():
    return from_data("small", *synthetic_logistic(samples=120, dim=9, seed=4, flipped=0.2))


@pytest.fixture
def small_problems(monkeypatch, small) -> None:
    """The race on a small problem, whatever data it is asked for."""
    monkeypatch.setattr(race, "load", lambda name: small)


def test_objective_gradient_and_curvature_are_those_of_the_library(small) -> None:
    X, y = synthetic_logistic(samples=120, dim=9, seed=4, flipped=0.2)
    f = SmoothSVM(X, y)
    for seed in range(3):
        w = np.random.default_rng(seed).standard_normal(small.dim)
        x = torch.tensor(w, requires_grad=True)
        value, gradient = small(w)
        assert value == pytest.approx(f(x).item(), rel=1e-13)
        slopes = torch.autograd.grad(f(x), x, create_graph=True)[0]
        np.testing.assert_allclose(gradient, slopes.detach().numpy(), rtol=1e-12)
        v = np.random.default_rng(seed + 10).standard_normal(small.dim)
        product = torch.autograd.grad(slopes, x, torch.tensor(v))[0]
        np.testing.assert_allclose(small.curvature(w, v), product.numpy(), rtol=1e-11)
    assert small.lipschitz == pytest.approx(np.linalg.norm(small.rows.toarray(), 2) ** 2)


def test_minimum_by_newton_is_that_of_another_method(small) -> None:
    found = optimize.minimize(
        small, np.zeros(small.dim), jac=True, method="L-BFGS-B", options={"ftol": 0, "gtol": 1e-10}
    )
    assert small.minimum == pytest.approx(found.fun, rel=1e-12)


def test_minimum_of_separable_data_and_of_columns_that_depend_on_each_other() -> None:
    rows = np.array([[1.0, 2.0, 2.0], [3.0, 1.0, 1.0], [2.0, -1.0, -1.0]])
    assert newton_minimum(rows) == pytest.approx(0.0, abs=1e-20)
    rows = np.vstack([rows, -rows])
    truth = optimize.minimize(
        lambda w: 0.5 * (np.maximum(0, 1 - rows @ w) ** 2).sum(), np.zeros(3), tol=1e-12
    )
    assert newton_minimum(rows) == pytest.approx(truth.fun, rel=1e-9)
    with pytest.raises(RuntimeError, match="Newton steps"):
        newton_minimum(rows, max_iterations=0)


def test_start_is_the_second_draw() -> None:
    random = np.random.RandomState(20250128)
    random.standard_normal(7)
    r = random.randn(7)
    np.testing.assert_array_equal(start(7, 20250128), r / np.linalg.norm(r))


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_real_data_have_the_known_constants(name: str) -> None:
    if name not in problems.available():
        pytest.skip("ODE_STOPPING_DATA does not name a folder with it")
    for measured, expected, bound in figure4.constants(name).values():
        assert abs(measured - expected) <= bound


@pytest.mark.parametrize(("data", "method", "label"), sorted(figure4.COUNTS))
def test_real_data_take_the_known_iterations(data: str, method: str, label: str) -> None:
    if data not in problems.available():
        pytest.skip("ODE_STOPPING_DATA does not name a folder with it")
    problem = problems.load(data)
    (setting,) = [s for s in METHODS[method].grid(problem) if s.label == label]
    run = race.race(problem, METHODS[method], setting, start(problem.dim, problems.GIVEN_SEED))
    known, bound = figure4.COUNTS[data, method, label]
    assert abs(run.iterations - known) <= bound


@pytest.mark.parametrize("name", available_methods())
def test_every_method_runs_and_iterations_count_the_check(name: str, small) -> None:
    method = METHODS[name]
    x0 = start(small.dim, 1)
    for setting in method.grid(small)[:2]:
        run = race.race(small, method, setting, x0, horizon=40)
        assert len(run.values) == len(run.times) <= 40
        assert run.values[0] == small(x0)[0]
        assert run.iterations in (len(run.values), math.inf)
        assert run.gap == run.values[-1] - small.minimum


def test_iterations_are_steps_and_one(small) -> None:
    x0 = start(small.dim, 1)
    run = race.race(small, METHODS["NAG"], METHODS["NAG"].grid(small)[0], x0, tolerance=1e-3)
    y, x, k = x0.copy(), x0.copy(), 0
    while np.abs(small(y)[1]).max() >= 1e-3:  # the method by hand
        following = y - small(y)[1] / small.lipschitz
        y, x, k = following + k / (k + 3) * (following - x), following, k + 1
    assert run.iterations == k + 1
    assert run.values[-1] == pytest.approx(small(y)[0], rel=1e-12)


def test_a_start_that_meets_the_tolerance_takes_one_iteration(small) -> None:
    method = METHODS["Adam"]
    run = race.race(small, method, method.grid(small)[0], start(small.dim, 0), tolerance=1e9)
    assert run.iterations == 1


def test_divergence_is_told(small) -> None:
    run = race.race(small, METHODS["Adam-OLA, printed"], Setting("-1", 1e6), start(small.dim, 0))
    assert run.diverged
    assert run.iterations == math.inf


def test_algorithm_2_beside_the_optimiser_and_planted_errors(small) -> None:
    far, drift = figure4.disagreement(small)
    assert far <= max(1e-12, 10 * drift) < 1e-10

    class WrongSign(PaperRule):
        def decide(self, derivatives, seen):
            decision = super().decide(derivatives, seen)
            return decision._replace(moves={k: -v for k, v in decision.moves.items()})

    class NoReference(PaperRule):
        def decide(self, derivatives, seen):
            decision = super().decide(derivatives, seen)
            self.reference = 1e9
            return decision

    for wrong in (WrongSign, NoReference):
        far, drift = figure4.disagreement(small, make=partial(_with_rule, wrong))
        assert far > 1e-6


def _with_rule(rule, *args, **options) -> AdamOLA:
    optimizer = AdamOLA(*args, **options)
    optimizer.rule = rule(options["descent_threshold"])
    return optimizer


def test_algorithm_2_without_adaptation_is_adam(small) -> None:
    course = algorithm_2(small, start(small.dim, 3), rate=0.1, eta=0.0, threshold=0.0, steps=20)
    x = torch.tensor(start(small.dim, 3), requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.1)
    for _ in range(20):
        x.grad = torch.from_numpy(small(x.detach().numpy())[1])
        optimizer.step()
    np.testing.assert_allclose(course.iterates[-1], x.detach().numpy(), rtol=1e-12)


def made_up(iterations: dict[str, list[float]], *, diverged: bool = False) -> Study:
    """A study on one data set: iterations by method, one setting each, with gaps 1e-3."""
    runs = {
        ("small", method): {
            "1": [Race(Setting("1", 1.0), n, 1e-3, diverged and math.isinf(n), 0.1) for n in counts]
        }
        for method, counts in iterations.items()
    }
    count = len(next(iter(iterations.values())))
    return Study(("small",), tuple(iterations), tuple(range(count)), runs)


def test_ratios_with_misses() -> None:
    inf = math.inf
    study = made_up({"Adam": [10, 20, 30], "Adam-OLA": [5, 10, inf], "NAG": [inf, inf, 1]})
    assert ratio_to(study, "small", "Adam-OLA", "Adam") == 0.5
    assert ratio_to(study, "small", "NAG", "Adam") == inf
    assert ratio_to(study, "small", "Adam", "NAG") == 20 / 1000  # at most: NAG takes more
    assert ratio_to(study, "small", "NAG", "NAG") == 1.0  # by f - f*


def test_ratios_in_words_show_no_miss_as_a_number() -> None:
    inf = math.inf
    study = made_up({"Adam": [10, 20, 30], "Adam-OLA": [5, 10, 12], "NAG": [inf, inf, 1]})
    assert ratio_in_words(study, "small", "Adam-OLA", "Adam").startswith("0.50 (")
    assert ratio_in_words(study, "small", "Adam", "NAG") == "below 0.02: NAG misses"
    assert ratio_in_words(study, "small", "NAG", "Adam") == "misses, Adam does not"
    assert ratio_in_words(study, "small", "NAG", "NAG") == "both miss; of f - f*: 1"


def test_an_optimiser_that_gives_up_has_diverged(small) -> None:
    run = race.race(small, METHODS["Adam-OLA"], Setting("1e160", 1e160), start(small.dim, 0))
    assert run.diverged
    assert run.iterations == math.inf


def test_verdict_of_figure_6_catches_a_slower_and_a_diverging_method() -> None:
    fast = made_up({"Adam": [10.0, 20.0], "Adam-OLA": [9.0, 20.0]})
    slow = made_up({"Adam": [10.0, 20.0], "Adam-OLA": [11.0, 20.0]})
    lost = made_up({"Adam": [10.0, 20.0], "Adam-OLA": [math.inf] * 2}, diverged=True)
    for study, held in ((fast, True), (slow, False), (lost, False)):
        measured, bounds = figure6.claims(study)
        assert all(value <= bounds[name] for name, value in measured.items()) is held
    assert figure6.claims(lost)[0]["small: diverged"] == 2


def test_tables_and_profiles_of_a_made_up_study() -> None:
    study = made_up({"Adam": [10, 20, 30], "Adam-OLA": [5, 10, math.inf]})
    table = tuned_table(study, "small")
    assert table.rows[1][0] == "Adam-OLA"
    assert "1 of 3 not in 1000" in table.rows[1][3]
    assert table.rows[0][4] == "-"
    assert table.rows[1][4] == "0.50 (0.50 to open)"  # Adam-OLA may miss
    assert grid_table(study, "small", ("Adam", "Adam-OLA")).rows == [["1", "20", "10"]]
    np.testing.assert_allclose(profile(study).wins, [1 / 3, 2 / 3])


def test_both_checks_run_on_a_small_problem(monkeypatch, small) -> None:
    monkeypatch.setattr(race, "race", partial(race.race, horizon=400))
    for module in (figure4, "theory_checks.smooth_svm.figures"):
        target = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{target}.load", lambda name: small)
    outcome = figure4.judge(Context(), ["small"], ("Adam", "Adam-OLA", "L-BFGS"))
    assert outcome.passed
    assert len(outcome.figures) == 1
    outcome = figure6.judge(Context(), ["small"], ("Adam", "Adam-OLA", "Adam-OLA, printed"), (1, 2))
    assert outcome.passed
    assert len(outcome.tables) == 2
