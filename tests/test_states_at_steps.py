"""`stopping_index(at=...)`: the state at known steps, from the run and the backward pass of N."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from discrete import (
    DiscreteAdjoint,
    Euler,
    Heun,
    IndexRoute,
    StoppingIndexResult,
    Truncated,
    Unrolled,
    stopping_index,
)
from ode_stopping import (
    DivergedError,
    GradientAccuracyWarning,
    NotReachedError,
    Status,
)

F64 = torch.float64
ROUTES = {
    "all states": DiscreteAdjoint(),
    "replayed": DiscreteAdjoint(chunk=3),
    "checkpoints": DiscreteAdjoint(memory=100, chunk=4),
    "unrolled": Unrolled(),
}
every_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
A, H = 1.3, 0.05
X0 = (1.5, -0.4, 0.7)


def leaf(value: Any) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


class Decay:
    """Euler on x' = -a x with J = |x|^2: x_k = (1 - h a)^k x0, every quantity a leaf."""

    def __init__(self) -> None:
        self.a, self.h, self.x0, self.eps = leaf(A), leaf(H), leaf(X0), leaf(0.5)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.a, self.h, self.x0]

    def run(self, at: Any, target: Any = None, **options: Any) -> StoppingIndexResult:
        update = Euler(lambda t, x: -self.a * x, step=self.h)
        target = self.eps if target is None else target
        return stopping_index(
            update, self.x0, lambda t, x: x.square().sum(), target, at=at, **options
        )


def known(k: int) -> tuple[Tensor, list[Tensor]]:
    """x_k, shape (3,), and its derivatives to a and h, shape (3,), and to x0, shape (3, 3)."""
    x0, q = torch.tensor(X0, dtype=F64), 1 - H * A
    slope = k * q ** (k - 1) if k else 0.0
    return q**k * x0, [-H * slope * x0, -A * slope * x0, q**k * torch.eye(3, dtype=F64)]


def differentiated(states: Tensor, leaves: list[Tensor]) -> list[list[Tensor]]:
    """Of one row of states the derivatives of its entries, by one backward pass each."""
    return [list(torch.autograd.grad(entry, leaves, retain_graph=True)) for entry in states]


def close(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-14)


@every_route
def test_states_and_all_their_derivatives_in_closed_form(route: IndexRoute) -> None:
    case = Decay()
    at = [7, 0, 1, 12, 7, 2]
    result = case.run(at, gradient=route)
    assert result.index == 14
    kept = len(result.trajectory.indices)
    assert kept <= 4 if route == ROUTES["checkpoints"] else kept == 15
    assert isinstance(result.states_at, Tensor)
    assert result.states_at.shape == (6, 3)
    for k, row in zip(at, result.states_at, strict=True):
        value, slopes = known(k)
        close(row.detach(), value)
        for i, parts in enumerate(differentiated(row, case.leaves)):
            for part, exact in zip(parts, slopes, strict=True):
                close(part, exact[i])


@every_route
def test_one_backward_pass_for_the_index_and_all_states(route: IndexRoute) -> None:
    case = Decay()
    result = case.run([9, 3, 14], gradient=route)
    assert isinstance(result.states_at, Tensor)
    weights = torch.arange(9.0, dtype=F64).reshape(3, 3)
    together = result.steps + result.time + (weights * result.states_at).sum()
    found = torch.autograd.grad(together, [*case.leaves, case.eps])
    assert result.stats.vjps == result.index == 14
    alone = Decay()
    one = alone.run((), gradient=route)
    expected = list(torch.autograd.grad(one.steps + one.time, [*alone.leaves, alone.eps]))
    for weight, k in zip(weights, (9, 3, 14), strict=True):
        slopes = known(k)[1]
        for i, slope in enumerate(slopes):
            expected[i] = expected[i] + weight @ slope
    for ours, exact in zip(found, expected, strict=True):
        close(ours, exact)


def test_the_last_row_is_the_state_of_the_result() -> None:
    case = Decay()
    result = case.run([14])
    assert torch.equal(result.states_at[0], result.state)
    (ours,) = torch.autograd.grad(result.states_at[0].sum(), case.a, retain_graph=True)
    (other,) = torch.autograd.grad(result.state.sum(), case.a)
    assert torch.equal(ours, other)


def test_an_early_state_costs_its_own_part_of_the_way_back() -> None:
    case = Decay()
    result = case.run([4, 10])
    torch.autograd.grad(result.states_at[0].sum(), case.a)
    assert result.stats.vjps == 4


@every_route
def test_a_missed_target_keeps_the_states(route: IndexRoute) -> None:
    case = Decay()
    result = case.run([20, 5, 31], target=1e-30, max_steps=30, gradient=route)
    assert result.status is Status.NOT_REACHED
    value, slopes = known(20)
    close(result.states_at[0].detach(), value)
    found = torch.autograd.grad(result.states_at[0].sum(), case.leaves, retain_graph=True)
    for part, exact in zip(found, slopes, strict=True):
        close(part, exact.sum(0))
    assert bool(torch.isnan(result.states_at[2]).all())
    with pytest.raises(NotReachedError, match=r"x_31 .*step 30 \(NOT_REACHED\)"):
        torch.autograd.grad(result.states_at.square().sum(), case.a, retain_graph=True)
    with pytest.raises(NotReachedError):
        torch.autograd.grad(result.steps, case.a)


def test_beyond_the_end_is_not_a_number_and_harmless_where_it_is_not_used() -> None:
    case = Decay()
    result = case.run([3, 15, 1000])
    assert torch.isfinite(result.states_at).all(dim=1).tolist() == [True, False, False]
    kept = result.states_at[torch.isfinite(result.states_at).all(dim=1)]
    (found,) = torch.autograd.grad(kept.sum(), case.a, retain_graph=True)
    close(found, known(3)[1][0].sum())
    with pytest.raises(NotReachedError, match="x_15 was asked for"):
        torch.autograd.grad(result.states_at[1, 0], case.a)
    plain = Decay().run([3, 15], gradient=None)
    assert not plain.states_at.requires_grad
    close(plain.states_at[0], known(3)[0])
    assert bool(torch.isnan(plain.states_at[1]).all())


def test_met_at_the_start() -> None:
    case = Decay()
    result = case.run([0, 1], target=100.0)
    assert result.status is Status.AT_START
    (found,) = torch.autograd.grad(result.states_at[0].sum(), case.x0)
    assert found.tolist() == [1.0, 1.0, 1.0]
    assert bool(torch.isnan(result.states_at[1]).all())


def test_a_run_at_rest_goes_on_to_the_last_step_that_is_asked_for() -> None:
    a = leaf(0.5)

    def run(at: list[int]) -> StoppingIndexResult:
        return stopping_index(
            lambda k, x: x - a * (x - 2.0), leaf([3.0]), lambda t, x: x[0], 1.0, at=at
        )

    early, late = run([]), run([20_000])
    assert early.status is late.status is Status.NOT_REACHED
    assert len(early.trajectory) < 10_000
    assert len(late.trajectory) == 20_001
    assert "at rest" in late.note
    assert late.states_at.tolist() == [[2.0]]


@every_route
def test_time_and_start_time_count(route: IndexRoute) -> None:
    """A flow that depends on t, against autograd through a loop of its own."""
    a, h, t0, x0 = leaf(0.9), leaf(0.04), leaf(0.3), leaf([1.0, 2.0])

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -a * x + torch.sin(3 * t)

    result = stopping_index(
        Heun(flow, step=h),
        x0,
        lambda t, x: x.sum(),
        1.5,
        t0=t0,
        at=[11, 6],
        gradient=route,
        interpolation="partial_step",
    )
    x, states = x0, {}
    for k in range(11):
        t = t0 + k * h
        first = flow(t, x)
        x = x + h / 2 * (first + flow(t + h, x + h * first))
        states[k + 1] = x
    assert result.index > 11
    weights = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=F64)
    own = (weights * torch.stack([states[11], states[6]])).sum()
    found = torch.autograd.grad((weights * result.states_at).sum(), [a, h, t0, x0])
    for ours, exact in zip(found, torch.autograd.grad(own, [a, h, t0, x0]), strict=True):
        close(ours, exact)


def test_tuple_states_stay_tuples() -> None:
    a, x, v = leaf(0.8), leaf([[1.0, 2.0]]), leaf([0.5])

    def update(k: int, state: Any) -> Any:
        return a * state[0], state[1] / 2

    result = stopping_index(update, (x, v), lambda t, s: s[0].sum(), 0.5, at=[4, 2])
    positions, velocities = result.states_at
    assert positions.shape == (2, 1, 2)
    assert velocities.shape == (2, 1)
    close(positions[1], 0.64 * x)
    close(velocities[0], v / 16)
    (found,) = torch.autograd.grad(positions[0].sum(), a)
    close(found, torch.tensor(3.0 * 4 * 0.8**3, dtype=F64))
    assert result.to_dict()["states_at"][1] == [[0.5 / 16], [0.5 / 4]]


def test_several_targets_rising_and_left_first() -> None:
    """x_k = q^k x0 with q > 1 on the way up, two targets and a step in the order asked."""
    q, x0 = leaf(1.25), leaf([0.4])
    eps = leaf([1.0, 0.45])
    result = stopping_index(
        lambda k, x: q * x,
        x0,
        lambda t, x: x[0],
        eps,
        direction="rising",
        at=[3, 1],
        leave_first=True,
    )
    assert result.index.tolist() == [5, 1]
    close(result.states_at[:, 0].detach(), 0.4 * 1.25 ** torch.tensor([3, 1], dtype=F64))
    found = torch.autograd.grad(result.states_at[0, 0] + result.state[0, 0], [q, x0])
    close(found[0], torch.tensor(0.4 * (3 * 1.25**2 + 5 * 1.25**4), dtype=F64))
    close(found[1], torch.tensor([1.25**3 + 1.25**5], dtype=F64))


def test_a_criterion_without_derivatives_does_not_matter_to_states() -> None:
    """The target is missed, so nothing asks for a derivative of J."""
    a = leaf(0.9)
    result = stopping_index(
        lambda k, x: a * x, leaf([1.0]), lambda t, x: x.detach().sum(), 1e-9, max_steps=8, at=[6]
    )
    (found,) = torch.autograd.grad(result.states_at.sum(), a)
    close(found, torch.tensor(6 * 0.9**5, dtype=F64))


def test_a_derivative_that_is_lost_on_the_way_is_seen() -> None:
    a = leaf(0.9)

    def update(k: int, x: Tensor) -> Tensor:
        return (a.detach() if k == 2 else a) * x

    result = stopping_index(update, leaf([1.0]), lambda t, x: x.sum(), 1e-9, max_steps=8, at=[6])
    with pytest.warns(GradientAccuracyWarning, match="a"):
        result.states_at.sum().backward()


def test_a_state_that_is_not_finite_was_never_there() -> None:
    def update(k: int, x: Tensor) -> Tensor:
        return torch.stack([x[0] / 2, x[1] * (1e200 if k > 1 else 1.0)])

    result = stopping_index(
        update, leaf([1.0, 1.0]), lambda t, x: x[0], 1e-3, at=[2, 4], throw=False
    )
    assert torch.isnan(result.states_at).any(dim=1).tolist() == [False, True]
    with pytest.raises(DivergedError) as raised:
        stopping_index(update, leaf([1.0, 1.0]), lambda t, x: x.sum(), 1e-3, at=[2, 4])
    close(raised.value.result.states_at[0], torch.tensor([0.25, 1.0], dtype=F64))


def test_without_at_nothing_changes() -> None:
    case, other = Decay(), Decay()
    with_states, without = case.run([5]), other.run(())
    assert isinstance(without.states_at, Tensor)
    assert without.states_at.shape == (0, 3)
    assert without.problem is not None
    assert with_states.problem is None
    with_states.steps.backward()
    without.steps.backward()
    assert with_states.stats.nfe_forward == without.stats.nfe_forward
    assert with_states.stats.vjps == without.stats.vjps
    for one, two in zip(case.leaves, other.leaves, strict=True):
        assert one.grad is not None
        assert two.grad is not None
        close(one.grad, two.grad)


def test_first_derivatives_only_and_pickles() -> None:
    case = Decay()
    result = case.run([5])
    (found,) = torch.autograd.grad(result.states_at.sum(), case.a, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(found, case.a)
    loaded = pickle.loads(pickle.dumps(result))
    assert torch.equal(loaded.states_at, result.states_at.detach())


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, iter])
def test_steps_come_in_any_collection(kind: Callable[[list[int]], Any]) -> None:
    close(Decay().run(kind([6, 2])).states_at[1].detach(), known(2)[0])


@pytest.mark.parametrize(
    ("at", "error", "message"),
    [
        (3, TypeError, "at must be a list of steps"),
        ("3", TypeError, "at must be a list of steps"),
        ([1, 2.0], TypeError, r"at\[1\] must be an int"),
        ([True], TypeError, r"at\[0\] must be an int"),
        ([None], TypeError, r"at\[0\] must be an int"),
        ([math.nan], TypeError, r"at\[0\] must be an int"),
        ([2, -1], ValueError, r"at\[1\] must not be negative; got -1"),
        (torch.tensor([1.0], requires_grad=True), TypeError, "A step has no derivative"),
        ([torch.tensor(2.0, requires_grad=True)], TypeError, r"at\[0\] must be an int"),
        (torch.tensor([[1]]), ValueError, r"at must be a list of steps or a 1-d tensor"),
    ],
)
def test_bad_steps_are_named(at: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Decay().run(at)


def test_a_truncated_sum_has_one_end() -> None:
    with pytest.raises(ValueError, match=r"Truncated takes one target and no at="):
        Decay().run([2], gradient=Truncated(steps=3))
