"""A bouncing ball: times of impact and heights behind them against closed forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ode_stopping import Event, Solution, Status, integrate

from ..registry import Context, Outcome, Table, check
from ._events import errors_of, jacobian, leaves_of, worst_figure
from ._rotated import ROUTES

IMPACTS = 8
BOUND = 1e-7
VALUE_BOUND = 1e-9
# Outputs of the routes that are not looked at one by one: impacts 1 and 8, and the height.
FEWER = (0, 7, 8)
ALL = tuple(range(IMPACTS + 1))
# Between impacts 5 and 6, in shares of the way from one to the other.
SHARE = 0.4
START = {"h0": 2.0, "v0": 0.0, "g": 9.81, "e": 0.8, "floor": 0.0, "t0": 0.25}
# Bounces at half the speed end after three times the first fall.
ZENO_RESTITUTION = 0.5


@dataclass(frozen=True)
class Cell:
    """One solve: a route, and the outputs that are differentiated; number 8 is the height."""

    route: str
    outputs: tuple[int, ...] = ALL


@dataclass(frozen=True)
class Errors:
    """Errors of one solve.

    Attributes:
        values: The largest relative error of an impact time, and that of the height.
        leaves: The largest relative error of a derivative, by leaf.
        rows: Likewise by output, in the order of the cell's.
    """

    values: float
    leaves: dict[str, float]
    rows: list[float]


def impact_times(leaves: dict[str, Tensor], n: int) -> Tensor:
    """T_1 .. T_n, shape (n,), with their graph.

    With V the speed at the first impact, V^2 = v0^2 + 2 g (h0 - floor),

        T_n = t0 + (v0 + V)/g + (2 V/g) sum_{k=1}^{n-1} e^k.
    """
    v, g, e = leaves["v0"], leaves["g"], leaves["e"]
    speed = (v * v + 2 * g * (leaves["h0"] - leaves["floor"])).sqrt()
    powers = torch.stack([e**k if k else torch.zeros_like(e) for k in range(n)])
    return leaves["t0"] + (v + speed) / g + 2 * speed / g * powers.cumsum(0)


def height(leaves: dict[str, Tensor], n: int) -> Tensor:
    """The height at the time `at`, between impacts n and n + 1, shape ()."""
    v, g = leaves["v0"], leaves["g"]
    speed = (v * v + 2 * g * (leaves["h0"] - leaves["floor"])).sqrt()
    since = leaves["at"] - impact_times(leaves, n)[-1]
    return leaves["floor"] + leaves["e"] ** n * speed * since - g * since * since / 2


def ball_leaves() -> dict[str, Tensor]:
    """Everything the outputs depend on, the time at which the height is asked for among it."""
    leaves = leaves_of(START)
    times = impact_times(leaves, 6).detach()
    at = float(times[4] + SHARE * (times[5] - times[4]))
    return {**leaves, **leaves_of({"at": at})}


def bounce(leaves: dict[str, Tensor], route: str, impacts: int | None) -> Solution:
    """The ball by the library, at default settings; without `impacts` up to t = 10."""
    end = {"until": 10.0} if impacts is None else {"at": [leaves["at"]]}
    return integrate(
        lambda t, s: torch.stack([s[1], -leaves["g"]]),
        torch.stack([leaves["h0"], leaves["v0"]]),
        t0=leaves["t0"],
        events=[
            Event(
                lambda t, s: s[0],
                leaves["floor"],
                reset=lambda t, s: torch.stack([s[0], -leaves["e"] * s[1]]),
                count=impacts,
            )
        ],
        gradient=ROUTES[route](),
        **end,
    )


def solve(cell: Cell) -> Errors:
    """Errors of the times of impact, of the height, and of all their derivatives."""
    leaves = ball_leaves()
    solution = bounce(leaves, cell.route, IMPACTS)
    assert isinstance(solution.states, Tensor)
    found = torch.stack([*(hit.time for hit in solution.hits), solution.states[0, 0]])
    exact = torch.cat([impact_times(leaves, IMPACTS), height(leaves, 5).reshape(1)])
    values = ((found - exact).abs() / exact.abs()).detach()
    chosen = list(cell.outputs)
    ours, truth = jacobian(found[chosen], leaves), jacobian(exact[chosen], leaves)
    rows = [
        max(errors_of(ours[n : n + 1], truth[n : n + 1], leaves).values())
        for n in range(len(chosen))
    ]
    return Errors(float(values.max()), errors_of(ours, truth, leaves), rows)


def zeno() -> tuple[bool, float]:
    """Whether bounces without an end are told, and by how much the time so far misses the limit."""
    leaves = {**ball_leaves(), **leaves_of({"e": ZENO_RESTITUTION})}
    solution = bounce(leaves, "StepAdjoint", None)
    e = ZENO_RESTITUTION
    first = float(impact_times(leaves, 1)[0].detach()) - START["t0"]
    limit = START["t0"] + first * (1 + 2 * e / (1 - e))
    time = float(solution.end.time.detach())
    return solution.status is Status.ZENO, abs(time - limit) / limit


@check(
    name="events-ball",
    title="A bouncing ball: eight impacts and the height between them",
    source="Theorem 1 and the saltation formula",
    group="events",
    order=90,
)
def events_ball(context: Context) -> Outcome:
    """Times of impact 1 to 8, the height behind the fifth, and all derivatives, by every route.

    A ball falls from h0 = 2 at t0 = 0.25 with g = 9.81; at the floor its speed turns round and
    keeps the share e = 0.8. T_n = t0 + sqrt(2 h0/g) (1 + 2 sum_{k=1}^{n-1} e^k) where v0 = 0. The
    derivatives are those to h0, v0, g, e, the height of the floor (the target), t0, and the time at
    which the height is asked for, one backward pass an output. Bounces at e = 0.5 that are given
    no end come ever faster, and have to be told as ZENO at their limit, 3 sqrt(2 h0/g) after t0.

    Measured: by route, the largest relative error of a derivative (the error itself where the
    derivative is zero) and of the values. Tolerance: 1e-7 and 1e-9, at default settings and in
    float64. Quick: of the routes that are not the default impacts 1 and 8 and the height.
    """
    others = context.choose(quick=FEWER, paper=ALL)
    first, *rest = ROUTES
    return judge_ball(context, [Cell(first), *(Cell(route, others) for route in rest)])


def judge_ball(context: Context, cells: Sequence[Cell]) -> Outcome:
    """The check on a choice of routes and outputs.

    Args:
        context: The settings.
        cells: One a route.
    """
    solved = context.map(solve, cells)
    found = {cell.route: errors for cell, errors in zip(cells, solved, strict=True)}
    told, miss = zeno()
    measured: dict[str, float] = {}
    bounds: dict[str, float] = {}
    for route, errors in found.items():
        measured[f"derivatives: {route}"] = float(np.max(list(errors.leaves.values())))
        bounds[f"derivatives: {route}"] = BOUND
    measured["values"] = float(np.max([errors.values for errors in found.values()]))
    measured["end of a Zeno sequence"], bounds["values"] = miss, VALUE_BOUND
    bounds["end of a Zeno sequence"] = VALUE_BOUND
    measured["Zeno sequences that are not told"] = float(not told)
    bounds["Zeno sequences that are not told"] = 0.0
    names = list(next(iter(found.values())).leaves)
    return Outcome.below(
        measured,
        bounds,
        details={"dtype": "float64", "start": START, "share of the flight": SHARE},
        tables=[
            Table(
                "Largest relative error of a derivative, by leaf",
                ["route", *names],
                [[route, *(one.leaves[name] for name in names)] for route, one in found.items()],
                "Over the outputs that were differentiated; the error itself where that is zero.",
            )
        ],
        figures=[
            worst_figure(
                "impacts",
                {c.route: ([n + 1 for n in c.outputs], found[c.route].rows) for c in cells},
                label="output: impacts 1 to 8, then the height",
                bound=BOUND,
                caption="The largest relative error of a derivative, by output and "
                "route. Errors are rounding: the flight is a polynomial, so they must not grow "
                "from one impact to the next.",
            )
        ],
    )
