"""StoPM: P and Q are the integrals of the violated margins, and training halves N."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from discrete import Euler, stopping_index
from ode_stopping import (
    GradientNorm,
    LearnedISHD,
    LogisticRegression,
    StoPMConstants,
    Torchdiffeq,
    WithIntegrals,
    learned_ishd,
    stopm_penalty,
    stopm_task,
    stopping_time,
    train_stopm,
)
from ode_stopping.flows import convergence_margins, stability_margins
from ode_stopping.problems import synthetic_logistic

F64 = torch.float64
# Estimates of a few per cent at loose tolerances do not matter to the descent.
loosely = pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")


def logistic(seed: int, *, samples: int = 80, dim: int = 10) -> LogisticRegression:
    """Columns with standard deviations 1, 1/2, 1/3, ...: ill-conditioned, as real data are."""
    X, y = synthetic_logistic(samples=samples, dim=dim, seed=seed)
    return LogisticRegression(X / torch.arange(1, dim + 1, dtype=F64), y)


def zeros(f: LogisticRegression) -> Tensor:
    return torch.zeros(f.dim, dtype=F64)


def iterations(flow: LearnedISHD, target: float = 3e-4) -> int:
    """N of Euler with the fixed step (EIGAC) from rest at 0; without P and Q, which do not act."""
    constants, inner = flow.constants, flow.flow
    run = stopping_index(
        Euler(inner, step=constants.step),
        inner.initial_state(zeros(flow.objective), t0=constants.t0),  # type: ignore[arg-type]
        GradientNorm(flow.objective, squared=False),
        target,
        t0=constants.t0,
        gradient=None,
        max_steps=5000,
        throw=False,
    )
    assert bool(run.reached), run.status
    return run.index


def violating() -> StoPMConstants:
    """Constants that violate the conditions of stability and those of convergence."""
    return StoPMConstants(beta=1.0, gamma=0.3, spread=4.0, seed=1)


# Conventions --------------------------------------------------------------------------------------


def test_starts_at_the_constants_of_nesterov() -> None:
    f, constants = logistic(0), StoPMConstants(spread=0.0, beta=1.0, gamma=1.0, step=0.05)
    flow = learned_ishd(f, constants)
    assert flow.scale == pytest.approx(1 / (0.05**2 * f.lipschitz()))
    t, x = torch.tensor(2.0, dtype=F64), torch.full((f.dim,), 0.3, dtype=F64)
    now = flow.flow.coefficients(t, x)
    values = [v.item() for v in (now.damping, now.beta, now.beta_rate, now.gamma)]
    assert values == pytest.approx([3.0, 0.05, 0.0, 1.0])
    # A step of Euler moves v along grad f with h gamma / (h^2 L), and h of that is 1/L.
    slope = flow.flow.gradient(x) / f.gradient(x)
    assert (0.05**2 * slope).tolist() == pytest.approx([1 / f.lipschitz()] * f.dim)


def test_starts_inside_of_the_conditions() -> None:
    flow = learned_ishd(logistic(0))
    times = torch.linspace(1.0, 30.0, 30, dtype=F64)
    points = torch.zeros(30, 10, dtype=F64)
    stable = stability_margins(flow.flow, times, points, step=0.04, curvature=lambda x: 625.0)
    assert stable.hold
    assert convergence_margins(flow.flow, times).hold


def test_integrals_start_at_zero_and_the_state_at_rest() -> None:
    f, constants = logistic(0), StoPMConstants()
    flow = learned_ishd(f, constants)
    x0 = torch.full((f.dim,), 0.1, dtype=F64)
    state = flow.initial_state(x0)
    assert [q.item() for q in flow.integrals(state)] == [0.0, 0.0]
    velocity = flow(torch.tensor(1.0, dtype=F64), state)[0]
    assert velocity.norm().item() < 1e-14
    gradient = torch.autograd.grad(state[1].sum(), constants.beta.bias)[0]
    assert gradient.item() != 0.0
    # A state is taken as it is.
    again = flow.initial_state((x0, x0))
    assert torch.equal(again[1], x0)
    assert [q.item() for q in flow.integrals(again)] == [0.0, 0.0]


def test_constants_are_shared_between_objectives() -> None:
    constants = StoPMConstants()
    flows = [learned_ishd(logistic(seed), constants) for seed in (0, 1)]
    for flow in flows:
        assert {id(p) for p in flow.parameters()} == {id(p) for p in constants.parameters()}
    assert learned_ishd(logistic(0)).constants is not constants


# P and Q ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", [None, lambda x: 0.3 + 0.1 * x.square().sum()])
def test_velocity_is_that_of_the_general_form(curvature: Any) -> None:
    """The closed derivatives of the networks against autograd, and the margins of the library."""
    constants = violating()
    flow = learned_ishd(logistic(0), constants, curvature=curvature)
    generator = torch.Generator().manual_seed(0)
    violated = torch.zeros(2, dtype=F64)
    for time in (1.0, 1.3, 5.0, 30.0):
        t = torch.tensor(time, dtype=F64)
        x0 = torch.randn(10, generator=generator, dtype=F64)
        state = tuple(piece.detach() for piece in flow.initial_state(x0))
        fast, general = flow(t, state), WithIntegrals.forward(flow, t, state)
        torch.testing.assert_close(fast, general, rtol=1e-12, atol=1e-12)
        violated += torch.stack([fast[2], fast[3]]).detach()
        weights = [torch.randn(q.shape, generator=generator, dtype=F64) for q in fast]
        slopes = [
            torch.autograd.grad(
                sum((w * q).sum() for w, q in zip(weights, velocity, strict=True)),
                list(constants.parameters()),
            )
            for velocity in (fast, general)
        ]
        torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            torch.testing.assert_close(flow(t, state), general, rtol=1e-12, atol=1e-12)
    assert bool((violated > 0).all())  # otherwise nothing was compared


def test_other_schedules_have_their_derivatives_by_autograd() -> None:
    constants = StoPMConstants()
    del constants.beta, constants.gamma
    constants.beta = lambda t: 0.04 * (2.0 + torch.sin(3 * t))  # type: ignore[assignment]
    constants.gamma = torch.tensor(2.5, dtype=F64, requires_grad=True)  # type: ignore[assignment]
    flow = learned_ishd(logistic(0), constants)
    t = torch.tensor(1.4, dtype=F64)
    state = flow.initial_state(torch.full((10,), 0.2, dtype=F64))
    general = WithIntegrals.forward(flow, t, state)
    torch.testing.assert_close(flow(t, state), general, rtol=1e-12, atol=1e-12)
    assert general[2].item() > 0


def test_p_and_q_are_the_integrals_of_the_violated_margins() -> None:
    constants = violating()
    flow = learned_ishd(logistic(0), constants)
    task = stopm_task(flow, zeros(flow.objective), target=4e-2)  # type: ignore[arg-type]
    result = task.run(gradient=None, solver=Torchdiffeq(rtol=1e-7))
    found = [q.item() for q in flow.integrals(result.state)]
    times = torch.linspace(1.0, result.time.item(), 801, dtype=F64)
    points = torch.zeros(801, 10, dtype=F64)  # the curvature is constant
    with torch.no_grad():
        margins = (
            stability_margins(flow.flow, times, points, step=0.04, curvature=lambda x: 625.0),
            convergence_margins(flow.flow, times),
        )
    expected = [np.trapezoid(m.violation().numpy(), times.numpy()) for m in margins]
    assert found == pytest.approx(expected, rel=5e-5)
    assert min(expected) > 1e-2
    assert stopm_penalty(task, result).item() == pytest.approx(sum(expected), rel=5e-5)


def test_a_violation_that_begins_on_the_way_does_not_stop_the_solver() -> None:
    # gamma crosses beta/h at some time after t0: P is exactly zero until then.
    constants = StoPMConstants(spread=0.0, beta=2.0, gamma=2.05)
    with torch.no_grad():
        constants.gamma.output[0], constants.gamma.weight[0] = 0.2, 1.0
        constants.gamma.shift[0] = -1.0
    flow = learned_ishd(logistic(0), constants)
    start = flow.initial_state(zeros(flow.objective))  # type: ignore[arg-type]
    begin, late = torch.tensor(1.0, dtype=F64), torch.tensor(6.0, dtype=F64)
    assert flow(begin, start)[2].item() == 0.0
    assert flow(late, start)[2].item() > 0.0
    run = stopm_task(flow, zeros(flow.objective)).run(gradient=None)  # type: ignore[arg-type]
    assert bool(run.reached)
    assert flow.integrals(run.state)[0].item() > 0.0


@loosely
def test_gradient_agrees_with_central_differences() -> None:
    constants = StoPMConstants(beta=2.0, gamma=2.0, spread=4.0, seed=2)
    flow = learned_ishd(logistic(0), constants)
    task = stopm_task(flow, torch.full((10,), 0.1, dtype=F64), target=3e-2)

    def objective(**settings: Any) -> Tensor:
        result = task.run(solver=Torchdiffeq(rtol=1e-7), **settings)
        return result.time + 3.0 * stopm_penalty(task, result)

    parameters = list(constants.parameters())
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=F64) for p in parameters]
    gradients = torch.autograd.grad(objective(), parameters)
    slope = torch.stack([(g * d).sum() for g, d in zip(gradients, direction, strict=True)]).sum()

    def shifted(size: float) -> float:
        originals = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += size * d
            value = objective(gradient=None).item()
            for p, original in zip(parameters, originals, strict=True):
                p.copy_(original)
        return value

    assert objective(gradient=None).item() > 2.0  # T is 1.3: the penalties count
    coarse, fine = ((shifted(h) - shifted(-h)) / (2 * h) - slope.item() for h in (2e-2, 1e-2))
    assert coarse / fine == pytest.approx(4.0, rel=0.07)
    assert abs(4 * fine - coarse) / 3 < 1e-3 * abs(slope.item())


# Training -----------------------------------------------------------------------------------------


@loosely
@pytest.mark.slow
def test_a_few_iterations_help_another_problem() -> None:
    constants = StoPMConstants()
    other = learned_ishd(logistic(8, samples=100, dim=20), constants)
    before = iterations(other)
    train = learned_ishd(logistic(1, samples=60), constants)
    task = stopm_task(train, zeros(train.objective), target=3e-3)  # type: ignore[arg-type]
    history = train_stopm(task, constants, iterations=7, progress=False)
    assert history.best.objective < 0.85 * history.objectives[0]
    assert iterations(other) < 0.85 * before


@pytest.mark.slow
@loosely
def test_training_halves_the_iterations_on_other_problems() -> None:
    constants = StoPMConstants()
    others = [
        learned_ishd(logistic(seed, samples=200, dim=dim), constants)
        for seed, dim in itertools.product((7, 8), (20, 40))
    ]
    before = [iterations(flow) for flow in others]
    train = learned_ishd(logistic(0, samples=200, dim=20), constants)
    history = train_stopm(stopm_task(train, zeros(train.objective)), constants)  # type: ignore[arg-type]
    best = history.records[history.best.iteration]
    assert best.penalty < 0.1
    # By hand, for Lambda = L: gamma = beta/h with the largest beta that the conditions admit tends
    # to 4 times the constants of the start, and N to half.
    after = [iterations(flow) for flow in others]
    assert max(n / m for n, m in zip(after, before, strict=True)) < 0.57
    assert sum(after) < 0.55 * sum(before)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="lipschitz must be a positive number"):
        learned_ishd(lambda x: x.square().sum(-1))
    with pytest.raises(ValueError, match="lipschitz must be a positive number"):
        learned_ishd(logistic(0), lipschitz=-1.0)
    for name in ("step", "t0"):
        with pytest.raises(ValueError, match=f"{name} must be positive"):
            StoPMConstants(**{name: 0.0})
    flow = learned_ishd(logistic(0))
    with pytest.raises(ValueError, match="t0"):
        stopping_time(
            flow,
            flow.initial_state(zeros(flow.objective)),  # type: ignore[arg-type]
            GradientNorm(flow.objective, squared=False),
            3e-4,
        )
    with pytest.raises(TypeError, match="state of LearnedISHD"):
        flow(torch.tensor(1.0), (torch.ones(10), torch.ones(10)))
    assert math.isfinite(flow.scale)
