"""Random flows that jump on a surface in the state, which nobody names to the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.random import Generator

from .operations import Flow, Values, log_uniform, start

JUMPING: dict[str, Callable[[Generator], Flow]] = {}


def _jumping(make: Callable[[Generator], Flow]) -> Callable[[Generator], Flow]:
    JUMPING[make.__name__] = make
    return make


@_jumping
def two_rates(rng: Generator) -> Flow:
    """x' = -a x on one side of a plane, -b x on the other."""
    n = int(rng.integers(1, 4))
    leaves = {
        "a": rng.uniform(0.5, 1.5, n),
        "b": rng.uniform(1.5, 3.0, n),
        "c": float(rng.uniform(0.1, 0.8)),
    }

    def switch(xp: Any, t: Any, x: Any, p: Values) -> Any:
        return xp.dot(x, x) - p["c"]

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return -((1 + side) / 2 * p["a"] + (1 - side) / 2 * p["b"]) * x

    return Flow(f, leaves, start(rng, n), 3.0, switch=switch)


@_jumping
def pushed(rng: Generator) -> Flow:
    """A damped oscillator that a constant force pushes on one side of x = c."""
    leaves = {
        "k": float(rng.uniform(1, 6)),
        "d": float(rng.uniform(0.1, 0.8)),
        "push": float(rng.uniform(0.2, 1.5)),
        "c": float(rng.uniform(-0.3, 0.3)),
    }

    def switch(xp: Any, t: Any, x: Any, p: Values) -> Any:
        return x[0] - p["c"]

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return xp.stack([x[1], p["push"] * side - p["k"] * x[0] - p["d"] * x[1]])

    return Flow(f, leaves, start(rng, 2), 7.0, switch=switch)


@_jumping
def small_share(rng: Generator) -> Flow:
    """The jump acts on one component, that reaches the others weakly."""
    leaves = {
        "a": rng.uniform(0.5, 2.0, 3),
        "b": log_uniform(rng, 0.05, 1.0),
        "link": log_uniform(rng, 0.01, 0.5),
    }

    def switch(xp: Any, t: Any, x: Any, p: Values) -> Any:
        return x[1] - x[2] * x[2]

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        rates = [
            p["b"] * side - p["a"][0] * x[0],
            p["link"] * x[0] - p["a"][1] * x[1],
            -p["a"][2] * x[2],
        ]
        return xp.stack(rates)

    return Flow(f, leaves, start(rng, 3), 5.0, switch=switch)


@_jumping
def moving_threshold(rng: Generator) -> Flow:
    """The threshold moves in time: x = c sin(w t)."""
    leaves = {
        "a": float(rng.uniform(0.4, 1.5)),
        "u": float(rng.uniform(0.1, 0.8)),
        "c": float(rng.uniform(0.2, 0.8)),
        "w": log_uniform(rng, 0.5, 6.0),
    }

    def switch(xp: Any, t: Any, x: Any, p: Values) -> Any:
        return x[0] - p["c"] * xp.sin(p["w"] * t)

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return xp.stack([p["u"] * side * x[1] - p["a"] * x[0], -0.5 * x[1] + 0.2 * x[0]])

    return Flow(f, leaves, start(rng, 2), 5.0, switch=switch)


@_jumping
def dry_friction(rng: Generator) -> Flow:
    """Coulomb friction, before it sticks: v' = -k x - d sign(v)."""
    leaves = {"k": float(rng.uniform(2, 9)), "d": float(rng.uniform(0.05, 0.3))}

    def switch(xp: Any, t: Any, x: Any, p: Values) -> Any:
        return x[1]

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return xp.stack([x[1], -p["d"] * side - p["k"] * x[0] - 0.1 * x[1]])

    return Flow(f, leaves, 1.2 * start(rng, 2), 5.0, switch=switch)
