"""The discrete counterpart: Euler through events and resets, differentiated by plain autograd."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from ode_stopping import Event, InterpolatingAdjoint, Torchdiffeq, integrate

from ..plotting import COLOURS, MARKERS, log_axes, new_figure
from ..registry import Context, Figure, Outcome, Table, check
from ..slopes import SlopeFit, fit_slope
from ._events import leaves_of

IMPACTS = 3
# Steps from t0 to the last impact, at the largest and at the smallest step size.
RANGE = (50, 400)
PAPER_RANGE = (50, 3200)
TOLERANCE = 0.2
# How large the error without the term has to be at the smallest step, relative to the gradient.
LEAST_GAP = 0.05
REFERENCE_SHARE = 0.05
# A ball with linear drag on a table that goes up and down.
BALL = {"g": 9.81, "drag": 0.3, "e": 0.8, "A": 0.05, "omega": 4.0, "y0": 1.5, "v0": 0.4}
WAYS = ("linear", "partial step")


@dataclass(frozen=True)
class Cell:
    """One iteration.

    Attributes:
        way: How the event is found within its step: "linear" (J between the two ends) or "partial
            step" (J of a shortened step).
        step: h, in flow time.
        saltation: Whether what follows an impact receives the derivative of its time.
    """

    way: str
    step: float
    saltation: bool = True


@dataclass(frozen=True)
class Measured:
    """The time of the last impact, in flow time, and its gradient, in the order of `BALL`."""

    time: float
    gradient: list[float]


class Ball:
    """The velocity, the criterion and the reset, as both sides use them."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        self.leaves = leaves
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        rows = [torch.stack([zero, one]), torch.stack([zero, -leaves["drag"]])]
        self._size, self._omega = float(leaves["A"].detach()), float(leaves["omega"].detach())
        self._matrix = torch.stack(rows)
        self._fall = torch.stack([zero, -leaves["g"]])
        self.start = torch.stack([leaves["y0"], leaves["v0"]])

    def velocity(self, x: Tensor) -> Tensor:
        """(y', v') = (v, -g - drag v)."""
        return self._matrix @ x + self._fall

    def excess(self, t: Tensor, x: Tensor) -> Tensor:
        """The height above the table, J = y - A sin(omega t)."""
        return x[0] - self.leaves["A"] * torch.sin(self.leaves["omega"] * t)

    def height(self, t: float, x: Tensor) -> float:
        """J as a number, which costs a tenth of what a graph does."""
        return float(x[0].detach()) - self._size * math.sin(self._omega * t)

    def reset(self, t: Tensor, x: Tensor) -> Tensor:
        """Onto the table; the speed relative to it turns round and keeps the share e."""
        size, omega = self.leaves["A"], self.leaves["omega"]
        table = size * omega * torch.cos(omega * t)
        behind = table - self.leaves["e"] * (x[1] - table)
        return torch.stack([size * torch.sin(omega * t), behind])


def iterate(cell: Cell) -> Measured:
    """Euler with step h; an event splits its step, and the rest of it is made behind the reset."""
    leaves = leaves_of(BALL)
    ball, h = Ball(leaves), cell.step
    x = ball.start
    above = ball.height(0.0, x)
    impacts, k = 0, 0
    while True:
        after = x + h * ball.velocity(x)
        below = ball.height((k + 1) * h, after)
        if below <= 0.0 < above:
            begin = torch.tensor(k * h, dtype=torch.float64)
            share = shares(ball, cell, begin, x, after)
            impacts += 1
            if impacts == IMPACTS:
                time = begin + share * h
                found = torch.autograd.grad(time, list(leaves.values()))
                return Measured(float(time.detach()), [float(part) for part in found])
            if not cell.saltation:
                # Planted: the time of the impact as a number that nothing moves, in the state
                # there, in the reset, and in how long the rest of the step is.
                share = share.detach()
            behind = ball.reset(begin + share * h, x + share * (after - x))
            after = behind + (1 - share) * h * ball.velocity(behind)
            below = ball.height((k + 1) * h, after)
        x, above, k = after, below, k + 1


def shares(ball: Ball, cell: Cell, begin: Tensor, x: Tensor, after: Tensor) -> Tensor:
    """Which share of its step passes before the event, shape (), with its graph."""
    h = cell.step
    if cell.way == "linear":
        first, last = ball.excess(begin, x), ball.excess(begin + h, after)
        return first / (first - last)

    def excess(share: Tensor) -> Tensor:
        return ball.excess(begin + share * h, x + share * (after - x))

    with torch.no_grad():
        root = brentq(
            lambda s: float(excess(torch.tensor(s, dtype=torch.float64))), 0.0, 1.0, xtol=1e-15
        )
    share = torch.tensor(root, dtype=torch.float64, requires_grad=True)
    value = excess(share)
    (rate,) = torch.autograd.grad(value, share, retain_graph=True)
    value = excess(share.detach())
    return share.detach() - (value - value.detach()) / rate


def reference(rtol: float) -> Measured:
    """The continuous side: the saltation formula, by the continuous adjoint."""
    leaves = leaves_of(BALL)
    ball = Ball(leaves)
    solution = integrate(
        lambda t, x: ball.velocity(x),
        ball.start,
        events=[Event(ball.excess, reset=ball.reset, count=IMPACTS)],
        solver=Torchdiffeq(method="dopri8", rtol=rtol),
        gradient=InterpolatingAdjoint(),
        params=list(leaves.values()),
    )
    found = torch.autograd.grad(solution.end.time, list(leaves.values()))
    return Measured(float(solution.end.time.detach()), [float(part) for part in found])


@check(
    name="events-discrete",
    title="Euler through impacts tends to the saltation gradient",
    source="Theorem 2, with events and resets beyond the paper",
    group="events",
    order=93,
)
def events_discrete(context: Context) -> Outcome:
    """Autograd through an iteration with impacts tends to the gradient of the flow, at order 1.

    A ball with drag on a table that moves, J = y - A sin(omega t). Euler with step h; the impact is
    found within its step on the line between the two values of J, or as the length of a shortened
    step that ends on the table; the reset is applied there, and the rest of the step follows. The
    time of the third impact is differentiated to g, the drag, the restitution, A, omega and the
    start, by plain autograd, and compared with the continuous adjoint through resets. Planted: the
    impact times before it are kept from moving, which leaves the saltation term out.

    Each point is the root mean square over step sizes that put the impacts at different phases of
    their step. Measured: slopes of the errors of gradient and value over h. Expected: 1; for the
    planted error 0, with a gap that stays. Tolerance: 0.2. The reference, dopri8 at rtol 1e-12, may
    differ from the one at 1e-10 by a twentieth of the smallest error.
    """
    ends = context.choose(quick=RANGE, paper=PAPER_RANGE)
    levels, phases = context.choose(quick=(4, 6), paper=(7, 12))
    return judge_discrete(context, ends, levels=levels, phases=phases)


def judge_discrete(context: Context, ends: tuple[int, int], *, levels: int, phases: int) -> Outcome:
    """The check on a choice of step sizes.

    Args:
        context: The settings.
        ends: The least and the most steps to the last impact.
        levels: Points a curve.
        phases: Step sizes a point.
    """
    truth, loose = context.map(reference, [1e-12, 1e-10])
    counts = [round(float(count)) for count in np.geomspace(*ends, levels)]
    points = [[truth.time / (n + (j + 0.5) / phases) for j in range(phases)] for n in counts]
    steps = [float(np.exp(np.mean(np.log(point)))) for point in points]
    curves: dict[tuple[str, bool], tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for way, saltation in [(way, True) for way in WAYS] + [("partial step", False)]:
        cells = [Cell(way, h, saltation) for point in points for h in point]
        runs = context.map(iterate, cells)
        curves[way, saltation] = _errors(truth, runs, phases)
    measured: dict[str, float] = {}
    expected: dict[str, float] = {}
    bounds: dict[str, float] = {}
    fits: dict[tuple[str, bool], SlopeFit] = {}
    for key, (gradient, time) in curves.items():
        way, saltation = key
        name = way if saltation else "without the saltation term"
        fits[key] = fit_slope(steps, gradient)
        rows = [("gradient", fits[key].slope, TOLERANCE)]
        if saltation:
            rows.append(("value", fit_slope(steps, time).slope, TOLERANCE))
        for what, value, bound in rows:
            measured[f"{name}: {what}"] = value
            expected[f"{name}: {what}"] = float(saltation)
            bounds[f"{name}: {what}"] = bound
    smallest = min(float(curves[way, True][0].min()) for way in WAYS)
    share = "change of the reference from rtol 1e-10, over the smallest error"
    measured[share] = float(np.linalg.norm(_gap(loose, truth))) / smallest
    expected[share], bounds[share] = 0.0, REFERENCE_SHARE
    left = float(curves["partial step", False][0][-1])
    measured["a gap without the saltation term"] = float(left > LEAST_GAP)
    expected["a gap without the saltation term"] = 1.0
    bounds["a gap without the saltation term"] = 0.0
    return Outcome.within(
        measured,
        expected,
        bounds,
        interval=fits[WAYS[0], True].interval,
        details={"dtype": "float64", "ball": BALL, "T": truth.time, "gap that stays": left},
        tables=[
            Table(
                "Relative errors over h",
                ["event within its step", "slope and interval", *[f"h = {h:.3g}" for h in steps]],
                [
                    [
                        way if saltation else f"{way}, no saltation term",
                        str(fits[way, saltation]),
                        *gradient.tolist(),
                    ]
                    for (way, saltation), (gradient, _) in curves.items()
                ],
                "Of the gradient, as root mean squares over phases; intervals of 95 %.",
            )
        ],
        figures=[_figure(steps, curves)],
    )


def _gap(one: Measured, truth: Measured) -> NDArray[np.float64]:
    exact = np.array(truth.gradient)
    return np.asarray((np.array(one.gradient) - exact) / np.linalg.norm(exact))


def _errors(
    truth: Measured, runs: Sequence[Measured], phases: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Root mean squares over the phases of each point: of the gradient, and of the value."""
    gradient = np.array([np.linalg.norm(_gap(one, truth)) for one in runs])
    time = np.array([abs(one.time - truth.time) / truth.time for one in runs])
    of_gradient, of_time = (
        np.sqrt((values.reshape(-1, phases) ** 2).mean(axis=1)) for values in (gradient, time)
    )
    return of_gradient, of_time


def _figure(
    steps: Sequence[float],
    curves: Mapping[tuple[str, bool], tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> Figure:
    figure, axes = new_figure()
    for position, ((way, saltation), (gradient, _)) in enumerate(curves.items()):
        axes.plot(
            steps,
            gradient,
            marker=MARKERS[position],
            color=COLOURS[position],
            markerfacecolor="white",
            label=way if saltation else f"{way}, no saltation term",
        )
    lowest = min(float(gradient[-1]) for gradient, _ in curves.values())
    line = 0.5 * lowest * np.array(steps) / steps[-1]
    axes.plot(steps, line, color="#555555", linestyle=(0, (4, 3)), label="slope 1")
    log_axes(axes)
    axes.set(xlabel=r"step size $h$ (flow time)", ylabel="relative error of the gradient")
    axes.legend(loc="best")
    caption = (
        "Autograd through Euler's iteration against the gradient of the flow, at the third "
        "impact. With the event found within its step the error falls with h; with the times of "
        "the earlier impacts held fixed it stays."
    )
    return Figure("orders", caption, figure, "two falling lines and one that stays level")
