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

from collections.abc import Mapping

import torch
from torch import Tensor

from ..solving.step import Step
from .problem import StoppingProblem

__all__ = ["shares_of_jumps"]

# Of the velocity: what is less is the error of a step.
_JUMP = 0.1
_SHIFT = 1e-4


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
    jump = _carried(problem, step) - step.f1
    before, after = step.f0.abs(), step.f1.abs()
    size = torch.maximum(before, after)
    eps = torch.finfo(size.dtype).eps
    shift = max(_SHIFT, eps**0.5)
    noise = 10 * eps * torch.maximum(step.y0.abs(), step.y1.abs()) / (shift * step.length)
    large = jump.abs() > _JUMP * size + noise
    if not bool(large.any()):
        return None
    velocity = torch.where(before >= after, step.f0, step.f1)
    return torch.where(large, jump / velocity, 0.0).nan_to_num(0.0, 0.0, 0.0)


def _carried(problem: StoppingProblem, step: Step) -> Tensor:
    """Phi_y F_0 + Phi_t, from a step that starts a little later on the line along F_0."""
    number = sum(t <= step.t0 for t in problem.call.times[1:-1])
    flow = problem.flow.on(number)
    shift = max(_SHIFT, torch.finfo(step.y0.dtype).eps ** 0.5) * step.length
    # Not beyond the piece.
    shift = shift if step.t1 + shift <= flow.high else -shift
    t, y = step.t0 + shift, step.y0 + shift * step.f0
    moved = problem.method.trial(flow, t, y, flow(t, y), step.t1 + shift)
    return (moved.y1 - step.y1) / shift
