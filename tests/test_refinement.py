"""Evidence for every leaf by itself: gradients on merged and on halved steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from variants import slow_after

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientAccuracyWarning,
    GradientFlow,
    GradientRoute,
    InterpolatingAdjoint,
    LossValue,
    Rosenbrock,
    StepAdjoint,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.gradients.chain import Arriving, Chain, pulled_back
from ode_stopping.gradients.refinement import refined
from ode_stopping.gradients.regridded import halved, merged
from ode_stopping.gradients.steps import Transpose
from theory_checks.closed_forms import CLOSED_FORMS

F64 = torch.float64
ROUTES = [
    StepAdjoint(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
    DirectAdjoint(),
    ForwardSensitivity(),
]
LEVELS = ["standard", "thorough"]


def tensor(value: Any, *, grad: bool = True) -> Tensor:
    return torch.tensor(value, dtype=F64, requires_grad=grad)


class Driven:
    """x_i' = -r_i (1 + a sin t) x_i, J = sum x_i^2; a jump of the flow at `jump`, if there is one.

    With E(t) = exp(-r (t + a (1 - cos t))) all is known; T by bisection.
    """

    def __init__(self, targets: list[float], *, jump: float | None = None) -> None:
        self.rates, self.share = tensor([1.0, 0.3, 0.05]), tensor(0.4)
        self.x0, self.targets = tensor([1.0, -2.0, 0.7]), tensor(targets)
        self.jump = jump

    def solve(self, rtol: float, route: GradientRoute, evidence: str, **options: Any) -> Any:
        jump = self.jump

        def flow(t: Tensor, x: Tensor) -> Tensor:
            factor = 2.0 if jump is not None and float(t.detach()) > jump else 1.0
            return -factor * self.rates * (1 + self.share * torch.sin(t)) * x

        return stopping_time(
            flow,
            self.x0,
            lambda t, x: (x * x).sum(),
            self.targets if len(self.targets) > 1 else self.targets[0],
            solver=Torchdiffeq(rtol=rtol),
            gradient=route,
            evidence=evidence,  # type: ignore[arg-type]
            breakpoints=None if jump is None else [jump],
            **options,
        )

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"x0": self.x0, "rates": self.rates, "share": self.share}

    def truth(self) -> dict[str, Tensor]:
        """dT/dleaf, summed over the targets."""
        rates, share, x0 = (p.detach() for p in (self.rates, self.share, self.x0))

        def clock(t: float) -> tuple[float, float, float]:
            """int (1 + a sin), its derivative to a, and the integrand, with the factor 2."""
            b = np.inf if self.jump is None else self.jump
            first, second = min(t, b), max(t - b, 0.0)
            by_share = (1 - np.cos(first)) + 2 * (np.cos(b) - np.cos(t) if second else 0.0)
            a = float(share)
            return (
                first + 2 * second + a * by_share,
                by_share,
                (2 if second else 1) * (1 + a * np.sin(t)),
            )

        total = {name: torch.zeros_like(leaf) for name, leaf in self.leaves.items()}
        for target in self.targets.tolist():
            low, high = 0.0, 500.0
            for _ in range(200):
                middle = 0.5 * (low + high)
                x = x0 * torch.exp(-rates * clock(middle)[0])
                low, high = (middle, high) if float(x @ x) > target else (low, middle)
            s, by_share, speed = clock(low)
            x = x0 * torch.exp(-rates * s)
            slope = -2 * float((rates * x * x).sum()) * speed
            total["x0"] += -2 * x * x / x0 / slope
            total["rates"] += 2 * x * x * s / slope
            total["share"] += 2 * (rates * x * x).sum() * by_share / slope
        return total


def errors_of(problem: Driven, result: StoppingResult) -> dict[str, float]:
    names, leaves = zip(*problem.leaves.items(), strict=True)
    found = torch.autograd.grad(result.time.sum(), leaves)
    truth = problem.truth()
    return {
        name: float((g - truth[name]).norm() / truth[name].norm())
        for name, g in zip(names, found, strict=True)
    }


def estimates_of(result: StoppingResult) -> dict[str, float]:
    evidence = result.evidence[0] if isinstance(result.evidence, list) else result.evidence
    assert evidence is not None
    return {leaf.name.split(".")[-1]: leaf.error for leaf in evidence.leaves}


every_case = pytest.mark.parametrize(
    ("targets", "jump"),
    [
        ([1e-3], None),
        ([1e-1, 1e-2, 7e-3, 1e-3], 4.0),
        pytest.param([1e-3], 2.0, marks=pytest.mark.slow),
        pytest.param([1e-1, 1e-2, 7e-3, 1e-3], None, marks=pytest.mark.slow),
    ],
    ids=str,
)


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize("rtol", slow_after(2, [1e-4, 1e-8, 1e-6]))
@every_case
def test_the_error_of_every_leaf(targets: list[float], jump: float | None, rtol: float) -> None:
    """The estimate of each is right within a factor of some, and the halved steps' is better."""
    light, standard = Driven(targets, jump=jump), Driven(targets, jump=jump)
    before = errors_of(light, light.solve(rtol, StepAdjoint(), "light"))
    result = standard.solve(rtol, StepAdjoint(), "standard")
    errors, estimates = errors_of(standard, result), estimates_of(result)
    assert set(estimates) >= set(errors)
    promise = 50 * rtol
    for name, error in errors.items():
        assert error <= 10 * estimates[name] + 1e-11
        assert error <= 1.5 * before[name] + 1e-11
        assert estimates[name] <= max(40 * before[name], 0.3 * promise)


@every_case
def test_orders_of_the_difference(targets: list[float], jump: float | None) -> None:
    """With a fifth-order method the merged steps have 32 times the error, the halved a 32nd."""
    problem = Driven(targets, jump=jump)
    solved = problem.solve(1e-7, StepAdjoint(), "light").problem
    hits = len(solved.hits)
    given = Arriving(
        torch.ones(hits, dtype=F64),
        torch.zeros(hits, 3, dtype=F64),
        None,
        (True,) * (2 + hits + len(solved.leaves.tensors)),
    )
    truth = problem.truth()["x0"]
    found = []
    chain = Chain.of(solved)
    for other in (merged(chain), chain, halved(chain)):
        assert other is not None
        with torch.no_grad():
            found.append(float((pulled_back(other, Transpose(), given).x0 - truth).norm()))
        for hit, old in zip(other.hits, solved.hits, strict=True):
            assert hit.point is not None
            assert hit.point.value == pytest.approx(hit.watch.target, rel=1e-9)
            assert hit.time == pytest.approx(old.time, rel=1e-4)
    assert 4 < found[0] / found[1] < 128
    assert 4 < found[1] / found[2] < 128


def test_the_grids() -> None:
    """Merged: every second node; halved: middles too; both keep breakpoints and the first step."""
    solved = Driven([1e-1, 1e-2, 1e-3], jump=2.0).solve(1e-6, StepAdjoint(), "light").problem
    old = [step.t0 for step in solved.steps]
    chains = merged(Chain.of(solved)), halved(Chain.of(solved))
    assert chains[0] is not None
    assert chains[1] is not None
    coarse, fine = (chain.problems[0] for chain in chains)
    assert {step.t0 for step in coarse.steps} <= set(old)
    assert len(coarse.steps) <= (len(old) + 1) // 2 + 2
    assert set(old) <= {step.t0 for step in fine.steps}
    assert len(fine.steps) == 2 * len(old)
    for problem in (coarse, fine):
        assert 2.0 in [step.t0 for step in problem.steps]
        assert all(a.t1 == b.t0 for a, b in zip(problem.steps, problem.steps[1:], strict=False))
        for hit in problem.hits[:-1]:
            start = problem.steps[hit.node]
            assert hit.steps[0].t0 == start.t0
            assert torch.equal(hit.steps[0].y0, start.y0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: type(route).__name__)
def test_every_route(route: GradientRoute, level: str) -> None:
    # Not far, for x comes back over it with BacksolveAdjoint.
    problem = Driven([2.0])
    result = problem.solve(1e-7, route, level)
    errors, estimates = errors_of(problem, result), estimates_of(result)
    assert all(error <= 10 * estimates[name] + 1e-11 for name, error in errors.items())
    assert result.evidence.passed
    assert result.evidence.refinement == max(estimates.values())


def test_the_gradient_of_the_halved_steps_is_returned() -> None:
    """x' = -a x (1 + sin(30 t)/2) at rtol 5e-4: dT/da is off by a tenth, in silence until here."""

    def solved(level: str) -> tuple[float, StoppingResult]:
        a = tensor(1.0)
        x0 = tensor(1.0, grad=False).reshape(1)
        # J at t = 4, where the clock t + (1 - cos 30 t)/60 is known.
        clock = 4.0 + (1 - np.cos(120.0)) / 60
        result = stopping_time(
            lambda t, x: -a * x * (1 + torch.sin(30 * t) / 2),
            x0,
            lambda t, x: x.sum(),
            float(np.exp(-clock)),
            solver=Torchdiffeq(rtol=5e-4),
            evidence=level,  # type: ignore[arg-type]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GradientAccuracyWarning)
            result.time.backward()
        truth = -clock / (1 + np.sin(120.0) / 2)
        assert a.grad is not None
        return abs(float(a.grad) - truth) / abs(truth), result

    light, _ = solved("light")
    standard, result = solved("standard")
    assert light > 0.01
    assert standard < 0.1 * light
    assert result.evidence is not None
    assert standard <= 10 * result.evidence.refinement
    thorough, _ = solved("thorough")
    assert thorough < 0.1 * light


def test_the_start_time_of_an_autonomous_flow_is_exact() -> None:
    """dT/dt0 = 1; -lam(t0)^T F(t0) gives -0.238 at rtol 1e-3, for lam is wrong by 10^5 there."""
    objective = Rosenbrock(dim=2)
    for route in (StepAdjoint(), InterpolatingAdjoint()):
        t0 = tensor(0.0)
        x0 = tensor([-1.2, 2.0], grad=False)
        result = stopping_time(
            GradientFlow(objective),
            x0,
            LossValue(objective),
            0.5,
            t0=t0,
            solver=Torchdiffeq(rtol=1e-3),
            gradient=route,
            evidence="light",
        )
        (gradient,) = torch.autograd.grad(result.time, t0)
        assert gradient.item() == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("jump", slow_after(1, [2.0, None]))
def test_the_start_time_of_a_driven_flow(jump: float | None) -> None:
    """From the end of the first smooth stretch; the truth is a difference of closed forms."""
    found = []
    for rtol in (1e-5, 1e-11):
        problem = Driven([1e-1, 1e-3], jump=jump)
        t0 = tensor(0.3)
        result = problem.solve(rtol, StepAdjoint(), "light", t0=t0)
        (gradient,) = torch.autograd.grad(result.time.sum(), t0)
        found.append(gradient.item())
    values = []
    for shift in (1e-5, -1e-5):
        problem = Driven([1e-1, 1e-3], jump=jump)
        result = problem.solve(1e-12, StepAdjoint(), "light", t0=tensor(0.3 + shift))
        values.append(result.time.sum().item())
    truth = (values[0] - values[1]) / 2e-5
    assert found[1] == pytest.approx(truth, rel=1e-7)
    assert found[0] == pytest.approx(truth, rel=5e-4)


def test_a_leaf_of_small_share_is_not_hidden() -> None:
    """Planted: the gradient of a leaf that contributes a millionth is off by 30 %."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(tensor(1.0, grad=False))
            self.ripple = nn.Parameter(tensor(1e-6, grad=False))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return -(self.rate + self.ripple * torch.sin(6 * t)) * x

    flow, x0 = Small(), tensor([1.0], grad=False)
    solver = Torchdiffeq(rtol=3e-3)
    result = stopping_time(flow, x0, lambda t, x: x.sum(), 1e-2, solver=solver, evidence="light")
    _, light = torch.autograd.grad(result.time, [flow.rate, flow.ripple])
    end = float(result.time.detach())
    truth = -(1 - np.cos(6 * end)) / 6
    assert abs(light.item() - truth) > 0.2 * abs(truth)
    assert result.evidence is not None
    assert result.evidence.passed  # every figure of the path is small

    result = stopping_time(flow, x0, lambda t, x: x.sum(), 1e-2, solver=solver, evidence="standard")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradients = torch.autograd.grad(result.time, [*flow.parameters()])
    assert result.evidence is not None
    errors = {leaf.name: leaf.error for leaf in result.evidence.leaves}
    error = abs(gradients[1].item() - truth) / abs(truth)
    assert error <= max(10 * errors["flow.ripple"], 0.1)
    if errors["flow.ripple"] > result.evidence.promise:
        assert "flow.ripple" in str(caught[-1].message)
    assert result.evidence.worst is not None
    assert result.evidence.worst.name == "flow.ripple"
    assert "flow.ripple" in repr(result.evidence)
    assert result.evidence.to_dict()["leaves"] == errors


def test_only_what_is_asked_for_is_listed() -> None:
    problem = Driven([1e-2])
    problem.x0.requires_grad_(False)
    problem.targets.requires_grad_(False)
    result = problem.solve(1e-6, StepAdjoint(), "standard")
    torch.autograd.grad(result.time, [problem.rates, problem.share])
    assert set(estimates_of(result)) == {"rates", "share"}


@pytest.mark.parametrize("blow", [merged, halved])
def test_a_path_that_is_lost_counts_as_infinite(
    blow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flow that refuses what is off its path: on merged steps that escalates, then it warns."""
    refuses: list[bool] = []
    rates = tensor([1.0, 0.2])

    def flow(t: Tensor, x: Tensor) -> Tensor:
        if refuses:
            raise ValueError("outside of my domain")
        return -rates * x

    result = stopping_time(
        flow,
        torch.ones(2, dtype=F64),
        lambda t, x: x.sum(),
        0.1,
        evidence="standard",
        solver=Torchdiffeq(rtol=1e-6),
    )
    problem = result.problem
    assert problem is not None
    chain = Chain.of(problem)
    given = Arriving(torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), None, (True,) * 4)
    with torch.no_grad():
        found = pulled_back(chain, StepAdjoint(), given)
    refuses.append(True)
    assert blow(chain) is None
    monkeypatch.setattr("ode_stopping.gradients.refinement.pulled_back", lambda *args: found)
    with torch.no_grad():
        assert refined(chain, StepAdjoint(), found, given).worst == np.inf


@pytest.mark.parametrize(
    ("method", "bound"), [("bosh3", 1e-4), ("fehlberg2", 1e-3), ("dopri8", 1e-4)]
)
def test_other_orders(method: str, bound: float) -> None:
    a = tensor([1.0, 0.1])
    x0 = tensor([1.0, 1.0], grad=False)
    result = stopping_time(
        lambda t, x: -a * x,
        x0,
        lambda t, x: x.prod(),
        1e-3,
        solver=Torchdiffeq(method, rtol=1e-5),
        evidence="standard",
    )
    (gradient,) = torch.autograd.grad(result.time, a)
    # x_1 x_2 = exp(-(a_1 + a_2) t)
    truth = -np.log(1e3) / 1.1**2
    error = float((gradient - truth).norm() / (abs(truth) * 2**0.5))
    assert result.evidence is not None
    assert error <= max(10 * result.evidence.refinement, 1e-9)
    assert error < bound


@pytest.mark.parametrize("case", range(len(CLOSED_FORMS)))
@pytest.mark.parametrize("rtol", [1e-5, 1e-8])
def test_closed_forms(case: int, rtol: float) -> None:
    form = CLOSED_FORMS[case]
    leaves = form.leaves(1e-3, 0.25)
    result = stopping_time(
        form.flow(leaves),
        leaves["x0"],
        form.criterion(leaves),
        leaves["eps"],
        t0=leaves["t0"],
        solver=Torchdiffeq(rtol=rtol),
        evidence="standard",
    )
    result.time.backward()
    _, errors = form.errors(result.time, leaves)
    assert result.evidence is not None
    assert max(errors.values()) <= max(10 * result.evidence.estimate, 1e-11)
    assert result.evidence.passed
