"""A criterion that has no derivative where the run ends: refused or warned of, never a silent 0."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from iterations import number
from torch import Tensor

from discrete import (
    DiscreteAdjoint,
    Euler,
    IndexRoute,
    StoppingIndexTask,
    Truncated,
    Unrolled,
    check_index_gradient,
    minimise_stopping_index,
    stopping_index,
)
from ode_stopping import GradientError, KinkWarning, StoppingWarning

Criterion = Callable[[Tensor, Tensor], Tensor]

DATA = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.2]], dtype=torch.float64)
START = torch.tensor([-1.0, -1.0], dtype=torch.float64)


def logistic(t: Tensor, w: Tensor) -> Tensor:
    """- grad of the mean logistic loss on `DATA`, all labels +1."""
    return torch.sigmoid(-(DATA.to(w) @ w)) @ DATA.to(w) / 4


def inaccuracy(t: Tensor, w: Tensor) -> Tensor:
    return 1 - (DATA.to(w) @ w > 0).to(w).mean()


def inaccuracy_with_graph(t: Tensor, w: Tensor) -> Tensor:
    return 1 - ((torch.sign(DATA.to(w) @ w) + 1) / 2).mean()


def rounded(t: Tensor, w: Tensor) -> Tensor:
    return torch.round(10 * (w - 1).square().sum()) / 10


def misses(t: Tensor, w: Tensor) -> Tensor:
    """A counter over the samples, with a floor."""
    return torch.floor(torch.relu(1 - DATA.to(w) @ w)).sum()


PIECEWISE: list[tuple[Criterion, float]] = [
    (inaccuracy, 0.3),
    (inaccuracy_with_graph, 0.3),
    (rounded, 3.0),
    (misses, 2.0),
]


@pytest.mark.parametrize(("criterion", "target"), PIECEWISE)
@pytest.mark.parametrize("interpolation", [None, "log", "hermite", "partial_step"])
@pytest.mark.parametrize("route", [DiscreteAdjoint(), Unrolled(), Truncated(steps=5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_piecewise_constant_is_refused(
    criterion: Criterion,
    target: float,
    interpolation: Any,
    route: IndexRoute,
    dtype: torch.dtype,
) -> None:
    lr = number(0.1)
    result = stopping_index(
        Euler(logistic, step=lr),
        START.to(dtype),
        criterion,
        target,
        interpolation=interpolation,
        gradient=route,
    )
    # N itself is right, and may be asked for.
    assert result.index - 1 <= result.steps.item() <= result.index
    assert result.time is not None
    for value in (result.steps, result.time):
        with pytest.raises(GradientError, match="piecewise constant"):
            torch.autograd.grad(value, lr, retain_graph=True)
    # x_N with N held fixed has a derivative all the same.
    assert isinstance(result.state, Tensor)
    assert bool(torch.autograd.grad(result.state.sum(), lr)[0] != 0)


def test_the_numbers_of_the_report() -> None:
    """N = 35 at the rate 0.1 and 70 at 0.05, by hand; the refusal says why there is no slope."""
    found = []
    for rate in (0.1, 0.05):
        lr = number(rate)
        result = stopping_index(lambda k, w, lr=lr: w + lr * logistic(w, w), START, inaccuracy, 0.3)
        found.append(result.index)
        with pytest.raises(GradientError, match="accuracy"):
            result.steps.backward()
    assert found == [35, 70]


@pytest.mark.parametrize(("criterion", "target"), PIECEWISE)
@pytest.mark.parametrize("interpolation", ["log", "hermite", "partial_step"])
def test_the_check_does_not_pass(criterion: Criterion, target: float, interpolation: Any) -> None:
    lr = number(0.1)
    report = check_index_gradient(
        Euler(logistic, step=lr), START, criterion, target, interpolation=interpolation
    )
    assert not report.passed
    assert "piecewise constant" in report.error


@pytest.mark.parametrize("targets", [[0.6, 0.3], [0.3, 0.6]])
def test_several_targets(targets: list[float]) -> None:
    lr = number(0.1)
    result = stopping_index(
        Euler(logistic, step=lr), START, inaccuracy, number(targets, grad=False)
    )
    for steps in result.steps:
        with pytest.raises(GradientError, match="piecewise constant"):
            torch.autograd.grad(steps, lr, retain_graph=True)


def test_a_jump_beside_a_slope_is_warned_of() -> None:
    """The gradient of the smooth part is not that of the index: 0.007 instead of about -350."""
    lr = number(0.1)
    with pytest.warns(StoppingWarning, match="jumps between steps 34 and 35"):
        stopping_index(
            Euler(logistic, step=lr),
            START,
            lambda t, w: inaccuracy(t, w) + 1e-3 * w.square().sum(),
            0.31,
        )


def test_a_jump_in_time_is_warned_of() -> None:
    theta = number(1.0)
    with pytest.warns(StoppingWarning, match="jumps between steps 9 and 10"):
        stopping_index(
            lambda k, x: x - 0.01 * theta * x,
            number(1.0, grad=False),
            lambda t, x: x.square() + (t < 9.5).to(x),
            0.9,
        )


def test_the_end_on_a_flat_piece_is_warned_of() -> None:
    """J = relu(x - 1/2) is 0 with its gradient at x_N, whatever theta does."""
    theta = number(1.0)
    with pytest.warns(StoppingWarning, match="flat piece"):
        stopping_index(
            lambda k, x: x - 0.1 * theta * x,
            number(1.0, grad=False),
            lambda t, x: torch.relu(x - 0.5),
            0.0,
        )


def smooth_criteria() -> list[Criterion]:
    return [
        lambda t, x: x.square().sum(),
        lambda t, x: x.norm(),
        lambda t, x: x.abs().sum(),
        lambda t, x: torch.logsumexp(50 * x, 0) / 50 + 1,
        lambda t, x: torch.exp(20 * (x.square().sum() - 1)),
        lambda t, x: torch.sigmoid(300 * (x[0] - 0.31)) + x.square().sum(),
        lambda t, x: torch.maximum(x[0], 1.7 * x[1]),
    ]


@pytest.mark.parametrize("number_of", range(7))
@pytest.mark.parametrize("step", [0.01, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_steep_or_coarse_is_not_taken_for_a_jump(
    number_of: int, step: float, dtype: torch.dtype
) -> None:
    criterion = smooth_criteria()[number_of]
    theta = torch.tensor([1.0, 1.5, 0.0], dtype=dtype, requires_grad=True)
    x0 = torch.tensor([1.0, 0.8, 0.0], dtype=dtype)
    for share in (0.3, 0.9):
        low = float(criterion(torch.tensor(0.0), 0 * x0))
        target = low + share * (float(criterion(torch.tensor(0.0), x0)) - low)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = stopping_index(
                Euler(lambda t, x: -theta * x, step=step), x0, criterion, target
            )
            result.steps.backward()
    assert theta.grad is not None
    assert bool(theta.grad[:2].any())


class TestKinks:
    """J = the larger of two residuals, where they are equal."""

    @pytest.mark.parametrize("interpolation", [None, "log"])
    def test_equal_residuals(self, interpolation: Any) -> None:
        """x_i = (1 - b_i/10)^k: the index to either residual alone has a closed form.

        N* = log(eps) / log(1 - b/10), dN*/db = N* / (10 (1 - b/10) log(1 - b/10)); to both at once
        the derivative lies between 0 and that. Definition 3 has -N, as dJ_N/db = -N q^(N-1)/10 and
        J_N - J_(N-1) = -q^(N-1)/10.
        """
        b = number([1.0, 1.0])
        with pytest.warns(KinkWarning, match="kink at x_22"):
            result = stopping_index(
                lambda k, x: x - 0.1 * b * x,
                torch.ones(2, dtype=torch.float64),
                lambda t, x: torch.maximum(x[0], x[1]),
                0.1,
                interpolation=interpolation,
            )
        (found,) = torch.autograd.grad(result.steps, b)
        exact = math.log(0.1) / math.log(0.9) / (10 * 0.9 * math.log(0.9))
        one = -22.0 if interpolation is None else exact
        assert float(found.sum()) == pytest.approx(one, rel=1e-6)
        assert bool((found <= 1e-12).all())
        assert bool((found >= one * (1 + 1e-6)).all())

    def test_a_projection_that_starts_at_its_edge(self) -> None:
        """x+ = relu(x - theta/10 (x - b)) from 0: x_k = b (1 - q^k), q = 1 - theta/10.

        J = |b|^2 q^(2k), so N* = log(eps/5)/(2 log q), dN*/dtheta = N* / (10 q log q).
        """
        b = number([0.0, 0.0, 0.0, 1.0, 2.0], grad=False)
        theta = number(0.5)
        with pytest.warns(KinkWarning, match="update has kinks"):
            result = stopping_index(
                lambda k, x: torch.relu(x - 0.1 * theta * (x - b)),
                torch.zeros(5, dtype=torch.float64),
                lambda t, x: (x - b).square().sum(),
                1e-2,
                interpolation="log",
            )
        q = 0.95
        steps = math.log(1e-2 / 5) / (2 * math.log(q))
        assert result.steps.item() == pytest.approx(steps, rel=1e-12)
        (found,) = torch.autograd.grad(result.steps, theta)
        assert found.item() == pytest.approx(steps / (10 * q * math.log(q)), rel=1e-9)

    def test_a_lost_derivative_is_not_taken_for_a_kink(self) -> None:
        theta = number(0.5)
        with pytest.raises(GradientError, match="wrong or missing"):
            stopping_index(
                lambda k, x: torch.relu(x - 0.1 * theta * x.detach()) + 0.01,
                torch.zeros(3, dtype=torch.float64),
                lambda t, x: 1 - x.sum(),
                0.5,
            )

    def test_tuning_goes_on(self) -> None:
        """The residuals are equal in every iterate, by symmetry, and stay so while b is tuned."""
        b = number([1.0, 1.0])
        task = StoppingIndexTask(
            lambda k, x: x - 0.1 * b * x,
            torch.ones(2, dtype=torch.float64),
            lambda t, x: torch.maximum(x[0], x[1]),
            0.1,
            interpolation="log",
        )
        with pytest.warns(KinkWarning):
            history = minimise_stopping_index(
                task,
                b,
                iterations=20,
                optimizer=torch.optim.SGD([b], lr=1e-2),
                on_error="skip",
                progress=False,
            )
        assert not any(record.errors for record in history.records)
        # Symmetric to the end: N* = log(eps)/log(1 - b/10) at both, and it falls all the way.
        values = [record.objective for record in history.records]
        assert values == sorted(values, reverse=True)
        assert values[-1] == pytest.approx(
            math.log(0.1) / math.log(1 - 0.1 * float(b.detach()[0])), rel=1e-9
        )
        assert values[-1] < 0.75 * values[0]
