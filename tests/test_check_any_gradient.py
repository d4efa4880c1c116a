"""`check_gradient`: planted cases have the verdict that they were made for; bad input by name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from planted import Rounded, cases, cosines, scaled_gradient
from torch import Tensor, nn
from torchdiffeq import odeint_adjoint

from ode_stopping import GradientReport, StepAdjoint, check_gradient, stopping_time


def number(value: float | list[float], *, grad: bool = True) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=grad)


def rounded_to(unit: float, f: Callable[[], Tensor]) -> Tensor:
    value: Tensor = Rounded.apply(f(), unit)
    return value


# Planted cases.


@pytest.mark.slow
def test_a_thousand_planted_cases() -> None:
    """No wrong gradient is called right, and none but those in noise is left undecided."""
    for case in cases(1000, first=1000):
        verdict = check_gradient(case.f, case.params).verdict
        assert verdict in ({"noise", "right"} if case.kind == "noise" else {case.kind}), case.note


def test_planted_cases() -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for case in cases(60):
        report = check_gradient(case.f, case.params)
        counts[case.kind, report.verdict] += 1
        # Rounding leaves some right gradients to be seen, and never makes one wrong.
        expected = {"noise": ("noise", "right")}.get(case.kind, (case.kind,))
        assert report.verdict in expected, (case.note, report)
        assert report.passed is (report.verdict in ("right", "kink"))
    assert counts["right", "right"] == counts["wrong", "wrong"] == 20
    assert counts["kink", "kink"] == 10
    assert counts["noise", "noise"] >= 7


@pytest.mark.parametrize("unit", [1e-8, 1e-6, 1e-4])
def test_no_wrong_gradient_passes_in_noise(unit: float) -> None:
    for case in cases(60, first=120):
        at = abs(float(case.f().detach()))
        rounded = partial(rounded_to, unit * at, case.f)
        verdict = check_gradient(rounded, case.params).verdict
        if case.kind == "wrong":
            assert verdict in ("wrong", "noise"), case.note
        else:
            assert verdict != "wrong", case.note


def test_only_the_leaf_with_the_error_is_wrong() -> None:
    a, b = number([0.3, -1.2, 0.8]), number([1.1, 0.4, -0.7])
    report = check_gradient(lambda: cosines(a, scaled_gradient(b, 1.001)), [a, b])
    assert report.verdicts == {"a": "right", "b": "wrong"}
    orders = {
        name: [f.order for f in report.findings if f.subject == name] for name in report.subjects
    }
    right, wrong = orders.values()
    assert all(order == pytest.approx(2.0, abs=0.1) for order in right)
    assert min(order for order in wrong if order is not None) == pytest.approx(1.0, abs=0.1)


def test_kink_has_order_one_and_two_slopes() -> None:
    """|p| - |p|/2 for p < 0: slopes -1/2 and 1, and autograd's gradient is one between."""
    p = number(0.0)
    report = check_gradient(lambda: torch.where(p > 0, p, -0.5 * p) + p**2, [p])
    assert report.verdict == "kink"
    (row,) = report.findings
    assert row.sides == pytest.approx((-0.5, 1.0), abs=1e-6)
    assert row.order == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("detached", ["altogether", "in part"])
def test_a_lost_derivative_is_wrong(detached: str) -> None:
    p, q = number([0.4, 1.3]), number(0.7)

    def f() -> Tensor:
        left = p.detach() if detached == "altogether" else p
        return (left * p.detach() * q.detach()).square().sum()

    report = check_gradient(f, [p, q])
    assert report.verdict == "wrong"
    assert len(report.wrong) == 2
    assert len(report.warnings) == (detached == "altogether")


def test_randomness_is_noise() -> None:
    p = number([0.4, 1.3, -0.2])
    report = check_gradient(lambda: (p * (1 + 1e-3 * torch.rand(3))).square().sum(), [p])
    assert report.verdict == "noise"
    assert not report.passed


# Any function.


def test_function_of_its_parameters() -> None:
    a, b = number([0.3, -1.2]), number([1.1, 0.4])
    assert check_gradient(cosines, [a, b]).verdict == "right"
    wrong = check_gradient(lambda x, y: cosines(x, scaled_gradient(y, 1.01)), [a, b])
    assert wrong.wrong == ("params[1]",)
    # Arguments are copies, whose gradient f may take inside.
    inner = check_gradient(
        lambda x: torch.autograd.grad(x.square().square().sum(), x, create_graph=True)[0].sum(), [a]
    )
    assert inner.verdict == "right"
    assert a.grad is None


@pytest.mark.parametrize("factor", [1.0, 1.02])
def test_float32_module(factor: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))
    inputs = torch.randn(20, 3)
    before = [p.detach().clone() for p in net.parameters()]

    def f() -> Tensor:
        hidden = torch.tanh(nn.functional.linear(inputs, net[0].weight, net[0].bias))
        weight = scaled_gradient(net[2].weight, factor)
        return nn.functional.linear(hidden, weight).square().mean()

    report = check_gradient(f, net.parameters())
    assert report.verdict == ("right" if factor == 1 else "wrong"), report
    assert [n for n in report.wrong if "2.weight" in n] == list(report.wrong)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_stopping_time_as_any_function() -> None:
    rate = number([1.0, 0.6])

    def f() -> Tensor:
        x0 = number([1.0, 2.0], grad=False)
        return stopping_time(
            lambda t, x: -rate * x, x0, lambda t, x: x.square().sum(), 0.1, gradient=StepAdjoint()
        ).time

    report = check_gradient(f, [rate], directions=1)
    assert report.verdict == "right", report
    assert report.subjects == ("rate",)


@pytest.mark.parametrize(
    ("rtol", "verdict"), [(1e-3, "wrong"), pytest.param(1e-8, "right", marks=pytest.mark.slow)]
)
def test_adjoint_of_another_library(rtol: float, verdict: str) -> None:
    """torchdiffeq's backward solve: at a loose tolerance it is off by about a percent."""
    weight = nn.Parameter(number([-0.5, 1.0, -1.0, -0.3], grad=False).reshape(2, 2))
    x0 = number([1.0, 0.5])

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(self.weight @ x)

    flow, times = Flow(), number([0.0, 2.0], grad=False)

    def f() -> Tensor:
        states: Tensor = odeint_adjoint(flow, x0, times, rtol=rtol, atol=rtol)
        return states[-1].square().sum()

    report = check_gradient(f, [weight, x0], directions=1)
    assert report.verdict == verdict, report
    assert report.warnings == ()


def test_a_tensor_that_cannot_be_moved_is_not_judged() -> None:
    p, unused = number(0.4), number(1.0)
    report = check_gradient(lambda: p.square(), [p, unused])
    assert report.verdict == "noise"
    (name,) = report.unjudged
    (row,) = (f for f in report.findings if f.subject == name)
    assert "or not at all" in row.note


def test_interrupt_leaves_everything_as_it_was() -> None:
    p = number([1.0, 2.0])
    before, version = p.detach().clone(), p._version

    def f() -> Tensor:
        if not torch.equal(p.detach(), before):
            raise KeyboardInterrupt
        return p.square().sum()

    with pytest.raises(KeyboardInterrupt):
        check_gradient(f, [p])
    assert torch.equal(p.detach(), before)
    assert p._version == version


def test_report_of_a_function() -> None:
    p = number([1.0, 2.0])
    report = check_gradient(lambda: p.square().sum(), [p])
    lines = repr(report).splitlines()
    assert lines[0] == "GradientReport of f by autograd: passed"
    assert lines[1].startswith("  f = 5, ")
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["verdict"] == "right"
    assert set(plain["verdicts"].values()) == {"right"}


def test_seed_decides_the_directions() -> None:
    p = number([1.0, 2.0])

    def figures(seed: int) -> list[float]:
        return [f.gradient for f in check_gradient(lambda: p.sin().sum(), [p], seed=seed).findings]

    torch.manual_seed(1)
    first = figures(0)
    torch.manual_seed(2)
    assert figures(0) == first
    assert figures(1) != first


# Bad input.

P = number([0.5, 1.5])


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (number(1.0), TypeError, "params must be a list of tensors, as in params=.w.; got Tensor"),
        (3.0, TypeError, "params must be a list of tensors, as in params=.w.; got float"),
        ([], ValueError, "params is empty"),
        ([number(1.0), 2.0], TypeError, "params must hold tensors; entry 1 is float"),
        (
            [number(1.0, grad=False)],
            ValueError,
            r"params holds .*\(entry 0\) that does not require",
        ),
        ([torch.ones(1, dtype=torch.complex64, requires_grad=True)], TypeError, "complex"),
        ([number(float("nan"))], ValueError, "no gradient to check: f is nan"),
        ([P, P], ValueError, "params lists a tensor twice"),
    ],
)
def test_bad_params(params: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_gradient(lambda: params[0].sum(), params)  # type: ignore[arg-type, index]


@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (3.0, TypeError, "f must be callable"),
        (lambda: 3.0, TypeError, "f must return a 0-d tensor; got float"),
        (lambda: P.square(), ValueError, r"f must return a 0-d tensor; got one of shape \(2,\)"),
        (lambda: (1j * P).sum(), TypeError, "f must return a real floating tensor"),
        (lambda: P.sum() / 0, ValueError, "no gradient to check: f is inf"),
        (lambda x, y: x.sum(), TypeError, r"f must be callable as f\(\) or as f\(\*params\)"),
    ],
)
def test_bad_functions(f: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_gradient(f, [P])  # type: ignore[arg-type]


def test_bad_options() -> None:
    def check(**options: object) -> GradientReport:
        return check_gradient(lambda: P.sum(), [P], **options)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="directions must be at least 1; got 0"):
        check(directions=0)
    for rtol in (0.0, -1.0, float("nan"), "small"):
        with pytest.raises(ValueError, match="rtol must be a number between 0 and 1"):
            check(rtol=rtol)
