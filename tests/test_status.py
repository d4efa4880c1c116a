"""How a run ends, whatever happens: in seconds, and never as a hit that is none."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ode_stopping import (
    DegenerateCrossingError,
    DivergedError,
    NotReachedError,
    StalledError,
    Status,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)

X0 = torch.tensor([2.0], dtype=torch.float64)
ORIGIN = torch.zeros(1, dtype=torch.float64)


def half_square(t: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


def decay(t: Tensor, x: Tensor) -> Tensor:
    return -x


def clock(t: Tensor, x: Tensor) -> Tensor:
    return torch.ones_like(x)


@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_unreachable_target_at_the_default_horizon(condition: float) -> None:
    spectrum = torch.logspace(0, math.log10(condition), 20, dtype=torch.float64)
    result = stopping_time(
        lambda t, x: -spectrum * x,
        torch.ones(20, dtype=torch.float64),
        lambda t, x: 1 + half_square(t, x),
        0.5,
    )
    assert result.status is Status.NOT_REACHED
    assert result.time.item() == math.inf
    assert not bool(result.reached)
    assert result.best == pytest.approx(1.0)


def test_a_flow_at_rest() -> None:
    result = stopping_time(lambda t, x: torch.zeros_like(x), X0, half_square, 0.5)
    assert result.status is Status.NOT_REACHED


def test_a_flow_that_wakes_up_is_not_at_rest() -> None:
    """Nothing happens until t = 5000: then x falls at unit speed."""
    result = stopping_time(
        lambda t, x: -torch.sigmoid(2 * (t - 5e3)) * torch.ones_like(x),
        X0,
        lambda t, x: x.sum(),
        1.0,
    )
    assert result.status is Status.REACHED
    assert result.time.item() == pytest.approx(5001.0, abs=0.2)


def test_stiff_flow_that_wakes_up_is_not_at_rest() -> None:
    """Many steps at rest, limited by stability, before the target is in reach."""
    result = stopping_time(
        lambda t, x: -10 * (x - 2.0 * torch.sigmoid(400.0 - t)),
        X0,
        lambda t, x: x.sum(),
        0.5,
        max_time=1e4,
    )
    assert result.status is Status.REACHED
    assert result.time.item() == pytest.approx(400 + math.log(3) + 0.1, abs=0.05)


def test_met_at_the_start() -> None:
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    t0 = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    result = stopping_time(lambda t, x: -theta * x, X0, half_square, 5.0, t0=t0)
    assert result.status is Status.AT_START
    assert bool(result.reached)
    assert result.time.item() == 0.3
    result.time.backward()
    assert theta.grad is not None
    assert theta.grad.item() == 0.0
    assert t0.grad is not None
    assert t0.grad.item() == 1.0


nan, inf = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("flow", "criterion"),
    [
        (lambda t, x: x * nan, half_square),
        (lambda t, x: -x * torch.where(t > 0.5, nan, 1.0), half_square),
        (lambda t, x: -x * torch.where(t > 0.5, inf, 1.0), half_square),
        (decay, lambda t, x: nan * x.sum()),
        (decay, lambda t, x: torch.where(x < 1, nan, x).sum()),
        (decay, lambda t, x: torch.where(x < 1, -inf, x).sum()),
        (decay, lambda t, x: torch.where(x < 1, inf, x).sum()),
        (lambda t, x: 10 * x, lambda t, x: 1 + x.pow(64).sum()),
    ],
    ids=["flow0", "flow", "flow-inf", "J0", "J", "J-minus-inf", "J-inf", "overflow"],
)
def test_nan_and_infinity_are_no_hit(
    flow: Callable[..., Tensor], criterion: Callable[..., Tensor]
) -> None:
    result = stopping_time(flow, X0, criterion, 0.01, throw=False)
    assert result.status is Status.DIVERGED
    assert not bool(result.reached)
    with pytest.raises(DivergedError) as raised:
        stopping_time(flow, X0, criterion, 0.01)
    assert raised.value.result.status is Status.DIVERGED
    assert raised.value.time is not None
    assert raised.value.step is not None


def test_a_crossing_before_the_criterion_ends_is_found() -> None:
    """J = log(x - 1) does not exist beyond t = ln 2, but is down to the target before."""
    result = stopping_time(decay, X0, lambda t, x: torch.log(x - 1).sum(), -3.0)
    assert result.time.item() == pytest.approx(math.log(2 / (1 + math.exp(-3))), rel=1e-6)


def test_step_limit() -> None:
    solver = Torchdiffeq(max_steps=20)
    with pytest.raises(StalledError, match="step limit of 20") as raised:
        stopping_time(decay, X0, half_square, 1e-9, solver=solver)
    assert raised.value.best is not None
    result = stopping_time(decay, X0, half_square, 1e-9, solver=solver, throw=False)
    assert result.status is Status.STALLED


def test_singularity_of_the_flow() -> None:
    """x' = -1/x ends at t = x0^2/2 = 2, above the target."""
    result = stopping_time(lambda t, x: -1 / x, X0, lambda t, x: x.sum(), -1.0, throw=False)
    assert result.status is Status.STALLED


@pytest.mark.parametrize("frequency", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("depth", [0.01, 0.2, 0.9])
def test_crossing_that_comes_back_inside_a_step(frequency: float, depth: float) -> None:
    """x' = 1 puts no limit on the steps; J = 1.5 + cos(w x) dips and comes back."""
    result = stopping_time(
        clock, ORIGIN, lambda t, x: 1.5 + torch.cos(frequency * x).sum(), 0.5 + depth
    )
    assert result.status is Status.REACHED
    assert result.time.item() == pytest.approx(math.acos(depth - 1) / frequency, rel=1e-7)


def test_first_of_many_crossings() -> None:
    """Sums of four cosines, the first crossing by brute force on a fine grid."""
    generator = torch.Generator().manual_seed(5)
    grid = torch.arange(0, 60, 1e-4, dtype=torch.float64)
    for _ in range(25):
        a, w, p = (torch.rand(4, generator=generator, dtype=torch.float64) for _ in range(3))
        a, w, p = 0.2 + 0.8 * a, 0.2 + 7.8 * w, 6.28 * p
        values = sum(a[i] * torch.cos(w[i] * grid + p[i]) for i in range(4))
        assert isinstance(values, Tensor)
        target = float(torch.quantile(values[::10], 0.02))
        if values[0] <= target:
            continue
        first = grid[int((values <= target).to(torch.int).argmax())].item()

        def criterion(t: Tensor, x: Tensor, a: Tensor = a, w: Tensor = w, p: Tensor = p) -> Tensor:
            return (a * torch.cos(w * x + p)).sum()

        result = stopping_time(clock, ORIGIN, criterion, target, gradient=None)
        assert result.time.item() == pytest.approx(first, abs=2e-4)


@pytest.mark.parametrize("excess", [0.0, 1e-12])
def test_tangential_crossing(excess: float) -> None:
    """J touches the target at t = 1 and turns back."""
    arguments = (clock, ORIGIN, lambda t, x: (x - 1).square().sum() + 0.5, 0.5 + excess)
    result = stopping_time(*arguments, throw=False)
    assert result.status is Status.DEGENERATE
    assert result.time.item() == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(DegenerateCrossingError, match=r"J'\(T\) = .* against a scale of"):
        stopping_time(*arguments)


def test_shallow_dip_above_the_tolerance_is_a_crossing() -> None:
    result = stopping_time(clock, ORIGIN, lambda t, x: (x - 1).square().sum() + 0.5, 0.5 + 1e-6)
    assert result.status is Status.REACHED
    assert result.time.item() == pytest.approx(1 - 1e-3, rel=1e-6)


def test_cancelling_rate_is_degenerate() -> None:
    """J' = g^T F is a cancellation of large terms: its own scale says so, not its size."""
    result = stopping_time(
        lambda t, x: torch.stack([-x[0], x[0] * (1 - 1e-9)]),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
        lambda t, x: 1e9 * (x.sum() - 1) + 1,
        0.5,
        throw=False,
        solver=Torchdiffeq(rtol=1e-8),
    )
    assert result.status is Status.DEGENERATE


def test_tiny_rate_is_not_degenerate() -> None:
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    result = stopping_time(lambda t, x: -1e-3 * theta * x, X0, half_square, 1e-10)
    assert result.status is Status.REACHED
    assert abs(result.rate.item()) < 1e-12
    result.time.backward()
    span = math.log(2e10) / 2e-3
    assert theta.grad is not None
    assert theta.grad.item() == pytest.approx(-span, rel=1e-4)


def missed(**options: object) -> tuple[StoppingResult, Tensor]:
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    result = stopping_time(
        lambda t, x: -theta * x,
        X0,
        half_square,
        1e-9,
        max_time=2.0,
        **options,  # type: ignore[arg-type]
    )
    return result, theta


def test_gradient_of_a_miss() -> None:
    result, theta = missed()
    assert result.time.item() == math.inf
    with pytest.raises(NotReachedError, match="censored="):
        result.time.backward()
    result, theta = missed()
    torch.where(result.reached, result.time, torch.zeros_like(result.time)).backward()
    assert theta.grad is not None
    assert theta.grad.item() == 0.0


@pytest.mark.parametrize(("censored", "value"), [("horizon", 2.0), (7.5, 7.5)])
def test_censored_miss(censored: float | str, value: float) -> None:
    result, theta = missed(censored=censored)
    assert result.status is Status.NOT_REACHED
    assert result.time.item() == value
    result.time.backward()
    assert theta.grad is not None
    assert theta.grad.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("target", [1e-3, 1e-9])
def test_flow_is_never_evaluated_outside(target: float, dtype: torch.dtype) -> None:
    """A 3/t flow from t0 = 0.01, with a horizon that the smaller target does not meet."""
    seen: list[float] = []
    theta = torch.tensor(3.0, dtype=dtype, requires_grad=True)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        seen.append(t.item())
        return -theta / t * x

    t0, horizon = torch.tensor(0.01, dtype=dtype).item(), 0.05
    result = stopping_time(flow, X0.to(dtype), half_square, target, t0=t0, max_time=horizon)
    if result.status is Status.REACHED:
        result.time.backward()
    assert min(seen) >= t0
    assert max(seen) <= torch.tensor(horizon, dtype=dtype).item()
    assert (result.status is Status.REACHED) == (target == 1e-3)


def test_result_is_portable_and_readable() -> None:
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    result = stopping_time(lambda t, x: -theta * x, X0, half_square, 1e-2)
    copy = pickle.loads(pickle.dumps(result))
    assert copy.time.item() == result.time.item()
    assert copy.status is Status.REACHED
    assert copy.trajectory(0.5).item() == pytest.approx(2 * math.exp(-0.5), rel=1e-6)
    text = repr(result)
    assert "REACHED" in text
    assert "accepted" in text
    data = result.to_dict()
    assert data["status"] == "REACHED"
    assert data["time"] == result.time.item()
    assert data["stats"]["accepted"] == result.stats.accepted == len(result.trajectory) - 1


def test_trajectory_ends_at_the_crossing() -> None:
    result = stopping_time(decay, X0, half_square, 1e-2)
    path = result.trajectory
    assert path.times[-1].item() == result.time.item()
    assert path.values[-1].item() == pytest.approx(1e-2, rel=1e-12)
    assert isinstance(path.states, Tensor)
    assert path.states.shape == (len(path), 1)
    truth = 2 * torch.exp(-path.times)
    assert float((path.states[:, 0] - truth).abs().max()) < 1e-6
    times = torch.linspace(0, path.end, 7, dtype=torch.float64)
    assert path(times).shape == (7, 1)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="t must lie in"):
        path(path.end + 1)


def test_no_gradient_keeps_nothing() -> None:
    theta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    result = stopping_time(lambda t, x: -theta * x, X0, half_square, 1e-2, gradient=None)
    assert not result.time.requires_grad
    assert result.problem is None
    assert result.trajectory.steps == []
    with pytest.raises(RuntimeError, match="not kept"):
        _ = result.trajectory.states
