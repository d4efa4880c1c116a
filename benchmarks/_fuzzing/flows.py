"""Random flows that do not jump in the state; one has a kink."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.random import Generator

from .operations import Flow, Values, definite, log_uniform, start

FLOWS: dict[str, Callable[[Generator], Flow]] = {}


def _flow(make: Callable[[Generator], Flow]) -> Callable[[Generator], Flow]:
    FLOWS[make.__name__] = make
    return make


@_flow
def non_normal(rng: Generator) -> Flow:
    """x' = -(D + U) x, U strictly upper and large: grows before it decays."""
    n = int(rng.integers(2, 6))
    upper = np.triu(rng.standard_normal((n, n)), 1) * log_uniform(rng, 1.0, 50.0)
    matrix = np.diag(rng.uniform(0.4, 2.0, n)) + upper
    return Flow(lambda xp, t, x, p, side: -xp.matvec(p["M"], x), {"M": matrix}, start(rng, n), 6.0)


@_flow
def oscillating(rng: Generator) -> Flow:
    """Damped oscillators, coupled through their damping."""
    pairs = int(rng.integers(1, 3))
    leaves = {"w": log_uniform(rng, 1.0, 15.0, pairs), "c": rng.uniform(0.1, 1.0, pairs)}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        q, v = x[:pairs], x[pairs:]
        rates = [v[i] for i in range(pairs)]
        energy = xp.dot(v, v)
        rates += [
            -(p["w"][i] ** 2) * q[i] - (p["c"][i] + 0.1 * energy) * v[i] for i in range(pairs)
        ]
        return xp.stack(rates)

    return Flow(f, leaves, start(rng, 2 * pairs), 8.0)


@_flow
def modulated(rng: Generator) -> Flow:
    """x' = -a x (1 + b sin(w t))."""
    n = int(rng.integers(1, 4))
    leaves = {
        "a": rng.uniform(0.5, 2.0, n),
        "b": float(rng.uniform(0.2, 0.9)),
        "w": log_uniform(rng, 1.0, 30.0),
    }

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return -p["a"] * x * (1 + p["b"] * xp.sin(p["w"] * t))

    return Flow(f, leaves, start(rng, n), 5.0)


@_flow
def forced(rng: Generator) -> Flow:
    """x' = -M x + b sin(w t + phase)."""
    n = int(rng.integers(2, 5))
    leaves = {
        "M": definite(rng, n, log_uniform(rng, 1.0, 10.0)) + 0.3 * rng.standard_normal((n, n)),
        "b": 0.5 * rng.standard_normal(n),
        "w": log_uniform(rng, 0.5, 20.0),
        "phase": float(rng.uniform(0, 6)),
    }

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return p["b"] * xp.sin(p["w"] * t + p["phase"]) - xp.matvec(p["M"], x)

    return Flow(f, leaves, start(rng, n), 5.0)


@_flow
def stiff(rng: Generator) -> Flow:
    """x' = -p (Q x) - c x^3, Q rotated, condition up to 300."""
    n = int(rng.integers(2, 6))
    matrix = definite(rng, n, log_uniform(rng, 20.0, 300.0))
    leaves = {"p": rng.uniform(0.5, 2.0, n), "c": float(rng.uniform(0.1, 1.0))}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return -p["p"] * xp.matvec(p["Q"], x) - p["c"] * x * x * x

    return Flow(f, leaves, start(rng, n), 3.0, {"Q": matrix})


@_flow
def van_der_pol(rng: Generator) -> Flow:
    """x' = v, v' = mu (1 - x^2) v - k x."""
    leaves = {"mu": log_uniform(rng, 0.5, 30.0), "k": float(rng.uniform(0.5, 2.0))}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return xp.stack([x[1], p["mu"] * (1 - x[0] * x[0]) * x[1] - p["k"] * x[0]])

    return Flow(f, leaves, 1.5 * start(rng, 2), 9.0)


@_flow
def lorenz(rng: Generator) -> Flow:
    """The Lorenz equations, lengths in tens: chaotic."""
    leaves = {"sigma": 10.0, "rho": float(rng.uniform(22, 32)), "beta": 8 / 3}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        a, b, c = x[0], x[1], x[2]
        rates = [
            p["sigma"] * (b - a),
            a * (p["rho"] - 10 * c) - b,
            10 * a * b - p["beta"] * c,
        ]
        return xp.stack(rates)

    return Flow(
        f, leaves, rng.uniform(-1, 1, 3) + np.array([0, 0, 2.0]), log_uniform(rng, 1.0, 4.0)
    )


@_flow
def roessler(rng: Generator) -> Flow:
    """The Roessler equations: oscillating, with spikes."""
    leaves = {"a": float(rng.uniform(0.1, 0.25)), "b": 0.2, "c": float(rng.uniform(3, 6))}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        rates = [-x[1] - x[2], x[0] + p["a"] * x[1], p["b"] + x[2] * (x[0] - p["c"])]
        return xp.stack(rates)

    return Flow(f, leaves, 2 * start(rng, 3) * [1, 1, 0.1], 15.0)


@_flow
def saddle(rng: Generator) -> Flow:
    """A double well with friction, from near the stable manifold of its saddle."""
    leaves = {"a": float(rng.uniform(0.5, 2.0)), "c": float(rng.uniform(0.3, 1.5))}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return xp.stack([x[1], p["a"] * x[0] - x[0] * x[0] * x[0] - p["c"] * x[1]])

    a, c = leaves["a"], leaves["c"]
    slope = (-c - math.sqrt(c * c + 4 * a)) / 2
    begin = float(rng.uniform(0.2, 0.8))
    off = float(rng.choice([-1, 1])) * log_uniform(rng, 1e-4, 1e-1)
    return Flow(f, leaves, np.array([begin, slope * begin + off]), 10.0)


@_flow
def gated(rng: Generator) -> Flow:
    """x' = -softplus(W x + b) x + u tanh(V x)."""
    n = int(rng.integers(2, 5))
    leaves = {
        "W": rng.standard_normal((n, n)) / math.sqrt(n),
        "V": rng.standard_normal((n, n)) / math.sqrt(n),
        "b": rng.standard_normal(n),
        "u": float(rng.uniform(0.0, 0.5)),
    }

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        gate = xp.log(1 + xp.exp(xp.matvec(p["W"], x) + p["b"]))
        return p["u"] * xp.tanh(xp.matvec(p["V"], x)) - gate * x

    return Flow(f, leaves, start(rng, n), 6.0)


@_flow
def network(rng: Generator) -> Flow:
    """x' = -a x + V tanh(W x + b + c t), six hidden units."""
    n, hidden = int(rng.integers(2, 4)), 6
    leaves = {
        "W": rng.standard_normal((hidden, n)),
        "V": 0.5 * rng.standard_normal((n, hidden)),
        "b": 0.5 * rng.standard_normal(hidden),
        "c": 0.3 * rng.standard_normal(hidden),
        "a": float(rng.uniform(0.7, 2.0)),
    }

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        inner = xp.matvec(p["W"], x) + p["b"] + p["c"] * t
        return xp.matvec(p["V"], xp.tanh(inner)) - p["a"] * x

    return Flow(f, leaves, start(rng, n), 5.0)


@_flow
def pendulum(rng: Generator) -> Flow:
    """Hamiltonian with friction: q' = v, v' = -k sin q - c v."""
    leaves = {"k": float(rng.uniform(1, 9)), "c": float(rng.uniform(0.05, 0.6))}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return xp.stack([x[1], -p["k"] * xp.sin(x[0]) - p["c"] * x[1]])

    return Flow(f, leaves, 1.5 * start(rng, 2), 8.0)


@_flow
def lotka_volterra(rng: Generator) -> Flow:
    """Predator and prey."""
    leaves = {name: float(rng.uniform(0.5, 2.0)) for name in ("a", "b", "c", "d")}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        rates = [x[0] * (p["a"] - p["b"] * x[1]), x[1] * (p["d"] * x[0] - p["c"])]
        return xp.stack(rates)

    return Flow(f, leaves, rng.uniform(0.3, 3.0, 2), 9.0)


@_flow
def epidemic(rng: Generator) -> Flow:
    """SIR with births: the shares of the susceptible, the infected and the rest."""
    leaves = {
        "beta": float(rng.uniform(1.5, 5.0)),
        "gamma": float(rng.uniform(0.4, 1.2)),
        "mu": float(rng.uniform(0.0, 0.1)),
    }

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        new = p["beta"] * x[0] * x[1]
        rates = [
            p["mu"] * (1 - x[0]) - new,
            new - (p["gamma"] + p["mu"]) * x[1],
            p["gamma"] * x[1] - p["mu"] * x[2],
        ]
        return xp.stack(rates)

    infected = log_uniform(rng, 1e-3, 0.1)
    return Flow(f, leaves, np.array([1 - infected, infected, 0.02]), 15.0)


@_flow
def neuron(rng: Generator) -> Flow:
    """FitzHugh and Nagumo: slow and fast stretches."""
    leaves = {
        "current": float(rng.uniform(0.0, 0.6)),
        "a": 0.7,
        "b": float(rng.uniform(0.5, 0.9)),
        "rate": float(rng.uniform(0.08, 0.5)),
    }

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        v, w = x[0], x[1]
        fast = v - v * v * v / 3 - w + p["current"]
        return xp.stack([3 * fast, 3 * p["rate"] * (v + p["a"] - p["b"] * w)])

    return Flow(f, leaves, 1.2 * start(rng, 2), 9.0)


@_flow
def reaction(rng: Generator) -> Flow:
    """Enzyme kinetics and a chain of decays."""
    leaves = {
        "rate": float(rng.uniform(0.5, 3.0)),
        "half": log_uniform(rng, 0.05, 1.0),
        "k": rng.uniform(0.3, 3.0, 2),
    }

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        taken = p["rate"] * x[0] / (p["half"] + x[0])
        first, second = p["k"][0] * x[1], p["k"][1] * x[2]
        return xp.stack([-taken, taken - first, first - second])

    return Flow(f, leaves, np.array([rng.uniform(0.5, 2.0), 0.3, 0.2]), 6.0)


@_flow
def duffing(rng: Generator) -> Flow:
    """A forced double well: chaotic for some of the amplitudes."""
    leaves = {
        "c": float(rng.uniform(0.1, 0.4)),
        "k": float(rng.uniform(0.7, 1.3)),
        "b": float(rng.uniform(0.2, 0.6)),
        "w": float(rng.uniform(0.8, 1.6)),
    }

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        force = p["b"] * xp.cos(p["w"] * t)
        return xp.stack([x[1], p["k"] * (x[0] - x[0] * x[0] * x[0]) - p["c"] * x[1] + force])

    return Flow(f, leaves, start(rng, 2), 15.0)


@_flow
def mathieu(rng: Generator) -> Flow:
    """An oscillator whose frequency is driven: x'' + c x' + (a + b cos(w t)) x = 0."""
    leaves = {
        "a": float(rng.uniform(1, 9)),
        "b": float(rng.uniform(0.5, 4)),
        "w": log_uniform(rng, 1.0, 12.0),
        "c": float(rng.uniform(0.1, 0.8)),
    }

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        stiffness = p["a"] + p["b"] * xp.cos(p["w"] * t)
        return xp.stack([x[1], -stiffness * x[0] - p["c"] * x[1]])

    return Flow(f, leaves, start(rng, 2), 7.0)


@_flow
def pulsed(rng: Generator) -> Flow:
    """x' = -a x + b exp(-((t - c) / width)^2), the pulse a twentieth to a half wide."""
    n = int(rng.integers(1, 4))
    leaves = {
        "a": rng.uniform(0.4, 1.5, n),
        "b": 0.5 * rng.standard_normal(n),
        "c": float(rng.uniform(0.5, 2.0)),
        "width": log_uniform(rng, 0.05, 0.5),
    }

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        z = (t - p["c"]) / p["width"]
        return p["b"] / p["width"] * xp.exp(-z * z) - p["a"] * x

    return Flow(f, leaves, start(rng, n), 4.0)


@_flow
def dormant(rng: Generator) -> Flow:
    """x' = -a x + b cos(w t): half of the x rest at 0, for their b is 0 as yet."""
    n, awake = 4, np.array([1.0, 1.0, 0.0, 0.0])
    leaves = {
        "a": rng.uniform(0.4, 1.5, n),
        "b": 0.5 * rng.standard_normal(n) * awake,
        "gain": 0.0,
        "w": log_uniform(rng, 0.5, 30.0),
    }

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        driven = xp.cos(p["w"] * t)
        return p["b"] * driven + p["gain"] * driven * driven - p["a"] * x

    return Flow(f, leaves, start(rng, n) * awake, 5.0)


@_flow
def blow_up(rng: Generator) -> Flow:
    """x' = a x^2 + b y, y' = -c y + x: leaves for infinity in finite time."""
    leaves = {name: float(rng.uniform(0.5, 1.5)) for name in ("a", "b", "c")}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return xp.stack([p["a"] * x[0] * x[0] + p["b"] * x[1], x[0] - p["c"] * x[1]])

    return Flow(f, leaves, rng.uniform(0.2, 0.8, 2), 2.0)


@_flow
def brusselator(rng: Generator) -> Flow:
    """A chemical oscillator with fast and slow stretches."""
    leaves = {"a": float(rng.uniform(0.7, 1.3)), "b": float(rng.uniform(1.5, 4.0))}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        made = x[0] * x[0] * x[1]
        return xp.stack([p["a"] + made - (p["b"] + 1) * x[0], p["b"] * x[0] - made])

    return Flow(f, leaves, rng.uniform(0.5, 3.0, 2), 10.0)


@_flow
def kepler(rng: Generator) -> Flow:
    """An eccentric orbit with drag: slow far away, fast near the centre."""
    leaves = {"mass": float(rng.uniform(0.8, 1.2)), "drag": log_uniform(rng, 1e-3, 1e-1)}

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        square = x[0] * x[0] + x[1] * x[1]
        pull = p["mass"] / (square * xp.sqrt(square))
        rates = [
            x[2],
            x[3],
            -pull * x[0] - p["drag"] * x[2],
            -pull * x[1] - p["drag"] * x[3],
        ]
        return xp.stack(rates)

    begin = np.array([1.0, 0.0, float(rng.uniform(-0.3, 0.3)), float(rng.uniform(0.3, 1.1))])
    return Flow(f, leaves, begin, 6.0)


@_flow
def rectified(rng: Generator) -> Flow:
    """x' = -a x + v max(0, w^T x - c): continuous, with a kink."""
    n = int(rng.integers(2, 5))
    leaves = {
        "a": rng.uniform(0.5, 2.0, n),
        "v": rng.standard_normal(n),
        "w": rng.standard_normal(n) / math.sqrt(n),
        "c": float(rng.uniform(-0.5, 0.5)),
    }

    def switch(xp: Any, t: Any, x: Any, p: Values) -> Any:
        return xp.dot(p["w"], x) - p["c"]

    def f(xp: Any, t: Any, x: Any, p: Values, side: Any) -> Any:
        return p["v"] * (switch(xp, t, x, p) * (1 + side) / 2) - p["a"] * x

    return Flow(f, leaves, start(rng, n), 5.0, switch=switch)
