"""Problems with events, public kinds and our own: doses, populations, spikes, switches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from event_oracle import Crossing, Known, Problem


def first(m: Any, p: Any, t: Any, x: Any) -> Any:
    return x[0]


def second(m: Any, p: Any, t: Any, x: Any) -> Any:
    return x[1]


def decays(m: Any, p: Any, t: Any, x: Any) -> Any:
    return [-p["k"] * x[0]]


def _superposition(p: Mapping[str, float]) -> list[float]:
    k = p["k"]
    at = [
        sum(p[f"dose{i}"] * math.exp(-k * (t - p[f"t{i}"])) for i in (1, 2, 3) if p[f"t{i}"] <= t)
        + 2.0 * math.exp(-k * t)
        for t in (2.5, 9.0)
    ]
    return [*at, 9.0 + math.log(at[1] / 0.5) / k]


DOSES = Problem(
    "doses at preset times that are leaves",
    "Julia Discourse, topic 91024 (derivatives to callback times)",
    flow=decays,
    start=lambda m, p: [2.0],
    leaves={"k": 0.4, "t1": 2.0, "t2": 4.0, "t3": 7.0, "dose1": 1.0, "dose2": 1.5, "dose3": 2.0},
    events=(
        Known("t1", reset=lambda m, p, t, x: [x[0] + p["dose1"]]),
        Known("t2", reset=lambda m, p, t, x: [x[0] + p["dose2"]]),
        Known("t3", reset=lambda m, p, t, x: [x[0] + p["dose3"]]),
        Crossing(first, 0.5, terminal=True),
    ),
    asked=(("at", 0, 0), ("at", 1, 0), ("end time",)),
    at=(2.5, 9.0),
    closed=_superposition,
)


def _refills(p: Mapping[str, float]) -> list[float]:
    k, level, dose = p["k"], p["level"], p["dose"]
    start = math.log(3.0 / level) / k
    again = math.log((level + dose) / level) / k
    return [start, start + 2 * again, level + dose]


REFILL = Problem(
    "a dose whenever the level has fallen to a threshold",
    "-",
    flow=decays,
    start=lambda m, p: [3.0],
    leaves={"k": 0.5, "level": 1.0, "dose": 1.5},
    events=(Crossing(first, "level", reset=lambda m, p, t, x: [x[0] + p["dose"]]),),
    asked=(("time", 0, 1), ("time", 0, 3), ("after", 0, 3, 0)),
    until=7.0,
    closed=_refills,
)


def _volterra(m: Any, p: Any, t: Any, x: Any) -> Any:
    return [x[0] * (p["a"] - p["b"] * x[1]), x[1] * (p["b"] * x[0] - p["d"])]


POPULATION = {"a": 1.1, "b": 0.5, "d": 0.8}

HARVEST = Problem(
    "predator and prey, with a harvest at a threshold",
    "-",
    flow=_volterra,
    start=lambda m, p: [1.0, 1.5],
    leaves={**POPULATION, "threshold": 2.0, "kept": 0.7},
    events=(
        Crossing(
            first,
            "threshold",
            direction="rising",
            reset=lambda m, p, t, x: [p["kept"] * x[0], x[1]],
        ),
    ),
    asked=(("time", 0, 1), ("time", 0, 2), ("at", 0, 0), ("at", 0, 1)),
    until=10.0,
    at=(9.5,),
)

MAXIMA = Problem(
    "maxima of prey and predator: zeros of their derivatives",
    "-",
    flow=_volterra,
    start=lambda m, p: [1.0, 1.5],
    leaves=POPULATION,
    events=(
        Crossing(lambda m, p, t, x: _volterra(m, p, t, x)[0], leave_first=True, count=2),
        Crossing(lambda m, p, t, x: _volterra(m, p, t, x)[1], leave_first=True),
    ),
    asked=(("time", 0, 1), ("state", 0, 1, 0), ("state", 1, 1, 1), ("end time",)),
)


def _sir(m: Any, p: Any, t: Any, x: Any) -> Any:
    new = p["beta"] * x[0] * x[1]
    return [-new, new - p["gamma"] * x[1]]


EPIDEMIC = Problem(
    "epidemic: peak, and time above the capacity of hospitals",
    "-",
    flow=_sir,
    start=lambda m, p: [0.999, 0.001],
    leaves={"beta": 0.5, "gamma": 0.15, "capacity": 0.12},
    events=(
        Crossing(second, "capacity", direction="either", count=2),
        Crossing(lambda m, p, t, x: p["beta"] * x[0], "gamma"),
    ),
    asked=(("time", 0, 1), ("end time",), ("time", 1, 1), ("state", 1, 1, 1)),
)


def _leaky(m: Any, p: Any, t: Any, x: Any) -> Any:
    return [(-x[0] + p["drive"] + p["wave"] * m.sin(2.0 * t)) / p["tau"]]


SPIKES = Problem(
    "leaky integrate-and-fire neuron with a wave",
    "SciMLTutorials, spiking neural systems",
    flow=_leaky,
    start=lambda m, p: [0.0],
    leaves={"drive": 1.5, "wave": 0.3, "tau": 0.7, "threshold": 1.0, "rest": 0.1},
    events=(
        Crossing(
            first,
            "threshold",
            direction="rising",
            reset=lambda m, p, t, x: [p["rest"]],
            count=8,
        ),
    ),
    asked=(("time", 0, 1), ("time", 0, 4), ("end time",)),
)

IZHIKEVICH = Problem(
    "Izhikevich's neuron: a reset of two variables",
    "SciMLTutorials, spiking neural systems",
    flow=lambda m, p, t, x: [
        0.04 * x[0] * x[0] + 5.0 * x[0] + 140.0 - x[1] + p["current"],
        p["a"] * (p["b"] * x[0] - x[1]),
    ],
    start=lambda m, p: [-65.0, -13.0],
    leaves={"a": 0.02, "b": 0.2, "c": -65.0, "d": 8.0, "current": 15.0},
    events=(
        Crossing(
            first,
            30.0,
            direction="rising",
            reset=lambda m, p, t, x: [p["c"], x[1] + p["d"]],
            count=2,
        ),
    ),
    asked=(("time", 0, 1), ("end time",)),
)

THERMOSTAT = Problem(
    "thermostat with two levels and a mode",
    "-",
    flow=lambda m, p, t, x: [p["k"] * (p["outside"] - x[0]) + p["heat"] * x[1], 0.0],
    start=lambda m, p: [18.0, 1.0],
    leaves={"k": 0.2, "outside": 5.0, "heat": 5.0, "low": 19.0, "high": 22.0},
    events=(
        Crossing(first, "high", direction="rising", reset=lambda m, p, t, x: [x[0], 0.0]),
        Crossing(first, "low", leave_first=True, reset=lambda m, p, t, x: [x[0], 1.0]),
    ),
    asked=(("time", 0, 1), ("time", 1, 1), ("time", 0, 2), ("at", 0, 0)),
    until=8.0,
    at=(7.5,),
)

REACTOR = Problem(
    "second-order reaction whose feed is switched on at a level",
    "-",
    flow=lambda m, p, t, x: [-p["k"] * x[0] * x[0] + p["feed"] * x[2], p["k"] * x[0] * x[0], 0.0],
    start=lambda m, p: [2.0, 0.0, 0.0],
    leaves={"k": 0.8, "feed": 1.0, "low": 0.6, "high": 0.9},
    events=(
        Crossing(first, "low", reset=lambda m, p, t, x: [x[0], x[1], 1.0]),
        Crossing(
            first,
            "high",
            direction="rising",
            leave_first=True,
            reset=lambda m, p, t, x: [x[0], x[1], 0.0],
        ),
        Crossing(second, 3.0, direction="rising", terminal=True),
    ),
    asked=(("time", 0, 1), ("time", 1, 1), ("end time",), ("end", 0)),
)

SIPHON = Problem(
    "water tank that a siphon empties",
    "-",
    flow=lambda m, p, t, x: [p["inflow"] - x[1] * p["pipe"] * m.sqrt(x[0]), 0.0],
    start=lambda m, p: [0.3, 0.0],
    leaves={"inflow": 0.2, "pipe": 0.6, "top": 1.0, "bottom": 0.2},
    events=(
        Crossing(first, "top", direction="rising", reset=lambda m, p, t, x: [x[0], 1.0]),
        Crossing(first, "bottom", reset=lambda m, p, t, x: [x[0], 0.0]),
    ),
    asked=(("time", 0, 1), ("time", 1, 1), ("time", 0, 2), ("at", 0, 0)),
    until=12.0,
    at=(11.5,),
)

VAN_DER_POL = Problem(
    "van der Pol: passages, and a period",
    "J. D. Cook's blog (SciPy)",
    flow=lambda m, p, t, x: [x[1], p["mu"] * (1 - x[0] * x[0]) * x[1] - x[0]],
    start=lambda m, p: [2.0, p["v"]],
    leaves={"mu": 1.5, "v": 0.1},
    events=(Crossing(first, direction="rising", leave_first=True, count=2),),
    asked=(("time", 0, 1), ("end time",), ("end", 1)),
)

POINCARE = Problem(
    "Henon and Heiles: points on a Poincare section",
    "`poincare.py` of the program taylor",
    flow=lambda m, p, t, x: [
        x[2],
        x[3],
        -x[0] - 2.0 * p["c"] * x[0] * x[1],
        -x[1] - p["c"] * (x[0] * x[0] - x[1] * x[1]),
    ],
    start=lambda m, p: [0.0, 0.1, p["v"], 0.1],
    leaves={"c": 1.0, "v": 0.35},
    events=(Crossing(first, direction="rising", leave_first=True, count=3),),
    asked=(("state", 0, 1, 1), ("state", 0, 2, 3), ("end time",), ("end", 1)),
)

TWO_EXITS = Problem(
    "several terminal events: the first one wins",
    "diffrax, tests of events",
    flow=lambda m, p, t, x: [p["u"] + 0.3 * x[1], -p["w"] * x[0]],
    start=lambda m, p: [0.2, 0.5],
    leaves={"u": 0.8, "w": 0.5, "right": 1.0, "below": -2.0},
    events=(
        Crossing(second, "below", terminal=True),
        Crossing(first, "right", direction="rising", terminal=True),
    ),
    asked=(("end time",), ("time", 1, 1), ("end", 1)),
)

SCALED = Problem(
    "event function with a parameter of its own",
    "diffrax, tests of events (a threshold)",
    flow=lambda m, p, t, x: [-p["k"] * x[0], -0.5 * x[1] * x[1]],
    start=lambda m, p: [2.0, 1.0],
    leaves={"k": 0.9, "scale": 1.3, "shift": 0.2, "target": 0.8},
    events=(
        Crossing(
            lambda m, p, t, x: p["scale"] * x[0] + m.exp(-p["shift"] * t) * x[1] ** 2,
            "target",
            terminal=True,
        ),
    ),
    asked=(("end time",), ("end", 0)),
)

FADING = Problem(
    "reset that depends on the time and on a parameter",
    "-",
    flow=decays,
    start=lambda m, p: [p["start"]],
    leaves={"k": 0.6, "start": 2.0, "a": 1.5, "fade": 0.15, "level": 0.7},
    events=(
        Crossing(
            first,
            "level",
            reset=lambda m, p, t, x: [x[0] + p["a"] * m.exp(-p["fade"] * t)],
            count=4,
        ),
    ),
    asked=(("time", 0, 2), ("after", 0, 3, 0), ("end time",)),
)


def _buck(m: Any, p: Any, t: Any, x: Any) -> Any:
    current, voltage, on = x
    return [(on * 12.0 - voltage) / p["l"], (current - voltage / p["load"]) / 0.5, 0.0]


def _switch(value: float) -> Any:
    return lambda m, p, t, x: [x[0], x[1], value]


CONVERTER = Problem(
    "power converter: switched at known times by its duty cycle",
    "-",
    flow=_buck,
    start=lambda m, p: [0.0, 0.0, 1.0],
    leaves={"duty": 0.4, "period": 0.5, "l": 1.2, "load": 2.0},
    events=tuple(
        event
        for k in range(4)
        for event in (
            Known(lambda m, p, k=k: (k + p["duty"]) * p["period"], reset=_switch(0.0)),
            Known(lambda m, p, k=k: (k + 1.0) * p["period"], reset=_switch(1.0)),
        )
    ),
    asked=(("at", 0, 0), ("at", 0, 1), ("state", 4, 1, 0)),
    until=2.2,
    at=(2.15,),
)

SAMPLED = Problem(
    "unstable rod held by a sampled controller, until it is let go",
    "docs of DiffEqCallbacks.jl (PeriodicCallback)",
    flow=lambda m, p, t, x: [x[1], p["g"] * m.sin(x[0]) + x[2], 0.0],
    start=lambda m, p: [0.2, 0.0, 0.0],
    leaves={"g": 4.0, "place": 9.0, "rate": 4.0, "off": 0.85},
    events=(
        *(
            Known(
                0.1 + 0.2 * k,
                reset=lambda m, p, t, x: [x[0], x[1], -p["place"] * x[0] - p["rate"] * x[1]],
            )
            for k in range(4)
        ),
        Known("off", reset=lambda m, p, t, x: [x[0], x[1], 0.0]),
        Crossing(lambda m, p, t, x: abs(x[0]), 1.0, direction="rising", terminal=True),
    ),
    asked=(("at", 0, 0), ("end time",), ("end", 1)),
    at=(0.8,),
)


def _mixed(p: Mapping[str, float]) -> list[float]:
    hot = p["room"] + (90.0 - p["room"]) * math.exp(-p["k"] * p["milk"])
    both = 0.8 * hot + 0.2 * 5.0
    return [both, p["milk"] + math.log((both - p["room"]) / (60.0 - p["room"])) / p["k"]]


COFFEE = Problem(
    "coffee with milk at a learned time",
    "-",
    flow=lambda m, p, t, x: [-p["k"] * (x[0] - p["room"])],
    start=lambda m, p: [90.0],
    leaves={"k": 0.05, "room": 20.0, "milk": 3.0},
    events=(
        Known("milk", reset=lambda m, p, t, x: [0.8 * x[0] + 0.2 * 5.0]),
        Crossing(first, 60.0, terminal=True),
    ),
    asked=(("after", 0, 1, 0), ("end time",)),
    closed=_mixed,
)


def _infused(p: Mapping[str, float]) -> list[float]:
    k, rate, begin, end = (p[name] for name in ("k", "rate", "begin", "end"))
    level = rate / k * (1 - math.exp(-k * (end - begin)))
    rises = begin - math.log(1 - p["level"] * k / rate) / k
    return [rises, end + math.log(level / p["level"]) / k, level * math.exp(-k * (8.0 - end))]


INFUSION = Problem(
    "infusion from a learned start to a learned end",
    "SciPy, issue 18039 (a source that jumps)",
    flow=lambda m, p, t, x: [-p["k"] * x[0] + (p["rate"] if p["begin"] <= t < p["end"] else 0.0)],
    start=lambda m, p: [0.0],
    leaves={"k": 0.3, "rate": 2.0, "begin": 1.0, "end": 3.5, "level": 1.2},
    events=(Crossing(first, "level", direction="either"),),
    asked=(("time", 0, 1), ("time", 0, 2), ("at", 0, 0)),
    until=9.0,
    at=(8.0,),
    breakpoints=("begin", "end"),
    closed=_infused,
)

STEADY = Problem(
    "steady state: the velocity has become small",
    "diffrax, `steady_state_event`",
    flow=lambda m, p, t, x: [p["a"] - x[0] - x[0] * x[1], p["b"] * x[0] - x[1]],
    start=lambda m, p: [0.0, 0.0],
    leaves={"a": 1.0, "b": 0.7},
    events=(
        Crossing(
            lambda m, p, t, x: (p["a"] - x[0] - x[0] * x[1]) ** 2 + (p["b"] * x[0] - x[1]) ** 2,
            1e-6,
            terminal=True,
        ),
    ),
    asked=(("end time",), ("end", 0), ("end", 1)),
)

CLOCK = Problem(
    "event of the time alone, and one of time and state",
    "diffrax, tests of events",
    flow=lambda m, p, t, x: [x[1], -p["w"] * x[0] + m.cos(t)],
    start=lambda m, p: [1.0, 0.0],
    leaves={"w": 2.5, "when": 6.3, "ramp": 0.1},
    t0=0.5,
    events=(
        Crossing(lambda m, p, t, x: t, "when", direction="rising", terminal=True),
        Crossing(lambda m, p, t, x: x[0] - p["ramp"] * t, direction="either"),
    ),
    asked=(("end time",), ("end", 0), ("time", 1, 1), ("time", 1, 3)),
)

RATES = (
    DOSES,
    REFILL,
    HARVEST,
    MAXIMA,
    EPIDEMIC,
    SPIKES,
    IZHIKEVICH,
    THERMOSTAT,
    REACTOR,
    SIPHON,
    VAN_DER_POL,
    POINCARE,
    TWO_EXITS,
    SCALED,
    FADING,
    CONVERTER,
    SAMPLED,
    COFFEE,
    INFUSION,
    STEADY,
    CLOCK,
)
