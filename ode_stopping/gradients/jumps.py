"""Jumps of the flow in the state: steps go over them, and their transpose does not know.

Where the flow jumps at a surface in x, the derivative of the flow map jumps as well, by a factor
(a saltation matrix) that the derivative of a step does not have, however short the step. It shows
in what the step makes of the velocity: a smooth flow carries F at the start into F at the end,

    v = Phi_y F_0 + Phi_t - F_1 = 0   up to the error of the step,

and over a jump v is the jump. Element by element, r = v / F says by how much lam is wrong there:
lam - r lam at the start of such a step is right where each element jumps by itself, and near enough
to say how large the error is where not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.consistency import natural_size
from ..core.names import tensors_in
from ..core.status import GradientAccuracyWarning
from ..core.substitution import Substitution
from ..core.warn import warn_user
from ..solving.flow_map import FlowPiece
from ..solving.step import Step
from .problem import StoppingProblem

__all__ = ["shares_of_jumps", "warn_about_moved_jumps", "warn_about_moved_times"]

# Of the velocity: what is less is the error of a step.
_JUMP = 0.1
_SHIFT = 1e-4
# A jump that a leaf moves stays as large when the leaf moves by so much less.
_LESS = 1e-3
_SMALL_JUMP = 1e-8
_HALVINGS = 64


def shares_of_jumps(
    problem: StoppingProblem, coarse: StoppingProblem | None = None
) -> Mapping[int, Tensor]:
    """The steps that go over a jump: r = v / F, shape (n,), by the number of the step.

    Costs a trial step for each of `coarse`, and for each step where something is found.

    Args:
        problem: The solved problem.
        coarse: The same on fewer steps: where those see nothing, there is nothing.
    """
    with torch.no_grad():
        steps = list(enumerate(problem.steps))
        if coarse is not None:
            seen = [step for i, step in enumerate(coarse.steps) if _share(coarse, i) is not None]
            steps = [
                (i, step)
                for i, step in steps
                if any(step.t0 < one.t1 and one.t0 < step.t1 for one in seen)
            ]
        found = ((i, _share(problem, i)) for i, _ in steps)
        return {i: share for i, share in found if share is not None}


def _share(problem: StoppingProblem, index: int) -> Tensor | None:
    """r of one step; None where it goes over no jump."""
    step = problem.steps[index]
    eps = torch.finfo(step.y0.dtype).eps
    shift = max(_SHIFT, eps**0.5) * step.length
    jump = _carried(problem, step, shift) - step.f1
    before, after = step.f0.abs(), step.f1.abs()
    size = torch.maximum(before, after)
    # (An element may be rounded by the size of the others.)
    noise = 10 * eps * torch.maximum(step.y0.abs().max(), step.y1.abs().max())
    large = jump.abs() > _JUMP * size + noise / shift
    if not bool(large.any()):
        return None
    velocity = torch.where(before >= after, step.f0, step.f1)
    return torch.where(large, jump / velocity, 0.0).nan_to_num(0.0, 0.0, 0.0)


def _carried(problem: StoppingProblem, step: Step, shift: float) -> Tensor:
    """Phi_y F_0 + Phi_t, from a step that starts a little later on the line along F_0."""
    flow = problem.flow.on(problem.number_at(step.t0))
    # Not beyond the piece.
    shift = shift if step.t1 + shift <= flow.high else -shift
    t, y = step.t0 + shift, step.y0 + shift * step.f0
    moved = problem.method.trial(flow, t, y, flow(t, y), step.t1 + shift)
    return (moved.y1 - step.y1) / shift


def warn_about_moved_times(problem: StoppingProblem) -> None:
    """Warn by name of tensors that move a jump whose time was given as a number."""
    times = problem.call.times
    places = []
    for index, time in enumerate(times[1:-1]):
        if time < problem.end and time not in problem.call.learned:
            x = problem.trajectory.flat(time)
            sides = [(problem.flow.on(i), time, x) for i in (index, index + 1)]
            places.append(_Place(time, sides))
    _warn(
        problem,
        places,
        "give the time of the jump as a tensor, breakpoints=[...], which has its derivative",
    )


def warn_about_moved_jumps(problem: StoppingProblem, numbers: Iterable[int]) -> None:
    """Warn by name of tensors that move the jumps that some steps go over.

    Args:
        problem: The solved problem.
        numbers: Of the steps.
    """
    places = [_found(problem, problem.steps[number]) for number in numbers]
    _warn(
        problem,
        places,
        "where it is a jump at a time, give that time as a tensor in breakpoints=[...], which has "
        "its derivative; where it is one in the state, smooth the flow",
    )


@dataclass(frozen=True)
class _Place:
    """The two sides of a jump.

    Attributes:
        time: When, in flow time.
        sides: The flow, t and x just before and just after.
    """

    time: float
    sides: Sequence[tuple[FlowPiece, float, Tensor]]

    def values(self) -> list[Tensor]:
        """F on both sides, with what the flow's tensors are now."""
        return [flow(t, x) for flow, t, x in self.sides]


def _found(problem: StoppingProblem, step: Step) -> _Place:
    """Where in a step the flow jumps, by bisection on its dense output."""
    flow, dense = problem.flow.on(problem.number_at(step.t0)), problem.method.dense(step)

    def at(t: float) -> Tensor:
        return step.y0 if t == step.t0 else step.y1 if t == step.t1 else dense(t)

    (low, before), (high, after) = (step.t0, step.f0), (step.t1, step.f1)
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        if not low < middle < high:
            break
        value = flow(middle, at(middle))
        if float((value - before).norm()) > float((after - value).norm()):
            high, after = middle, value
        else:
            low, before = middle, value
    return _Place(low, [(flow, low, at(low)), (flow, high, at(high))])


def _warn(problem: StoppingProblem, places: Sequence[_Place], remedy: str) -> None:
    if not places:
        return
    tensors = _candidates(problem)
    for place in places:
        with torch.no_grad():
            names = _movers(place, tensors)
        if names:
            warn_user(
                f"moving {', '.join(names)} moves the jump of the flow at t = {place.time:.6g}, "
                f"and the gradient lacks what that changes: {remedy}.",
                GradientAccuracyWarning,
            )


def _candidates(problem: StoppingProblem) -> dict[str, Tensor]:
    """Tensors that require grad and may move a jump, which a comparison hides from autograd."""
    named = list(zip(problem.names, problem.leaves.tensors, strict=True))
    named += tensors_in(problem.flow.function, "flow")
    every = {id(p): (name, p) for name, p in reversed(named)}
    return {name: p for name, p in every.values() if p.requires_grad and p.is_floating_point()}


def _movers(place: _Place, tensors: Mapping[str, Tensor]) -> list[str]:
    """Which of the tensors move the jump."""
    before, after = values = place.values()
    jump = float((after - before).norm())
    size = max(float(before.norm()), float(after.norm()))
    if not jump > _SMALL_JUMP * size:
        return []

    def moves(names: Sequence[str]) -> bool:
        far = _change(place, values, [tensors[name] for name in names], 1.0)
        near = _change(place, values, [tensors[name] for name in names], _LESS)
        return near > _JUMP * jump and near > 0.5 * far

    if not moves(list(tensors)):
        return []
    return [name for name in tensors if moves([name])] or list(tensors)


def _change(
    place: _Place, values: Sequence[Tensor], tensors: Sequence[Tensor], share: float
) -> float:
    """The largest change of F on one of the sides when tensors are moved, up or down."""
    largest = 0.0
    for sign in (1.0, -1.0):
        moved = []
        for p in tensors:
            eps = torch.finfo(p.dtype).eps
            length = max(_SHIFT**1.5, 16 * eps / _LESS) * share
            moved.append((p.detach() + sign * length * natural_size(p)).to(p.dtype))
        with Substitution(tensors, moved):
            again = place.values()
        for a, b in zip(again, values, strict=True):
            largest = max(largest, float((a - b).norm()))
    return largest
