"""What happens where events meet: at the start, at one time, past another surface, without end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hybrid_forms import F64, Ball, first, grads, leaf
from torch import Tensor

from ode_stopping import (
    DirectAdjoint,
    Event,
    InterpolatingAdjoint,
    KinkWarning,
    NotReachedError,
    Status,
    StepAdjoint,
    integrate,
)

EACH = pytest.mark.parametrize(
    "route",
    [StepAdjoint(), InterpolatingAdjoint(), DirectAdjoint()],
    ids=lambda route: type(route).__name__,
)


def wave(t: Tensor, x: Tensor) -> Tensor:
    """(sin t, cos t) from (0, 1)."""
    return torch.stack([x[1], -x[0]])


WAVE = torch.tensor([0.0, 1.0], dtype=F64)


def numbers(solution: Any) -> list[tuple[int, int, float]]:
    return [(hit.event, hit.count, round(float(hit.time.detach()), 6)) for hit in solution.hits]


class TestDirections:
    def test_each_direction(self) -> None:
        """sin t at 1/2: up at pi/6, down at 5 pi/6, and so on."""
        events = [Event(first, 0.5, direction=d) for d in ("falling", "rising", "either")]
        solution = integrate(wave, WAVE, until=9.0, events=events)
        up, down = torch.pi / 6, 5 * torch.pi / 6
        turn = 2 * torch.pi
        assert [t for e, _, t in numbers(solution) if e == 1] == pytest.approx([up, up + turn])
        assert [t for e, _, t in numbers(solution) if e == 2] == pytest.approx(
            [up, down, up + turn, down + turn]
        )
        # sin 0 = 0 is below 1/2 already: a fall to it is met at the start.
        assert [t for e, _, t in numbers(solution) if e == 0] == pytest.approx(
            [0.0, down, down + turn]
        )

    def test_count_is_over_both(self) -> None:
        event = Event(first, 0.5, direction="either", count=3)
        solution = integrate(wave, WAVE, events=[event])
        assert solution.status is Status.REACHED
        assert [hit.count for hit in solution.hits] == [1, 2, 3]
        assert float(solution.end.time) == pytest.approx(torch.pi / 6 + 2 * torch.pi)

    def test_several_hits_in_one_step(self) -> None:
        """x = t is solved in a few steps; sin(20 t) is crossed many times in each."""
        speed = leaf(1.0)
        solution = integrate(
            lambda t, x: speed.reshape(1),
            torch.zeros(1, dtype=F64),
            until=3.0,
            events=[Event(lambda t, x: torch.sin(20 * x[0]), direction="either", leave_first=True)],
        )
        times = [k * torch.pi / 20 for k in range(1, 20)]
        assert [float(hit.time.detach()) for hit in solution.hits] == pytest.approx(times)
        for k, hit in enumerate(solution.hits, 1):
            assert grads(hit.time, speed) == pytest.approx([-k * torch.pi / 20])


class TestStart:
    def test_met_at_the_start(self) -> None:
        x0, t0, level = leaf([1.0]), leaf(0.5), leaf(2.0)
        event = Event(first, level, terminal=True)
        solution = integrate(lambda t, x: -x, x0, t0=t0, events=[event])
        assert solution.status is Status.AT_START
        assert float(solution.end.time.detach()) == 0.5
        assert grads(solution.end.time, t0) == [1.0]
        assert grads(solution.end.state[0], level) == [0.0]
        (by_start,) = torch.autograd.grad(solution.end.state[0], x0)
        assert by_start.tolist() == [1.0]

    @EACH
    def test_a_reset_at_the_start(self, route: Any) -> None:
        """x(t) = (x0 + a) exp(-(t - t0))."""
        x0, t0, dose = leaf([1.0]), leaf(0.5), leaf(3.0)
        event = Event(first, 2.0, reset=lambda t, x: x + dose, count=2)
        solution = integrate(lambda t, x: -x, x0, t0=t0, at=[0.75], events=[event], gradient=route)
        state = solution.states[0, 0]
        factor = float(torch.exp(torch.tensor(-0.25, dtype=F64)))
        assert float(state.detach()) == pytest.approx(4 * factor)
        assert grads(state, dose, t0) == pytest.approx([factor, 4 * factor])
        time = 0.5 + float(torch.log(torch.tensor(2.0, dtype=F64)))
        assert float(solution.end.time.detach()) == pytest.approx(time)
        assert grads(solution.end.time, dose, t0) == pytest.approx([0.25, 1.0])

    def test_leave_first(self) -> None:
        for option in ({"events": [Event(first, 0.5, leave_first=True)]},
                       {"events": [Event(first, 0.5)], "leave_first": True}):  # fmt: skip
            solution = integrate(wave, WAVE, until=5.0, **option)
            assert numbers(solution) == [(0, 1, round(5 * torch.pi / 6, 6))]

    def test_either_never_hits_at_the_start(self) -> None:
        solution = integrate(wave, WAVE, until=7.0, events=[Event(first, direction="either")])
        assert numbers(solution) == [(0, 1, 3.141593), (0, 2, 6.283185)]


class TestTogether:
    @EACH
    def test_a_reset_that_depends_on_time(self, route: Any) -> None:
        """x' = -r, x -> 1 + a t at x = 0: T_2 = T_1 + (1 + a T_1)/r, T_1 = x0/r; and no warning."""
        r, a, x0 = leaf(0.7), leaf(2.5), leaf([1.3])
        again = Event(first, 0.0, reset=lambda t, x: (1 + a * t).reshape(1), count=2)
        solution = integrate(
            lambda t, x: -r * torch.ones_like(x), x0, events=[again], gradient=route
        )
        fallen = x0[0] / r
        expected = fallen + (1 + a * fallen) / r
        time = solution.hits[-1].time
        assert float(time.detach()) == pytest.approx(expected.item(), rel=1e-8)
        found = torch.autograd.grad(time, [r, a, x0])
        right = torch.autograd.grad(expected, [r, a, x0])
        for one, other in zip(found, right, strict=True):
            assert torch.allclose(one, other, rtol=1e-7)

    @EACH
    def test_independent_resets_at_one_time(self, route: Any) -> None:
        """Two balls that fall from one height: each has its own derivatives, and no word."""
        one, two = Ball(), Ball()

        def flow(t: Tensor, x: Tensor) -> Tensor:
            return torch.cat([one.flow(t, x[:2]), two.flow(t, x[2:])])

        events = [
            Event(
                first,
                reset=lambda t, x: torch.stack([0 * x[0], -one.e * x[1], x[2], x[3]]),
            ),
            Event(
                lambda t, x: x[2],
                reset=lambda t, x: torch.stack([x[0], x[1], 0 * x[2], -two.e * x[3]]),
            ),
        ]
        start = torch.cat([one.start, two.start])
        solution = integrate(flow, start, until=3.0, events=events, gradient=route)
        assert [hit.event for hit in solution.hits] == [0, 1] * 3
        for hit in solution.hits:
            ball, other = (one, two) if hit.event == 0 else (two, one)
            truth = grads(ball.time(hit.count), *ball.leaves)
            assert grads(hit.time, *ball.leaves) == pytest.approx(truth, rel=1e-7)
            assert grads(hit.time, *other.leaves) == pytest.approx([0.0] * 3, abs=1e-9)

    def test_the_order_is_said_to_matter(self) -> None:
        """x -> x + 1 and x -> 2 x at one time."""
        events = [
            Event.at(1.0, reset=lambda t, x: x + 1),
            Event.at(1.0, reset=lambda t, x: 2 * x),
        ]
        x0 = leaf([1.0])

        def run(order: list[Event]) -> float:
            with pytest.warns(KinkWarning, match="together"):
                solution = integrate(lambda t, x: 0 * x, x0, until=2.0, at=[1.5], events=order)
            return float(solution.states[0, 0].detach())

        assert run(events) == 4.0
        assert run(events[::-1]) == 3.0

    def test_events_that_meet_are_taken_in_order(self) -> None:
        """x = t and y = 2 t meet 1 and 2 at one time; the first reset takes the second away."""
        speed = leaf(1.0)
        events = [
            Event(first, 1.0, direction="rising", reset=lambda t, x: torch.stack([x[0], 0 * x[1]])),
            Event(lambda t, x: x[1], 2.0, direction="rising"),
        ]

        def run(order: list[Event]) -> list[int]:
            solution = integrate(
                lambda t, x: torch.stack([speed, 2 * speed]),
                torch.zeros(2, dtype=F64),
                until=1.5,
                events=order,
            )
            return [order[hit.event] is events[1] for hit in solution.hits]  # type: ignore[index]

        with pytest.warns(KinkWarning, match="together"):
            assert run(events) == [False]
        with pytest.warns(KinkWarning, match="together"):
            assert run(events[::-1]) == [True, False]

    @EACH
    def test_a_reset_past_another_target(self, route: Any) -> None:
        """x = v t to 1, where y jumps by 2, past 1.5; that one takes x back by 0.5 at once."""
        v, jump = leaf(1.0), leaf(2.0)
        events = [
            Event(
                first,
                1.0,
                direction="rising",
                reset=lambda t, x: torch.stack([0 * x[0], x[1] + jump]),
            ),
            Event(
                lambda t, x: x[1],
                1.5,
                direction="rising",
                reset=lambda t, x: torch.stack([x[0] - 0.25 * x[1], 0 * x[1]]),
            ),
        ]
        solution = integrate(
            lambda t, x: torch.stack([v, 0 * v]),
            torch.zeros(2, dtype=F64),
            until=3.0,
            events=events,
            gradient=route,
        )
        assert numbers(solution) == [(0, 1, 1.0), (1, 1, 1.0), (0, 2, 2.5), (1, 2, 2.5)]
        # T_2 = (1 + jump/4)/v + 1/v.
        for hit in solution.hits[2:]:
            assert grads(hit.time, v, jump) == pytest.approx([-2.5, 0.25])
        assert grads(solution.hits[1].time, v, jump) == pytest.approx([-1.0, 0.0])

    def test_resets_without_end_at_one_time(self) -> None:
        """Each puts the state past the target of the other."""
        events = [
            Event(first, 1.0, direction="rising", reset=lambda t, x: x - 9),
            Event(first, -1.0, reset=lambda t, x: x + 9),
        ]
        solution = integrate(lambda t, x: 0 * x + 1, torch.zeros(1, dtype=F64), until=2.0,
                             events=events)  # fmt: skip
        assert solution.status is Status.ZENO
        assert "at once" in solution.note


class TestZeno:
    def test_a_reset_onto_its_own_surface(self) -> None:
        """v+ = +v: it goes on through the floor."""
        ball = Ball(-0.5)
        solution = integrate(ball.flow, ball.start, until=9.0, events=[ball.impact()])
        assert solution.status is Status.ZENO
        assert len(solution.hits) == 1

    def test_a_ball_that_stays_down(self) -> None:
        ball = Ball(0.0)
        solution = integrate(ball.flow, ball.start, until=9.0, events=[ball.impact()])
        assert solution.status is Status.ZENO
        assert len(solution.hits) == 1
        truth = grads(ball.time(1), *ball.leaves)
        assert grads(solution.hits[0].time, *ball.leaves) == pytest.approx(truth)

    def test_a_count_ends_before_it(self) -> None:
        ball = Ball(0.5)
        solution = integrate(ball.flow, ball.start, until=9.0, events=[ball.impact(count=3)])
        assert solution.status is Status.REACHED


class TestKnownTimes:
    @EACH
    def test_doses(self, route: Any) -> None:
        """x = sum of a_i exp(-k (t - t_i)); the third comes too late, with a zero gradient."""
        k, doses, times, at = leaf(0.5), leaf([1.0, 2.0, 5.0]), leaf([0.5, 1.5, 9.0]), leaf(2.5)
        events = [
            Event.at(time, reset=lambda t, x, i=i: x + doses[i])
            for i, time in enumerate(times.unbind())
        ]
        solution = integrate(
            lambda t, x: -k * x,
            torch.zeros(1, dtype=F64),
            until=3.0,
            at=[at, 1.5],
            events=events,
            gradient=route,
        )
        assert numbers(solution) == [(0, 1, 0.5), (1, 1, 1.5)]
        exact = (doses[:2] * torch.exp(-k * (at - times[:2]))).sum()
        behind = doses[0] * torch.exp(-k * (times[1] - times[0])) + doses[1]
        assert solution.states[0, 0].item() == pytest.approx(exact.item())
        assert solution.states[1, 0].item() == pytest.approx(behind.item())  # behind the dose
        leaves = (k, doses, times, at)
        found = torch.autograd.grad(solution.states[0, 0], leaves, retain_graph=True)
        for a, b in zip(found, torch.autograd.grad(exact, leaves), strict=True):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)

    @EACH
    def test_what_does_not_take_place_has_a_zero_derivative(self, route: Any) -> None:
        late, level, asked, x0 = leaf(5.0), leaf(0.01), leaf(6.0), leaf([1.0])
        solution = integrate(
            lambda t, x: -x,
            x0,
            until=1.0,
            at=[0.5, asked],
            events=[Event.at(late, reset=lambda t, x: 2 * x), Event(first, level)],
            gradient=route,
        )
        found = torch.autograd.grad(solution.states[0, 0], [late, level, asked, x0])
        assert [float(one) for one in found[:3]] == [0.0, 0.0, 0.0]

    def test_two_doses_at_one_time_commute(self) -> None:
        """Of a linear flow: no word of their order."""
        doses = leaf([1.0, 2.0])
        events = [Event.at(0.5, reset=lambda t, x, i=i: x + doses[i]) for i in range(2)]
        solution = integrate(
            lambda t, x: -x, torch.zeros(1, dtype=F64), until=1.0, at=[0.5], events=events
        )
        (found,) = torch.autograd.grad(solution.states[0, 0], doses)
        assert found.tolist() == pytest.approx([1.0, 1.0])

    def test_values_anywhere(self) -> None:
        """At t0, at the end, twice, in any order; beyond the end NaN, which raises."""
        k, t0 = leaf(0.5), leaf(0.0)
        solution = integrate(
            lambda t, x: -k * x, leaf([1.0]), t0=t0, until=2.0, at=[2.0, 0.0, 1.0, 1.0, 2.5]
        )
        exact = torch.exp(-k * torch.tensor([2.0, 0.0, 1.0, 1.0], dtype=F64))
        assert solution.states[:4, 0].tolist() == pytest.approx(exact.tolist())
        assert bool(solution.states[4].isnan().all())
        found = torch.autograd.grad(solution.states[:4, 0].sum(), [k, t0], retain_graph=True)
        assert float(found[0]) == pytest.approx(float(torch.autograd.grad(exact.sum(), k)[0]))
        assert float(found[1]) == pytest.approx((0.5 * exact).sum().item(), rel=1e-6)
        with pytest.raises(NotReachedError, match="did not come to"):
            solution.states.sum().backward()

    def test_a_terminal_time(self) -> None:
        end = leaf(1.25)
        solution = integrate(lambda t, x: x, leaf([1.0]), events=[Event.at(end, terminal=True)])
        assert solution.status is Status.REACHED
        assert grads(solution.end.time, end) == [1.0]
        assert grads(solution.end.state[0], end) == pytest.approx([solution.end.state.item()])
