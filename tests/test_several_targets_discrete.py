"""Targets of shape (K,) on the discrete side: N for each from one run and one backward pass."""

from __future__ import annotations

import pickle
from typing import Any

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
    UpdateRule,
    check_index_gradient,
    stopping_index,
)
from ode_stopping import (
    DivergedError,
    NotReachedError,
    PreconditionedFlow,
    QuarticQuadratic,
    Status,
    mean_over_reached,
    stopping_time,
)
from ode_stopping.criteria import LossValue

F64 = torch.float64
ROUTES = {
    "all states": DiscreteAdjoint(),
    "checkpoints": DiscreteAdjoint(memory=2000, chunk=4),
    "unrolled": Unrolled(),
}
every_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())


def leaf(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


class Case:
    """A preconditioned flow of a quartic, with everything a leaf."""

    def __init__(self) -> None:
        self.p, self.x0 = leaf([1.0, 0.8, 1.2]), leaf([1.0, -0.5, 0.7])
        self.step, self.t0 = leaf(0.05), leaf(0.3)
        # Two of them are met in one step, one at the start.
        self.eps = leaf([1e-2, 1e-6, 0.99e-2, 1e-3, 1e-1, 1e3, 1e-4])
        self.objective = QuarticQuadratic(torch.tensor([1.0, 3.0, 10.0], dtype=F64))

    @property
    def leaves(self) -> list[Tensor]:
        return [self.p, self.x0, self.step, self.t0, self.eps]

    def run(
        self, eps: Tensor, rule: type[UpdateRule] = Euler, **options: Any
    ) -> StoppingIndexResult:
        flow = PreconditionedFlow(self.objective, preconditioner=self.p)
        update = rule(flow, step=self.step)
        criterion = LossValue(self.objective)
        return stopping_index(update, self.x0, criterion, eps, t0=self.t0, **options)


def combined(results: list[StoppingIndexResult] | StoppingIndexResult) -> Tensor:
    """A function of all indices, times and states, from one run or from many."""
    one = isinstance(results, StoppingIndexResult)
    parts = [
        getattr(results, name) if one else torch.stack([getattr(r, name) for r in results])
        for name in ("steps", "time", "state")
    ]
    steps, times, states = parts
    weights = torch.arange(1.0, len(steps) + 1, dtype=F64)
    return (weights * (steps + times.square())).sum() + (weights[:, None] * states.square()).sum()


@every_route
@pytest.mark.parametrize(
    ("rule", "interpolation"),
    [
        *((Euler, way) for way in (None, "log", "partial_step")),
        (Heun, "hermite"),
        (Heun, None),
        pytest.param(Euler, "hermite", marks=pytest.mark.slow),
        *(pytest.param(Heun, way, marks=pytest.mark.slow) for way in ("log", "partial_step")),
    ],
)
def test_everything_equals_single_calls(
    route: IndexRoute, rule: type[UpdateRule], interpolation: str | None
) -> None:
    many, single = Case(), Case()
    options = {"rule": rule, "gradient": route, "interpolation": interpolation}
    together = many.run(many.eps, **options)
    alone = [single.run(eps, **options) for eps in single.eps.unbind()]
    assert together.index.tolist() == [result.index for result in alone]
    assert together.decrease.tolist() == pytest.approx(
        [float(result.decrease) for result in alone], rel=1e-15, nan_ok=True
    )
    found = torch.autograd.grad(combined(together), many.leaves)
    known = torch.autograd.grad(combined(alone), single.leaves)
    for one, other in zip(found, known, strict=True):
        assert float((one - other).norm()) <= 1e-13 * float(other.norm())


def test_one_run_and_one_backward_pass() -> None:
    many, single = Case(), Case()
    together = many.run(many.eps)
    lowest = single.run(single.eps[1])
    together.steps.sum().backward()
    lowest.steps.backward()
    assert together.stats.nfe_forward == lowest.stats.nfe_forward == lowest.index
    assert together.stats.vjps == lowest.stats.vjps == lowest.index
    assert len(together.trajectory.losses) == lowest.index + 1
    assert torch.equal(together.trajectory.losses, lowest.trajectory.losses)
    assert together.trajectory.indices == lowest.trajectory.indices
    assert torch.equal(together.trajectory.states, lowest.trajectory.states)


def test_an_earlier_target_alone_costs_its_own_part() -> None:
    case = Case()
    result = case.run(case.eps)
    torch.autograd.grad(result.steps[4], case.p)
    assert result.stats.vjps == int(result.index[4])


def test_met_at_start_missed_and_censored() -> None:
    case = Case()
    eps = torch.tensor([1e3, 1e-2, 1e-30, 1e-40], dtype=F64)
    result = case.run(eps, max_steps=50)
    missed = Status.NOT_REACHED
    assert result.status == [Status.AT_START, Status.REACHED, missed, missed]
    assert result.index.tolist() == [0, 32, -1, -1]
    assert result.reached.tolist() == [True, True, False, False]
    (gradient,) = torch.autograd.grad(result.steps[:2].sum(), case.p, retain_graph=True)
    (known,) = torch.autograd.grad(case.run(eps[1]).steps, case.p)
    torch.testing.assert_close(gradient, known, rtol=1e-14, atol=0)
    for quantity in (result.steps, result.time):
        with pytest.raises(NotReachedError):
            torch.autograd.grad(quantity[2], case.p, retain_graph=True)
    mean = mean_over_reached([result])
    assert (mean.reached, mean.missed) == (2, 2)
    censored = case.run(eps, max_steps=50, censored="horizon")
    assert censored.steps.tolist() == [0.0, 32.0, 50.0, 50.0]
    (gradient,) = torch.autograd.grad(censored.steps.sum(), case.p)
    torch.testing.assert_close(gradient, known, rtol=1e-14, atol=0)


def test_divergence_is_raised_with_what_was_found() -> None:
    def update(k: int, x: Tensor) -> Tensor:
        return x * (0.5 if k < 3 else 1e200)

    x0, criterion = torch.ones(1, dtype=F64), lambda t, x: x.sum()
    eps = torch.tensor([0.3, 0.01], dtype=F64)
    with pytest.raises(DivergedError, match=r"target 0\.01: DIVERGED") as caught:
        stopping_index(update, x0, criterion, eps)
    assert caught.value.result.index.tolist() == [2, -1]
    quiet = stopping_index(update, x0, criterion, eps, throw=False)
    assert quiet.status == [Status.REACHED, Status.DIVERGED]
    assert quiet.time is None


@pytest.mark.slow
def test_converges_to_the_continuous_side() -> None:
    """h dN_k/dp -> dT_k/dp for all targets at once (Theorem 2)."""
    case = Case()
    flow = PreconditionedFlow(case.objective, preconditioner=case.p)
    criterion = LossValue(case.objective)
    eps = torch.tensor([1e-1, 1e-2, 1e-3], dtype=F64)
    truth = stopping_time(flow, case.x0, criterion, eps)
    rows = [torch.autograd.grad(t, case.p, retain_graph=True)[0] for t in truth.time.unbind()]
    times = []
    for h in (4e-3, 2e-3, 1e-3):
        run = stopping_index(Euler(flow, step=h), case.x0, criterion, eps, interpolation="log")
        found = [torch.autograd.grad(n, case.p, retain_graph=True)[0] for n in run.steps.unbind()]
        for one, other in zip(found, rows, strict=True):
            # The phase of T inside a step makes a sawtooth of it, so it is bounded, not halved.
            assert float((h * one - other).norm() / other.norm()) <= 0.4 * h
        assert run.time is not None
        times.append((run.time.detach() - truth.time.detach()).abs())
    torch.testing.assert_close(
        times[0] / times[1], torch.full((3,), 2.0, dtype=F64), rtol=0.02, atol=0
    )
    torch.testing.assert_close(
        times[1] / times[2], torch.full((3,), 2.0, dtype=F64), rtol=0.02, atol=0
    )


def test_forms_of_the_result() -> None:
    case = Case()
    result = case.run(case.eps)
    assert result.index.dtype == torch.int64
    assert result.to_dict()["index"] == result.index.tolist()
    assert len(result.to_dict()["status"]) == len(case.eps)
    assert "REACHED (6), AT_START (1)" in repr(result)
    again = pickle.loads(pickle.dumps(result))
    assert torch.equal(again.steps, result.steps.detach())
    assert again.stats.nfe_forward == result.stats.nfe_forward
    one = case.run(case.eps[:1])
    assert one.steps.shape == (1,)
    assert float(one.steps.detach()) == one.index.item()


def test_refused() -> None:
    case = Case()
    with pytest.raises(ValueError, match="Truncated takes one target"):
        case.run(case.eps, gradient=Truncated(steps=3))
    with pytest.raises(ValueError, match="more than once"):
        case.run(torch.tensor([0.1, 0.1], dtype=F64))
    with pytest.raises(ValueError, match='"log" needs a positive target'):
        case.run(torch.tensor([0.1, 0.0], dtype=F64), interpolation="log")
    flow = PreconditionedFlow(lambda x: x.square().sum(-1), preconditioner=case.p)
    with pytest.raises(ValueError, match="target must be one number"):
        check_index_gradient(
            Euler(flow, step=0.05), case.x0, lambda t, x: x.square().sum(), case.eps.detach()
        )
