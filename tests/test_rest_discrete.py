"""An iteration at rest above its target is told soon; one that moves, or will, is not ended."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from iterations import number
from torch import Tensor

from discrete import Euler, StoppingIndexResult, TorchOptimizer, stopping_index
from ode_stopping import NotReachedError, Quadratic, Status

CURVATURE = torch.tensor([1.0, 3.0], dtype=torch.float64)
ONES = torch.ones(2, dtype=torch.float64)


def square(t: Tensor, x: Any) -> Tensor:
    return (x[0] if isinstance(x, tuple) else x).square().sum()


def above(t: Tensor, x: Any) -> Tensor:
    """J with the minimum 1."""
    return 1 + square(t, x)


def run(
    update: Callable[..., Any], x0: Any = ONES, criterion: Any = square, target: Any = 1e-2
) -> StoppingIndexResult:
    """With the default limit, a million steps, and no gradient."""
    return stopping_index(update, x0, criterion, target, gradient=None)


def decayed_rate(k: int, x: Tensor) -> Tensor:
    return x - 0.1 * 0.99**k * CURVATURE.to(x) * x


def heavy_ball(k: int, state: Any) -> Any:
    x, v = state
    v = 0.9 * v - CURVATURE * x
    return x + 0.1 * v, v


@pytest.mark.parametrize(
    ("update", "x0", "criterion", "target"),
    [
        (decayed_rate, ONES, square, 1e-12),
        (decayed_rate, ONES.float(), square, 1e-12),
        (lambda k, x: x - 0.1 * CURVATURE * x, ONES, above, 0.5),
        (lambda k, x: x - 0.1 * (x - 0.3), ONES, square, 1e-3),
        (lambda k, x: x.clone(), ONES, square, 1e-3),
        # Flickers by a rounding for ever.
        (lambda k, x: torch.where(x > 1, ONES, ONES * (1 + 3e-16)), ONES, square, 1e-3),
        (heavy_ball, (ONES, 0 * ONES), above, 0.5),
        (Euler(lambda t, x: -torch.exp(-t) * x, step=0.1), ONES, square, 1e-12),
    ],
)
def test_at_rest(update: Any, x0: Any, criterion: Any, target: float) -> None:
    result = run(update, x0, criterion, target)
    assert result.status is Status.NOT_REACHED
    assert result.index == -1
    assert "at rest from step" in result.note
    assert len(result.trajectory) < 12_000
    assert result.stats.criterion_calls < 20_000


def test_an_optimiser_at_its_minimum() -> None:
    objective = Quadratic(CURVATURE)
    update = TorchOptimizer(torch.optim.SGD, objective, lr=0.1, momentum=0.5)
    result = run(update, update.initial_state(ONES), above, 0.5)
    assert "at rest" in result.note


def test_a_run_at_rest_is_a_miss_like_others() -> None:
    theta = number(1.0)
    arguments = (lambda k, x: x - 0.1 * 0.99**k * theta * x, ONES, square, 1e-12)
    result = stopping_index(*arguments)
    assert math.isinf(result.steps.item())
    with pytest.raises(NotReachedError):
        result.steps.backward()
    counted = stopping_index(*arguments, censored="horizon")
    assert counted.steps.item() == 1_000_000
    counted.steps.backward()
    assert theta.grad is not None
    assert theta.grad.item() == 0.0


def test_targets_that_were_met_before() -> None:
    limit = (1 - 0.1) ** 2  # of x^2, after one step to the point where the iteration stays
    result = run(
        lambda k, x: torch.full_like(x, 0.9), ONES[:1], square, number([0.9, 0.5], grad=False)
    )
    assert result.index.tolist() == [1, -1]
    assert result.best == pytest.approx(limit)


def rate(schedule: Callable[[int], float]) -> Callable[[int, Tensor], Tensor]:
    """Gradient descent on x^2/2 with this learning rate."""
    return lambda k, x: x - schedule(k) * x


def decay_steps(rates: Callable[[int], float]) -> int:
    """N for `rate(rates)` from (1, 1) to |x|^2 <= 1e-2, in closed form: a product."""
    value, k = 2.0, 0
    while value > 1e-2:
        value *= (1 - rates(k)) ** 2
        k += 1
    return k


@pytest.mark.parametrize(
    "schedule",
    [
        lambda k: 0.1 if k >= 20_000 else 0.0,  # begins late
        lambda k: 0.1 if 120_000 <= k < 121_000 else 0.0,
        lambda k: 0.1 if k % 700 == 699 else 0.0,
        lambda k: 0.1 if k % 512 == 511 else 0.0,  # the length of a look
        lambda k: 0.1 if k >= 4000 and k % 4000 < 40 else 0.0,
        lambda k: 1e-3 * max(0.0, math.sin(k / 3000)),
        pytest.param(lambda k: 2e-5, marks=pytest.mark.slow),
        lambda k: 2e-4,  # slow
    ],
)
def test_schedules_that_move_again(schedule: Callable[[int], float]) -> None:
    result = run(rate(schedule))
    assert result.status is Status.REACHED
    assert result.index == decay_steps(schedule)


@pytest.mark.parametrize(
    ("update", "x0", "criterion", "target", "index"),
    [
        # A saddle that is left late: x_2 = 1e-30 1.01^k reaches 1.5 at k = 6982.9.
        (
            lambda k, x: x * number([0.9, 1.01], grad=False),
            number([1.0, 1e-30], grad=False),
            lambda t, x: 2 - x[1],
            0.5,
            6983,
        ),
        # Slower: 1e-20 1.0005^k reaches 1.5 at k = 92937.4 (and a rounding or two later).
        pytest.param(
            lambda k, x: x * number([0.9, 1.0005], grad=False),
            number([1.0, 1e-20], grad=False),
            lambda t, x: 2 - x[1],
            0.5,
            None,
            marks=pytest.mark.slow,
        ),
        # A counter in the state, of which J knows nothing until it has run out.
        (
            lambda k, s: (s[0], s[1] + 1),
            (number(1.0, grad=False), number(0.0, grad=False)),
            lambda t, s: torch.where(s[1] > 5000, 0 * s[0], s[0]),
            0.5,
            5001,
        ),
        # A criterion that changes with t, at a state that rests.
        (
            lambda k, x: x.clone(),
            ONES,
            lambda t, x: torch.where(t > 30_000, 0 * x.sum(), x.sum()),
            0.5,
            30_001,
        ),
        # Far below the J of the start, and on its way: 0.9995^(2 k) = 1e-60/2 at k = 138814.
        pytest.param(lambda k, x: 0.9995 * x, ONES, square, 1e-60, None, marks=pytest.mark.slow),
        # The same at 0.995^(2 k) = 1e-60/2: k = 13850.6.
        (lambda k, x: 0.995 * x, ONES, square, 1e-60, 13_851),
        # A ball that turns round: x = .01 k s - s^2 k^2/2 falls below -.5 with s = 1e-3.
        pytest.param(
            lambda k, s: (s[0] + 1e-3 * s[1], s[1] - 1e-6),
            (number(0.0, grad=False), number(0.01, grad=False)),
            lambda t, s: 1 + s[0],
            0.5,
            None,
            marks=pytest.mark.slow,
        ),
        # The same, ten times heavier: x = 1e-5 k - 5e-9 k (k - 1) is -1/2 at k = 11050.4.
        (
            lambda k, s: (s[0] + 1e-3 * s[1], s[1] - 1e-5),
            (number(0.0, grad=False), number(0.01, grad=False)),
            lambda t, s: 1 + s[0],
            0.5,
            11_051,
        ),
        # A plateau of J, across which the state walks.
        (
            lambda k, x: x - 1e-3,
            number(10.0, grad=False),
            lambda t, x: torch.where(x > 1, torch.ones_like(x), x),
            0.5,
            None,
        ),
    ],
)
def test_slow_or_quiet_is_not_at_rest(
    update: Any, x0: Any, criterion: Any, target: float, index: int | None
) -> None:
    result = run(update, x0, criterion, target)
    assert result.status is Status.REACHED
    assert index is None or result.index == index


def test_rotations_are_no_rest() -> None:
    """J does not change, and the state does."""
    result = stopping_index(
        lambda k, x: torch.stack([-x[1], x[0]]), ONES, square, 0.5, max_steps=6000, gradient=None
    )
    assert "limit of 6000 steps" in result.note


def test_a_table_of_rates_is_not_read_beyond_its_end_in_vain() -> None:
    """What is tried at later steps may raise; the run itself is what counts."""
    table = [0.0] * 3000 + [0.5] * 20
    result = stopping_index(
        lambda k, x: x - table[k] * x, ONES, square, 1e-2, max_steps=500_000, gradient=None
    )
    assert result.status is Status.REACHED
    # (1/2)^(2 j) * 2 <= 1e-2 at j = 4
    assert result.index == 3004
