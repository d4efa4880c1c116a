"""A mean over runs of which some missed: infinite or conditional, never silently finite."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from iterations import number
from torch import Tensor

from discrete import Euler, stopping_index
from ode_stopping import NotReachedError, stopping_time
from ode_stopping.core.means import mean_over_reached

STARTS = (1.0, 2.0, 3.0, 4.0)
EPS = 0.02
HORIZON = 2.5  # of which x0 = 3 and 4 fall short
KINDS = ("time", "steps")


def half_square(t: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


def runs(kind: str, theta: Tensor, **options: Any) -> list[Any]:
    """x' = -theta x from several starts; by `stopping_time`, or by Euler steps of 0.1."""

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -theta * x

    starts = [torch.tensor([start], dtype=torch.float64) for start in STARTS]
    if kind == "time":
        options = {"max_time": HORIZON, **options}
        return [stopping_time(flow, x0, half_square, EPS, **options) for x0 in starts]
    options = {"max_steps": 23, **options}
    rule = Euler(flow, step=0.1)
    return [stopping_index(rule, x0, half_square, EPS, **options) for x0 in starts]


def values(kind: str, results: list[Any]) -> Tensor:
    return torch.stack([getattr(result, kind) for result in results])


@pytest.mark.parametrize("kind", KINDS)
class TestBothSides:
    def test_misses_are_left_out(self, kind: str) -> None:
        theta = number(1.0)
        results = runs(kind, theta)
        assert [bool(result.reached) for result in results] == [True, True, False, False]
        found = mean_over_reached(results)
        assert (found.reached, found.missed, found.fraction) == (2, 2, 0.5)
        assert found.mean.shape == ()
        expected = 0.5 * (getattr(results[0], kind) + getattr(results[1], kind))
        torch.testing.assert_close(found.mean, expected)
        (gradient,) = torch.autograd.grad(found.mean, theta, retain_graph=True)
        (truth,) = torch.autograd.grad(expected, theta)
        torch.testing.assert_close(gradient, truth)
        assert bool(torch.isfinite(gradient))

    def test_the_plain_mean_is_infinite_and_refuses(self, kind: str) -> None:
        theta = number(1.0)
        mean = values(kind, runs(kind, theta)).mean()
        assert mean.item() == math.inf
        with pytest.raises(NotReachedError, match=r"censored=.*\.reached"):
            mean.backward()
        assert theta.grad is None

    def test_other_reductions_are_not_silently_finite(self, kind: str) -> None:
        theta = number(1.0)
        for reduce in (torch.sum, torch.max, torch.logsumexp, lambda v: (v - 2.0).square().mean()):
            arguments = (0,) if reduce is torch.logsumexp else ()
            value = reduce(values(kind, runs(kind, theta)), *arguments)
            assert value.item() == math.inf
            with pytest.raises(NotReachedError):
                value.backward()

    def test_censored(self, kind: str) -> None:
        """A finite mean; the missed contribute a constant."""
        theta = number(1.0)
        plain = mean_over_reached(runs(kind, theta))
        (truth,) = torch.autograd.grad(plain.mean, theta)
        for censored, count in ((50.0, 50.0), ("horizon", HORIZON if kind == "time" else 23.0)):
            results = runs(kind, theta, censored=censored)
            mean = values(kind, results).mean()
            expected = (2 * plain.mean.item() + 2 * count) / 4
            assert mean.item() == pytest.approx(expected, rel=1e-12)
            (gradient,) = torch.autograd.grad(mean, theta)
            torch.testing.assert_close(gradient, truth / 2)
            # A censored miss is still one.
            again = mean_over_reached(results)
            assert (again.reached, again.missed) == (2, 2)
            torch.testing.assert_close(again.mean, plain.mean)

    def test_nothing_reached(self, kind: str) -> None:
        results = runs(kind, number(1.0))[2:]
        with pytest.raises(ValueError, match=r"no run that met its target, in 2.*censored="):
            mean_over_reached(results)

    def test_all_reached(self, kind: str) -> None:
        results = runs(kind, number(1.0))[:2]
        found = mean_over_reached(results)
        assert (found.reached, found.missed) == (2, 0)
        torch.testing.assert_close(found.mean, values(kind, results).mean())

    def test_without_gradients(self, kind: str) -> None:
        found = mean_over_reached(runs(kind, number(1.0), gradient=None))
        assert not found.mean.requires_grad
        assert math.isfinite(found.mean.item())

    def test_a_generator_and_a_single_result(self, kind: str) -> None:
        results = runs(kind, number(1.0))
        found = mean_over_reached(result for result in results)
        torch.testing.assert_close(found.mean, mean_over_reached(results).mean)
        torch.testing.assert_close(mean_over_reached(results[0]).mean, getattr(results[0], kind))


def test_at_the_start_counts_as_reached() -> None:
    theta = number(1.0)
    met = stopping_time(lambda t, x: -theta * x, number([0.1]), half_square, EPS, t0=0.5)
    found = mean_over_reached([met, *runs("time", theta)])
    assert (found.reached, found.missed) == (3, 2)


def test_flow_time_of_an_iteration() -> None:
    theta = number(1.0)
    results = runs("steps", theta)
    times = mean_over_reached(results, which="time")
    torch.testing.assert_close(times.mean, 0.1 * mean_over_reached(results).mean)
    bare = [stopping_index(lambda k, x: 0.9 * x, number([1.0]), half_square, EPS)]
    with pytest.raises(ValueError, match='"time", but entry 0'):
        mean_over_reached(bare, which="time")
    with pytest.raises(ValueError, match='"steps", but entry 0'):
        mean_over_reached(runs("time", theta), which="steps")


def test_both_kinds_together_have_flow_time_only() -> None:
    theta = number(1.0)
    found = mean_over_reached([*runs("time", theta), *runs("steps", theta)])
    assert (found.reached, found.missed) == (4, 4)
    assert 1.0 < found.mean.item() < HORIZON


def test_batched_results() -> None:
    """One result with a vector of times, as a batch has."""

    @dataclasses.dataclass
    class Batch:
        time: Tensor
        reached: Tensor

    time = number([1.0, math.inf, 3.0])
    found = mean_over_reached([Batch(time, torch.tensor([True, False, True]))])
    assert (found.mean.item(), found.reached, found.missed) == (2.0, 2, 1)
    found.mean.backward()
    assert time.grad is not None
    assert time.grad.tolist() == [0.5, 0.0, 0.5]


def test_bad_input() -> None:
    results = runs("time", number(1.0))
    with pytest.raises(ValueError, match="at least one"):
        mean_over_reached([])
    with pytest.raises(ValueError, match=r"which .* 'index'"):
        mean_over_reached(results, which="index")  # type: ignore[arg-type]
    for bad in ([results[0].time], [1.0], [None], 3.0):
        with pytest.raises(TypeError, match="entry 0 is"):
            mean_over_reached(bad)  # type: ignore[arg-type]


def test_the_record_is_frozen_and_can_be_copied() -> None:
    found = mean_over_reached(runs("time", number(1.0), gradient=None))
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.reached = 7  # type: ignore[misc]
    assert copy.deepcopy(found).reached == found.reached
    assert "reached=2, missed=2" in repr(found)
