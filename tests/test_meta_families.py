"""Problems for meta-training: objectives against loops and autograd, draws, minibatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from discrete.learned import LearnedSchedule
from discrete.learned.evaluation import evaluate
from discrete.learned.families import (
    LeastSquaresFamily,
    LinearDataFamily,
    LogisticFamily,
    MixedFamily,
    NetworkFamily,
    RosenbrockFamily,
    TaskFamily,
)
from discrete.learned.networks import NetworkBatch
from discrete.learned.tasks import LinearBatch, MetaTask, RosenbrockBatch
from ode_stopping.problems import breast_cancer
from ode_stopping.problems.base import objective_gradient

DTYPE = torch.float64


def data_family(**options: object) -> LinearDataFamily:
    features, labels = breast_cancer()
    return LinearDataFamily(features, labels, 20, **options)  # type: ignore[arg-type]


FAMILIES: dict[str, Callable[[], TaskFamily]] = {
    "logistic": lambda: LogisticFamily(7, 9, ridge=0.1),
    "logistic, separable": lambda: LogisticFamily(9, 4),
    "smooth SVM": lambda: LogisticFamily(7, 9, loss="svm", ridge=0.1),
    "sparse logistic": lambda: LogisticFamily(7, 9, l1=0.2),
    "least squares": lambda: LeastSquaresFamily(6, 8, ridge=0.3),
    "lasso": lambda: LeastSquaresFamily(6, 8, l1=0.3, nonzeros=0.5),
    "minibatches": lambda: LogisticFamily(7, 9, ridge=0.1, minibatch=3),
    "Rosenbrock": lambda: RosenbrockFamily(5),
    "data": lambda: data_family(ridge=0.01),
    "network": lambda: NetworkFamily("wine", hidden=3, rows=15, ridge=0.1),
    "mixed": lambda: MixedFamily([LogisticFamily(4, 5), RosenbrockFamily(4)]),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_gradients_are_those_of_the_values(name: str) -> None:
    task = FAMILIES[name]().draw(3, seed=4, dtype=DTYPE)
    x = task.x0.clone().requires_grad_(True)
    value = task.objective(x)
    assert value.shape == (3,)
    (slope,) = torch.autograd.grad(value.sum(), x)
    both = task.value_and_gradient(task.x0)
    assert not both[0].requires_grad
    torch.testing.assert_close(both[0], value.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(both[1], slope, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(objective_gradient(task.objective, task.x0), slope)
    # One problem does not look at another.
    moved = task.x0.clone()
    moved[1] += 1.0
    changed = task.objective(moved) != value
    assert changed.tolist() == [False, True, False]


@every_family
def test_the_same_seed_gives_the_same_problems_in_every_type(name: str) -> None:
    family = FAMILIES[name]()
    task, again = family.draw(3, seed=4, dtype=DTYPE), family.draw(3, seed=4, dtype=DTYPE)
    assert torch.equal(task.x0, again.x0)
    assert torch.equal(task.objective(task.x0), again.objective(task.x0))
    single = family.draw(3, seed=4)
    assert single.x0.dtype == torch.float32
    assert torch.equal(single.x0, task.x0.float())
    torch.testing.assert_close(
        single.objective(single.x0).double(), task.objective(task.x0), rtol=1e-4, atol=1e-4
    )
    # (4 and 6 give one kind of the mixed family.)
    assert not torch.equal(family.draw(3, seed=6, dtype=DTYPE).x0, task.x0)


@every_family
def test_drawing_leaves_the_global_random_state_alone(name: str) -> None:
    before = torch.get_rng_state()
    FAMILIES[name]().draw(2, seed=1)
    assert torch.equal(before, torch.get_rng_state())


def scalar_loss(loss: str, z: float, y: float) -> float:
    if loss == "logistic":
        return log(1 + exp(-y * z))
    if loss == "svm":
        return 0.5 * max(0.0, 1 - y * z) ** 2
    return 0.5 * (z - y) ** 2


@pytest.mark.parametrize("loss", ["logistic", "svm", "squares"])
def test_linear_models_are_their_formula(loss: str) -> None:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, 4, 3, generator=generator, dtype=DTYPE)
    labels = torch.randn(2, 4, generator=generator, dtype=DTYPE).sign()
    x = torch.randn(2, 3, generator=generator, dtype=DTYPE)
    batch = LinearBatch(features, labels, loss=loss, ridge=0.3, l1=0.2, smoothing=0.05)
    for b in range(2):
        total = 0.0
        for i in range(4):
            score = sum(float(features[b, i, j] * x[b, j]) for j in range(3))
            total += scalar_loss(loss, score, float(labels[b, i])) / 4
        for j in range(3):
            size = float(x[b, j])
            total += 0.15 * size**2 + 0.2 * ((size**2 + 0.05**2) ** 0.5 - 0.05)
        assert batch(x)[b].item() == pytest.approx(total, rel=1e-13)


def test_rosenbrock_is_its_formula() -> None:
    steepness = torch.tensor([1.0, 30.0], dtype=DTYPE)
    x = torch.tensor([[1.5, -0.5, 2.0], [0.3, 0.2, -1.0]], dtype=DTYPE)
    for b in range(2):
        p, q, r = x[b].tolist()
        c = float(steepness[b])
        by_hand = c * (q - p * p) ** 2 + (1 - p) ** 2 + c * (r - q * q) ** 2 + (1 - q) ** 2
        assert RosenbrockBatch(steepness)(x)[b].item() == pytest.approx(by_hand, rel=1e-13)
    ones = torch.ones(2, 3, dtype=DTYPE)
    assert RosenbrockBatch(steepness)(ones).tolist() == [0.0, 0.0]


def test_a_batch_of_networks_is_one_network_after_the_other() -> None:
    task = NetworkFamily("wine", hidden=3, rows=15, ridge=0.2).draw(2, seed=5, dtype=DTYPE)
    batch = task.objective
    assert isinstance(batch, NetworkBatch)
    features = batch.inputs.shape[-1]
    for b, x in enumerate(task.x0):
        network = nn.Sequential(nn.Linear(features, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        first, bias, second, last = torch.split(x, [features * 3, 3, 9, 3])
        with torch.no_grad():
            network[0].weight.copy_(first.reshape(features, 3).T)
            network[0].bias.copy_(bias)
            network[2].weight.copy_(second.reshape(3, 3).T)
            network[2].bias.copy_(last)
        loss = nn.functional.cross_entropy(network(batch.inputs[b]), batch.labels[b])
        loss = loss + 0.1 * sum(p.square().sum() for p in network.parameters())
        torch.testing.assert_close(batch(task.x0)[b], loss, rtol=1e-12, atol=0.0)
        loss.backward()
        slope = torch.cat(
            [
                network[0].weight.grad.T.reshape(-1),
                network[0].bias.grad,
                network[2].weight.grad.T.reshape(-1),
                network[2].bias.grad,
            ]
        )
        gradient = objective_gradient(batch, task.x0)[b]
        torch.testing.assert_close(gradient, slope, rtol=1e-10, atol=1e-13)


def test_networks_have_one_size_whatever_the_samples() -> None:
    """Ten classes, of which 4 samples show at most 4."""
    family = NetworkFamily("digits", hidden=2, rows=4)
    sizes = {family.draw(1, seed=seed).x0.shape[1] for seed in range(6)}
    assert sizes == {64 * 2 + 2 + 2 * 10 + 10}
    start = NetworkFamily("wine", hidden=40).draw(20, seed=0).x0
    weights, bias = start[:, : 13 * 40], start[:, 13 * 40 : 14 * 40]
    assert float(weights.std()) == pytest.approx(13**-0.5, rel=0.03)
    assert bias.abs().max() == 0


# --- Draws


def test_labels_and_sparsity_of_the_generator() -> None:
    """Without flips the signs of W x*; with them that share of them others, x* s of the time."""
    clean = LogisticFamily(40, 50, flipped=0.0, nonzeros=0.1).draw(40, seed=2, dtype=DTYPE)
    noisy = LogisticFamily(40, 50, flipped=0.2, nonzeros=0.1).draw(40, seed=2, dtype=DTYPE)
    first, second = clean.objective, noisy.objective
    assert isinstance(first, LinearBatch)
    assert isinstance(second, LinearBatch)
    assert torch.equal(first.features, second.features)
    assert set(first.labels.unique().tolist()) == {-1.0, 1.0}
    flipped = float((first.labels != second.labels).double().mean())
    assert flipped == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / 2000) ** 0.5)
    assert float(first.features.std()) == pytest.approx(1.0, rel=0.01)
    # A sparse x*: the rows' mean, turned by the labels, lies along it, and is zero elsewhere but
    # for noise of size 1/sqrt(50).
    turned = (first.features * first.labels.unsqueeze(-1)).mean(1).abs()
    large = float((turned > 0.45).double().mean())
    assert 0.02 < large < 0.1
    dense = LogisticFamily(40, 50, flipped=0.0, nonzeros=1.0).draw(40, seed=2, dtype=DTYPE)
    assert not torch.equal(dense.objective.labels, first.labels)  # type: ignore[attr-defined]


def test_without_rows_to_spare_the_data_are_separable() -> None:
    """d > n and no ridge: f has no minimum, and is 0 in the limit."""
    task = LogisticFamily(12, 5).draw(3, seed=1, dtype=DTYPE)
    batch = task.objective
    assert isinstance(batch, LinearBatch)
    direction = torch.linalg.lstsq(batch.features, batch.labels.unsqueeze(-1)).solution.squeeze(-1)
    assert float(batch(1e3 * direction).max()) < 1e-300


def test_least_squares_have_the_condition_and_the_noise_that_they_say() -> None:
    task = LeastSquaresFamily(5, 4000, condition=100.0, noise=0.5).draw(2, seed=3, dtype=DTYPE)
    batch = task.objective
    assert isinstance(batch, LinearBatch)
    sizes = batch.features.std(1)
    torch.testing.assert_close(sizes[0], torch.logspace(0, -1, 5, dtype=DTYPE), rtol=0.05, atol=0.0)
    for features, labels in zip(batch.features, batch.labels, strict=True):
        found = torch.linalg.lstsq(features, labels.unsqueeze(-1)).solution.squeeze(-1)
        assert float((features @ found - labels).std()) == pytest.approx(0.5, rel=0.05)


def test_the_smooth_lasso_is_near_the_lasso() -> None:
    """min smooth <= min lasso <= min smooth + l1 s d, the lasso by coordinate descent."""
    linear = pytest.importorskip("sklearn.linear_model")
    task = LeastSquaresFamily(6, 30, l1=0.2, nonzeros=0.5).draw(3, seed=8, dtype=DTYPE)
    batch = task.objective
    assert isinstance(batch, LinearBatch)
    x = task.x0
    for _ in range(4000):
        x = x - 0.05 * batch.gradient(x)
    assert batch.gradient(x).abs().max() < 1e-8
    for b in range(3):
        model = linear.Lasso(alpha=0.2, fit_intercept=False, tol=1e-12, max_iter=10**5)
        model.fit(batch.features[b].numpy(), batch.labels[b].numpy())
        z = torch.as_tensor(model.coef_)
        residual = batch.features[b] @ z - batch.labels[b]
        least = float(residual.square().mean() / 2 + 0.2 * z.abs().sum())
        found = float(batch(x)[b])
        assert found <= least <= found + 0.2 * 1e-2 * 6


def test_real_data_are_rows_of_the_set() -> None:
    features, labels = breast_cancer()
    batch = data_family().draw(4, seed=5, dtype=DTYPE).objective
    assert isinstance(batch, LinearBatch)
    whole = torch.cat([features, labels.unsqueeze(1)], dim=1)
    seen = []
    for b in range(4):
        mine = torch.cat([batch.features[b], batch.labels[b].unsqueeze(1)], dim=1)
        same = (mine.unsqueeze(1) == whole).all(-1)
        assert same.any(1).all()
        seen.append(frozenset(same.double().argmax(1).tolist()))
    assert [len(one) for one in seen] == [20] * 4  # without replacement
    assert len(set(seen)) == 4


# --- Minibatches


def step_gradient(batch: LinearBatch | NetworkBatch, k: int, x: Tensor) -> Tensor:
    """What step k is given of a minibatch."""
    given = batch.gradient_at(k, x)
    assert given is not None
    return given


def minibatches(**options: object) -> tuple[LinearBatch, Tensor]:
    task = LogisticFamily(4, 8, ridge=0.2, minibatch=3, **options).draw(2, seed=6, dtype=DTYPE)  # type: ignore[arg-type]
    assert isinstance(task.objective, LinearBatch)
    return task.objective, task.x0


def test_a_step_has_its_own_rows() -> None:
    batch, x = minibatches()
    first = step_gradient(batch, 0, x)
    assert torch.equal(first, step_gradient(batch, 0, x))
    others = [step_gradient(batch, k, x) for k in range(1, 6)]
    assert sum(torch.equal(first, other) for other in others) == 0
    assert not torch.equal(first, batch.gradient(x))
    seeded = LinearBatch(batch.features, batch.labels, ridge=0.2, minibatch=3, seed=7)
    assert not torch.equal(first, step_gradient(seeded, 0, x))
    every = LinearBatch(batch.features, batch.labels, ridge=0.2)
    assert every.gradient_at(3, x) is None


def test_a_minibatch_is_the_gradient_on_three_rows() -> None:
    """There is one choice of 3 rows of 8, the same in both problems, whose mean it is."""
    batch, x = minibatches()
    slopes = torch.stack(
        [
            LinearBatch(batch.features[:, [i]], batch.labels[:, [i]], ridge=0.2).gradient(x)
            for i in range(8)
        ]
    )
    choices = torch.combinations(torch.arange(8), 3)
    means = slopes[choices].mean(1)
    for k in range(4):
        off = (means - step_gradient(batch, k, x)).abs().flatten(1).amax(1)
        assert float(off.min()) < 1e-14
        assert int((off < 1e-6).sum()) == 1


def test_minibatches_are_right_on_average() -> None:
    batch, x = minibatches()
    draws = torch.stack([step_gradient(batch, k, x) for k in range(4000)])
    spread = draws.std(0) / 4000**0.5
    assert ((draws.mean(0) - batch.gradient(x)).abs() < 4.5 * spread).all()
    assert (spread < 0.01).all()


def test_minibatches_of_networks() -> None:
    """The gradient of the network on three of five samples, the same ones for every problem."""
    family = NetworkFamily("wine", hidden=2, rows=5, ridge=0.1)
    task = replace(family, minibatch=3).draw(2, seed=5, dtype=DTYPE)
    batch, x = task.objective, task.x0
    assert isinstance(batch, NetworkBatch)
    assert family.draw(2, seed=5, dtype=DTYPE).objective.gradient_at(0, x) is None  # type: ignore[attr-defined]
    slopes = [
        objective_gradient(
            NetworkBatch(
                batch.inputs[:, list(rows)],
                batch.labels[:, list(rows)],
                hidden=2,
                ridge=0.1,
                classes=3,
            ),
            x,
        )
        for rows in torch.combinations(torch.arange(5), 3).tolist()
    ]
    found = set()
    for k in range(12):
        given = step_gradient(batch, k, x)
        off = torch.stack([(one - given).abs().max() for one in slopes])
        assert float(off.min()) < 1e-14
        found.add(int(off.argmin()))
    assert len(found) > 3


def test_all_rows_are_not_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a minibatch the gradient that is there already is the one that a step is given."""
    calls: list[str] = []
    for name in ("value_and_gradient", "gradient"):
        own = getattr(LinearBatch, name)

        def counted(self: Any, x: Tensor, own: Any = own, name: str = name) -> Any:
            calls.append(name)
            return own(self, x)

        monkeypatch.setattr(LinearBatch, name, counted)
    task = LogisticFamily(4, 8, ridge=0.2).draw(2, seed=6)
    evaluate(LearnedSchedule([0.1]), task, horizon=7)
    assert calls == ["value_and_gradient"] * 8


# --- Bad input

FLAT = torch.ones(2, 3, dtype=DTYPE)
CUBE = torch.ones(2, 3, 4, dtype=DTYPE)


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda: LogisticFamily(0), ValueError, "dim must be at least 1; got 0"),
        (lambda: LogisticFamily(4.0), TypeError, "dim must be an int"),
        (lambda: LogisticFamily(ridge=-0.1), ValueError, "ridge must be finite and >= 0"),
        (lambda: LogisticFamily(l1=float("nan")), ValueError, "l1 must be"),
        (lambda: LogisticFamily(flipped=1.5), ValueError, "flipped must be a share"),
        (lambda: LogisticFamily(nonzeros=-0.5), ValueError, "nonzeros"),
        (lambda: LogisticFamily(loss="hinge"), ValueError, "loss must be one of .*'hinge'"),
        (lambda: LogisticFamily(4, 8, minibatch=9), ValueError, "minibatch must be at most .* 8"),
        (lambda: LogisticFamily(minibatch=0), ValueError, "minibatch must be at least 1"),
        (lambda: LogisticFamily(targets=(0.1, 0.0)), ValueError, r"targets\[1\] must be .* > 0"),
        (lambda: LogisticFamily(targets=(-1.0,)), ValueError, r"targets\[0\]"),
        (lambda: LogisticFamily(targets=()), ValueError, "targets must hold at least one"),
        (lambda: LogisticFamily(targets=0.1), TypeError, "targets must be a list"),
        (lambda: LeastSquaresFamily(noise=-1.0), ValueError, "noise"),
        (lambda: LeastSquaresFamily(condition=0.5), ValueError, "condition must be"),
        (lambda: LeastSquaresFamily(rows=4, minibatch=5), ValueError, "minibatch"),
        (lambda: RosenbrockFamily(1), ValueError, "dim must be at least 2; got 1"),
        (lambda: RosenbrockFamily(steepest=0.1), ValueError, "steepest"),
        (lambda: NetworkFamily("iris2"), ValueError, "data must be one of .*iris2"),
        (lambda: NetworkFamily(hidden=0), ValueError, "hidden"),
        (lambda: NetworkFamily(rows=0), ValueError, "rows"),
        (lambda: NetworkFamily(rows=4, minibatch=5), ValueError, "minibatch must be at most .* 4"),
        (lambda: MixedFamily([]), ValueError, "families must hold at least one"),
        (lambda: MixedFamily([LogisticFamily]), TypeError, r"families\[0\] must be a TaskFamily"),
        (lambda: LogisticFamily().draw(0, seed=1), ValueError, "count must be at least 1"),
        (lambda: LogisticFamily().draw(2, seed=1.5), TypeError, "seed must be an int"),
        (lambda: LogisticFamily().draw(2, seed=1, dtype=torch.int64), TypeError, "dtype must be"),
        (lambda: data_family(ridge=-1.0), ValueError, "ridge"),
        (lambda: LinearDataFamily(FLAT, FLAT[:, 0], 3), ValueError, "rows must be at most .* 2"),
        (lambda: LinearDataFamily(FLAT, FLAT[0], 1), ValueError, "labels must be as many"),
        (lambda: LinearDataFamily(FLAT, 0 * FLAT[:, 0], 1), ValueError, "labels must be -1 or"),
        (lambda: LinearDataFamily(FLAT[0], FLAT[0], 1), ValueError, "features must have shape"),
        (lambda: LinearBatch(CUBE, FLAT[:, :2]), ValueError, "labels must have the shape"),
        (lambda: LinearBatch(CUBE, FLAT.float()), ValueError, "the type of features"),
        (lambda: LinearBatch(CUBE.long(), FLAT), TypeError, "features must be a floating"),
        (lambda: LinearBatch(CUBE, FLAT - 1), ValueError, "numbers from 0 to 0"),
        (lambda: LinearBatch(CUBE, FLAT, smoothing=0.0), ValueError, "smoothing must be"),
        (lambda: LinearBatch(CUBE, FLAT, minibatch=4), ValueError, "minibatch must be at most"),
        (lambda: RosenbrockBatch(torch.tensor([1.0, -1.0])), ValueError, "steepness must be"),
        (lambda: RosenbrockBatch(torch.ones(1))(torch.ones(1, 1)), ValueError, "d >= 2"),
        (lambda: NetworkBatch(CUBE, FLAT), TypeError, "labels must be a tensor of int64"),
        (lambda: NetworkBatch(CUBE, FLAT.long(), classes=1), ValueError, "from 0 to classes - 1"),
        (lambda: NetworkBatch(CUBE, CUBE.long()), ValueError, "inputs must have shape"),
        (lambda: MetaTask(None, FLAT), TypeError, "objective must be callable"),
        (lambda: MetaTask(torch.sum, FLAT[0]), ValueError, r"x0 must have shape \(B, d\)"),
        (lambda: MetaTask(torch.sum, FLAT.long()), TypeError, "x0 must be a floating"),
        (lambda: MetaTask(torch.sum, FLAT, "rise"), ValueError, "criterion must be .*'rise'"),
        (lambda: MetaTask(torch.sum, FLAT, 3.0), TypeError, "criterion must be callable"),
        (lambda: MetaTask(torch.sum, FLAT, targets=0 * FLAT[0]), ValueError, "finite and posit"),
        (lambda: MetaTask(torch.sum, FLAT, targets=FLAT), ValueError, r"shape \(K,\); got"),
        (lambda: MetaTask(torch.sum, FLAT, targets=[1.0]), TypeError, "targets must be a float"),
        (
            lambda: MetaTask(torch.sum, FLAT, torch.sub, targets=FLAT[0] / 0),
            ValueError,
            "targets must be finite; got",
        ),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        make()


def test_one_number_for_all_problems_is_no_objective() -> None:
    task = MetaTask(lambda x: x.square().sum(), FLAT)
    with pytest.raises(ValueError, match=r"one value a problem, \(2,\).* got \(\)"):
        task.value_and_gradient(task.x0)
