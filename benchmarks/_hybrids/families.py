"""Random hybrid problems, family by family: velocity, watches, numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.random import Generator

from .problem import DIRECTIONS, Hybrid, Values, Watch

Family = Callable[[Generator], "Sketch"]
FAMILIES: dict[str, Family] = {}


@dataclass(frozen=True)
class Sketch:
    """A problem that has no end, no fixed times and no L yet.

    Attributes:
        velocity: See `Hybrid`, as all others.
        leaves: All but "t0", "until" and "at"; times are those since t0.
        watches: In order.
        span: How long the path may be.
        times: Names of the leaves that are times.
        constants: What else p holds.
        breakpoints: Names.
    """

    velocity: Any
    leaves: dict[str, Any]
    watches: tuple[Watch, ...]
    span: float
    times: tuple[str, ...] = ()
    constants: dict[str, Any] = field(default_factory=dict)
    breakpoints: tuple[str, ...] = ()

    def starting_at(self, t0: float, family: str) -> Hybrid:
        """The problem with its clock at t0."""
        leaves = {n: v + t0 if n in self.times else v for n, v in self.leaves.items()}
        leaves["t0"] = t0
        return Hybrid(family, self.velocity, leaves, self.watches, self.constants, self.breakpoints)


def _family(make: Family) -> Family:
    FAMILIES[make.__name__] = make
    return make


def _log_uniform(rng: Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(math.log(low), math.log(high))))


def _uniform(rng: Generator, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


@_family
def bouncing_ball(rng: Generator) -> Sketch:
    """Fall with linear drag on a flat floor, restitution e; perhaps its apexes."""
    leaves = {
        "x0": np.array([_uniform(rng, 0.6, 2.0), _uniform(rng, -0.5, 1.0)]),
        "g": _uniform(rng, 4.0, 12.0),
        "drag": _log_uniform(rng, 0.02, 0.5),
        "e": _uniform(rng, 0.6, 0.95),
        "floor": _uniform(rng, -0.2, 0.2),
        "still": 0.0,
    }
    bounce = Watch(
        lambda xp, t, x, p: x[0],
        "floor",
        reset=lambda xp, t, x, p: xp.stack([x[0], -p["e"] * x[1]]),
    )
    apex = Watch(lambda xp, t, x, p: x[1], "still")

    def velocity(xp: Any, t: Any, x: Any, p: Values, on: Any) -> Any:
        return xp.stack([x[1], -p["g"] - p["drag"] * x[1]])

    watches = (bounce, apex) if rng.random() < 0.5 else (bounce,)
    if len(watches) == 1:
        del leaves["still"]
    return Sketch(velocity, leaves, watches, 4.0)


@_family
def ball_on_moving_floor(rng: Generator) -> Sketch:
    """The floor is at A sin(w t): J and the reset depend on t."""
    leaves = {
        "x0": np.array([_uniform(rng, 0.8, 2.0), _uniform(rng, -0.5, 1.0)]),
        "g": _uniform(rng, 4.0, 12.0),
        "drag": _log_uniform(rng, 0.02, 0.3),
        "e": _uniform(rng, 0.6, 0.9),
        "A": _uniform(rng, 0.02, 0.08),
        "w": _uniform(rng, 2.0, 9.0),
        "gap": _uniform(rng, 0.0, 0.1),
    }

    def reset(xp: Any, t: Any, x: Any, p: Values) -> Any:
        floor = p["A"] * p["w"] * xp.cos(p["w"] * t)
        return xp.stack([x[0], -p["e"] * x[1] + (1 + p["e"]) * floor])

    bounce = Watch(lambda xp, t, x, p: x[0] - p["A"] * xp.sin(p["w"] * t), "gap", reset=reset)

    def velocity(xp: Any, t: Any, x: Any, p: Values, on: Any) -> Any:
        return xp.stack([x[1], -p["g"] - p["drag"] * x[1]])

    return Sketch(velocity, leaves, (bounce,), 3.0)


@_family
def integrate_and_fire(rng: Generator) -> Sketch:
    """A leaky neuron with sinusoidal input, reset and adaptation; perhaps a lower level."""
    leaves = {
        "x0": np.array([_uniform(rng, -0.3, 0.5), _uniform(rng, 0.0, 0.2)]),
        "tau": _uniform(rng, 0.5, 1.5),
        "I": _uniform(rng, 2.0, 4.0),
        "b": _uniform(rng, 0.1, 0.5),
        "w": _uniform(rng, 1.0, 8.0),
        "tau_w": _uniform(rng, 1.0, 4.0),
        "jump": _uniform(rng, 0.02, 0.2),
        "rest": _uniform(rng, -0.3, 0.2),
        "threshold": _uniform(rng, 0.9, 1.2),
        "level": _uniform(rng, 0.55, 0.75),
    }

    def velocity(xp: Any, t: Any, x: Any, p: Values, on: Any) -> Any:
        current = p["I"] * (1 + p["b"] * xp.sin(p["w"] * t))
        return xp.stack([(current - x[0] - x[1]) / p["tau"], -x[1] / p["tau_w"]])

    fire = Watch(
        lambda xp, t, x, p: x[0],
        "threshold",
        "rising",
        reset=lambda xp, t, x, p: xp.stack([p["rest"] + 0.05 * x[1], x[1] + p["jump"]]),
    )
    below = Watch(lambda xp, t, x, p: x[0], "level", "rising")
    watches = (fire, below) if rng.random() < 0.4 else (fire,)
    if len(watches) == 1:
        del leaves["level"]
    return Sketch(velocity, leaves, watches, 6.0)


@_family
def pendulum(rng: Generator) -> Sketch:
    """Passages of a damped pendulum through an angle, its turning points; no reset."""
    leaves = {
        "x0": np.array([_uniform(rng, 0.7, 2.2), _uniform(rng, -0.5, 0.5)]),
        "k": _uniform(rng, 1.0, 6.0),
        "c": _log_uniform(rng, 0.01, 0.2),
        "angle": _uniform(rng, -0.25, 0.25),
        "still": _uniform(rng, -0.1, 0.1),
    }

    def velocity(xp: Any, t: Any, x: Any, p: Values, on: Any) -> Any:
        return xp.stack([x[1], -p["k"] * xp.sin(x[0]) - p["c"] * x[1]])

    passage = Watch(lambda xp, t, x, p: x[0], "angle", str(rng.choice(DIRECTIONS)))
    turning = Watch(lambda xp, t, x, p: x[1], "still", "rising", leave_first=True)
    watches = (passage, turning) if rng.random() < 0.5 else (passage,)
    if len(watches) == 1:
        del leaves["still"]
    return Sketch(velocity, leaves, watches, 10.0)


@_family
def thermostat(rng: Generator) -> Sketch:
    """A heater that is part of the state: each surface is off while it is in the other mode."""
    leaves = {
        "x0": np.array([_uniform(rng, 18.6, 19.8), 1.0]),
        "loss": _uniform(rng, 0.15, 0.5),
        "outside": _uniform(rng, 5.0, 12.0),
        "swing": _uniform(rng, 0.5, 3.0),
        "w": _uniform(rng, 0.5, 3.0),
        "power": _uniform(rng, 8.0, 14.0),
        "high": _uniform(rng, 20.6, 21.8),
        "low": _uniform(rng, 17.6, 18.5),
    }

    def velocity(xp: Any, t: Any, x: Any, p: Values, on: Any) -> Any:
        outside = p["outside"] + p["swing"] * xp.sin(p["w"] * t)
        return xp.stack([p["power"] * x[1] - p["loss"] * (x[0] - outside), 0.0 * x[1]])

    off = Watch(
        lambda xp, t, x, p: x[0] + p["far"] * (x[1] - 1),
        "high",
        "rising",
        reset=lambda xp, t, x, p: xp.stack([x[0], 0.0 * x[1]]),
    )
    back = Watch(
        lambda xp, t, x, p: x[0] + p["far"] * x[1],
        "low",
        reset=lambda xp, t, x, p: xp.stack([x[0], 0.0 * x[1] + 1.0]),
    )
    watches = (off, back) if rng.random() < 0.5 else (back, off)
    return Sketch(velocity, leaves, watches, 8.0, constants={"far": 10.0})


@_family
def two_tanks(rng: Generator) -> Sketch:
    """Tanks in a row; each is partly emptied at its level, the first one into the second."""
    leaves = {
        "x0": rng.uniform(0.3, 0.7, 2),
        "inflow": _uniform(rng, 0.8, 1.6),
        "b": _uniform(rng, 0.1, 0.4),
        "w": _uniform(rng, 1.0, 5.0),
        "a": rng.uniform(0.3, 0.7, 2),
        "dumped": rng.uniform(0.3, 0.7, 2),
        "kept": _uniform(rng, 0.1, 0.5),
        "first": _uniform(rng, 1.0, 1.4),
        "second": _uniform(rng, 0.8, 1.1),
    }

    def velocity(xp: Any, t: Any, x: Any, p: Values, on: Any) -> Any:
        between, out = p["a"][0] * xp.sqrt(x[0]), p["a"][1] * xp.sqrt(x[1])
        inflow = p["inflow"] * (1 + p["b"] * xp.sin(p["w"] * t))
        return xp.stack([inflow - between, between - out])

    def dump(xp: Any, t: Any, x: Any, p: Values) -> Any:
        part = p["dumped"][0] * x[0]
        return xp.stack([x[0] - part, x[1] + p["kept"] * part])

    one = Watch(lambda xp, t, x, p: x[0], "first", "rising", reset=dump)
    two = Watch(
        lambda xp, t, x, p: x[1],
        "second",
        "rising",
        reset=lambda xp, t, x, p: xp.stack([x[0], (1 - p["dumped"][1]) * x[1]]),
    )
    return Sketch(velocity, leaves, (one, two), 7.0)


@_family
def doses(rng: Generator) -> Sketch:
    """First-order absorption and elimination, doses at learned times, a level crossed both ways."""
    number = int(rng.integers(2, 6))
    gap = _uniform(rng, 1.0, 2.5)
    times = {f"time{k}": (k + _uniform(rng, 0.1, 0.8)) * gap for k in range(number)}
    leaves: dict[str, Any] = {
        "x0": np.array([_uniform(rng, 0.2, 1.0), _uniform(rng, 0.0, 0.1)]),
        "ka": _uniform(rng, 1.5, 4.0),
        "ke": _uniform(rng, 0.3, 1.0),
        "amount": rng.uniform(0.5, 1.5, number),
        "level": _uniform(rng, 0.3, 0.6),
        **times,
    }

    def velocity(xp: Any, t: Any, x: Any, p: Values, on: Any) -> Any:
        absorbed = p["ka"] * x[0]
        return xp.stack([-absorbed, absorbed - p["ke"] * x[1]])

    def dose(k: int) -> Any:
        return lambda xp, t, x, p: xp.stack([x[0] + p["amount"][k], x[1]])

    given = tuple(Watch(None, f"time{k}", reset=dose(k)) for k in range(number))
    level = lambda xp, t, x, p: x[1]  # noqa: E731
    if rng.random() < 0.5:
        crossed: tuple[Watch, ...] = (Watch(level, "level", "either"),)
    else:
        crossed = (Watch(level, "level", "rising"), Watch(level, "level", leave_first=True))
    watches = given + crossed if rng.random() < 0.5 else crossed + given
    return Sketch(velocity, leaves, watches, (number + 1.5) * gap, times=tuple(times))


@_family
def kicked_oscillator(rng: Generator) -> Sketch:
    """A linear oscillator, pushed back across the surface a.x = c (or through it) when it comes."""
    leaves = {
        "x0": np.array([_uniform(rng, 0.8, 1.5), _uniform(rng, -0.5, 0.5)]),
        "w": _uniform(rng, 1.5, 5.0),
        "c": _log_uniform(rng, 0.02, 0.3),
        "force": _uniform(rng, 0.0, 0.5),
        "rate": _uniform(rng, 0.5, 3.0),
        "a": np.array([1.0, _uniform(rng, -0.2, 0.2)]),
        "kick": np.array([_uniform(rng, 0.2, 0.5), _uniform(rng, 0.3, 1.5)]),
        "surface": _uniform(rng, -0.3, 0.3),
    }

    def velocity(xp: Any, t: Any, x: Any, p: Values, on: Any) -> Any:
        force = p["force"] * xp.sin(p["rate"] * t)
        return xp.stack([x[1], force - p["w"] * p["w"] * x[0] - p["c"] * x[1]])

    kicked = Watch(
        lambda xp, t, x, p: xp.dot(p["a"], x),
        "surface",
        reset=lambda xp, t, x, p: x + p["kick"] * (1 + 0.1 * xp.sin(t)),
    )
    return Sketch(velocity, leaves, (kicked,), 5.0)


@_family
def predator_prey(rng: Generator) -> Sketch:
    """Lotka-Volterra; a share of the prey is taken at a threshold; predators are watched."""
    leaves = {
        "x0": rng.uniform(0.6, 1.2, 2),
        "grow": _uniform(rng, 0.8, 1.6),
        "eat": _uniform(rng, 0.6, 1.2),
        "gain": _uniform(rng, 0.4, 0.9),
        "die": _uniform(rng, 0.5, 1.0),
        "taken": _uniform(rng, 0.2, 0.5),
        "threshold": _uniform(rng, 1.3, 2.0),
        "many": _uniform(rng, 0.8, 1.4),
    }

    def velocity(xp: Any, t: Any, x: Any, p: Values, on: Any) -> Any:
        met = x[0] * x[1]
        return xp.stack([p["grow"] * x[0] - p["eat"] * met, p["gain"] * met - p["die"] * x[1]])

    harvest = Watch(
        lambda xp, t, x, p: x[0],
        "threshold",
        "rising",
        reset=lambda xp, t, x, p: xp.stack([(1 - p["taken"]) * x[0], x[1]]),
    )
    many = Watch(lambda xp, t, x, p: x[1], "many", str(rng.choice(DIRECTIONS)), leave_first=True)
    watches = (many, harvest) if rng.random() < 0.5 else (harvest,)
    if len(watches) == 1:
        del leaves["many"]
    return Sketch(velocity, leaves, watches, 15.0)


@_family
def network(rng: Generator) -> Sketch:
    """x' = w R x - a x^3 + tanh(s W x + b), dimension 2 to 5; several watches without a reset."""
    n = int(rng.integers(2, 6))
    turn = np.triu(rng.uniform(0.5, 1.5, (n, n)), 1)
    leaves: dict[str, Any] = {
        "x0": rng.uniform(0.4, 1.2, n) * rng.choice([-1.0, 1.0], n),
        "s": rng.uniform(0.5, 1.5, n),
        "b": 0.4 * rng.standard_normal(n),
        "w": _uniform(rng, 1.0, 2.5),
        "a": _uniform(rng, 0.2, 0.6),
    }

    def velocity(xp: Any, t: Any, x: Any, p: Values, on: Any) -> Any:
        turned = p["w"] * xp.matvec(p["R"], x)
        return turned - p["a"] * x * x * x + xp.tanh(p["s"] * xp.matvec(p["W"], x) + p["b"])

    constants, watches = {"R": turn - turn.T}, []
    # The oracle runs six times for every entry of a leaf.
    weights = 0.7 * rng.standard_normal((n, n)) / math.sqrt(n)
    (leaves if n < 4 else constants)["W"] = weights
    for k in range(int(rng.integers(2, 5))):
        name = f"target{k}"
        direction = str(rng.choice(DIRECTIONS))
        leaves[name] = _uniform(rng, -0.3, 0.3)
        (leaves if k == 0 else constants)[f"normal{k}"] = rng.standard_normal(n) / math.sqrt(n)

        def along(xp: Any, t: Any, x: Any, p: Values, k: int = k) -> Any:
            return xp.dot(p[f"normal{k}"], x)

        watches.append(Watch(along, name, direction, leave_first=bool(rng.random() < 0.8)))
    return Sketch(velocity, leaves, tuple(watches), 5.0, constants=constants)


@_family
def switched(rng: Generator) -> Sketch:
    """The velocity jumps at learned times, and depends on them behind; watches in both ways."""
    number = int(rng.integers(1, 4))
    span = _uniform(rng, 4.0, 7.0)
    times = {f"tau{k}": span * (k + _uniform(rng, 0.2, 0.8)) / number for k in range(number)}
    leaves: dict[str, Any] = {
        "x0": rng.uniform(0.5, 1.2, 2),
        "w": _uniform(rng, 1.5, 4.0),
        "c": _uniform(rng, 0.1, 0.5),
        "push": rng.uniform(0.5, 2.5, number) * rng.choice([-1.0, 1.0], number),
        "fade": _uniform(rng, 0.1, 0.6),
        "high": _uniform(rng, 0.1, 0.4),
        **times,
    }

    def velocity(xp: Any, t: Any, x: Any, p: Values, on: Any) -> Any:
        push = 0.0
        for k in range(number):
            push = push + on[k] * p["push"][k] * xp.exp(-p["fade"] * (t - p[f"tau{k}"]))
        return xp.stack([p["w"] * x[1], push - p["w"] * x[0] - p["c"] * x[1]])

    def kicked(xp: Any, t: Any, x: Any, p: Values) -> Any:
        return xp.stack([x[0], x[1] + p["kick"]])

    watches = [Watch(lambda xp, t, x, p: x[0], "high", str(rng.choice(DIRECTIONS)))]
    watches[0] = Watch(watches[0].criterion, "high", watches[0].direction, leave_first=True)
    if rng.random() < 0.5:
        leaves |= {"low": _uniform(rng, -0.5, -0.1), "kick": _uniform(rng, 0.3, 0.8)}
        # Turned back before its lowest point, and met there: x1 rises again behind the kick.
        watches.append(Watch(lambda xp, t, x, p: x[1], "low", reset=kicked, leave_first=True))
    return Sketch(
        velocity, leaves, tuple(watches), span, times=tuple(times), breakpoints=tuple(times)
    )


@_family
def cascade(rng: Generator) -> Sketch:
    """A counter fills and is emptied into another, which it lifts past its own level at once."""
    leaves = {
        "x0": np.array([_uniform(rng, 0.0, 0.5), _uniform(rng, 0.0, 0.4), 0.1]),
        "fill": _uniform(rng, 1.0, 2.0),
        "b": _uniform(rng, 0.1, 0.5),
        "w": _uniform(rng, 1.0, 5.0),
        "leak": rng.uniform(0.05, 0.4, 2),
        "left": _uniform(rng, 0.0, 0.3),
        "gain": _uniform(rng, 0.4, 0.8),
        "share": _uniform(rng, 0.2, 0.6),
        "full": _uniform(rng, 0.8, 1.2),
        "level": _uniform(rng, 0.7, 1.0),
    }

    def velocity(xp: Any, t: Any, x: Any, p: Values, on: Any) -> Any:
        fill = p["fill"] * (1 + p["b"] * xp.sin(p["w"] * t))
        return xp.stack([fill - 0.3 * x[0], -p["leak"][0] * x[1], 0.2 * x[1] - p["leak"][1] * x[2]])

    emptied = Watch(
        lambda xp, t, x, p: x[0],
        "full",
        "rising",
        reset=lambda xp, t, x, p: xp.stack([p["left"] * x[0], x[1] + p["gain"] * x[0], x[2]]),
    )
    passed_on = Watch(
        lambda xp, t, x, p: x[1],
        "level",
        "rising",
        reset=lambda xp, t, x, p: xp.stack([x[0], p["share"] * x[1], x[2] + x[1] * x[1]]),
    )
    watches = (emptied, passed_on) if rng.random() < 0.5 else (passed_on, emptied)
    return Sketch(velocity, leaves, watches, 6.0)
