"""Learnable hyperparameters stay admissible; schedules are read as they are, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from augmented import plain, points
from torch import Tensor, nn

from ode_stopping import LossValue, stopping_time
from ode_stopping.flows import (
    AtLeast,
    Bounded,
    HeavyBallFlow,
    InertialHessianFlow,
    NesterovFlow,
    NetworkSchedule,
    PolynomialSchedule,
    Positive,
    VanishingDamping,
)
from ode_stopping.flows.hyperparameters import at_time, rate_at_time

TIME = torch.tensor(0.7, dtype=torch.float64)
Constant = Positive | Bounded

CONSTANTS: dict[str, tuple[Callable[[], Constant], float, float, float]] = {
    # What makes one, its start, and the ends of its range.
    "positive": (lambda: Positive(0.3), 0.3, 0.0, math.inf),
    "at least": (lambda: AtLeast(3, value=3.5), 3.5, 3.0, math.inf),
    "at least, negative": (lambda: AtLeast(-2.0, value=0.25), 0.25, -2.0, math.inf),
    "bounded": (lambda: Bounded(0.999), 0.999, 0.0, 1.0),
    "bounded, wide": (lambda: Bounded(-1.5, low=-2.0, high=7.0), -1.5, -2.0, 7.0),
}
every_constant = pytest.mark.parametrize("name", CONSTANTS)


@every_constant
def test_constants_start_where_they_are_told(name: str) -> None:
    make, start, _, _ = CONSTANTS[name]
    module = make()
    for value in (module.value, module(), module(TIME)):
        assert float(value.detach()) == pytest.approx(start, rel=1e-14)
        assert value.shape == ()
        assert value.dtype == torch.float64
        assert value.requires_grad
    assert [name for name, _ in module.named_parameters()] == ["raw"]
    assert f"value={start:g}" in repr(module)


@every_constant
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_constants_stay_inside_whatever_a_step_does(name: str, dtype: torch.dtype) -> None:
    """Open at both ends: not even rounding puts them on one."""
    make, _, low, high = CONSTANTS[name]
    module = make().to(dtype)
    generator = torch.Generator().manual_seed(0)
    steps = [size * torch.randn(30, generator=generator) for size in (1.0, 30.0, 1e3, 1e30)]
    for raw in torch.cat(steps).tolist():
        with torch.no_grad():
            module.raw.fill_(raw)
        value = module.value
        assert low < float(value.detach()) < high
        assert math.isfinite(float(value.detach()))
        (slope,) = torch.autograd.grad(value, module.raw)
        assert 0 <= float(slope) < math.inf


@every_constant
def test_constants_by_their_formula(name: str) -> None:
    make, _, low, high = CONSTANTS[name]
    module = make()

    def value(raw: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"raw": raw}, ())

    for raw in (-3.0, 0.2, 2.0):
        leaf = torch.tensor(raw, dtype=torch.float64, requires_grad=True)
        if high < math.inf:
            expected = low + (high - low) / (1 + math.exp(-raw))
        else:
            expected = low + math.exp(raw)
        assert float(value(leaf).detach()) == pytest.approx(expected, rel=1e-14)
        assert torch.autograd.gradcheck(value, (leaf,))
        assert torch.autograd.gradgradcheck(value, (leaf,))


def test_learning_rates_of_any_size_leave_a_flow_admissible() -> None:
    flow = NesterovFlow(plain, alpha=AtLeast(3, value=3.2))
    optimizer = torch.optim.SGD(flow.parameters(), lr=1e3)
    for sign in (1, -1, -1, 1, -1):
        optimizer.zero_grad()
        x, v = points(), points(seed=1)
        (sign * flow(TIME, (x, v))[1].sum()).backward()
        optimizer.step()
        assert float(flow.damping.alpha.value.detach()) > 3


BAD = {
    "positive": (lambda: Positive(0), ValueError, "value must be > 0; got 0"),
    "positive NaN": (lambda: Positive(math.nan), ValueError, "value must be > 0"),
    "positive inf": (lambda: Positive(math.inf), ValueError, "value must be > 0"),
    "positive None": (lambda: Positive(None), TypeError, "value must be a number; got NoneType"),
    "positive text": (lambda: Positive("1"), TypeError, "value must be a number; got str"),
    "positive vector": (lambda: Positive(torch.ones(2)), ValueError, "value must be a number"),
    "at least": (lambda: AtLeast(3, value=3), ValueError, "value must be > 3; got 3"),
    "at least None": (lambda: AtLeast(3, value=None), TypeError, "value must be a number"),
    "bounded": (lambda: Bounded(1.0), ValueError, "value must be > 0 and < 1; got 1"),
    "bounded low": (lambda: Bounded(0.0), ValueError, "value must be > 0 and < 1; got 0"),
    "bounded infinite": (lambda: Bounded(1.0, high=math.inf), ValueError, "low and high must be"),
    "bounded swapped": (lambda: Bounded(0.5, low=1, high=0), ValueError, "low and high must be"),
    "alpha": (lambda: VanishingDamping(-1.0), ValueError, "alpha must be > 0; got -1"),
    "network": (lambda: NetworkSchedule(0.0), ValueError, "value must be positive"),
    "network hidden": (lambda: NetworkSchedule(1.0, hidden=0), ValueError, "hidden"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_construction_is_named(name: str) -> None:
    make, error, message = BAD[name]
    with pytest.raises(error, match=message):
        make()


# --- alpha/t --------------------------------------------------------------------------------------


def test_vanishing_damping() -> None:
    damping = VanishingDamping(AtLeast(3, value=4.0))
    assert float(damping(TIME).detach()) == pytest.approx(4 / 0.7, rel=1e-14)
    assert torch.autograd.gradcheck(damping, (TIME.clone().requires_grad_(),))
    for t in (0.0, -1.0, math.nan):
        for grad in (False, True):
            time = torch.tensor(t, dtype=torch.float64, requires_grad=grad)
            with pytest.raises(ValueError, match="alpha/t is singular at t = 0: t0 must be pos"):
                damping(time)


@pytest.mark.parametrize(
    "make",
    [
        NesterovFlow,
        lambda f: HeavyBallFlow(f, damping=VanishingDamping(3)),
        lambda f: InertialHessianFlow(f, damping=VanishingDamping(3), beta=0.1, gamma=1.0),
    ],
    ids=["nesterov", "heavy ball", "hessian"],
)
def test_the_default_start_time_is_refused(make: Callable[..., HeavyBallFlow]) -> None:
    flow = make(plain)
    start = flow.initial_state(points())
    for options in ({}, {"gradient": None}, {"t0": -1.0}):
        with pytest.raises(ValueError, match="t0 must be positive"):
            stopping_time(flow, start, LossValue(plain), 3.5, **options)
    assert float(stopping_time(flow, start, LossValue(plain), 3.5, t0=1e-3).time) > 1e-3


# --- schedules ------------------------------------------------------------------------------------


def test_network_schedules_start_as_a_constant() -> None:
    times = [torch.tensor(t, dtype=torch.float64) for t in (0.0, 0.3, 5.0, 1e3)]
    for value in (1e-8, 0.02, 1.0, 300.0):
        exact = NetworkSchedule(value, spread=0.0)
        near = NetworkSchedule(value, seed=3)
        for t in times:
            assert float(exact(t).detach()) == pytest.approx(value, rel=1e-12)
            # The argument of softplus is off by eight numbers of size 0.1/sqrt(8) at most twice.
            assert abs(math.log(float(near(t).detach()) / value)) < 0.3
    assert float(near(times[1]).detach()) != float(near(times[2]).detach())


def test_network_schedules_stay_positive_and_are_seeded_by_themselves() -> None:
    before = torch.get_rng_state()
    first, again, other = (NetworkSchedule(0.5, seed=s) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.weight, other.weight)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(10.0).sub_(3.0)
    assert all(float(first(torch.tensor(t).double()).detach()) > 0 for t in (0.0, 1.0, 10.0))


def test_rates_by_autograd() -> None:
    like = points()
    cases = {
        0.3: 0.0,
        Positive(0.3): 0.0,
        torch.tensor(0.3): 0.0,
        PolynomialSchedule(0.5, 2.0): -1.0 * (1 + 0.7) ** -3,
        (lambda t: 0.3): 0.0,
        (lambda t: 0.3 if t < 0.5 else 0.4): 0.0,
        (lambda t: torch.sin(t).float()): math.cos(0.7),
        (lambda t: t.reshape(1) ** 2): 1.4,
    }
    for schedule, expected in cases.items():
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                value, rate = rate_at_time(schedule, TIME, like)
            assert float(rate.detach()) == pytest.approx(expected, rel=1e-6)
            assert value.shape == rate.shape == ()
            assert value.dtype == rate.dtype == torch.float64
            learnable = mode is torch.enable_grad and isinstance(schedule, nn.Module)
            assert value.requires_grad == learnable


@pytest.mark.parametrize(
    "schedule",
    [
        lambda t: 0.3 * t.item(),
        lambda t: 0.3 * t.detach() ** 2,
        lambda t: torch.tensor(math.sqrt(1 + t.item()), dtype=t.dtype),
    ],
    ids=["number", "detach", "tensor"],
)
def test_a_lost_rate_is_refused(schedule: Callable[[Tensor], Tensor | float]) -> None:
    """beta' would silently be 0."""
    flow = InertialHessianFlow(plain, damping=3.0, beta=schedule, gamma=1.0)
    for t in (0.0, 0.7, 1e6):
        with pytest.raises(ValueError, match="changes with t, but not as far as autograd can see"):
            flow(torch.tensor(t, dtype=torch.float64), (points(), points(seed=1)))
    # Where no derivative is taken it does no harm.
    HeavyBallFlow(plain, damping=schedule)(TIME, (points(), points(seed=1)))


def test_next_to_a_jump_a_piecewise_constant_schedule_is_constant() -> None:
    for t in (math.nextafter(1.0, 0.0), 1.0):
        time = torch.tensor(t, dtype=torch.float64)
        assert float(rate_at_time(lambda t: 0.5 if t < 1 else 0.3, time, time)[1]) == 0


def test_what_a_schedule_gives_is_looked_at() -> None:
    with pytest.raises(ValueError, match=r"one number; <lambda> gave shape \(2,\)"):
        at_time(lambda t: torch.ones(2), TIME, TIME)
    with pytest.raises(TypeError, match="0-d tensor; <lambda> gave NoneType"):
        at_time(lambda t: None, TIME, TIME)
    assert at_time(lambda t: torch.ones(1, 1), TIME, TIME).shape == ()
