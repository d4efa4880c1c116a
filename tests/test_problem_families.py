"""Quadratics, rotations and linear models by their formulas, and their bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ode_stopping.problems import (
    HouseholderRotation,
    LogisticRegression,
    Quadratic,
    QuarticQuadratic,
    Rosenbrock,
    SmoothSVM,
    geometric_spectrum,
    random_rotation,
    synthetic_logistic,
)

DIM = 5


def data(columns: int) -> tuple[Tensor, Tensor]:
    return synthetic_logistic(samples=12, dim=columns, seed=3)


def spectrum() -> Tensor:
    return geometric_spectrum(DIM, 30.0)


def symmetric() -> Tensor:
    rotation = random_rotation(DIM, seed=4)
    return (rotation * spectrum()) @ rotation.mT


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)


# --- quadratics and rotations -------------------------------------------------------------------


def test_rotated_forms_are_one_quadratic() -> None:
    reflections = HouseholderRotation.random(DIM, seed=5, reflections=3)
    matrix = reflections.dense() @ torch.diag(spectrum()) @ reflections.dense().mT
    x = points(4)
    forms = [
        Quadratic(spectrum(), rotation=reflections),
        Quadratic(spectrum(), rotation=reflections.dense()),
        Quadratic(spectrum().requires_grad_(), rotation=reflections.dense()),
        Quadratic(matrix),
        Quadratic(matrix.clone().requires_grad_()),
    ]
    for form in forms:
        with torch.no_grad():
            torch.testing.assert_close(form.dense(), matrix, rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(form.gradient(x), x @ matrix, rtol=1e-13, atol=1e-13)
            value = 0.5 * torch.einsum("bi,ij,bj->b", x, matrix, x)
            torch.testing.assert_close(form(x), value, rtol=1e-13, atol=1e-13)
            assert form.lipschitz() == pytest.approx(30.0, rel=1e-13)


def test_a_matrix_acts_through_its_symmetric_part_when_differentiated() -> None:
    matrix = symmetric().requires_grad_()
    x, w = points(seed=1), points(seed=2)
    (slope,) = torch.autograd.grad(Quadratic(matrix).gradient(x) @ w, matrix)
    torch.testing.assert_close(slope, 0.5 * (torch.outer(x, w) + torch.outer(w, x)))


def test_quartic_term() -> None:
    x = points(3)
    plain, quartic = Quadratic(symmetric()), QuarticQuadratic(symmetric(), quartic=2.0)
    torch.testing.assert_close(quartic(x) - plain(x), 0.5 * (x**4).sum(-1))
    assert quartic.lipschitz() is None
    assert QuarticQuadratic(spectrum(), quartic=0).lipschitz() == 30.0


def test_householder_product() -> None:
    vectors = torch.randn(3, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rotation = HouseholderRotation(vectors)
    explicit = torch.eye(DIM, dtype=torch.float64)
    for v in vectors:
        explicit = explicit @ (
            torch.eye(DIM, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v)
        )
    x = points(2)
    torch.testing.assert_close(rotation.dense(), explicit, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(rotation(x), x @ explicit.mT, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(rotation.inverse(rotation(x)), x, rtol=1e-13, atol=1e-14)


def test_large_dimension_needs_no_matrix() -> None:
    dim = 10_000
    problem = Quadratic(
        geometric_spectrum(dim, 100.0), rotation=HouseholderRotation.random(dim, seed=0)
    )
    assert sum(b.numel() for b in problem.buffers()) < 10 * dim
    x = torch.ones(dim, dtype=torch.float64)
    assert float(problem(x)) == pytest.approx(float(0.5 * x @ problem.gradient(x)), rel=1e-13)


def test_random_rotation() -> None:
    rotation = random_rotation(40, seed=1)
    identity = torch.eye(40, dtype=torch.float64)
    torch.testing.assert_close(rotation.mT @ rotation, identity, rtol=0, atol=1e-13)
    assert torch.equal(rotation, random_rotation(40, seed=1))
    assert not torch.equal(rotation, random_rotation(40, seed=2))
    assert torch.equal(random_rotation(40, seed=1, dtype=torch.float32), rotation.float())
    # Haar: the mean of an entry is 0. Without the sign fix the diagonal is biased to one side.
    diagonal = torch.stack([random_rotation(3, seed=s).diagonal() for s in range(400)])
    assert float(diagonal.mean().abs()) < 4 * math.sqrt(1 / 3 / diagonal.numel())
    assert float(diagonal.pow(2).mean()) == pytest.approx(1 / 3, abs=0.05)


def test_geometric_spectrum() -> None:
    values = geometric_spectrum(7, 1e4)
    assert float(values[0]) == 1.0
    assert float(values[-1]) == 1e4
    torch.testing.assert_close(values[1:] / values[:-1], values.new_full((6,), 1e4 ** (1 / 6)))
    assert geometric_spectrum(1, 1.0).tolist() == [1.0]


# --- linear models --------------------------------------------------------------------------------


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_models_by_their_definition(intercept: bool, reduction: str) -> None:
    X, y = data(DIM - int(intercept))
    rows = torch.cat((X, -torch.ones(len(X), 1, dtype=X.dtype)), 1) if intercept else X
    x = points(seed=3)
    margins = [float(label * (row @ x)) for row, label in zip(rows, y, strict=True)]
    share = 1 / len(margins) if reduction == "mean" else 1.0
    penalty = 0.2 * float(x @ x)
    options = {"regularization": 0.4, "intercept": intercept, "reduction": reduction}
    logistic = share * sum(math.log1p(math.exp(-m)) for m in margins) + penalty
    hinge = share * sum(0.5 * max(0.0, 1 - m) ** 2 for m in margins) + penalty
    assert float(LogisticRegression(X, y, **options)(x)) == pytest.approx(logistic, rel=1e-13)
    assert float(SmoothSVM(X, y, **options)(x)) == pytest.approx(hinge, rel=1e-13)


def test_defaults_of_the_linear_models() -> None:
    X, y = data(3)
    assert LogisticRegression(X, y).dim == 3
    assert SmoothSVM(X, y).dim == 4
    start = torch.zeros(4, dtype=torch.float64)
    assert float(SmoothSVM(X, y)(start)) == 6.0  # 12 samples, 1/2 each, summed
    assert float(LogisticRegression(X, y)(start[:3])) == pytest.approx(math.log(2), rel=1e-15)


def test_logistic_loss_is_stable_and_smooth_for_any_margin() -> None:
    margins = torch.tensor([-800.0, -40.0, -20.0, 0.0, 20.0, 800.0], dtype=torch.float64)
    exact = [800.0, 40.0, 20 + math.log1p(math.exp(-20)), math.log(2), math.log1p(math.exp(-20)), 0]
    torch.testing.assert_close(
        LogisticRegression.loss(margins), margins.new_tensor(exact), rtol=1e-15, atol=0
    )
    slope = LogisticRegression.loss_derivative(margins)
    assert bool(torch.isfinite(slope).all())
    # loss(m) + m = log(1 + exp(m)), to rounding, also where the common implementation of softplus
    # changes its formula (m = -20) and drops 2e-9.
    fine = torch.linspace(-45.0, -15.0, 3001, dtype=torch.float64)
    torch.testing.assert_close(
        LogisticRegression.loss(fine) + fine, torch.log1p(torch.exp(fine)), rtol=0, atol=2e-14
    )


def test_lipschitz_with_fewer_samples_than_features() -> None:
    X, y = synthetic_logistic(samples=4, dim=9, seed=1)
    rows = torch.cat((X, -torch.ones(4, 1, dtype=X.dtype)), 1)
    largest = float(torch.linalg.svdvals(rows)[0]) ** 2
    assert SmoothSVM(X, y).lipschitz() == pytest.approx(largest, rel=1e-12)
    expected = largest / 16 + 0.5
    model = LogisticRegression(X, y, intercept=True, regularization=0.5)
    assert model.lipschitz() == pytest.approx(expected, rel=1e-12)


def test_linear_models_take_arrays() -> None:
    X, y = data(DIM)
    frozen = X.numpy().copy()
    frozen.flags.writeable = False
    model = LogisticRegression(frozen, y.numpy().astype(np.int64))
    torch.testing.assert_close(model(points()), LogisticRegression(X, y)(points()))
    assert LogisticRegression(X.numpy().astype(np.float32), y).dtype == torch.float32
    assert LogisticRegression([[0, 1], [1, 0]], [1, -1]).dtype == torch.float64


def test_bounds_of_the_linear_models() -> None:
    model = SmoothSVM(*data(DIM))
    assert model.minimum is None
    assert model.minimizer is None
    assert model.lower_bound == 0.0


# --- bad input ------------------------------------------------------------------------------------

X, Y = data(3)
EYE = torch.eye(3, dtype=torch.float64)
THREE = torch.ones(3, dtype=torch.float64)
BAD = {
    "spectrum rank": (lambda: Quadratic(torch.ones(2, 2, 2)), ValueError, "matrix_or_spectrum"),
    "spectrum empty": (lambda: Quadratic(torch.ones(0)), ValueError, "matrix_or_spectrum"),
    "spectrum negative": (
        lambda: Quadratic(torch.tensor([1.0, -1e-3])),
        ValueError,
        "matrix_or_spectrum.*must not be negative",
    ),
    "spectrum NaN": (
        lambda: Quadratic(torch.tensor([1.0, math.nan])),
        ValueError,
        "matrix_or_spectrum must be finite",
    ),
    "spectrum integers": (
        lambda: Quadratic(torch.tensor([1, 2])),
        TypeError,
        "matrix_or_spectrum must be a floating-point",
    ),
    "spectrum text": (lambda: Quadratic(["a"]), TypeError, "matrix_or_spectrum"),
    "matrix not square": (lambda: Quadratic(torch.ones(2, 3)), ValueError, "must be square"),
    "matrix not symmetric": (
        lambda: Quadratic(torch.tensor([[1.0, 0.5], [0.4, 1.0]])),
        ValueError,
        "must be symmetric",
    ),
    "matrix indefinite": (
        lambda: Quadratic(torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
        ValueError,
        "must be positive semidefinite, its smallest eigenvalue is -1",
    ),
    "rotation beside matrix": (
        lambda: Quadratic(EYE, rotation=EYE),
        ValueError,
        "rotation goes with a spectrum",
    ),
    "rotation shape": (lambda: Quadratic(THREE, rotation=EYE[:2]), ValueError, "rotation"),
    "rotation dtype": (lambda: Quadratic(THREE, rotation=EYE.float()), ValueError, "rotation"),
    "rotation not orthogonal": (
        lambda: Quadratic(THREE, rotation=EYE + 1e-6),
        ValueError,
        "rotation must be orthogonal",
    ),
    "rotation kind": (lambda: Quadratic(THREE, rotation="x"), TypeError, "rotation must be None"),
    "reflections dimension": (
        lambda: Quadratic(THREE, rotation=HouseholderRotation.random(4, seed=0)),
        ValueError,
        "rotation is of dimension 4",
    ),
    "reflections none": (
        lambda: HouseholderRotation.random(4, reflections=0, seed=0),
        ValueError,
        "reflections",
    ),
    "reflections zero": (lambda: HouseholderRotation(torch.zeros(1, 3)), ValueError, "vectors"),
    "reflections rank": (lambda: HouseholderRotation(torch.ones(3)), ValueError, "vectors"),
    "reflections integers": (
        lambda: HouseholderRotation(torch.ones(1, 3).long()),
        TypeError,
        "vectors",
    ),
    "rotation dim": (lambda: random_rotation(0, seed=0), ValueError, "dim"),
    "condition": (lambda: geometric_spectrum(3, 0.5), ValueError, "condition"),
    "condition of one": (lambda: geometric_spectrum(1, 2.0), ValueError, "condition"),
    "quartic negative": (lambda: QuarticQuadratic(THREE, quartic=-1.0), ValueError, "quartic"),
    "quartic vector": (lambda: QuarticQuadratic(THREE, quartic=THREE), ValueError, "quartic"),
    "rosenbrock dim": (lambda: Rosenbrock(dim=1), ValueError, "dim must be at least 2"),
    "X rank": (lambda: LogisticRegression(X[0], Y), ValueError, "X must have shape"),
    "X NaN": (lambda: LogisticRegression(X * math.nan, Y), ValueError, "X must be finite"),
    "y shape": (lambda: SmoothSVM(X, Y[1:]), ValueError, r"y must have shape \(12,\)"),
    "y column": (lambda: SmoothSVM(X, Y[:, None]), ValueError, r"y must have shape \(12,\)"),
    "y 0/1": (
        lambda: LogisticRegression(X, (Y + 1) / 2),
        ValueError,
        r"labels -1 and \+1, got 0.0, 1.0; labels 0 and 1 become 2 \* y - 1",
    ),
    "y bool": (lambda: LogisticRegression(X, Y > 0), ValueError, "got False, True"),
    "y NaN": (lambda: LogisticRegression(X, Y * math.nan), ValueError, "labels"),
    "reduction": (lambda: SmoothSVM(X, Y, reduction="max"), ValueError, "reduction"),
    "regularization": (
        lambda: SmoothSVM(X, Y, regularization=-1),
        ValueError,
        "regularization must not be negative",
    ),
    "regularization list": (
        lambda: SmoothSVM(X, Y, regularization=[1.0]),
        ValueError,
        "regularization must be a number",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


def test_sparse_data_are_refused_with_the_remedy() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"X must be dense.*toarray"):
        LogisticRegression(sparse.csr_matrix(X.numpy()), Y)
