"""Problems with events, public kinds and our own: what flies, bounces, swings and collides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from event_oracle import Crossing, Known, Problem


def height(m: Any, p: Any, t: Any, x: Any) -> Any:
    return x[0]


def speed(m: Any, p: Any, t: Any, x: Any) -> Any:
    return x[1]


def falls(m: Any, p: Any, t: Any, x: Any) -> Any:
    return [x[1], -p["g"]]


def bounces(m: Any, p: Any, t: Any, x: Any) -> Any:
    return [0.0, -p["e"] * x[1]]


def _cannon(p: Mapping[str, float]) -> list[float]:
    v, g = p["v"], p["g"]
    return [v / g, v * v / (2 * g), 2 * v / g, -v]


CANNON = Problem(
    "cannon from the ground, apogee and landing",
    "SciPy, docstring of `solve_ivp`",
    flow=falls,
    start=lambda m, p: [0.0, p["v"]],
    leaves={"v": 10.0, "g": 9.81},
    # It stands on its own event: leave_first asks for the landing.
    events=(Crossing(speed), Crossing(height, terminal=True, leave_first=True)),
    asked=(("time", 0, 1), ("state", 0, 1, 0), ("time", 1, 1), ("end", 1)),
    closed=_cannon,
)


def _drag(m: Any, p: Any, t: Any, x: Any) -> Any:
    _, _, vx, vy = x
    drag = p["k"] * m.sqrt(vx * vx + vy * vy)
    return [vx, vy, -drag * vx, -p["g"] - drag * vy]


SHELL = Problem(
    "shell with quadratic drag: apogee and range",
    "SciPy, issue 10319 (a fall with drag)",
    flow=_drag,
    start=lambda m, p: [0.0, 1.5, p["v"] * m.cos(p["angle"]), p["v"] * m.sin(p["angle"])],
    leaves={"v": 30.0, "angle": 0.8, "k": 0.01, "g": 9.81},
    events=(
        Crossing(lambda m, p, t, x: x[3]),
        Crossing(lambda m, p, t, x: x[1], terminal=True),
    ),
    asked=(("state", 0, 1, 1), ("end time",), ("end", 0)),
)


def _ball(p: Mapping[str, float]) -> list[float]:
    h, g, e = p["h"], p["g"], p["e"]
    fall = math.sqrt(2 * h / g)
    hits = [fall * (1 + 2 * sum(e**k for k in range(1, n))) for n in range(1, 7)]
    since = 6.0 - hits[4]
    return [hits[0], hits[4], e**5 * g * fall * since - g * since**2 / 2]


BALL = Problem(
    "bouncing ball: impacts and a later height",
    "docs of DifferentialEquations.jl and SciMLSensitivity",
    flow=falls,
    start=lambda m, p: [p["h"], 0.0],
    leaves={"h": 5.0, "g": 9.81, "e": 0.8},
    events=(Crossing(height, reset=bounces),),
    asked=(("time", 0, 1), ("time", 0, 5), ("at", 0, 0)),
    until=6.1,
    at=(6.0,),
    closed=_ball,
)

WALLS = Problem(
    "ball between two walls on a floor",
    "-",
    flow=lambda m, p, t, x: [x[2], x[3], 0.0, -p["g"]],
    start=lambda m, p: [0.0, 5.0, p["vx"], 0.0],
    leaves={"vx": 4.0, "g": 9.81, "floor": 0.9, "wall": 0.8, "width": 3.0},
    events=(
        Crossing(
            lambda m, p, t, x: x[1],
            reset=lambda m, p, t, x: [x[0], 0.0, x[2], -p["floor"] * x[3]],
        ),
        Crossing(
            lambda m, p, t, x: x[0],
            "width",
            direction="rising",
            reset=lambda m, p, t, x: [p["width"], x[1], -p["wall"] * x[2], x[3]],
        ),
        Crossing(
            lambda m, p, t, x: x[0],
            leave_first=True,
            reset=lambda m, p, t, x: [0.0, x[1], -p["wall"] * x[2], x[3]],
        ),
    ),
    asked=(("time", 0, 2), ("time", 2, 1), ("at", 0, 0), ("at", 0, 1)),
    until=4.0,
    at=(3.9,),
)


def _mirror(m: Any, p: Any, t: Any, x: Any) -> Any:
    s, c = m.sin(p["slope"]), m.cos(p["slope"])
    normal = -s * x[2] + c * x[3]
    return [x[0], x[1], x[2] + (1 + p["e"]) * normal * s, x[3] - (1 + p["e"]) * normal * c]


INCLINE = Problem(
    "ball that bounces down an inclined plane",
    "-",
    flow=lambda m, p, t, x: [x[2], x[3], 0.0, -p["g"]],
    start=lambda m, p: [0.0, p["h"], 0.3, 0.0],
    leaves={"h": 1.0, "g": 9.81, "e": 0.7, "slope": -0.3},
    events=(
        Crossing(
            lambda m, p, t, x: m.cos(p["slope"]) * x[1] - m.sin(p["slope"]) * x[0],
            reset=_mirror,
            count=4,
        ),
    ),
    asked=(("time", 0, 2), ("state", 0, 3, 0), ("end time",), ("after", 0, 4, 3)),
)


def _kicked(m: Any, p: Any, t: Any, x: Any) -> Any:
    table = p["a"] * p["w"] * m.cos(p["w"] * t)
    return [x[0], (1 + p["e"]) * table - p["e"] * x[1]]


TABLE = Problem(
    "ball on a table that swings up and down",
    "-",
    flow=falls,
    start=lambda m, p: [p["h"], 0.0],
    leaves={"h": 1.2, "g": 9.81, "e": 0.75, "a": 0.05, "w": 7.0},
    events=(Crossing(lambda m, p, t, x: x[0] - p["a"] * m.sin(p["w"] * t), reset=_kicked),),
    asked=(("time", 0, 1), ("time", 0, 3), ("after", 0, 3, 1), ("at", 0, 0)),
    until=2.4,
    at=(2.3,),
)

TWO_BALLS = Problem(
    "two balls that land at the same time",
    "-",
    flow=lambda m, p, t, x: [x[1], -p["g"], x[3], -p["g"]],
    start=lambda m, p: [p["h"], 0.0, p["h"], 0.0],
    leaves={"h": 2.0, "g": 9.81, "first": 0.9, "second": 0.6},
    events=(
        Crossing(height, reset=lambda m, p, t, x: [0.0, -p["first"] * x[1], x[2], x[3]]),
        Crossing(
            lambda m, p, t, x: x[2],
            reset=lambda m, p, t, x: [x[0], x[1], 0.0, -p["second"] * x[3]],
        ),
    ),
    asked=(("time", 0, 1), ("time", 1, 1), ("time", 0, 2), ("time", 1, 2), ("at", 0, 0)),
    until=1.9,
    at=(1.8,),
)


def _pendulum(m: Any, p: Any, t: Any, x: Any) -> Any:
    return [x[1], -p["g"] / p["l"] * m.sin(x[0]) - p["c"] * x[1]]


PENDULUM = Problem(
    "pendulum: passages in both directions",
    "docs of DifferentialEquations.jl (passages of an oscillator)",
    flow=_pendulum,
    start=lambda m, p: [p["angle"], 0.0],
    leaves={"angle": 1.2, "g": 9.81, "l": 1.0, "c": 0.1},
    events=(Crossing(height, direction="either", count=5), Crossing(speed, direction="either")),
    asked=(("time", 0, 2), ("end time",), ("end", 1), ("state", 1, 2, 0)),
)

STOP = Problem(
    "pendulum that hits a stop",
    "-",
    flow=_pendulum,
    start=lambda m, p: [1.0, 0.0],
    leaves={"g": 9.81, "l": 1.0, "c": 0.05, "e": 0.8, "stop": -0.4},
    events=(
        Crossing(height, "stop", reset=lambda m, p, t, x: [p["stop"], -p["e"] * x[1]], count=3),
    ),
    asked=(("time", 0, 1), ("time", 0, 2), ("end time",), ("end", 1)),
)


def _stick_slip(m: Any, p: Any, t: Any, x: Any) -> Any:
    place, velocity, sticks = x
    slips = (-p["k"] * place + p["kinetic"]) * (1 - sticks)
    return [velocity, slips, 0.0]


BELT = Problem(
    "block with a spring on a belt: sticks and slips, a mode in the state",
    "-",
    flow=_stick_slip,
    start=lambda m, p: [0.0, 0.0, 0.0],
    leaves={"k": 4.0, "kinetic": 2.0, "static": 3.0, "belt": 0.6},
    events=(
        # Where it sticks, the criterion is held away from its target by the mode.
        Crossing(
            lambda m, p, t, x: x[1] - p["belt"] - x[2],
            direction="rising",
            reset=lambda m, p, t, x: [x[0], p["belt"], 1.0],
        ),
        Crossing(
            lambda m, p, t, x: p["k"] * x[0] - 10.0 * (1 - x[2]),
            "static",
            direction="rising",
            reset=lambda m, p, t, x: [x[0], x[1], 0.0],
        ),
    ),
    asked=(("time", 0, 1), ("time", 1, 1), ("time", 0, 2), ("time", 1, 2), ("at", 0, 0)),
    until=8.0,
    at=(7.0,),
)


def _backlash(m: Any, p: Any, t: Any, x: Any) -> Any:
    return [x[1], p["drive"] * m.cos(3.0 * t) - p["c"] * x[1], x[3], -p["c"] * x[3]]


def _impact(m: Any, p: Any, t: Any, x: Any) -> Any:
    # Momentum is kept; the relative velocity turns with restitution. Masses 1 and m2.
    mass, gap = p["m2"], x[1] - x[3]
    return [
        x[0],
        x[1] - (1 + p["e"]) * gap * mass / (1 + mass),
        x[2],
        x[3] + (1 + p["e"]) * gap / (1 + mass),
    ]


GEARS = Problem(
    "two masses with backlash between them",
    "Modelica Standard Library, Rotational.Examples.Backlash (elastic there)",
    flow=_backlash,
    start=lambda m, p: [0.0, 0.0, 0.0, 0.0],
    leaves={"drive": 5.0, "c": 0.2, "e": 0.5, "m2": 1.7, "gap": 0.3},
    events=(
        Crossing(lambda m, p, t, x: x[0] - x[2], "gap", direction="rising", reset=_impact),
        Crossing(lambda m, p, t, x: x[0] - x[2] + p["gap"], reset=_impact),
    ),
    asked=(("time", 0, 1), ("time", 1, 1), ("at", 0, 2), ("at", 0, 3)),
    until=3.0,
    at=(2.8,),
)


def _rocket(m: Any, p: Any, t: Any, x: Any) -> Any:
    _, v, mass, first, second = x
    thrust = first * p["thrust"] + second * 0.4 * p["thrust"]
    burns = first * p["burn"] + second * 0.4 * p["burn"]
    return [v, thrust / mass - 9.81 - p["drag"] * v * abs(v) / mass, -burns, 0.0, 0.0]


ROCKET = Problem(
    "rocket that drops its first stage at a learned time",
    "-",
    flow=_rocket,
    start=lambda m, p: [0.0, 0.0, 10.0, 1.0, 0.0],
    leaves={"stage": 2.0, "thrust": 250.0, "burn": 1.5, "dry": 3.0, "drag": 0.002, "empty": 2.5},
    events=(
        Known("stage", reset=lambda m, p, t, x: [x[0], x[1], x[2] - p["dry"], 0.0, 1.0]),
        Crossing(
            lambda m, p, t, x: x[2], "empty", reset=lambda m, p, t, x: [x[0], x[1], x[2], 0.0, 0.0]
        ),
        Crossing(speed, terminal=True, leave_first=True),
    ),
    asked=(("time", 1, 1), ("after", 0, 1, 2), ("end time",), ("end", 0)),
)


def _planets(m: Any, p: Any, t: Any, x: Any) -> Any:
    # A star of mass 1 at rest, a small planet, and a companion on a circle of radius 3.
    cx, cy = 3.0 * m.cos(0.2 * t), 3.0 * m.sin(0.2 * t)
    star = (x[0] ** 2 + x[1] ** 2) ** 1.5
    dx, dy = x[0] - cx, x[1] - cy
    other = (dx**2 + dy**2) ** 1.5 / p["mass"]
    return [x[2], x[3], -x[0] / star - dx / other, -x[1] / star - dy / other]


PERIAPSIS = Problem(
    "three bodies: passages of the periapsis",
    "MATLAB, `orbitode` (zeros of the derivative of a distance)",
    flow=_planets,
    start=lambda m, p: [1.2, 0.0, 0.0, p["v"]],
    leaves={"v": 0.85, "mass": 0.02},
    events=(
        Crossing(
            lambda m, p, t, x: x[0] * x[2] + x[1] * x[3],
            direction="rising",
            count=2,
            leave_first=True,
        ),
    ),
    asked=(("time", 0, 1), ("state", 0, 1, 0), ("end time",)),
)


def _hopper(m: Any, p: Any, t: Any, x: Any) -> Any:
    # A point mass 1 on a spring leg: y, v and the phase (1: on the ground).
    return [x[1], x[2] * p["k"] * (p["leg"] - x[0]) - 9.81, 0.0]


def _touches(m: Any, p: Any, t: Any, x: Any) -> Any:
    return [p["leg"], x[1], 1.0]


HOPPER = Problem(
    "hopper: flight, stance, flight",
    "papers on the spring-loaded inverted pendulum",
    flow=_hopper,
    start=lambda m, p: [p["h"], 0.0, 0.0],
    leaves={"h": 1.4, "k": 400.0, "leg": 1.0, "kick": 1.1},
    events=(
        # Each criterion is held away from its target in the phase that does not ask for it.
        Crossing(lambda m, p, t, x: x[0] + 10.0 * x[2], "leg", reset=_touches),
        Crossing(
            lambda m, p, t, x: x[0] - 10.0 * (1.0 - x[2]),
            "leg",
            direction="rising",
            leave_first=True,
            reset=lambda m, p, t, x: [p["leg"], p["kick"] * x[1], 0.0],
        ),
        Crossing(lambda m, p, t, x: x[1] - 100.0 * x[2], leave_first=True, count=2),
    ),
    asked=(("time", 0, 1), ("time", 1, 1), ("state", 2, 1, 0), ("end time",)),
)

COLLISION = Problem(
    "two carts between a wall and each other",
    "-",
    flow=lambda m, p, t, x: [x[1], -p["c"] * x[1], x[3], -p["c"] * x[3]],
    start=lambda m, p: [1.0, 0.0, 3.0, -p["v"]],
    leaves={"v": 2.0, "c": 0.1, "e": 0.9, "m2": 2.0},
    events=(
        Crossing(lambda m, p, t, x: x[2] - x[0], 0.5, reset=_impact),
        Crossing(height, reset=lambda m, p, t, x: [0.0, -p["e"] * x[1], x[2], x[3]]),
    ),
    asked=(("time", 0, 1), ("time", 1, 1), ("time", 0, 2), ("at", 0, 0)),
    until=6.0,
    at=(5.0,),
)

MECHANICS = (
    CANNON,
    SHELL,
    BALL,
    WALLS,
    INCLINE,
    TABLE,
    TWO_BALLS,
    PENDULUM,
    STOP,
    BELT,
    GEARS,
    ROCKET,
    PERIAPSIS,
    HOPPER,
    COLLISION,
)
