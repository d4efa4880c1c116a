"""Stopping criteria: one contract for all, then each by its formula."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ode_stopping.criteria import AllOf, AnyOf, Criterion, GradientNorm, LossValue, RelativeDecrease
from ode_stopping.problems import (
    LogisticRegression,
    Problem,
    Quadratic,
    QuarticQuadratic,
    Rosenbrock,
    geometric_spectrum,
    random_rotation,
    synthetic_logistic,
)

DIM = 4
TIME = torch.tensor(0.7, dtype=torch.float64)


def problem() -> QuarticQuadratic:
    return QuarticQuadratic(
        geometric_spectrum(DIM, 10.0), rotation=random_rotation(DIM, seed=1), quartic=0.5
    )


def plain(x: Tensor) -> Tensor:
    return torch.cosh(x).sum(-1) - x.shape[-1] + 0.1 * (x * x.roll(1, -1)).sum(-1)


def points(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)


REFERENCE = points(seed=9)

# To add a criterion to the contract, add a line.
CRITERIA: dict[str, Callable[..., Criterion]] = {
    "loss": lambda **o: LossValue(problem(), **o),
    "loss-autograd": lambda **o: LossValue(plain, **o),
    "gradient": lambda **o: GradientNorm(problem(), **o),
    "gradient-autograd": lambda **o: GradientNorm(plain, **o),
    "gradient-root": lambda **o: GradientNorm(problem(), squared=False, **o),
    "gradient-max": lambda **o: GradientNorm(plain, squared=False, ord=math.inf, **o),
    "gradient-max-squared": lambda **o: GradientNorm(problem(), ord=math.inf, **o),
    "gradient-3": lambda **o: GradientNorm(problem(), ord=3, **o),
    "relative-state": lambda **o: RelativeDecrease(problem(), reference=REFERENCE, **o),
    "relative-number": lambda **o: RelativeDecrease(plain, reference=3.0, minimum=-0.5, **o),
    "any-of": lambda **o: AnyOf(
        LossValue(problem(), **o), GradientNorm(plain, **o), targets=[0.1, 0.7]
    ),
    "all-of-any-of": lambda **o: AllOf(
        AnyOf(LossValue(plain, **o), LossValue(problem(), **o), targets=[0.2, 2.0]),
        GradientNorm(problem(), squared=False, **o),
        targets=[1.0, 0.3],
    ),
}
every_criterion = pytest.mark.parametrize("make", CRITERIA.values(), ids=CRITERIA.keys())


# --- the contract -------------------------------------------------------------------------------


@every_criterion
def test_one_number_a_sample(make: Callable[..., Criterion]) -> None:
    criterion, x = make(), points(3)
    value = criterion(TIME, x)
    assert value.shape == (3,)
    for one, row in zip(value, x, strict=True):
        assert criterion(TIME, row).shape == ()
        torch.testing.assert_close(one, criterion(TIME, row), rtol=1e-13, atol=1e-14)


@every_criterion
def test_autograd_modes(make: Callable[..., Criterion]) -> None:
    criterion, x = make(), points()
    with torch.no_grad():
        quiet = criterion(TIME, x)
    assert not quiet.requires_grad
    assert not criterion(TIME, x).requires_grad
    loud = criterion(TIME, x.clone().requires_grad_())
    assert loud.requires_grad
    assert torch.equal(loud.detach(), quiet)


@every_criterion
def test_derivatives(make: Callable[..., Criterion]) -> None:
    criterion, x = make(), points(seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: criterion(TIME, z), (x,))
    assert torch.autograd.gradgradcheck(lambda z: criterion(TIME, z), (x,))


@every_criterion
def test_declared_nonnegativity_holds(make: Callable[..., Criterion]) -> None:
    criterion = make()
    assert isinstance(criterion.nonnegative, bool)
    if criterion.nonnegative:
        assert float(criterion(TIME, points(500)).min()) >= 0


@every_criterion
def test_position_of_augmented_states(make: Callable[..., Criterion]) -> None:
    x, v = points(seed=1), points(seed=2)
    by_default, own = make(), make(position=lambda state: state[1])
    torch.testing.assert_close(by_default(TIME, (x, v)), by_default(TIME, x), rtol=0, atol=0)
    torch.testing.assert_close(own(TIME, (x, v)), by_default(TIME, v), rtol=0, atol=0)


@every_criterion
def test_float32_is_kept(make: Callable[..., Criterion]) -> None:
    criterion, reference = make(), make()
    for module in criterion.modules():
        if isinstance(module, Problem):
            module.float()
    if isinstance(criterion, RelativeDecrease) and criterion.reference.ndim:
        criterion.reference = criterion.reference.float()
    x = points(2).float()
    assert criterion(TIME, x).dtype == criterion(TIME, x[0]).dtype == torch.float32
    torch.testing.assert_close(
        criterion(TIME, x).double(), reference(TIME, x.double()), rtol=1e-5, atol=1e-5
    )


@every_criterion
def test_copies_compute_the_same(make: Callable[..., Criterion]) -> None:
    criterion, x = make(), points(2)
    assert torch.equal(copy.deepcopy(criterion)(TIME, x), criterion(TIME, x))


# --- formulas -----------------------------------------------------------------------------------


def test_loss_value() -> None:
    x = points(2)
    assert torch.equal(LossValue(problem())(TIME, x), problem()(x))


@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
def test_gradient_norm(ord: float) -> None:
    f, x = problem(), points()
    entries = [abs(float(g)) for g in f.gradient(x)]
    norm = max(entries) if ord == math.inf else sum(e**ord for e in entries) ** (1 / ord)
    root = GradientNorm(f, squared=False, ord=ord)(TIME, x)
    assert float(root) == pytest.approx(norm, rel=1e-13)
    assert float(GradientNorm(f, ord=ord)(TIME, x)) == pytest.approx(norm**2, rel=1e-13)


def test_gradient_norm_of_a_matrix_state() -> None:
    x = points(3)
    for options in ({}, {"squared": False}, {"ord": 1}, {"ord": math.inf}):
        whole = GradientNorm(lambda z: torch.cosh(z).sum(), **options)(TIME, x)
        flat = GradientNorm(lambda z: torch.cosh(z).sum(-1), **options)(TIME, x.flatten())
        assert whole.shape == ()
        torch.testing.assert_close(whole, flat, rtol=1e-14, atol=0)
    number = torch.tensor(2.0, dtype=torch.float64)
    assert float(GradientNorm(lambda z: z**2)(TIME, number)) == 16.0


@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
def test_gradient_norm_at_a_stationary_point(squared: bool, ord: float) -> None:
    x = torch.zeros(DIM, dtype=torch.float64, requires_grad=True)
    criterion = GradientNorm(Quadratic(geometric_spectrum(DIM, 10.0)), squared=squared, ord=ord)
    (slope,) = torch.autograd.grad(criterion(TIME, x), x)
    assert criterion(TIME, x).item() == 0.0
    assert torch.equal(slope, torch.zeros_like(slope))


def test_relative_decrease() -> None:
    f, x = problem(), points(3)
    by_state = RelativeDecrease(f, reference=REFERENCE)
    by_number = RelativeDecrease(f, reference=float(f(REFERENCE)))
    by_tensor = RelativeDecrease(f, reference=f(REFERENCE))
    expected = f(x) / f(REFERENCE)
    for criterion in (by_state, by_number, by_tensor):
        torch.testing.assert_close(criterion(TIME, x), expected, rtol=1e-14, atol=0)
        assert float(criterion(TIME, REFERENCE)) == pytest.approx(1.0, rel=1e-15)
    shifted = RelativeDecrease(f, reference=5.0, minimum=-1.0)
    torch.testing.assert_close(shifted(TIME, x), (f(x) + 1) / 6, rtol=1e-14, atol=0)


def test_relative_decrease_takes_the_objective_s_minimum() -> None:
    class Lifted(Problem):
        dim = DIM
        minimum = 2.0  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return 2.0 + (x * x).sum(-1)

    criterion = RelativeDecrease(Lifted(), reference=6.0)
    assert float(criterion(TIME, torch.ones(DIM, dtype=torch.float64))) == 1.0
    assert criterion.nonnegative
    assert float(RelativeDecrease(plain, reference=6.0).minimum) == 0.0


def test_reference_is_the_criterion_s_own() -> None:
    start = points(seed=4)
    criterion = RelativeDecrease(problem(), reference=start)
    before = criterion(TIME, REFERENCE)
    start.mul_(2.0)  # the caller's tensor changes; the criterion does not
    assert torch.equal(criterion(TIME, REFERENCE), before)


def test_relative_decrease_with_a_reference_a_sample() -> None:
    f, x = problem(), points(3)
    criterion = RelativeDecrease(f, reference=points(3, seed=4))
    torch.testing.assert_close(criterion(TIME, x), f(x) / f(points(3, seed=4)))


def test_relative_decrease_follows_parameters_of_the_objective() -> None:
    a = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    fixed = RelativeDecrease(lambda x: a * (x * x).sum(-1), reference=2.0)
    moving = RelativeDecrease(lambda x: a * (x * x).sum(-1), reference=points())
    x = points(seed=1)
    (slope,) = torch.autograd.grad(fixed(TIME, x), a)
    assert float(slope) == pytest.approx(float(x @ x) / 2.0, rel=1e-13)
    (slope,) = torch.autograd.grad(moving(TIME, x), a)
    assert float(slope) == pytest.approx(0.0, abs=1e-14)  # a cancels from the quotient
    with torch.no_grad():
        a.mul_(-1.0)
    with pytest.raises(ValueError, match="reference must have a value above the minimum"):
        moving(TIME, x)


@pytest.mark.parametrize("what", ["reference", "minimum", "state"])
def test_leaves_are_kept_and_get_their_gradient(what: str) -> None:
    leaf = points() if what == "state" else torch.tensor(0.5, dtype=torch.float64)
    leaf.requires_grad_()
    options = {
        "reference": {"reference": leaf},
        "minimum": {"reference": 9.0, "minimum": leaf},
        "state": {"reference": leaf},
    }[what]
    criterion = RelativeDecrease(problem(), **options)
    assert (criterion.minimum if what == "minimum" else criterion.reference) is leaf
    criterion(TIME, points(seed=1)).backward()
    assert leaf.grad is not None
    assert float(leaf.grad.norm()) > 0


def test_modules_are_registered() -> None:
    net = nn.Sequential(nn.Linear(DIM, 1), nn.Softplus(), nn.Flatten(0)).double()
    for criterion in (LossValue(net), GradientNorm(net), RelativeDecrease(net, reference=9.0)):
        assert {id(p) for p in criterion.parameters()} == {id(p) for p in net.parameters()}


def test_nonnegative_is_declared_where_it_is_known() -> None:
    logistic = LogisticRegression(*synthetic_logistic(samples=8, dim=DIM, seed=0))
    assert LossValue(problem()).nonnegative
    assert LossValue(Rosenbrock(dim=DIM)).nonnegative
    assert LossValue(logistic).nonnegative
    assert not LossValue(plain).nonnegative
    assert GradientNorm(plain).nonnegative
    assert RelativeDecrease(logistic, reference=1.0).nonnegative
    assert RelativeDecrease(plain, reference=1.0, minimum=0.0).nonnegative
    assert not RelativeDecrease(plain, reference=1.0).nonnegative


# --- bad input ----------------------------------------------------------------------------------

BAD = {
    "loss objective": (lambda: LossValue(2.0), TypeError, "objective must be callable"),
    "norm objective": (lambda: GradientNorm(None), TypeError, "objective must be callable"),
    "decrease objective": (
        lambda: RelativeDecrease("f", reference=1.0),
        TypeError,
        "objective must be callable",
    ),
    "position": (lambda: LossValue(plain, position=0), TypeError, "position must be callable"),
    "ord": (lambda: GradientNorm(plain, ord=0.5), ValueError, "ord must be at least 1"),
    "ord NaN": (lambda: GradientNorm(plain, ord=math.nan), ValueError, "ord must be at least 1"),
    "reference at minimum": (
        lambda: RelativeDecrease(problem(), reference=0.0),
        ValueError,
        "reference must have a value above the minimum, got f_ref = 0.0 and f\\* = 0",
    ),
    "reference is the minimizer": (
        lambda: RelativeDecrease(problem(), reference=torch.zeros(DIM, dtype=torch.float64)),
        ValueError,
        "reference must have a value above",
    ),
    "reference below": (
        lambda: RelativeDecrease(plain, reference=1.0, minimum=2.0),
        ValueError,
        "reference must have a value above",
    ),
    "one reference of a batch": (
        lambda: RelativeDecrease(
            problem(), reference=torch.stack((REFERENCE, torch.zeros_like(REFERENCE)))
        ),
        ValueError,
        "reference must have a value above",
    ),
    "reference NaN": (
        lambda: RelativeDecrease(plain, reference=math.nan),
        ValueError,
        "reference must be finite",
    ),
    "reference text": (
        lambda: RelativeDecrease(plain, reference="x0"),
        TypeError,
        "reference must hold real numbers",
    ),
    "minimum": (
        lambda: RelativeDecrease(plain, reference=1.0, minimum=points()),
        ValueError,
        "minimum must be a number",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()
