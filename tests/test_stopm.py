"""StoPM: the penalties are the integrals of the violated margins, and training reduces N."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from discrete import Euler, stopping_index
from ode_stopping import GradientNorm, LogisticRegression, Torchdiffeq, stopping_time
from ode_stopping.flows import convergence_margins, stability_margins
from ode_stopping.stopm import StoPMConstants, learned_ishd, stopm_task, train_stopm

F64 = torch.float64


def logistic(seed: int, samples: int = 60, dim: int = 8) -> LogisticRegression:
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(samples, dim, generator=generator, dtype=F64)
    X = X * torch.logspace(0, -1, dim, dtype=F64)
    y = torch.sign(X @ torch.randn(dim, generator=generator, dtype=F64))
    y[torch.rand(samples, generator=generator) < 0.1] *= -1
    return LogisticRegression(X, y, regularization=1e-3)


def test_penalties_are_integrals_of_the_violated_margins() -> None:
    constants = StoPMConstants(beta=0.5, gamma=3.0)
    f = logistic(0)
    flow = learned_ishd(f, constants)
    task = stopm_task(flow, torch.zeros(f.dim, dtype=F64))
    result = task.run(solver=Torchdiffeq(rtol=1e-7))
    p, q = (float(value.detach()) for value in flow.integrals(result.state))
    times = np.linspace(1.0, float(result.time.detach()), 4001)
    stable, converging = [], []
    lipschitz = torch.tensor(1 / constants.step**2, dtype=F64)  # of the rescaled objective
    with torch.no_grad():
        for t in times:
            now = torch.tensor(t, dtype=F64)
            x = result.trajectory(float(t))[0]
            margins = stability_margins(
                flow.flow, now, x, step=constants.step, curvature=lambda _: lipschitz
            )
            stable.append(float(margins.violation()))
            converging.append(float(convergence_margins(flow.flow, now).violation()))
    # In the units of the margins; the source adds them up as they are.
    by_hand = (np.trapezoid(stable, times), np.trapezoid(converging, times))
    assert p == pytest.approx(by_hand[0], rel=1e-3)
    assert q == pytest.approx(by_hand[1], rel=1e-3, abs=1e-9)
    assert p > 0


def iterations(f: LogisticRegression, constants: StoPMConstants) -> int:
    """N of Euler with the fixed step, from rest at 0."""
    flow = learned_ishd(f, constants)
    run = stopping_index(
        Euler(flow, step=constants.step),
        flow.initial_state(torch.zeros(f.dim, dtype=F64)),
        GradientNorm(f, squared=False),
        3e-4,
        t0=constants.t0,
        gradient=None,
        max_steps=5000,
    )
    return int(run.index)


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
def test_training_reduces_the_objective_and_keeps_the_iteration_stable() -> None:
    constants = StoPMConstants()
    f = logistic(1)
    task = stopm_task(learned_ishd(f, constants), torch.zeros(f.dim, dtype=F64))
    history = train_stopm(task, constants, iterations=4, progress=False)
    assert history.best.objective < history.objectives[0]
    assert 0 < iterations(f, constants) < 5000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
def test_training_on_some_problems_reduces_the_iterations_on_others() -> None:
    constants = StoPMConstants()
    train = [logistic(seed, samples=80, dim=20) for seed in range(3)]
    others = [logistic(seed, samples=80, dim=20) for seed in range(10, 14)]
    before = [iterations(f, constants) for f in others]
    tasks = [stopm_task(learned_ishd(f, constants), torch.zeros(f.dim, dtype=F64)) for f in train]
    train_stopm(tasks, constants, iterations=15, progress=False)
    after = [iterations(f, constants) for f in others]
    assert sum(after) < 0.95 * sum(before)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="lipschitz"):
        learned_ishd(lambda x: x.square().sum(-1))
    with pytest.raises(ValueError, match="step"):
        StoPMConstants(step=0.0)
    f = logistic(0)
    flow = learned_ishd(f)
    state = flow.initial_state(torch.zeros(f.dim, dtype=F64))
    with pytest.raises(ValueError, match="t0"):
        stopping_time(flow, state, GradientNorm(f, squared=False), 3e-4)
