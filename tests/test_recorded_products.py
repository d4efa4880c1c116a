"""`InterpolatingAdjoint` by recorded products: autograd's, to rounding, or autograd itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ode_stopping import (
    GradientNorm,
    HeavyBallFlow,
    InterpolatingAdjoint,
    PreconditionedFlow,
    Quadratic,
    Torchdiffeq,
    stopping_time,
)
from ode_stopping.gradients import staged
from ode_stopping.gradients.recording import Recording, Unrecordable
from ode_stopping.problems import random_rotation

# None of these is about accuracy.
pytestmark = pytest.mark.filterwarnings("ignore::ode_stopping.GradientAccuracyWarning")

DIM = 64
SPECTRUM = torch.logspace(-1, 1, DIM, dtype=torch.float64)
ROTATION = random_rotation(DIM, seed=0)
MATRIX = (ROTATION * SPECTRUM) @ ROTATION.mT
START = torch.randn(DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Flow = Callable[[Tensor, Any], Any]


@dataclass(frozen=True)
class Case:
    """A flow with its leaves, made anew for every run."""

    flow: Flow
    leaves: list[Tensor]
    x0: Any = None
    criterion: Callable[[Tensor, Any], Tensor] = lambda t, x: (x * x).sum()
    target: float = 1e-3
    rtol: float = 1e-8
    method: str = "dopri5"
    breakpoints: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Found:
    """Gradients of T, evaluations and products of the backward pass."""

    gradients: list[Tensor]
    evaluations: int
    products: int

    def recorded_beside(self, eager: Found) -> bool:
        """Whether most of the products were taken without an evaluation."""
        return eager.evaluations - self.evaluations > eager.products / 2


def leaf(value: Tensor) -> Tensor:
    return value.clone().requires_grad_(True)


def found(make: Callable[[], Case], between: Callable[[], None] = lambda: None) -> Found:
    """The gradient of T; `between` the two passes something may happen."""
    case = make()
    start = START.clone() if case.x0 is None else case.x0
    x0 = leaf(start) if isinstance(start, Tensor) else tuple(leaf(part) for part in start)
    result = stopping_time(
        case.flow,
        x0,
        case.criterion,
        case.target,
        gradient=InterpolatingAdjoint(),
        solver=Torchdiffeq(method=case.method, rtol=case.rtol),
        evidence="light",
        breakpoints=case.breakpoints,
    )
    between()
    result.time.backward()
    leaves = [*case.leaves, *([x0] if isinstance(x0, Tensor) else x0)]
    gradients = [p.grad for p in leaves if p.grad is not None]
    assert len(gradients) == len(leaves)
    stats = result.stats
    assert stats.nfe_backward is not None
    assert stats.vjps is not None
    return Found(gradients, stats.nfe_backward, stats.vjps)


@pytest.fixture
def eagerly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Found]:
    """The gradient with no recording at all."""

    def run(make: Callable[[], Case], **options: Any) -> Found:
        with monkeypatch.context() as patch:
            patch.setattr(staged, "_MANY_STEPS", 10**9)
            return found(make, **options)

    return run


def rotated() -> Case:
    theta = leaf(torch.ones(DIM, dtype=torch.float64))
    return Case(lambda t, x: -theta * (MATRIX @ x), [theta])


def driven() -> Case:
    matrix, rate = leaf(MATRIX), leaf(torch.tensor(0.3, dtype=torch.float64))
    return Case(lambda t, x: -(1 + 0.5 * torch.sin(rate * t)) * (matrix @ x), [matrix, rate])


class Network(nn.Module):
    """x' = -(1 + tanh(W x + b) / 2) x, with a forward hook that hands its output on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM, dtype=torch.float64)
        generator = torch.Generator().manual_seed(2)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / DIM
        self.layer.register_forward_hook(lambda module, inputs, output: 2 * output)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -(1 + torch.tanh(self.layer(x)) / 2) * (MATRIX @ x)


def network() -> Case:
    flow = Network()
    return Case(flow, list(flow.parameters()))


def inner_gradient() -> Case:
    theta = leaf(SPECTRUM)

    def flow(t: Tensor, x: Tensor) -> Tensor:
        energy = (theta * torch.cosh(x)).sum()
        return -torch.autograd.grad(energy, x, create_graph=True)[0]

    return Case(flow, [theta])


def gradient_of_a_function() -> Case:
    theta = leaf(SPECTRUM)
    energy = torch.func.grad(lambda x: (theta * torch.cosh(x)).sum())
    return Case(lambda t, x: -energy(x), [theta])


def library_classes() -> Case:
    theta, problem = leaf(torch.ones(DIM, dtype=torch.float64)), Quadratic(MATRIX)
    flow = PreconditionedFlow(problem, preconditioner=theta)
    return Case(flow, [theta], criterion=GradientNorm(problem))


def heavy_ball() -> Case:
    damping = leaf(torch.tensor(2.0, dtype=torch.float64))
    problem = Quadratic(MATRIX)
    flow = HeavyBallFlow(problem, damping=damping)
    start = tuple(part.detach() for part in flow.initial_state(START))
    return Case(flow, [damping], start, GradientNorm(problem))


def tuple_state() -> Case:
    stiffness = leaf(SPECTRUM)

    def flow(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, v = state
        return v, -stiffness * x - 2 * v

    energy = lambda t, state: (state[0] ** 2).sum() + (state[1] ** 2).sum()  # noqa: E731
    return Case(flow, [stiffness], (START, torch.zeros_like(START)), energy)


def branch_by_where() -> Case:
    theta, slope = leaf(torch.ones(DIM, dtype=torch.float64)), leaf(SPECTRUM / 10)
    return Case(
        lambda t, x: -theta * (MATRIX @ x) - torch.where(x > 0, slope * x * x, 0.0), [theta, slope]
    )


def jump_by_where() -> Case:
    theta = leaf(torch.ones(DIM, dtype=torch.float64))
    gain = lambda t: torch.where(t < 1.0, 1.0, 0.5)  # noqa: E731
    return Case(lambda t, x: -theta * gain(t) * (MATRIX @ x), [theta], breakpoints=(1.0,))


def unused_leaf() -> Case:
    used, unused = leaf(SPECTRUM), leaf(torch.ones(3, dtype=torch.float64))
    return Case(lambda t, x: -used * x + 0.0 * unused.sum(), [used, unused])


def by(make: Callable[[], Case], method: str, rtol: float) -> Callable[[], Case]:
    return lambda: replace(make(), method=method, rtol=rtol)


RECORDED = {
    "rotated": rotated,
    "driven": driven,
    "network": network,
    "inner gradient": inner_gradient,
    "torch.func.grad": gradient_of_a_function,
    "classes": library_classes,
    "heavy ball": heavy_ball,
    "tuple": tuple_state,
    "where": branch_by_where,
    "jump": jump_by_where,
    "unused leaf": unused_leaf,
    # One with an evaluation at the end of a step, one with more than a quartic's order.
    "fehlberg2": by(rotated, "fehlberg2", 1e-6),
    "dopri8": by(driven, "dopri8", 1e-10),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_agrees(
    name: str, eagerly: Callable[..., Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every step is compared with autograd, to rounding: where one is not, all is done by autograd.
    monkeypatch.setattr(staged, "_ONE_IN", 1)
    one, other = found(RECORDED[name]), eagerly(RECORDED[name])
    assert one.recorded_beside(other)
    # At the limit of stability roundings change the steps, and these the gradient by its error.
    for a, b in zip(one.gradients, other.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * float(b.abs().max()))


def test_recorded_gradient_of_a_closed_form() -> None:
    # |x|^2 = |x0|^2 exp(-2 a T), so dT/da = -T/a.
    rate = leaf(torch.tensor(0.7, dtype=torch.float64))
    one = found(lambda: Case(lambda t, x: -rate * x, [rate], rtol=1e-10))
    time = float(torch.log((START @ START) / 1e-3)) / (2 * 0.7)
    assert one.products > 3 * one.evaluations
    assert float(one.gradients[0]) == pytest.approx(-time / 0.7, rel=1e-8)
    torch.testing.assert_close(one.gradients[1], START / (START @ START) / 0.7, rtol=1e-8, atol=0)


def test_single_precision(eagerly: Callable[..., Found]) -> None:
    matrix = MATRIX.float()

    def make() -> Case:
        theta = leaf(torch.ones(DIM))
        return Case(lambda t, x: -theta * (matrix @ x), [theta], START.float(), rtol=3e-6)

    one, other = found(make), eagerly(make)
    for a, b in zip(one.gradients, other.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


class Signed(torch.autograd.Function):
    """x, with a derivative of its own before t = 1, chosen in Python in the backward pass."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (t,) = ctx.saved_tensors
        return None, gradients[0] * (1.0 if t.numpy() > 0.05 else 1.01)


class Counting(nn.Module):
    """A flow that counts its evaluations in a buffer."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(SPECTRUM.clone())
        self.register_buffer("count", torch.zeros(()))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.count += 1
        return -self.rate * x


def with_theta(flow: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Case]:
    def make() -> Case:
        theta = leaf(SPECTRUM)
        return Case(lambda t, x: flow(theta, t, x), [theta])

    return make


def counting() -> Case:
    flow = Counting()
    return Case(flow, [flow.rate])


def written(theta: Tensor, t: Tensor, x: Tensor) -> Tensor:
    velocity = torch.empty_like(x)
    velocity[: DIM // 2] = -(theta * x)[: DIM // 2]
    velocity[DIM // 2 :] = -(theta * x)[DIM // 2 :]
    return velocity


NOT_RECORDED = {
    "if t": with_theta(lambda p, t, x: -p * x if t < 0.3 else -p * x - 0.0 * x),
    "float(t)": with_theta(lambda p, t, x: -p * x * (1.0 + 0.0 * float(t.detach()))),
    "numpy": with_theta(lambda p, t, x: -p * x if t.detach().numpy() < 0.3 else -(x * p)),
    "if x": with_theta(lambda p, t, x: -p * x if x.norm() > 1.0 else -(x * p)),
    "tolist": with_theta(lambda p, t, x: -p * x if x.tolist()[0] > 0.1 else -(x * p)),
    "print": with_theta(lambda p, t, x: -p * x if "0." in str(t) else -(x * p)),
    "mask": with_theta(lambda p, t, x: -p * x - 0.0 * x[x > 0].sum()),
    "in place": with_theta(written),
    "Python backward": with_theta(lambda p, t, x: -p * Signed.apply(t, x)),
    "counter": counting,
}


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_what_cannot_be_recorded_goes_to_autograd(name: str, eagerly: Callable[..., Found]) -> None:
    one, other = found(NOT_RECORDED[name]), eagerly(NOT_RECORDED[name])
    assert one.products == other.products
    assert one.evaluations <= other.evaluations + 1
    for a, b in zip(one.gradients, other.gradients, strict=True):
        assert torch.equal(a, b)


def test_flow_that_cannot_be_recorded_is_not_left_half_way() -> None:
    entered: list[int] = [0, 0]

    def flow(p: Tensor, t: Tensor, x: Tensor) -> Tensor:
        entered[0] += 1
        velocity = -p * x * (1.0 + 0.0 * float(t.detach()))
        entered[1] += 1
        return velocity

    found(with_theta(flow))
    assert entered[0] == entered[1] > 100


def test_flow_that_changed_since_the_forward_run_goes_to_autograd(
    eagerly: Callable[..., Found],
) -> None:
    gain = [1.0]

    def flow(p: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return -gain[0] * p * x

    def results(run: Callable[..., Found]) -> Found:
        gain[0] = 1.0
        return run(with_theta(flow), between=lambda: gain.__setitem__(0, 1.001))

    one, other = results(found), results(eagerly)
    assert one.products == other.products
    for a, b in zip(one.gradients, other.gradients, strict=True):
        assert torch.equal(a, b)


def test_global_that_the_flow_reads_is_read_as_it_is(
    eagerly: Callable[..., Found],
) -> None:
    for value in (1.0, 0.5):

        def flow(p: Tensor, t: Tensor, x: Tensor, value: float = value) -> Tensor:
            return -value * p * x

        one, other = found(with_theta(flow)), eagerly(with_theta(flow))
        assert one.recorded_beside(other)
        torch.testing.assert_close(one.gradients, other.gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("part", ["_of_state", "_of_leaves"])
@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 99.0), (0.0, 1e-12), (10.0, 20.0), (35.0, 99.0)], ids=str
)
def test_planted_disagreement_goes_to_autograd(
    part: str,
    low: float,
    high: float,
    eagerly: Callable[..., Found],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Products that are wrong on a stretch of t, F being right: a detach on one branch."""
    planted = 0

    class Wrong(Recording):
        def run(self, *inputs: Tensor) -> list[Tensor]:
            nonlocal planted
            bad = (inputs[0] >= low) & (inputs[0] <= high)
            planted += int(bad.any())
            factor = 1 + 1e-9 * bad.to(inputs[0])
            return [
                (one.T * factor).T if one.dim() == 2 else one * factor.max()
                for one in super().run(*inputs)
            ]

    class Planted(staged.Products):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            right = getattr(self, part)
            setattr(self, part, Wrong(right.operations, right.outputs, right.size))

    monkeypatch.setattr("ode_stopping.gradients.interpolating.Products", Planted)
    one, other = found(rotated), eagerly(rotated)
    assert planted > 0
    for a, b in zip(one.gradients, other.gradients, strict=True):
        assert torch.equal(a, b)


def test_second_derivatives_are_refused_as_ever() -> None:
    case = rotated()
    result = stopping_time(
        case.flow, START, case.criterion, case.target, gradient=InterpolatingAdjoint()
    )
    with pytest.raises(RuntimeError, match="second"):
        torch.autograd.grad(
            torch.autograd.grad(result.time, case.leaves, create_graph=True)[0].sum(), case.leaves
        )


def inputs() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    for _ in range(2):
        yield tuple(torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[misc]


def test_recording_is_the_function_at_other_inputs() -> None:
    weight = torch.arange(5.0, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        parts = torch.stack([x * weight.exp(), y.detach()]).unbind()
        return [torch.cat([parts[0], y]), torch.tanh(x) @ y, weight.exp()]

    first, second = inputs()
    recording = Recording.of(function, *first)
    for one, other in zip(recording.run(*second), function(*second), strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad
    alone = recording.giving(1)
    assert len(alone.operations) == 2 < len(recording.operations)
    assert torch.equal(alone.run(*second)[0], torch.tanh(second[0]) @ second[1])


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: [x if bool(x[0] > 0) else y],
        lambda x, y: [x * x[0].item()],
        lambda x, y: [x * torch.rand_like(x)],
        lambda x, y: [x * float(len(x.nonzero()))],
        lambda x, y: [x + torch.from_numpy(y.numpy())],
        lambda x, y: [x + y.clone().zero_()],
        lambda x, y: [x + nn.Parameter(y)],
        lambda x, y: [x if torch.equal(x, y) else y],
        lambda x, y: [x * float(f"{y[0]:.2f}")],
    ],
)
def test_recording_is_refused(function: Callable[[Tensor, Tensor], list[Tensor]]) -> None:
    with pytest.raises(Unrecordable, match="in a recording"):
        Recording.of(function, *next(inputs()))
