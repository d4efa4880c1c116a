"""`check_stopping_gradient`: what is right passes, what is wrong is found and named."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest
import torch
from rotated import RotatedQuadratic
from torch import Tensor, nn
from variants import slow_after

from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    ForwardSensitivity,
    GradientRoute,
    InterpolatingAdjoint,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.checking.check import check_stopping_gradient
from ode_stopping.checking.report import Finding, GradientReport
from ode_stopping.gradients import PullBack
from ode_stopping.gradients.problem import StoppingProblem
from theory_checks.closed_forms import CLOSED_FORMS, ClosedForm

EPS = 1e-1
FORMS = {case.name.partition("-")[0]: case for case in CLOSED_FORMS}


def number(value: float | list[float], *, grad: bool = True) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=grad)


def checked(
    case: ClosedForm, route: GradientRoute | None = None, rtol: float | None = None
) -> GradientReport:
    leaves = case.leaves(EPS, 0.25)
    atol = None if rtol is None else 0.1 * rtol * case.target_state(EPS)
    return check_stopping_gradient(
        case.flow(leaves),
        leaves["x0"],
        case.criterion(leaves),
        leaves["eps"],
        t0=leaves["t0"],
        max_time=1e5,
        solver=Torchdiffeq(rtol=rtol, atol=atol),
        gradient=route if route is not None else InterpolatingAdjoint(),
        directions=2 if rtol is None else 1,
    )


def half_square(t: Tensor, x: Tensor) -> Tensor:
    return 0.5 * x.square().sum()


@dataclass(frozen=True)
class Planted(InterpolatingAdjoint):
    """The default route with one of its results scaled: leaf `leaf`, or the start (leaf None)."""

    leaf: int | None = None
    factor: float = 1.01

    def pull_back(self, problem: StoppingProblem, cotangent: Tensor) -> PullBack:
        pulled = super().pull_back(problem, cotangent)
        if self.leaf is None:
            return replace(pulled, start=self.factor * pulled.start)
        leaves = list(pulled.leaves)
        leaves[self.leaf] = self.factor * leaves[self.leaf]
        return replace(pulled, leaves=leaves)


# What is right passes.


@pytest.mark.parametrize("rtol", [None, 1e-9])
@pytest.mark.parametrize("case", slow_after(3, CLOSED_FORMS), ids=lambda case: case.name)
def test_closed_forms_pass(case: ClosedForm, rtol: float | None) -> None:
    report = checked(case, rtol=rtol)
    assert report.passed, report
    assert report.kinks == ()
    # Every row of every road was judged.
    assert all(finding.passed for finding in report.findings), report
    assert set(report.subjects) >= {"x0", "target", "t0"}


@pytest.mark.parametrize(
    "route", [DirectAdjoint(), ForwardSensitivity(), BacksolveAdjoint()], ids=str
)
def test_every_route_passes(route: GradientRoute) -> None:
    report = checked(FORMS["form3"], route)
    assert report.passed, report


def test_references_are_those_of_the_closed_form() -> None:
    """The figures that the route is held against are right themselves, far beyond its promise."""
    case = FORMS["form3"]
    report = checked(case)
    values = case.values(EPS, 0.25)
    answer = case.answer(values)
    for finding in report.findings:
        if finding.road not in ("finite differences", "forward sensitivity"):
            continue
        name = {"target": "eps"}.get(finding.subject, finding.subject.strip("v['] "))
        size = abs(float(torch.as_tensor(values[name])))
        truth = size * float(torch.as_tensor(answer[name]))
        assert finding.reference == pytest.approx(truth, rel=1e-7), finding


def test_stiff_rotated_quadratic_passes() -> None:
    problem = RotatedQuadratic(100.0, dim=10)
    leaves, (q, _, _) = problem.leaves(), problem.data()
    report = check_stopping_gradient(
        lambda t, x: -leaves["speed"] * leaves["p"] * (q @ x),
        leaves["x0"].detach(),
        lambda t, x: (q @ x).square().sum(),
        0.1,
        directions=1,
    )
    assert report.passed, report


def test_tuples_modules_and_an_unused_parameter() -> None:
    class Oscillator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stiffness = nn.Parameter(number([1.0, 2.2], grad=False))
            self.damping = nn.Parameter(number(2.5, grad=False))
            self.unused = nn.Parameter(number(1.0, grad=False))

        def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            x, v = state
            return v, -self.stiffness * x - self.damping * (1 + 0.1 * torch.sin(t)) * v

    flow = Oscillator()
    state = number([1.0, -0.6]), number([0.0, 0.0])
    report = check_stopping_gradient(
        flow, state, lambda t, s: s[0].square().sum(), 0.7, t0=0.5, directions=1
    )
    assert report.passed, report
    names = {"x0[0]", "x0[1]", "flow.stiffness", "flow.damping", "flow.unused"}
    assert set(report.subjects) == names
    unused = [f for f in report.findings if f.subject == "flow.unused"]
    assert all(f.gradient == f.reference == 0 for f in unused)
    assert not any(f.subject == "lam^T x' = -1" for f in report.findings)  # not autonomous


def test_float32() -> None:
    weight = torch.tensor([1.0, 3.0], requires_grad=True)
    x0 = torch.tensor([1.0, -0.5], requires_grad=True)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -weight * x - x**3

    for route, passed in ((InterpolatingAdjoint(), True), (Planted(leaf=0), False)):
        report = check_stopping_gradient(
            flow, x0, half_square, EPS, solver=Torchdiffeq(rtol=1e-5), gradient=route, directions=1
        )
        assert report.passed is passed, report
        assert report.wrong == (() if passed else ("weight",))


def test_leaf_behind_older_graph_is_judged_by_sensitivity() -> None:
    base = number([0.3, 0.2])
    made = torch.exp(base)  # moving `base` in place would not move this
    report = check_stopping_gradient(
        lambda t, x: -made * x, number([1.0, 0.5], grad=False), half_square, 1e-2
    )
    assert report.passed, report
    verdicts = {f.road: f.passed for f in report.findings if f.direction == 0}
    assert verdicts["finite differences"] is None
    assert verdicts["forward sensitivity"] is True
    named = check_stopping_gradient(
        lambda t, x: -made * x,
        number([1.0, 0.5], grad=False),
        half_square,
        1e-2,
        params=[made],
    )
    assert named.passed, named
    assert named.subjects == ("made",)
    assert all(finding.passed for finding in named.findings)


def test_breakpoints_are_passed_on() -> None:
    theta = number([1.0, 0.4])

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -(theta[0] if t < 0.5 else theta[1]) * x * torch.exp(-0.1 * t)

    report = check_stopping_gradient(
        flow,
        number([2.0], grad=False),
        half_square,
        0.3,
        t0=number(0.1),
        breakpoints=[0.5],
        gradient=ForwardSensitivity(),
        directions=1,
    )
    assert report.passed, report
    # The jump at 0.5 is a point mass in the clock's column.
    (row,) = (f for f in report.findings if f.subject == "dT/dt0 two ways")
    assert row.passed


def test_a_start_that_the_flow_also_uses_is_two_subjects() -> None:
    x0 = number([1.0, 0.5])
    report = check_stopping_gradient(
        lambda t, x: -x, x0, lambda t, x: (x / x0).square().sum(), 0.4, directions=1
    )
    assert report.passed, report
    assert report.subjects == ("x0", "x0 (leaf 0)")


# What is wrong is found, and named.


@pytest.mark.parametrize(
    ("leaf", "factor"), [(1, 1.001), (0, -1.0), pytest.param(0, 1.01, marks=pytest.mark.slow)]
)
def test_planted_error_in_one_leaf(leaf: int, factor: float) -> None:
    leaves = {"slow": number([1.0, 0.7]), "fast": number(1.9)}

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -leaves["slow"] * x - leaves["fast"] * x**3 * torch.exp(-t)

    x0 = number([1.2, -0.8], grad=False)
    found = stopping_time(flow, x0, half_square, 0.4).problem
    assert found is not None
    (name,) = (n for n, tensor in leaves.items() if tensor is found.leaves.tensors[leaf])
    route = Planted(leaf=leaf, factor=factor)
    report = check_stopping_gradient(flow, x0, half_square, 0.4, gradient=route, directions=1)
    assert not report.passed
    assert report.wrong == (f"leaves['{name}']",)
    roads = {f.road for f in report.findings if f.passed is False}
    assert roads == {"finite differences", "forward sensitivity"}


@pytest.mark.parametrize("error", slow_after(2, [0.001, -0.03, -0.003, 0.01, 0.1]))
def test_verdict_and_order_of_planted_errors(error: float) -> None:
    slow, fast = number([1.0, 0.7]), number(1.9)
    x0 = number([1.2, -0.8], grad=False)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -slow * x - fast * x**3 * torch.exp(-t)

    found = stopping_time(flow, x0, half_square, 0.4).problem
    assert found is not None
    wrong = "slow" if found.leaves.tensors[0] is slow else "fast"
    route = Planted(leaf=0, factor=1 + error)
    report = check_stopping_gradient(flow, x0, half_square, 0.4, gradient=route, directions=1)
    assert report.verdict == "wrong"
    other = {"slow": "fast", "fast": "slow"}[wrong]
    assert report.verdicts == {wrong: "wrong", other: "right"}
    orders = {f.subject: f.order for f in report.findings if f.road == "finite differences"}
    assert orders[wrong] == pytest.approx(1.0, abs=0.15)
    assert orders[other] == pytest.approx(2.0, abs=0.1)


def test_planted_error_in_the_start() -> None:
    report = checked(FORMS["form3"], Planted(factor=1.01))
    assert not report.passed
    # t0 has its value from the crossing, where nothing is planted.
    assert set(report.wrong) == {"x0", "dT/dt0 two ways"}


def test_a_route_that_refuses_has_failed() -> None:
    problem = RotatedQuadratic(100.0, dim=5)
    leaves, (q, _, _) = problem.leaves(), problem.data()
    report = check_stopping_gradient(
        lambda t, x: -leaves["speed"] * leaves["p"] * (q @ x),
        leaves["x0"],
        lambda t, x: (q @ x).square().sum(),
        1e-3,
        gradient=BacksolveAdjoint(),
    )
    assert not report.passed
    assert report.verdict == "wrong"
    assert report.error.startswith("BacksolveMismatchError: ")
    assert report.time == pytest.approx(float(problem.truth(1e-3)["T"]), rel=1e-5)
    assert "BacksolveMismatchError" in repr(report)


def test_nothing_judged_is_not_passed() -> None:
    report = GradientReport("T", "InterpolatingAdjoint", 1.0, -1.0, (), ("theta",))
    assert report.unjudged == ("theta",)
    assert not report.passed
    assert report.verdict == "noise"


def test_one_direction_that_no_road_judged_is_noise() -> None:
    """Another direction, along which the error may be small, does not speak for it."""
    row = Finding("theta", "finite differences", 1.0, 1.0, 0.0, 1e-5, True, direction=0)
    doubt = replace(row, passed=None, direction=1)
    other = replace(doubt, road="forward sensitivity", passed=True)
    report = GradientReport("T", "InterpolatingAdjoint", 1.0, -1.0, (row, doubt), ("theta",))
    assert report.verdicts == {"theta": "noise"}
    assert replace(report, findings=(row, doubt, other)).verdict == "right"
    # A second run of the same route is no judge.
    again = replace(row, road="tenth of the tolerance")
    assert replace(report, findings=(doubt, again)).verdict == "noise"


# Nothing is left behind.


@pytest.mark.parametrize("stops", [False, True])
def test_parameters_are_put_back_exactly(stops: bool) -> None:
    theta, x0, eps = number([1.1, 0.7]), number([1.0, -0.4]), number(EPS)
    before = theta.detach().clone()
    version, storage = theta._version, theta.data_ptr()

    def flow(t: Tensor, x: Tensor) -> Tensor:
        # Not at the much smaller perturbation by which `stopping_time` looks at derivatives.
        if stops and float((theta.detach() - before).abs().max()) > 1e-3:
            raise KeyboardInterrupt
        return -theta * x

    if stops:
        with pytest.raises(KeyboardInterrupt):
            check_stopping_gradient(flow, x0, half_square, eps)
    else:
        assert check_stopping_gradient(flow, x0, half_square, eps).passed
    assert torch.equal(theta.detach(), before)
    assert theta._version == version
    assert theta.data_ptr() == storage
    assert theta.grad is None
    assert x0.grad is None
    assert eps.grad is None


def test_seed_decides_the_directions() -> None:
    def figures(seed: int) -> list[float]:
        theta = number([1.1, 0.7])
        report = check_stopping_gradient(
            lambda t, x: -theta * x,
            number([1.0, 0.5], grad=False),
            half_square,
            0.5,
            directions=1,
            seed=seed,
        )
        return [f.gradient for f in report.findings]

    torch.manual_seed(1)
    first = figures(0)
    torch.manual_seed(2)
    assert figures(0) == first
    assert figures(1) != first


# The report.


def test_report_is_a_table_and_a_dictionary() -> None:
    report = checked(FORMS["form6"])
    lines = repr(report).splitlines()
    assert lines[0] == "GradientReport of T by InterpolatingAdjoint: passed"
    assert "T = 1.1179" in lines[1]
    assert "J'(T) = -0.34" in lines[1]
    heads = ["subject", "road", "gradient", "reference", "difference", "allowed", "order"]
    heads.append("verdict")
    assert lines[2].split() == heads
    assert len(lines) == 3 + len(report.findings)
    assert lines[3].startswith("  x0")
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["passed"] is True
    assert plain["verdict"] == "right"
    assert set(plain["verdicts"].values()) == {"right"}
    assert plain["subjects"] == ["x0", "target", "t0", "v['a']"]
    assert plain["findings"][0]["road"] == "finite differences"
    assert plain["solves"] > 20


def test_table_shows_the_worst_direction() -> None:
    theta = number([1.1, 0.7, 0.9])
    report = check_stopping_gradient(
        lambda t, x: -theta * x,
        number([1.0, 0.5, 0.3], grad=False),
        half_square,
        0.5,
        gradient=Planted(leaf=0),
    )
    (line,) = (x for x in repr(report).splitlines() if "theta (worst of 3)  finite" in x)
    rows = [f for f in report.findings if f.road == "finite differences"]
    assert [row.direction for row in rows] == [0, 1, 2]
    assert f"{max(row.difference for row in rows):.1e}" in line
    assert "WRONG" in line


# Bad input.


@pytest.mark.parametrize(
    ("target", "options", "status"),
    [
        (3.0, {}, "AT_START"),
        (1e-4, {"max_time": 1.0}, "NOT_REACHED"),
        (1e-30, {"solver": Torchdiffeq(max_steps=3)}, "STALLED"),
    ],
)
def test_no_crossing_no_check(target: float, options: dict[str, object], status: str) -> None:
    theta = number(1.0)
    with pytest.raises(ValueError, match=f"no gradient to check: {status}"):
        check_stopping_gradient(
            lambda t, x: -theta * x,
            number([2.0]),
            half_square,
            target,
            **options,  # type: ignore[arg-type]
        )


def test_degenerate_crossing_is_named() -> None:
    def touching(t: Tensor, x: Tensor) -> Tensor:
        return (x[0] - 1).square()

    with pytest.raises(ValueError, match=r"no gradient to check: (DEGENERATE|NOT_REACHED)"):
        check_stopping_gradient(
            lambda t, x: torch.ones_like(x), number([0.0]), touching, 0.0, max_time=3.0
        )


def test_bad_arguments() -> None:
    def check(**options: object) -> GradientReport:
        return check_stopping_gradient(
            lambda t, x: -x,
            number([1.0], grad=False),
            half_square,
            EPS,
            **options,  # type: ignore[arg-type]
        )

    with pytest.raises(ValueError, match="nothing that T depends on requires grad"):
        check()
    with pytest.raises(TypeError, match="gradient must be a route"):
        check(gradient=None)
    with pytest.raises(ValueError, match="directions must be at least 1; got 0"):
        check(directions=0)
    with pytest.raises(TypeError, match="directions must be an int"):
        check(directions=1.5)
