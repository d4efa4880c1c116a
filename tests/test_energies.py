"""Energies fall along the flows: their rates by the chain rule, and along accurate solutions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from augmented import Pieces, hessian_damped, points
from energy_claims import CLAIMS, CONVEX, Objective, energy_of, excess, random_states
from torch import Tensor
from torchdiffeq import odeint

from ode_stopping.flows import (
    AdamFlow,
    GradientFlow,
    HeavyBallFlow,
    HighResolutionFlow,
    InertialHessianFlow,
    NesterovFlow,
    RMSPropFlow,
    StronglyConvexNesterovFlow,
    VanishingDamping,
    convergence_margins,
)
from ode_stopping.problems import Rosenbrock

every_claim = pytest.mark.parametrize("name", CLAIMS)
every_objective = pytest.mark.parametrize("objective", CONVEX)


@every_claim
@every_objective
def test_the_rate_of_an_energy_keeps_its_bound(name: str, objective: str) -> None:
    assert excess(CLAIMS[name], CONVEX[objective]) < 1e-10


@every_claim
@every_objective
def test_a_wrong_energy_does_not(name: str, objective: str) -> None:
    """Planted errors: a factor, a wrong velocity, a cross term twice."""
    claim, o = CLAIMS[name], CONVEX[objective]
    flow = claim.make(o)
    assert excess(claim, o, lambda t, s: claim.wrong(flow, o, t, s)) > 1e-2


def exact_rate(flow: Any, o: Objective, t: Tensor, s: Pieces) -> Tensor:
    """E' before any inequality is used, from the definition of E and the flow, on paper."""
    x, v, *_ = s
    f, g, d = o.f(x) - o.minimum, flow.gradient(x), x - o.minimizer
    along = (g * d).sum(-1)
    if isinstance(flow, StronglyConvexNesterovFlow):
        root = o.modulus**0.5
        return -root * ((v * v).sum(-1) + root * (v * d).sum(-1) + along)
    if isinstance(flow, HighResolutionFlow):
        root, step = o.modulus**0.5, float(flow.s) ** 0.5
        velocity = v - step * g
        _, curvature = torch.autograd.functional.jvp(flow.gradient, x, velocity)
        kinetic = root * velocity.square().sum(-1) + 0.5 * step * (velocity * curvature).sum(-1)
        return -kinetic - (1 + root * step) * (root * along + 0.5 * step * (g * g).sum(-1))
    if isinstance(flow, AdamFlow):
        m, second = s[1], s[2]
        width = second.sqrt() + flow.eps
        part = flow.tau1 / (4 * flow.tau2) * (g * g - second) / (second.sqrt() * width)
        return -(m * m / width * (1 + part)).sum(-1)
    if isinstance(flow, NesterovFlow):
        alpha = t * flow.damping_at(t, t)
        return 2 * t * f - t * (alpha - 1) * along
    weight, spare = convergence_margins(flow, t).values
    now = flow.coefficients(t, t)
    alpha = t * now.damping
    growth = (alpha - 1) * weight - spare  # 2 w + t w'
    return t * (growth * f - weight * ((alpha - 1) * along + t * now.beta * (g * g).sum(-1)))


INEXACT = [name for name, claim in CLAIMS.items() if not claim.exact]


@pytest.mark.parametrize("name", INEXACT)
@every_objective
def test_the_rate_of_an_energy_is_the_one_on_paper(name: str, objective: str) -> None:
    """A bound that is not sharp would let a wrong energy pass."""
    o = CONVEX[objective]
    rate = replace(
        CLAIMS[name], exact=True, bound=lambda flow, o, t, s, E: exact_rate(flow, o, t, s)
    )
    assert excess(rate, o) < 1e-9


def test_the_bounds_of_convex_functions_need_convexity() -> None:
    """Rosenbrock: heavy ball and Adam keep theirs, Nesterov's flow does not."""
    f = Rosenbrock(dim=3)
    o = Objective(f, 0.0, f.minimum, f.minimizer)
    for name in ("heavy ball", "adam", "rmsprop", "gradient"):
        assert excess(CLAIMS[name], o) < 1e-10
    assert excess(CLAIMS["nesterov 3"], o) > 1e-2


def test_adam_needs_tau1_at_most_four_tau2() -> None:
    beyond = replace(
        CLAIMS["adam"],
        make=lambda o: AdamFlow(o.f, tau1=0.3, tau2=0.01, eps=0.0),
        bound=lambda flow, o, t, s, E: torch.zeros_like(E),
    )
    assert excess(beyond, CONVEX["quartic"]) > 1e-2


# --- along solutions ------------------------------------------------------------------------------

NEED_ONLY_A_START = [name for name in CLAIMS if name != "hessian, growing w"]


def followed(flow: Any, start: Any, times: Tensor) -> list[Any]:
    """The states at the times, to some ten digits."""
    with torch.no_grad():
        path = odeint(flow, start, times, rtol=1e-10, atol=1e-11, method="dopri8")
    if isinstance(path, Tensor):
        return list(path)
    return [tuple(piece[i] for piece in path) for i in range(len(times))]


def started(flow: Any, x0: Tensor, t0: float) -> Any:
    if isinstance(flow, InertialHessianFlow):
        return flow.initial_state(x0, t0=t0)
    adaptive = isinstance(flow, RMSPropFlow | AdamFlow)
    return flow.initial_state(x0, **({"age": math.inf} if adaptive else {}))


def energies(flow: Any, o: Objective, x0: Tensor) -> tuple[Tensor, Tensor]:
    """Times and E along a solution."""
    times = torch.linspace(1.0, 3.0, 30, dtype=torch.float64)
    path = followed(flow, started(flow, x0, 1.0), times)
    with torch.no_grad():
        energy = energy_of(flow, o)
        return times, torch.stack([energy(t, s) for t, s in zip(times, path, strict=True)])


@pytest.mark.parametrize("name", NEED_ONLY_A_START)
@every_objective
def test_energies_fall_along_solutions(name: str, objective: str) -> None:
    o = CONVEX[objective]
    _, values = energies(CLAIMS[name].make(o), o, points(seed=8) + o.minimizer)
    assert float(values[-1]) < 0.95 * float(values[0])
    assert float((values[1:] - values[:-1]).max()) < 1e-9 * float(values[0])


def test_heavy_ball_loses_energy_on_a_function_that_is_not_convex() -> None:
    f = Rosenbrock(dim=2)
    flow = HeavyBallFlow(f, damping=0.5)
    times = torch.linspace(0.0, 2.0, 80, dtype=torch.float64)
    path = followed(flow, flow.initial_state(torch.tensor([-1.2, 1.0]).double()), times)
    values = torch.stack([flow.energy(t, s) for t, s in zip(times, path, strict=True)])
    by_hand = torch.stack([f(x) + 0.5 * (v @ v) for x, v in path])
    torch.testing.assert_close(values, by_hand, rtol=1e-14, atol=0)
    assert float((values[1:] - values[:-1]).max()) < 1e-9 * float(values[0])
    assert float(values[-1]) < 0.7 * float(values[0])
    loss = torch.stack([f(x) for x, _ in path])
    assert bool((loss[1:] > loss[:-1] + 0.1).any())  # f itself does rise


@pytest.mark.parametrize(("name", "rate"), [("strongly convex", 1.0), ("high resolution", 0.25)])
@every_objective
def test_strong_convexity_makes_energies_fall_exponentially(
    name: str, rate: float, objective: str
) -> None:
    o = CONVEX[objective]
    times, values = energies(CLAIMS[name].make(o), o, points(seed=8) + o.minimizer)
    bound = values[0] * torch.exp(-rate * o.modulus**0.5 * (times - times[0]))
    assert bool((values <= bound * (1 + 1e-9)).all())


@pytest.mark.parametrize("name", ["nesterov 3", "nesterov 5", "hessian", "hessian, schedules"])
@every_objective
def test_f_is_below_the_energy_over_its_weight(name: str, objective: str) -> None:
    """f - f* <= E(t0)/(t^2 w)."""
    o = CONVEX[objective]
    flow = CLAIMS[name].make(o)
    times = torch.linspace(1.0, 3.0, 20, dtype=torch.float64)
    path = followed(flow, started(flow, points(seed=8) + o.minimizer, 1.0), times)
    start = energy_of(flow, o)(times[0], path[0])
    for t, s in zip(times, path, strict=True):
        weight = flow.weight(t, s[0]) if isinstance(flow, InertialHessianFlow) else 1.0
        assert float((t**2 * weight * (o.f(s[0]) - o.minimum)).detach()) <= float(start.detach())


# --- the functions themselves ---------------------------------------------------------------------


def test_without_the_hessian_it_is_nesterov_s() -> None:
    o = CONVEX["ridge"]
    plain = NesterovFlow(o.f, alpha=3.5)
    same = hessian_damped(o.f, damping=VanishingDamping(3.5), beta=0.0, gamma=1.0)
    states = (points(5), points(5, seed=1))
    for t in (0.3, 7.0):
        mine, other = (energy_of(flow, o)(t, states) for flow in (plain, same))
        torch.testing.assert_close(mine, other, rtol=1e-14, atol=0)
        time = torch.tensor(t, dtype=torch.float64)
        torch.testing.assert_close(plain(time, states), same(time, states), rtol=1e-14, atol=0)


@every_claim
def test_times_may_be_numbers_and_states_batches(name: str) -> None:
    """A number is not rounded to float32 on its way."""
    o = CONVEX["quartic"]
    flow = CLAIMS[name].make(o)
    states, t = random_states(flow, o, 1.0), 0.7
    values = flow.energy(t, states)
    assert values.shape == (200,)
    assert torch.equal(values, flow.energy(torch.tensor(t, dtype=torch.float64), states))
    row = tuple(piece[7] if piece.ndim else piece for piece in states)
    torch.testing.assert_close(flow.energy(t, row), values[7], rtol=1e-14, atol=0)
    # The objective's own f* and x* are the default.
    given = flow.energy(t, states, minimum=-1.0, minimizer=torch.zeros(3))
    weight = ((given - values) / (given - values)[0]).detach()
    torch.testing.assert_close(weight, torch.ones_like(weight), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["strongly convex", "nesterov 3", "high resolution", "hessian"])
def test_an_unknown_minimizer_is_asked_for(name: str) -> None:
    o = CONVEX["ridge"]
    flow = CLAIMS[name].make(o)
    with pytest.raises(ValueError, match="needs x\\*: give minimizer="):
        flow.energy(1.0, random_states(flow, o, 1.0))


def test_an_unknown_minimum_is_zero() -> None:
    o = CONVEX["ridge"]
    x = points()
    assert torch.equal(GradientFlow(o.f).energy(0.0, x), o.f(x))


@pytest.mark.parametrize("damping", [3.0, VanishingDamping(3.0)], ids=["number", "alpha/t"])
def test_the_weight_beta_over_t_is_not_taken_at_zero(damping: Any) -> None:
    flow = hessian_damped(CONVEX["quartic"].f, damping=damping)
    for t in (0.0, -1.0):
        with pytest.raises(ValueError, match="must be"):
            flow.energy(t, (points(), points(seed=1)))
