"""How you know: what evidence costs, and the examples of the page with what they print."""

from __future__ import annotations

import io
import time
import warnings
from contextlib import redirect_stdout

import torch
from outcomes import relative
from page import Table
from rotated_flow import Rotated

from ode_stopping import GradientAccuracyWarning, stopping_time

EVIDENCE = """\
import torch
from ode_stopping import GradientNorm, PreconditionedFlow, Quadratic, stopping_time

f = Quadratic(torch.tensor([1.0, 4.0], dtype=torch.float64))
speed = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
flow = PreconditionedFlow(f, preconditioner=speed)  # x' = -speed * grad f(x)
x0 = torch.tensor([1.0, 1.0], dtype=torch.float64)

result = stopping_time(flow, x0, GradientNorm(f), 1e-2)
result.time.backward()
print(result.evidence)
for name, value in result.evidence.figures.items():
    print(f"  {name:10s} {value:.1e}")
"""
CHECK = """\
import torch
from ode_stopping import GradientNorm, PreconditionedFlow, Quadratic, check_stopping_gradient

f = Quadratic(torch.tensor([1.0, 4.0], dtype=torch.float64))
speed = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
flow = PreconditionedFlow(f, preconditioner=speed)
x0 = torch.tensor([1.0, 1.0], dtype=torch.float64)
print(check_stopping_gradient(flow, x0, GradientNorm(f), 1e-2, directions=1))
"""
CHECK_KINK = """\
import torch
from ode_stopping import check_stopping_gradient


def kinked(t, x):
    return -torch.where(x > 1, 1.0, 3.0) * x  # the velocity jumps where x passes 1


x0 = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
report = check_stopping_gradient(kinked, x0, lambda t, x: x.sum(), 0.1)
print(report.verdict, report.wrong)
for finding in report.findings:
    figures = f"{finding.gradient:8.4f} {finding.reference:8.4f}"
    print(f"{finding.subject:16s} {finding.road:24s} {figures}")
"""
CHECK_ANY = """\
import torch
from ode_stopping import check_gradient

p = torch.tensor([1.0, 0.5], dtype=torch.float64, requires_grad=True)
half = p.detach().clone().requires_grad_()


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 2.997 * ctx.saved_tensors[0] ** 2 * grad


report = check_gradient(lambda: Cube.apply(p).sum() + half.sin().sum(), [p, half])
print(report.verdicts)
"""


def cost() -> Table:
    """What evidence costs."""
    table = Table(["evidence", "forward", "backward: vjps", "evidence: evaluations", "seconds",
                   "estimate", "true error"])  # fmt: skip
    problem = Rotated(300.0, 1e-5)
    for kind in ("light", "standard", "thorough"):
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            p = problem.p.clone().requires_grad_()
            result = stopping_time(problem.flow(p), problem.x0, problem.criterion, problem.target,
                                   evidence=kind)  # type: ignore[arg-type]  # fmt: skip
            before = result.stats.checks
            (gradient,) = torch.autograd.grad(result.time, p)
            seconds.append(time.perf_counter() - began)
        _, truth = problem.truth(float(result.time.detach()))
        assert result.evidence is not None
        table.add(f'"{kind}"', result.stats.nfe_forward, result.stats.vjps,
                  result.stats.checks - before, f"{sorted(seconds)[1]:.2f}",
                  f"{result.evidence.estimate:.1e}", relative(gradient, truth))  # fmt: skip
    return table


def ran(code: str) -> str:
    """The code and what it prints, as two blocks of Markdown."""
    printed = io.StringIO()
    with redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientAccuracyWarning)
        exec(compile(code, "example", "exec"), {})
    return f"```python\n{code}```\n\n```text\n{printed.getvalue()}```"


def example_evidence() -> str:
    """Figures on the result."""
    return ran(EVIDENCE)


def example_check() -> str:
    """A report that passes."""
    return ran(CHECK)


def example_kink() -> str:
    """A report that fails."""
    return ran(CHECK_KINK)


def example_any() -> str:
    """A report on any function."""
    return ran(CHECK_ANY)
