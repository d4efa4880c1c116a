"""What holds for every flow, tried on many: symmetries of the stopping time and its gradient.

No closed form is needed: each property compares two solves of problems that are images of each
other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from discrete import Heun, stopping_index
from ode_stopping import (
    GradientRoute,
    InterpolatingAdjoint,
    Status,
    StoppingResult,
    Torchdiffeq,
    stopping_time,
)

F64 = torch.float64
# Of two solves of the same problem in other words; each is good to about 1e2 rtol.
BAR = {F64: 2e-5, torch.float32: 2e-2}
State = Tensor | tuple[Tensor, ...]


def sample(examples: int) -> Callable[[Any], Any]:
    """The same examples in every run."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@dataclass(frozen=True)
class Problem:
    """x' = c -(1 + a sin(w t)) (rates x + b scale tanh(x/scale)), J = sum weights x^2.

    Attributes:
        shapes: Shapes of the pieces; one piece without a tuple around it where `plain`.
        plain: Whether the state is a tensor.
        rates: One per coordinate, flat.
        weights: Of the criterion, one per coordinate.
        start: x0, flat.
        drive: (a, w): how the flow depends on t.
        bend: b, how nonlinear it is.
        depth: target / J(x0).
        scale: Size of x0.
        t0: Start time.
        speed: c, the factor of the whole flow.
    """

    shapes: tuple[tuple[int, ...], ...]
    plain: bool
    rates: Tensor
    weights: Tensor
    start: Tensor
    drive: tuple[float, float]
    bend: float
    depth: float
    scale: float
    t0: float
    speed: float = 1.0

    def pieces(self, flat: Tensor) -> State:
        """The user's state from a flat vector."""
        parts = torch.split(flat, [torch.Size(s).numel() for s in self.shapes])
        shaped = tuple(p.reshape(s) for p, s in zip(parts, self.shapes, strict=True))
        return shaped[0] if self.plain else shaped

    def solve(
        self,
        route: GradientRoute | None = InterpolatingAdjoint(),  # noqa: B008
        solver: Torchdiffeq | None = None,
    ) -> tuple[StoppingResult, dict[str, Tensor]]:
        """The result, and the leaves by name."""
        leaves = {
            "x0": self.start.clone().requires_grad_(True),
            "rates": self.rates.clone().requires_grad_(True),
            "t0": torch.tensor(self.t0, dtype=F64, requires_grad=True),
            "target": torch.tensor(self.target, dtype=F64, requires_grad=True),
        }

        def flow(t: Tensor, state: State) -> State:
            a, w = self.drive
            x = flattened(state)
            bent = self.bend * self.scale * torch.tanh(x / self.scale)
            phase = 1 + a * torch.sin(w * self.speed * (t - self.t0))
            return self.pieces(-self.speed * phase * (leaves["rates"] * x + bent))

        def criterion(t: Tensor, state: State) -> Tensor:
            return (self.weights * flattened(state).square()).sum()

        result = stopping_time(
            flow,
            self.pieces(leaves["x0"]),
            criterion,
            leaves["target"],
            t0=leaves["t0"],
            max_time=self.t0 + 1e3 / self.speed,
            gradient=route,
            solver=solver,
            evidence="light",
        )
        assert result.status is Status.REACHED
        return result, leaves

    @property
    def target(self) -> float:
        """eps."""
        return self.depth * float((self.weights * self.start.square()).sum())

    def with_(self, **changes: Any) -> Problem:
        """The same problem but for some fields."""
        return Problem(**{**self.__dict__, **changes})


def flattened(state: State) -> Tensor:
    if isinstance(state, tuple):
        return torch.cat([p.reshape(-1) for p in state])
    return state.reshape(-1)


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype = F64, scales: bool = True) -> Problem:
    """Problems of up to 8 coordinates in one to three tensors of up to three axes."""
    shape = st.lists(st.integers(1, 2), min_size=0, max_size=3).map(tuple)
    shapes = tuple(draw(st.lists(shape, min_size=1, max_size=3)))
    plain = len(shapes) == 1 and draw(st.booleans())
    n = sum(torch.Size(s).numel() for s in shapes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator, dtype=F64)

    scale = 10.0 ** draw(st.integers(-8, 8)) if scales else 1.0
    sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    return Problem(
        shapes=shapes,
        plain=plain,
        rates=uniform(0.5, 3.0).to(dtype),
        weights=uniform(0.5, 2.0).to(dtype),
        start=(scale * sign * uniform(0.5, 1.5)).to(dtype),
        drive=(draw(st.sampled_from([0.0, 0.3, 0.6])), draw(st.sampled_from([0.5, 2.0]))),
        bend=draw(st.sampled_from([0.0, 0.4])),
        depth=10.0 ** draw(st.integers(-6, -1)),
        scale=scale,
        t0=draw(st.sampled_from([0.0, -1.7, 0.4, 12.0])),
    )


def gradients(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(leaves.values()))
    return dict(zip(leaves, (g.double() for g in found), strict=True))


def require_close(found: Tensor, truth: Tensor, bar: float) -> None:
    gap = float((found.double() - truth.double()).norm())
    assert gap <= bar * float(truth.double().norm()), f"{found.tolist()} for {truth.tolist()}"


def compare(
    one: tuple[StoppingResult, dict[str, Tensor]],
    other: tuple[StoppingResult, dict[str, Tensor]],
    *,
    span: float = 1.0,
    factors: dict[str, Any],
    bar: float,
) -> None:
    """T - t0 and dT of the other are those of the one times `span` and `factors`."""
    (first, leaves), (second, images) = one, other
    of_first = (first.time - leaves["t0"]).detach()
    of_second = (second.time - images["t0"]).detach()
    require_close(of_second, span * of_first, bar)
    g, h = gradients(first.time, leaves), gradients(second.time, images)
    for name, factor in factors.items():
        expected = factor(g[name]) if callable(factor) else factor * g[name]
        require_close(h[name], expected, bar)


class TestContinuous:
    @sample(4)
    @given(problem=problems(), data=st.data())
    def test_permutation_of_coordinates(self, problem: Problem, data: st.DataObject) -> None:
        n = problem.start.numel()
        order = torch.tensor(data.draw(st.permutations(range(n))))
        image = problem.with_(
            shapes=((n,),),
            plain=data.draw(st.booleans()),
            rates=problem.rates[order],
            weights=problem.weights[order],
            start=problem.start[order],
        )
        permuted = lambda g: g[order]  # noqa: E731
        factors = {"x0": permuted, "rates": permuted, "t0": 1.0, "target": 1.0}
        compare(problem.solve(), image.solve(), factors=factors, bar=BAR[F64])

    @sample(4)
    @given(problem=problems(), speed=st.sampled_from([1e-3, 0.1, 7.0, 1e4]))
    def test_rescaling_of_time(self, problem: Problem, speed: float) -> None:
        """F -> c F, with its clock c t: T - t0 and the gradients go with 1/c, dT/dt0 stays."""
        image = problem.with_(speed=speed)
        factors = {"x0": 1 / speed, "rates": 1 / speed, "target": 1 / speed, "t0": 1.0}
        compare(problem.solve(), image.solve(), span=1 / speed, factors=factors, bar=BAR[F64])

    @sample(5)
    @given(problem=problems(scales=False), exponent=st.integers(-8, 8))
    def test_rescaling_of_the_state(self, problem: Problem, exponent: int) -> None:
        """x -> a x takes J to a^2 J: T stays, dT/dx0 goes with 1/a and dT/deps with 1/a^2."""
        a = 10.0**exponent
        image = problem.with_(start=a * problem.start, scale=a)
        factors = {"x0": 1 / a, "target": a**-2, "rates": 1.0, "t0": 1.0}
        compare(problem.solve(), image.solve(), factors=factors, bar=BAR[F64])

    @sample(4)
    @given(problem=problems(), fraction=st.floats(0.1, 0.9))
    def test_shift_along_the_flow(self, problem: Problem, fraction: float) -> None:
        """T(x(s), s) = T(x0, t0) along the path, where dT/dt0 = -lam^T F, and lam goes along."""
        first, leaves = problem.solve()
        start = problem.t0 + fraction * (first.time.item() - problem.t0)
        middle = flattened(first.trajectory(start))  # type: ignore[arg-type]
        a, w = problem.drive

        def flow(t: Tensor, state: State) -> State:
            x = flattened(state)
            bent = problem.bend * problem.scale * torch.tanh(x / problem.scale)
            phase = 1 + a * torch.sin(w * (t - problem.t0))
            return problem.pieces(-phase * (problem.rates * x + bent))

        x0 = middle.detach().requires_grad_(True)
        t0 = torch.tensor(start, dtype=F64, requires_grad=True)
        second = stopping_time(
            flow,
            problem.pieces(x0),
            lambda t, s: (problem.weights * flattened(s).square()).sum(),
            problem.target,
            t0=t0,
            max_time=problem.t0 + 1e3,
            evidence="light",
        )
        span = first.time.item() - problem.t0
        assert abs(second.time.item() - first.time.item()) <= BAR[F64] * span
        lam, by_t0 = torch.autograd.grad(second.time, [x0, t0])
        velocity = flattened(flow(t0, problem.pieces(x0))).detach()
        scale = float((lam * velocity).abs().sum())
        assert abs(float(by_t0 + lam @ velocity)) <= BAR[F64] * scale
        if a == 0.0:
            # An autonomous flow: lam^T F = -1 at both ends.
            assert abs(float(lam @ velocity) + 1) <= BAR[F64]
            g = gradients(first.time, leaves)
            at_start = flattened(flow(leaves["t0"], problem.pieces(leaves["x0"]))).detach()
            assert abs(float(g["x0"] @ at_start.double()) + 1) <= BAR[F64]
            assert abs(float(g["t0"]) - 1) <= BAR[F64]

    @sample(3)
    @given(problem=problems(dtype=torch.float32, scales=False), speed=st.sampled_from([0.1, 7.0]))
    def test_float32(self, problem: Problem, speed: float) -> None:
        """The same figures in float32, at its own tolerance, and the dtypes of the leaves."""
        problem = problem.with_(depth=max(problem.depth, 1e-3))
        result, leaves = problem.solve()
        state = flattened(result.state)
        assert state.dtype == torch.float32
        assert result.time.dtype == F64
        exact = problem.with_(
            **{name: getattr(problem, name).double() for name in ("rates", "weights", "start")}
        )
        factors = dict.fromkeys(leaves, 1.0)
        compare(exact.solve(), (result, leaves), factors=factors, bar=BAR[torch.float32])
        factors = {"x0": 1 / speed, "rates": 1 / speed, "t0": 1.0}
        image = problem.with_(speed=speed).solve()
        compare(problem.solve(), image, span=1 / speed, factors=factors, bar=BAR[torch.float32])


class TestDiscrete:
    """The same for an iteration, where they hold to rounding."""

    @staticmethod
    def solve(problem: Problem, h: float, interpolation: Any) -> tuple[Any, dict[str, Tensor]]:
        leaves = {
            "x0": problem.start.clone().requires_grad_(True),
            "rates": problem.rates.clone().requires_grad_(True),
            "t0": torch.tensor(problem.t0, dtype=F64, requires_grad=True),
            "h": torch.tensor(h, dtype=F64, requires_grad=True),
        }

        def flow(t: Tensor, state: State) -> State:
            a, w = problem.drive
            x = flattened(state)
            bent = problem.bend * problem.scale * torch.tanh(x / problem.scale)
            phase = 1 + a * torch.sin(w * problem.speed * (t - problem.t0))
            return problem.pieces(-problem.speed * phase * (leaves["rates"] * x + bent))

        result = stopping_index(
            Heun(flow, step=leaves["h"]),
            problem.pieces(leaves["x0"]),
            lambda t, s: (problem.weights * flattened(s).square()).sum(),
            problem.target,
            t0=leaves["t0"],
            max_steps=5000,
            interpolation=interpolation,
        )
        assert result.status is Status.REACHED
        return result, leaves

    @sample(4)
    @given(
        problem=problems(),
        data=st.data(),
        exponent=st.integers(-4, 4),
        speed=st.sampled_from([0.25, 8.0, 1024.0]),
        interpolation=st.sampled_from([None, "log", "hermite", "partial_step"]),
    )
    def test_images(
        self,
        problem: Problem,
        data: st.DataObject,
        exponent: int,
        speed: float,
        interpolation: Any,
    ) -> None:
        n = problem.start.numel()
        order = torch.tensor(data.draw(st.permutations(range(n))))
        permuted = lambda g: g[order]  # noqa: E731
        a = 2.0**exponent
        images: list[tuple[Problem, float, dict[str, Any]]] = [
            (
                problem.with_(
                    shapes=((n,),),
                    plain=False,
                    rates=problem.rates[order],
                    weights=problem.weights[order],
                    start=problem.start[order],
                ),
                1.0,
                {"x0": permuted, "rates": permuted, "t0": 1.0, "h": 1.0},
            ),
            (problem.with_(speed=speed, t0=0.0), speed, {"x0": 1.0, "rates": 1.0, "h": speed}),
            (
                problem.with_(start=a * problem.start, scale=a * problem.scale),
                1.0,
                {"x0": 1 / a, "rates": 1.0, "t0": 1.0, "h": 1.0},
            ),
        ]
        result, leaves = self.solve(problem, 0.05, interpolation)
        truth = self.gradients(result.steps, leaves)
        for image, faster, factors in images:
            other, others = self.solve(image, 0.05 / faster, interpolation)
            assert other.index == result.index
            assert abs(float((other.steps - result.steps).detach())) < 1e-7 * result.index
            found = self.gradients(other.steps, others)
            for name, factor in factors.items():
                expected = factor(truth[name]) if callable(factor) else factor * truth[name]
                gap = float((found[name] - expected).norm())
                assert gap <= 1e-7 * max(float(expected.norm()), 1e-9), name

    @staticmethod
    def gradients(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            value, list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, found, strict=True))

    @sample(3)
    @given(problem=problems(dtype=torch.float32, scales=False))
    def test_float32(self, problem: Problem) -> None:
        problem = problem.with_(depth=max(problem.depth, 1e-3))
        exact = problem.with_(
            **{name: getattr(problem, name).double() for name in ("rates", "weights", "start")}
        )
        result, leaves = self.solve(exact, 0.05, "log")
        single, others = self.solve(problem, 0.05, "log")
        assert abs(float((single.steps - result.steps).detach())) < 1e-4 * result.index
        truth, found = self.gradients(result.steps, leaves), self.gradients(single.steps, others)
        for name, expected in truth.items():
            gap = float((found[name] - expected).norm())
            assert gap <= 1e-3 * max(float(expected.norm()), 1e-3), name
