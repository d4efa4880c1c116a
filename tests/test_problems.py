"""Objectives: one contract for all of them, then what is particular to each."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from ode_stopping.problems import (
    HouseholderRotation,
    LogisticRegression,
    ModuleObjective,
    Problem,
    Quadratic,
    QuarticQuadratic,
    Rosenbrock,
    SmoothSVM,
    geometric_spectrum,
    objective_gradient,
    random_rotation,
    synthetic_logistic,
)

DIM = 5


@dataclass(frozen=True)
class Case:
    """A problem to test.

    Attributes:
        make: dtype -> problem with DIM unknowns.
        cubic: f has a third derivative, so that central differences have an error of order two.
        steepest: where the Hessian's largest eigenvalue is the Lipschitz constant, if anywhere.
    """

    make: Callable[[torch.dtype], Problem]
    cubic: bool = True
    steepest: Tensor | None = None


class Bare(Problem):
    """A user's problem that says nothing but its value."""

    dim = DIM

    def forward(self, x: Tensor) -> Tensor:
        return torch.cosh(x).sum(-1)


def data(dtype: torch.dtype, columns: int) -> tuple[Tensor, Tensor]:
    return synthetic_logistic(samples=12, dim=columns, seed=3, dtype=dtype)


def neuron(dtype: torch.dtype) -> ModuleObjective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(DIM - 1, 1), nn.Tanh(), nn.Flatten(0)).to(dtype)
    return ModuleObjective(model, nn.functional.mse_loss, data(dtype, DIM - 1))


def spectrum(dtype: torch.dtype = torch.float64) -> Tensor:
    return geometric_spectrum(DIM, 30.0, dtype=dtype)


def symmetric(dtype: torch.dtype = torch.float64) -> Tensor:
    rotation = random_rotation(DIM, seed=4)
    return ((rotation * spectrum()) @ rotation.mT).to(dtype)


ORIGIN = torch.zeros(DIM, dtype=torch.float64)
# To add a problem to the contract, add a line.
CASES = {
    "diagonal": Case(lambda t: Quadratic(spectrum(t)), False, ORIGIN),
    "matrix": Case(lambda t: Quadratic(symmetric(t)), False, ORIGIN),
    "rotated": Case(
        lambda t: Quadratic(spectrum(t), rotation=random_rotation(DIM, seed=1, dtype=t)),
        False,
        ORIGIN,
    ),
    "reflected": Case(
        lambda t: Quadratic(spectrum(t), rotation=HouseholderRotation.random(DIM, seed=1, dtype=t)),
        False,
        ORIGIN,
    ),
    "quartic": Case(
        lambda t: QuarticQuadratic(
            spectrum(t), rotation=random_rotation(DIM, seed=2, dtype=t), quartic=0.7
        )
    ),
    "rosenbrock": Case(lambda t: Rosenbrock(dim=DIM)),
    "logistic": Case(
        lambda t: LogisticRegression(*data(t, DIM), regularization=0.3), steepest=ORIGIN
    ),
    "logistic-intercept-sum": Case(
        lambda t: LogisticRegression(*data(t, DIM - 1), intercept=True, reduction="sum"),
        steepest=ORIGIN,
    ),
    "svm": Case(lambda t: SmoothSVM(*data(t, DIM - 1)), False, ORIGIN),
    "svm-mean-penalty": Case(
        lambda t: SmoothSVM(*data(t, DIM), regularization=0.2, intercept=False, reduction="mean"),
        False,
        ORIGIN,
    ),
    "network": Case(neuron),
    "bare": Case(lambda t: Bare()),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def points(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.5 * torch.randn(*shape, DIM, generator=generator, dtype=torch.float64).to(dtype)


# --- the contract ----------------------------------------------------------------------------


@every_case
def test_gradient_is_that_of_autograd(case: Case) -> None:
    problem, x = case.make(torch.float64), points(7)
    leaf = x.clone().requires_grad_()
    problem(leaf).sum().backward()
    torch.testing.assert_close(problem.gradient(x), leaf.grad, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(objective_gradient(problem, x), leaf.grad, rtol=1e-13, atol=1e-13)


@every_case
def test_gradient_is_the_limit_of_central_differences(case: Case) -> None:
    problem = case.make(torch.float64)
    x, direction = points(seed=1), points(seed=2)
    exact = float(problem.gradient(x) @ direction)

    def error(h: float) -> float:
        return float(problem(x + h * direction) - problem(x - h * direction)) / (2 * h) - exact

    if case.cubic:
        assert error(2e-2) / error(1e-2) == pytest.approx(4.0, rel=2e-2)
        assert error(1e-2) / error(5e-3) == pytest.approx(4.0, rel=2e-2)
    else:  # differences of a quadratic have no error but rounding
        assert abs(error(1e-2)) < 1e-11 * max(1.0, abs(exact))


@every_case
def test_batch_equals_loop(case: Case) -> None:
    problem, x = case.make(torch.float64), points(3, 4)
    value, gradient = problem(x), problem.gradient(x)
    assert value.shape == (3, 4)
    assert gradient.shape == x.shape
    for i in range(3):
        for j in range(4):
            one = x[i, j]
            assert problem(one).shape == ()
            torch.testing.assert_close(value[i, j], problem(one), rtol=1e-13, atol=1e-13)
            torch.testing.assert_close(
                gradient[i, j], problem.gradient(one), rtol=1e-13, atol=1e-13
            )


@every_case
def test_second_and_third_derivatives(case: Case) -> None:
    problem = case.make(torch.float64)
    x = points(seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective_gradient(problem, z), (x,))
    assert torch.autograd.gradgradcheck(lambda z: objective_gradient(problem, z), (x,))


@every_case
def test_autograd_modes(case: Case) -> None:
    problem, x = case.make(torch.float64), points(2)
    with torch.no_grad():
        quiet = objective_gradient(problem, x)
        quiet_for_leaf = objective_gradient(problem, x.clone().requires_grad_())
    assert not quiet.requires_grad
    assert not quiet_for_leaf.requires_grad
    assert not objective_gradient(problem, x).requires_grad  # nothing here requires grad
    loud = objective_gradient(problem, x.clone().requires_grad_())
    assert loud.requires_grad
    assert torch.equal(loud.detach(), quiet)
    assert not x.requires_grad


@every_case
def test_float32_is_kept(case: Case) -> None:
    problem, reference = case.make(torch.float32), case.make(torch.float64)
    x = points(3, dtype=torch.float32)
    assert problem(x).dtype == problem(x[0]).dtype == torch.float32
    assert problem.gradient(x).dtype == torch.float32
    torch.testing.assert_close(problem(x).double(), reference(x.double()), rtol=1e-4, atol=1e-4)


@every_case
def test_conversion_reaches_the_data(case: Case) -> None:
    problem = case.make(torch.float64).to(torch.float32)
    assert problem(points(dtype=torch.float32)).dtype == torch.float32
    if problem.minimizer is not None:
        assert problem.minimizer.dtype == torch.float32


@every_case
def test_lipschitz_constant_is_the_largest_curvature(case: Case) -> None:
    problem = case.make(torch.float64)
    constant = problem.lipschitz()
    if constant is None:
        assert case.steepest is None
        return

    def curvature(x: Tensor) -> float:
        hessian = torch.autograd.functional.hessian(lambda z: problem(z), x)
        return float(torch.linalg.eigvalsh(hessian)[-1])

    assert isinstance(constant, float)
    assert all(curvature(x) <= constant * (1 + 1e-12) for x in points(20, seed=6))
    assert case.steepest is not None
    assert curvature(case.steepest) == pytest.approx(constant, rel=1e-12)


@every_case
def test_minimum_and_minimizer(case: Case) -> None:
    problem = case.make(torch.float64)
    bound = problem.lower_bound
    if bound is not None:
        assert float(problem(points(200, seed=7)).min()) >= bound
    if problem.minimizer is not None:
        assert problem.minimum is not None
        assert float(problem(problem.minimizer)) == pytest.approx(problem.minimum, abs=1e-14)
        assert float(problem.gradient(problem.minimizer).norm()) < 1e-14
        assert problem.minimizer.shape == (DIM,)


@every_case
def test_copies_compute_the_same(case: Case) -> None:
    problem, x = case.make(torch.float64), points(3)
    for twin in (copy.deepcopy(problem), pickle.loads(pickle.dumps(problem))):
        assert torch.equal(twin(x), problem(x))
        assert torch.equal(twin.gradient(x), problem.gradient(x))


# "bare" is a user's class, whose checks are its own.
@pytest.mark.parametrize("name", [name for name in CASES if name != "bare"])
def test_wrong_points_are_named(name: str) -> None:
    problem = CASES[name].make(torch.float64)
    for call in (problem, problem.gradient):
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 5\)"):
            call(torch.zeros(3, DIM + 1, dtype=torch.float64))
        with pytest.raises(TypeError, match="x must be a tensor"):
            call([0.0] * DIM)
        if problem.dtype is not None:
            with pytest.raises(ValueError, match=r"x has dtype torch\.float32"):
                call(points(dtype=torch.float32))


# --- tensors that require grad ---------------------------------------------------------------


def leaf_cases() -> dict[str, tuple[Tensor, Callable[[Tensor], Problem], str]]:
    features, labels = data(torch.float64, DIM)
    rotation = random_rotation(DIM, seed=8)
    reflections = HouseholderRotation.random(DIM, seed=8)
    number = torch.tensor(0.3, dtype=torch.float64)
    return {
        "spectrum": (spectrum(), Quadratic, "spectrum"),
        "spectrum-rotated": (
            spectrum(),
            lambda leaf: Quadratic(leaf, rotation=rotation),
            "spectrum",
        ),
        "spectrum-reflected": (
            spectrum(),
            lambda leaf: QuarticQuadratic(leaf, rotation=reflections),
            "spectrum",
        ),
        "rotation": (rotation, lambda leaf: Quadratic(spectrum(), rotation=leaf), "rotation"),
        "matrix": (symmetric(), Quadratic, "matrix"),
        "quartic": (number, lambda leaf: QuarticQuadratic(spectrum(), quartic=leaf), "quartic"),
        "regularization": (
            number,
            lambda leaf: LogisticRegression(features, labels, regularization=leaf),
            "regularization",
        ),
        "features": (features, lambda leaf: LogisticRegression(leaf, labels), "features"),
        "features-svm": (features[:, 1:].clone(), lambda leaf: SmoothSVM(leaf, labels), "features"),
    }


@pytest.mark.parametrize("name", leaf_cases())
@pytest.mark.parametrize("parameter", [False, True])
def test_leaves_are_kept_and_get_their_gradient(name: str, parameter: bool) -> None:
    value, make, attribute = leaf_cases()[name]
    leaf = nn.Parameter(value.clone()) if parameter else value.clone().requires_grad_()
    problem = make(leaf)
    assert getattr(problem, attribute) is leaf
    assert [id(p) for p in problem.parameters()] == ([id(leaf)] if parameter else [])
    x, w = points(seed=9), points(seed=10)
    for _ in range(2):  # twice: no graph of construction may be used up
        by_hand = torch.autograd.grad(objective_gradient(problem, x) @ w, leaf)[0]
        # The other road: autograd of f to x, then to the leaf.
        z = x.clone().requires_grad_()
        slope = torch.autograd.grad(problem(z), z, create_graph=True)[0]
        by_autograd = torch.autograd.grad(slope @ w, leaf)[0]
        assert float(by_autograd.norm()) > 1e-6
        torch.testing.assert_close(by_hand, by_autograd, rtol=1e-12, atol=1e-13)


def test_a_network_output_can_be_the_spectrum() -> None:
    raw = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
    problem = Quadratic(torch.exp(raw), rotation=random_rotation(DIM, seed=1))
    problem(points()).backward()
    assert raw.grad is not None


def test_requires_grad_switched_on_later_is_not_lost() -> None:
    values = spectrum()
    problem = Quadratic(values, rotation=random_rotation(DIM, seed=1))
    before = problem(points())
    values.requires_grad_()
    after = problem(points())
    assert after.requires_grad
    torch.testing.assert_close(after.detach(), before, rtol=1e-14, atol=0)
