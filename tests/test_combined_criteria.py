"""AnyOf and AllOf, by the closed forms of their members.

On x_i' = -theta_i x_i with J_i = x_i^2/2 every member has a stopping time of its own,

    T_i = log(x_i0^2 / (2 eps_i)) / (2 theta_i),

and the combination's is the least or the largest of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from discrete import Euler, check_index_gradient, stopping_index
from ode_stopping import (
    AllOf,
    AnyOf,
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    LossValue,
    Quadratic,
    Status,
    check_stopping_gradient,
    stopping_time,
)

F64 = torch.float64
NOW = torch.tensor(0.0, dtype=F64)
# x0, theta, eps, and the members that decide: (AnyOf, AllOf) at the start, (AnyOf, AllOf) at T.
# Ratios J_i/eps_i at the start: 10 and 100 with times 2.30 and 1.15 (both change over on the way);
# 100 and 10 with 2.30 and 1.15 (neither does).
CASES = {
    "switching": ((2.0, 1.0), (0.5, 2.0), (0.2, 0.005), (0, 1), (1, 0)),
    "steady": ((1.0, 2.0), (1.0, 1.0), (0.005, 0.2), (1, 0), (1, 0)),
}
every_case = pytest.mark.parametrize("case", CASES)
STEP = 0.05


class Swapped(AnyOf):
    """The planted error: the largest instead of the least."""

    _decide = AllOf._decide


class SwappedAll(AllOf):
    """The planted error: the least instead of the largest."""

    _decide = AnyOf._decide


class Decay(nn.Module):
    """x_i' = -theta_i x_i."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = theta

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -self.theta * x


def half_square(i: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: 0.5 * x[..., i].square()


def leaf(value: float | tuple[float, ...]) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=True)


class Setting:
    """A case of CASES with its leaves, and what is known of it in closed form."""

    def __init__(self, case: str, kind: type[AnyOf | AllOf], expected: type[AnyOf | AllOf]) -> None:
        x0, theta, eps, first, last = CASES[case]
        side = 0 if expected is AnyOf else 1
        self.first, self.last = first[side], last[side]
        self.x0, self.theta, self.eps = leaf(x0), leaf(theta), [leaf(e) for e in eps]
        self.numbers = list(zip(x0, theta, eps, strict=True))
        self.criterion = kind(half_square(0), half_square(1), targets=self.eps)
        self.flow = Decay(self.theta)
        ratios = [0.5 * x * x / e for x, e in zip(x0, eps, strict=True)]
        self.logs = [math.log(ratio) for ratio in ratios]

    def times(self) -> list[float]:
        return [log / (2 * rate) for log, (_, rate, _) in zip(self.logs, self.numbers, strict=True)]

    def expect(self, value: Tensor, by: dict[str, float]) -> None:
        """The value's gradients are those given for the deciding member, and 0 for the other."""
        value.backward()
        i, other = self.last, 1 - self.last
        for name, tensor in (("theta", self.theta), ("x0", self.x0)):
            assert tensor.grad is not None
            assert float(tensor.grad[i]) == pytest.approx(by[name], rel=2e-6)
            assert abs(float(tensor.grad[other])) < 1e-12
        active, inactive = self.eps[i].grad, self.eps[other].grad
        assert active is not None
        assert float(active) == pytest.approx(by["eps"], rel=2e-6)
        assert inactive is not None
        assert float(inactive) == 0.0

    def derivatives(self, time: float) -> dict[str, float]:
        """Of T_i."""
        x, rate, eps = self.numbers[self.last]
        return {"theta": -time / rate, "x0": 1 / (rate * x), "eps": -1 / (2 * rate * eps)}


def check_time(
    case: str,
    kind: type[AnyOf | AllOf],
    expected: type[AnyOf | AllOf],
    route: GradientRoute | None = None,
) -> None:
    setting = Setting(case, kind, expected)
    times = setting.times()
    time = min(times) if expected is AnyOf else max(times)
    result = stopping_time(
        setting.flow,
        setting.x0,
        setting.criterion,
        1.0,
        gradient=InterpolatingAdjoint() if route is None else route,
    )
    assert result.status is Status.REACHED
    assert float(result.time.detach()) == pytest.approx(time, rel=1e-6)
    assert setting.criterion.active(NOW, setting.x0) == setting.first
    assert setting.criterion.active(result.time, result.state) == setting.last
    setting.expect(result.time, setting.derivatives(time))


def check_index(case: str, kind: type[AnyOf | AllOf], expected: type[AnyOf | AllOf]) -> None:
    """x_k = (1 - h theta)^k x_0, so N* = log(J_0/eps) / (-2 log(1 - h theta)) for one member."""
    setting = Setting(case, kind, expected)
    h = STEP
    rates = [-2 * math.log1p(-h * rate) for _, rate, _ in setting.numbers]
    indices = [log / rate for log, rate in zip(setting.logs, rates, strict=True)]
    steps = min(indices) if expected is AnyOf else max(indices)
    result = stopping_index(
        Euler(setting.flow, step=h), setting.x0, setting.criterion, 1.0, interpolation="log"
    )
    assert result.index == math.ceil(steps)
    assert float(result.steps.detach()) == pytest.approx(steps, rel=1e-12)
    i = setting.last
    x, theta, eps = setting.numbers[i]
    slopes = {
        "theta": -steps / rates[i] * 2 * h / (1 - h * theta),
        "x0": 2 / (x * rates[i]),
        "eps": -1 / (eps * rates[i]),
    }
    setting.expect(result.steps, slopes)


# --- closed forms -------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("kind", [AnyOf, AllOf])
def test_stopping_time_is_that_of_the_deciding_member(case: str, kind: type[AnyOf | AllOf]) -> None:
    check_time(case, kind, kind)


@pytest.mark.parametrize(
    "route", [DirectAdjoint(), ForwardSensitivity(), BacksolveAdjoint()], ids=lambda r: str(r)[:8]
)
@pytest.mark.parametrize("kind", [AnyOf, AllOf])
def test_every_route(route: GradientRoute, kind: type[AnyOf | AllOf]) -> None:
    check_time("switching", kind, kind, route)


@every_case
@pytest.mark.parametrize("kind", [AnyOf, AllOf])
def test_stopping_index_is_that_of_the_deciding_member(
    case: str, kind: type[AnyOf | AllOf]
) -> None:
    check_index(case, kind, kind)


@every_case
@pytest.mark.parametrize(("kind", "expected"), [(Swapped, AnyOf), (SwappedAll, AllOf)])
@pytest.mark.parametrize("check", [check_time, check_index])
def test_swapping_least_and_largest_is_caught(
    check: Callable[..., None],
    kind: type[AnyOf | AllOf],
    expected: type[AnyOf | AllOf],
    case: str,
) -> None:
    with pytest.raises(AssertionError):
        check(case, kind, expected)


@pytest.mark.parametrize("kind", [AnyOf, AllOf])
def test_gradient_checks_pass(kind: type[AnyOf | AllOf]) -> None:
    setting = Setting("switching", kind, kind)
    args = (setting.x0, setting.criterion, 1.0)
    report = check_stopping_gradient(setting.flow, *args, directions=2)
    assert report.passed, report
    assert {"flow.theta", "criterion.target0", "criterion.target1"} <= set(report.subjects)
    report = check_index_gradient(Euler(setting.flow, step=STEP), *args, directions=2)
    assert report.passed, report


@pytest.mark.parametrize("kind", [AnyOf, AllOf])
def test_definition_3(kind: type[AnyOf | AllOf]) -> None:
    """N by Definition 3: dN/deps_i = -dJ/deps_i / (J_N - J_{N-1}) of the deciding member."""
    setting = Setting("switching", kind, kind)
    result = stopping_index(Euler(setting.flow, step=STEP), setting.x0, setting.criterion, 1.0)
    i = setting.last
    _, theta, eps = setting.numbers[i]
    shrink = (1 - STEP * theta) ** 2
    ratios = [math.exp(setting.logs[i]) * shrink**k for k in range(result.index + 1)]
    assert float(result.trajectory.losses[-1]) == pytest.approx(ratios[-1], rel=1e-12)
    result.steps.backward()
    # J = J_i/eps_i, so dJ/deps_i = -J/eps_i.
    expected = ratios[-1] / eps / (ratios[-1] - ratios[-2])
    assert setting.eps[i].grad is not None
    assert float(setting.eps[i].grad) == pytest.approx(expected, rel=1e-10)


def test_all_have_to_hold_at_once() -> None:
    """x = t: 2 + cos x <= 1.5 on [2pi/3, 4pi/3] and from 8pi/3 on, 10 - x <= 5 from x = 5 on."""
    members = (lambda t, x: 2 + x.cos(), lambda t, x: 10 - x)
    times = {}
    for kind in (AnyOf, AllOf):
        result = stopping_time(
            lambda t, x: torch.ones_like(x),
            torch.tensor(0.0, dtype=F64),
            kind(*members, targets=[1.5, 5.0]),
            1.0,
        )
        times[kind] = float(result.time)
    assert times[AnyOf] == pytest.approx(2 * math.pi / 3, rel=1e-6)
    assert times[AllOf] == pytest.approx(8 * math.pi / 3, rel=1e-6)


def test_nesting() -> None:
    """Times 2.30 and 1.15: min(max(2.30, 1.15), 1.9) = 1.9; with 2.5 it is 2.30."""
    setting = Setting("switching", AllOf, AllOf)
    both = max(setting.times())
    for clock, time, decides in ((1.9, 1.9, 1), (2.5, both, 0)):
        criterion = AnyOf(setting.criterion, lambda t, x, c=clock: c + 1 - t, targets=[1.0, 1.0])
        result = stopping_time(setting.flow, setting.x0, criterion, 1.0)
        assert float(result.time.detach()) == pytest.approx(time, rel=1e-6)
        assert criterion.active(result.time, result.state) == decides
    setting.expect(result.time, setting.derivatives(both))


def test_a_single_member_is_that_member_in_units_of_its_target() -> None:
    objective, x0 = Quadratic(torch.tensor([1.0, 3.0], dtype=F64)), leaf((1.0, 0.5))
    plain = stopping_time(Decay(leaf((0.3, 0.7))), x0, LossValue(objective), 0.01)
    (expected,) = torch.autograd.grad(plain.time, x0)
    for kind in (AnyOf, AllOf):
        criterion = kind(LossValue(objective), targets=[0.01])
        result = stopping_time(Decay(leaf((0.3, 0.7))), x0, criterion, 1.0)
        assert float(result.time.detach()) == pytest.approx(float(plain.time.detach()), rel=1e-7)
        (slope,) = torch.autograd.grad(result.time, x0)
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=0)


# --- values -------------------------------------------------------------------------------------


def test_values_on_batches() -> None:
    x = torch.tensor([[2.0, 1.0], [0.1, 5.0], [3.0, 0.0]], dtype=F64)
    members, targets = (half_square(0), half_square(1)), [0.2, 0.005]
    ratios = torch.stack([m(NOW, x) / e for m, e in zip(members, targets, strict=True)])
    assert torch.equal(AnyOf(*members, targets=targets)(NOW, x), ratios.amin(0))
    assert torch.equal(AllOf(*members, targets=targets)(NOW, x), ratios.amax(0))
    # A member without samples counts for each of them.
    clock = AnyOf(members[0], lambda t, x: 9.0 - t, targets=[0.2, 1.0])
    assert clock(NOW, x).tolist() == pytest.approx([9.0, 0.025, 9.0], rel=1e-14)
    with pytest.raises(ValueError, match=r"active needs one state, got samples of shape \(3,\)"):
        clock.active(NOW, x)
    assert [clock.active(NOW, row) for row in x] == [1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_j_is_at_most_one_exactly_where_a_member_meets_its_target(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(200, generator=generator, dtype=F64) * 60 - 30
    x = torch.zeros((), dtype=dtype)
    for eps in spread.exp().to(dtype):
        up, down = eps.new_tensor(math.inf), eps.new_tensor(0.0)
        for value in (eps.nextafter(down), eps, eps.nextafter(up)):
            criterion = AnyOf(lambda t, x, v=value: v, targets=[eps])
            assert bool(criterion(NOW, x) <= 1.0) is bool(value <= eps)


def test_low_precision_is_kept_beside_a_float64_target() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(2, dtype=dtype)
        criterion = AllOf(half_square(0), half_square(1), targets=[0.1, leaf(0.2)])
        assert criterion(NOW, x).dtype == dtype
        assert criterion(NOW, x.expand(3, 2)).dtype == dtype
    criterion = AllOf(half_square(0), half_square(1), targets=[0.1, leaf(0.2)])
    flow = Decay(torch.tensor([0.5, 2.0], requires_grad=True))
    result = stopping_time(flow, torch.ones(2), criterion, 1.0)
    assert float(result.time.detach()) == pytest.approx(math.log(5.0), rel=1e-3)


def test_nan_is_not_hidden() -> None:
    for kind in (AnyOf, AllOf):
        for order in ((0, 1), (1, 0)):
            members = [half_square(0), lambda t, x: x[1] * math.nan]
            criterion = kind(*[members[i] for i in order], targets=[1.0, 1.0])
            assert math.isnan(float(criterion(NOW, torch.ones(2, dtype=F64))))
