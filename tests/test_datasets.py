"""The bundled data sets and the synthetic one."""

from __future__ import annotations

import sys

import pytest
import torch

from ode_stopping.problems import (
    LogisticRegression,
    SmoothSVM,
    breast_cancer,
    digits,
    synthetic_logistic,
)


@pytest.fixture
def needs_sklearn() -> None:
    pytest.importorskip("sklearn")


@pytest.mark.usefixtures("needs_sklearn")
def test_breast_cancer() -> None:
    X, y = breast_cancer()
    assert X.shape == (569, 30)
    assert X.dtype == y.dtype == torch.float64
    assert int((y == 1).sum()) == 357  # benign
    assert int((y == -1).sum()) == 212
    assert float(X.mean(0).abs().max()) < 1e-13
    torch.testing.assert_close(X.pow(2).mean(0), X.new_ones(30), rtol=1e-13, atol=0)
    raw, _ = breast_cancer(standardize=False)
    assert float(raw[0, 0]) == 17.99
    assert LogisticRegression(X, y, intercept=True).dim == 31


@pytest.mark.usefixtures("needs_sklearn")
def test_digits() -> None:
    X, y = digits()
    assert X.shape == (360, 64)
    assert (int((y == -1).sum()), int((y == 1).sum())) == (178, 182)  # zeros and ones
    assert (float(X.min()), float(X.max())) == (0.0, 1.0)
    swapped = digits(classes=(1, 0), scale=False)
    torch.testing.assert_close(swapped[0], 16 * X)
    assert torch.equal(swapped[1], -y)
    assert SmoothSVM(X, y).dim == 65


@pytest.mark.usefixtures("needs_sklearn")
@pytest.mark.parametrize("load", [breast_cancer, digits])
def test_dtype(load) -> None:
    X, y = load(dtype=torch.float32)
    assert X.dtype == y.dtype == torch.float32
    torch.testing.assert_close(X.double(), load()[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("classes", [(0, 0), (0, 10), (1,), (1, 2, 3)])
def test_digits_names_bad_classes(classes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="classes must be two different digits"):
        digits(classes=classes)


@pytest.mark.parametrize("load", [breast_cancer, digits])
def test_missing_extra_is_named(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "ode-stopping\[checks\]"'):
        load()


def test_synthetic_logistic() -> None:
    X, y = synthetic_logistic(samples=400, dim=30, seed=1, nonzeros=4, flipped=0.1)
    assert X.shape == (400, 30)
    assert set(y.tolist()) == {-1.0, 1.0}
    assert abs(float(X.mean())) < 0.05
    assert float(X.std()) == pytest.approx(1.0, abs=0.02)
    clean = synthetic_logistic(samples=400, dim=30, seed=1, nonzeros=4, flipped=0.0)
    assert torch.equal(clean[0], X)
    assert int((clean[1] != y).sum()) == 40
    # Labels without flips follow a linear rule that uses four columns only.
    truth = torch.linalg.lstsq(X, clean[1][:, None]).solution[:, 0]
    assert int((truth.abs() > 0.15).sum()) <= 4


def test_synthetic_logistic_is_seeded_by_itself() -> None:
    before = torch.get_rng_state()
    first = synthetic_logistic(samples=5, dim=4, seed=7)
    torch.rand(3)
    torch.set_rng_state(before)
    again = synthetic_logistic(samples=5, dim=4, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], synthetic_logistic(samples=5, dim=4, seed=8)[0])
    single = synthetic_logistic(samples=5, dim=4, seed=7, dtype=torch.float32)
    assert torch.equal(single[0], first[0].float())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"samples": 0}, "samples"),
        ({"dim": 0}, "samples and dim"),
        ({"dim": 3, "nonzeros": 4}, "nonzeros"),
        ({"nonzeros": 0}, "nonzeros"),
        ({"flipped": 0.5}, "flipped"),
        ({"flipped": -0.1}, "flipped"),
    ],
)
def test_bad_sizes_are_named(options: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        synthetic_logistic(seed=0, **options)
