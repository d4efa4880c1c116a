"""`evaluate` and the criteria of a task, against one problem after the other in a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, isfinite, nan

import pytest
import torch
from torch import Tensor

from discrete.learned import LearnedSchedule
from discrete.learned.evaluation import Evaluation, evaluate
from discrete.learned.families import LogisticFamily, RosenbrockFamily
from discrete.learned.tasks import MetaTask
from ode_stopping import GradientNorm, LossValue

DTYPE = torch.float64
HORIZON = 120  # beyond the steps that `evaluate` takes at a time
TARGETS = torch.tensor([1.0, 0.3, 0.05, 1e-9], dtype=DTYPE)


def gradient_of(objective: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    point = x.detach().requires_grad_(True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(objective(point).sum(), point)
    return slope


def path(task: MetaTask, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    """x_k, f and its gradient along gradient descent, which `LearnedSchedule` is."""
    x, xs, fs, slopes = task.x0, [], [], []
    for _ in range(HORIZON + 1):
        slope = gradient_of(task.objective, x)
        xs.append(x)
        fs.append(task.objective(x).detach())
        slopes.append(slope)
        x = x - rate * slope
    return torch.stack(xs), torch.stack(fs), torch.stack(slopes)


def hits(criterion: Tensor, f: Tensor, targets: Tensor) -> list[list[tuple[int, float, bool]]]:
    """(N, f there, whether it rose) of every problem and target, -1 for a miss."""
    found = []
    for b in range(f.shape[1]):
        row = []
        for eps in targets.tolist():
            hit = (-1, nan, False)
            for k in range(HORIZON + 1):
                if criterion[k, b] <= eps:
                    hit = (k, float(f[k, b]), k > 0 and bool(f[k, b] > f[k - 1, b]))
                    break
            row.append(hit)
        found.append(row)
    return found


def assert_hits(found: Evaluation, wanted: list[list[tuple[int, float, bool]]]) -> None:
    assert found.outcomes.index.tolist() == [[n for n, _, _ in row] for row in wanted]
    assert found.outcomes.rises.tolist() == [[up for _, _, up in row] for row in wanted]
    at_index = torch.tensor([[f for _, f, _ in row] for row in wanted], dtype=DTYPE)
    torch.testing.assert_close(found.outcomes.at_index, at_index, equal_nan=True)


def tasks() -> MetaTask:
    return LogisticFamily(6, 10, ridge=0.05).draw(12, seed=3, dtype=DTYPE)


CRITERIA: dict[str, tuple[Callable[[MetaTask], object], Callable[..., Tensor]]] = {
    "norm of the gradient": (lambda task: None, lambda xs, fs, g: g.norm(dim=-1)),
    "its square": (
        lambda task: GradientNorm(task.objective),
        lambda xs, fs, g: g.square().sum(-1),
    ),
    "its largest entry": (
        lambda task: GradientNorm(task.objective, squared=False, ord=inf),
        lambda xs, fs, g: g.abs().amax(-1),
    ),
    "value": (lambda task: LossValue(task.objective), lambda xs, fs, g: fs),
    "a function": (
        lambda task: lambda t, x: x.abs().amax(-1) / (1 + t),
        lambda xs, fs, g: xs.abs().amax(-1) / torch.arange(1, HORIZON + 2).unsqueeze(-1),
    ),
    "decrease": (
        lambda task: "decrease",
        lambda xs, fs, g: torch.cat([torch.full((1, 12), inf, dtype=DTYPE), fs[:-1] - fs[1:]]),
    ),
}


@pytest.mark.parametrize("rate", [0.3, 12.0], ids=["descends", "rises"])
@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_is_met_where_a_plain_loop_meets_it(name: str, rate: float) -> None:
    given, by_hand = CRITERIA[name]
    plain = tasks()
    targets = TARGETS * (1e-2 if name == "decrease" else 1.0)
    task = MetaTask(plain.objective, plain.x0, given(plain), targets)  # type: ignore[arg-type]
    xs, fs, slopes = path(task, rate)
    wanted = hits(by_hand(xs, fs, slopes), fs, targets)
    found = evaluate(LearnedSchedule([rate]), task, horizon=HORIZON)
    assert_hits(found, wanted)
    torch.testing.assert_close(found.values, fs)
    # Something was met and something was not, or the test would say little.
    every = [n for row in wanted for n, _, _ in row]
    assert -1 in every or name in ("a function", "decrease")
    assert max(every) > 0


def test_figures_of_an_evaluation() -> None:
    """Gradient descent that is too fast in steep valleys: some runs rise, some leave the numbers.

    (A valley of steepness 1 is reached, one of 100 is not.)
    """
    plain = RosenbrockFamily(3).draw(40, seed=1, dtype=DTYPE)
    task = MetaTask(plain.objective, plain.x0, targets=TARGETS)
    _, fs, slopes = path(task, 0.03)
    found = evaluate(LearnedSchedule([0.03]), task, horizon=HORIZON)
    ratios, finite = [], []
    for b in range(40):
        lowest, worst = float(fs[0, b]), 1.0
        for value in fs[1:, b].tolist():
            worst = max(worst, value / lowest) if isfinite(value) else inf
            lowest = min(lowest, value)
        ratios.append(worst)
        finite.append(all(isfinite(value) for value in fs[:, b].tolist()))
    shares = []
    for factor in (300.0, 10.0):
        above = [r > factor or not ok for r, ok in zip(ratios, finite, strict=True)]
        shares.append(sum(above) / 40)
        assert found.blown(factor) == shares[-1]
    assert 0 < shares[0] < shares[1] < 1
    assert False in finite
    assert found.outcomes.finite.tolist() == finite
    wanted_index = hits(slopes.norm(dim=-1), fs, TARGETS)
    reached = [sum(row[place][0] >= 0 for row in wanted_index) / 40 for place in range(4)]
    assert found.reached.tolist() == pytest.approx(reached, abs=1e-15)
    counted = [[HORIZON + 1 if n < 0 else n for n, _, _ in row] for row in wanted_index]
    assert found.index.tolist() == counted
    # |u_k| / |g_k| is the rate, as long as there are numbers.
    good = found.steps[:, found.outcomes.finite]
    torch.testing.assert_close(good, torch.full_like(good, 0.03), rtol=1e-6, atol=0.0)
    assert found.values.shape == (HORIZON + 1, 40)


def test_the_gradient_of_a_minibatch_is_fed_and_that_of_all_is_measured() -> None:
    task = LogisticFamily(4, 8, ridge=0.2, minibatch=2).draw(3, seed=6, dtype=DTYPE)
    x, objective, norms = task.x0, task.objective, []
    for k in range(30):
        norms.append(gradient_of(objective, x).norm(dim=-1))
        x = x - 0.5 * objective.gradient_at(k, x)  # type: ignore[attr-defined]
    norms.append(gradient_of(objective, x).norm(dim=-1))
    found = evaluate(LearnedSchedule([0.5]), task, horizon=30)
    torch.testing.assert_close(found.values[-1], objective(x))
    for b in range(3):
        for place, eps in enumerate(task.targets.tolist()):
            met = [k for k, norm in enumerate(norms) if norm[b] <= eps]
            assert int(found.outcomes.index[b, place]) == (met[0] if met else -1)


def test_a_start_at_the_target_counts_zero() -> None:
    task = tasks()
    there = MetaTask(task.objective, task.x0, targets=torch.tensor([1e3, 1e-9], dtype=DTYPE))
    found = evaluate(LearnedSchedule([0.1]), there, horizon=3)
    assert found.index.tolist() == [[0, 4]] * 12
    assert not bool(found.outcomes.rises.any())


@pytest.mark.parametrize("horizon", [0, 2.0])
def test_a_horizon_is_a_positive_integer(horizon: object) -> None:
    with pytest.raises((TypeError, ValueError), match="horizon must be"):
        evaluate(LearnedSchedule([0.1]), tasks(), horizon=horizon)  # type: ignore[arg-type]
