"""Every number and figure of the page "When is it wrong?" (docs/when-is-it-wrong.md).

python docs/failures.py             prints the tables in Markdown and draws the figures
python docs/failures.py --update    writes the tables into the page as well

The peer is torchdiffeq: `odeint_event` with `odeint_adjoint`, or with `odeint` where it says so.
"""

from __future__ import annotations

import argparse
import io
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from math import acos, exp, log, nan, sqrt
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint, odeint_event

from discrete import Euler, StepDecrease, stopping_index
from discrete.index import accurate_decrease
from ode_stopping import (
    BacksolveAdjoint,
    DirectAdjoint,
    GradientAccuracyWarning,
    GradientRoute,
    InterpolatingAdjoint,
    StoppingResult,
    Torchdiffeq,
    UntrackedTensorError,
    control,
    mean_over_reached,
    stopping_time,
)
from theory_checks.plotting import COLOURS, new_figure, style

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
PAGE = DOCS / "when-is-it-wrong.md"
F64 = torch.float64
OURS, PEER, THIRD = COLOURS[0], COLOURS[1], COLOURS[2]
Function = Callable[[Tensor, Tensor], Tensor]


# --- Tables ---------------------------------------------------------------------------------------


@dataclass
class Table:
    """A Markdown table."""

    head: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """One more row; floats are written with three digits."""
        self.rows.append([figure(cell) if isinstance(cell, float) else str(cell) for cell in cells])

    def __str__(self) -> str:
        lines = [list(self.head), ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(value: float) -> str:
    """Three digits for a number of ordinary size, two for an error."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"


@contextmanager
def canvas(name: str, *shape: int, **size: Any) -> Iterator[tuple[Any, Any]]:
    """A figure in the style of the report, saved as docs/images/NAME.png."""
    with style():
        drawing, axes = new_figure(*shape, **size)
        yield drawing, axes
        IMAGES.mkdir(exist_ok=True)
        drawing.savefig(IMAGES / f"{name}.png", dpi=110, metadata={"Software": None})


# --- The two libraries ----------------------------------------------------------------------------


class StillRunning(Exception):
    """The peer was stopped by us, after more evaluations than the measurement allows."""


class Field(nn.Module):
    """A flow with its parameters registered, as torchdiffeq wants it, that counts evaluations."""

    def __init__(
        self, function: Function, parameters: Sequence[nn.Parameter] = (), limit: int = 10**9
    ) -> None:
        super().__init__()
        self.registered = nn.ParameterList(parameters)
        self.function = function
        self.calls, self.limit = 0, limit

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """dx/dt."""
        self.calls += 1
        if self.calls > self.limit:
            raise StillRunning
        return self.function(t, x)


def peer_time(
    flow: Field,
    x0: Tensor,
    criterion: Function,
    target: Any,
    *,
    adjoint: bool = True,
    **options: Any,
) -> Tensor:
    """The event time of torchdiffeq; rtol 1e-9 and atol 1e-12 unless said otherwise."""
    options = {"rtol": 1e-9, "atol": 1e-12, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        event, _ = odeint_event(
            flow,
            x0,
            torch.tensor(0.0, dtype=x0.dtype),
            event_fn=lambda t, x: criterion(t, x) - target,
            odeint_interface=odeint_adjoint if adjoint else odeint,
            **options,
        )
    return event


def parameter(value: Any) -> nn.Parameter:
    """A leaf in double precision."""
    return nn.Parameter(torch.as_tensor(value, dtype=F64))


def gradient_of(value: Tensor, leaf: Tensor) -> Tensor | None:
    """d value / d leaf, or None where autograd has none."""
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value, leaf, allow_unused=True, retain_graph=True)[0]


def said(action: Callable[[], Any]) -> str:
    """What a user sees: the value, and the warnings; or the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = action()
        except Exception as error:
            return f"raises `{type(error).__name__}`"
    own = [w.category.__name__ for w in caught if issubclass(w.category, UserWarning)]
    if isinstance(value, Tensor):
        value = float(value.detach())
    text = figure(value) if isinstance(value, float) else str(value)
    return f"{text}, warns `{own[-1]}`" if own else text


def half_square(t: Tensor, x: Tensor) -> Tensor:
    """J = |x|^2/2."""
    return 0.5 * x.square().sum()


class Rotated:
    """x' = -p (Q x), J = |Q x|^2: Q rotated, curvatures from 10/condition to 10, d = 50."""

    def __init__(self, condition: float, target: float = 1e-3, dtype: torch.dtype = F64) -> None:
        generator = torch.Generator().manual_seed(7)
        spectrum = torch.logspace(1 - np.log10(condition), 1, 50, dtype=F64)
        rotation, _ = torch.linalg.qr(torch.randn(50, 50, generator=generator, dtype=F64))
        p = 0.5 + torch.rand(50, generator=generator, dtype=F64)
        x0 = torch.randn(50, generator=generator, dtype=F64)
        # The truth is that of the rounded data.
        self.q, self.p, self.x0 = (
            tensor.to(dtype) for tensor in ((rotation * spectrum) @ rotation.T, p, x0)
        )
        self.target = target

    def flow(self, p: Tensor) -> Function:
        """(t, x) -> dx/dt."""
        return lambda t, x: -p * (self.q @ x)

    def criterion(self, t: Tensor, x: Tensor) -> Tensor:
        """J."""
        return (self.q @ x).square().sum()

    def truth(self, near: float) -> tuple[float, Tensor]:
        """T and dT/dp, through the exponential of the matrix, from a guess of T."""
        p = self.p.detach().clone().double().requires_grad_()
        q, x0 = self.q.double(), self.x0.double()
        end = near
        for _ in range(30):  # Newton on log J
            x = torch.linalg.matrix_exp(-p[:, None] * q * end) @ x0
            r = q @ x
            r, fixed = r.detach(), p.detach()
            rate = float(-2 * (q @ r) @ (fixed * r))
            move = float(r @ r) / rate * log(float(r @ r) / self.target)
            if abs(move) < 1e-13 * end:
                break
            end -= max(min(move, 0.3 * end), -0.3 * end)
        (by_p,) = torch.autograd.grad((q @ x).square().sum(), p)
        return end, -by_p / rate

    def ours(
        self, rtol: float | None, route: GradientRoute | None = None, **options: Any
    ) -> tuple[StoppingResult, Tensor, bool]:
        """The result, dT/dp, and whether a warning came."""
        p = self.p.clone().requires_grad_()
        result = stopping_time(
            self.flow(p),
            self.x0,
            self.criterion,
            self.target,
            solver=Torchdiffeq(rtol=rtol),
            gradient=route or InterpolatingAdjoint(),
            **options,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (gradient,) = torch.autograd.grad(result.time, p)
        return result, gradient, bool(caught)

    def peer(self, rtol: float, *, adjoint: bool, limit: int = 3000) -> tuple[float, Tensor, Field]:
        """T, dT/dp and the counted flow of torchdiffeq; the backward steps are limited."""
        p = nn.Parameter(self.p.clone())
        flow = Field(self.flow(p), [p])
        options = {"adjoint_options": {"max_num_steps": limit}} if adjoint else {}
        event = peer_time(
            flow,
            self.x0,
            self.criterion,
            self.target,
            adjoint=adjoint,
            rtol=rtol,
            atol=1e-4 * rtol,
            **options,
        )
        gradient = gradient_of(event, p)
        assert gradient is not None
        return float(event.detach()), gradient, flow


def relative(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|."""
    return float((found.double() - truth).norm() / truth.norm())


# --- 1 and 2: the contracting flow, the loose tolerance -------------------------------------------


def backward() -> Table:
    """x integrated backward."""
    table = Table(
        ["condition", "torchdiffeq: error of T", "of dT/dp", "here: error of T", "of dT/dp",
         "here, `BacksolveAdjoint`"]
    )  # fmt: skip
    conditions, peers, own = [1.5, 3.0, 10.0, 30.0, 100.0], [], []
    for condition in conditions:
        problem = Rotated(condition)
        result, gradient, _ = problem.ours(1e-6)
        end, truth = problem.truth(float(result.time.detach()))
        event, other, _ = problem.peer(1e-6, adjoint=True)
        peers.append(relative(other, truth))
        own.append(relative(gradient, truth))
        table.add(
            f"{condition:g}",
            abs(event / end - 1),
            peers[-1],
            abs(float(result.time.detach()) / end - 1),
            own[-1],
            said(lambda p=problem, t=truth: relative(p.ours(1e-6, BacksolveAdjoint())[1], t)),
        )
    with canvas("backward", width=3.9, height=2.5) as (_, axes):
        axes.loglog(conditions, peers, "s-", color=PEER, label="torchdiffeq, odeint_adjoint")
        axes.loglog(conditions, own, "o-", color=OURS, label="here, InterpolatingAdjoint")
        axes.axhline(1.0, color="#555555", linewidth=0.8, linestyle=":")
        axes.set(xlabel="condition number", ylabel="relative error of dT/dp", ylim=(1e-10, 1e82))
        axes.text(1.5, 3e1, "100 % wrong", fontsize=8.5, color="#555555")
        axes.legend(loc="upper left")
    return table


@contextmanager
def without_velocity_control() -> Iterator[None]:
    """The planted omission of tests/test_control.py: the error of the state alone."""
    with (
        patch.object(control.VelocityError, "_velocity", lambda self, trial: 0.0),
        patch("ode_stopping.search._POLISH_AFTER", 10**9),
    ):
        yield


def stiff() -> Table:
    """A right T with a wrong gradient."""
    table = Table(
        ["rtol", "control of the velocity", "error of T", "error of dT/dp", "evaluations", "warned"]
    )
    problem = Rotated(1000.0, 1e-5)
    rtols = [1e-3, 1e-4, 1e-5, 1e-6, 1e-7]
    curves: dict[str, list[tuple[float, float, float, bool]]] = {"on": [], "off": [], "peer": []}
    end, truth = problem.truth(158.0)
    for rtol in rtols:
        for name in ("on", "off"):
            with nullcontext() if name == "on" else without_velocity_control():
                result, gradient, warned = problem.ours(rtol)
            row = abs(float(result.time.detach()) / end - 1), relative(gradient, truth)
            calls = result.stats.nfe_forward
            curves[name].append((*row, calls, warned))
            table.add(f"{rtol:.0e}", name, *row, calls, "yes" if warned else "no")
        event, other, flow = problem.peer(rtol, adjoint=False)
        row = abs(event / end - 1), relative(other, truth)
        curves["peer"].append((*row, flow.calls, False))
        table.add(f"{rtol:.0e}", "(torchdiffeq, `odeint`)", *row, flow.calls, "no")
    _draw_stiff(rtols, curves)
    return table


def _draw_stiff(
    rtols: list[float], curves: dict[str, list[tuple[float, float, float, bool]]]
) -> None:
    looks = {
        "peer": (PEER, "s", "torchdiffeq, through odeint"),
        "off": (THIRD, "^", "here, control switched off"),
        "on": (OURS, "o", "here"),
    }
    with canvas("stiff", 1, 2, width=4.1, height=3.1) as (drawing, (left, right)):
        for name, (colour, marker, label) in looks.items():
            time_errors, errors, calls, warned = zip(*curves[name], strict=True)
            left.loglog(rtols, errors, marker=marker, color=colour, label=label)
            left.loglog(rtols, np.maximum(time_errors, 1e-12), ":", color=colour, linewidth=1.0)
            rings = [(r, e) for r, e, w in zip(rtols, errors, warned, strict=True) if w]
            if rings:
                left.plot(*zip(*rings, strict=True), "o", markersize=10, color="none",
                          markeredgecolor="#333333")  # fmt: skip
            right.semilogx(rtols, calls, marker=marker, color=colour)
        left.plot([], [], ":", color="#333333", label="the same, error of T")
        left.plot([], [], "o", markersize=9, color="none", markeredgecolor="#333333",
                  label="warned about")  # fmt: skip
        left.set(xlabel="rtol", ylabel="relative error of dT/dp")
        right.set(xlabel="rtol", ylabel="evaluations of the flow, forward",
                  ylim=(0, 4800))  # fmt: skip
        drawing.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)


# --- 3 and 4: the denominator, lost gradients -----------------------------------------------------


def denominator() -> Table:
    """An epsilon beside J'."""
    table = Table(["target", "J'(T)", "torchdiffeq (`odeint`): error of dT/dθ", "here"])
    theta_value, start = 1.3, torch.tensor([2.0], dtype=F64)
    targets, peers, own = [1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 1e-11, 1e-12, 1e-13, 1e-14], [], []
    for target in targets:
        truth = -log(4.0 / (2 * target)) / (2 * theta_value**2)
        theta = parameter(theta_value)
        flow = Field(lambda t, x, theta=theta: -theta * x, [theta])
        event = peer_time(
            flow, start, half_square, target, adjoint=False, atol=1e-10 * sqrt(target)
        )
        peers.append(abs(float(gradient_of(event, theta)) / truth - 1))
        result = stopping_time(
            lambda t, x, theta=theta: -theta * x, start, half_square, target,
            solver=Torchdiffeq(rtol=1e-9),
        )  # fmt: skip
        own.append(abs(float(gradient_of(result.time, theta)) / truth - 1))
        table.add(f"{target:.0e}", float(result.rate), peers[-1], own[-1])
    with canvas("denominator", width=3.9, height=2.5) as (_, axes):
        axes.loglog(targets, peers, "s-", color=PEER, label="torchdiffeq, odeint_event")
        axes.loglog(targets, own, "o-", color=OURS, label="here")
        axes.set(xlabel="target", ylabel="relative error of dT/dθ")
        axes.invert_xaxis()
        axes.legend(loc="center left")
    return table


def lost() -> Table:
    """Gradients that get lost on the way."""
    table = Table(["derivative", "truth", "torchdiffeq", "here"])
    start = torch.tensor([1.5], dtype=F64)
    a, eps = parameter(1.7), parameter(1e-2)
    flow = Field(lambda t, x: -a * x, [a])

    def scaled(t: Tensor, x: Tensor) -> Tensor:
        return 0.5 * a * x.square().sum()

    span = log(1.7 * 1.5**2 / (2 * 1e-2)) / (2 * 1.7)
    event = peer_time(flow, start, scaled, eps)
    result = stopping_time(flow, start, scaled, eps)
    truths = {"a, in flow and criterion": 1 / (2 * 1.7**2) - span / 1.7,
              "the target": -1 / (2 * 1.7 * 1e-2)}  # fmt: skip
    for leaf, (name, truth) in zip((a, eps), truths.items(), strict=True):
        table.add(f"by {name}", truth, _or_none(event, leaf), _or_none(result.time, leaf))
    event = peer_time(Field(lambda t, x: -a * x), start, half_square, 1e-2)
    result = stopping_time(lambda t, x: -a * x, start, half_square, 1e-2)
    truth = -log(1.5**2 / 2e-2) / (2 * 1.7**2)
    table.add("by a tensor in a closure", truth, _or_none(event, a), _or_none(result.time, a))

    def forgetful(t: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            (g,) = torch.autograd.grad(0.5 * (x**2).sum(), x)
        return -a * g

    start = start.clone().requires_grad_()
    event = peer_time(Field(forgetful, [a]), start, half_square, 1e-2)
    table.add(
        "by x0, `create_graph=True` forgotten in the flow",
        1 / (1.7 * 1.5),
        _or_none(event, start),
        said(lambda: stopping_time(forgetful, start, half_square, 1e-2)),
    )
    return table


def _or_none(value: Tensor, leaf: Tensor) -> str:
    found = gradient_of(value, leaf)
    return "None" if found is None else figure(float(found))


# --- 5 to 8: the crossing -------------------------------------------------------------------------


def unreached() -> Table:
    """No crossing, or none to wait for."""
    table = Table(["case", "torchdiffeq", "here", "evaluations here"])
    x0 = torch.tensor([2.0], dtype=F64)
    cases: dict[str, tuple[Function, float]] = {
        "target below the least value of J": (lambda t, x: 1 + half_square(t, x), 0.5),
        "J(x0) below the target already": (half_square, 9.0),
    }
    for name, (criterion, target) in cases.items():
        flow = Field(lambda t, x: -x, limit=5_000)
        try:
            with torch.no_grad():
                other = f"T = {float(peer_time(flow, x0, criterion, target)):.4g}"
        except StillRunning:
            other = f"still running after {flow.limit} evaluations"
        result = stopping_time(lambda t, x: -x, x0, criterion, target)
        own = f"{result.status.name}, T = {float(result.time):g}"
        table.add(name, other, own, result.stats.nfe_forward)
    return table


def diverging() -> Table:
    """NaN as a hit."""
    table = Table(["case", "torchdiffeq", "here"])
    x0 = torch.tensor([1.0], dtype=F64)
    fast: Function = lambda t, x: -30 * x  # noqa: E731
    event = peer_time(Field(fast), x0, half_square, 1e-2, method="rk4", options={"step_size": 0.1})
    table.add(
        "x' = -30 x in steps of 0.1 (rk4; Euler here)",
        f"T = {float(event.detach()):.4g}",
        said(lambda: stopping_index(Euler(fast, step=0.1), x0, half_square, 1e-2)),
    )
    burst: Function = lambda t, x: x**3  # noqa: E731
    table.add(
        "x' = x³, which is infinite at t = 1/2",
        said(lambda: peer_time(Field(burst, limit=20_000), x0, half_square, 1e-2)),
        said(lambda: stopping_time(burst, x0, half_square, 1e-2)),
    )
    return table


def _cosine(t: Tensor, x: Tensor) -> Tensor:
    return torch.cos(x).sum()


def dip_in_a_step() -> Table:
    """A crossing that comes back before the step ends."""
    table = Table(["criterion, with x' = 1", "truth", "torchdiffeq", "here"])
    x0, clock = torch.zeros(1, dtype=F64), Field(lambda t, x: torch.ones_like(x))
    for level in (0.0, -0.5, -0.9):
        own = stopping_time(clock, x0, _cosine, level).time
        other = peer_time(clock, x0, _cosine, level)
        table.add(f"cos x = {level:g}", acos(level), float(other.detach()), float(own))
    return table


def heavy_ball(damping: float) -> tuple[StoppingResult, bool]:
    """Closed form 7, and whether the run warned."""
    a = parameter(damping)
    curvatures = torch.tensor([1.0, 60.0], dtype=F64)
    start = torch.tensor([1.0, 0.3], dtype=F64), torch.zeros(2, dtype=F64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = stopping_time(
            lambda t, s: (s[1], -a * s[1] - curvatures * s[0]),
            start,
            lambda t, s: 0.5 * (curvatures * s[0] ** 2).sum(),
            0.08,
        )
        result.time.backward()
    return result, bool(caught)


def grazing() -> Table:
    """T jumps under a small change of the damping."""
    table = Table(["damping", "T", "dT/d(damping)", "near miss: margin", "at t", "warned"])
    for damping in (0.8, 0.86, 0.87, 0.88, 0.9, 1.0):
        result, warned = heavy_ball(damping)
        miss = result.near_miss
        leaf = next(iter(result.problem.leaves.tensors))  # type: ignore[union-attr]
        dip = ("-", "-") if miss is None else (miss.margin, miss.time)
        slope, said_so = float(leaf.grad), "yes" if warned else "no"
        table.add(f"{damping:g}", float(result.time.detach()), slope, *dip, said_so)
    dampings = np.concatenate([np.linspace(0.8, 0.875, 9), np.linspace(0.877, 1.0, 11)])
    runs = [heavy_ball(float(a)) for a in dampings]
    times = np.array([float(run.time.detach()) for run, _ in runs])
    misses = [run.near_miss for run, _ in runs]
    margins = np.array([nan if miss is None else miss.margin for miss in misses])
    jump = int(np.argmax(np.diff(times))) + 1
    with canvas("grazing", 1, 2, width=4.0, height=2.7) as (_, (left, right)):
        for part in (slice(None, jump), slice(jump, None)):
            left.plot(dampings[part], times[part], ".-", color=OURS)
            right.plot(dampings[part], margins[part], ".-", color=PEER)
        left.axvline(dampings[jump - 1 : jump + 1].mean(), color="#555555", lw=0.8, ls=":")
        left.set(xlabel="damping", ylabel="stopping time T", ylim=(1.35, 1.85))
        warned = [(a, m) for a, m, (_, w) in zip(dampings, margins, runs, strict=True) if w]
        right.plot(*zip(*warned, strict=True), "o", markersize=9, color="none",
                   markeredgecolor="#333333", label="warned about")  # fmt: skip
        right.set(
            xlabel="damping",
            ylabel="margin of the near miss",
            xlim=left.get_xlim(),
            ylim=(-0.006, 0.13),
        )
        right.legend(loc="center right")
    return table


# --- 9 to 12: jumps, precision, second derivatives ------------------------------------------------


def time_jump() -> Table:
    """A flow whose rate jumps from 1 to 3 at t = 1."""
    table = Table(["run", "error of T", "error of dT/d(first rate)", "evaluations", "says"])
    first, second, x0 = parameter(1.0), parameter(3.0), torch.tensor([2.0], dtype=F64)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -(first if float(t.detach()) < 1 else second) * x

    end, truth = 1 + (log(4 / 2e-3) / 2 - 1) / 3, -1 / 3
    counted = Field(flow, [first, second])
    event = peer_time(counted, x0, half_square, 1e-3, rtol=1e-7, atol=1e-11)
    calls, found = counted.calls, gradient_of(event, first)
    table.add("torchdiffeq", abs(float(event.detach()) / end - 1),
              abs(float(found) / truth - 1), calls, "nothing")  # fmt: skip
    for name, breakpoints in (("here", None), ("here, `breakpoints=[1.0]`", [1.0])):
        result = stopping_time(flow, x0, half_square, 1e-3, breakpoints=breakpoints)
        words = said(lambda r=result: r.time.backward())
        assert first.grad is not None
        error = abs(float(first.grad) / truth - 1)
        first.grad = second.grad = None
        table.add(name, abs(float(result.time.detach()) / end - 1), error, result.stats.nfe_forward,
                  words.removeprefix("None, ").replace("None", "nothing"))  # fmt: skip
    return table


def state_jump() -> Table:
    """A velocity that jumps where x passes 1: lam has a jump that no adjoint equation has."""
    table = Table(["run", "dT/dx0 (truth 1/3)", "evidence"])
    kinked: Function = lambda t, x: -torch.where(x > 1, 1.0, 3.0) * x  # noqa: E731
    total: Function = lambda t, x: x.sum()  # noqa: E731
    x0 = parameter([3.0])
    event = peer_time(Field(kinked), x0, total, 0.1)
    table.add("torchdiffeq, `odeint_adjoint`", _or_none(event, x0), "-")
    event = peer_time(Field(kinked), x0, total, 0.1, adjoint=False)
    table.add("torchdiffeq, `odeint`", _or_none(event, x0), "-")
    for route in (InterpolatingAdjoint(), DirectAdjoint()):
        result = stopping_time(kinked, x0, total, 0.1, gradient=route)
        words = said(lambda r=result: float(torch.autograd.grad(r.time, x0)[0]))
        assert result.evidence is not None
        estimate = f"estimated error {result.evidence.estimate:.2f}"
        table.add(f"here, `{type(route).__name__}`", words, estimate)
    return table


def precision() -> Table:
    """Single precision."""
    table = Table(["condition", "torchdiffeq: error of T", "of dT/dp",
                   "here: error of T", "of dT/dp", "warned"])  # fmt: skip
    for condition in (10.0, 100.0, 1000.0):
        problem = Rotated(condition, 1e-3, torch.float32)
        result, gradient, warned = problem.ours(None)
        end, truth = problem.truth(float(result.time.detach()))
        try:
            event, other, _ = problem.peer(1e-4, adjoint=True)
            cells: tuple[object, ...] = abs(event / end - 1), relative(other, truth)
        except (AssertionError, RuntimeError) as error:
            cells = ("", f"raises `{type(error).__name__}`")
        table.add(f"{condition:g}", *cells, abs(float(result.time.detach()) / end - 1),
                  relative(gradient, truth), "yes" if warned else "no")  # fmt: skip
    return table


def arithmetic() -> Table:
    """What the dtype cannot hold."""
    table = Table(["case", "here"])
    x0 = torch.tensor([2.0], requires_grad=True)
    offset: Function = lambda t, x: 1 + half_square(t, x)  # noqa: E731
    table.add("float32, J = 1 + x²/2, target 1 + 1e-5 (T = 6.103)",
              said(lambda: stopping_time(lambda t, x: -x, x0, offset, 1 + 1e-5).time))  # fmt: skip
    table.add(
        "float32, rtol = 1e-9",
        said(lambda: stopping_time(lambda t, x: -x, x0.detach(), half_square, 1e-2,
                                   solver=Torchdiffeq(rtol=1e-9)).time),
    )  # fmt: skip
    return table


def second() -> Table:
    """d²T/dθ² of x' = -θ x is 2T/θ²."""
    table = Table(["run", "d²T/dθ²"])
    x0, theta = torch.tensor([2.0], dtype=F64), parameter(1.3)
    flow = Field(lambda t, x: -theta * x, [theta])
    span = log(4.0 / 2e-2) / (2 * 1.3)
    table.add("truth", 2 * span / 1.3**2)

    def twice(value: Tensor) -> float:
        (once,) = torch.autograd.grad(value, theta, create_graph=True)
        return float(torch.autograd.grad(once, theta)[0])

    for adjoint in (False, True):
        interface = "odeint_adjoint" if adjoint else "odeint"
        words = said(lambda a=adjoint: twice(peer_time(flow, x0, half_square, 1e-2, adjoint=a)))
        table.add(f"torchdiffeq, `{interface}`", words)
    for route in (InterpolatingAdjoint(), DirectAdjoint()):
        words = said(lambda r=route: twice(stopping_time(flow, x0, half_square, 1e-2, gradient=r,
                     solver=Torchdiffeq(rtol=1e-9)).time))  # fmt: skip
        table.add(f"here, `{type(route).__name__}`", words)
    return table


# --- 13 to 16: iterations, means, transforms ------------------------------------------------------


def stochastic() -> Table:
    """An update that is not a function of its arguments."""
    table = Table(["update", "here"])
    rate, x0 = parameter(0.1), torch.tensor([2.0, 1.0], dtype=F64)
    count = [0]

    def stateful(k: int, x: Tensor) -> Tensor:
        count[0] += 1
        return x - rate * (1 + 0.01 * count[0]) * x

    def dropout(k: int, x: Tensor) -> Tensor:
        return x - rate * nn.functional.dropout(x, 0.5)

    def seeded(k: int, x: Tensor) -> Tensor:
        mask = torch.rand(2, generator=torch.Generator().manual_seed(k)) > 0.5
        return x - 2 * rate * torch.where(mask, x, 0.0)

    names = {"dropout": dropout, "counts its calls": stateful, "dropout, seeded by k": seeded}
    torch.manual_seed(0)
    for name, update in names.items():
        words = said(lambda u=update: float(torch.autograd.grad(
            stopping_index(u, x0, half_square, 1e-2).steps, rate)[0]))  # fmt: skip
        table.add(name, words if "raises" in words else f"dN/d(rate) = {words}")
    return table


def index() -> Table:
    """Definition 3: unit, order, bracket, precision."""
    table = Table(["h", "error of h dN/dθ", "of h dN*/dθ (\"log\")", "dN/dθ itself",
                   "(T - hN)/h", "float32: error of J_N - J_{N-1}", "of the one used"])  # fmt: skip
    rates = torch.tensor([1.0, 4.0], dtype=F64)
    start, eps = torch.tensor([1.0, 1.0], dtype=F64), 1e-3

    def solve(h: float, dtype: torch.dtype, interpolation: Any = None) -> tuple[Any, Tensor]:
        theta = torch.tensor([1.0, 0.5], dtype=dtype, requires_grad=True)
        flow: Function = lambda t, x: -theta * rates.to(dtype) * x  # noqa: E731
        run = stopping_index(Euler(flow, step=h), start.to(dtype), _squares, eps,
                             interpolation=interpolation)  # fmt: skip
        return run, torch.autograd.grad(run.steps, theta)[0]

    theta = torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    exact = stopping_time(lambda t, x: -theta * rates * x, start, _squares, eps,
                          solver=Torchdiffeq(rtol=1e-11))  # fmt: skip
    (truth,) = torch.autograd.grad(exact.time, theta)
    end = float(exact.time.detach())
    shown = [0.1, 0.01, 1e-3]
    rows: list[tuple[float, ...]] = []
    for h in map(float, [*np.logspace(-1.01, -2.6, 40), *shown, *np.logspace(-2.7, -3.7, 6)]):
        gaps = _differences_in_single(h, rates, start, eps)
        if h < 2e-3 and h not in shown:
            rows.append((h, nan, nan, *gaps))
            continue
        run, by_theta = solve(h, F64)
        _, smooth = solve(h, F64, "log")
        rows.append((h, relative(h * by_theta, truth), relative(h * smooth, truth), *gaps))
        if h in shown:
            bracket = (end - h * run.index) / h
            table.add(f"{h:g}", *rows[-1][1:3], float(by_theta.norm()), bracket, *gaps)
    _draw_index(np.array(sorted(rows)))
    return table


def _squares(t: Tensor, x: Tensor) -> Tensor:
    return x.square().sum()


def _differences_in_single(
    h: float, rates: Tensor, start: Tensor, eps: float
) -> tuple[float, float]:
    """Relative errors of J_N - J_{N-1} in float32: the plain difference, and the one in use."""
    speed = torch.tensor([1.0, 0.5])
    flow: Function = lambda t, x: -speed * rates.float() * x  # noqa: E731
    run = stopping_index(Euler(flow, step=h), start.float(), _squares, eps)
    assert run.problem is not None
    before = run.problem.previous.double()
    truth = float(((1 - h * speed * rates) * before).square().sum() - before.square().sum())
    return abs(float(run.decrease) / truth - 1), abs(accurate_decrease(run.problem) / truth - 1)


def _draw_index(rows: Any) -> None:
    h, plain, smooth, difference, ours = rows.T
    known = np.isfinite(plain)
    with canvas("index", 1, 2, width=4.0, height=2.9) as (_, (left, right)):
        look: dict[str, Any] = {"marker": ".", "lw": 0.9}
        left.loglog(h[known], plain[known], color=PEER, label="Definition 3", **look)
        left.loglog(h[known], smooth[known], color=OURS, label='fractional, "log"', **look)
        left.set(xlabel="step size h", ylabel="relative error of h dN/dθ", ylim=(1e-5, 2))
        left.legend(loc="upper left")
        right.loglog(h, np.maximum(difference, 1e-9), color=PEER, label="subtracted", **look)
        right.loglog(h, np.maximum(ours, 1e-9), color=OURS, label="from the increment", **look)
        right.set(xlabel="step size h", ylabel=r"error of $J_N - J_{N-1}$ in float32",
                  ylim=(7e-10, 1e-1))  # fmt: skip
        right.legend(loc="upper right")


def increase() -> Table:
    """f(x_{k-1}) - f(x_k) <= tol."""
    table = Table(["criterion", "N", "decrease of f over the last step"])

    def swing(k: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, v = state[0], state[1]
        v = 0.95 * v - 0.3 * x
        return x + 0.3 * v, v

    start = torch.tensor([1.0], dtype=F64), torch.zeros(1, dtype=F64)
    loss: Callable[[Tensor], Tensor] = lambda x: 0.5 * x.square().sum()  # noqa: E731

    def remember(k: int, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*swing(k, state), state[0])

    begin = (*start, 2 * start[0])
    run = stopping_index(remember, begin, lambda t, s: loss(s[2]) - loss(s[0]), 1e-7, gradient=None)
    table.add("the plain difference <= 1e-7", run.index,
              float(loss(run.state[2]) - loss(run.state[0])))  # fmt: skip
    criterion = StepDecrease(loss)
    run = stopping_index(criterion.wrap(swing), criterion.initial_state(start), criterion, 1e-7,
                         gradient=None)  # fmt: skip
    table.add("`StepDecrease` <= 1e-7", run.index, float(run.state[-1]))
    return table


def means() -> Table:
    """The mean over runs of which some miss."""
    table = Table(["mean over starts 1, 2, 3, 4 of which 3 and 4 miss", "mean", "d mean/dθ"])
    theta = parameter(1.0)
    starts = [torch.tensor([start], dtype=F64) for start in (1.0, 2.0, 3.0, 4.0)]

    def runs(censored: Any = None) -> list[StoppingResult]:
        return [stopping_time(lambda t, x: -theta * x, x0, half_square, 0.02, max_time=2.5,
                              censored=censored) for x0 in starts]  # fmt: skip

    plain = torch.stack([run.time for run in runs()]).mean()
    table.add(
        "of `.time`", float(plain.detach()), said(lambda: torch.autograd.grad(plain, theta)[0])
    )
    found = mean_over_reached(runs())
    slope = float(torch.autograd.grad(found.mean, theta)[0])
    table.add(f"`mean_over_reached` ({found.missed} missed)", float(found.mean.detach()), slope)
    counted = torch.stack([run.time for run in runs("horizon")]).mean()
    slope = float(torch.autograd.grad(counted, theta)[0])
    table.add('of `.time`, `censored="horizon"`', float(counted.detach()), slope)
    return table


def transforms() -> Table:
    """Functional transforms over the loop."""
    table = Table(["transform of T(x0)", "here"])
    points = torch.tensor([[2.0], [1.0]], dtype=F64)

    def of(x0: Tensor) -> Tensor:
        return stopping_time(lambda t, x: -x, x0, half_square, 0.1).time

    for name in ("vmap", "grad", "jacrev", "jacfwd", "hessian"):
        argument = points if name == "vmap" else points[0]
        transformed = getattr(torch.func, name)(of)
        table.add(f"`torch.func.{name}`", said(lambda f=transformed, a=argument: f(a)))
    return table


# --- How you know; what is not caught -------------------------------------------------------------


def cost() -> Table:
    """What evidence costs."""
    table = Table(["evidence", "forward", "backward: vjps", "evidence: evaluations", "seconds",
                   "estimate", "true error"])  # fmt: skip
    problem = Rotated(300.0, 1e-5)
    for kind in ("cheap", "thorough"):
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


def narrow() -> Table:
    """Dips of J between the points at which it is looked at, and pulses of the flow."""
    table = Table(["half-width w of the dip at x = 20", "truth", "here", "here, `max_step=w`"])
    x0 = torch.zeros(1, dtype=F64)
    clock: Function = lambda t, x: torch.ones_like(x)  # noqa: E731
    for width in (3.0, 1.0, 0.3, 0.1, 0.03):

        def dip(t: Tensor, x: Tensor, w: float = width) -> Tensor:
            return (1 - 0.01 * x - 0.6 * torch.exp(-(((x - 20) / w) ** 2))).sum()

        low, high = 20 - 3 * width, 20.0  # J = 0.5 by bisection
        for _ in range(60):
            middle = 0.5 * (low + high)
            above = 1 - 0.01 * middle - 0.6 * exp(-(((middle - 20) / width) ** 2)) > 0.5
            low, high = (middle, high) if above else (low, middle)
        runs = [
            float(stopping_time(clock, x0, dip, 0.5, solver=Torchdiffeq(max_step=step)).time)
            for step in (float("inf"), width)
        ]
        table.add(f"{width:g}", low, *runs)
    return table


def pulse() -> Table:
    """A flow that does something for a short time only; ten places of the pulse for each width."""
    table = Table(["width of the pulse (T = 3)", "right or warned about", "`UntrackedTensorError`",
                   "missed in silence", "`breakpoints=`: right"])  # fmt: skip
    for width in (0.3, 0.1, 0.03, 0.01):
        places = np.linspace(0.1, 2.3, 10)
        ends = [_pulsed(float(start), width, {}) for start in places]
        told = [_pulsed(float(a), width, {"breakpoints": [a, a + width]}) for a in places]
        seen = ends.count("right") + ends.count("warned")
        raised, silent = ends.count("UntrackedTensorError"), ends.count("silent")
        table.add(f"{width:g}", seen, raised, silent, told.count("right"))
    return table


def _pulsed(start: float, width: float, options: dict[str, Any]) -> str:
    """How x' = -x (1 + kick in [start, start + width]) ends, differentiated to kick."""
    kick, base = parameter(0.3), parameter(1.0)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        inside = start < float(t.detach()) < start + width
        return -base * x * (1 + kick if inside else 1.0)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            x0 = torch.tensor([2.0], dtype=F64)
            stopping_time(flow, x0, lambda t, x: x.sum(), 0.1, **options).time.backward()
        except UntrackedTensorError as error:
            return type(error).__name__
    if caught:
        return "warned"
    right = kick.grad is not None and abs(float(kick.grad) / -width - 1) < 1e-4
    return "right" if right else "silent"


def clock() -> Table:
    """A function that reads t as a number hides its dependence on t from autograd."""
    table = Table(["derivative", "truth (t used as a tensor)", "t read by `.item()`"])
    x0 = torch.tensor([2.0, 1.0], dtype=F64)
    theta, start = parameter(1.0), parameter(0.3)

    def by_theta(read: Callable[[Tensor], Any]) -> str:
        flow: Function = lambda t, x: -theta * x  # noqa: E731
        late: Function = lambda t, x: half_square(t, x) - 0.05 * read(t)  # noqa: E731
        return said(lambda: _or_none(stopping_time(flow, x0, late, 0.1).time, theta))

    def by_start(read: Callable[[Tensor], Any]) -> str:
        flow: Function = lambda t, x: -(1 + 0.5 * torch.sin(torch.as_tensor(read(t)))) * x  # noqa: E731
        rule = Euler(flow, step=0.01)
        return said(
            lambda: _or_none(
                stopping_index(rule, x0, half_square, 0.1, t0=start, interpolation="log").steps,
                start,
            )
        )

    for name, run in (("dT/dθ, criterion", by_theta), ("dN*/dt0, Euler", by_start)):
        table.add(name, run(lambda t: t), run(lambda t: t.item()))
    return table


# --- The examples of the page ---------------------------------------------------------------------

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
print(report.passed)
for finding in report.findings:
    figures = f"{finding.gradient:8.4f} {finding.reference:8.4f}"
    print(f"{finding.subject:16s} {finding.road:24s} {figures}")
"""


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


MEASUREMENTS: dict[str, Callable[[], Table | str]] = {
    function.__name__: function
    for function in (
        backward, stiff, denominator, lost, unreached, diverging, dip_in_a_step, grazing, time_jump,
        state_jump, precision, arithmetic, second, stochastic, index, increase, means, transforms,
        cost, narrow, pulse, clock, example_evidence, example_check, example_kink,
    )
}  # fmt: skip


def opening(name: str) -> str:
    """The line of the page below which a table stands."""
    return f"<!-- {name}: docs/failures.py -->"


def written(text: str, name: str, table: str) -> str:
    """The page with this table between its marks."""
    before, rest = text.split(opening(name) + "\n", 1)
    after = rest.split("<!-- end -->", 1)[1]
    return f"{before}{opening(name)}\n\n{table}\n\n<!-- end -->{after}"


def measured(name: str) -> str:
    """The table of one measurement; its figure is saved."""
    torch.set_num_threads(1)
    return str(MEASUREMENTS[name]())


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="tables; default: all")
    parser.add_argument("--update", action="store_true", help="write the tables into the page")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    print(f"torch {version('torch')}, torchdiffeq {version('torchdiffeq')}")
    names = options.names or list(MEASUREMENTS)
    with ProcessPoolExecutor(max_workers=options.jobs) as pool:
        for name, table in zip(names, pool.map(measured, names), strict=True):
            print(f"\n## {name}\n\n{table}", flush=True)
            if options.update:
                text = PAGE.read_text(encoding="utf-8")
                PAGE.write_text(written(text, name, table), encoding="utf-8")


if __name__ == "__main__":
    main()
