"""Situations that have no right number: what `integrate` says of each, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ode_stopping import (
    DegenerateCrossingError,
    DivergedError,
    Event,
    GradientAccuracyWarning,
    KinkWarning,
    MissingGradientError,
    NotReachedError,
    StalledError,
    Status,
    Torchdiffeq,
    integrate,
)

F64 = torch.float64
# By name: the outcome, as docs/public-examples.md has it, and where the situation was seen.
OUTCOMES: dict[str, tuple[str, str]] = {}


def outcome(
    name: str, says: str, seen: str = "-"
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Note what a test holds, for the page."""

    def noted(test: Callable[..., None]) -> Callable[..., None]:
        OUTCOMES[name] = (says, seen)
        return test

    return noted


def leaf(*values: float) -> Tensor:
    given: Any = values[0] if len(values) == 1 else list(values)
    return torch.tensor(given, dtype=F64, requires_grad=True)


def state(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def falling(gravity: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, x: torch.stack([x[1], -gravity])


def height(t: Tensor, x: Tensor) -> Tensor:
    return x[0]


def gliding(t: Tensor, x: Tensor) -> Tensor:
    """Constant velocities: (x, y, vx, vy)."""
    return torch.stack([x[2], x[3], 0 * x[2], 0 * x[3]])


# --- the end, and what never comes ----------------------------------------------------------------


@outcome("bouncing ball until it rests", "`ZENO`, with all bounces so far", "Modelica by Example")
def test_a_ball_that_bounces_ever_faster() -> None:
    e = leaf(0.5)
    ball = Event(height, reset=lambda t, x: torch.stack([torch.zeros_like(x[0]), -e * x[1]]))
    solution = integrate(falling(state(9.81)[0]), state(1.0, 0.0), until=10.0, events=[ball])
    assert solution.status is Status.ZENO
    fall = math.sqrt(2 / 9.81)
    assert solution.end.time.item() == pytest.approx(3 * fall, rel=1e-7)  # (1 + e)/(1 - e) falls
    assert len(solution.hits) > 20
    (slope,) = torch.autograd.grad(solution.first(0, 8), [e])
    right = 2 * fall * sum(k * 0.5 ** (k - 1) for k in range(1, 8))
    assert slope.item() == pytest.approx(right, rel=1e-7)


@outcome("event that never comes before the end", "inf; `NotReachedError` where differentiated")
def test_an_event_that_never_comes() -> None:
    g = leaf(9.81)
    solution = integrate(falling(g), state(1.0, 0.0), until=0.1, events=[Event(height)])
    assert solution.status is Status.FINISHED
    assert solution.hits == ()
    missed = solution.first(0)
    assert math.isinf(missed.item())
    with pytest.raises(NotReachedError, match="FINISHED"):
        torch.autograd.grad(missed, [g])


@outcome(
    "terminal event that never comes",
    "`NOT_REACHED`; `NotReachedError` where differentiated",
    "diffrax, tests of events",
)
def test_a_terminal_event_that_never_comes() -> None:
    g = leaf(9.81)
    land = Event(height, terminal=True)
    solution = integrate(falling(g), state(1.0, 0.0), max_time=0.1, events=[land])
    assert solution.status is Status.NOT_REACHED
    assert math.isinf(solution.first(0).item())
    with pytest.raises(NotReachedError, match="NOT_REACHED"):
        torch.autograd.grad(solution.end.time, [g])


@outcome("nothing that ends the solve", "`ValueError`")
def test_nothing_that_ends_it() -> None:
    with pytest.raises(ValueError, match="nothing ends the solve"):
        integrate(falling(leaf(9.81)), state(1.0, 0.0), events=[Event(height)])


@outcome("integration backward in time", "`ValueError`")
def test_backward_in_time() -> None:
    with pytest.raises(ValueError, match="until must be later than t0"):
        integrate(falling(leaf(9.81)), state(1.0, 0.0), t0=1.0, until=0.0)


@outcome("flow that is not defined behind some time", "`DivergedError`")
def test_a_flow_that_turns_nan() -> None:
    k = leaf(1.0)
    with pytest.raises(DivergedError, match="t = 1"):
        integrate(
            lambda t, x: torch.log(1 - k * t) * x,
            state(1.0),
            until=3.0,
            events=[Event(height, -5.0)],
        )


@outcome("solution that blows up before the event", "`StalledError`")
def test_a_blow_up() -> None:
    k = leaf(1.0)
    with pytest.raises(StalledError):
        integrate(
            lambda t, x: k * x * x,
            state(1.0),
            until=3.0,
            events=[Event(height, 1e30, direction="rising")],
            solver=Torchdiffeq(max_steps=2000),
        )


# --- at the start ---------------------------------------------------------------------------------


@outcome(
    "event that is met at t0",
    "T = t0, its derivative 1 to t0 and 0 to all else",
    "diffrax, tests of events",
)
def test_met_at_t0() -> None:
    g, t0 = leaf(9.81), leaf(0.3)
    land = Event(height, terminal=True)
    solution = integrate(falling(g), state(-1.0, 0.0), t0=t0, events=[land])
    assert solution.end.time.item() == 0.3
    slopes = torch.autograd.grad(solution.end.time, [t0, g], allow_unused=True)
    assert slopes[0].item() == 1.0
    assert slopes[1] is None or slopes[1].item() == 0.0


@outcome("start on the event, both directions", "not met at t0; the next passage")
def test_either_is_not_met_at_t0() -> None:
    g, v = leaf(9.81), leaf(5.0)
    solution = integrate(
        falling(g),
        torch.stack([torch.zeros_like(v), v]),
        events=[Event(height, direction="either", count=1)],
    )
    assert solution.end.time.item() == pytest.approx(10 / 9.81, rel=1e-7)
    slopes = torch.autograd.grad(solution.end.time, [v, g])
    assert slopes[0].item() == pytest.approx(2 / 9.81, rel=1e-7)
    assert slopes[1].item() == pytest.approx(-10 / 9.81**2, rel=1e-7)


# --- resets ---------------------------------------------------------------------------------------


@outcome("reset that leaves the state on its own event, going through", "`ZENO`")
def test_a_reset_onto_its_own_event() -> None:
    # A hopper that switches to its spring at touchdown, without a mode in the criterion.
    k = leaf(400.0)
    touch = Event(height, 1.0, reset=lambda t, x: torch.stack([x[0], x[1], x[2] + 1]))
    solution = integrate(
        lambda t, x: torch.stack([x[1], x[2] * k * (1 - x[0]) - 9.81, 0 * x[2]]),
        state(1.4, 0.0, 0.0),
        until=2.0,
        events=[touch],
    )
    assert solution.status is Status.ZENO
    assert solution.end.time.item() == pytest.approx(math.sqrt(0.8 / 9.81), rel=1e-7)


@outcome(
    "cell that divides: a reset to another size", "`ValueError`", "docs of DifferentialEquations.jl"
)
def test_a_reset_to_another_size() -> None:
    divide = Event(height, 2.0, direction="rising", reset=lambda t, x: torch.cat([x / 2, x / 2]))
    with pytest.raises(ValueError, match="reset must return the shape of the state"):
        integrate(lambda t, x: x, state(1.0), until=3.0, events=[divide])


@outcome("reset that writes into the state", "`ValueError`")
def test_a_reset_in_place() -> None:
    with pytest.raises(ValueError, match="in place"):
        integrate(
            falling(leaf(9.81)),
            state(1.0, 0.0),
            until=1.0,
            events=[Event(height, reset=lambda t, x: x.mul_(-1))],
        )


@outcome("reset that loses its graph", "`MissingGradientError`")
def test_a_reset_without_its_graph() -> None:
    g = leaf(9.81)
    lost = Event(height, reset=lambda t, x: state(0.0, -0.8 * x[1].item()))
    with pytest.raises(MissingGradientError, match="reset"):
        integrate(falling(g), state(1.0, 0.0), until=0.8, events=[lost])


# --- two at one time ------------------------------------------------------------------------------


def corner(first: Callable[..., Tensor], second: Callable[..., Tensor], x0: Tensor) -> Any:
    events = [Event(height, reset=first), Event(lambda t, x: x[1], reset=second)]
    return integrate(gliding, x0, until=3.0, events=events)


@outcome("ball into a corner", "right: the two bounces do not depend on their order")
def test_a_corner() -> None:
    x0 = leaf(1.0, 1.0, -1.0, -1.0)
    solution = corner(
        lambda t, x: torch.stack([x[0], x[1], -x[2], x[3]]),
        lambda t, x: torch.stack([x[0], x[1], x[2], -x[3]]),
        x0,
    )
    assert [hit.event for hit in solution.hits] == [0, 1]
    torch.testing.assert_close(solution.end.state, state(2.0, 2.0, 1.0, 1.0))
    # x(3) = -(x0 + 3 v0), v(3) = -v0
    (slopes,) = torch.autograd.grad(solution.end.state.sum(), [x0])
    torch.testing.assert_close(slopes, state(-1.0, -1.0, -4.0, -4.0))


def final(x0: Tensor) -> Tensor:
    solution = corner(
        lambda t, x: torch.stack([x[0], x[1], -2 * x[2] + x[3] / 2, x[3]]),
        lambda t, x: torch.stack([x[0], x[1], x[2], -x[3] + 0.3 * x[2]]),
        x0,
    )
    return solution.end.state.sum()


def earlier(x0: Tensor) -> Tensor:
    """T = min(x0, y0/2)."""
    solution = integrate(
        lambda t, x: torch.stack([-1 + 0 * x[0], -2 + 0 * x[1]]),
        x0,
        events=[Event(height, terminal=True), Event(lambda t, x: x[1], terminal=True)],
    )
    return solution.end.time


@outcome("two resets at one time whose order matters", "`KinkWarning`")
def test_two_resets_at_one_time_whose_order_matters() -> None:
    x0 = leaf(1.0, 1.0, -1.0, -1.0)
    with pytest.warns(KinkWarning):
        torch.autograd.grad(final(x0), [x0])


@outcome("two terminal events at one time", "the first in the list, and a `KinkWarning`")
def test_two_terminal_events_at_one_time() -> None:
    x0 = leaf(1.0, 2.0)
    with pytest.warns(KinkWarning):
        torch.autograd.grad(earlier(x0), [x0])


# --- criteria and flows without a derivative ------------------------------------------------------


@outcome("top of the flight as the target: a touch, no crossing", "`DegenerateCrossingError`")
def test_a_touch() -> None:
    top = Event(height, 9.81 / 2, direction="rising", terminal=True)
    with pytest.raises(DegenerateCrossingError):
        integrate(falling(leaf(9.81)), state(0.0, 9.81), until=3.0, events=[top])


@outcome("condition that is True or False", "`TypeError`", "diffrax, `Event`")
def test_a_boolean_condition() -> None:
    with pytest.raises(TypeError, match="floating-point"):
        integrate(lambda t, x: -x, state(1.0), until=3.0, events=[Event(lambda t, x: x[0] < 0.5)])


@outcome("condition as 0.0 or 1.0", "`MissingGradientError`")
def test_a_condition_as_a_number() -> None:
    k = leaf(1.0)
    low = Event(lambda t, x: (x[0] < 0.5).to(F64), 0.5, direction="rising", terminal=True)
    with pytest.raises(MissingGradientError, match="piecewise constant"):
        integrate(lambda t, x: -k * x, state(1.0), until=3.0, events=[low])


@outcome(
    "vector of conditions as one event",
    "`ValueError`",
    "diffrax, tests of events; SciPy, issue 13018",
)
def test_a_vector_of_conditions() -> None:
    with pytest.raises(ValueError, match="scalar"):
        integrate(falling(leaf(9.81)), state(1.0, 0.0), until=1.0, events=[Event(lambda t, x: x)])


def switched(rate: Tensor, slow: Tensor) -> Any:
    """x' = -rate x above 1/2, -slow x below, with the mode in the state."""
    # The mode holds the criterion away from its target once it is passed.
    below = Event(
        lambda t, x: x[0] + x[1], 0.5, reset=lambda t, x: torch.stack([x[0], 1 + 0 * x[1]])
    )
    return integrate(
        lambda t, x: torch.stack([-((1 - x[1]) * rate + x[1] * slow) * x[0], 0 * x[1]]),
        state(1.0, 0.0),
        events=[below, Event(height, 0.2, terminal=True)],
    )


@outcome("flow that jumps in the state, not declared", "`GradientAccuracyWarning`")
def test_a_jump_of_the_flow_that_is_not_declared() -> None:
    rate, slow = leaf(1.0), leaf(2.0)
    solution = integrate(
        lambda t, x: -torch.where(x[0] > 0.5, rate, slow) * x,
        state(1.0),
        events=[Event(height, 0.2, terminal=True)],
    )
    with pytest.warns(GradientAccuracyWarning, match="the flow jumps"):
        torch.autograd.grad(solution.end.time, [rate, slow])


@outcome("flow that jumps in the state, by an event and a mode", "right")
def test_a_jump_of_the_flow_by_an_event() -> None:
    rate, slow = leaf(1.0), leaf(2.0)
    solution = switched(rate, slow)
    # T = log(2)/rate + log(5/2)/slow
    assert solution.end.time.item() == pytest.approx(math.log(2) + math.log(2.5) / 2, rel=1e-7)
    slopes = torch.autograd.grad(solution.end.time, [rate, slow])
    assert slopes[0].item() == pytest.approx(-math.log(2), rel=1e-6)
    assert slopes[1].item() == pytest.approx(-math.log(2.5) / 4, rel=1e-6)


@outcome("event that comes and goes inside one step", "right: both passages", "SciPy, issue 9228")
def test_a_bump_inside_a_step() -> None:
    height_of_bump = leaf(1.0)
    solution = integrate(
        lambda t, x: torch.zeros_like(x),
        state(1.0),
        until=10.0,
        events=[
            Event(
                lambda t, x: x[0] - height_of_bump * torch.exp(-(((t - 5.03) / 0.3) ** 2)),
                0.5,
                direction="either",
            )
        ],
    )
    wide = 0.3 * math.sqrt(math.log(2))
    times = [hit.time.item() for hit in solution.hits]
    assert times == pytest.approx([5.03 - wide, 5.03 + wide], rel=1e-9)
    (slope,) = torch.autograd.grad(solution.first(0, 2), [height_of_bump])
    # wide = 0.3 sqrt(log(2 a))
    assert slope.item() == pytest.approx(0.3 / (2 * math.sqrt(math.log(2))), rel=1e-6)
