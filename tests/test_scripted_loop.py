"""The loop that finds crossings, on scripted steps: no flow is solved, no number is approximate.

The state is one number, the criterion is that number, and a step ends where the script says, with
an error that is nil or so large that the step is rejected. What remains is the loop's own doing:
the order of hits, rejections, limits, ends, and what is kept.
"""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scripted import (
    Keeping,
    Scene,
    Script,
    contiguous,
    indices,
    line,
)
from torch import Tensor

from ode_stopping import Status

F64 = torch.float64


# --- hits ---------------------------------------------------------------------------------------


def test_one_target() -> None:
    run, method = Scene(line(3.25, -1.0)).run()
    (hit,) = run.hits
    assert (run.status, hit.status) == (Status.REACHED, Status.REACHED)
    assert run.time == hit.time == pytest.approx(3.25, abs=1e-14)
    assert hit.point is not None
    assert hit.point.rate == -1.0
    assert method.trials[:4] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert run.trajectory.times.tolist() == pytest.approx([0, 1, 2, 3, 3.25], abs=1e-14)
    assert run.trajectory.values.tolist() == pytest.approx([3.25, 2.25, 1.25, 0.25, 0], abs=1e-14)
    assert (run.stats.accepted, run.stats.rejected) == (4, 0)


def test_hits_are_in_the_order_of_time() -> None:
    """Targets as they were given, some of them met in one step, two of them alike."""
    targets = (0.4, 2.6, 0.5, 1.5, 2.6)
    run, _ = Scene(line(3.25, -1.0), targets, route=Keeping(True)).run()
    assert indices(run.hits) == [1, 4, 3, 2, 0]
    for hit in run.hits:
        assert hit.status is Status.REACHED
        assert hit.time == pytest.approx(3.25 - targets[hit.watch.index], abs=1e-14)
        assert hit.state.item() == pytest.approx(targets[hit.watch.index], abs=1e-14)
    assert [run.hit(index).time for index in range(5)] == pytest.approx(  # type: ignore[union-attr]
        [3.25 - target for target in targets], abs=1e-14
    )
    assert run.status is Status.REACHED
    assert run.time == run.hits[-1].time


def test_where_hits_stand_on_the_path() -> None:
    """A hit on the way has a partial step from its node; the last one is the last node."""
    run, _ = Scene(line(3.25, -1.0), (2.6, 1.5, 0.4), route=Keeping(True)).run()
    *aside, last = run.hits
    steps = run.trajectory.steps
    for hit in aside:
        assert hit.steps[0].t0 == steps[hit.node].t0 < hit.time < steps[hit.node].t1
        assert hit.steps[-1].t1 == hit.time
        assert contiguous(hit.steps)
    assert last.steps == ()
    assert last.node == len(steps)
    assert steps[-1].t1 == last.time
    # The marks are among the times of the trajectory, in order.
    assert run.trajectory.times.tolist() == pytest.approx([0, 0.65, 1, 1.75, 2, 2.85], abs=1e-14)


def test_targets_on_a_node() -> None:
    """Met at the end of a step exactly, and not again in the next."""
    run, _ = Scene(line(3.0, -1.0), (2.0, 1.0, 0.0)).run()
    assert [hit.time for hit in run.hits] == pytest.approx([1, 2, 3], abs=1e-13)


def test_met_at_the_start() -> None:
    run, method = Scene(line(3.0, -1.0), (5.0, 3.0)).run()
    assert indices(run.hits) == [0, 1]
    assert {hit.status for hit in run.hits} == {run.status} == {Status.AT_START}
    assert run.time == 0.0
    assert method.trials == []


def test_met_at_the_start_and_later() -> None:
    run, _ = Scene(line(3.0, -1.0), (0.5, 5.0)).run()
    assert [(hit.watch.index, hit.status) for hit in run.hits] == [
        (1, Status.AT_START),
        (0, Status.REACHED),
    ]


def test_two_crossings_inside_one_step() -> None:
    """y = 4 (t - 0.3)(t - 0.7): above the target at both ends of the step."""
    script: Script = lambda t: (4 * (t - 0.3) * (t - 0.7), 8 * t - 4)  # noqa: E731
    run, method = Scene(script).run()
    assert method.trials[0] == (0, 1)
    assert run.status is Status.REACHED
    assert run.time == pytest.approx(0.3, abs=1e-14)


def test_a_rise_is_no_hit() -> None:
    """y rises through the lower target's value only after it fell through it."""
    script: Script = lambda t: (4 * (t - 0.3) * (t - 0.7), 8 * t - 4)  # noqa: E731
    run, _ = Scene(script, (0.5, -0.1), times=(0.0, 3.0)).run()
    times = [0.5 - math.sqrt(0.04 + target / 4) for target in (0.5, -0.1)]
    assert [hit.time for hit in run.hits] == pytest.approx(times, abs=1e-13)


def test_a_touch_is_degenerate() -> None:
    """y = 4 (t - 0.5)^2: down to the target, and no further."""
    run, _ = Scene(lambda t: (4 * (t - 0.5) ** 2, 8 * t - 4)).run()
    (hit,) = run.hits
    assert run.status is hit.status is Status.DEGENERATE
    assert hit.time == pytest.approx(0.5, abs=1e-6)
    assert "J'(T) =" in hit.note


def test_a_dip_above_the_target_is_a_near_miss() -> None:
    """y = (t - 1.5)^2 + 0.1 before t = 3, then the line that goes on from there, downwards."""

    def script(t: float) -> tuple[float, float]:
        if t <= 3:
            return (t - 1.5) ** 2 + 0.1, 2 * t - 3
        return 2.35 - (t - 3), -1.0

    run, _ = Scene(script, times=(0.0, 3.0, 100.0)).run()
    assert run.time == pytest.approx(5.35, abs=1e-13)
    near = run.hits[0].near_miss
    assert near is not None
    assert (near.time, near.margin) == pytest.approx((1.5, 0.1), abs=1e-12)
    assert near.rebound == pytest.approx(2.25, abs=1e-12)


# --- rejections and limits ----------------------------------------------------------------------


def test_rejected_steps_are_counted_and_tried_again_shorter() -> None:
    """By a factor of 5 a time, which is the most."""
    run, method = Scene(line(2.5, -1.0), rejections={0.0: 2, 1.0: 1}).run()
    first = [end for start, end in method.trials if start == 0.0]
    assert first == pytest.approx([1.0, 0.2, 0.04], rel=1e-12)
    assert run.stats.rejected == 2 + (1.0 in run.trajectory.times.tolist())
    assert run.time == pytest.approx(2.5, abs=1e-13)
    assert run.stats.accepted == len(run.trajectory.times) - 1


def test_a_rejection_leaves_the_hits_alone() -> None:
    """A trial beyond the target that is rejected is not looked at."""
    run, method = Scene(line(0.5, -1.0), (0.25, 0.0), rejections={0.0: 1}).run()
    assert method.trials[0] == (0, 1)
    assert [hit.time for hit in run.hits] == pytest.approx([0.25, 0.5], abs=1e-13)
    assert run.stats.rejected == 1


@pytest.mark.parametrize("rejections", [{}, {0.0: 3}, {0.0: 100}])
def test_the_step_limit(rejections: dict[float, int]) -> None:
    """Accepted and rejected steps count alike."""
    scene = Scene(line(50.0, -1.0), rejections=rejections, solver={"max_steps": 7})
    run, method = scene.run()
    assert run.status is Status.STALLED
    assert run.note == "the step limit of 7 was used up"
    assert run.hits == ()
    assert len(method.trials) == run.stats.accepted + run.stats.rejected == 7
    assert run.stats.rejected == min(sum(rejections.values()), 7)
    assert run.time == run.trajectory.times[-1].item()


def test_the_step_limit_keeps_the_hits_before_it() -> None:
    run, _ = Scene(line(50.0, -1.0), (0.0, 48.5), solver={"max_steps": 7}).run()
    assert run.status is Status.STALLED
    assert indices(run.hits) == [1]
    assert run.hit(0) is None


def test_a_step_size_that_underflows() -> None:
    run, method = Scene(line(50.0, -1.0), rejections={2.0: 10**6}).run()
    assert run.status is Status.STALLED
    assert "step size underflow at t = 2" in run.note
    assert run.time == 2.0
    start, end = method.trials[-1]
    assert start == 2.0 < end < 2.0 + 1e-14


def test_the_horizon() -> None:
    run, method = Scene(line(50.0, -1.0), (0.0, 48.5), times=(0.0, 3.5)).run()
    assert run.status is Status.NOT_REACHED
    assert run.note == "at the horizon 3.5"
    assert run.time == 3.5
    assert run.state.item() == 46.5
    assert max(end for _, end in method.trials) == 3.5
    assert indices(run.hits) == [1]
    assert run.best == (46.5, 3.5)


def test_a_start_time_of_its_own() -> None:
    run, method = Scene(lambda t: (5 - t, -1.0), times=(2.5, 100.0)).run()
    assert method.trials[0] == (2.5, 3.5)
    assert run.time == pytest.approx(5.0, abs=1e-13)


def test_rest() -> None:
    """Nothing moves: the horizon is not walked to."""
    run, method = Scene(line(1.0, 0.0), times=(0.0, 1e6)).run()
    assert run.status is Status.NOT_REACHED
    assert "come to rest" in run.note
    assert len(method.trials) < 400


# --- what is not finite -------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_states_that_are_not_finite(bad: float) -> None:
    """From t = 2.5 on: the steps up to there shrink to nothing."""
    run, _ = Scene(lambda t: (9.0 - t if t < 2.5 else bad, -1.0)).run()
    assert run.status is Status.DIVERGED
    assert run.time == pytest.approx(2.5, abs=1e-12)
    assert math.isfinite(run.state.item())
    assert run.stats.rejected > 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_velocity_that_is_not_finite_at_the_start(bad: float) -> None:
    run, method = Scene(line(5.0, -1.0), velocity=lambda t: bad).run()
    assert run.status is Status.DIVERGED
    assert run.note == "the flow is not finite at t = 0"
    assert method.trials == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_criterion_that_is_not_finite(bad: float) -> None:
    """From t = 2.5 on; a crossing before that is still found."""
    for start, status in ((9.0, Status.DIVERGED), (2.25, Status.REACHED)):
        run, _ = Scene(
            line(start, -1.0), criterion=lambda t, x: x[0] if bool(t < 2.5) else x[0] * bad
        ).run()
        assert run.status is status
        assert run.time == pytest.approx(min(start, 2.5), abs=1e-9)


def test_a_criterion_that_is_not_finite_at_the_start() -> None:
    run, method = Scene(line(5.0, -1.0), criterion=lambda t, x: x[0] * math.nan).run()
    assert run.status is Status.DIVERGED
    assert run.note == "J is not finite at t0"
    assert method.trials == []


# --- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [None, Keeping(False), Keeping(True)], ids=str)
def test_what_is_kept(route: Keeping | None) -> None:
    """Times and values always; the steps for a route that needs them."""
    run, _ = Scene(line(3.25, -1.0), (1.5, 0.0), route=route, rejections={0.0: 1}).run()
    path = run.trajectory
    assert len(path.times) == len(path.values)
    assert [hit.time for hit in run.hits] == pytest.approx([1.75, 3.25], abs=1e-13)
    if route is None or not route.needs_path:
        assert path.steps == []
        with pytest.raises(RuntimeError, match="states were not kept"):
            path.flat(0.5)
        return
    assert contiguous(path.steps)
    assert (path.steps[0].t0, path.steps[-1].t1) == (0.0, run.time)
    for t in (0.0, 0.5, 1.75, 3.1, run.time):
        assert path.flat(t).item() == pytest.approx(3.25 - t, abs=1e-13)


def test_the_last_steps_of_a_long_run_are_taken_again() -> None:
    """Finer, and the path is whole afterwards."""
    run, method = Scene(line(30.5, -1.0), (10.25, 0.0), route=Keeping(True)).run()
    steps = run.trajectory.steps
    assert contiguous(steps)
    assert steps[-1].t1 == run.time == pytest.approx(30.5, abs=1e-12)
    assert [step.t0 for step in steps] + [run.time] == [
        t for t in run.trajectory.times.tolist() if t != run.hits[0].time
    ]
    assert len(steps) > 31
    assert run.hits[-1].node == len(steps) == run.stats.accepted
    # What was taken again is not the path before the first of the last three steps.
    assert [step.t1 for step in steps[:27]] == [float(k) for k in range(1, 28)]
    assert len(method.trials) > len(steps)


# --- breakpoints --------------------------------------------------------------------------------


def test_breakpoints_end_steps_exactly() -> None:
    times = (0.0, 0.1 + 0.2, 2.7, 100.0)
    run, method = Scene(line(5.25, -1.0), times=times, route=Keeping(True)).run()
    ends = [step.t1 for step in run.trajectory.steps]
    assert times[1] in ends
    assert times[2] in ends
    for start, end in method.trials:
        assert not any(start < t < end for t in times[1:-1])
    assert run.time == pytest.approx(5.25, abs=1e-13)
    assert contiguous(run.trajectory.steps)


def test_a_hit_after_a_breakpoint_stands_on_the_right_node() -> None:
    run, _ = Scene(
        line(5.25, -1.0), (4.0, 2.0, 0.0), times=(0.0, 1.5, 2.7, 100.0), route=Keeping(True)
    ).run()
    assert [hit.time for hit in run.hits] == pytest.approx([1.25, 3.25, 5.25], abs=1e-13)
    for hit in run.hits[:-1]:
        assert run.trajectory.steps[hit.node].t0 == hit.steps[0].t0


def jumping(t: Tensor, x: Tensor) -> Tensor:
    """J falls by 2 at the breakpoint t = 1.5."""
    return x[0] - (2.0 if bool(t > 1.5) else 0.0)


def test_a_jump_over_targets_is_degenerate() -> None:
    """J = 5 - t, from 3.5 to 1.5 at the breakpoint: 3 and 2 are jumped over, 4 and 0.5 are not."""
    targets = (0.5, 2.0, 4.0, 3.0)
    scene = Scene(line(5.0, -1.0), targets, (0.0, 1.5, 100.0), criterion=jumping)
    run, _ = scene.run()
    assert [(hit.watch.index, hit.status) for hit in run.hits] == [
        (2, Status.REACHED),
        (3, Status.DEGENERATE),
        (1, Status.DEGENERATE),
        (0, Status.REACHED),
    ]
    assert [hit.time for hit in run.hits] == pytest.approx([1.0, 1.5, 1.5, 2.5], abs=1e-13)
    for hit in run.hits[1:3]:
        assert hit.note.startswith("J jumps over the target")
        assert hit.state.item() == pytest.approx(3.5, abs=1e-13)
    assert run.status is Status.REACHED


def test_a_jump_over_the_last_target_ends_the_run() -> None:
    scene = Scene(line(5.0, -1.0), (4.0, 3.0), (0.0, 1.5, 100.0), criterion=jumping)
    run, method = scene.run()
    assert run.status is Status.DEGENERATE
    assert run.time == 1.5
    assert indices(run.hits) == [0, 1]
    assert max(end for _, end in method.trials) == 1.5


def test_a_jump_that_nobody_named_has_no_derivative() -> None:
    """The steps shrink towards it, and the last of them says what it is."""
    run, _ = Scene(line(5.0, -1.0), (4.0, 3.0), (0.0, 100.0), criterion=jumping).run()
    assert run.status is Status.DEGENERATE
    assert run.note.startswith("J jumps over the target")
    assert run.time == pytest.approx(1.5, abs=1e-8)
    assert indices(run.hits) == [0, 1]


# --- a criterion that is faster than the steps --------------------------------------------------


def test_a_step_that_does_not_resolve_the_criterion_is_given_back() -> None:
    """J = 2 - t/10 + sin(7 t): a step of length 1 is longer than a period."""

    def wave(t: float) -> float:
        return 2.0 - 0.1 * t + math.sin(7 * t)

    run, method = Scene(
        line(2.0, -0.1), (0.5,), criterion=lambda t, x: x[0] + torch.sin(7 * t)
    ).run()
    grid = [k * 1e-4 for k in range(200_000)]
    first = next(t for t in grid if wave(t) <= 0.5)
    assert run.time == pytest.approx(first, abs=1e-4)
    assert run.stats.rejected > 0
    longest = max(b - a for a, b in pairwise(run.trajectory.times.tolist()))
    assert longest < 0.5
    assert method.trials[0] == (0, 1)
