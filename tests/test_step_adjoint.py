"""`StepAdjoint`: the exact transpose of the accepted steps, and where that is garbage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from closed_forms import CLOSED_FORMS
from rotated import RotatedQuadratic
from torch import Tensor, nn

from ode_stopping import (
    DirectAdjoint,
    ForwardSensitivity,
    GradientAccuracyWarning,
    GradientFlow,
    GradientRoute,
    InterpolatingAdjoint,
    LossValue,
    NotReproducibleError,
    Rosenbrock,
    StepAdjoint,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.gradients.steps import _Transpose
from ode_stopping.solving.torchdiffeq import adaptive_methods

F64 = torch.float64
CHUNKS = (1, 3, 100)


def distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Largest relative difference in norm."""
    return max(
        float((one - other).norm() / other.norm()) for one, other in zip(first, second, strict=True)
    )


class Pair(nn.Module):
    """A driven state (x, v) whose force jumps at t = 0.6 and t = 1.4; J = energy."""

    jumps = (0.6, 1.4)

    def __init__(self) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor([1.0, 2.2, 0.7], dtype=F64))
        self.damping = nn.Parameter(torch.tensor(0.8, dtype=F64))
        self.force = nn.Parameter(torch.tensor([0.3, -0.2, 0.4], dtype=F64))

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, v = state
        piece = sum(bool(t > jump) for jump in self.jumps)
        pull = self.force[piece] * torch.cos(t)
        return v, -self.stiffness * x - 0.2 * x**3 - self.damping * v + pull * torch.tanh(x)

    def energy(self, t: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
        x, v = state
        return 0.5 * ((self.stiffness * x * x).sum() + v.square().sum())


class PairProblem:
    """`Pair` with every input a leaf."""

    def __init__(self, targets: Sequence[float] = (0.1,)) -> None:
        self.flow = Pair()
        self.x0 = torch.tensor([1.0, -0.6, 0.8], dtype=F64, requires_grad=True)
        self.v0 = torch.tensor([0.2, 0.4, -0.1], dtype=F64, requires_grad=True)
        self.eps = torch.tensor(list(targets), dtype=F64, requires_grad=True)
        self.leaves = [self.x0, self.v0, self.eps, *self.flow.parameters()]

    def solve(
        self,
        route: GradientRoute,
        *,
        rtol: float = 1e-7,
        method: str = "dopri5",
        only: int | None = None,
    ) -> StoppingResult:
        eps = self.eps if only is None else self.eps[only]
        return stopping_time(
            self.flow,
            (self.x0, self.v0),
            self.flow.energy,
            eps[0] if eps.ndim and len(eps) == 1 else eps,
            gradient=route,
            breakpoints=Pair.jumps,
            solver=Torchdiffeq(method=method, rtol=rtol),
        )

    def gradients(self, value: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(
            value, self.leaves, retain_graph=True, materialize_grads=True, allow_unused=True
        )
        return list(found)


def functional(result: StoppingResult) -> Tensor:
    """T and x_T weighed, of one target or of several."""
    position, velocity = result.state
    weights = torch.tensor([0.4, -0.7, 1.1], dtype=F64)
    return result.time.sum() + (position @ weights).sum() - 0.5 * velocity[..., 1].sum()


# --- against DirectAdjoint: the same derivative -------------------------------------------------


@pytest.mark.parametrize("condition", [10.0, 100.0])
@pytest.mark.parametrize("rtol", [1e-5, 1e-8])
def test_a_rotated_quadratic(condition: float, rtol: float) -> None:
    problem, found = RotatedQuadratic(condition, dim=12), []
    for route in (StepAdjoint(), DirectAdjoint()):
        leaves = problem.leaves()
        result = problem.solve(leaves, 1e-4, route, rtol)
        found.append(torch.autograd.grad(result.time, [*leaves.values()]))
        assert result.stats.fallback is None
    assert distance(*found) < 1e-10


@pytest.mark.parametrize("of", ["time", "state", "both"])
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


moved_end = pytest.mark.xfail(
    raises=(AssertionError, NotReproducibleError),
    strict=True,
    reason="the end of a hit's last step is moved by the trapezoidal rule, which is not the step's",
)


def cases(passing: Sequence[Any], failing: Sequence[Any]) -> list[Any]:
    """What is to hold, with what does not yet."""
    marked = [one if isinstance(one, tuple) else (one,) for one in failing]
    return [*passing, *(pytest.param(*one, marks=moved_end) for one in marked)]


OFF = ("dopri8", "fehlberg2", "adaptive_heun")


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize("method", cases([m for m in adaptive_methods() if m not in OFF], OFF))
def test_every_method(method: str) -> None:
    """Also those that do not end on their last stage, and that of order 8."""
    rtol, found = 1e-4 if method in ("adaptive_heun", "fehlberg2") else 1e-6, []
    for route in (StepAdjoint(), DirectAdjoint()):
        problem = PairProblem([0.5, 0.1])
        result = problem.solve(route, rtol=rtol, method=method)
        found.append(problem.gradients(functional(result)))
        assert result.stats.fallback is None
    assert distance(*found) < 1e-10


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize(
    ("method", "rtol"),
    cases(
        [("dopri5", 1e-6), ("dopri5", 1e-8), ("bosh3", 1e-6), ("dopri8", 1e-8)],
        [
            ("dopri5", 1e-2),
            ("dopri5", 1e-3),
            ("bosh3", 1e-3),
            ("fehlberg2", 1e-3),
            ("dopri8", 1e-4),
            ("adaptive_heun", 1e-3),
        ],
    ),
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


@moved_end
@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "fehlberg2"])
def test_closed_forms_at_loose_tolerances(method: str) -> None:
    """The default route has an answer at every tolerance."""
    for rtol in (1e-2, 1e-3, 1e-4, 1e-5):
        for case in (CLOSED_FORMS[0], CLOSED_FORMS[2], CLOSED_FORMS[4]):
            leaves = case.leaves(1e-1, 0.25)
            result = case.solve(leaves, StepAdjoint(), rtol=rtol, method=method)
            result.time.backward()
            error = max(case.errors(result.time, leaves)[1].values())
            assert error < (0.3 if method == "fehlberg2" else 50 * rtol), (case.name, rtol)


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


@pytest.mark.parametrize("k", range(5))
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


# --- where the transpose is garbage -------------------------------------------------------------

GENTLE, PLANTED, FAR, LOOSE = (-1.2, 2.0), (-1.2, 1.0), (-1.8, 3.2), (-1.5, 2.0)


def rosenbrock(
    start: tuple[float, float], route: GradientRoute, rtol: float
) -> tuple[Tensor, StoppingResult]:
    """dT/dx0 and the result; x' = -grad f, J = f, target 0.5."""
    x0 = torch.tensor(start, dtype=F64, requires_grad=True)
    objective = Rosenbrock(dim=2)
    result = stopping_time(
        GradientFlow(objective),
        x0,
        LossValue(objective),
        0.5,
        gradient=route,
        solver=Torchdiffeq(rtol=rtol),
    )
    (gradient,) = torch.autograd.grad(result.time, x0)
    return gradient, result


@cache
def truth_of(start: tuple[float, float]) -> Tensor:
    return rosenbrock(start, InterpolatingAdjoint(), 1e-6)[0]


def error_of(gradient: Tensor, truth: Tensor) -> float:
    return float((gradient - truth).norm() / truth.norm())


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize(
    ("start", "rtol"), [(PLANTED, 1e-3), (LOOSE, 1e-3), (LOOSE, 1e-2)], ids=str
)
def test_the_transpose_is_garbage_there(start: tuple[float, float], rtol: float) -> None:
    """What is planted: DirectAdjoint is off by a factor, the continuous adjoint is not."""
    truth = truth_of(start)
    assert error_of(rosenbrock(start, DirectAdjoint(), rtol)[0], truth) > 1.0
    assert error_of(rosenbrock(start, InterpolatingAdjoint(), rtol)[0], truth) < 1e-2


@pytest.mark.parametrize(
    ("start", "rtol"),
    [
        (FAR, 1e-4),
        pytest.param(
            PLANTED,
            1e-3,
            marks=pytest.mark.xfail(
                raises=NotReproducibleError, strict=True, reason="its last step, as above"
            ),
        ),
        pytest.param(
            LOOSE,
            1e-3,
            marks=pytest.mark.xfail(
                strict=True, reason="the residual is measured in units of the garbage itself"
            ),
        ),
        pytest.param(
            LOOSE,
            1e-2,
            marks=pytest.mark.xfail(
                strict=True, reason="the residual is measured in units of the garbage itself"
            ),
        ),
    ],
    ids=str,
)
def test_garbage_falls_back(start: tuple[float, float], rtol: float) -> None:
    gradient, result = rosenbrock(start, StepAdjoint(), rtol)
    assert result.stats.route == "InterpolatingAdjoint"
    assert "departs from what it has to be" in result.stats.fallback
    assert error_of(gradient, truth_of(start)) < 1e-2
    assert result.evidence.passed
    assert "quadrature" in result.evidence.figures


@pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")
@pytest.mark.parametrize(
    ("start", "rtol"),
    [(GENTLE, 1e-3), (GENTLE, 1e-5), (PLANTED, 1e-5)],
    ids=str,
)
def test_a_transpose_that_is_good_stays(start: tuple[float, float], rtol: float) -> None:
    gradient, result = rosenbrock(start, StepAdjoint(), rtol)
    assert result.stats.route == "StepAdjoint"
    assert result.stats.fallback is None
    assert error_of(gradient, truth_of(start)) < 50 * rtol


def test_a_planted_departure_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """lam turned by a third at every chunk."""
    through = _Transpose.through

    def turned(self: _Transpose, begin: int, end: int) -> None:
        through(self, begin, end)
        self._sweep.lam = [1.3 * self._sweep.lam[0]]

    leaves = CLOSED_FORMS[2].leaves(1e-3, 0.25)
    monkeypatch.setattr(_Transpose, "through", turned)
    result = CLOSED_FORMS[2].solve(leaves, StepAdjoint(chunk=2), rtol=1e-9)
    result.time.backward()
    assert result.stats.route == "InterpolatingAdjoint"
    assert max(CLOSED_FORMS[2].errors(result.time, leaves)[1].values()) < 1e-6


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("rtol", [1e-4, 1e-7, 1e-9])
def test_cotangents_on_the_state_alone_do_not_fall_back(which: int, rtol: float) -> None:
    """lam^T F is 0 there but for rounding, which is compared with sum |lam_i F_i|."""
    problem = PairProblem()
    result = problem.solve(StepAdjoint(), rtol=rtol)
    weights = torch.tensor([0.4, -0.7, 1.1], dtype=F64)
    problem.gradients(result.state[which] @ weights)
    assert result.stats.fallback is None
    assert result.stats.route == "StepAdjoint"


def test_cotangents_on_the_state_of_a_linear_flow() -> None:
    problem = RotatedQuadratic(10.0, dim=12)
    found = []
    for route in (StepAdjoint(), DirectAdjoint()):
        leaves = problem.leaves()
        assert [*leaves][-1] == "speed"
        result = problem.solve(leaves, 1e-3, route, 1e-7)
        assert isinstance(result.state, Tensor)
        value = result.state[0] - 0.3 * result.state[5]
        *gradient, by_speed = torch.autograd.grad(value, [*leaves.values()])
        found.append(gradient)
        # The speed moves x along its path only.
        assert abs(float(by_speed)) < 1e-8
        assert result.stats.fallback is None
    assert distance(*found) < 1e-9


# --- flows that are not what they were ----------------------------------------------------------


@pytest.mark.parametrize("change", [1.0, 1e-6])
def test_a_flow_that_changed_before_the_backward_pass(change: float) -> None:
    """A variable in a closure: no version counter knows."""
    speed = {"now": 1.0}
    rate = torch.tensor(1.3, dtype=F64, requires_grad=True)
    result = stopping_time(
        lambda t, x: -rate * speed["now"] * x,
        torch.tensor([2.0, -1.0], dtype=F64),
        lambda t, x: x.square().sum(),
        1e-2,
    )
    speed["now"] += change
    with pytest.raises(NotReproducibleError, match="does not give the state"):
        result.time.backward()


def test_a_flow_that_changed_after_a_while_only() -> None:
    """Its early steps are the same, and the chunk in which they are not says when."""
    late = {"on": 0.0}
    rate = torch.tensor(1.3, dtype=F64, requires_grad=True)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        return -rate * x * (1 + late["on"] * torch.relu(t - 1.0))

    result = stopping_time(
        flow,
        torch.tensor([2.0, -1.0], dtype=F64),
        lambda t, x: x.square().sum(),
        1e-2,
        gradient=StepAdjoint(chunk=2),
    )
    late["on"] = 0.1
    with pytest.raises(NotReproducibleError, match=r"replaying the steps from t = [12]"):
        result.time.backward()


# --- odds and ends ------------------------------------------------------------------------------


def test_it_is_the_default() -> None:
    rate = torch.tensor(1.3, dtype=F64, requires_grad=True)
    result = stopping_time(
        lambda t, x: -rate * x,
        torch.tensor([2.0], dtype=F64),
        lambda t, x: x.square().sum(),
        1e-2,
    )
    result.time.backward()
    assert result.stats.route == "StepAdjoint"
    assert result.evidence.second_route is None


def test_products_are_those_of_the_accepted_steps() -> None:
    """One evaluation with a graph and one product for each of the six stages of a step."""
    case = CLOSED_FORMS[0]
    leaves = case.leaves(1e-3, 0.0)
    result = case.solve(leaves, StepAdjoint(), rtol=1e-8)
    result.time.backward()
    assert result.stats.vjps <= 6 * result.stats.accepted
    assert result.stats.nfe_backward <= 6 * result.stats.accepted


def test_single_precision() -> None:
    rate = torch.tensor(1.3, requires_grad=True)
    x0 = torch.tensor([2.0, 1.0], requires_grad=True)
    result = stopping_time(lambda t, x: -rate * x, x0, lambda t, x: x.square().sum(), 1e-2)
    found = torch.autograd.grad(result.time, [rate, x0])
    span = torch.log(x0.detach().square().sum() / 1e-2) / (2 * 1.3)
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(-span.item() / 1.3, rel=1e-3)
    assert result.stats.fallback is None


def test_loose_evidence_is_a_warning_and_not_a_fallback() -> None:
    """adaptive_heun at a loose tolerance: the time term is large, the identity is not."""
    problem = PairProblem()
    result = problem.solve(StepAdjoint(), rtol=1e-4, method="adaptive_heun")
    with pytest.warns(GradientAccuracyWarning):
        problem.gradients(result.time)
    assert result.stats.fallback is None


def test_routes_that_do_not_differentiate_the_steps_agree_at_a_tight_tolerance() -> None:
    found = []
    for route in (StepAdjoint(), InterpolatingAdjoint(), ForwardSensitivity()):
        problem = PairProblem([0.5, 0.1])
        found.append(problem.gradients(functional(problem.solve(route, rtol=1e-9))))
    assert distance(found[0], found[1]) < 1e-6
    assert distance(found[0], found[2]) < 1e-6
