"""Stopping at f(x_{k-1}) - f(x_k) <= tol: an increase is no convergence, and dN is exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from iterations import central_differences, gradients, number, relative_gap
from torch import Tensor, nn

from discrete import DiscreteAdjoint, Euler, Heun, Truncated, Unrolled, UpdateRule, stopping_index
from discrete.result import StoppingIndexResult
from discrete.rules.step_decrease import StepDecrease
from ode_stopping import GradientError, LossValue, Quadratic, Status, StoppingWarning, stopping_time

F64 = torch.float64


def half_square(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


def run(
    update: Callable[..., Any],
    x0: Any,
    tol: Any,
    *,
    objective: Callable[[Tensor], Tensor] = half_square,
    initial: float = 1.0,
    **keywords: Any,
) -> StoppingIndexResult:
    criterion = StepDecrease(objective, initial=initial)
    return stopping_index(
        criterion.wrap(update), criterion.initial_state(x0), criterion, tol, **keywords
    )


class TestIncrease:
    @staticmethod
    def momentum(k: int, state: Any) -> Any:
        """Heavy ball that swings: the loss falls, rises for some steps, and falls again."""
        x, v = state
        v = 0.95 * v - 0.3 * x
        return x + 0.3 * v, v

    def test_it_is_not_convergence(self) -> None:
        x0 = number([1.0], grad=False), number([0.0], grad=False)
        losses, state = [half_square(x0[0]).item()], x0
        for k in range(400):
            state = self.momentum(k, state)
            losses.append(half_square(state[0]).item())
        drops = [a - b for a, b in pairwise(losses)]
        tol = 1e-7
        first = next(k for k, drop in enumerate(drops, start=1) if 0 <= drop <= tol)
        rise = next(k for k, drop in enumerate(drops, start=1) if drop < 0)
        assert rise < first
        assert run(self.momentum, x0, tol).index == first

        class Naive:
            """f(x_{k-1}) - f(x_k) <= tol as a user would write it."""

            before = torch.tensor(torch.inf, dtype=F64)

            def __call__(self, t: Tensor, state: Any) -> Tensor:
                value = half_square(state[0])
                drop, self.before = self.before - value, value
                return drop.clamp(max=1e3)

        naive = stopping_index(self.momentum, x0, Naive(), tol, gradient=None)
        assert naive.index == rise

    @pytest.mark.parametrize("size", [1.0, 1e-3, 1e-15])
    def test_however_small(self, size: float) -> None:
        """The loss is 3, 2, 2 + size, 1.999..., and then stays."""
        losses = torch.tensor([3.0, 2.0, 2.0 + size, 2.0 - 0.5, 2.0 - 0.5], dtype=F64)

        def update(k: int, x: Tensor) -> Tensor:
            return losses[min(k + 1, 4)].reshape(1)

        result = run(update, losses[:1], 0.1, objective=lambda x: x.sum(), initial=10.0)
        assert result.index == 4
        expected = [10.0, 1.0, 10.0, 0.5 + size, 0.0]
        torch.testing.assert_close(result.trajectory.losses, torch.tensor(expected, dtype=F64))

    def test_larger_increases_have_larger_marks(self) -> None:
        criterion = StepDecrease(half_square)
        x, t = torch.zeros(1, dtype=F64), torch.zeros((), dtype=F64)
        assert criterion(t, (x, torch.tensor(-7.0, dtype=F64))).item() == 7.0
        assert criterion(t, (x, torch.tensor(-0.1, dtype=F64))).item() == 1.0


def test_monotone_iteration_stops_at_the_right_step() -> None:
    """x_k = q^k x_0: the decrease is (q^-2 - 1) f(x_k)."""
    q, tol = 0.9, 1e-5
    x0 = torch.tensor([2.0], dtype=F64)
    expected = next(k for k in range(1, 999) if (q**-2 - 1) * 2 * q ** (2 * k) <= tol)
    result = run(lambda k, x: q * x, x0, tol)
    assert result.index == expected
    assert result.status is Status.REACHED
    assert result.trajectory.losses[0].item() == 1.0
    rule = Euler(lambda t, x: -x, step=1 - q)
    assert run(rule, x0, tol).index == expected


def test_f_at_rest_has_decrease_zero() -> None:
    result = run(lambda k, x: x, torch.ones(1, dtype=F64), 0.0)
    assert result.index == 1
    assert bool(result.reached)


def leaves() -> dict[str, Tensor]:
    return {
        "theta": number([0.7, 1.1]),
        "weight": number([1.2, 0.4]),
        "x": number([2.0, -1.5]),
        "eps": number(0.0123),
        "t0": number(0.4),
        "h": number(0.05),
    }


def parametrised(
    v: dict[str, Tensor], rule: type[UpdateRule] = Euler, **keywords: Any
) -> StoppingIndexResult:
    """A flow that depends on t, and an objective with a parameter of its own."""

    def objective(x: Tensor) -> Tensor:
        return 0.5 * (v["weight"] * x.square()).sum() + 0.1 * x.pow(4).sum()

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -v["theta"] * (x + 0.3 * torch.sin(2 * t) * x**3)

    update = rule(flow, step=v["h"])
    return run(update, v["x"], v["eps"], objective=objective, t0=v["t0"], **keywords)


class TestGradient:
    @pytest.mark.parametrize("rule", [Euler, Heun])
    def test_fractional_index_against_differences(self, rule: type[UpdateRule]) -> None:
        v = leaves()
        result = parametrised(v, rule, interpolation="log")
        assert result.status is Status.REACHED
        found = gradients(result.steps, v)

        def steps(moved: dict[str, Tensor]) -> float:
            again = parametrised(moved, rule, interpolation="log", gradient=None)
            assert again.index == result.index
            return again.steps.item()

        coarse = relative_gap(central_differences(steps, v, 2e-5), found)
        fine = relative_gap(central_differences(steps, v, 1e-5), found)
        assert fine < 3e-7
        assert fine == pytest.approx(coarse / 4, rel=0.05)

    @pytest.mark.parametrize("interpolation", [None, "log"])
    def test_unrolled_is_algorithm_1(self, interpolation: Any) -> None:
        v = leaves()
        kinds = (Unrolled(), DiscreteAdjoint(), DiscreteAdjoint(memory=200, chunk=3))
        found = []
        for route in (*kinds, Truncated(steps=1000)):
            result = parametrised(v, gradient=route, interpolation=interpolation)
            found.append(gradients(result.steps + 0.3 * result.state[0].sum(), v))
        assert all(relative_gap(g, found[0]) < 1e-12 for g in found[1:])

    def test_definition_3_against_a_plain_loop(self) -> None:
        v = leaves()
        result = parametrised(v)
        n = result.index
        losses, x = [], v["x"]
        for k in range(n + 1):
            losses.append(0.5 * (v["weight"] * x.square()).sum() + 0.1 * x.pow(4).sum())
            t = v["t0"] + k * v["h"]
            x = x - v["h"] * v["theta"] * (x + 0.3 * torch.sin(2 * t) * x**3)
        last = losses[n - 1] - losses[n]
        before = losses[n - 2] - losses[n - 1]
        truth = gradients(-(last - v["eps"]) / (last - before).detach(), v)
        assert relative_gap(gradients(result.steps, v), truth) < 1e-10

    def test_parameters_of_modules_are_found(self) -> None:
        class Step(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.rate = nn.Parameter(torch.tensor(0.1, dtype=F64))

            def forward(self, k: int, x: Tensor) -> Tensor:
                return x - self.rate * x

        update = Step()
        run(update, number([1.0]), 1e-4).steps.backward()
        assert update.rate.grad is not None
        assert update.rate.grad.item() < 0

    def test_float32(self) -> None:
        v = leaves()
        exact = parametrised(v)
        truth = gradients(exact.steps, v)
        single = {name: p.detach().float().requires_grad_(True) for name, p in v.items()}
        result = parametrised(single)
        assert result.index == exact.index
        assert isinstance(result.state, tuple)
        assert all(piece.dtype == torch.float32 for piece in result.state)
        found = gradients(result.steps, single)
        # The decrease, 1e-2, is a difference of numbers ten times as large.
        assert relative_gap({n: g.double() for n, g in found.items()}, truth) < 1e-4

    def test_a_tuple_state(self) -> None:
        m = number(0.6)

        def update(k: int, state: Any) -> Any:
            x, v = state
            v = m * v - 0.05 * x
            return x + v, v

        x0, v0 = number([1.0, 0.5]), number([0.0, 0.0])
        results = [
            run(update, (x0, v0), 1e-3, gradient=route, interpolation="log")
            for route in (DiscreteAdjoint(), Unrolled())
        ]
        moved = {"m": m, "x": x0, "v": v0}
        first, second = (gradients(result.steps, moved) for result in results)
        assert relative_gap(first, second) < 1e-12
        assert all(bool(g.any()) for g in first.values())
        assert len(results[0].state) == 3


class TestAfterAMark:
    """J_{N-1} is no measurement at N = 1 and after an increase, so there is no quotient."""

    @staticmethod
    def swing(theta: Tensor) -> Callable[[int, Tensor], Tensor]:
        """The loss goes up in step 2 and hardly down in step 3."""
        factors = [0.5, 1.4, 0.999]
        return lambda k, x: theta * factors[min(k, 2)] * x

    def test_the_index_stands_and_its_gradient_raises(self) -> None:
        theta = number(1.0)
        result = run(self.swing(theta), number([1.0]), 1e-2)
        assert result.index == 3
        with pytest.raises(GradientError, match=r"no value at step 2 .*N = 3.* gradient=None"):
            result.steps.backward()
        # x_N with N held fixed has its derivative all the same.
        result = run(self.swing(theta), number([1.0]), 1e-2)
        (found,) = torch.autograd.grad(result.state[0].sum(), theta)
        assert found.item() == pytest.approx(3 * 0.5 * 1.4 * 0.999)

    def test_first_step(self) -> None:
        x0 = number([1.0])
        result = run(Euler(lambda t, x: -x, step=1e-3), x0, 0.1)
        assert result.index == 1
        assert result.time is not None
        with pytest.raises(GradientError, match="no value at step 0"):
            result.time.backward()
        masked = torch.where(torch.tensor(False), result.steps, torch.zeros_like(result.steps))
        masked.backward()
        assert x0.grad is not None
        assert x0.grad.item() == 0.0

    @pytest.mark.parametrize("gradient", [DiscreteAdjoint(), None], ids=["adjoint", "none"])
    def test_a_fraction_warns(self, gradient: Any) -> None:
        with pytest.warns(StoppingWarning, match="step 0 has no value"):
            run(lambda k, x: 0.999 * x, number([1.0]), 0.1, interpolation="log", gradient=gradient)


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"initial": 0.0}, ValueError, "initial .* positive .* got 0"),
            ({"initial": float("inf")}, ValueError, "initial .* finite.* inf"),
            ({"initial": float("nan")}, ValueError, "initial .* nan"),
            ({"initial": "1"}, TypeError, "initial .* str"),
            ({"initial": True}, TypeError, "initial .* bool"),
            ({"objective": 3}, TypeError, "objective .* int"),
            ({"position": 3}, TypeError, "position .* int"),
        ],
    )
    def test_constructor(self, options: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            StepDecrease(**{"objective": half_square, **options})

    def test_target_at_or_above_the_mark(self) -> None:
        for tol in (1.0, 2.0, number(1.0)):
            with pytest.raises(ValueError, match=r"target must be below initial = 1.* got [12]"):
                run(lambda k, x: 0.9 * x, number([1.0]), tol)
        with pytest.raises(ValueError, match="target must not be negative"):
            run(lambda k, x: 0.9 * x, number([1.0]), -1e-3)

    @pytest.mark.parametrize("bad", [None, Euler, 3])
    def test_wrap(self, bad: Any) -> None:
        with pytest.raises(TypeError, match="update must be"):
            StepDecrease(half_square).wrap(bad)

    @pytest.mark.parametrize("bad", [[1.0], (torch.ones(1),), (torch.ones(1), 2.0), None])
    def test_initial_state(self, bad: Any) -> None:
        with pytest.raises(TypeError, match="x0 must be"):
            StepDecrease(half_square).initial_state(bad)

    def test_a_forgotten_wrap_names_the_call(self) -> None:
        criterion, x0 = StepDecrease(half_square), torch.ones(1, dtype=F64)
        for state, update in (
            (x0, lambda k, x: 0.9 * x),
            (x0, criterion.wrap(lambda k, x: 0.9 * x)),
            ((x0, x0), lambda k, s: s),
        ):
            with pytest.raises(TypeError, match=r"initial_state\(x0\)"):
                stopping_index(update, state, criterion, 0.1)
        with pytest.raises(TypeError, match="GradientNorm"):
            stopping_time(lambda t, x: -x, x0, criterion, 0.1)

    def test_vector_objective(self) -> None:
        with pytest.raises(ValueError, match=r"objective .* 0-d .*\(1,\)"):
            run(lambda k, x: 0.9 * x, number([1.0]), 0.1, objective=lambda x: x.square())

    @pytest.mark.parametrize("interpolation", ["hermite", "partial_step"])
    def test_no_function_of_flow_time(self, interpolation: Any) -> None:
        with pytest.raises(ValueError, match=f'"{interpolation}" .* StepDecrease'):
            run(Euler(lambda t, x: -x, step=0.1), number([1.0]), 1e-3, interpolation=interpolation)

    def test_nan_is_no_hit(self) -> None:
        def update(k: int, x: Tensor) -> Tensor:
            return x * (torch.nan if k == 2 else 0.9)

        result = run(update, number([1.0]), 1e-3, throw=False)
        assert result.status is Status.DIVERGED


def test_a_wrapped_rule_keeps_its_clock() -> None:
    """t_k = t0 + k h reaches the rule inside, and a step that is trained later counts."""
    seen = []

    def flow(t: Tensor, x: Tensor) -> Tensor:
        seen.append(t.item())
        return -x

    rule = Euler(flow, step=0.25)
    criterion = StepDecrease(half_square)
    wrapped = criterion.wrap(rule)
    assert wrapped.step == 0.25
    assert wrapped.flow is flow
    assert wrapped.order == 1
    x0 = torch.ones(1, dtype=F64)
    result = stopping_index(
        wrapped, criterion.initial_state(x0), criterion, 0.1, t0=2.0, gradient=None
    )
    assert seen == [2.0 + 0.25 * k for k in range(result.index)]
    assert result.time is not None
    assert result.time.item() == 2.0 + 0.25 * result.index
    rule.step = 0.5
    assert wrapped.step == 0.5
    x, d = wrapped.advance(torch.tensor(0.0), criterion.initial_state(x0), 0.5)
    assert x.item() == 0.5
    assert d.item() == 0.5 - 0.125


def test_readable_and_portable() -> None:
    criterion = StepDecrease(Quadratic(torch.ones(2, dtype=F64)), initial=0.7)
    assert "initial=0.7" in repr(criterion)
    assert json.loads(json.dumps(repr(criterion))) == repr(criterion)
    x0 = number([1.0, 2.0])
    result = stopping_index(
        criterion.wrap(Euler(lambda t, x: -x, step=0.1)),
        criterion.initial_state(x0),
        criterion,
        1e-3,
    )
    record = json.loads(json.dumps(result.to_dict()))
    assert record["index"] == result.index
    assert len(record["state"]) == 2
    # The first entry is the position, as everywhere: other criteria read the state unchanged.
    loss = LossValue(criterion.objective)(torch.tensor(0.0), result.state)
    assert loss.item() == pytest.approx(half_square(result.state[0]).item())


def test_a_state_that_is_small_beside_the_mark() -> None:
    """The iteration has no scale: with x0 and target scaled alike N and dN are the same."""
    found = []
    for size in (1.0, 1e-6):
        c = torch.tensor([1.0, 0.6, 0.4], dtype=torch.float64, requires_grad=True)
        rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        criterion = StepDecrease(lambda x, c=c: (c * x * x).sum() / 2)
        update = criterion.wrap(lambda k, x, c=c, rate=rate: x - rate * c * x)
        x0 = size * torch.tensor([1.6, 1.2, 1.0], dtype=torch.float64)
        run = stopping_index(update, criterion.initial_state(x0), criterion, 1e-4 * size**2)
        found.append((run.index, *torch.autograd.grad(run.steps, [c, rate])))
    assert found[0][0] == found[1][0] > 5
    for first, second in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.allclose(first, second, rtol=1e-9)
