"""How a solve with events ends, what it hands out, and bad input."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hybrid_forms import F64, Ball, first, grads, leaf
from torch import Tensor

from ode_stopping import (
    DegenerateCrossingError,
    DivergedError,
    Event,
    MissingGradientError,
    NotReachedError,
    StalledError,
    Status,
    Torchdiffeq,
    integrate,
)


class TestEnds:
    def test_the_first_that_is_missed(self) -> None:
        k = leaf(0.5)
        event = Event(first, 2.0, direction="rising")
        solution = integrate(lambda t, x: -k * x, leaf([1.0]), until=1.0, events=[event])
        assert solution.first(0).item() == float("inf")
        with pytest.raises(NotReachedError, match="FINISHED"):
            solution.first(0).backward()
        assert solution.status is Status.FINISHED
        assert solution.end.event is None
        assert solution.end.count == 1

    def test_the_first_terminal_event_wins(self) -> None:
        events = [Event(first, level, terminal=True) for level in (0.25, 0.5, 0.1)]
        solution = integrate(lambda t, x: -x, leaf([1.0]), events=events)
        assert solution.end.event == 1
        assert len(solution.hits) == 1
        assert solution.statuses == (Status.NOT_REACHED, Status.REACHED, Status.NOT_REACHED)

    def test_not_reached(self) -> None:
        event = Event(first, -1.0, terminal=True)
        solution = integrate(lambda t, x: -x, leaf([1.0]), max_time=2.0, events=[event])
        assert solution.status is Status.NOT_REACHED

    def test_failures_raise_or_are_returned(self) -> None:
        def touching(t: Tensor, x: Tensor) -> Tensor:
            return (x[0] - 1) ** 2

        flow, start = (lambda t, x: 0 * x + 1), torch.zeros(1, dtype=F64)
        cases: list[tuple[type[Exception], Status, dict[str, Any]]] = [
            (DegenerateCrossingError, Status.DEGENERATE, {"events": [Event(touching)]}),
            (
                DivergedError,
                Status.DIVERGED,
                {"events": [Event.at(0.5, reset=lambda t, x: x / 0)]},
            ),
            (StalledError, Status.STALLED, {"solver": Torchdiffeq(max_steps=2)}),
        ]
        for error, status, options in cases:
            with pytest.raises(error) as caught:
                integrate(flow, start, until=2.0, **options)
            assert caught.value.result.status is status  # type: ignore[attr-defined]
            solution = integrate(flow, start, until=2.0, at=[1.9], throw=False, **options)
            assert solution.status is status
            assert bool(solution.states.isnan().all())

    def test_trajectory_has_both_sides(self) -> None:
        ball = Ball()
        solution = integrate(ball.flow, ball.start, until=1.0, events=[ball.impact()])
        time = float(solution.hits[0].time.detach())
        trajectory = solution.trajectory
        assert trajectory.jumps.tolist() == [time]
        assert torch.equal(trajectory(time), solution.hits[0].after.detach())
        assert torch.allclose(trajectory(time, side="left"), solution.hits[0].state.detach())
        speed = trajectory(torch.tensor([time - 1e-6, time + 1e-6]))[:, 1]  # type: ignore[index]
        assert speed.tolist() == pytest.approx(
            [-ball.speed(0).item(), ball.speed(1).item()], rel=1e-5
        )
        with pytest.raises(ValueError, match="must lie in"):
            trajectory(1.5)
        with pytest.raises(ValueError, match="side"):
            trajectory(0.5, side="up")  # type: ignore[arg-type]

    def test_tuples_of_states(self) -> None:
        ball = Ball()
        event = Event(
            lambda t, x: x[0].sum(),
            reset=lambda t, x: (torch.zeros_like(x[0]), -ball.e * x[1]),
            count=2,
        )
        start = (ball.h0.reshape(1), torch.zeros(1, 1, dtype=F64))
        solution = integrate(
            lambda t, x: (x[1].reshape(1), -ball.g.reshape(1, 1)),
            start,
            at=[0.1, 0.2],
            events=[event],
        )
        assert [tuple(piece.shape) for piece in solution.states] == [(2, 1), (2, 1, 1)]
        assert [tuple(piece.shape) for piece in solution.end.after] == [(1,), (1, 1)]
        truth = grads(ball.time(2), *ball.leaves)
        assert grads(solution.end.time, *ball.leaves) == pytest.approx(truth)

    def test_pickle_and_rows(self) -> None:
        ball = Ball()
        solution = integrate(ball.flow, ball.start, at=[0.1], events=[ball.impact(count=2)])
        solution.end.time.backward()
        assert solution.evidence.passed
        again = pickle.loads(pickle.dumps(solution))
        assert again.evidence.passed
        assert repr(again) == repr(solution)
        assert again.to_dict() == solution.to_dict()
        assert not again.end.time.requires_grad
        assert [row["count"] for row in solution.to_dict()["hits"]] == [1, 2]


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({}, ValueError, "nothing ends the solve"),
            ({"events": [Event(first)]}, ValueError, "nothing ends the solve"),
            ({"until": 0.0}, ValueError, "until must be later"),
            ({"until": 1.0, "max_time": 2.0}, ValueError, "not both"),
            ({"until": 1.0, "at": [-1.0]}, ValueError, r"at\[0\] must not be earlier"),
            ({"until": 1.0, "at": 1.0}, TypeError, "at must be a list"),
            ({"until": 1.0, "at": torch.zeros(2, 2)}, ValueError, "1-d"),
            ({"until": 1.0, "at": ["a"]}, TypeError, r"at\[0\]"),
            ({"until": 1.0, "events": Event(first)}, TypeError, "single Event"),
            ({"until": 1.0, "events": [first]}, TypeError, "entry 0"),
            ({"until": 1.0, "events": [Event.at(-1.0)]}, ValueError, "earlier than t0"),
            ({"until": 1.0, "events": [Event(first, float("nan"))]}, ValueError, "target"),
            ({"until": 1.0, "batched": True}, NotImplementedError, "batched"),
            ({"until": 1.0, "solver": 3}, TypeError, "solver"),
        ],
    )
    def test_of_integrate(self, options: Any, error: Any, match: str) -> None:
        with pytest.raises(error, match=match):
            integrate(lambda t, x: -x, torch.ones(1, dtype=F64), **options)

    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"criterion": 3}, TypeError, "criterion"),
            ({"direction": "up"}, ValueError, "direction"),
            ({"terminal": 1}, TypeError, "terminal"),
            ({"count": 0}, ValueError, "count"),
            ({"count": 1.5}, TypeError, "count"),
            ({"reset": 3}, TypeError, "reset"),
        ],
    )
    def test_of_events(self, options: Any, error: Any, match: str) -> None:
        with pytest.raises(error, match=match):
            Event(**({"criterion": first} | options))

    def test_a_reset_of_another_shape(self) -> None:
        event = Event.at(0.5, reset=lambda t, x: torch.cat([x, x]))
        with pytest.raises(ValueError, match="reset"):
            integrate(lambda t, x: -x, torch.ones(1, dtype=F64), until=1.0, events=[event])

    @pytest.mark.parametrize("lost", ["state", "leaf"])
    def test_a_reset_that_loses_its_derivative(self, lost: str) -> None:
        gain = leaf(2.0)

        def reset(t: Tensor, x: Tensor) -> Tensor:
            return gain * x.detach() if lost == "state" else gain.detach() * x + 0 * gain

        with pytest.raises(MissingGradientError, match="reset"):
            integrate(
                lambda t, x: -gain * x,
                leaf([1.0]),
                until=1.0,
                at=[0.9],
                events=[Event.at(0.5, reset=reset)],
            )
