"""`StepAdjoint`: the exact transpose of the accepted steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from driven_pair import CHUNKS, F64, Pair, PairProblem, distance, functional
from rotated import RotatedQuadratic
from torch import Tensor
from variants import slow_after

from ode_stopping import (
    DirectAdjoint,
    InterpolatingAdjoint,
    StepAdjoint,
)
from ode_stopping.solving.torchdiffeq import adaptive_methods
from theory_checks.closed_forms import CLOSED_FORMS

# --- against DirectAdjoint: the same derivative -------------------------------------------------


@pytest.mark.parametrize("condition", slow_after(1, [10.0, 100.0]))
@pytest.mark.parametrize("rtol", [1e-5, 1e-8])
def test_a_rotated_quadratic(condition: float, rtol: float) -> None:
    problem, found = RotatedQuadratic(condition, dim=12), []
    for route in (StepAdjoint(), DirectAdjoint()):
        leaves = problem.leaves()
        result = problem.solve(leaves, 1e-4, route, rtol)
        found.append(torch.autograd.grad(result.time, [*leaves.values()]))
        assert result.stats.fallback is None
    assert distance(*found) < 1e-10


@pytest.mark.parametrize("of", slow_after(1, ["both", "time", "state"]))
def test_a_tuple_of_states_with_breakpoints(of: str) -> None:
    found = []
    for route in (StepAdjoint(), DirectAdjoint()):
        problem = PairProblem()
        result = problem.solve(route)
        state = functional(result) - result.time
        value = {"time": result.time, "state": state, "both": functional(result)}[of]
        found.append(problem.gradients(value))
        assert result.stats.fallback is None
        assert float(result.time.detach()) > Pair.jumps[-1]
    assert distance(*found) < 1e-10


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize("method", adaptive_methods())
def test_every_method(method: str) -> None:
    """Also those that do not end on their last stage, and that of order 8."""
    rtol, found = {"adaptive_heun": 1e-2, "fehlberg2": 1e-3, "bosh3": 1e-4}.get(method, 1e-6), []
    for route in (StepAdjoint(), DirectAdjoint()):
        problem = PairProblem([0.5, 0.1])
        result = problem.solve(route, rtol=rtol, method=method)
        found.append(problem.gradients(functional(result)))
        assert result.stats.fallback is None
    assert distance(*found) < 1e-10


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize(
    ("method", "rtol"),
    [
        ("dopri5", 1e-2),
        ("dopri5", 1e-3),
        ("dopri5", 1e-6),
        ("dopri5", 1e-8),
        ("bosh3", 1e-3),
        ("bosh3", 1e-6),
        ("fehlberg2", 1e-3),
        ("adaptive_heun", 1e-3),
        ("dopri8", 1e-4),
        ("dopri8", 1e-8),
    ],
)
def test_every_step_can_be_taken_again(method: str, rtol: float) -> None:
    """Those of hits, too: the replay of each alone gives its end, to 100 eps (|y| + h |k|)."""
    problem = PairProblem([0.5, 0.1]).solve(StepAdjoint(), rtol=rtol, method=method).problem
    assert problem is not None
    for step in (*problem.steps, *(step for hit in problem.hits for step in hit.steps)):
        index = sum(t <= step.t0 for t in Pair.jumps)
        flow = problem.flow.on(index).traced
        end = problem.method.replay(flow, step, step.y0, step.t0, step.length).detach()
        size = step.y1.abs().max() + step.length * step.f0.abs().max()
        assert float((end - step.y1).abs().max() / size) <= 100 * torch.finfo(F64).eps


def test_the_transpose_is_not_the_continuous_adjoint() -> None:
    """At a loose tolerance the two are 1e-6 apart and more, far above the 1e-10 of the others."""
    found = []
    for route in (StepAdjoint(), InterpolatingAdjoint()):
        problem = PairProblem()
        found.append(problem.gradients(functional(problem.solve(route, rtol=1e-4))))
    assert 1e-6 < distance(*found) < 1e-2


@pytest.mark.parametrize("case", CLOSED_FORMS, ids=lambda case: case.name)
def test_closed_forms(case: Any) -> None:
    leaves = case.leaves(1e-3, 0.25)
    result = case.solve(leaves, StepAdjoint(), rtol=1e-9)
    result.time.backward()
    of_time, of_derivatives = case.errors(result.time, leaves)
    assert of_time < 1e-8
    assert max(of_derivatives.values()) < 1e-6
    assert result.stats.route == "StepAdjoint"


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2"])
def test_closed_forms_at_loose_tolerances(method: str) -> None:
    """Right to the promise, or a warning: fehlberg2's own error estimate is far too small."""
    for rtol in (1e-2, 1e-3, 1e-4, 1e-5):
        for case in (CLOSED_FORMS[0], CLOSED_FORMS[2], CLOSED_FORMS[4]):
            leaves = case.leaves(1e-1, 0.25)
            result = case.solve(leaves, StepAdjoint(), rtol=rtol, method=method)
            result.time.backward()
            error = max(case.errors(result.time, leaves)[1].values())
            assert result.evidence is not None
            warned = not result.evidence.passed
            assert error < 50 * rtol or warned, (case.name, rtol)
            assert method != "dopri5" or not warned, (case.name, rtol)


# --- chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [[0.1], [0.1, 0.5, 0.02, 0.3, 0.05]], ids=["one", "five"])
def test_the_length_of_a_chunk_does_not_matter(targets: list[float]) -> None:
    found, pulls = [], []
    for chunk in (*CHUNKS, None):
        problem = PairProblem(targets)
        result = problem.solve(StepAdjoint(chunk=chunk))
        found.append(problem.gradients(functional(result)))
        pulls.append(result.stats.vjps)
    for other in found[1:]:
        assert distance(other, found[0]) < 1e-12
    assert pulls[0] >= pulls[2] > 0


@pytest.mark.parametrize("chunk", [0, -1, 1.5, True])
def test_a_bad_chunk(chunk: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="chunk"):
        StepAdjoint(chunk=chunk)


def most_alive(call: Callable[[], object]) -> int:
    """Largest number of tensors that graphs hold at once."""
    alive, most = [0], [0]

    class Held:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            weakref.finalize(self, lambda: alive.__setitem__(0, alive[0] - 1))

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        call()
    return most[0]


def test_memory_of_the_graph_is_one_chunk() -> None:
    """It grows with the chunk, and not with the number of steps."""

    def backward(chunk: int, rtol: float) -> tuple[int, int]:
        problem = PairProblem()
        result = problem.solve(StepAdjoint(chunk=chunk), rtol=rtol)
        return most_alive(lambda: problem.gradients(result.time)), result.stats.accepted

    (few, steps), (few_long, steps_long) = backward(2, 1e-6), backward(2, 1e-10)
    many, _ = backward(100, 1e-10)
    assert steps_long > 3 * steps
    assert few_long <= 1.2 * few
    assert many > 4 * few_long


# --- several targets ----------------------------------------------------------------------------

FIVE = [0.1, 0.5, 0.02, 0.3, 0.05]


@pytest.mark.slow
def test_several_targets_are_the_single_ones() -> None:
    """Each alone on a run of its own (the first one too), at the tolerance of the runs."""
    problem = PairProblem(FIVE)
    together = problem.solve(StepAdjoint(), rtol=1e-9)
    for k in range(5):
        alone = problem.solve(StepAdjoint(), rtol=1e-9, only=k)
        for first, second in (
            (together.time[k], alone.time),
            (together.state[0][k].sum(), alone.state[0].sum()),
        ):
            one, other = problem.gradients(first), problem.gradients(second)
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


# The first and the last target of the path come first.
@pytest.mark.parametrize("k", slow_after(2, [1, 2, 0, 3, 4]))
def test_one_of_several_targets_alone(k: int) -> None:
    """Nothing arrives at the others: the path ends at that hit, wherever it stands."""
    found = []
    for route in (StepAdjoint(), DirectAdjoint()):
        problem = PairProblem(FIVE)
        result = problem.solve(route)
        found.append(problem.gradients(result.time[k] + 0.3 * result.state[0][k].sum()))
        assert result.stats.fallback is None
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= 1e-10 * float(other.norm()) + 1e-13
    # The derivative to the target itself is 1/J', and to the others it is zero.
    to_targets = found[0][2]
    assert [i for i in range(5) if float(to_targets[i]) != 0.0] == [k]


def test_an_earlier_target_costs_no_steps_beyond_it() -> None:
    problem = PairProblem(FIVE)
    result = problem.solve(StepAdjoint())
    cost = {}
    for k in (1, 2):  # the first and the last to be met
        problem.gradients(result.time[k])
        cost[k] = result.stats.vjps
    assert cost[1] < 0.7 * cost[2]


def test_any_cotangents_of_several_targets() -> None:
    generator = torch.Generator().manual_seed(1)
    on_times = torch.randn(5, generator=generator, dtype=F64)
    on_states = torch.randn(2, 5, 3, generator=generator, dtype=F64)
    on_times[0] = 0.0
    on_states[:, 3] = 0.0
    found = []
    for route in (StepAdjoint(), DirectAdjoint(), StepAdjoint(chunk=1)):
        problem = PairProblem(FIVE)
        result = problem.solve(route)
        value = on_times @ result.time
        value = value + sum((w * x).sum() for w, x in zip(on_states, result.state, strict=True))
        found.append(problem.gradients(value))
    assert distance(found[0], found[1]) < 1e-10
    assert distance(found[2], found[1]) < 1e-10
